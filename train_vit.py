"""
Trains a plain Vision Transformer on data/NAME/ with attention decayed apart from the rest, and logs the rank of its attention products.

    python train_vit.py config/vit_demo.py                                    # small, any machine, data made on first use
    torchrun --nproc_per_node=8 train_vit.py --attn_wd=0.0                    # 8 GPUs, ViT-S/16 on ImageNet for 90 epochs
    python train_vit.py --batch_size=256                                      # 1 GPU, accumulates to the same 1024 images a step
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST0 --nproc_per_node=8 train_vit.py --batch_size=64    # one line a node

The defaults are the plain ViT-S/16 baseline of Beyer, Zhai, Kolesnikov 2022 (arXiv 2205.01580): marked "Beyer" below. P1 (Kobayashi et al.
2024) publishes no ViT settings; what Beyer leaves open is ours and says so. Writes OUT_DIR/ckpt.pt, step_*.pt, log.jsonl, result.json and
source/. SIGTERM or Ctrl-C finishes the step and saves; --init_from=resume goes on, to the bit on a CPU.

Batches and every random choice of the augmentation are a pure function of seed and sample number, whatever the number of processes.
test_acc in result.json is on the split that prepare_imagenet.py calls test: ImageNet's official 50,000 validation images.
"""
import contextlib
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from configurator import configure, current
from model import ViT, decay_groups, init_weights, load_optimizers, load_vit, make_optimizers, vit_size
from nanorank.augment import flips, mix, rand_augment, random_crops, resize
from nanorank.console import StopSignal, print0, time_left
from nanorank.device import all_sum, init_dist, peak_flops, pick_dtype
from nanorank.errors import UserError, user_errors
from nanorank.families import attention_layers
from nanorank.files import load_pt, save_json, save_pt
from nanorank.images import ImageSplit, centre_crops
from nanorank.rng import hash64, shuffled
from nanorank.run import (
    check_nan,
    check_resume,
    check_settings,
    end,
    find_run,
    lock_run,
    make_data,
    parse_steps,
    read_steps,
    run_errors,
    start_log,
    stopped,
)
from nanorank.spectra import summary
from nanorank.tokens import prefetch

# --------------------------------------------------------------------------------------------------------------- settings
# run
out_dir = "out/vit"             # folder of the run
init_from = "scratch"           # scratch, resume (out_dir/ckpt.pt), auto (resume where there is one), or the PATH of a checkpoint
overwrite = False               # let scratch start over in an out_dir that holds a run
eval_only = False               # evaluate whole val and test splits, write eval.json, end
seed = 1337                     # of initialisation, data order, augmentation, dropout and drop path
device = "auto"                 # auto, cpu, cuda, mps
dtype = "auto"                  # autocast: auto (bfloat16 where a GPU has it), float32, bfloat16, float16
compile = "auto"                # torch.compile: auto (on CUDA), true, false
# data
dataset = "imagenet"            # data/NAME, as prepare_imagenet.py makes it
data_dir = "data"               # where NAME is
total_batch_size = 1024         # images per optimizer step over all processes; Beyer: 1024
batch_size = 128                # images per process and micro-step; accumulation follows: total / (batch_size * processes)
image_size = 224                # side of what the model sees, in pixels; Beyer: 224
eval_resize = 256               # evaluation: short side before the central image_size pixels are cut out; Beyer: 256
standardize = False             # subtract the train split's channel means, divide by their deviations; False: pixels to [-1, 1]; Beyer: False
# augmentation of training images, on the training device
crop_area = 0.05                # smallest share of the image that a random resized crop takes, 1: the whole image; Beyer: 0.05
crop_ratio = 4 / 3              # its aspect ratio is from 1 / this to this; Beyer: 4/3
flip = 0.5                      # probability of a horizontal flip; Beyer: 0.5
randaug_layers = 2              # RandAugment operations an image; Beyer: 2
randaug_magnitude = 10.0        # their strength, 0 to 10 by big_vision's formulas, whose 0 is not "no change"; Beyer: 10
mixup = 0.2                     # alpha of mixup, 0: none; Beyer: 0.2
cutmix = 0.0                    # alpha of CutMix, 0: none; with mixup too, each pair of images gets one of the two; ours
label_smoothing = 0.0           # share of the target that is spread over all classes; ours
# model
variant = "S/16"                # Ti, S, B or L / side of a patch in pixels; Beyer: S/16
patch_size = 0                  # side of a patch in pixels, 0: the variant's
n_layer = 0                     # 0: the variant's
n_head = 0                      # 0: the variant's
n_embd = 0                      # 0: the variant's
pool = "gap"                    # what the head reads: gap (mean over tokens) or cls (a class token); Beyer: gap
positions = "sincos2d"          # sincos2d (fixed) or learned; Beyer: sincos2d
dropout = 0.0                   # ours
drop_path = 0.0                 # of the last block, rising linearly from 0 at the first; ours
bias = True                     # biases in the blocks' linear layers and norms; Beyer: True
# weight decay, multiplied by the learning rate (torch's AdamW): Beyer's 1e-4 is not, so it is 1e-4 / learning_rate here; norms, biases: never
attn_wd = 0.1                   # q, k, v and output projections of attention; Beyer: 1e-4 / 1e-3
mlp_wd = 0.1                    # the two MLP matrices; Beyer: 1e-4 / 1e-3
embed_wd = 0.1                  # patch projection, learned positions and head; Beyer: 1e-4 / 1e-3
# optimizer
optimizer = "adamw"             # adamw, adam (L2 in the gradient), sgd, muon (decoupled decay but for adam); Beyer: adamw
learning_rate = 1e-3            # peak; Beyer: 1e-3
warmup_lr = 0.0                 # where warm-up starts; Beyer: 0
min_lr = 0.0                    # where the cosine ends; Beyer: 0
warmup_iters = 10_000           # steps of linear warm-up; Beyer: 10,000
epochs = 90.0                   # passes over the training images; Beyer: 90
max_iters = 0                   # steps in all, 0: as many as epochs asks for
beta1 = 0.9                     # Beyer: 0.9
beta2 = 0.999                   # Beyer: 0.999
eps = 1e-8                      # Beyer: 1e-8
momentum = 0.95                 # of sgd and muon; ours
grad_clip = 1.0                 # global gradient norm, 0: none; Beyer: 1
# watching
log_interval = 50               # steps between log lines
eval_interval = 1000            # steps between evaluations, each after saving ckpt.pt
eval_iters = 10                 # evaluation on this many times total_batch_size fixed images of val
rank_interval = 1000            # steps between measurements of rank and norms, 0: none
snapshot_steps = ""             # weights-only step_*.pt at: "100,200,400", "every:1000" or "log:20" (20 log-spaced); empty: none
wandb_log = False               # log to Weights & Biases too (WANDB_MODE=offline works)
wandb_project = "nanorank"      # its project
wandb_run_name = ""             # empty: out_dir

# a resumed run is the same run: these must not change; the rest, but for FREE, changes only where --init_from=resume asks for it
SAME_ON_RESUME = ("dataset", "seed", "total_batch_size", "image_size", "standardize", "variant", "patch_size", "n_layer", "n_head", "n_embd", "pool",
                  "positions", "bias", "optimizer")
FREE_ON_RESUME = ("out_dir", "init_from", "overwrite", "eval_only", "device", "dtype", "compile", "data_dir", "batch_size", "log_interval",
                  "eval_interval", "eval_iters", "rank_interval", "snapshot_steps", "wandb_log", "wandb_project", "wandb_run_name")

# --------------------------------------------------------------------------------------------------------------- batches

def open_data(world):
    """{split: ImageSplit}. The embedded data set is made on first use; any other must be there."""
    folder = os.path.join(data_dir, dataset)
    if dataset == "digits":
        make_data(folder, "-m", "scripts.prepare_imagenet", "--source=digits", f"--dataset={dataset}", f"--data_dir={data_dir}")
    if world.size > 1:
        dist.barrier()
    return {split: ImageSplit(folder, split) for split in ("train", "val", "test")}


def sample_numbers(step, micro, world):
    """Numbers of the samples of a micro-step in the endless training stream, (batch_size,): all that is random about them follows from these."""
    return step * total_batch_size + (micro * world.size + world.rank) * batch_size + np.arange(batch_size)


def train_batches(split, world, start_step, steps, accumulation):
    """Random crops of images, micro-step by micro-step, each epoch without replacement: pixels (batch_size, H, W, 3) uint8,
    sizes (batch_size, 2) of what is valid in them, and labels (batch_size,), on the device."""
    def make(key):
        numbers = sample_numbers(*key, world)
        index = shuffled(split.n_images, seed, int(numbers[0]), batch_size)
        boxes = random_crops(split.heights[index], split.widths[index], seed, numbers, area=(crop_area, 1.0), ratio=(1 / crop_ratio, crop_ratio))
        return *split.read(index, boxes), split.labels[index]

    return prefetch(make, ((step, micro) for step in range(start_step, steps) for micro in range(accumulation)), world.device)


def scaled(x, meta):
    """uint8 images (B, 3, S, S) as the model reads them."""
    if standardize:
        mean, std = (torch.tensor(meta[name], device=x.device).view(3, 1, 1) * 255 for name in ("mean", "std"))
        return (x - mean) / std
    return x / 127.5 - 1


@torch.no_grad()
def augment(pixels, sizes, labels, numbers, meta):
    """What the model trains on: images (B, 3, image_size, image_size) and target distributions over classes (B, n_classes)."""
    x = resize(pixels, sizes, image_size, flip=flips(seed, numbers, flip))
    if randaug_layers:
        x = rand_augment(x, seed, numbers, randaug_layers, randaug_magnitude)
    return mix(scaled(x, meta), labels, len(meta["classes"]), seed, numbers, mixup, cutmix)

# -------------------------------------------------------------------------------------------------------------- schedule

def get_lr(step, steps):
    """Learning rate of step 0 ... steps - 1: linear from warmup_lr to the peak, then cosine to min_lr at `steps`."""
    if step < warmup_iters:
        return warmup_lr + (learning_rate - warmup_lr) * step / warmup_iters
    done = (step - warmup_iters) / max(1, steps - warmup_iters)
    return min_lr + (learning_rate - min_lr) * (1 + math.cos(math.pi * min(1, done))) / 2


def check_images(world):
    """Raises UserError naming the setting, its value and the fix."""
    check_settings(current(globals()), world)
    if eval_resize < image_size:
        raise UserError(f"--eval_resize={eval_resize} must be at least --image_size={image_size}, which is cut out of it")
    if (mixup or cutmix) and batch_size % 2:
        raise UserError(f"--batch_size={batch_size} must be even: mixup and CutMix take images in pairs")
    if not 0 < crop_area <= 1 or not 1 <= crop_ratio <= 100 or flip > 1 or randaug_magnitude > 10:
        raise UserError(f"--crop_area={crop_area} (0 to 1), --crop_ratio={crop_ratio} (1 to 100), --flip={flip} (0 to 1), "
                         f"--randaug_magnitude={randaug_magnitude} (0 to 10): one is out of its range")

# ------------------------------------------------------------------------------------------------------------ evaluation

@torch.no_grad()
@user_errors(os.path.basename(__file__), every_process=True)  # of damaged data
def evaluate(model, split, world, autocast, stop, images=None):
    """{"loss", "acc", "top5"} over `images` evenly spaced images of a split (all by default), over all processes: mean cross-entropy in
    nats, and the shares of images whose class is the likeliest and among the five likeliest. Each image counts exactly once.

    A signal ends the run here: whatever is evaluated was saved before.
    """
    n = min(images or split.n_images, split.n_images)
    index = np.linspace(0, split.n_images - 1, n).round().astype(np.int64)
    batches = -(-n // (batch_size * world.size))
    index = np.pad(index, (0, batches * batch_size * world.size - n), constant_values=-1).reshape(batches, world.size, batch_size)

    def make(i):
        rows = index[i, world.rank]
        real = np.maximum(rows, 0)  # the rest of the last batch: images that do not count
        boxes, parts = centre_crops(split.heights[real], split.widths[real], eval_resize, image_size)
        return *split.read(real, boxes), parts.astype(np.float32), np.where(rows < 0, -1, split.labels[real])

    model.eval()
    total, top1, top5, count, began, spoke = 0.0, 0, 0, 0, time.monotonic(), time.monotonic()
    for i, (pixels, sizes, parts, labels) in enumerate(prefetch(make, range(batches), world.device)):
        if number := stop.anywhere(world):
            stopped(world, number, "while evaluating")
        with autocast:
            logits = model(scaled(resize(pixels, sizes, image_size, boxes=parts), split.meta)).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        total += F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum").item()
        top1, top5, count = top1 + int(hits[:, 0].sum()), top5 + int(hits.sum()), count + int((labels >= 0).sum())
        if time.monotonic() - spoke > 10:
            spoke = time.monotonic()
            print0(f"  evaluating: batch {i + 1} of {batches}, {time_left((spoke - began) / (i + 1) * (batches - i - 1))} left")
    model.train()
    total, top1, top5, count = all_sum(world, total, top1, top5, count)
    return {"loss": total / count, "acc": top1 / count, "top5": top5 / count}

# ------------------------------------------------------------------------------------------------------------------ main

@run_errors(__file__)
def main():
    script = os.path.basename(__file__)
    with user_errors(script):
        stop = StopSignal()
        world = init_dist(device)
        first = world.rank == 0
        check_images(world)
        amp = pick_dtype(dtype, world.device)
        lock = lock_run(out_dir, world) if not eval_only else None
        latest, resume = find_run(out_dir, init_from, overwrite, eval_only)
        if world.size > 1:
            dist.barrier()  # all have looked before the first writes
        data = open_data(world)
        meta, n_train = data["train"].meta, data["train"].n_images
        steps = max_iters or max(1, round(epochs * n_train / total_batch_size))
        snapshots = parse_steps(snapshot_steps, steps)
        settings = current(globals())

        # model: a fresh one, the same on any device and number of processes, or one from disk
        if resume or init_from not in ("scratch", "auto"):
            path = latest if resume else os.path.join(init_from, "ckpt.pt") if os.path.isdir(init_from) else init_from
            checkpoint = load_pt(path)
            try:
                model = load_vit(checkpoint, image_size, dropout, drop_path)
            except ValueError as error:
                raise UserError(f"{path}: {error}") from None
        else:
            own = {name: globals()[name] for name in ("patch_size", "n_layer", "n_head", "n_embd") if globals()[name]}
            model = ViT(len(meta["classes"]), image_size, dropout=dropout, drop_path=drop_path, bias=bias, pool=pool, positions=positions,
                        **{**vit_size(variant), **own})
            init_weights(model, seed)
        if resume and not eval_only:
            check_resume(checkpoint, latest, script, settings, SAME_ON_RESUME, FREE_ON_RESUME, data["train"].fingerprint(), steps)
        trained = (checkpoint.get("config") or {}).get("standardize", standardize) if resume or init_from not in ("scratch", "auto") else standardize
        if trained != standardize:
            raise UserError(f"{path} was trained on pixels with --standardize={trained}: give the same flag")
        if standardize and not min(meta["std"]) > 0:
            raise UserError(f"--standardize: a channel of {os.path.join(data_dir, dataset)} is constant, its deviation in meta.json is 0")
        if model.args["n_classes"] != len(meta["classes"]):
            raise UserError(f"the model has {model.args['n_classes']} classes, {os.path.join(data_dir, dataset)} has {len(meta['classes'])}")
        shape = model.args  # what runs, whatever the flags of an --init_from=PATH say
        model.to(world.device)

    # what runs: the same weights, compiled where that pays, behind DDP where there are several processes
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
    compiling = compile == "true" or (compile == "auto" and world.device.type == "cuda")
    fast = torch.compile(model) if compiling else model
    parallel = DistributedDataParallel(fast, device_ids=[world.device.index] if world.device.type == "cuda" else None,
                                       gradient_as_bucket_view=True) if world.size > 1 else fast  # gradients live in what travels: no copy
    autocast = torch.autocast(world.device.type, amp) if amp != torch.float32 else contextlib.nullcontext()

    if eval_only:
        result = whole_splits(fast, data, world, autocast, stop)
        with user_errors(script):
            if not math.isfinite(result["val_loss"] + result["test_loss"]):
                raise UserError(f"{path}: its loss is not finite: weights that are damaged, or overflow {amp}")
        if first:
            save_json(os.path.join(out_dir, "eval.json"), {**settings, **shape, **result})
        return end(world)

    # optimizer and what else a resumed run takes up
    with user_errors(script):
        groups = decay_groups(model, attn_wd, mlp_wd, embed_wd)
        optimizers = make_optimizers(groups, optimizer, learning_rate, beta1, beta2, eps, momentum, world.device.type)
        scaler = torch.amp.GradScaler(world.device.type, enabled=amp == torch.float16)
        past = {"iter_num": 0, "best_val_loss": math.inf, "seconds": 0.0, "log_bytes": 0, "wandb_id": "",
                "decay": {g["name"]: 0.0 for g in groups}}  # decay: sum of lr * weight decay so far, by group
        if resume:
            past = {name: checkpoint[name] for name in past}
            if scaler.is_enabled() and checkpoint["scaler"]:
                scaler.load_state_dict(checkpoint["scaler"])
            load_optimizers(optimizers, checkpoint["optimizer"], latest)
        start, best_val_loss, seconds, decay = past["iter_num"], past["best_val_loss"], past["seconds"], dict(past["decay"])
        checkpoint = None  # free its memory
        log = start_log(out_dir, lock, resume, past, settings, wandb_project if wandb_log else "", wandb_run_name or out_dir) if first else None

    accumulation = total_batch_size // (batch_size * world.size)
    flops_per_image = model.flops_per_image()
    peak, peak_source = peak_flops(world.device, amp)
    sum_lr = sum(get_lr(step, steps) for step in range(start, steps))
    print0("settings: " + ", ".join(f"{name}={value}" for name, value in settings.items()))
    print0(f"data: {n_train:,} train, {data['val'].n_images:,} val, {data['test'].n_images:,} test images of {len(meta['classes'])} classes, "
           f"short side {meta['short_side']}; {steps} steps are {steps * total_batch_size / n_train:.2f} epochs")
    print0(f"batch: {batch_size} images * {world.size} processes * {accumulation} micro-steps = {total_batch_size} images a step")
    for g in groups:
        print0(f"group {g['name']:5}: {len(g['params']):3} tensors, {sum(p.numel() for p in g['params']):11,} parameters, "
               f"weight decay {g['weight_decay']:g}, {decay[g['name']] + sum_lr * g['weight_decay']:.2f} decay time constants")
    if warmup_iters >= steps:
        print0(f"note: warm-up takes {warmup_iters} steps of {steps}: the learning rate ends at {get_lr(steps, steps):.2e}")
    print0(f"on {world.device}, {amp}, {'compiled' if compiling else 'eager'}; {flops_per_image:,} FLOPs an image, "
           f"MFU against {peak / 1e12:.2f} TFLOP/s ({peak_source})")

    def save_checkpoint(step, log_bytes):
        """Everything a run needs to go on from the top of `step`, in nanoGPT's dict."""
        if first:
            states = [opt.state_dict() for opt in optimizers]
            save_pt(latest, {"model": model.state_dict(), "optimizer": states if len(states) > 1 else states[0], "model_args": model.args,
                          "iter_num": step, "best_val_loss": best_val_loss, "config": settings, "scaler": scaler.state_dict(),
                          "decay": decay, "seconds": seconds, "log_bytes": log_bytes, "wandb_id": log.wandb_id,
                          "data": data["train"].fingerprint()})

    def report():
        """Prints and logs the steps since the last report; ends the run where a loss or a gradient was not finite."""
        nonlocal unread, seconds
        step, lr = unread[-1][:2]
        losses, norms = read_steps(unread, world, scaler, script, latest)
        elapsed = time.perf_counter() - clock
        seconds += elapsed
        loss, norm = losses[-1], norms[-1]
        speed = len(unread) * total_batch_size / elapsed
        mfu = speed * flops_per_image / (peak * world.size)
        if first:
            log(step, train_loss=loss, lr=lr, grad_norm=norm, images_per_s=speed, mfu=mfu)
        print0(f"step {step}: loss {loss:.4f}, lr {lr:.2e}, grad norm {norm:.3f}, {speed:,.0f} images/s, mfu {100 * mfu:.1f}%, "
               f"{time_left((steps - step - 1) * elapsed / len(unread))} left")
        unread = []

    # ------------------------------------------------------------------------------------------------------------ loop
    stream = train_batches(data["train"], world, start, steps, accumulation)
    unread = []  # (step, lr, loss, gradient norm) of the steps since the last report, the tensors still on the device
    for step in range(start, steps + 1):
        last, number = step == steps, stop.anywhere(world)
        due, rank_due = step % eval_interval == 0 or last, rank_interval and (step % rank_interval == 0 or last)
        if due or number or rank_due or step in snapshots:
            if unread:
                report()  # a loss that is not finite ends the run here, before anything is saved
            check_nan(model, world, script, step, latest)  # so does a weight
        if due or number:
            log_bytes = log.size() if first else 0
            save_checkpoint(step, log_bytes)  # before anything that can fail; a resumed run does all that follows again
        if number:
            stopped(world, number, f"at step {step}, saved {latest}", log)
        if step in snapshots and first:
            save_pt(os.path.join(out_dir, f"step_{step:07d}.pt"),
                 {"model": model.state_dict(), "model_args": model.args, "iter_num": step, "config": settings})
        if rank_due and first:
            ranks = summary(attention_layers(model.state_dict(), model.args["n_head"]))
            norms = {f"norm_{g['name']}": math.hypot(*(float(p.detach().norm()) for p in g["params"])) for g in groups}
            norm_all = math.hypot(*norms.values())
            log(step, **ranks, norm_all=norm_all, **norms)
            print0(f"step {step}: rank95 of W_K^T W_Q {ranks['attn_rank95_qk']:.2f}, of P W_V {ranks['attn_rank95_ov']:.2f} "
                   f"(means over heads of width {model.args['n_embd'] // model.args['n_head']}), parameter norm {norm_all:.2f}")
        if due:
            val = {f"val_{name}": x for name, x in evaluate(fast, data["val"], world, autocast, stop, eval_iters * total_batch_size).items()}
            best_val_loss = min(best_val_loss, val["val_loss"])
            if first:
                log(step, **val)
            print0(f"step {step}: " + ", ".join(f"{name.replace('_', ' ')} {x:.4f}" for name, x in val.items()))
        if last:
            break
        if not unread:
            clock = time.perf_counter()  # evaluating and saving are not training time

        # one optimizer step
        if dropout or drop_path:
            torch.manual_seed(hash64(hash64(hash64(seed) + step) + world.rank) >> 1)  # so there is nothing to save for resume
        loss = torch.zeros((), device=world.device)
        for micro in range(accumulation):
            with user_errors(script, every_process=True):
                images, targets = augment(*next(stream), sample_numbers(step, micro, world), meta)
            travel = micro == accumulation - 1  # gradients are averaged over processes once a step
            with contextlib.nullcontext() if travel or world.size == 1 else parallel.no_sync():
                with autocast:
                    logits = parallel(images)
                micro_loss = F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing) / accumulation
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        lr = get_lr(step, steps)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr
                decay[group["name"]] += lr * group["weight_decay"]
            scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        for opt in optimizers:
            scaler.step(opt)
            opt.zero_grad(set_to_none=True)
        scaler.update()
        unread.append((step, lr, loss, norm))
        if (step + 1) % log_interval == 0:
            report()

    # ---------------------------------------------------------------------------------------------------------- result
    save_checkpoint(steps, log_bytes)  # once more, with the last evaluation's best_val_loss
    result = {**settings, **shape, **whole_splits(fast, data, world, autocast, stop), "best_val_loss": best_val_loss,
              "steps": steps, "images": steps * total_batch_size, "seconds": seconds,
              "decay_time_constants": decay["attn"], "decay_time_constants_mlp": decay["mlp"],
              "decay_time_constants_embed": decay["embed"], "processes": world.size, "trained_on": str(world.device)}
    if first:
        log(steps, **{name: x for name, x in result.items() if name.startswith("test_")})
        save_json(os.path.join(out_dir, "result.json"), result)
    print0(f"{decay['attn']:.2f} decay time constants on attention, {time_left(seconds)} of training; "
           f"look at it: python analyze.py {out_dir}")
    end(world, log)


def whole_splits(model, data, world, autocast, stop):
    """Losses and accuracies of the whole val and test splits, printed and returned."""
    result = {f"{split}_{name}": x for split in ("val", "test") for name, x in evaluate(model, data[split], world, autocast, stop).items()}
    print0("whole splits: " + ", ".join(f"{name.replace('_', ' ')} {x:.4f}" for name, x in result.items()))
    return result


if __name__ == "__main__":
    configure(globals())
    main()
