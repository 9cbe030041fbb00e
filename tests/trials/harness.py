"""
Runs one case of a trial in a process of its own, under a limit of time and memory, and judges how it ended.

    outcome = attempt(main_of(analyze, ["a.pt"], n_head=4), folder)
    verdict = judge(outcome, "a.pt")     # "refused", "valid", or a text about what is wrong
"""
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from typing import NamedTuple

import torch._dynamo  # noqa: F401  (else each child's first optimizer step takes seconds to import it)
from conftest import environment

from nanorank.console import time_left
from nanorank.errors import user_errors

REPO = pathlib.Path(__file__).resolve().parents[2]
MOST_SECONDS = 30  # that a case may take, wall clock
MOST_MB = 1000     # of memory that a case may add to what the imports take


class Outcome(NamedTuple):
    """How a case ended."""
    code: int       # exit status; negative: a signal
    out: str
    err: str
    seconds: float  # wall clock
    mb: float       # memory beyond the imports'


def attempt(work, folder):
    """The Outcome of work() in a forked child, or of `python WORK` for a list. Kills what takes too long."""
    began = time.monotonic()
    files = [open(os.path.join(folder, name), "w+b") for name in ("stdout", "stderr", "base")]
    if isinstance(work, list):
        command = [sys.executable, *work]
        pid = subprocess.Popen(command, cwd=REPO, env=environment(), stdout=files[0], stderr=files[1]).pid
    else:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            run_child(work, *files)

    ended = 0
    while not ended:
        if time.monotonic() - began > MOST_SECONDS:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
        ended, status, usage = os.wait4(pid, os.WNOHANG)
    seconds = time.monotonic() - began

    texts = []
    for file in files:
        with file:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    out, err, base = texts
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    used = usage.ru_maxrss * unit - int(base or 0)
    return Outcome(os.waitstatus_to_exitcode(status), out, err, seconds, max(used / 1e6, 0.0))


def run_child(work, out, err, base):
    """Runs work() as the bottom of a script runs main(), and ends this process.

    base: the file that gets this process's memory at its beginning, in bytes.
    """
    code = 1
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = open(1, "w")  # pytest has put its own in their place
        sys.stderr = open(2, "w", errors="backslashreplace")
        if sys.platform == "linux":
            pages = pathlib.Path("/proc/self/statm").read_text().split()
            virtual, resident = (int(n) * os.sysconf("SC_PAGE_SIZE") for n in pages[:2])
            base.write(str(resident).encode())
            base.flush()
            limit = virtual + MOST_MB * 10**6
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with user_errors("script"):
            work()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def judge(outcome, name, canary=None):
    """"refused", "valid", or what is wrong.

    name: a word that the line must name, alternatives separated by |.
    canary: a file that hidden code would make.
    """
    code, out, err = outcome[:3]
    lines = [line for line in err.strip().splitlines() if "%|" not in line]  # without progress bars
    if canary and os.path.exists(canary):
        os.unlink(canary)
        return "code in it ran"
    if outcome.seconds > MOST_SECONDS or outcome.mb > MOST_MB:
        return f"took {outcome.seconds:.1f} s, {outcome.mb:.0f} MB"
    if "Traceback" in err:
        return f"traceback: {lines[-1][:200]}"
    if code == 2:
        if len(lines) == 1 and any(word in lines[0] for word in name.split("|")):
            return "refused"
        return f"exit 2 with {len(lines)} lines, or not naming {name}: {err[:300]}"
    if code == 0:
        if re.search(r"(?<![\w./'-])(nan|inf|infinity)\b", out, re.I):
            return "valid, with numbers that are not finite"
        return "valid"
    if code == 1 and len(lines) == 1 and "the last good checkpoint is" in lines[0]:
        return "refused"  # weights overflowed in training, which saved nothing of them
    return f"exit {code}: {err[-300:]}"


class Tally:
    """Counts the cases of a kind, and prints what is wrong."""

    def __init__(self, kind, folder):
        self.kind = kind
        self.folder = str(folder)
        self.rows = []  # (verdict, seconds, MB)
        self.began = self.spoke = time.monotonic()

    def __call__(self, label, work, name, canary=None, want=""):
        """Runs and judges a case; want: "refused" or "valid", where only one is right."""
        outcome = attempt(work, self.folder)
        verdict = judge(outcome, name, canary)
        self.rows.append((verdict, outcome.seconds, outcome.mb))
        if verdict not in ("refused", "valid"):
            self.wrong(f"{label}: {verdict}")
        elif want and verdict != want:
            self.wrong(f"{label}: should be {want}, is {verdict}: {outcome.err[:200]}")
        if time.monotonic() - self.spoke > 10:
            self.spoke = time.monotonic()
            print(f"  {self.kind}: {len(self.rows)} cases, {time_left(self.spoke - self.began)}", flush=True)
        return outcome

    def wrong(self, verdict):
        """The last case was wrong."""
        self.rows[-1] = verdict, *self.rows[-1][1:]
        print(f"WRONG {self.kind}: {verdict}", flush=True)

    def row(self):
        verdicts, seconds, mb = zip(*self.rows)
        row = {"kind": self.kind, "cases": len(verdicts),
               "refused": verdicts.count("refused"), "valid": verdicts.count("valid")}
        return {**row, "wrong": row["cases"] - row["refused"] - row["valid"],
                "worst_seconds": round(max(seconds), 2), "worst_mb": round(max(mb)),
                "seconds": round(time.monotonic() - self.began, 1)}


def main_of(module, *args, **settings):
    """A function that runs a script's main with these settings, in a child that it may change."""
    unknown = settings.keys() - vars(module).keys()
    assert not unknown, unknown

    def work():
        vars(module).update(settings)
        module.main(*args)
    return work
