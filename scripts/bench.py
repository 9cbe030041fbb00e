"""
How close each hot path is to its floor, in one interleaved run: medians, ratios, and bench.json.

    python -m scripts.bench                             # all; or some of the names below
    python -m scripts.bench step --peer=../nanoGPT      # beside the step of a checkout of nanoGPT
    python -m scripts.bench step --device=cuda          # GPT-2 small; on a CPU the demo's model
    python -m scripts.bench smoke                       # does everything work here? ten minutes on a GPU

    step         an optimizer step of the GPT: a large GEMM's rate; nanoGPT's step; measuring rank
    vit          a step of ViT-S/16, and reading and augmenting its images; timm's step if installed
    head         head and loss in chunks: plain logits and cross_entropy
    start        train_lm.py from the command line to its first step: import torch
    batches      a batch of token windows: memcpy of the same bytes
    spectra      all metrics of 32 heads: one float32 Gram pass over the factors, and reading them
    checkpoint   saving 100 MB: writing and fsyncing the same bytes
    prepare      prepare_pile.py: tiktoken alone on all cores

A ratio is our time over the floor's, so 1 is the floor itself. Run it on an otherwise idle machine.
"""
import importlib.util
import itertools
import os
import sys
import tempfile
from types import SimpleNamespace

import pandas as pd
import torch
import torch.nn.functional as F

import train_lm
import train_vit
from configurator import configure
from model import GPT, ViT, decay_groups, init_weights, make_optimizers, vit_size
from nanorank.device import device_name, peak_flops, pick_device, pick_dtype
from nanorank.errors import UserError, user_errors
from nanorank.families import attention_layers
from nanorank.files import make_folder, save_json
from nanorank.flops import flops_per_image, flops_per_token
from nanorank.images import ImageSplit
from nanorank.loss import head_loss
from nanorank.watch import summary
from scripts import bench_paths
from scripts.bench_smoke import smoke_test
from scripts.timing import Setup, in_a_process, interleaved, row

repeats = 7             # of each contestant, interleaved; medians are printed
device = "auto"         # auto, cpu, cuda, mps
peer = ""               # a checkout of karpathy/nanoGPT: its training step beside ours
out_dir = "out/bench"   # where bench.json goes

# -------------------------------------------------------------- training steps

def stepper(net, optimizer, inputs, loss_of, setup):
    """A function that takes one optimizer step on the same inputs; it returns loss_of(what net returns)."""
    def step():
        with torch.autocast(setup.device.type, setup.dtype, enabled=setup.dtype != torch.float32):
            loss = loss_of(net(*inputs))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def compiled(model, setup):
    return torch.compile(model, dynamic=False) if setup.device.type == "cuda" else model


def train_step(model, inputs, loss_of, setup):
    model.to(setup.device)
    groups = decay_groups(model, 0.1, 0.1, 0.1)
    [optimizer] = make_optimizers(groups, "adamw", 1e-3, 0.9, 0.95, 1e-8, 0.9, setup.device.type)
    return stepper(compiled(model, setup), optimizer, inputs, loss_of, setup)


def nanogpt_step(setup, peer, args, state, inputs):
    """A step of nanoGPT's model and optimizer, from our weights."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", os.path.join(peer, "model.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(**args))
    model.load_state_dict(state)
    model.to(setup.device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), setup.device.type)
    inputs = [x.to(setup.device) for x in inputs]
    return stepper(compiled(model, setup), optimizer, inputs, lambda out: out[1], setup)


def timm_step(setup, images, labels):
    """A step of timm's vit_small_patch16_224 as timm's train.py takes it by default."""
    import timm
    import timm.optim
    model = timm.create_model("vit_small_patch16_224", num_classes=1000).to(setup.device)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)
    labels = labels.to(setup.device)
    inputs = [images.to(setup.device)]
    return stepper(model, optimizer, inputs, lambda logits: F.cross_entropy(logits, labels), setup)


def large_gemm(setup):
    """(function, FLOPs, name) of a square matrix product, whose rate is the floor of a training step."""
    n = 2048 if setup.device.type == "cpu" else 8192
    a = torch.randn(n, n, device=setup.device, dtype=setup.dtype)
    return lambda: a @ a, 2 * n**3, f"its FLOPs at the rate of a {n} GEMM"

# ------------------------------------------------------------------ benchmarks

def bench_step(setup):
    if setup.device.type == "cuda":  # GPT-2 small
        args = dict(vocab_size=50304, n_layer=12, n_head=12, n_embd=768, bias=False)
        yield from bench_gpt(dict(block_size=756, **args), 32, setup)
        yield from bench_gpt(dict(block_size=1024, **args), 24, setup)
    else:  # the demo's model
        args = dict(block_size=128, n_layer=4, n_head=4, n_embd=128, bias=False)
        yield from bench_gpt(dict(vocab_size=320, **args), 16, setup)
        yield from bench_gpt(dict(vocab_size=50304, **args), 16, setup)


def bench_gpt(args, B, setup):
    """args: of GPT. B: sequences in a batch."""
    T = args["block_size"]
    model = GPT(**args)
    init_weights(model, 0)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    ids = torch.randint(args["vocab_size"], (B, T + 1))
    inputs = [ids[:, :-1].contiguous(), ids[:, 1:].contiguous()]
    ours = [x.to(setup.device) for x in inputs]
    step = train_step(model, ours, lambda out: out[1], setup)
    gemm, gemm_flops, floor_name = large_gemm(setup)
    losses, peer_losses = [], []
    contestants = {"step": lambda: losses.append(step())}
    if peer:
        peer_step, end_peer = in_a_process(nanogpt_step, setup, peer, args, state, inputs)
        contestants["nanoGPT"] = lambda: peer_losses.append(peer_step())
    contestants["gemm"] = gemm
    contestants["rank"] = lambda: summary(attention_layers(model.state_dict(), args["n_head"]))
    times = interleaved(contestants, setup)
    seconds = times["step"]

    flops = B * T * flops_per_token(model, T)
    floor = times["gemm"] * flops / gemm_flops
    what = (f"{args['n_layer']} layers, {args['n_embd']} wide, {args['vocab_size']} ids, "
            f"{B} x {T} tokens, {str(setup.dtype)[6:]}")
    peak, _ = peak_flops(setup.device, setup.dtype)
    yield row("step", what, seconds, floor_name, floor, tokens_per_s=B * T / seconds, mfu=floor / seconds,
              mfu_of_peak=flops / seconds / peak)
    if peer:
        end_peer()
        apart = max(abs(float(a) - b) for a, b in zip(losses, peer_losses, strict=True))
        yield row("step", what, seconds, "nanoGPT's step, a process of its own", times["nanoGPT"],
                  times_its_tokens_per_s=times["nanoGPT"] / seconds, losses_apart=apart,
                  loss=float(losses[-1]))
    every = train_lm.rank_interval
    amortised = times["rank"] / every
    yield row("step", f"rank of every head, each {every} steps", seconds + amortised, "the step without",
              seconds, rank_seconds=times["rank"], percent=100 * amortised / seconds)


def bench_vit(setup):
    B = 128 if setup.device.type == "cuda" else 8
    model = ViT(1000, 224, **vit_size("S/16"))
    init_weights(model, 0)
    images = torch.randn(B, 3, 224, 224, device=setup.device)
    labels = torch.zeros(B, dtype=torch.long, device=setup.device)
    step = train_step(model, [images], lambda logits: F.cross_entropy(logits.float(), labels), setup)
    contestants = {"step": step}
    if importlib.util.find_spec("timm"):
        contestants["timm"], end_timm = in_a_process(timm_step, setup, images.cpu(), labels.cpu())
    contestants["gemm"], gemm_flops, floor_name = large_gemm(setup)

    with tempfile.TemporaryDirectory() as folder:
        bench_paths.write_images(folder, 1024, height=256, width=341)
        split = ImageSplit(folder, "train")
        train_vit.total_batch_size = B
        run = SimpleNamespace(batch_size=B, grad_accum_steps=1, rank=0, world_size=1, device=setup.device)
        stream = train_vit.train_batches(split, run, 0, n_steps=10_000)
        numbers = (train_vit.sample_numbers(step, 0, run) for step in itertools.count())
        contestants["load"] = lambda: train_vit.read_crops(split, next(numbers), run)
        contestants["memcpy"] = lambda: split.pixels[:B * 3 * 256 * 341].copy()  # B whole images
        # eight in a row: on a GPU a thread has one ready
        contestants["feed"] = lambda: [next(stream) for _ in range(8)]
        times = interleaved(contestants, setup)

    seconds = times["step"]
    what = f"ViT-S/16 at 224, batch {B}, {str(setup.dtype)[6:]}"
    floor = times["gemm"] * flops_per_image(model) * B / gemm_flops
    yield row("vit", what, seconds, floor_name, floor, images_per_s=B / seconds, mfu=floor / seconds)
    if "timm" in times:
        end_timm()
        yield row("vit", what, seconds, "timm's ViT-S/16 in its loop, a process of its own", times["timm"],
                  times_its_images_per_s=times["timm"] / seconds)
    yield row("vit", "reading crops of stored images, per batch", times["load"], "memcpy of the whole images",
              times["memcpy"], images_per_s=B / times["load"])
    feed = times["feed"] / 8
    yield row("vit", "reading and augmenting", feed, "the step that it feeds", seconds,
              images_per_s=B / feed, times_the_steps_rate=seconds / feed)


def bench_head(setup):
    V = 50304
    for N, d in ((2048, 256), (4096, 768)):
        x = torch.randn(N, d, device=setup.device, requires_grad=True)
        w = (0.02 * torch.randn(V, d, device=setup.device)).requires_grad_()
        y = torch.randint(V, (N,), device=setup.device)
        times = interleaved({
            "chunked": lambda x=x, w=w, y=y: head_loss(x, w, y).backward(),
            "plain": lambda x=x, w=w, y=y: F.cross_entropy(F.linear(x, w), y, ignore_index=-1).backward(),
        }, setup)
        yield row("head", f"{N} tokens, {d} wide, {V} ids, chunked", times["chunked"],
                  "plain logits and cross_entropy", times["plain"], logits_MB=N * V * 4 / 2**20)

# ------------------------------------------------------------------------ main

BENCHES = {
    "step": bench_step,
    "vit": bench_vit,
    "head": bench_head,
    "start": bench_paths.start,
    "batches": bench_paths.batches,
    "spectra": bench_paths.spectra,
    "checkpoint": lambda setup: bench_paths.checkpoint(setup, out_dir),
    "prepare": bench_paths.prepare,
}


def main(names):
    for name in names:
        if name not in BENCHES and name != "all" and names != ["smoke"]:
            raise UserError(f"no benchmark {name}: there are {', '.join(BENCHES)}, all, and alone smoke")
    if not names or "all" in names:
        names = list(BENCHES)
    if repeats < 1:
        raise UserError(f"--repeats={repeats} must be at least 1")
    if peer and not os.path.isfile(os.path.join(peer, "model.py")):
        raise UserError(f"--peer={peer} holds no model.py: expects a checkout of karpathy/nanoGPT")
    picked = pick_device(device)
    setup = Setup(picked, pick_dtype("auto", picked), repeats)
    if picked.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as the trainers do
    about = {"device": device_name(picked), "torch": torch.__version__, "threads": torch.get_num_threads(),
             "repeats": repeats, "command": " ".join(sys.argv)}
    print(about, flush=True)
    if names == ["smoke"]:
        raise SystemExit(0 if smoke_test(setup, {"step": bench_step, "vit": bench_vit}, out_dir) else 1)

    rows = []
    for name in names:
        rows += BENCHES[name](setup)
    columns = ["path", "what", "floor", "seconds", "floor_seconds", "ratio"]
    shown = pd.DataFrame(rows, columns=columns)  # the rest stands in bench.json
    print(shown.to_markdown(index=False, floatfmt=("", "", "", ".6f", ".6f", ".2f")))
    make_folder(out_dir)
    save_json(os.path.join(out_dir, "bench.json"), {**about, "rows": rows})


if __name__ == "__main__":
    chosen = configure(globals(), "[NAME ...]")
    with user_errors(__file__):
        main(chosen)
