"""
How close each hot path is to its floor, in one interleaved run: medians, ratios, and bench.json.

    python -m scripts.bench                                 # all
    python -m scripts.bench step spectra                    # some of: step variants vit head start batches spectra checkpoint prepare
    python -m scripts.bench step --peer=../nanoGPT          # against nanoGPT's own training step too, from a checkout of it
    python -m scripts.bench step --device=cuda              # the shapes follow the device: the demo's on a CPU, GPT-2 small's on a GPU

A ratio is our time over the floor's: 1 is the floor itself. Floors: DESIGN section 3. Run it on an otherwise idle machine.
On CUDA each contestant's peak memory stands behind its row. `vit` runs timm's ViT beside ours where timm is installed.
"""
import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch
import torch.nn.functional as F

import train_lm
import train_vit
from configurator import configure, current
from model import GPT, ViT, decay_groups, head_loss, init_weights, make_optimizers, vit_size
from nanorank.device import init_dist, peak_flops, pick_dtype
from nanorank.errors import UserError, user_errors
from nanorank.families import attention_layers
from nanorank.files import save_json
from nanorank.images import RECORD, ImageSplit
from nanorank.spectra import summary
from scripts import bench_paths
from scripts.timing import in_a_process, interleaved, peak_memory, row, table

repeats = 7             # of each contestant, interleaved; medians are printed
device = "auto"         # auto, cpu, cuda, mps
dtype = "auto"          # autocast of the training step, as in train_lm.py
compile = "auto"        # torch.compile of the training step: auto (on CUDA), true, false
peer = ""               # a checkout of karpathy/nanoGPT: its training step beside ours
text = ""               # .jsonl or .jsonl.zst for prepare; empty: this Python's library and packages
out_dir = "out/bench"   # where bench.json goes


# ------------------------------------------------------------------------------------------------------------ training step

def shapes(world):
    """Models and batches of the step benchmark: the demo's on a CPU, also with GPT-2's vocabulary; GPT-2 small's on a GPU, with P1's
    context and its own."""
    if world.device.type == "cuda":
        small = {"vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768, "bias": False}
        return [({**small, "block_size": 756}, 32), ({**small, "block_size": 1024}, 24)]
    demo = {"block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 128, "bias": False}
    return [({**demo, "vocab_size": 320}, 16), ({**demo, "vocab_size": 50304}, 16)]


def compiled(model, world, **options):
    return torch.compile(model, **options) if compile == "true" or (compile == "auto" and world.device.type == "cuda") else model


def autocast(world):
    amp = pick_dtype(dtype, world.device)
    return torch.autocast(world.device.type, amp) if amp != torch.float32 else contextlib.nullcontext()


def train_step(model, world, inputs, loss, fast=None):
    """A function that takes one optimizer step of the model on the same inputs, a tuple, as the trainers take it, and returns the loss;
    loss: of what the model returns; fast: the model as it is called, compiled as the trainers do it by default."""
    model.to(world.device)
    fast = compiled(model, world) if fast is None else fast
    (optimizer,) = make_optimizers(decay_groups(model, 0.1, 0.1, 0.1), "adamw", 1e-3, 0.9, 0.95, 1e-8, 0.9, world.device.type)

    def step():
        with autocast(world):
            value = loss(fast(*inputs))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def nanogpt_step(world, args, state, inputs):
    """nanoGPT's own training step (the loop of its train.py, its model, its optimizer) from the weights of our model, on the same inputs."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", os.path.join(peer, "model.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclass looks itself up there
    with contextlib.redirect_stdout(io.StringIO()):
        spec.loader.exec_module(module)
        model = module.GPT(module.GPTConfig(**args))
        model.load_state_dict(state)
        model.to(world.device)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), world.device.type)
    scaler = torch.amp.GradScaler(world.device.type, enabled=False)
    fast, inputs = compiled(model, world), [x.to(world.device) for x in inputs]

    def step():
        with autocast(world):
            _, loss = fast(*inputs)
            loss = loss / 1  # gradient_accumulation_steps
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def bench_step(world):
    """One optimizer step against its model FLOPs at the rate of a large GEMM, and against nanoGPT's; what measuring rank adds."""
    amp = pick_dtype(dtype, world.device)
    n = 2048 if world.device.type == "cpu" else 8192
    a = torch.randn(n, n, device=world.device, dtype=amp)
    for args, B in shapes(world):
        model = GPT(**args)
        init_weights(model, 0)
        x = torch.randint(args["vocab_size"], (B, args["block_size"] + 1), device=world.device)
        inputs, losses = (x[:, :-1].contiguous(), x[:, 1:].contiguous()), {"step": [], "nanoGPT": []}
        state = {name: x.clone() for name, x in model.state_dict().items()}
        steps = {"step": train_step(model, world, inputs, lambda out: out[1])}
        if peer:
            steps["nanoGPT"], stop = in_a_process(world, current(globals()), nanogpt_step, args, state, [x.cpu() for x in inputs])
        times = interleaved({**{name: lambda step=step, values=losses[name]: values.append(step()) for name, step in steps.items()},
                             "gemm": lambda: a @ a,
                             "rank": lambda model=model: summary(attention_layers(model.state_dict(), model.args["n_head"]))}, world, repeats)
        flops = model.flops_per_token(args["block_size"]) * inputs[0].numel()
        floor = flops / (2 * n**3 / times["gemm"])
        what = f"{args['n_layer']} layers, {args['n_embd']} wide, {args['vocab_size']} ids, {B} x {args['block_size']} tokens, {str(amp)[6:]}"
        yield row("step", what, times["step"], f"its FLOPs at the rate of a {n} GEMM", floor, tokens_per_s=inputs[0].numel() / times["step"],
                  mfu=floor / times["step"], mfu_of_peak=flops / times["step"] / peak_flops(world.device, amp)[0], **peak_memory("step"))
        if peer:
            stop()
            apart = max(abs(float(p - q)) for p, q in zip(losses["step"], losses["nanoGPT"], strict=True))
            yield row("step", what, times["step"], "nanoGPT's step, a process of its own", times["nanoGPT"],
                      times_its_tokens_per_s=times["nanoGPT"] / times["step"], losses_apart=apart, loss=float(losses["step"][-1]))
        amortised = times["rank"] / train_lm.rank_interval
        yield row("step", f"rank of every head, each {train_lm.rank_interval} steps", times["step"] + amortised, "the step without",
                  times["step"], rank_seconds=times["rank"], percent=100 * amortised / times["step"])


def bench_variants(world):
    """What could make the step faster, each alone against the step as it is: attention kernels and ways to compile."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    args, B = shapes(world)[0]
    x = torch.randint(args["vocab_size"], (B, args["block_size"]), device=world.device)
    kernels = {name: getattr(SDPBackend, name) for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")}
    ways = {"dynamic=False": {"dynamic": False}, "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
            "reduce-overhead": {"mode": "reduce-overhead"}, "eager": None, "default": {}}
    variants = {**{f"SDPA {name}": (kernel, compiled) for name, kernel in kernels.items()},
                **{f"compile {name}": (None, lambda model, world, way=way: model if way is None else torch.compile(model, **way))
                   for name, way in ways.items()}}

    def make(kernel=None, wrap=compiled):
        model = GPT(**args)
        init_weights(model, 0)
        step = train_step(model, world, (x, x), lambda out: out[1], wrap(model.to(world.device), world))
        return (lambda: in_kernel(step, kernel)) if kernel else step

    def in_kernel(step, kernel):
        with sdpa_kernel(kernel):
            return step()

    for name, variant in variants.items():
        step = make(*variant)
        try:
            step()
        except Exception as error:  # compilers and kernels fail in dozens of ways where they are not for this machine
            print(f"variants   {name}: not on this machine ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]})", flush=True)
            continue
        times = interleaved({"variant": step, "default": make()}, world, repeats)
        yield row("variants", name, times["variant"], "the step as it is", times["default"], **peak_memory("variant", "default"))
        torch.compiler.reset()


def bench_head(world):
    """Head and loss, forward and backward: torch's chunked linear_cross_entropy against plain logits and cross_entropy."""
    if not hasattr(F, "linear_cross_entropy"):
        return print(f"head       torch {torch.__version__} has no linear_cross_entropy: plain everywhere")
    for N, d, V in ((2048, 256, 50304), (4096, 768, 50304)):
        x = torch.randn(N, d, device=world.device, requires_grad=True)
        w = (0.02 * torch.randn(V, d, device=world.device)).requires_grad_()
        y = torch.randint(V, (N,), device=world.device)
        times = interleaved({"chunked": lambda x=x, w=w, y=y: head_loss(x, w, y).backward(),
                             "plain": lambda x=x, w=w, y=y: F.cross_entropy(F.linear(x, w), y, ignore_index=-1).backward()}, world, repeats)
        yield row("head", f"{N} tokens, {d} wide, {V} ids, chunked", times["chunked"], "plain logits and cross_entropy", times["plain"],
                  logits_MB=N * V * 4 / 2**20)


def bench_vit(world):
    """ViT-S/16 at 224: one optimizer step against its model FLOPs at the rate of a large GEMM; and what feeds it, from a folder of
    stored images of short side 256 that the page cache holds, to batches of the recipe's crops, RandAugment and mixup on the device."""
    B = 128 if world.device.type == "cuda" else 8
    model = ViT(1000, 224, **vit_size("S/16"))
    init_weights(model, 0)
    pictures, labels = torch.randn(B, 3, 224, 224, device=world.device), torch.zeros(B, dtype=torch.long, device=world.device)
    step = train_step(model, world, (pictures,), lambda logits: F.cross_entropy(logits.float(), labels))
    peers, stop = {}, None
    if importlib.util.find_spec("timm"):
        peers["timm"], stop = in_a_process(world, current(globals()), timm_step, pictures.cpu(), labels.cpu())
    amp = pick_dtype(dtype, world.device)
    n = 2048 if world.device.type == "cpu" else 8192
    a = torch.randn(n, n, device=world.device, dtype=amp)
    with tempfile.TemporaryDirectory() as folder:
        images, shape = 1024, (256, 341)
        index = np.zeros(images, dtype=RECORD)
        index["offset"], index["height"], index["width"] = np.arange(images) * 3 * shape[0] * shape[1], *shape
        noise = np.random.default_rng(0).integers(0, 256, 3 * shape[0] * shape[1] + images, dtype=np.uint8)
        np.concatenate([noise[i:len(noise) - images + i] for i in range(images)]).tofile(os.path.join(folder, "train.bin"))
        index.tofile(os.path.join(folder, "train.idx"))
        files = [{"name": f"train.{end}", "bytes": os.path.getsize(os.path.join(folder, f"train.{end}"))} for end in ("bin", "idx")]
        save_json(os.path.join(folder, "meta.json"), {"kind": "images", "classes": [str(i) for i in range(1000)], "short_side": 256,
                                                      "mean": [0.5] * 3, "std": [0.3] * 3, "splits": {"train": {"images": images, "files": files}}})
        split = ImageSplit(folder, "train")
        vars(train_vit).update(total_batch_size=B, batch_size=B)
        stream, number = train_vit.train_batches(split, world, 0, 10**9, 1), iter(range(10**9))
        ready = next(stream)

        def copies():  # the bytes that a batch is read from
            return split.pixels[:B * 3 * shape[0] * shape[1]].copy()

        times = interleaved({"step": step, **peers, "gemm": lambda: a @ a, "load": lambda: next(stream), "memcpy": copies,
                             "augment": lambda: train_vit.augment(*ready, train_vit.sample_numbers(next(number), 0, world), split.meta)},
                            world, repeats)
    floor = model.flops_per_image() * B / (2 * n**3 / times["gemm"])
    yield row("vit", f"ViT-S/16 at 224, batch {B}, {str(amp)[6:]}", times["step"], f"its FLOPs at the rate of a {n} GEMM", floor,
              images_per_s=B / times["step"], mfu=floor / times["step"], **peak_memory("step"))
    if peers:
        stop()
        yield row("vit", f"ViT-S/16 at 224, batch {B}, {str(amp)[6:]}", times["step"], "timm's ViT-S/16 in its loop, a process of its own",
                  times["timm"], times_its_images_per_s=times["timm"] / times["step"])
    yield row("vit", "reading crops of stored images, per batch", times["load"], "memcpy of the whole images", times["memcpy"],
              images_per_s=B / times["load"])
    feed = times["load"] + times["augment"]
    yield row("vit", "reading and augmenting, one after the other", feed, "the step that it feeds", times["step"], images_per_s=B / feed,
              times_the_steps_rate=times["step"] / feed)


def timm_step(world, pictures, labels):
    """A step of timm's vit_small_patch16_224 as its train.py takes it by default: autocast, no compilation, clipping, AdamW by groups."""
    import timm
    import timm.optim
    model = timm.create_model("vit_small_patch16_224", num_classes=1000).to(world.device)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)
    pictures, labels = pictures.to(world.device), labels.to(world.device)

    def step():
        with autocast(world):
            loss = F.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step

# ---------------------------------------------------------------------------------------------------------- beside the step

def bench_start(world):
    """From the command line to the first optimizer step of the demo's model, not compiled, against importing torch."""
    with tempfile.TemporaryDirectory() as folder:
        bench_paths.write_tokens(os.path.join(folder, "text"), np.resize(np.arange(256, dtype="<u2"), 1_000_000), "byte", 257)
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        command = [sys.executable, os.path.join(here, "train_lm.py"), os.path.join(here, "config", "demo.py"), "--dataset=text",
                   f"--data_dir={folder}", f"--out_dir={folder}/run", "--overwrite", "--log_interval=1", "--eval_iters=1", "--compile=false",
                   f"--device={world.device}"]

        def first_step():
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                if not any(line.startswith("step 0: loss") for line in process.stdout):
                    raise RuntimeError(f"{' '.join(command)} took no step")
                process.kill()

        times = interleaved({"start": first_step, "torch": lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True)},
                            world, repeats)
    yield row("start", "train_lm.py config/demo.py to its first step", times["start"], "import torch", times["torch"])


BENCHES = {"step": bench_step, "variants": bench_variants, "vit": bench_vit, "head": bench_head, "start": bench_start,
           "batches": lambda world: bench_paths.batches(world, repeats), "spectra": lambda world: bench_paths.spectra(world, repeats),
           "checkpoint": lambda world: bench_paths.checkpoint(world, repeats, out_dir),
           "prepare": lambda world: bench_paths.prepare(world, repeats, text)}


def main(names):
    with user_errors("bench.py"):
        unknown = [name for name in names if name not in [*BENCHES, "all"]]
        if unknown:
            raise UserError(f"no benchmark {unknown[0]}: there are {', '.join(BENCHES)}, all")
        if repeats < 1:
            raise UserError(f"--repeats={repeats} must be at least 1")
        if peer and not os.path.isfile(os.path.join(peer, "model.py")):
            raise UserError(f"--peer={peer} holds no model.py: expects a checkout of karpathy/nanoGPT")
        world = init_dist(device)
        pick_dtype(dtype, world.device)
    chip = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else str(world.device)
    print(f"{chip}, torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {repeats} interleaved repeats", flush=True)
    rows, chosen = [], list(BENCHES) if not names or "all" in names else names
    for i, name in enumerate(chosen, 1):
        print(f"[{i}/{len(chosen)}] {name}", file=sys.stderr, flush=True)
        rows += list(BENCHES[name](world) or [])
    print("\n".join(table(rows)))
    os.makedirs(out_dir, exist_ok=True)
    save_json(os.path.join(out_dir, "bench.json"),
              {"device": chip, "torch": torch.__version__, "threads": torch.get_num_threads(), "repeats": repeats,
               "command": " ".join(sys.argv), "rows": rows})


if __name__ == "__main__":
    main(configure(globals(), positional="[step|variants|vit|head|start|batches|spectra|checkpoint|prepare|all ...]"))
