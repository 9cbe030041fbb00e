"""
Trains a GPT with attention decayed apart from the rest, and logs the rank of its attention products.

    python train_lm.py config/demo.py --out_dir=out/demo-0     # small, any machine, data made on first use
    python train_lm.py                                         # 1 GPU
    torchrun --nproc_per_node=8 train_lm.py --attn_wd=0.0      # 8 GPUs
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST0 --nproc_per_node=8 train_lm.py    # one line a node

The defaults are the language-model settings that Kobayashi et al. 2024 (arXiv 2410.23819) publish, marked
"paper" below. Settings that they do not give are our choice, marked "ours".

Writes OUT_DIR/ckpt.pt, step_*.pt, log.jsonl, result.json and source/. SIGTERM or Ctrl-C finishes the step
and saves; --init_from=resume goes on, to the bit on a CPU.
"""
import math
import os

from configurator import configure, current  # before torch: it sets how OpenMP's threads wait
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from model import GPT, decay_groups, init_weights, load_gpt, make_optimizers
from nanorank.distributed import all_sum, exit_codes
from nanorank.errors import UserError
from nanorank.flops import flops_per_token
from nanorank.optim import decay_by_rows
from nanorank.prefetch import prefetch
from nanorank.run import Run
from nanorank.run_folder import make_data
from nanorank.run_settings import lr_end
from nanorank.tasks import TASKS, TaskSplit
from nanorank.tokens import TokenSplit, held_out, open_splits
from nanorank.watch import attention_ranks, group_norms

# -----------------------------------------------------------------------------
# run
out_dir = "out/lm"              # folder of the run
init_from = "scratch"           # scratch, resume, auto (resume if there is a ckpt.pt), or PATH (weights:
                                # ckpt.pt, run folder, GPT-2 of Hugging Face: openai-community/gpt2)
overwrite = False               # let scratch start over in an out_dir that holds a run
eval_only = False               # evaluate whole val and test splits, write eval.json, end
seed = 1337                     # of initialisation, data order and dropout
device = "auto"                 # auto, cpu, cuda, mps
dtype = "auto"                  # autocast: auto (bfloat16 where a GPU has it), float32, bfloat16, float16
compile = "auto"                # torch.compile: auto (on CUDA), true, false
bf16_residual = False           # with bfloat16: between blocks too, not only in them; not timed on a GPU yet
# data
dataset = "pile"                # data/NAME of prepare_pile.py, or a task (recall); paper: the Pile
data_dir = "data"               # where NAME is
total_batch_size = 128          # sequences per optimizer step over all processes; paper: 128
batch_size = 16                 # most sequences per process and micro-step; accumulation follows
block_size = 756                # context in tokens; paper: 756
# model
n_layer = 12                    # ours, GPT-2 small
n_head = 12                     # ours, GPT-2 small
n_embd = 768                    # ours, GPT-2 small
dropout = 0.0                   # ours
mlp = True                      # False: blocks of attention alone; ours
post_norm = False               # True: x = ln(x + f(x)) instead of x + f(ln(x)); ours
bias = False                    # biases in linear layers and norms; ours
rope = False                    # rotary positions in place of learned ones (Llama's); ours
n_kv_head = 0                   # key/value heads, each shared by n_head / n_kv_head heads; 0: n_head; ours
qk_norm = False                 # RMS norm of q and k in each head (Qwen 3's); ours
tied = True                     # head and token embedding share weights; ours, as GPT-2
vocab_size = 0                  # 0: the tokenizer's, rounded up to a multiple of 64 (GPT-2: 50304); ours
# weight decay, multiplied by the learning rate (torch's AdamW); norms and biases never
attn_wd = 0.1                   # q, k, v and output projections of attention; ours
mlp_wd = 0.1                    # the two MLP matrices; ours
qk_wd = -1.0                    # W_Q and W_K apart from W_V and P, -1: as attn_wd; ours
qk_decay = "l2"                 # l2, or nuclear: takes lr * qk_wd off each singular value of W_Q and W_K
embed_wd = 0.1                  # embeddings and head; ours, as nanoGPT decays all matrices
# optimizer
optimizer = "adamw"             # adamw, adam (L2 in the gradient), sgd, muon; paper: adamw
learning_rate = 1e-3            # peak; paper: 1e-3
warmup_lr = 1e-6                # where warm-up starts; paper: 1e-6
min_lr = -1.0                   # where the cosine ends, -1: a tenth of the peak; paper: 10 % of the peak
warmup_iters = 8000             # steps of linear warm-up; paper: 8000
max_iters = 100_000             # steps in all; ours (9.7e9 tokens)
beta1 = 0.9                     # paper: 0.9
beta2 = 0.95                    # paper: 0.95
eps = 1e-8                      # paper: 1e-8
momentum = 0.95                 # of sgd and muon; ours
grad_clip = 1.0                 # global gradient norm, 0: none; paper: 1
# logging
log_interval = 10               # steps between log lines
eval_interval = 1000            # steps between evaluations, each after saving ckpt.pt
eval_iters = 20                 # evaluation on this many times total_batch_size fixed rows of val
rank_interval = 1000            # steps between measurements of rank and norms, 0: none
snapshot_steps = ""             # weights-only step_*.pt at "100,200,400", "every:1000", "log:20" (log-spaced)
save_in_thread = False          # write checkpoints in a thread while training goes on; not timed on a GPU yet
wandb_log = False               # log to Weights & Biases too (WANDB_MODE=offline works)
wandb_project = "nanorank"      # its project
wandb_run_name = ""             # empty: out_dir
# -----------------------------------------------------------------------------


def open_data(run):
    """{"train", "val", perhaps "test": TokenSplit or TaskSplit}. Data of the demo are made on first use."""
    if dataset in TASKS:  # made, not read
        return {split: TaskSplit(dataset, split, block_size) for split in ("train", "val", "test")}
    folder = os.path.join(data_dir, dataset)
    if dataset == "python":
        flags = ["--source=python", f"--dataset={dataset}", f"--data_dir={data_dir}"]
        make_data(folder, "prepare_pile.py", *flags)
    run.barrier()
    return open_splits(lambda split: TokenSplit(folder, split, block_size))


def train_batches(split, run, start):
    """Yields x, y (batch_size, block_size), one micro-step after the other, from step `start` on.

    A pure function of (data, seed, step): the same on any number of processes, and nothing to save.
    """
    B = run.batch_size

    def read(key):
        step, micro_step = key
        # a step's sequences are dealt out in pieces of B: micro-step by micro-step, rank by rank
        first_sequence = step * total_batch_size + (micro_step * run.world_size + run.rank) * B
        return split.sample(seed, first_sequence, B)

    keys = ((step, micro_step) for step in range(start, max_iters)
            for micro_step in range(run.grad_accum_steps))
    return prefetch(read, keys, run.device)


def get_lr(step, end=None):
    """Learning rate: linear warm-up from warmup_lr, then cosine at max_iters to `end`, None: min_lr's."""
    if step < warmup_iters:
        return warmup_lr + (learning_rate - warmup_lr) * step / warmup_iters
    decay_ratio = min(1, (step - warmup_iters) / max(1, max_iters - warmup_iters))
    coeff = 1 + math.cos(math.pi * decay_ratio)  # from 2 to 0
    end = lr_end(learning_rate, min_lr) if end is None else end
    return end + (learning_rate - end) * coeff / 2


@torch.no_grad()
def evaluate(net, split, run, n_rows=None):
    """Mean loss in nats per target over n_rows evenly spaced rows of a split, all by default.

    Returns {"loss"}; for tasks also {"acc"}, the share of targets that are the likeliest token.
    """
    rows = run.eval_rows(split.n_rows, n_rows)
    batches = prefetch(split.rows, rows, run.device)
    total_loss, n_right, n_targets = 0.0, 0, 0
    net.eval()
    for x, y in run.eval_batches(batches, len(rows)):
        n = int((y >= 0).sum())  # padding has target -1
        if n == 0:
            continue
        with run.autocast():
            _, loss = net(x, y)
            total_loss += loss.item() * n
            if dataset in TASKS:
                logits, _ = net(x)  # with targets there are no logits: the loss is made in chunks
                n_right += int((logits.argmax(-1) == y).sum())
        n_targets += n
    net.train()
    total_loss, n_right, n_targets = all_sum(total_loss, n_right, n_targets)
    if dataset in TASKS:
        return {"loss": total_loss / n_targets, "acc": n_right / n_targets}
    return {"loss": total_loss / n_targets}


def evaluate_all(net, data, run):
    """Loss and perplexity of the whole val and test splits: {"val_loss", "val_ppl", "test_loss", ...}."""
    result = {}
    for split in held_out(data):
        values = evaluate(net, data[split], run)
        values["ppl"] = math.exp(values["loss"]) if values["loss"] < 700 else math.inf
        result.update({f"{split}_{name}": x for name, x in values.items()})
    run.print_values("whole splits:", result)
    return result


def check_fit(model, tokenizer_size):
    """The model of a checkpoint must have room for the data's tokens and for block_size."""
    for name, needed in (("vocab_size", tokenizer_size), ("block_size", block_size)):
        if model.args[name] < needed:
            raise UserError(f"the model's {name} is {model.args[name]}, this run needs {needed}; "
                            "change --block_size or --dataset")


def main():
    run = Run(__file__, current(globals()))      # joins torchrun, locks out_dir, loads run.ckpt if any
    data = open_data(run)
    run.check_resume(data["train"].fingerprint(), max_iters)

    # model: from scratch, or from a checkpoint (resume, or --init_from=PATH)
    tokenizer_size = data["train"].meta["vocab_size"]
    if run.ckpt:
        model = load_gpt(run.ckpt, dropout, run.init_path)
    else:
        padded_size = vocab_size or 64 * math.ceil(tokenizer_size / 64)
        model = GPT(padded_size, block_size, n_layer, n_head, n_embd, dropout, bias, tied, mlp, post_norm,
                    rope, n_kv_head, qk_norm)
        init_weights(model, seed)                # the same on any device
    check_fit(model, tokenizer_size)
    run.take_shape(model.args)                   # of a checkpoint, into the settings
    run.place(model)                             # on the device

    # `net` is what runs; `model` keeps clean names for checkpoints and metrics
    net = torch.compile(model, dynamic=False) if run.compile else model
    if run.ddp:
        net = DDP(net, device_ids=run.device_ids, gradient_as_bucket_view=True)

    if eval_only:
        result = evaluate_all(net, data, run)
        return run.finish_eval({**model.args, "block_size": block_size, **result})

    # optimizer: attention, MLPs and embeddings each have their own decay; norms and biases have none
    groups = decay_groups(model, attn_wd, mlp_wd, embed_wd, qk_wd, qk_decay)
    optimizers = make_optimizers(groups, optimizer, learning_rate, beta1, beta2, eps, momentum,
                                 run.device.type)
    start, best_val_loss = run.restore(optimizers)           # 0, inf unless resuming

    tokens_per_step = total_batch_size * block_size
    flops_per_step = tokens_per_step * flops_per_token(model, block_size)
    epochs = max_iters * total_batch_size / data["train"].n_windows
    run.print(f"data: {data['train'].n_tokens:,} train tokens, {epochs:.2f} epochs")
    run.banner(groups, lambda step: get_lr(step, run.lr_end), start, "tokens", tokens_per_step,
               flops_per_step)
    batches = train_batches(data["train"], run, start)

    for step in range(start, max_iters + 1):
        last_step = step == max_iters
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
            x, y = next(batches)
            if run.ddp:                          # average gradients over processes once a step
                net.require_backward_grad_sync = micro_step == run.grad_accum_steps - 1
            with run.autocast():
                _, loss = net(x, y)
                loss = loss / run.grad_accum_steps
            run.scaler.scale(loss).backward()
            train_loss += loss.detach()

        # clip and step
        lr = get_lr(step, run.lr_end)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr
            run.scaler.unscale_(opt)             # the scaler does nothing unless dtype is float16
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        decay_by_rows(groups, lr, optimizer)     # of attention, where W_Q and W_K have a decay of their own
        for opt in optimizers:
            run.scaler.step(opt)
            opt.zero_grad(set_to_none=True)
        run.scaler.update()
        run.log_train(step, train_loss, lr, grad_norm)   # waits for the GPU every log_interval

    run.save(max_iters, model, optimizers, best_val_loss)    # again, with the last best_val_loss
    result = evaluate_all(net, data, run)
    run.finish({**model.args, "block_size": block_size, **result, "best_val_loss": best_val_loss})


if __name__ == "__main__":
    configure(globals())
    with exit_codes(__file__):
        main()
