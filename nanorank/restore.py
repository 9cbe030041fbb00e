"""
A model, its optimizers and its run from a checkpoint dict that may be damaged, foreign or hostile.

Everything that is not as it must be is a UserError that names the file and the part.
"""
import math

import torch

from nanorank.errors import UserError

COUNTS = (
    "n_layer", "n_head", "n_embd", "vocab_size", "block_size",
    "n_classes", "image_size", "patch_size",
)


def saved_args(args):
    """A model's arguments as a checkpoint holds them: nanoGPT's loader does not know these, so they are
    saved only where the model is not nanoGPT's."""
    default = {"tied": True, "mlp": True, "post_norm": False, "rope": False, "n_kv_head": 0, "qk_norm": False}
    return {name: x for name, x in args.items() if name not in default or x != default[name]}


def restore_model(model_class, ckpt, error_prefix, path="", **changes):
    """A model of this class from a checkpoint dict, some of its arguments changed.

    error_prefix: the error's first words, where the dict is of something else.
    path: the file, for errors; empty where the caller names it.
    """
    try:
        return build_model(model_class, ckpt, error_prefix, changes)
    except UserError as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from None


def build_model(model_class, ckpt, error_prefix, changes):
    is_gpt = model_class.__name__ == "GPT"  # by name: this file imports nothing above it
    args = ckpt.get("model_args") if isinstance(ckpt, dict) else None
    if isinstance(args, dict):
        has_gpt_args, has_vit_args = "vocab_size" in args, "n_classes" in args
        if (has_vit_args and is_gpt and not has_gpt_args) or (has_gpt_args and not is_gpt):
            raise UserError(f"{error_prefix} (it is a {'GPT' if has_gpt_args else 'ViT'})")
    if isinstance(ckpt, dict) and not isinstance(ckpt.get("config") or {}, dict):
        raise UserError(f"{error_prefix} (its config is no dict of settings)")

    try:
        state = {}
        for name, p in ckpt["model"].items():
            if name.endswith(".attn.bias"):  # the causal mask that old nanoGPT saved
                continue
            for wrapper in ("_orig_mod.", "module.", "_orig_mod."):
                name = name.removeprefix(wrapper)
            state[name] = p
        args = {**ckpt["model_args"], **changes}
        check_size(args, state)
        model = model_class(**args)
        model.load_state_dict(state)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{error_prefix} ({type(error).__name__}: {reason})") from None

    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise UserError(f"{name} holds NaN or inf")
    return model


def check_size(args, state):
    """Refuses model_args that are no counts, or that describe a larger model than the state dict holds.

    Otherwise a file of a few bytes could ask for any amount of memory.
    """
    counts = {name: args[name] for name in COUNTS if name in args}
    n_held = sum(p.numel() for p in state.values())
    if all(type(x) is int for x in counts.values()):
        get = counts.get
        positions = 0 if args.get("rope") else get("block_size", 0)
        rows = get("vocab_size", 0) + positions + get("n_classes", 0) + 3 * get("patch_size", 0)**2
        n_least = get("n_layer") * get("n_embd")**2 + rows * get("n_embd")
        fits = n_least <= max(n_held, 2**24) and get("n_layer") <= len(state)
        if fits and get("image_size", 0) <= 2**14:
            return
    named = ", ".join(f"{name}={str(x)[:20]}" for name, x in counts.items())
    raise UserError(f"model_args describe more than the {len(state)} tensors of {n_held:,} numbers that it "
                    f"holds, or are no counts: {named}")


def check_model_args(args):
    """Raises UserError for arguments that no GPT or ViT can have: {name: value}."""
    counts = {name: x for name, x in args.items() if name in COUNTS}
    if min(counts.values()) < 1 or args["n_embd"] % args["n_head"]:
        named = ", ".join(f"{name}={x}" for name, x in counts.items())
        raise UserError(f"{named}: expects at least 1 each, and n_embd a multiple of n_head")
    if "image_size" not in args:
        return check_attention_args(args)
    n_embd, size, patch = args["n_embd"], args["image_size"], args["patch_size"]
    pool, positions = args["pool"], args["positions"]
    if size % patch:
        raise UserError(f"image_size={size} must be a multiple of patch_size={patch}")
    if pool not in ("gap", "cls") or positions not in ("sincos2d", "learned"):
        raise UserError(f"pool={pool}, positions={positions}: expects gap or cls, sincos2d or learned")
    if positions == "sincos2d" and (n_embd % 4 or n_embd < 8):
        raise UserError(f"n_embd={n_embd} must be a multiple of 4, at least 8, for sincos2d positions")


def check_attention_args(args):
    """Raises UserError for settings of a GPT's attention that do not go together."""
    n_head, n_kv_head = args["n_head"], args["n_kv_head"]
    if type(n_kv_head) is not int or n_kv_head < 0 or n_head % (n_kv_head or n_head):
        raise UserError(f"n_kv_head={n_kv_head}: expects a divisor of n_head={n_head}, or 0 for n_head")
    for name in ("rope", "qk_norm"):
        if type(args[name]) is not bool:
            raise UserError(f"{name}={args[name]}: expects True or False")
    r = args["n_embd"] // n_head
    if args["rope"] and r % 2:
        raise UserError(f"rope turns pairs of rows: heads of n_embd / n_head = {r} rows must be even")


def load_optimizers(optimizers, saved, path):
    """Takes up saved state dicts: a list, or the one of a single optimizer.

    Hyperparameters stay those of this command line, lr is the step's. Raises UserError naming `path`
    where a state is not of these optimizers and parameters, or not finite.
    """
    try:
        states = saved if len(optimizers) > 1 else [saved]
        for opt, state in zip(optimizers, states, strict=True):
            for old, new in zip(state["param_groups"], opt.param_groups):
                old.update({name: x for name, x in new.items() if name not in ("params", "lr")})
            opt.load_state_dict(state)
            check_moments(opt)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{path}: its optimizer's state does not fit the model ({reason})") from None


def check_moments(opt):
    """Raises UserError unless all parameters have the same finite moments, or none has any yet."""
    n_params = sum(len(group["params"]) for group in opt.param_groups)
    kinds = {frozenset(moments) for moments in opt.state.values()}
    if len(kinds) > 1 or len(opt.state) not in (0, n_params):
        raise UserError("not all parameters have the same moments")
    for p, moments in opt.state.items():
        for name, x in moments.items():
            if x is None or type(x) in (int, float):
                continue
            fits = isinstance(x, torch.Tensor) and x.shape in ((), p.shape) and bool(x.isfinite().all())
            if not fits:
                shape = tuple(x.shape) if isinstance(x, torch.Tensor) else str(x)[:50]
                raise UserError(f"{name} of a parameter {tuple(p.shape)} is {shape}, or not finite")


def is_number(x, kind=float, below=math.inf):
    return type(x) is kind and 0 <= x < below


def is_settings(x):
    return isinstance(x, dict) and all(type(value) in (bool, int, float, str) for value in x.values())


def is_decay(x):
    return isinstance(x, dict) and all(isinstance(name, str) and is_number(wd) for name, wd in x.items())


RESUMABLE = {  # what exact resume needs beside the weights
    "config": is_settings,
    "iter_num": lambda x: is_number(x, int, 2**31),
    "best_val_loss": lambda x: type(x) is float and not math.isnan(x),
    "seconds": is_number,
    "log_bytes": lambda x: is_number(x, int, 2**63),
    "wandb_id": lambda x: isinstance(x, str),
    "scaler": lambda x: isinstance(x, dict),
    "decay": is_decay,
    "optimizer": lambda x: isinstance(x, (dict, list)),
}


def check_resumable(ckpt, path, script):
    """Raises UserError where a checkpoint lacks something that exact resume needs."""
    if "data" not in ckpt:
        raise UserError(f"{path} is not {script}'s: --init_from={path} takes its weights into a new run")
    checks = dict(RESUMABLE)
    if "overruled" in ckpt:  # of a run that began with --init_from=PATH
        checks["overruled"] = is_settings
    for name, check in checks.items():
        if name not in ckpt or not check(ckpt[name]):
            value = str(ckpt.get(name, "missing"))[:50]
            raise UserError(f"{path} is damaged, its {name} is {value}: --init_from={path} takes its weights "
                            "into a new run")
