"""
Contestants timed in turn, rows of a table from their medians, contestants in processes of their own: what bench.py is made of.
"""
import multiprocessing
import statistics
import sys
import time

import torch

from nanorank.device import synchronize

MEMORY = {}  # MB, by contestant; on CUDA alone


def interleaved(contestants, world, repeats):
    """Median seconds of each contestant, {name: function without arguments}, run in turn `repeats` times after a warm-up; on CUDA
    the memory that it takes at its peak beyond what stays goes into MEMORY[name], in MB."""
    times = {name: [] for name in contestants}
    for i in range(repeats + 1):
        for name, function in contestants.items():
            synchronize(world.device)
            if world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            start = time.perf_counter()
            function()
            synchronize(world.device)
            if i:
                times[name].append(time.perf_counter() - start)
            if world.device.type == "cuda":
                MEMORY[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(*names):
    """{"peak_MB ...": MB} of contestants of the last interleaved run on CUDA; nothing elsewhere."""
    return {f"peak_MB_{name}": MEMORY[name] for name in names if name in MEMORY}


def row(path, what, ours, floor_name, floor, **more):
    print(f"{path}: {what}: {ours / floor:.2f} of {floor_name}", file=sys.stderr, flush=True)
    return {"path": path, "what": what, "seconds": ours, "floor": floor_name, "floor_seconds": floor, "ratio": ours / floor, **more}


def table(rows):
    """The rows as lines of markdown."""
    lines = [["path", "what", "against", "ours, ms", "that, ms", "ratio", "more"]]
    for x in rows:
        more = ", ".join(f"{name} {value:.4g}" for name, value in list(x.items())[6:])
        lines.append([x["path"], x["what"], x["floor"], f"{1e3 * x['seconds']:.3f}", f"{1e3 * x['floor_seconds']:.3f}", f"{x['ratio']:.2f}", more])
    wide = [max(len(line[i]) for line in lines) for i in range(6)] + [0]
    lines.insert(1, ["-" * max(3, w) for w in wide])
    return ["| " + " | ".join(text.ljust(w) for text, w in zip(line, wide)) + " |" for line in lines]


def in_a_process(world, settings, make, *args):
    """make(world, *args), which gives a function, and that function in a process of its own, so that nothing done to this one (freed memory
    that stays) is done to it. Returns (a function that has it run and returns its result as a float, a function that ends the process).
    settings: of the script that `make` stands in."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, world, settings, make, args), daemon=True)
    process.start()
    there.close()  # so that the end of the process is the end of the pipe

    def run():
        here.send(True)
        return here.recv()

    return run, process.kill


def serve(pipe, world, settings, make, args):
    make.__globals__.update(settings)
    function = make(world, *args)
    while pipe.recv():
        value = float(function())
        synchronize(world.device)
        pipe.send(value)
