"""
Fault trials: programs killed, stopped, on a full disk, at random moments, then driven to the end. What comes out must be an undisturbed run's.

    python tests/trials/faults.py                                   # all trials
    python tests/trials/faults.py train_lm --kills=100 --seed=0     # one: kills of train_lm.py; some five minutes on a core
    unshare -rm python tests/trials/faults.py disk                  # as root without unshare: a small tmpfs is mounted

Trials: train_lm, train_vit, prepare_pile, prepare_imagenet, sweep (SIGKILL); all but sweep: saves (SIGKILL as soon as a file is being
replaced), signals (SIGTERM and SIGINT), disk (it fills up); torchrun (two processes, one of them killed, --max-restarts; and SIGTERM or Ctrl-C).

A kill comes at a moment drawn uniformly over the time that an undisturbed run takes, counted from the last start: so in imports of
scripts, loading, training, saving and at the end. The run is started again by the same command until it ends by itself, then its files are
compared and the next begins. Processes are forked from this one, which has torch imported, and run the script as __main__ (a real death,
without seconds of imports); where ten faults or more are asked for every tenth is the command line itself. Half of the kills hit the
process and all that it started, half the process alone: its workers must go too.

Compared to the byte: token and pixel files, records, meta.json, tables; every tensor and number of ckpt.pt and step_*.pt; log.jsonl, result.json.
Left out: seconds, tokens_per_s, images_per_s, mfu (time), out_dir (the place), log_bytes (the length of lines with times in them), output.log.
Writes results/trust/faults.csv, a row for each trial and seed; exit 1 where anything failed.
"""
import csv
import functools
import itertools
import json
import math
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

REPO = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", MPLBACKEND="Agg")  # before torch: sums in the same order

import numpy as np
import torch
import torch._dynamo  # noqa: F401  torch.optim loads it: a second of every start
from PIL import Image

import model  # noqa: F401
from configurator import configure
from nanorank import images, spectra, text_files  # noqa: F401
from nanorank.console import time_left
from nanorank.errors import user_errors
from nanorank.files import write_atomic

# --------------------------------------------------------------------------------------------------------------- settings
kills = 100                     # kills of each program; a fifth of it in the trials saves, signals, torchrun and disk
seed = 0                        # of the moments
out_dir = "results/trust"       # where faults.csv goes
# ------------------------------------------------------------------------------------------------------------------------

KILLED = ("train_lm", "train_vit", "prepare_pile", "prepare_imagenet")
TRIALS = (*KILLED, "sweep", "saves", "signals", "torchrun", "disk")
TIMES = ("seconds", "tokens_per_s", "images_per_s", "mfu", "log_bytes", "out_dir")
STEPS = {"max_iters": 60, "warmup_iters": 5, "eval_interval": 10, "log_interval": 5, "rank_interval": 10, "snapshot_steps": "every:20",
         "eval_iters": 2, "n_layer": 2, "n_head": 2, "n_embd": 32, "batch_size": 4, "total_batch_size": 8, "device": "cpu", "dropout": 0.1}


class Program(NamedTuple):
    """A script to trouble: args(folder) is its command line behind `python`, files(folder) what must come out, {name: bytes or text}; `saved`
    is a pattern of the files that its first save leaves."""
    name: str
    args: Callable
    files: Callable
    saved: str

# ------------------------------------------------------------------------------------------------------- programs and files

def programs(work):
    """{name: Program}, and their inputs, made in the folder `work`: some text, some pictures."""
    text, rng = work / "text", np.random.default_rng(0)
    text.mkdir()
    source = (REPO / "prepare_pile.py").read_text() + (REPO / "sweep.py").read_text()
    for i in range(200):
        lines = [json.dumps({"text": source[at:at + 600]}) for at in rng.integers(0, len(source) - 600, 60)]
        (text / f"{i:03d}.jsonl").write_text("\n".join(lines) + "\n")
    for i in range(3000):
        (work / "pictures" / f"c{i % 5}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 30 + i % 20, 3), dtype=np.uint8)).save(work / "pictures" / f"c{i % 5}" / f"{i}.png")
    # the interval between safe points is short beside the whole
    pile = {"source": text, "tokenizer": "byte", "shard_tokens": 1_000_000, "safe_interval": 0.02, "workers": 2, "val_fraction": 0.003,
            "test_fraction": 0.003, "dataset": "made"}
    imagenet = {"source": work / "pictures", "short_side": 24, "val_fraction": 0.02, "test_fraction": 0.03, "safe_interval": 0.02,
                "workers": 2, "dataset": "made"}
    lm = {**STEPS, "dataset": "made", "data_dir": work / "prepare_pile", "block_size": 32}
    vit = {**STEPS, "dataset": "made", "data_dir": work / "prepare_imagenet", "image_size": 16, "patch_size": 4}
    sweep = {"fixed": " ".join(flags({**lm, "max_iters": 10})), "configs": "config/demo.py", "grid": "attn_wd=0,1", "jobs": 2, "figure": False}
    made = {
        "prepare_pile": Program("prepare_pile", lambda at: ["prepare_pile.py", *flags({**pile, "data_dir": at})], all_files, "made/part_*.json"),
        "prepare_imagenet": Program("prepare_imagenet", lambda at: ["prepare_imagenet.py", *flags({**imagenet, "data_dir": at})], all_files,
                                    "made/part.json"),
        "train_lm": Program("train_lm", lambda at: ["train_lm.py", *flags({**lm, "init_from": "auto", "out_dir": at})], run_files, "ckpt.pt"),
        "train_vit": Program("train_vit", lambda at: ["train_vit.py", *flags({**vit, "init_from": "auto", "out_dir": at})], run_files, "ckpt.pt"),
        "sweep": Program("sweep", lambda at: ["sweep.py", *flags({**sweep, "out_dir": at})], sweep_files, "*/ckpt.pt")}
    for name in ("prepare_pile", "prepare_imagenet"):  # undisturbed: what the trainers read
        whole(made[name], work)
    return made


def flags(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def all_files(folder):
    """Every file to the byte, but for lock files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"
            and path.name != ".lock"}


def run_files(folder):
    """What a trainer leaves, without times and places; names of files alone where they are the source."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".pt":
            found[path.name] = plain(torch.load(path, weights_only=True))
        elif path.name == "result.json":
            found[path.name] = plain(json.loads(path.read_text()))
        elif path.name == "log.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            # a signal has the steps since the last line reported: one line more
            found[path.name] = plain([line for line in lines if "train_loss" not in line or (line["step"] + 1) % STEPS["log_interval"] == 0])
        else:
            found[path.name] = sorted(os.listdir(path)) if path.is_dir() else ""
    return found


def plain(x):
    """A checkpoint or JSON as what compares to the bit: tensors as dtype, shape and bytes, TIMES left out."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape), x.contiguous().view(torch.uint8).numpy().tobytes() if x.dim() else repr(x.item())
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items() if name not in TIMES}
    return [plain(value) for value in x] if isinstance(x, (list, tuple)) else repr(x)


def sweep_files(folder):
    """Tables, without the seconds, and every run."""
    found = {f"{cell.name}/{name}": data for cell in folder.iterdir() if cell.is_dir() for name, data in run_files(cell).items()}
    with open(folder / "sweep.csv", newline="") as file:
        found["sweep.csv"] = [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]
    found.update({name: (folder / name).read_text() for name in ("curves.csv", "table.md")})
    return found


def differences(want, got, where=""):
    """Where two runs' files (dicts of dicts, lists, bytes ...) are not the same, one more or one less included: a list of paths into them."""
    if isinstance(want, dict) and isinstance(got, dict):
        return [path for name in {**want, **got} for path in differences(want.get(name), got.get(name), f"{where}/{name}")]
    if isinstance(want, list) and isinstance(got, list) and len(want) == len(got):
        return [path for i, pair in enumerate(zip(want, got)) for path in differences(*pair, f"{where}/{i}")]
    return [] if want == got else [f"{where}: {str(want)[:60]} is {str(got)[:60]}"]

# ------------------------------------------------------------------------------------------------------ processes and deaths

def start(args, log, real=False):
    """Starts `python ARGS` in the repository, in a session of its own, output to the file `log`; returns its pid. real: an interpreter of its own;
    else a fork of this process that runs the script as __main__."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        os.chdir(REPO)
        to, null = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
        for number, file in enumerate((null, to, to)):
            os.dup2(file, number)
        if real:
            os.execv(sys.executable, [sys.executable, *args])
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except KeyboardInterrupt:  # before the script looks after it
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def wait(pid, seconds, until=None):
    """The exit status of a child as subprocess has it, None where it lives on after so many seconds or when until() is true."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline or until and until():
            return None
        time.sleep(min(0.0002 if until else 0.002, max(0.0, deadline - time.monotonic())))


def family(pid):
    """pids of a process and of all that came of it, itself first."""
    children = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pids, number=signal.SIGKILL):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def gone(pids, seconds=20):
    """Those of these processes that still live after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def in_a_save(folder):
    """Whether a file is just being written that is to replace another (files.write_atomic)."""
    return any(re.search(r"\.tmp\d+$", name) for _, _, names in os.walk(folder) for name in names)


@functools.cache
def whole(program, work, real=False):
    """(files of an undisturbed run, seconds that it took), a forked one or the command line; in work/NAME, where the trainers find their data."""
    folder, log = work / (program.name + "_real" * real), work / f"{program.name}.log"
    began = time.monotonic()
    if status := wait(start(program.args(folder), log, real), math.inf):
        raise SystemExit(f"{program.name} ends with {status} undisturbed: {log.read_text()[-2000:]}")
    return program.files(folder), time.monotonic() - began

# ------------------------------------------------------------------------------------------------------------------- trials

class Tally:
    """The row of a trial, and its progress on the terminal."""

    def __init__(self, trial, faults):
        self.row = {"trial": trial, "seed": seed, "faults": 0, "survived": 0, "runs": 0, "restarts": 0, "before_first_save": 0, "in_a_save": 0,
                    "command_line": 0, "seconds_undisturbed": 0.0, "seconds": 0.0, "failures": 0}
        self.faults, self.began, self.spoke, self.open = faults, time.monotonic(), time.monotonic(), 0

    def more(self):
        return self.row["faults"] < self.faults

    def fault(self, program, folder, real):
        """Counts a fault that hit, by what it left on disk."""
        self.row["faults"] += 1
        self.open += 1
        self.row["command_line"] += real
        self.row["before_first_save"] += not any(folder.glob(program.saved))
        self.row["in_a_save"] += in_a_save(folder)
        done, spent = self.row["faults"], time.monotonic() - self.began
        if time.monotonic() - self.spoke > 10:
            self.spoke = time.monotonic()
            print(f"  {self.row['trial']}: {done} of {self.faults}, {self.row['failures']} failures, "
                  f"{time_left(spent / done * (self.faults - done))} left", flush=True)

    def end(self, wrong):
        """A run came to its end: all faults in it are survived unless something is wrong."""
        self.row["runs"] += 1
        self.row["failures"] += bool(wrong)
        self.row["survived"] += 0 if wrong else self.open
        self.open = 0
        if wrong:
            print(f"  {self.row['trial']} FAILED: {wrong}", flush=True)

    def done(self):
        self.row["seconds"] = round(time.monotonic() - self.began, 1)
        print("{trial}, seed {seed}: {survived} of {faults} survived in {runs} runs with {restarts} restarts; {before_first_save} before the "
              "first save, {in_a_save} in one; {command_line} on the command line; {seconds_undisturbed} s undisturbed, {seconds} s in all"
              .format(**self.row), flush=True)
        return self.row


def trouble(program, work, faults, numbers=(signal.SIGKILL,), trial="", aimed=False):
    """Hits a program with signals at random moments, or (`aimed`) in the save that comes next, until there were so many; returns the row."""
    tally, rng = Tally(trial or program.name, faults), random.Random(f"{seed} {trial} {program.name}")
    (want, seconds), log = whole(program, work), work / f"{program.name}.log"
    again, seconds_real = whole(program, work, real=True) if faults >= 10 else (want, seconds)
    tally.row["seconds_undisturbed"] = round(seconds, 2)
    if wrong := differences(want, again):
        tally.end(f"two undisturbed runs differ in {wrong}")
    while tally.more():
        folder, wrong = work / "troubled", ""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        log.unlink(missing_ok=True)
        for attempt in itertools.count():
            tally.row["restarts"] += attempt > 0
            real, alone, number = rng.random() < 0.1 and faults >= 10, rng.random() < 0.5, rng.choice(numbers)
            moment = rng.uniform(0, seconds_real if real else seconds)
            pid = start(program.args(folder), log, real)
            status = wait(pid, moment if tally.more() else 600)
            if status is None and aimed:
                status = wait(pid, 60, lambda: in_a_save(folder))  # noqa: B023
            if status is None:
                everyone = family(pid)
                kill(everyone if number == signal.SIGKILL and not alone else [pid], number)
                status = wait(pid, 60)
                tally.fault(program, folder, real)
                orphans = everyone[1:] if program.name != "sweep" else []  # a sweep's trainers go on, and are found at work
                if status is None or (left := gone(orphans)):
                    wrong = f"signal {number} at {moment:.2f} s did not end {'it' if status is None else f'its workers {left}'}"
                    kill(everyone)
                elif number == signal.SIGKILL:
                    continue
                elif status in (128 + number, -number):  # saved, or not yet begun
                    continue
            busy = program.name == "sweep" and status == 1 and "another sweep's trainer is at work" in log.read_text()[-2000:]
            if busy:
                time.sleep(0.5)
                continue
            wrong = wrong or (f"ended with {status}: {log.read_text()[-1000:]}" if status else "")
            break
        wrong = wrong or ", ".join(differences(want, program.files(folder)))
        tally.end(wrong)
    return tally.done()


def disk_full(program, work, faults):
    """A disk that fills up at a random moment of a run, and has room again before the next start."""
    tally, rng = Tally(f"disk: {program.name}", faults), random.Random(f"{seed} disk {program.name}")
    (want, seconds), log, disk = whole(program, work), work / f"{program.name}.log", work / "disk"
    tally.row["seconds_undisturbed"] = round(seconds, 2)
    while tally.more():
        disk.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "nanorank", str(disk)], check=True)
        try:
            folder, filler, wrong, status = disk / "out", disk / "filler", "", 1
            folder.mkdir()
            for attempt in itertools.count():
                tally.row["restarts"] += attempt > 0
                log.unlink(missing_ok=True)
                pid = start(program.args(folder), log)
                status = wait(pid, rng.uniform(0, seconds) if tally.more() else 600)
                if status is None:
                    fill(filler, keep=rng.choice((0, rng.randrange(1 << 18))))
                    status = wait(pid, 60)
                    filler.unlink()
                    if status != 0:
                        tally.fault(program, folder, False)
                if status == 0:
                    break
                said = [line for line in re.split(r"[\r\n]", log.read_text()) if "No space left" in line or "GB are needed" in line]
                ahead = status == 2 and "GB are needed" in "".join(said)  # prepare_imagenet looks before it begins
                fine = len(said) == 1 and str(disk) in said[0] and (ahead or status == 1 and "mended" in said[0])
                if not fine or "Traceback" in log.read_text() or "Exception" in log.read_text():
                    wrong = f"ended with {status}: {log.read_text()[-1500:]}"
                    kill(family(pid) if status is None else [])
                    break
                for path in folder.glob("*.pt"):
                    torch.load(path, weights_only=True)  # whole
            tally.end(wrong or ", ".join(differences(want, program.files(folder))))
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return tally.done()


def fill(path, keep):
    """Fills the disk that `path` is on but for so many bytes."""
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            file.truncate(max(0, file.tell() - keep))


def torchrun_killed(program, work, faults):
    """Two processes under torchrun; one of them is killed and torchrun starts both again, or all get a Ctrl-C or torchrun SIGTERM, and it is
    started again."""
    tally, rng = Tally("torchrun", faults), random.Random(f"{seed} torchrun")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    program = program._replace(name="torchrun", args=lambda at, args=program.args: [*launcher, *args(at), "--max_iters=300"])
    (want, seconds), log = whole(program, work, real=True), work / "torchrun.log"
    tally.row["seconds_undisturbed"] = round(seconds, 2)
    while tally.more():
        folder = work / "troubled"
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink(missing_ok=True)
        folder.mkdir()
        for attempt in itertools.count():
            tally.row["restarts"] += attempt > 0
            pid, status, stopped = start(program.args(folder), log, real=True), None, False
            for hit in range(4):  # three restarts, then the end
                status = wait(pid, rng.uniform(1, seconds) if tally.more() and hit < 3 else 120)
                if status is not None:
                    break
                if not (workers := family(pid)[1:]):  # torchrun itself is just beginning
                    continue
                stopped = rng.random() < 0.4
                if stopped and rng.random() < 0.5:
                    os.killpg(pid, signal.SIGINT)  # a terminal's Ctrl-C: torchrun hands it on to those that have it already
                else:
                    kill([pid] if stopped else [rng.choice(workers)], signal.SIGTERM if stopped else signal.SIGKILL)
                tally.fault(program, folder, True)
                tally.row["restarts"] += not stopped
                if stopped:
                    status = wait(pid, 60)
                    break
            if status is None:
                kill(family(pid))
                wait(pid, 60)
            if not stopped or status is None:
                break
        said = [line for line in log.read_text().splitlines() if re.search(r"^train_lm|Error|Sending|failed|signal", line)]
        wrong = f"ended with {status}:\n" + "\n".join(said) if status != 0 else ", ".join(differences(want, program.files(folder)))
        tally.end(wrong)
    return tally.done()


def main(trials):
    with user_errors("faults.py"):
        if unknown := [trial for trial in trials if trial not in (*TRIALS, "all")]:
            raise ValueError(f"{unknown[0]!r} is no trial: {', '.join(TRIALS)}, all")
    trials, rows = TRIALS if not trials or "all" in trials else trials, []
    fewer = math.ceil(kills / 5)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="faults") as work:
        work = pathlib.Path(work)
        known = programs(work)
        for trial in trials:
            if trial == "saves":
                rows += [trouble(known[name], work, fewer, trial=f"saves: {name}", aimed=True) for name in KILLED]
            elif trial == "signals":
                rows += [trouble(known[name], work, fewer, (signal.SIGTERM, signal.SIGINT), f"signals: {name}") for name in KILLED]
            elif trial == "disk":
                rows += [disk_full(known[name], work, fewer) for name in KILLED]
            elif trial == "torchrun":
                rows.append(torchrun_killed(known["train_lm"], work, fewer))
            else:
                rows.append(trouble(known[trial], work, kills))
            write(rows)
    lost = sum(row["failures"] for row in rows)
    print(f"{sum(row['survived'] for row in rows)} of {sum(row['faults'] for row in rows)} faults survived, {lost} failures")
    raise SystemExit(1 if lost else 0)


def write(rows):
    """faults.csv with these rows in place of older ones of the same trial and seed."""
    path = pathlib.Path(out_dir) / "faults.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {}
    if path.exists():
        with open(path, newline="") as file:
            table = {(row["trial"], row["seed"]): row for row in csv.DictReader(file)}
    table.update({(row["trial"], str(row["seed"])): row for row in rows})
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in table.values())]
    write_atomic(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))


if __name__ == "__main__":
    main(configure(globals(), "[TRIAL ...]"))
