"""
Printing from the first process, time left, and signals.
"""
import os
import signal
import time


def print0(*args, **kwargs):
    """Prints on the first process alone, at once."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, **kwargs, flush=True)


def time_left(seconds):
    """1h02m, 3m20s, 15s."""
    seconds = int(seconds)
    h, m, s = seconds // 3600, seconds // 60 % 60, seconds % 60
    if h:
        return f"{h}h{m:02d}m"
    if m:
        return f"{m}m{s:02d}s"
    return f"{s}s"


class StopSignal:
    """Notes SIGTERM and SIGINT; a second one ends the process at once.

    `signal` is the number of the first, 0 before.
    """

    def __init__(self):
        self.signal = 0
        self.time = 0.0
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.note)

    def note(self, signum, frame):
        # torchrun passes on a Ctrl-C that the terminal has sent us already
        echo = "RANK" in os.environ and time.monotonic() - self.time < 2
        if self.signal and not echo:
            os._exit(128 + signum)
        if not self.signal:
            self.signal = signum
            self.time = time.monotonic()
