"""
Trains a plain Vision Transformer with attention decayed apart from the rest: train_lm.py for images.

    python train_vit.py config/vit_demo.py --out_dir=out/vit-demo   # small, any machine, makes its data
    python train_vit.py                                          # 1 GPU
    torchrun --nproc_per_node=8 train_vit.py --attn_wd=0.0       # 8 GPUs, ViT-S/16 on ImageNet for 90 epochs
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST0 --nproc_per_node=8 train_vit.py    # one line a node

The defaults are the plain ViT-S/16 baseline of Beyer, Zhai, Kolesnikov 2022 (arXiv 2205.01580), marked
"Beyer" below. Kobayashi et al. 2024 publish no ViT settings. Settings that neither gives are marked "ours".

Writes OUT_DIR/ckpt.pt, step_*.pt, log.jsonl, result.json and source/. SIGTERM or Ctrl-C finishes the step
and saves; --init_from=resume goes on, to the bit on a CPU. test_acc in result.json is of the split that
prepare_imagenet calls test: ImageNet's official 50,000 validation images.
"""
import math
import os

from configurator import configure, current  # before torch: it sets how OpenMP's threads wait
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from model import ViT, decay_groups, init_weights, load_vit, make_optimizers, vit_size
from nanorank.augment import flips, mix, rand_augment, random_crops, resize
from nanorank.distributed import all_sum, exit_codes
from nanorank.errors import UserError
from nanorank.flops import flops_per_image
from nanorank.images import ImageSplit, centre_crops, mean_and_std
from nanorank.prefetch import prefetch
from nanorank.rng import shuffled
from nanorank.run import Run
from nanorank.run_folder import make_data
from nanorank.run_settings import lr_end
from nanorank.tokens import held_out, open_splits
from nanorank.watch import attention_ranks, group_norms

# -----------------------------------------------------------------------------
# run
out_dir = "out/vit"             # folder of the run
init_from = "scratch"           # scratch, resume, auto (resume if there is a ckpt.pt), or PATH (weights)
overwrite = False               # let scratch start over in an out_dir that holds a run
eval_only = False               # evaluate whole val and test splits, write eval.json, end
seed = 1337                     # of initialisation, data order, augmentation, dropout and drop path
device = "auto"                 # auto, cpu, cuda, mps
dtype = "auto"                  # autocast: auto (bfloat16 where a GPU has it), float32, bfloat16, float16
compile = "auto"                # torch.compile: auto (on CUDA), true, false
# data
dataset = "imagenet"            # data/NAME of python -m scripts.prepare_imagenet
data_dir = "data"               # where NAME is
total_batch_size = 1024         # images per optimizer step over all processes; Beyer: 1024
batch_size = 128                # most images per process and micro-step; accumulation follows
image_size = 224                # side of what the model sees, in pixels; Beyer: 224
eval_resize = 256               # evaluation: short side before the central image_size is cut out; Beyer: 256
standardize = False             # normalise by the train split's channel means and deviations; Beyer: False
# augmentation of training images, on the training device
crop_area = 0.05                # smallest share of the image that a random resized crop takes; Beyer: 0.05
crop_ratio = 4 / 3              # its aspect ratio is from 1 / this to this; Beyer: 4/3
flip = 0.5                      # probability of a horizontal flip; Beyer: 0.5
randaug_layers = 2              # RandAugment operations an image; Beyer: 2
randaug_magnitude = 10.0        # their strength, 0 to 10 by big_vision's formulas; Beyer: 10
mixup = 0.2                     # alpha of mixup, 0: none; Beyer: 0.2
cutmix = 0.0                    # alpha of CutMix, 0: none; with mixup, each pair of images gets one; ours
label_smoothing = 0.0           # share of the target that is spread over all classes; ours
# model
variant = "S/16"                # Ti, S, B or L / side of a patch in pixels; Beyer: S/16
patch_size = 0                  # side of a patch in pixels, 0: the variant's
n_layer = 0                     # 0: the variant's
n_head = 0                      # 0: the variant's
n_embd = 0                      # 0: the variant's
pool = "gap"                    # the head reads gap (the mean over tokens) or cls (a class token); Beyer: gap
positions = "sincos2d"          # sincos2d (fixed) or learned; Beyer: sincos2d
dropout = 0.0                   # ours
drop_path = 0.0                 # of the last block, rising linearly from 0 at the first; ours
bias = True                     # biases in the blocks' linear layers and norms; Beyer: True
# weight decay, multiplied by the learning rate (torch's AdamW; Beyer's 1e-4 is not); norms and biases never
attn_wd = 0.1                   # q, k, v and output projections of attention; Beyer: 1e-4 / 1e-3
mlp_wd = 0.1                    # the two MLP matrices; Beyer: 1e-4 / 1e-3
embed_wd = 0.1                  # patch projection, learned positions and head; Beyer: 1e-4 / 1e-3
# optimizer
optimizer = "adamw"             # adamw, adam (L2 in the gradient), sgd, muon; Beyer: adamw
learning_rate = 1e-3            # peak; Beyer: 1e-3
warmup_lr = 0.0                 # where warm-up starts; Beyer: 0
min_lr = 0.0                    # where the cosine ends, -1: a tenth of the peak; Beyer: 0
warmup_iters = 10_000           # steps of linear warm-up; Beyer: 10,000
epochs = 90.0                   # passes over the training images; Beyer: 90
max_iters = 0                   # steps in all, 0: as many as epochs asks for
beta1 = 0.9                     # Beyer: 0.9
beta2 = 0.999                   # Beyer: 0.999
eps = 1e-8                      # Beyer: 1e-8
momentum = 0.95                 # of sgd and muon; ours
grad_clip = 1.0                 # global gradient norm, 0: none; Beyer: 1
# logging
log_interval = 50               # steps between log lines
eval_interval = 1000            # steps between evaluations, each after saving ckpt.pt
eval_iters = 10                 # evaluation on this many times total_batch_size fixed images of val
rank_interval = 1000            # steps between measurements of rank and norms, 0: none
snapshot_steps = ""             # weights-only step_*.pt at "100,200,400", "every:1000", "log:20" (log-spaced)
save_in_thread = False          # write checkpoints in a thread while training goes on; not timed on a GPU yet
wandb_log = False               # log to Weights & Biases too (WANDB_MODE=offline works)
wandb_project = "nanorank"      # its project
wandb_run_name = ""             # empty: out_dir
# -----------------------------------------------------------------------------


def open_data(run):
    """{"train", "val", "test": ImageSplit}, perhaps without test. Data of the demo are made on first use."""
    folder = os.path.join(data_dir, dataset)
    if dataset == "digits":
        flags = ["--source=digits", f"--dataset={dataset}", f"--data_dir={data_dir}"]
        make_data(folder, "-m", "scripts.prepare_imagenet", *flags)
    run.barrier()
    return open_splits(lambda split: ImageSplit(folder, split))


def sample_numbers(step, micro_step, run):
    """Numbers (B,) of a micro-step's samples in the endless stream: all that is random follows from them."""
    first = step * total_batch_size + (micro_step * run.world_size + run.rank) * run.batch_size
    return np.arange(first, first + run.batch_size)


def read_crops(split, numbers, run):
    """Returns pixels (B, H, W, 3) uint8: random crops, padded; sizes (B, 2) of each; labels (B,)."""
    index = shuffled(split.n_images, seed, int(numbers[0]), len(numbers))
    boxes = random_crops(split.heights[index], split.widths[index], seed, numbers,
                         area=(crop_area, 1.0), ratio=(1 / crop_ratio, crop_ratio))
    pixels, sizes = split.read(index, boxes, pin=run.device.type == "cuda")
    return pixels, sizes, split.labels[index]


def train_batches(split, run, start, n_steps):
    """Yields images and targets of augment, one micro-step after the other, from step `start` on."""
    def augmented(numbers, *crops):
        return augment(*crops, numbers, split.meta)

    numbers = (sample_numbers(step, micro_step, run) for step in range(start, n_steps)
               for micro_step in range(run.grad_accum_steps))
    return prefetch(lambda n: read_crops(split, n, run), numbers, run.device, augmented)


def to_float(x, meta):
    """uint8 images (B, 3, S, S) as the model reads them."""
    if not standardize:
        return x / 127.5 - 1
    mean, std = mean_and_std(tuple(meta["mean"]), tuple(meta["std"]), x.device)
    return (x - mean) / std


@torch.no_grad()
def augment(pixels, sizes, labels, numbers, meta):
    """Returns images (B, 3, S, S) and targets over classes (B, n_classes) to train on."""
    x = resize(pixels, sizes, image_size, flip=flips(seed, numbers, flip))
    if randaug_layers:
        x = rand_augment(x, seed, numbers, randaug_layers, randaug_magnitude)
    return mix(to_float(x, meta), labels, len(meta["classes"]), seed, numbers, mixup, cutmix)


def get_lr(step, n_steps, end=None):
    """Learning rate: linear warm-up from warmup_lr, then cosine at n_steps to `end`, None: min_lr's."""
    if step < warmup_iters:
        return warmup_lr + (learning_rate - warmup_lr) * step / warmup_iters
    decay_ratio = min(1, (step - warmup_iters) / max(1, n_steps - warmup_iters))
    coeff = 1 + math.cos(math.pi * decay_ratio)  # from 2 to 0
    end = lr_end(learning_rate, min_lr) if end is None else end
    return end + (learning_rate - end) * coeff / 2


@torch.no_grad()
def evaluate(net, split, run, n_images=None):
    """{"loss", "acc", "top5"} over n_images evenly spaced images of a split, all by default.

    Mean cross-entropy in nats; shares of images whose class is the likeliest, and among the five likeliest.
    """
    rows = run.eval_rows(split.n_images, n_images)

    def read(index):
        real = np.maximum(index, 0)  # -1: images that do not count, in the last batch
        boxes, parts = centre_crops(split.heights[real], split.widths[real], eval_resize, image_size)
        pixels, sizes = split.read(real, boxes)
        return pixels, sizes, parts.astype(np.float32), np.where(index < 0, -1, split.labels[real])

    total_loss, n_top1, n_top5, n_seen = 0.0, 0, 0, 0
    net.eval()
    for pixels, sizes, parts, labels in run.eval_batches(prefetch(read, rows, run.device), len(rows)):
        images = to_float(resize(pixels, sizes, image_size, boxes=parts), split.meta)
        with run.autocast():
            logits = net(images).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        total_loss += F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum").item()
        n_top1 += int(hits[:, 0].sum())
        n_top5 += int(hits.sum())
        n_seen += int((labels >= 0).sum())
    net.train()
    total_loss, n_top1, n_top5, n_seen = all_sum(total_loss, n_top1, n_top5, n_seen)
    return {"loss": total_loss / n_seen, "acc": n_top1 / n_seen, "top5": n_top5 / n_seen}


def evaluate_all(net, data, run):
    """Loss and accuracies of the whole val and test splits: {"val_loss", "val_acc", "test_loss", ...}."""
    result = {}
    for split in held_out(data):
        values = evaluate(net, data[split], run)
        result.update({f"{split}_{name}": x for name, x in values.items()})
    run.print_values("whole splits:", result)
    return result


def check_fit(model, meta, run):
    """The model of a checkpoint must have the data's classes, and have been trained on the same pixels."""
    n_classes = len(meta["classes"])
    if model.args["n_classes"] != n_classes:
        raise UserError(f"the model has {model.args['n_classes']} classes, {dataset} has {n_classes}")
    if standardize and min(meta["std"]) <= 0:
        raise UserError(f"--standardize: a channel of --dataset={dataset} is constant, its deviation is 0")
    trained_on = (run.ckpt or {}).get("config") or {}
    if trained_on.get("standardize", standardize) != standardize:
        raise UserError(f"{run.init_path} was trained on pixels with "
                        f"--standardize={trained_on['standardize']}: give the same flag")


def main():
    run = Run(__file__, current(globals()))      # joins torchrun, locks out_dir, loads run.ckpt if any
    data = open_data(run)
    meta, n_train = data["train"].meta, data["train"].n_images
    n_steps = max_iters or max(1, round(epochs * n_train / total_batch_size))
    run.check_resume(data["train"].fingerprint(), n_steps)

    # model: from scratch, or from a checkpoint (resume, or --init_from=PATH)
    shape = vit_size(variant)
    if run.ckpt:
        model = load_vit(run.ckpt, image_size, dropout, drop_path, run.init_path)
    else:
        flags = dict(patch_size=patch_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        shape.update({name: value for name, value in flags.items() if value})
        model = ViT(len(meta["classes"]), image_size, dropout=dropout, drop_path=drop_path, bias=bias,
                    pool=pool, positions=positions, **shape)
        init_weights(model, seed)                # the same on any device
    check_fit(model, meta, run)
    run.take_shape(model.args, shape)            # of a checkpoint, into the settings
    run.place(model)                             # on the device

    # `net` is what runs; `model` keeps clean names for checkpoints and metrics
    net = torch.compile(model, dynamic=False) if run.compile else model
    if run.ddp:
        net = DDP(net, device_ids=run.device_ids, gradient_as_bucket_view=True)
        net.broadcast_buffers = False            # fixed positions are the same on all processes

    if eval_only:
        return run.finish_eval({**model.args, **evaluate_all(net, data, run)})

    # optimizer: attention, MLPs and embeddings each have their own decay; norms and biases have none
    groups = decay_groups(model, attn_wd, mlp_wd, embed_wd)
    optimizers = make_optimizers(groups, optimizer, learning_rate, beta1, beta2, eps, momentum,
                                 run.device.type)
    start, best_val_loss = run.restore(optimizers)           # 0, inf unless resuming

    counts = ", ".join(f"{split.n_images:,} {name}" for name, split in data.items())
    run.print(f"data: {counts} images; {n_steps * total_batch_size / n_train:.2f} epochs")
    run.banner(groups, lambda step: get_lr(step, n_steps, run.lr_end), start, "images", total_batch_size,
               total_batch_size * flops_per_image(model))
    batches = train_batches(data["train"], run, start, n_steps)

    for step in range(start, n_steps + 1):
        last_step = step == n_steps
        signum = run.signalled()                 # SIGTERM or Ctrl-C on any process, else 0
        do_eval = last_step or step % eval_interval == 0
        do_rank = rank_interval and (last_step or step % rank_interval == 0)
        do_snapshot = step in run.snapshot_steps

        # save before evaluating: evaluation can fail, and a resumed run repeats it
        if do_eval or do_rank or do_snapshot or signum:
            run.check_finite(step, model)        # NaN ends the run here, before it is saved
        if do_eval or signum:
            run.save(step, model, optimizers, best_val_loss)
        if signum:
            run.stop(signum, f"at step {step}, saved {run.ckpt_path}")
        if do_snapshot:
            run.save_weights(step, model)

        # the point of this repository: rank of W_K^T W_Q and P W_V of every head, and norms by group
        if do_rank and run.master_process:
            ranks = attention_ranks(model)
            norms = group_norms(groups)
            run.log(step, **ranks, **norms)
            run.print(f"step {step}: rank95 of W_K^T W_Q {ranks['attn_rank95_qk']:.2f}, of P W_V "
                      f"{ranks['attn_rank95_ov']:.2f} (means over heads), norm {norms['norm_all']:.2f}")
        if do_eval:
            val = evaluate(net, data["val"], run, eval_iters * total_batch_size)
            best_val_loss = min(best_val_loss, val["loss"])
            run.log(step, **{f"val_{name}": x for name, x in val.items()})
            run.print_values(f"step {step}: val", val)
        if last_step:
            break

        # forward and backward, accumulated
        run.begin_step(step)                     # starts the clock, seeds dropout
        train_loss = torch.zeros((), device=run.device)
        for micro_step in range(run.grad_accum_steps):
            images, targets = next(batches)
            if run.ddp:                          # average gradients over processes once a step
                net.require_backward_grad_sync = micro_step == run.grad_accum_steps - 1
            with run.autocast():
                logits = net(images)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
            loss = loss / run.grad_accum_steps
            run.scaler.scale(loss).backward()
            train_loss += loss.detach()

        # clip and step
        lr = get_lr(step, n_steps, run.lr_end)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr
            run.scaler.unscale_(opt)             # the scaler does nothing unless dtype is float16
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        for opt in optimizers:
            run.scaler.step(opt)
            opt.zero_grad(set_to_none=True)
        run.scaler.update()
        run.log_train(step, train_loss, lr, grad_norm)   # waits for the GPU every log_interval

    run.save(n_steps, model, optimizers, best_val_loss)      # again, with the last best_val_loss
    result = evaluate_all(net, data, run)
    run.finish({**model.args, **result, "best_val_loss": best_val_loss})


if __name__ == "__main__":
    configure(globals())
    with exit_codes(__file__):
        main()
