"""
Trains a GPT on data/NAME/ with attention decayed apart from the rest, and logs the rank of its attention products.

    python train_lm.py config/demo.py --attn_wd=0              # small, any machine, data made on first use
    python train_lm.py --batch_size=8                          # 1 GPU
    torchrun --nproc_per_node=8 train_lm.py --attn_wd=0.0      # 8 GPUs
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST0 --nproc_per_node=8 train_lm.py --batch_size=8    # one line a node

The defaults are the settings that P1 publishes (Kobayashi et al. 2024, arXiv 2410.23819, language models): marked "P1" below.
What P1 leaves open is ours and says so. Writes OUT_DIR/ckpt.pt, step_*.pt, log.jsonl, result.json and source/.
SIGTERM or Ctrl-C finishes the step and saves; --init_from=resume goes on, to the bit on a CPU.
"""
import contextlib
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import configure, current
from model import GPT, decay_groups, init_weights, load_gpt, load_optimizers, make_optimizers
from nanorank.console import StopSignal, print0, time_left
from nanorank.device import all_sum, init_dist, peak_flops, pick_dtype
from nanorank.errors import UserError, user_errors
from nanorank.families import attention_layers
from nanorank.files import load_pt, save_json, save_pt
from nanorank.rng import hash64
from nanorank.run import (
    ROOT,
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
from nanorank.tasks import TASKS, TaskSplit
from nanorank.tokens import TokenSplit, prefetch

# --------------------------------------------------------------------------------------------------------------- settings
# run
out_dir = "out/lm"              # folder of the run
init_from = "scratch"           # scratch, resume (out_dir/ckpt.pt), auto (resume where there is one), or the PATH of a checkpoint
overwrite = False               # let scratch start over in an out_dir that holds a run
eval_only = False               # evaluate whole val and test splits, write eval.json, end
seed = 1337                     # of initialisation, data order and dropout
device = "auto"                 # auto, cpu, cuda, mps
dtype = "auto"                  # autocast: auto (bfloat16 where a GPU has it), float32, bfloat16, float16
compile = "auto"                # torch.compile: auto (on CUDA), true, false
# data
dataset = "pile"                # data/NAME, as prepare_pile.py makes it, or a task of tasks.py (recall); P1: the Pile
data_dir = "data"               # where NAME is
total_batch_size = 128          # sequences per optimizer step over all processes; P1: 128
batch_size = 16                 # sequences per process and micro-step; accumulation follows: total / (batch_size * processes)
block_size = 756                # context in tokens; P1: 756
# model
n_layer = 12                    # ours, GPT-2 small
n_head = 12                     # ours, GPT-2 small
n_embd = 768                    # ours, GPT-2 small
dropout = 0.0                   # ours
mlp = True                      # False: blocks of attention alone; ours
post_norm = False               # True: norms behind each sum, x = ln(x + f(x)), instead of x + f(ln(x)); ours
bias = False                    # biases in linear layers and norms; ours
tied = True                     # head and token embedding share weights; ours, as GPT-2
vocab_size = 0                  # 0: the tokenizer's, rounded up to a multiple of 64 (GPT-2's 50257 becomes 50304); ours
# weight decay, multiplied by the learning rate (torch's AdamW); norms and biases never
attn_wd = 0.1                   # q, k, v and output projections of attention; ours
mlp_wd = 0.1                    # the two MLP matrices; ours
embed_wd = 0.1                  # embeddings and head; ours, as nanoGPT decays all matrices
# optimizer
optimizer = "adamw"             # adamw, adam (L2 in the gradient), sgd, muon (decoupled decay but for adam); P1: adamw
learning_rate = 1e-3            # peak; P1: 1e-3
warmup_lr = 1e-6                # where warm-up starts; P1: 1e-6
min_lr = 1e-4                   # where the cosine ends; P1: 10 % of the peak
warmup_iters = 8000             # steps of linear warm-up; P1: 8000
max_iters = 100_000             # steps in all; ours (9.7e9 tokens)
beta1 = 0.9                     # P1: 0.9
beta2 = 0.95                    # P1: 0.95
eps = 1e-8                      # P1: 1e-8
momentum = 0.95                 # of sgd and muon; ours
grad_clip = 1.0                 # global gradient norm, 0: none; P1: 1
# watching
log_interval = 10               # steps between log lines
eval_interval = 1000            # steps between evaluations, each after saving ckpt.pt
eval_iters = 20                 # evaluation on this many times total_batch_size fixed rows of val
rank_interval = 1000            # steps between measurements of rank and norms, 0: none
snapshot_steps = ""             # weights-only step_*.pt at: "100,200,400", "every:1000" or "log:20" (20 log-spaced); empty: none
wandb_log = False               # log to Weights & Biases too (WANDB_MODE=offline works)
wandb_project = "nanorank"      # its project
wandb_run_name = ""             # empty: out_dir

# a resumed run is the same run: these must not change; the rest, but for FREE, changes only where --init_from=resume asks for it
SAME_ON_RESUME = ("dataset", "seed", "total_batch_size", "block_size", "n_layer", "n_head", "n_embd", "mlp", "post_norm", "bias", "tied",
                  "vocab_size", "optimizer")
FREE_ON_RESUME = ("out_dir", "init_from", "overwrite", "eval_only", "device", "dtype", "compile", "data_dir", "batch_size", "log_interval",
                  "eval_interval", "eval_iters", "rank_interval", "snapshot_steps", "wandb_log", "wandb_project", "wandb_run_name")

# --------------------------------------------------------------------------------------------------------------- batches

def open_data(world):
    """{split: TokenSplit or TaskSplit}. The embedded data set is made on first use; any other must be there, tasks need no data."""
    if dataset in TASKS:
        return {split: TaskSplit(dataset, split, block_size) for split in ("train", "val", "test")}
    folder = os.path.join(data_dir, dataset)
    if dataset == "python":
        make_data(folder, os.path.join(ROOT, "prepare_pile.py"), "--source=python", f"--dataset={dataset}", f"--data_dir={data_dir}")
    if world.size > 1:
        dist.barrier()
    return {split: TokenSplit(folder, split, block_size) for split in ("train", "val", "test")}


def train_batches(split, world, start_step, accumulation):
    """Inputs and targets (batch_size, block_size) on the device, micro-step by micro-step: a pure function of data, seed and step."""
    def make(key):
        step, micro = key
        first = step * total_batch_size + (micro * world.size + world.rank) * batch_size
        return split.sample(seed, first, batch_size)

    return prefetch(make, ((step, micro) for step in range(start_step, max_iters) for micro in range(accumulation)), world.device)

# -------------------------------------------------------------------------------------------------------------- schedule

def get_lr(step):
    """Learning rate of step 0 ... max_iters - 1: linear from warmup_lr to the peak, then cosine to min_lr at max_iters."""
    if step < warmup_iters:
        return warmup_lr + (learning_rate - warmup_lr) * step / warmup_iters
    done = (step - warmup_iters) / max(1, max_iters - warmup_iters)
    return min_lr + (learning_rate - min_lr) * (1 + math.cos(math.pi * min(1, done))) / 2

# ------------------------------------------------------------------------------------------------------------ evaluation

@torch.no_grad()
@user_errors(os.path.basename(__file__), every_process=True)  # of damaged data
def evaluate(model, split, world, autocast, stop, rows=None):
    """{"loss": mean loss in nats per target} over `rows` evenly spaced rows of a split (all by default), over all processes;
    for tasks {"acc": fraction of targets that are the likeliest token} too.

    A signal ends the run here: whatever is evaluated was saved before.
    """
    n = min(rows or split.n_rows, split.n_rows)
    index = np.linspace(0, split.n_rows - 1, n).round().astype(np.int64)
    batches = -(-n // (batch_size * world.size))
    index = np.pad(index, (0, batches * batch_size * world.size - n), constant_values=-1).reshape(batches, world.size, batch_size)
    model.eval()
    total, right, count, began, spoke = 0.0, 0, 0, time.monotonic(), time.monotonic()
    for i, (x, y) in enumerate(prefetch(lambda i: split.rows(index[i, world.rank]), range(batches), world.device)):
        if number := stop.anywhere(world):
            stopped(world, number, "while evaluating")
        tokens = int((y >= 0).sum())
        if tokens:
            with autocast:
                total += model(x, y)[1].item() * tokens
                if dataset in TASKS:
                    right += int((model(x)[0].argmax(-1) == y).sum())
            count += tokens
        if time.monotonic() - spoke > 10:
            spoke = time.monotonic()
            print0(f"  evaluating: batch {i + 1} of {batches}, {time_left((spoke - began) / (i + 1) * (batches - i - 1))} left")
    model.train()
    total, right, count = all_sum(world, total, right, count)
    return {"loss": total / count, **({"acc": right / count} if dataset in TASKS else {})}


# ------------------------------------------------------------------------------------------------------------------ main

@run_errors(__file__)
def main():
    script = os.path.basename(__file__)
    with user_errors(script):
        stop = StopSignal()
        world = init_dist(device)
        first = world.rank == 0
        check_settings(current(globals()), world)
        amp = pick_dtype(dtype, world.device)
        snapshots = parse_steps(snapshot_steps, max_iters)
        lock = lock_run(out_dir, world) if not eval_only else None
        latest, resume = find_run(out_dir, init_from, overwrite, eval_only)
        if world.size > 1:
            dist.barrier()  # all have looked before the first writes
        data = open_data(world)
        meta = data["train"].meta
        settings = current(globals())

        # model: a fresh one, the same on any device and number of processes, or one from disk
        if resume or init_from not in ("scratch", "auto"):
            path = latest if resume else os.path.join(init_from, "ckpt.pt") if os.path.isdir(init_from) else init_from
            checkpoint = load_pt(path)
            try:
                model = load_gpt(checkpoint, dropout)
            except ValueError as error:
                raise UserError(f"{path}: {error}") from None
        else:
            model = GPT(vocab_size or -(-meta["vocab_size"] // 64) * 64, block_size, n_layer, n_head, n_embd, dropout, bias, tied, mlp, post_norm)
            init_weights(model, seed)
        if resume and not eval_only:
            check_resume(checkpoint, latest, script, settings, SAME_ON_RESUME, FREE_ON_RESUME, data["train"].fingerprint(), max_iters)
        for what, needed in (("vocab_size", meta["vocab_size"]), ("block_size", block_size)):
            if model.args[what] < needed:
                raise UserError(f"the model's {what} is {model.args[what]}, this data set and --block_size need {needed}")
        shape = {"tied": True, "mlp": True, "post_norm": False, **model.args, "block_size": block_size}  # what runs, whatever the flags of
        # an --init_from=PATH say
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
    tokens_per_step = total_batch_size * block_size
    flops_per_token = model.flops_per_token(block_size)
    peak, peak_source = peak_flops(world.device, amp)
    sum_lr = sum(get_lr(step) for step in range(start, max_iters))
    print0("settings: " + ", ".join(f"{name}={value}" for name, value in settings.items()))
    print0(f"data: {data['train'].n_tokens:,} train tokens ({meta['tokenizer']}) in {data['train'].n_windows:,} windows, "
           f"{max_iters * total_batch_size / data['train'].n_windows:.2f} epochs")
    print0(f"batch: {batch_size} sequences * {world.size} processes * {accumulation} micro-steps = {total_batch_size} sequences "
           f"= {tokens_per_step:,} tokens a step")
    for g in groups:
        print0(f"group {g['name']:5}: {len(g['params']):3} tensors, {sum(p.numel() for p in g['params']):11,} parameters, "
               f"weight decay {g['weight_decay']:g}, {decay[g['name']] + sum_lr * g['weight_decay']:.2f} decay time constants")
    if warmup_iters >= max_iters:
        print0(f"note: warm-up takes {warmup_iters} steps and max_iters is {max_iters}: the learning rate ends at {get_lr(max_iters):.2e}")
    print0(f"on {world.device}, {amp}, {'compiled' if compiling else 'eager'}; {flops_per_token:,} FLOPs a token, "
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
        speed = len(unread) * tokens_per_step / elapsed
        mfu = speed * flops_per_token / (peak * world.size)
        if first:
            log(step, train_loss=loss, lr=lr, grad_norm=norm, tokens_per_s=speed, mfu=mfu)
        print0(f"step {step}: loss {loss:.4f}, lr {lr:.2e}, grad norm {norm:.3f}, {speed:,.0f} tokens/s, mfu {100 * mfu:.1f}%, "
               f"{time_left((max_iters - step - 1) * elapsed / len(unread))} left")
        unread = []

    # ------------------------------------------------------------------------------------------------------------ loop
    stream = train_batches(data["train"], world, start, accumulation)
    unread = []  # (step, lr, loss, gradient norm) of the steps since the last report, the tensors still on the device
    for step in range(start, max_iters + 1):
        last, number = step == max_iters, stop.anywhere(world)
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
        if dropout:
            torch.manual_seed(hash64(hash64(hash64(seed) + step) + world.rank) >> 1)  # so there is nothing to save for resume
        loss = torch.zeros((), device=world.device)
        for micro in range(accumulation):
            with user_errors(script, every_process=True):
                x, y = next(stream)
            travel = micro == accumulation - 1  # gradients are averaged over processes once a step
            with contextlib.nullcontext() if travel or world.size == 1 else parallel.no_sync():
                with autocast:
                    micro_loss = parallel(x, y)[1] / accumulation
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        lr = get_lr(step)
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
    save_checkpoint(max_iters, log_bytes)  # once more, with the last evaluation's best_val_loss
    result = {**settings, **shape, **whole_splits(fast, data, world, autocast, stop), "best_val_loss": best_val_loss,
              "steps": max_iters, "tokens": max_iters * tokens_per_step, "seconds": seconds,
              "decay_time_constants": decay["attn"], "decay_time_constants_mlp": decay.get("mlp", 0.0),
              "decay_time_constants_embed": decay["embed"], "processes": world.size, "trained_on": str(world.device)}
    if first:
        log(max_iters, **{name: x for name, x in result.items() if name.startswith("test_")})
        save_json(os.path.join(out_dir, "result.json"), result)
    print0(f"{decay['attn']:.2f} decay time constants on attention, {time_left(seconds)} of training; "
           f"look at it: python analyze.py {out_dir}")
    end(world, log)


def whole_splits(model, data, world, autocast, stop):
    """Losses and perplexities of the whole val and test splits, for tasks accuracies too, printed and returned."""
    result = {}
    for split in ("val", "test"):
        at = evaluate(model, data[split], world, autocast, stop)
        at["ppl"] = math.exp(at["loss"]) if at["loss"] < 700 else math.inf
        result.update({f"{split}_{name}": x for name, x in at.items()})
    print0("whole splits: " + ", ".join(f"{name.replace('_', ' ')} {x:.4f}" for name, x in result.items()))
    return result


if __name__ == "__main__":
    configure(globals())
    main()
