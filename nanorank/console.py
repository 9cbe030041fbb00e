"""
What a script says and hears: lines from the first process, time left, signals.
"""
import os
import signal
import time

import torch
import torch.distributed as dist


def print0(*args, **kwargs):
    """Prints on the first process alone, at once."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, **kwargs, flush=True)


def time_left(seconds):
    """1h02m, 3m20s, 15s."""
    seconds = int(seconds)
    h, m, s = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"


class StopSignal:
    """Notes SIGTERM and SIGINT; a second one ends the process at once. `signal` is the number of the first, 0 before."""

    def __init__(self):
        self.signal, self.time = 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        echo = "RANK" in os.environ and time.monotonic() - self.time < 2  # torchrun hands on a Ctrl-C that we got already
        if self.signal and not echo:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.time = number, time.monotonic()

    def anywhere(self, world):
        """The signal that any process got, 0 for none, the same answer on all of them."""
        if world.size == 1:
            return self.signal
        flag = torch.tensor(self.signal)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)  # on the CPU, through gloo: no wait for the GPU
        return int(flag)
