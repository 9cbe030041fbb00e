"""
The smoke test of a machine: does every path of the trainers work on its GPU, and how fast is it?

    python -m scripts.bench smoke --peer=../nanoGPT    # some ten minutes on a GPU; uses all that there are
    python -m scripts.bench smoke --device=cpu         # the same checks at small sizes, some three minutes

Each check is a function of a Smoke. It raises where something is wrong, NeedsGPU where it has nothing to do
here, and else says in a line what it has found. The ones behind it run all the same.
"""
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP

from nanorank.device import data_sheet_peak, device_name, synchronize
from nanorank.files import make_folder
from nanorank.run_folder import ROOT
from nanorank.tables import write_csv
from scripts.bench_paths import write_tokens
from scripts.timing import Setup

GPT2_SMALL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 756}
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32}


class NeedsGPU(Exception):
    pass


class Smoke(NamedTuple):
    """What the checks work with: a folder of their own, and in it the data sets `text` and `ids`."""
    setup: Setup
    folder: str

    @property
    def on_gpu(self):
        return self.setup.device.type == "cuda"

    @property
    def n_gpus(self):
        return torch.cuda.device_count() if self.on_gpu else 0

    def refuse_mps(self):
        if self.setup.device.type == "mps":
            raise NeedsGPU("CUDA, or a CPU")

    def out(self, name):
        return pathlib.Path(self.folder, name)

    def python(self, *command, seconds=400):
        """Runs `python COMMAND` in the repository. Raises with its last lines unless it exits with 0."""
        command = [*map(str, command)]
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, start_new_session=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            output, _ = process.communicate(timeout=seconds)
        finally:
            if process.poll() is None:  # torchrun's workers too: hung ones would hold the GPUs
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            said = " | ".join(output.strip().splitlines()[-3:])
            raise RuntimeError(f"{' '.join(command)[:100]} ... exits with {process.returncode}: {said}")

    def train(self, name, *args, script="train_lm.py", processes=1, **settings):
        """Trains in the folder `name`. Returns result.json, and log.jsonl as a DataFrame."""
        common = {"data_dir": self.folder, "out_dir": self.out(name), "eval_iters": 1, "log_interval": 5,
                  "device": self.setup.device}
        flags = [f"--{key}={value}" for key, value in {**common, **settings}.items()]
        launcher = []
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        self.python(*launcher, script, *args, *flags)
        log = pd.read_json(self.out(name) / "log.jsonl", lines=True)
        return json.loads((self.out(name) / "result.json").read_text()), log


def write_data(folder):
    """The data sets `text`, bytes of Python's library, and `ids`, as many different ones as GPT-2 has."""
    write_tokens(os.path.join(folder, "text"), "byte", 257, 1_004_000)
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes() for path in files)
    tokens = np.frombuffer(text, np.uint8).astype("<u2")
    np.resize(tokens, 1_000_000).tofile(os.path.join(folder, "text", "train.bin"))
    write_tokens(os.path.join(folder, "ids"), "gpt2", 50257, 10_000_000)


def losses(log):
    """The logged training losses. Raises where one is not finite."""
    found = log["train_loss"].dropna().tolist()
    check(found and all(map(math.isfinite, found)), f"losses are {found}")
    return found


def apart_in(logs):
    """The largest difference between the losses of two runs."""
    return max(abs(a - b) for a, b in zip(*map(losses, logs), strict=True))


def speed_of(log):
    """Median tokens/s, or images/s, of the second half of a run."""
    [column] = [name for name in log if name.endswith("_per_s")]
    return log[column].dropna().iloc[len(log[column].dropna()) // 2:].median()


def fall(log):
    first, *_, last = losses(log)
    check(last < first, f"the loss goes from {first:.3f} to {last:.3f}")
    return f"loss {first:.3f} to {last:.3f}"


def check(condition, message):
    if not condition:
        raise AssertionError(message)

# ---------------------------------------------------------------------- checks

def machine(smoke):
    """The dtype that auto picks is the one that the hardware has."""
    device, dtype = smoke.setup.device, smoke.setup.dtype
    about = f"torch {torch.__version__}, {device_name(device)}, {str(dtype)[6:]}"
    if not smoke.on_gpu:
        return f"{about}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    check(dtype == torch.bfloat16 or properties.major < 8, f"{about}, though its capability is "
          f"{properties.major}.{properties.minor}")
    peak = data_sheet_peak(properties.name)
    known = f"{peak / 1e12:.0f} TFLOP/s by its data sheet" if peak else "no data sheet here: MFU is measured"
    return (f"{about}, {smoke.n_gpus} of them, {properties.total_memory / 2**30:.0f} GiB, CUDA "
            f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, {known}")


def attention_kernels(smoke):
    """Gradients of the fused kernels in 16 bits are those of plain float32, within 2 %."""
    smoke.refuse_mps()
    shape = (4, 12, 756, 64) if smoke.on_gpu else (1, 2, 64, 32)
    kernels = [SDPBackend.FLASH_ATTENTION]
    if smoke.on_gpu:
        kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    generator = torch.Generator().manual_seed(0)
    q, k, v, out_grad = torch.randn(4, *shape, generator=generator).to(smoke.setup.device)

    def gradients(kernel, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(*inputs, is_causal=True)
            out.backward(out_grad.to(dtype))
        return torch.stack([x.grad.float() for x in inputs])

    want = gradients(SDPBackend.MATH, torch.float32)
    found, n_run = [], 0
    for kernel in kernels:
        try:
            grad = gradients(kernel, torch.bfloat16)
        except RuntimeError as error:  # torch: No available kernel
            found.append(f"{kernel.name}: not here ({str(error).splitlines()[0][:60]})")
            continue
        apart = float((grad - want).norm() / want.norm())
        check(apart < 0.02, f"{kernel.name}: gradients differ by {apart:.3f} of their norm")
        found.append(f"{kernel.name} {apart:.4f}")
        n_run += 1
    check(n_run, "; ".join(found))
    return "; ".join(found)


def compiled_is_eager(smoke):
    """The demo trained eagerly and compiled: the same losses, and it learns."""
    args = ["config/demo.py", "--dataset=text", "--warmup_iters=10", "--init_from=scratch"]
    size, steps = {}, 100
    if not smoke.on_gpu:
        size, steps = {**TINY, "batch_size": 8, "total_batch_size": 8}, 30
    logs = []
    for how in (False, True):
        _, log = smoke.train(f"compile_{how}", *args, compile=how, max_iters=steps, **size)
        logs.append(log)
    apart = apart_in(logs)
    check(apart < 0.02, f"losses of the compiled model differ by {apart:.4f}")
    return f"{fall(logs[0])} in {steps} steps, compiled within {apart:.4f}"


def analyze_agrees(smoke):
    """Nuclear norms of the demo's heads, by the device and by the exact way on the CPU."""
    run = smoke.out("compile_False")
    columns = []
    for how in ([f"--device={smoke.setup.device}"], ["--device=cpu", "--exact=true"]):
        smoke.python("analyze.py", run / "ckpt.pt", "--figure=False", f"--out_dir={smoke.out('heads')}", *how)
        columns.append(pd.read_csv(smoke.out("heads") / "heads.csv")["nuclear"])
    apart = float(((columns[0] - columns[1]) / columns[1]).abs().max())
    check(apart < 1e-6, f"nuclear norms differ by {apart:.1e} of themselves")
    return f"{len(columns[0])} heads and products within {apart:.1e}"


def muon_and_resume(smoke):
    """float16 with Muon, and the run goes on where it ended."""
    size, steps, dtype = {"eval_interval": 50}, 100, "float16"
    if not smoke.on_gpu:
        size, steps, dtype = {**TINY, "batch_size": 8, "total_batch_size": 8}, 10, "float32"
    args = ["config/demo.py", "--dataset=text", "--optimizer=muon", f"--dtype={dtype}"]
    more = steps + steps // 5
    smoke.train("muon", *args, max_iters=steps, **size)
    result, log = smoke.train("muon", *args, "--init_from=resume", "--save_in_thread", max_iters=more, **size)
    check(result["steps"] == more, f"it ended at step {result['steps']}")
    return f"{dtype}, {fall(log)}, resumed at step {steps}, ended at {more}"


def gpt2_small(smoke):
    """GPT-2 small on ids that it has not learned yet: the loss of a guess, memory, tokens/s."""
    size, batch, steps = GPT2_SMALL, 32, 60
    if not smoke.on_gpu:
        size, batch, steps = TINY, 4, 10
    result, log = smoke.train("gpt2", "--dataset=ids", max_iters=steps, batch_size=batch,
                              total_batch_size=batch, rank_interval=0, **size)
    guess = math.log(50304)
    first = losses(log)[0]
    check(abs(first - guess) < 0.3, f"the first loss is {first:.2f}, that of a guess {guess:.2f}")
    memory = f", {result['gpu_gib']:.1f} GiB" if smoke.on_gpu else ""
    return f"loss {first:.2f}, {speed_of(log):,.0f} tokens/s, mfu {log['mfu'].max():.1%}{memory}"


def process_group(smoke):
    """DDP around a compiled layer in a process group of one, as a run of several joins it."""
    smoke.refuse_mps()
    device = smoke.setup.device
    backend = "cpu:gloo,cuda:nccl" if smoke.on_gpu else "gloo"
    if smoke.on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = torch.nn.Linear(64, 64).to(device)
        compiled = torch.compile(layer, backend="inductor" if smoke.on_gpu else "eager")
        ids = [torch.cuda.current_device()] if smoke.on_gpu else None
        net = DDP(compiled, device_ids=ids, gradient_as_bucket_view=True)
        net.broadcast_buffers = False
        x = torch.randn(8, 64, device=device)
        net(x).square().sum().backward()
        total = torch.tensor(3)
        dist.all_reduce(total)  # on the CPU, through gloo
        check(int(total) == 3, f"gloo's sum of 3 is {total}")
        want = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
        apart = float((layer.weight.grad - want).norm() / want.norm())
        check(apart < 1e-2, f"gradients differ by {apart:.1e} of their norm")
    finally:
        dist.destroy_process_group()
    return f"{backend}, gradients within {apart:.0e}"


def several_processes(smoke):
    """All GPUs together take the steps of one, faster."""
    smoke.refuse_mps()
    if smoke.n_gpus == 1:
        raise NeedsGPU("two GPUs")
    n = smoke.n_gpus or 2
    size, batch, steps, tolerance = GPT2_SMALL, 16, 40, 1e-2
    if not smoke.on_gpu:
        size, batch, steps, tolerance = TINY, 4, 10, 1e-4
    settings = dict(max_iters=steps, batch_size=batch, total_batch_size=n * batch, rank_interval=0, **size)
    logs = []
    for processes in (1, n):
        _, log = smoke.train(f"processes_{processes}", "--dataset=ids", processes=processes, **settings)
        logs.append(log)
    apart = apart_in(logs)
    check(apart < tolerance, f"losses of {n} processes differ by {apart:.1e} from those of one")
    times = speed_of(logs[1]) / speed_of(logs[0])
    check(not smoke.on_gpu or times > 0.93 * n, f"{n} GPUs are {times:.2f} times as fast as one")
    return f"{n} processes, losses within {apart:.1e}, {times:.2f} times as fast"


def vit(smoke):
    """The ViT demo with RandAugment and mixup."""
    steps = 100 if smoke.on_gpu else 40
    args = ["config/vit_demo.py", "--randaug_layers=2", "--mixup=0.2", "--warmup_iters=5"]
    _, log = smoke.train("vit", *args, script="train_vit.py", max_iters=steps)
    first, *_, last = losses(log)
    guess = math.log(10)
    check(abs(first - guess) < 0.1, f"the first loss is {first:.3f}, that of a guess {guess:.3f}")
    return f"loss {first:.3f} to {last:.3f}, {speed_of(log):,.0f} images/s"


def bf16_residual(smoke):
    """--bf16_residual: the losses stay close, and the speed with and without."""
    if not smoke.on_gpu:
        raise NeedsGPU("a GPU")
    logs = []
    for how in (False, True):
        _, log = smoke.train(f"residual_{how}", "--dataset=ids", max_iters=40, batch_size=32,
                             total_batch_size=32, rank_interval=0, bf16_residual=how, **GPT2_SMALL)
        logs.append(log)
    apart = apart_in(logs)
    check(apart < 0.05, f"losses differ by {apart:.3f}")
    return f"losses within {apart:.4f}, {speed_of(logs[1]) / speed_of(logs[0]):.3f} times the tokens/s"


CHECKS = (machine, attention_kernels, compiled_is_eager, analyze_agrees, muon_and_resume, gpt2_small,
          process_group, several_processes, vit, bf16_residual)

# ------------------------------------------------------------------------ main

def run_checks(smoke, checks):
    """A row for each check: its name, pass, FAILED or "needs ...", seconds, and what it has found."""
    rows = []
    for function in checks:
        began = time.perf_counter()
        try:
            result, found = "pass", function(smoke)
            synchronize(smoke.setup.device)
        except NeedsGPU as what:
            result, found = f"needs {what}", function.__doc__.splitlines()[0]
        except Exception as error:  # whatever it is, the others are to run
            result, found = "FAILED", f"{type(error).__name__}: {error}"
        found = " ".join(str(found).split())
        name = function.__name__
        seconds = round(time.perf_counter() - began, 1)
        rows.append({"check": name, "result": result, "seconds": seconds, "found": found})
        print(f"{name}: {result}, {seconds} s: {found}", file=sys.stderr, flush=True)
    return rows


def smoke_test(setup, benches, out_dir):
    """Runs all checks, then on a GPU the benches, {name: function of a Setup that yields rows}.

    Writes smoke.csv and smoke_speed.csv to out_dir. Returns whether everything has passed.
    """
    speed = []

    def bench_of(name, bench):
        def timed(smoke):
            if not smoke.on_gpu:
                raise NeedsGPU("a GPU")
            rows = list(bench(smoke.setup))
            speed.extend(rows)
            return "; ".join(f"{row['ratio']:.2f} of {row['floor']}" for row in rows)

        timed.__name__ = f"bench_{name}"
        timed.__doc__ = f"python -m scripts.bench {name}"
        return timed

    with tempfile.TemporaryDirectory() as folder:
        write_data(folder)
        checks = [*CHECKS, *(bench_of(name, bench) for name, bench in benches.items())]
        rows = run_checks(Smoke(setup, folder), checks)
    make_folder(out_dir)
    write_csv(os.path.join(out_dir, "smoke.csv"), rows)
    if speed:
        write_csv(os.path.join(out_dir, "smoke_speed.csv"), speed)
    print(pd.DataFrame(rows).to_markdown(index=False))
    return all(row["result"] != "FAILED" for row in rows)
