"""
Runs a trainer over a grid of settings, a folder a run, and tabulates what came out.

    python -m scripts.sweep config/sweep/wd_grid.py --jobs=2         # run what is not finished, tabulate
    python -m scripts.sweep config/sweep/wd_grid.py --gpus=0,1,2,3   # one run a GPU, --nproc=4: four a run
    python -m scripts.sweep --configs=config/demo.py --grid="attn_wd=0,1,4; seed=1,2"
    python -m scripts.sweep config/sweep/wd_grid.py --collect_only   # tables of what is there by now
    python -m scripts.sweep config/sweep/wd_grid.py --dry_run | parallel --jobs 2
    python -m scripts.sweep config/sweep/wd_grid.py --dry_run | sed -n "${SLURM_ARRAY_TASK_ID}p" | bash

A grid is `setting=value,value; setting=value,...`; every combination is a cell. Settings joined by +
vary together, with one value for all or one each: `attn_wd+mlp_wd=0,1` or
`learning_rate+min_lr=1e-3:1e-4,3e-3:3e-4`. Runs of one seed share initialisation and data order, so
differences between cells are paired over seeds.

A finished run is skipped and a broken one is resumed. A run that fails does not stop the others; it is
named at the end (exit 1). On Ctrl-C or SIGTERM the trainers save, and the same command goes on.

Writes OUT_DIR/CELL/ (the trainer's files and output.log), sweep.csv (a row a run: settings, results,
last ranks), curves.csv (ranks, norms and validation over training), table.md, paired.csv and figures.
"""
import fcntl
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from configurator import configure, current, known, parse, script_settings
from nanorank.console import StopSignal, time_left
from nanorank.errors import UserError, user_errors
from nanorank.run_settings import FREE_ON_RESUME, TENTH
from nanorank.sweep_tables import as_text, collect, report
from nanorank.tables import write_csv

# --------------------------------------------------------------------------- settings
trainer = "train_lm.py"         # train_lm.py or train_vit.py
configs = "config/demo.py"      # config files for the trainer, separated by spaces or commas
fixed = ""                      # further flags for every run: "--max_iters=300 --n_layer=2"
grid = "attn_wd=0,0.3,1,3; mlp_wd=0.3,1,3; seed=1,2,3,4,5"
out_dir = "out/sweep"           # where the runs' folders and the tables go
# how
jobs = 0                        # runs at a time, 0: one, or one for each of --gpus
gpus = ""                       # GPUs to use ("0,1,2,3"), nproc for each run; empty: what the trainer finds
nproc = 1                       # processes a run, under torchrun where over 1
threads = 0                     # OMP_NUM_THREADS of each process, 0: cores / (jobs * nproc)
dry_run = False                 # print the command of every cell, a line each, and end
collect_only = False            # run nothing, tabulate
figure = True                   # draw the figures (needs matplotlib)
# table
rows = "attn_wd"                # the setting that has a row a value
columns = "mlp_wd"              # the setting that has a column a value; the rest of the grid: a table each
metric = ""                     # a column of sweep.csv; empty: test_acc where there is one, else test_ppl

# settings that describe the model: result.json has the model's own
SHAPE = (
    "vocab_size", "block_size", "patch_size", "image_size", "n_layer", "n_head", "n_embd",
    "mlp", "post_norm", "bias", "tied", "pool", "positions",
)
SET_BY_SWEEP = ("out_dir", "init_from", "overwrite", "eval_only")
RESULT = "result.json"
LOG = "output.log"

# ------------------------------------------------------------------------------- grid


class Cell(NamedTuple):
    """One run of the grid."""

    values: dict    # {setting: value} of those that vary
    folder: str     # named after them
    settings: dict  # all that the trainer will have

    @property
    def name(self):
        return os.path.basename(self.folder)

    @property
    def from_checkpoint(self):
        return self.settings["init_from"] not in ("scratch", "auto", "resume")

    def path(self, file):
        return os.path.join(self.folder, file)

    def has(self, file):
        return os.path.exists(self.path(file))


def read_grid(text, defaults):
    """The axes of a grid, each a list of {setting: value}.

    defaults: {setting: default} of the trainer; values get the default's type.
    Raises UserError naming the part of the text that is wrong.
    """
    axes = []
    seen = set()
    for part in text.replace("\n", ";").split(";"):
        part = part.strip()
        if not part:
            continue
        left, equals, right = part.partition("=")
        names = []
        for name in left.split("+"):
            names.append(known(name.strip(), defaults, f"in the grid: {name.strip() or part!r}"))
        values = [value.strip() for value in right.split(",")]
        if not equals or not all(values):
            raise UserError(f"--grid: {part!r} lacks a value; write {names[0]}=VALUE,VALUE,...")
        for name in names:
            if name in seen:
                raise UserError(f"--grid: {name} stands there twice")
            if name in SET_BY_SWEEP:
                raise UserError(f"--grid: {name} is set by the sweep itself; it cannot vary")
            seen.add(name)

        axis = []
        for value in values:
            point = read_point(left.strip(), names, value, defaults)
            if point in axis:
                raise UserError(f"--grid: {left.strip()}={value} stands there twice")
            axis.append(point)
        axes.append(axis)
    if not axes:
        raise UserError('--grid is empty; write --grid="attn_wd=0,1; seed=1,2"')
    return axes


def read_point(left, names, value, defaults):
    """{setting: value} of settings that vary together: `1e-3:1e-4` has one each, `1` is for all of them."""
    each = value.split(":") if len(names) > 1 else [value]
    if len(each) == 1:
        each = each * len(names)
    if len(each) != len(names):
        raise UserError(f"--grid: {value!r} is not one value for all of {left}, nor one each")
    return {name: parse(f"--grid: {name}", defaults[name], x) for name, x in zip(names, each)}


def trainer_args():
    """configs and fixed as the trainer's command line has them."""
    try:
        return [*configs.replace(",", " ").split(), *shlex.split(fixed)]
    except ValueError as error:
        raise UserError(f"--fixed={fixed}: {error}") from None


def make_cells(path):
    """The cells of the grid, runs of the trainer at `path`.

    Raises UserError where grid, configs or flags are wrong.
    """
    defaults = script_settings({"__file__": path})
    axes = read_grid(grid, defaults)
    base = {"__file__": path, **defaults}
    configure(base, argv=trainer_args())
    cells = []
    for combination in itertools.product(*axes):
        values = {}
        for point in combination:
            values.update(point)
        name = ",".join(f"{name}={as_text(value)}" for name, value in values.items())
        folder = os.path.join(out_dir, name.replace("/", "_"))
        cells.append(Cell(values, folder, {**current(base), **values}))
    for name, value in (("rows", rows), ("columns", columns)):
        known(value, defaults, f"--{name}={value}")
    return cells


def check_settings():
    """Raises UserError naming the setting, its value and the fix."""
    if trainer not in ("train_lm.py", "train_vit.py"):
        raise UserError(f"--trainer={trainer}: expects train_lm.py or train_vit.py")
    for name, value, least in (("jobs", jobs, 0), ("nproc", nproc, 1), ("threads", threads, 0)):
        if value < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    if gpus and len(gpus.split(",")) < nproc:
        raise UserError(f"--gpus={gpus} are fewer than --nproc={nproc}")


def command(cell, path, python=("python",), torchrun=("torchrun",)):
    """The command line of a cell, a list: it starts the run, or goes on with a broken one."""
    if nproc > 1:
        launcher = [*torchrun, "--standalone", f"--nproc_per_node={nproc}"]
    else:
        launcher = list(python)
    line = [*launcher, path, *trainer_args()]
    line += [f"--{name}={as_text(value)}" for name, value in cell.values.items()]
    line.append(f"--out_dir={cell.folder}")
    if cell.from_checkpoint and not cell.has("ckpt.pt"):
        line.append(f"--init_from={cell.settings['init_from']}")
    else:
        line.append("--init_from=auto")
    if not cell.has(RESULT):
        # a run killed before its first checkpoint starts over; where there is a checkpoint, auto resumes it
        line.append("--overwrite")
    return line


def finished(cell):
    """result.json of a finished cell, else None.

    Raises UserError where it was made with other settings.
    """
    path = cell.path(RESULT)
    try:
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path} is damaged; delete it, and the run is finished again") from None

    differ = []
    for name, value in cell.settings.items():
        if name in FREE_ON_RESUME or result.get(name) == value:
            continue
        # a checkpoint has its own shape, and 0 stands for what the trainer makes of it
        is_zero = type(value) is int and value == 0
        if name in SHAPE and (cell.from_checkpoint or is_zero):
            continue
        if name == "min_lr" and value == TENTH:
            continue
        differ.append(f"{name} was {result.get(name)}, is {value}")
    if differ:
        advice = "--out_dir goes elsewhere, or delete that folder"
        raise UserError(f"{path} is of another run: {'; '.join(differ)}; {advice}")
    return result


# ------------------------------------------------------------------------------- runs

def run(cells, path, stop):
    """Trains these cells until all have ended or a signal stops them.

    Returns {cell's name: why it failed}.
    """
    groups = gpu_groups()
    at_once = jobs or max(1, len(groups))
    n_threads = threads or max(1, n_cores() // (at_once * nproc))
    free_slots = list(range(at_once))
    waiting = list(cells)
    running = {}  # {process: (cell, slot, when it started)}
    failed = {}
    took = []  # seconds of each finished run

    while waiting or running:
        while waiting and free_slots and not stop.signal:
            cell = waiting.pop(0)
            slot = free_slots.pop(0)
            env = {**os.environ, "OMP_NUM_THREADS": str(n_threads)}
            if groups:
                env["CUDA_VISIBLE_DEVICES"] = groups[slot % len(groups)]
            try:
                process = start(cell, path, env)
            except BlockingIOError:
                failed[cell.name] = "another sweep's trainer is at work in its folder"
                free_slots.append(slot)
            except OSError as error:  # a full disk: the runs that have started may still finish
                failed[cell.name] = str(error)
                free_slots.append(slot)
            else:
                running[process] = (cell, slot, time.monotonic())

        if stop.signal:
            print(f"signal {stop.signal}: {len(running)} runs save and end", flush=True)
            for process in running:
                process.send_signal(stop.signal)
            for process in running:
                process.wait()
            return failed

        time.sleep(0.1)
        ended = [process for process in running if process.poll() is not None]
        for process in ended:
            cell, slot, started = running.pop(process)
            free_slots.append(slot)
            seconds = time.monotonic() - started
            why = reason(cell, process.returncode)
            if why:
                failed[cell.name] = why
            else:
                took.append(seconds)

            n_done = len(cells) - len(waiting) - len(running)
            status = "FAILED" if why else "done"
            line = f"[{n_done}/{len(cells)}] {cell.name} {status} in {time_left(seconds)}"
            line += f"; {len(running)} running"
            if took:
                spent = sum(time.monotonic() - started for _, _, started in running.values())
                left = statistics.mean(took) * (len(waiting) + len(running)) - spent
                line += f", {time_left(max(0, left / at_once))} left"
            print(line, flush=True)
    return failed


def start(cell, path, env):
    """Starts the trainer of a cell.

    Raises BlockingIOError where another sweep has one at work in its folder.
    """
    os.makedirs(cell.folder, exist_ok=True)
    line = command(cell, path, [sys.executable], [sys.executable, "-m", "torch.distributed.run"])
    with open(cell.path(LOG), "ab") as log:
        # The trainer inherits this lock with the open file and holds it as long as it lives, even when
        # the sweep dies. filelock cannot do that: its file is closed in the processes that we start.
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # a session of its own: a terminal's Ctrl-C reaches the trainer through us alone, once
        return subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
        )


def gpu_groups():
    """["0,1", "2,3"]: the GPUs of each run, nproc a run; those that are left over stay idle."""
    if not gpus:
        return []
    names = gpus.split(",")
    return [",".join(names[i:i + nproc]) for i in range(0, len(names) - nproc + 1, nproc)]


def n_cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def reason(cell, code):
    """Why a run whose trainer ended with this exit code failed, in one line; empty where it finished."""
    if code == 0 and cell.has(RESULT):
        return ""
    if code == 0:
        why = f"wrote no {RESULT}"
    elif code < 0:
        why = f"killed by signal {-code}"
    else:
        why = f"exit {code}"
    last = "no output"
    with open(cell.path(LOG), encoding="utf-8", errors="replace") as file:
        for line in file:
            last = line.strip() or last
    return f"{why}: {last}"


# ------------------------------------------------------------------------------- main

def print_commands(cells, path):
    """A line a cell, also of finished ones: a job array counts lines."""
    try:
        for cell in cells:
            print(shlex.join(command(cell, path)))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head -1` has read enough; nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main():
    check_settings()
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.path.relpath(os.path.join(root, trainer))
    cells = make_cells(path)
    # refuses results of other settings before anything runs
    results = {cell.name: finished(cell) for cell in cells}
    if dry_run:
        print_commands(cells, path)
        return
    os.makedirs(out_dir, exist_ok=True)

    stop = StopSignal()
    failed = {}
    if not collect_only:
        todo = [cell for cell in cells if not results[cell.name]]
        n_broken = sum(cell.has("ckpt.pt") for cell in todo)
        print(
            f"{len(cells)} cells: {len(cells) - len(todo)} finished, {n_broken} to resume, "
            f"{len(todo) - n_broken} to start", flush=True,
        )
        failed = run(todo, path, stop)
        results = {cell.name: finished(cell) for cell in cells}

    summary, curves = collect(cells, results, failed, skip=FREE_ON_RESUME)
    write_csv(os.path.join(out_dir, "sweep.csv"), summary)
    if curves:
        write_csv(os.path.join(out_dir, "curves.csv"), curves)
    if stop.signal:
        n_done = sum(result is not None for result in results.values())
        print(
            f"stopped by signal {stop.signal}, {n_done} of {len(cells)} runs done: the same command goes on"
        )
        raise SystemExit(128 + stop.signal)

    report(cells, summary, out_dir, rows, columns, metric)
    if figure and curves:
        from nanorank.figures import sweep as figures
        print("figures: " + ", ".join(figures.sweep(out_dir)))
    if failed:
        lines = [f"{len(failed)} of {len(cells)} runs failed; the same command tries them again:"]
        lines += [f"  {name}: {why}" for name, why in failed.items()]
        print("\n".join(lines), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    with user_errors("sweep.py"):
        configure(globals())
        main()
