"""
Contestants timed in turn, and the rows of a table from their medians.
"""
import multiprocessing
import statistics
import sys
import time
from typing import NamedTuple

import torch

from nanorank.device import synchronize


class Setup(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of autocast
    repeats: int        # of each contestant


def interleaved(contestants, setup):
    """Median seconds of each contestant, {name: function without arguments}.

    They run in turn after a warm-up, so that a slow minute of the machine hits all of them.
    """
    return medians(rounds(contestants, setup))


def rounds(contestants, setup):
    """As interleaved, but the seconds of each repeat: {name: list}."""
    times = {name: [] for name in contestants}
    for _ in range(setup.repeats + 1):
        for name, function in contestants.items():
            times[name].append(seconds_of(function, setup))
    return {name: values[1:] for name, values in times.items()}


def medians(times):
    return {name: statistics.median(values) for name, values in times.items()}


def seconds_of(function, setup):
    synchronize(setup.device)
    start = time.perf_counter()
    function()
    synchronize(setup.device)
    return time.perf_counter() - start


def row(path, what, seconds, floor, floor_seconds, **more):
    """A row of bench.json: our seconds against the floor's."""
    ratio = seconds / floor_seconds
    print(f"{path}: {what}: {ratio:.2f} of {floor}", more or "", file=sys.stderr, flush=True)
    return {"path": path, "what": what, "seconds": seconds, "floor": floor, "floor_seconds": floor_seconds,
            "ratio": ratio, **more}


def in_a_process(make, *args):
    """Runs the function that make(*args) returns in a process of its own, which keeps its own freed memory.

    Returns a function that runs it there and returns its result as a float, and one that ends the process.
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
