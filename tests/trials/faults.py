"""
Kills, stops and fills the disk of our programs at random moments: what comes out must be as if undisturbed.

    python tests/trials/faults.py                                   # all trials
    python tests/trials/faults.py train_lm --kills=100 --seed=0     # one; some five minutes on a core
    unshare -rm python tests/trials/faults.py disk                  # it mounts a tmpfs; root needs no unshare

Trials:
    train_lm, train_vit, prepare_pile, prepare_imagenet, sweep      SIGKILL
    saves       SIGKILL as soon as a file is being replaced         of each program but sweep
    signals     SIGTERM and SIGINT                                  of each program but sweep
    disk        fills up, and has room again at the next start      of each program but sweep
    torchrun    two processes, one of them is killed, --max-restarts=3; or SIGTERM, or Ctrl-C

A fault comes at a moment drawn uniformly over the time of an undisturbed run, counted from the last start.
The same command starts the program again until it ends by itself. Half of the kills hit the process and all
that it has started, half the process alone: its workers must end too. Programs are forks of this process,
which has imported torch; where ten faults or more are asked for, every tenth is `python SCRIPT` itself.

Compared to the byte: token and pixel files, records, meta.json, tables, every tensor and number of ckpt.pt
and step_*.pt, log.jsonl and result.json; not times, speeds and places. Writes OUT_DIR/faults.csv, a row for
each trial and seed. Exit 1 where anything failed.
"""
import contextlib
import functools
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

# before torch is imported
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", MPLBACKEND="Agg")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import torch

# imported here so that a fork need not
import torch._dynamo  # noqa: F401
from processes import family, fill_disk, is_saving, kill, start, still_alive, wait
from programs import differences, programs, write_table

import model  # noqa: F401
from configurator import configure
from nanorank import images, run  # noqa: F401
from nanorank.console import time_left
from nanorank.errors import UserError, user_errors

# -----------------------------------------------------------------------------
kills = 100                     # kills of each program; a fifth of it in saves, signals, torchrun and disk
seed = 0                        # of the moments
save_in_thread = False          # the trainers write their checkpoints in a thread
out_dir = "results/trust"       # where faults.csv goes
# -----------------------------------------------------------------------------

KILLED = ("train_lm", "train_vit", "prepare_pile", "prepare_imagenet")
TRIALS = (*KILLED, "sweep", "saves", "signals", "torchrun", "disk")


class Trial:
    """A program that is hit n_faults times; `row` is its row in faults.csv.

    hit(trial, folder, log) starts the program and hits it. It returns None where the program is to be started
    again, "" where it has ended by itself, else what is wrong.
    """

    def __init__(self, name, program, work, n_faults, hit):
        counts = ("faults", "survived", "runs", "restarts", "before_first_save", "in_a_save", "command_line")
        if save_in_thread:
            name += ", saving in a thread"
        self.row = {"trial": name, "seed": seed, **dict.fromkeys(counts, 0)}
        self.row.update(seconds_undisturbed=0.0, seconds=0.0, failures=0)
        self.program, self.work, self.n_faults, self.hit = program, work, n_faults, hit
        self.rng = random.Random(f"{seed} {name}")

    def more(self):
        return self.row["faults"] < self.n_faults

    def moment(self, on_command_line=False):
        """Seconds from a start to the next fault."""
        return self.rng.uniform(0, undisturbed(self.program, self.work, on_command_line)[1])

    def fault(self, folder, on_command_line=False):
        """Counts a fault by what it left on disk."""
        row = self.row
        row["faults"] += 1
        row["command_line"] += on_command_line
        row["before_first_save"] += not any(folder.glob(self.program.first_save))
        row["in_a_save"] += is_saving(folder)
        now = time.monotonic()
        if now - self.spoke > 10:
            self.spoke = now
            left = time_left((now - self.began) / row["faults"] * (self.n_faults - row["faults"]))
            print(f"  {row['trial']}: {row['faults']} of {self.n_faults}, {left} left", flush=True)

    def run(self):
        """Runs the program until it was hit often enough. Returns the row."""
        row = self.row
        self.began = self.spoke = time.monotonic()
        is_torchrun = self.hit is hit_torchrun
        expected, seconds = undisturbed(self.program, self.work, is_torchrun)
        row["seconds_undisturbed"] = round(seconds, 2)
        if self.n_faults >= 10 and not is_torchrun:
            again, _ = undisturbed(self.program, self.work, True)
            self.judge(", ".join(differences(expected, again)), 0)
            row["runs"] = 0
        while self.more():
            before = row["faults"]
            with empty_folder(self.work / "troubled", tmpfs=self.hit is fill) as folder:
                log = self.work / f"{self.program.name}.log"
                log.unlink(missing_ok=True)
                wrong = None
                while wrong is None:
                    wrong = self.hit(self, folder, log)
                    row["restarts"] += wrong is None
                wrong = wrong or ", ".join(differences(expected, self.program.files(folder)))
            self.judge(wrong, row["faults"] - before)
        row["seconds"] = round(time.monotonic() - self.began, 1)
        print(", ".join(f"{name} {x}" for name, x in row.items()), flush=True)
        return row

    def judge(self, wrong, n_faults):
        """A run has ended after so many faults. wrong: what is amiss, or ""."""
        self.row["runs"] += 1
        self.row["failures"] += bool(wrong)
        if wrong:
            print(f"  {self.row['trial']} FAILED: {wrong}", flush=True)
        else:
            self.row["survived"] += n_faults


@functools.cache
def undisturbed(program, work, on_command_line):
    """(files, seconds) of an undisturbed run, in work/NAME, where the trainers find their data."""
    folder = work / (f"{program.name}_command_line" if on_command_line else program.name)
    log = work / f"{program.name}.log"
    began = time.monotonic()
    status = wait(start(program.args(folder), log, on_command_line), math.inf)
    if status:
        raise SystemExit(f"{program.name} ends with {status} undisturbed: {log.read_text()[-2000:]}")
    return program.files(folder), time.monotonic() - began


@contextlib.contextmanager
def empty_folder(parent, tmpfs):
    """An empty folder in `parent`; tmpfs: on a small disk of its own."""
    shutil.rmtree(parent, ignore_errors=True)
    parent.mkdir()
    if tmpfs:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "nanorank", parent], check=True)
    try:
        (parent / "out").mkdir()
        yield parent / "out"
    finally:
        if tmpfs:
            subprocess.run(["umount", parent], check=True)


# ------------------------------------------------------- one start, at most one fault

def strike(trial, folder, log, signals=(signal.SIGKILL,), in_saves=False):
    """A signal at a random moment, or in the save that comes next."""
    rng = trial.rng
    is_sweep = trial.program.name == "sweep"
    on_command_line = trial.n_faults >= 10 and rng.random() < 0.1
    alone = rng.random() < 0.5
    signum = rng.choice(signals)
    moment = trial.moment(on_command_line)
    last = not trial.more()

    pid = start(trial.program.args(folder), log, on_command_line)
    status = wait(pid, 600 if last else moment)
    if status is None and in_saves and not last:
        status = wait(pid, 60, until=lambda: is_saving(folder))
    if status is None:
        everyone = family(pid)
        kill(everyone if signum == signal.SIGKILL and not alone else [pid], signum)
        status = wait(pid, 60)
        if last:
            kill(everyone)
            return "did not end by itself in 600 s"
        trial.fault(folder, on_command_line)
        # the trainers of a killed sweep go on; the next sweep finds them at work
        orphans = [] if is_sweep else still_alive(everyone[1:])
        if status is None or orphans:
            kill(everyone)
            whom = f"its workers {orphans}" if orphans else "it"
            return f"signal {signum} at {moment:.2f} s did not end {whom}"
        if signum == signal.SIGKILL or status in (128 + signum, -signum):  # saved, or not yet begun
            return None
    if is_sweep and status == 1 and "trainer is at work" in log.read_text()[-2000:]:
        time.sleep(0.5)
        return None
    return f"ended with {status}: {log.read_text()[-1000:]}" if status else ""


def fill(trial, folder, log):
    """The disk fills up at a random moment, and has room again before the next start."""
    log.unlink(missing_ok=True)
    pid = start(trial.program.args(folder), log)
    status = wait(pid, trial.moment() if trial.more() else 600)
    if status is None:
        filler = folder.parent / "filler"
        fill_disk(filler, keep=trial.rng.choice((0, trial.rng.randrange(1 << 18))))
        status = wait(pid, 60)
        filler.unlink()
        if status != 0:
            trial.fault(folder)
    if status == 0:
        return ""
    if not named_the_disk(status, log.read_text(), folder.parent):
        if status is None:
            kill(family(pid))
        return f"ended with {status}: {log.read_text()[-1500:]}"
    for path in folder.glob("*.pt"):
        torch.load(path, weights_only=True)  # raises where it is not whole
    return None


def named_the_disk(status, output, disk):
    """Whether a program has ended with one line that names the full disk, and without a traceback."""
    lines = re.split(r"[\r\n]", output)
    said = [line for line in lines if "No space left" in line or "GB are needed" in line]
    if len(said) != 1 or str(disk) not in said[0] or "Traceback" in output or "Exception" in output:
        return False
    if "GB are needed" in said[0]:  # prepare_imagenet looks before it begins
        return status == 2
    return status == 1 and "mended" in said[0]


def hit_torchrun(trial, folder, log):
    """Up to three times one of two processes is killed and torchrun restarts both, or torchrun is stopped."""
    pid = start(trial.program.args(folder), log, on_command_line=True)
    for n_hits in range(4):  # three restarts, then the end
        status = wait(pid, trial.moment(True) if trial.more() and n_hits < 3 else 120)
        if status is not None:
            said = re.findall("^train_lm.*|.*(?:Error|Sending|failed|signal).*", log.read_text(), re.M)
            return f"ended with {status}:\n" + "\n".join(said) if status else ""
        workers = family(pid)[1:]
        if not workers:  # torchrun is just beginning
            continue
        how = trial.rng.choices(("kill", "Ctrl-C", "SIGTERM"), (0.6, 0.2, 0.2))[0]
        if how == "kill":
            kill([trial.rng.choice(workers)])
        elif how == "Ctrl-C":
            os.killpg(pid, signal.SIGINT)  # torchrun passes it on, so its workers get it twice
        else:
            kill([pid], signal.SIGTERM)
        trial.fault(folder, True)
        if how == "kill":
            trial.row["restarts"] += 1
        elif wait(pid, 60) is not None:
            return None
        else:
            break
    kill(family(pid))
    wait(pid, 60)
    return "did not end by itself"


# ------------------------------------------------------------------------- main

def trials_of(name, known, work):
    fewer = math.ceil(kills / 5)
    hits = {
        "saves": functools.partial(strike, in_saves=True),
        "signals": functools.partial(strike, signals=(signal.SIGTERM, signal.SIGINT)),
        "disk": fill,
    }
    if name in hits:
        return [Trial(f"{name}: {each}", known[each], work, fewer, hits[name]) for each in KILLED]
    if name == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
        command = (*launcher, *known["train_lm"].command, "--max_iters=300")
        program = known["train_lm"]._replace(name="torchrun", command=command)
        return [Trial("torchrun", program, work, fewer, hit_torchrun)]
    return [Trial(name, known[name], work, kills, strike)]


def main(names):
    for name in names:
        if name not in (*TRIALS, "all"):
            raise UserError(f"{name!r} is no trial: {', '.join(TRIALS)}, all")
    if not names or "all" in names:
        names = TRIALS
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults") as work:
        work = pathlib.Path(work)
        known = programs(work, save_in_thread)
        for name in ("prepare_pile", "prepare_imagenet"):  # the trainers read their data
            undisturbed(known[name], work, False)
        for name in names:
            rows += [trial.run() for trial in trials_of(name, known, work)]
            write_table(pathlib.Path(out_dir) / "faults.csv", rows, ["trial", "seed"])
    total = {name: sum(row[name] for row in rows) for name in ("survived", "faults", "failures")}
    print("{survived} of {faults} faults survived, {failures} failures".format(**total))
    if total["failures"]:
        raise SystemExit(1)


if __name__ == "__main__":
    chosen = configure(globals(), "[TRIAL ...]")
    with user_errors(__file__):
        main(chosen)
