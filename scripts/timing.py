"""
Contestants timed in turn, and the rows of a table from their medians.
"""
import contextlib
import multiprocessing
import statistics
import sys
import time
from typing import NamedTuple

import torch

from nanorank.device import synchronize

PEAK_MB = {}  # memory of each contestant, on CUDA alone


class Setup(NamedTuple):
    """dtype: of autocast; compile: whether to; repeats: of each contestant."""
    device: torch.device
    dtype: torch.dtype
    compile: bool
    repeats: int


def autocast(setup):
    if setup.dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(setup.device.type, setup.dtype)


def interleaved(contestants, setup):
    """Median seconds of each contestant, {name: function without arguments}.

    They run in turn `repeats` times after a warm-up, so that a slow minute of the machine hits all of them.
    On CUDA, PEAK_MB[name] is the memory that each takes at its peak beyond what stays.
    """
    on_cuda = setup.device.type == "cuda"
    times = {name: [] for name in contestants}
    for i in range(setup.repeats + 1):
        for name, function in contestants.items():
            synchronize(setup.device)
            if on_cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            function()
            synchronize(setup.device)
            if i > 0:
                times[name].append(time.perf_counter() - start)
            if on_cuda:
                PEAK_MB[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(*names):
    """{"peak_MB_NAME": MB} of contestants of the last interleaved run. Empty but on CUDA."""
    return {f"peak_MB_{name}": PEAK_MB[name] for name in names if name in PEAK_MB}


def row(path, what, seconds, floor, floor_seconds, **more):
    """A row of bench.json: our seconds against the floor's."""
    ratio = seconds / floor_seconds
    print(f"{path}: {what}: {ratio:.2f} of {floor}", file=sys.stderr, flush=True)
    return {"path": path, "what": what, "seconds": seconds, "floor": floor, "floor_seconds": floor_seconds,
            "ratio": ratio, **more}


def table(rows):
    """The rows as lines of markdown."""
    lines = [["path", "what", "against", "ours, ms", "that, ms", "ratio", "more"]]
    for x in rows:
        more = ", ".join(f"{name} {value:.4g}" for name, value in list(x.items())[6:])
        ours, floor = f"{1e3 * x['seconds']:.3f}", f"{1e3 * x['floor_seconds']:.3f}"
        lines.append([x["path"], x["what"], x["floor"], ours, floor, f"{x['ratio']:.2f}", more])
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    lines.insert(1, ["-" * width for width in widths] + ["---"])
    out = []
    for *cells, more in lines:
        cells = [text.ljust(width) for text, width in zip(cells, widths)]
        out.append("| " + " | ".join([*cells, more]) + " |")
    return out


def in_a_process(make, *args):
    """The function that make(*args) returns, run in a process of its own.

    Nothing done to this process, such as keeping freed memory, is done to that one. Returns a function that
    runs it there and returns its result as a float, and a function that ends the process.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, make, args), daemon=True)
    process.start()
    there.close()  # so that the pipe ends when the process does

    def call():
        here.send(True)
        return here.recv()

    return call, process.kill


def serve(pipe, make, args):
    function = make(*args)
    while pipe.recv():
        pipe.send(float(function()))  # float waits for the device
