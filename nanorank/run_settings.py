"""
Settings that every trainer has: which values make sense, and which may change when a run is resumed.
"""
import math

from configurator import spelled
from nanorank.errors import UserError

TENTH = -1  # min_lr: a tenth of the peak
AUTO = {"min_lr": TENTH, "qk_wd": -1}  # what may be negative, and stands for another setting then

# A resumed run is the same run. The first settings must not change at all. The second may always
# change. Any other changes only where --init_from=resume asks for it.
SAME_ON_RESUME = (
    "dataset", "seed", "total_batch_size", "block_size", "image_size", "standardize", "variant", "patch_size",
    "n_layer", "n_head", "n_embd", "mlp", "post_norm", "bias", "tied", "vocab_size", "pool", "positions",
    "rope", "n_kv_head", "qk_norm", "optimizer", "qk_wd", "qk_decay",
)
FREE_ON_RESUME = (
    "out_dir", "init_from", "overwrite", "eval_only", "device", "dtype", "compile", "data_dir", "batch_size",
    "bf16_residual", "log_interval", "eval_interval", "eval_iters", "rank_interval", "snapshot_steps",
    "save_in_thread",
    "wandb_log", "wandb_project", "wandb_run_name",
)
# settings that older runs do not know, as they had them
BEFORE = {"rope": False, "n_kv_head": 0, "qk_norm": False, "qk_wd": -1.0, "qk_decay": "l2"}
# a run may have these otherwise than the model that it starts from
NOT_SHAPE = ("block_size", "image_size", "dropout", "drop_path")
# the smallest and the largest value of train_vit's augmentation
RANGES = {
    "crop_area": (1e-9, 1), "crop_ratio": (1, 100), "flip": (0, 1), "randaug_magnitude": (0, 10),
}


def check_settings(settings):
    """Raises UserError that names the setting, its value and the fix, for settings that every trainer has."""
    for name, value in settings.items():
        number = isinstance(value, (int, float))
        if number and value < 0 and AUTO.get(name) != value:
            raise UserError(f"--{name}={value} must not be negative")
        if number and value == math.inf:
            raise UserError(f"--{name}={value} must be finite")
        if type(value) is int and value >= 2**31:
            raise UserError(f"--{name}={value} is too large")
        if name in ("beta1", "beta2", "dropout", "drop_path", "label_smoothing") and value >= 1:
            raise UserError(f"--{name}={value} is not in [0, 1)")
        if name in ("log_interval", "eval_interval", "eval_iters", "block_size", "image_size") and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
        low, high = RANGES.get(name, (-math.inf, math.inf))
        if number and not low <= value <= high:
            raise UserError(f"--{name}={value} is not in its range, {low:g} to {high:g}")
    if settings.get("eval_resize", math.inf) < settings.get("image_size", 0):
        raise UserError(f"--eval_resize={settings['eval_resize']} must be at least "
                        f"--image_size={settings['image_size']}, which is cut out of it")
    peak = settings["learning_rate"]
    if settings["min_lr"] > peak:
        raise UserError(f"--min_lr={settings['min_lr']} is above --learning_rate={peak}, the peak: lower it, "
                        f"or give --min_lr={TENTH} for a tenth of the peak")
    if settings["warmup_lr"] > peak and settings["warmup_iters"]:
        raise UserError(f"--warmup_lr={settings['warmup_lr']} is above --learning_rate={peak}, the peak: "
                        "lower it, or give --warmup_iters=0")
    qk_decay = settings.get("qk_decay", "l2")
    if qk_decay not in ("l2", "nuclear"):
        raise UserError(f"--qk_decay={qk_decay}: expects l2 or nuclear")
    if qk_decay == "nuclear" and settings["qk_wd"] < 0:
        raise UserError("--qk_decay=nuclear needs --qk_wd, what it takes off singular values in units of the "
                        "learning rate: attn_wd is of another unit")
    if qk_decay == "nuclear" and settings["optimizer"] == "adam":
        raise UserError("--qk_decay=nuclear acts on the weights, not in the gradient: it takes "
                        "--optimizer=adamw, sgd or muon, not adam")
    if str(settings["compile"]).lower() != "auto" and spelled(settings["compile"]) is NotImplemented:
        raise UserError(f"--compile={settings['compile']}: expects auto, true or false")


def lr_end(learning_rate, min_lr):
    """Where the cosine ends: min_lr, where -1 stands for a tenth of the peak."""
    return learning_rate / 10 if min_lr == TENTH else min_lr


def lr_end_of_run(settings, chosen, old):
    """Where the cosine of a run ends. A resumed run whose peak is the same and whose min_lr nobody has chosen
    now ends where it was to end; old: its settings, {} for a new run."""
    end = old.get("min_lr")
    same = "min_lr" not in chosen and old.get("learning_rate") == settings["learning_rate"]
    if same and type(end) is float and 0 <= end < math.inf:
        return end
    return lr_end(settings["learning_rate"], settings["min_lr"])


def split_batch(settings, world_size):
    """(batch size of a micro-step, micro-steps) of each process: how total_batch_size is split.

    A micro-step takes the largest divisor of the process's share that is at most batch_size, so one
    command runs on any number of processes that divides total_batch_size.
    """
    total, most = settings["total_batch_size"], settings["batch_size"]
    if total < 1 or most < 1:
        raise UserError(f"--total_batch_size={total} and --batch_size={most} must be at least 1")
    if total % world_size:
        raise UserError(f"--total_batch_size={total} must be a multiple of the {world_size} processes")
    share = total // world_size
    pairs = settings.get("mixup") or settings.get("cutmix")  # these take images two by two
    for size in range(min(share, most), 0, -1):
        if share % size == 0 and not (pairs and size % 2):
            return size, share // size
    raise UserError(f"--batch_size={most} must be even, and so must each process's share of "
                    f"--total_batch_size={total}: mixup and CutMix take images in pairs")


def check_same_run(ckpt, path, new, fingerprint, max_iters):
    """Refuses to resume where settings (new), data or schedule are those of another run.

    fingerprint: of the training data. Returns the changes that are allowed, as text.
    """
    old = {**BEFORE, **ckpt["config"]}
    overruled = ckpt.get("overruled", {})
    refused, allowed = {}, []
    for name in new:
        # a setting that the old run did not know is no change, nor is one that its model has overruled
        if name in FREE_ON_RESUME or name not in old:
            continue
        if new[name] == old[name] or (name in overruled and new[name] == overruled[name]):
            continue
        change = f"{name} was {old[name]}, is {new[name]}"
        if name not in SAME_ON_RESUME and new["init_from"] == "resume":
            allowed.append(change)
        else:
            refused[name] = change

    if ckpt["iter_num"] > max_iters:
        by = f"--max_iters={max_iters}"
        if "epochs" in new and not new["max_iters"]:
            by = f"--epochs={new['epochs']} ({max_iters} steps)"
        raise UserError(f"{path} is at step {ckpt['iter_num']}, beyond {by}: raise that, or begin another "
                        f"run with --init_from={path} and an --out_dir of its own")
    reasons = list(refused.values())
    if ckpt["data"] != fingerprint:
        reasons.append("the data on disk is not what it was trained on")
    if reasons:
        advice = "; the same settings resume it, another --out_dir begins a new run"
        free = not refused.keys() & set(SAME_ON_RESUME)
        if free and ckpt["data"] == fingerprint:
            advice = "; --init_from=resume goes on with the new values"
        raise UserError(f"{path} is another run: {'; '.join(reasons)}{advice}")
    return allowed


def overruled_by(args, path, settings, chosen, sizes):
    """{setting: value} that a checkpoint's model has otherwise than the settings say.

    args: the model's. sizes: a ViT variant's, for which its settings of 0 stand.
    Raises UserError where somebody has chosen such a setting.
    """
    overruled, refused = {}, []
    for name, value in args.items():
        if name in NOT_SHAPE or name not in settings:
            continue
        asked, by = settings[name], name
        if type(asked) is int and asked == 0:
            asked, by = sizes.get(name, 0), "variant"
        if asked == value:
            continue
        overruled[name] = value
        if by in chosen and name in (by, *sizes):
            refused.append((by, name))
    if refused:
        wrong = ", ".join(sorted({f"--{by}={settings[by]}" for by, _ in refused}))
        right = " ".join(f"--{name}={overruled[name]}" for _, name in refused)
        raise UserError(f"{path} holds another model than {wrong}: leave that out, or give {right}")
    return overruled


def parse_steps(text, max_iters):
    """The set of steps that --snapshot_steps names: "100,200,400", "every:1000" or "log:20"."""
    kind, _, number = text.partition(":")
    try:
        if "-" in text:
            raise ValueError
        if kind == "every" and int(number) > 0:
            return {*range(0, max_iters + 1, int(number)), max_iters}
        if kind == "log" and int(number) > 0:
            n = int(number)
            return {0} | {round(max(1, max_iters) ** (i / max(1, n - 1))) for i in range(n)}
        return {int(step) for step in text.split(",") if step.strip()}
    except ValueError:
        raise UserError(f'--snapshot_steps={text}: expects "100,200,400", "every:1000" or "log:20"') from None
