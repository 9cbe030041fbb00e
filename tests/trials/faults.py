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

A fault comes at a moment drawn uniformly over the time of an undisturbed run, counted from the last start: it
hits imports, loading, training, saving and the end. The same command starts the program again until it ends
by itself. Half of the kills hit the process and all that it has started, half the process alone: its workers
must end too. Programs are forks of this process, which has imported torch, and die as any process does. Where
ten faults or more are asked for, every tenth is `python SCRIPT` itself.

Compared to the byte: token and pixel files, records, meta.json, tables, every tensor and number of ckpt.pt
and step_*.pt, log.jsonl and result.json; not times, speeds and places. Writes OUT_DIR/faults.csv, a row for
each trial and seed. Exit 1 where anything failed.
"""
import csv
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
from programs import differences, programs

import model  # noqa: F401
from configurator import configure
from nanorank import images, run  # noqa: F401
from nanorank.console import time_left
from nanorank.errors import UserError, user_errors
from nanorank.files import write_atomic

# -----------------------------------------------------------------------------
kills = 100                     # kills of each program; a fifth of it in saves, signals, torchrun and disk
seed = 0                        # of the moments
out_dir = "results/trust"       # where faults.csv goes
# -----------------------------------------------------------------------------

KILLED = ("train_lm", "train_vit", "prepare_pile", "prepare_imagenet")
TRIALS = (*KILLED, "sweep", "saves", "signals", "torchrun", "disk")


class Tally:
    """The row of a trial in faults.csv, and its progress on the terminal."""

    def __init__(self, trial, n_faults):
        counts = ("faults", "survived", "runs", "restarts", "before_first_save", "in_a_save", "command_line")
        self.row = {"trial": trial, "seed": seed, **dict.fromkeys(counts, 0)}
        self.row.update(seconds_undisturbed=0.0, seconds=0.0, failures=0)
        self.n_faults = n_faults
        self.began = self.spoke = time.monotonic()
        self.n_in_this_run = 0

    def more(self):
        return self.row["faults"] < self.n_faults

    def fault(self, program, folder, on_command_line):
        """Counts a fault by what it left on disk."""
        self.row["faults"] += 1
        self.n_in_this_run += 1
        self.row["command_line"] += on_command_line
        self.row["before_first_save"] += not any(folder.glob(program.first_save))
        self.row["in_a_save"] += is_saving(folder)
        now = time.monotonic()
        if now - self.spoke > 10:
            self.spoke = now
            done = self.row["faults"]
            left = time_left((now - self.began) / done * (self.n_faults - done))
            print(f"  {self.row['trial']}: {done} of {self.n_faults}, {self.row['failures']} failures, "
                  f"{left} left", flush=True)

    def end_run(self, wrong):
        """The program has ended by itself. wrong: what is amiss; empty: all its faults are survived."""
        self.row["runs"] += 1
        if wrong:
            self.row["failures"] += 1
            print(f"  {self.row['trial']} FAILED: {wrong}", flush=True)
        else:
            self.row["survived"] += self.n_in_this_run
        self.n_in_this_run = 0

    def done(self):
        self.row["seconds"] = round(time.monotonic() - self.began, 1)
        said = ("{trial}, seed {seed}: {survived} of {faults} survived in {runs} runs with {restarts} "
                "restarts; {before_first_save} before the first save, {in_a_save} in one; {command_line} on "
                "the command line; {seconds_undisturbed} s undisturbed, {seconds} s in all")
        print(said.format(**self.row), flush=True)
        return self.row


@functools.cache
def undisturbed(program, work, on_command_line=False):
    """(files, seconds) of an undisturbed run, in work/NAME, where the trainers find their data."""
    folder = work / (f"{program.name}_command_line" if on_command_line else program.name)
    log = work / f"{program.name}.log"
    began = time.monotonic()
    status = wait(start(program.args(folder), log, on_command_line), math.inf)
    if status:
        raise SystemExit(f"{program.name} ends with {status} undisturbed: {log.read_text()[-2000:]}")
    return program.files(folder), time.monotonic() - began


def empty_folder(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# ------------------------------------------------------------- kills and signals

def trouble(program, work, n_faults, signals=(signal.SIGKILL,), trial="", in_saves=False):
    """Hits a program n_faults times, at random moments or in the save that comes next. Returns the row."""
    tally = Tally(trial or program.name, n_faults)
    rng = random.Random(f"{seed} {trial} {program.name}")
    expected, seconds = undisturbed(program, work)
    seconds_of = {False: seconds}  # on the command line or not
    if n_faults >= 10:
        again, seconds_of[True] = undisturbed(program, work, on_command_line=True)
        differ = differences(expected, again)
        if differ:
            tally.end_run(f"two undisturbed runs differ in {differ}")
    tally.row["seconds_undisturbed"] = round(seconds, 2)
    while tally.more():
        folder = empty_folder(work / "troubled")
        log = work / f"{program.name}.log"
        log.unlink(missing_ok=True)
        wrong = drive(program, folder, log, tally, rng, seconds_of, signals, in_saves)
        tally.end_run(wrong or ", ".join(differences(expected, program.files(folder))))
    return tally.done()


def drive(program, folder, log, tally, rng, seconds_of, signals, in_saves):
    """Starts a program again after each fault until it ends by itself. Returns what is wrong, or ""."""
    is_sweep = program.name == "sweep"
    n_starts = 0
    while True:
        tally.row["restarts"] += n_starts > 0
        n_starts += 1
        on_command_line = True in seconds_of and rng.random() < 0.1
        alone = rng.random() < 0.5
        signum = rng.choice(signals)
        moment = rng.uniform(0, seconds_of[on_command_line])
        last = not tally.more()

        pid = start(program.args(folder), log, on_command_line)
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
            tally.fault(program, folder, on_command_line)
            # the trainers of a killed sweep go on; the next sweep finds them at work
            orphans = [] if is_sweep else still_alive(everyone[1:])
            if status is None or orphans:
                kill(everyone)
                whom = f"its workers {orphans}" if orphans else "it"
                return f"signal {signum} at {moment:.2f} s did not end {whom}"
            stopped = status in (128 + signum, -signum)  # saved, or not yet begun
            if signum == signal.SIGKILL or stopped:
                continue
        elif is_sweep and status == 1 and "trainer is at work" in log.read_text()[-2000:]:
            time.sleep(0.5)
            continue
        return f"ended with {status}: {log.read_text()[-1000:]}" if status else ""


# -------------------------------------------------------------------- full disk

def disk_full(program, work, n_faults):
    """A disk fills up at a random moment of a run, and has room again before the next start."""
    tally = Tally(f"disk: {program.name}", n_faults)
    rng = random.Random(f"{seed} disk {program.name}")
    expected, seconds = undisturbed(program, work)
    tally.row["seconds_undisturbed"] = round(seconds, 2)
    disk = work / "disk"
    disk.mkdir(exist_ok=True)
    while tally.more():
        tmpfs = ["-t", "tmpfs", "-o", "size=64m", "nanorank"]
        subprocess.run(["mount", *tmpfs, str(disk)], check=True)
        try:
            wrong = drive_on_full_disk(program, work, tally, rng, seconds)
            tally.end_run(wrong or ", ".join(differences(expected, program.files(disk / "out"))))
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return tally.done()


def drive_on_full_disk(program, work, tally, rng, seconds):
    """Starts a program again after each full disk until it ends by itself. Returns what is wrong, or ""."""
    log, folder, filler = work / f"{program.name}.log", work / "disk" / "out", work / "disk" / "filler"
    folder.mkdir()
    n_starts = 0
    while True:
        tally.row["restarts"] += n_starts > 0
        n_starts += 1
        log.unlink(missing_ok=True)
        pid = start(program.args(folder), log)
        status = wait(pid, rng.uniform(0, seconds) if tally.more() else 600)
        if status is None:
            fill_disk(filler, keep=rng.choice((0, rng.randrange(1 << 18))))
            status = wait(pid, 60)
            filler.unlink()
            if status != 0:
                tally.fault(program, folder, False)
        if status == 0:
            return ""
        if not named_the_disk(status, log.read_text(), folder.parent):
            if status is None:
                kill(family(pid))
            return f"ended with {status}: {log.read_text()[-1500:]}"
        for path in folder.glob("*.pt"):
            torch.load(path, weights_only=True)  # raises where it is not whole


def named_the_disk(status, output, disk):
    """Whether a program has ended with one line that names the full disk, and without a traceback."""
    lines = re.split(r"[\r\n]", output)
    said = [line for line in lines if "No space left" in line or "GB are needed" in line]
    if len(said) != 1 or str(disk) not in said[0] or "Traceback" in output or "Exception" in output:
        return False
    if "GB are needed" in said[0]:  # prepare_imagenet looks before it begins
        return status == 2
    return status == 1 and "mended" in said[0]


# --------------------------------------------------------------------- torchrun

def torchrun(program, work, n_faults):
    """Two processes: one is killed and torchrun restarts both, or all are stopped and started again."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    command = (*launcher, *program.command, "--max_iters=300")
    program = program._replace(name="torchrun", command=command)
    tally = Tally("torchrun", n_faults)
    rng = random.Random(f"{seed} torchrun")
    expected, seconds = undisturbed(program, work, on_command_line=True)
    tally.row["seconds_undisturbed"] = round(seconds, 2)
    while tally.more():
        folder = empty_folder(work / "troubled")
        log = work / "torchrun.log"
        log.unlink(missing_ok=True)
        status, n_starts = "stopped", 0
        while status == "stopped":
            tally.row["restarts"] += n_starts > 0
            n_starts += 1
            status = drive_torchrun(program, folder, log, tally, rng, seconds)
        if status == 0:
            tally.end_run(", ".join(differences(expected, program.files(folder))))
        else:
            said = [line for line in log.read_text().splitlines()
                    if re.search("^train_lm|Error|Sending|failed|signal", line)]
            tally.end_run(f"ended with {status}:\n" + "\n".join(said))
    return tally.done()


def drive_torchrun(program, folder, log, tally, rng, seconds):
    """Starts torchrun and kills up to three workers. Returns its exit status, None where it had to be killed,
    "stopped" where it was sent a SIGTERM or a Ctrl-C and ended."""
    pid = start(program.args(folder), log, on_command_line=True)
    for hit in range(4):  # three restarts, then the end
        status = wait(pid, rng.uniform(1, seconds) if tally.more() and hit < 3 else 120)
        if status is not None:
            return status
        workers = family(pid)[1:]
        if not workers:  # torchrun is just beginning
            continue
        stop = rng.random() < 0.4
        if not stop:
            kill([rng.choice(workers)])
        elif rng.random() < 0.5:
            os.killpg(pid, signal.SIGINT)  # Ctrl-C; torchrun passes it on, so its workers get it twice
        else:
            kill([pid], signal.SIGTERM)
        tally.fault(program, folder, True)
        if stop:
            if wait(pid, 60) is not None:
                return "stopped"
            break
        tally.row["restarts"] += 1
    kill(family(pid))
    wait(pid, 60)
    return None


# ------------------------------------------------------------------------- main

def run_trial(trial, known, work):
    """The rows of a trial."""
    fewer = math.ceil(kills / 5)
    if trial == "torchrun":
        return [torchrun(known["train_lm"], work, fewer)]
    if trial == "disk":
        return [disk_full(known[name], work, fewer) for name in KILLED]
    if trial == "saves":
        return [trouble(known[name], work, fewer, trial=f"saves: {name}", in_saves=True) for name in KILLED]
    if trial == "signals":
        signals = (signal.SIGTERM, signal.SIGINT)
        return [trouble(known[name], work, fewer, signals, f"signals: {name}") for name in KILLED]
    return [trouble(known[trial], work, kills)]


def write(rows):
    """faults.csv with these rows in place of older ones of the same trial and seed."""
    path = pathlib.Path(out_dir) / "faults.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {}
    if path.exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                table[row["trial"], row["seed"]] = row
    for row in rows:
        table[row["trial"], str(row["seed"])] = row
    lines = [",".join(rows[0])]
    for row in table.values():
        lines.append(",".join(str(x) for x in row.values()))
    write_atomic(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))


def main(trials):
    for trial in trials:
        if trial not in (*TRIALS, "all"):
            raise UserError(f"{trial!r} is no trial: {', '.join(TRIALS)}, all")
    if not trials or "all" in trials:
        trials = TRIALS
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults") as work:
        work = pathlib.Path(work)
        known = programs(work)
        for name in ("prepare_pile", "prepare_imagenet"):  # the trainers read their data
            undisturbed(known[name], work)
        for trial in trials:
            rows += run_trial(trial, known, work)
            write(rows)
    n_survived = sum(row["survived"] for row in rows)
    n_faults = sum(row["faults"] for row in rows)
    n_failures = sum(row["failures"] for row in rows)
    print(f"{n_survived} of {n_faults} faults survived, {n_failures} failures")
    if n_failures:
        raise SystemExit(1)


if __name__ == "__main__":
    chosen = configure(globals(), "[TRIAL ...]")
    with user_errors(__file__):
        main(chosen)
