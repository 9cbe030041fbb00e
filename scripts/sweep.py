"""
Runs a trainer over a grid of settings, a folder a run, and tabulates what came out.

    python -m scripts.sweep config/sweep/wd_grid.py --jobs=2         # run what is not finished, tabulate
    python -m scripts.sweep config/sweep/wd_grid.py --gpus=0,1,2,3   # one run a GPU, --nproc=4: four a run
    python -m scripts.sweep --configs=config/demo.py --grid="attn_wd=0,1,4; seed=1,2"
    python -m scripts.sweep config/sweep/wd_grid.py --collect_only   # tables of what is there by now
    python -m scripts.sweep config/sweep/wd_grid.py --dry_run | parallel --jobs 2

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
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from configurator import configure, current, known, parse, script_settings
from nanorank.console import StopSignal, time_left
from nanorank.errors import UserError, user_errors
from nanorank.files import make_folder
from nanorank.run_settings import BEFORE, FREE_ON_RESUME, TENTH
from nanorank.shards import n_cores
from nanorank.sweep_tables import as_text, collect, report

# --------------------------------------------------------------------------- settings
trainer = "train_lm.py"         # train_lm.py or train_vit.py
configs = "config/demo.py"      # config files for the trainer, separated by spaces or commas
fixed = ""                      # further flags for every run: "--max_iters=300 --n_layer=2"
grid = "attn_wd=0,0.3,1,3; mlp_wd=0.3,1,3; seed=1,2,3,4,5"  # setting=value,...; every combination is a run
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
metric = ""                     # a column of sweep.csv; empty: test_acc or test_ppl, else val's
against = ""                    # the cell that others are compared with: "attn_wd=0"; empty: coupled decay

# settings that describe the model: result.json has the model's own
SHAPE = (
    "vocab_size", "block_size", "patch_size", "image_size", "n_layer", "n_head", "n_embd",
    "mlp", "post_norm", "bias", "tied", "pool", "positions", "rope", "n_kv_head", "qk_norm",
)
SET_BY_SWEEP = ("out_dir", "init_from", "overwrite", "eval_only")


class Cell(NamedTuple):
    values: dict    # {setting: value} of those that vary
    folder: Path    # named after them
    settings: dict  # all that the trainer will have

    @property
    def from_checkpoint(self):
        return self.settings["init_from"] not in ("scratch", "auto", "resume")

    def has(self, name):
        return (self.folder / name).exists()


# ------------------------------------------------------------------------------- grid

def read_grid(text, defaults):
    """The axes of a grid, each a list of {setting: value}. defaults: {setting: default} of the trainer."""
    axes = []
    seen = set()
    for part in text.replace("\n", ";").split(";"):
        part = part.strip()
        if not part:
            continue
        left, _, right = part.partition("=")
        names = []
        for name in left.split("+"):
            name = known(name.strip(), defaults, f"in the grid: {name.strip() or part!r}")
            if name in seen:
                raise UserError(f"--grid: {name} stands there twice")
            if name in SET_BY_SWEEP:
                raise UserError(f"--grid: {name} is set by the sweep itself; it cannot vary")
            seen.add(name)
            names.append(name)

        axis = []
        for value in right.split(","):
            point = read_point(part, names, value.strip(), defaults)
            if point in axis:
                raise UserError(f"--grid: {left.strip()}={value.strip()} stands there twice")
            axis.append(point)
        axes.append(axis)
    if not axes:
        raise UserError('--grid is empty; write --grid="attn_wd=0,1; seed=1,2"')
    return axes


def read_point(part, names, value, defaults):
    """{setting: value}: `1e-3:1e-4` has one for each name, `1` is for all of them."""
    if not value:
        raise UserError(f"--grid: {part!r} lacks a value; write {names[0]}=VALUE,VALUE,...")
    each = value.split(":") if len(names) > 1 else [value]
    if len(each) == 1:
        each = each * len(names)
    if len(each) != len(names):
        raise UserError(f"--grid: {value!r} is not one value for all of {'+'.join(names)}, nor one each")
    return {name: parse(f"--grid: {name}", defaults[name], x) for name, x in zip(names, each)}


def trainer_args():
    try:
        return [*configs.replace(",", " ").split(), *shlex.split(fixed)]
    except ValueError as error:
        raise UserError(f"--fixed={fixed}: {error}") from None


def make_cells(path):
    defaults = script_settings({"__file__": path})
    axes = read_grid(grid, defaults)
    base = {"__file__": path, **defaults}
    configure(base, argv=trainer_args())
    known(rows, defaults, f"--rows={rows}")
    known(columns, defaults, f"--columns={columns}")
    settings = current(base)

    cells = []
    for combination in itertools.product(*axes):
        values = {}
        for point in combination:
            values.update(point)
        name = ",".join(f"{name}={as_text(value)}" for name, value in values.items()).replace("/", "_")
        cells.append(Cell(values, Path(out_dir, name), {**settings, **values}))
    return cells


def baseline(cells):
    """{setting: value}, of --against, of the cell that the others are compared with; {}: coupled decay."""
    wanted = {}
    for part in filter(None, against.replace(" ", "").split(",")):
        name, _, value = part.partition("=")
        if name not in (rows, columns):
            raise UserError(f"--against={against}: {name} is neither --rows={rows} nor --columns={columns}")
        wanted[name] = parse(f"--against: {name}", cells[0].settings[name], value)
    if not any(wanted.items() <= cell.settings.items() for cell in cells):
        raise UserError(f"--against={against} is no cell of the grid")
    return wanted


def command(cell, path):
    """The command line of a cell, a list: it starts the run, or goes on with a broken one."""
    line = ["torchrun", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else ["python"]
    line += [path, *trainer_args()]
    line += [f"--{name}={as_text(value)}" for name, value in cell.values.items()]
    line.append(f"--out_dir={cell.folder}")
    first = cell.from_checkpoint and not cell.has("ckpt.pt")
    line.append(f"--init_from={cell.settings['init_from'] if first else 'auto'}")
    if not cell.has("result.json"):
        # a run killed before its first checkpoint starts over; where there is a checkpoint, auto resumes it
        line.append("--overwrite")
    return line


def finished(cell):
    """result.json of a finished cell, else None. Raises UserError where it was made with other settings."""
    path = cell.folder / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path} is damaged; delete it, and the run is finished again") from None

    differ = []
    for name, value in cell.settings.items():
        # a checkpoint has its own shape, and 0 stands for what the trainer makes of it
        is_zero = type(value) is int and value == 0
        free = name in FREE_ON_RESUME or (name in SHAPE and (cell.from_checkpoint or is_zero))
        free = free or (name == "min_lr" and value == TENTH)
        was = result.get(name, BEFORE.get(name))
        if not free and was != value:
            differ.append(f"{name} was {was}, is {value}")
    if differ:
        advice = "--out_dir goes elsewhere, or delete that folder"
        raise UserError(f"{path} is of another run: {'; '.join(differ)}; {advice}")
    return result


# ------------------------------------------------------------------------------- runs

def run(cells, path, stop):
    """Trains these cells until all have ended or a signal stops them: {folder's name: why it failed}."""
    groups = gpu_groups()
    at_once = jobs or max(1, len(groups))
    n_threads = threads or max(1, n_cores() // (at_once * nproc))
    free_slots = list(range(at_once))
    waiting = list(cells)
    running = {}  # {process: (cell, slot, when it started)}
    failed = {}
    began = time.monotonic()

    while waiting or running:
        while waiting and free_slots and not stop.signal:
            cell = waiting.pop(0)
            env = {**os.environ, "OMP_NUM_THREADS": str(n_threads)}
            if groups:
                env["CUDA_VISIBLE_DEVICES"] = groups[free_slots[0] % len(groups)]
            try:
                process = start(cell, path, env)
            except BlockingIOError:
                failed[cell.folder.name] = "another sweep's trainer is at work in its folder"
            except OSError as error:  # a full disk: the runs that have started may still finish
                failed[cell.folder.name] = str(error)
            else:
                running[process] = cell, free_slots.pop(0), time.monotonic()

        if stop.signal:
            print(f"signal {stop.signal}: {len(running)} runs save and end", flush=True)
            for process in running:
                process.send_signal(stop.signal)
            for process in running:
                process.wait()
            break

        time.sleep(0.1)
        for process in [process for process in running if process.poll() is not None]:
            cell, slot, started = running.pop(process)
            free_slots.append(slot)
            why = reason(cell, process.returncode)
            if why:
                failed[cell.folder.name] = why

            n_done = len(cells) - len(waiting) - len(running)
            status = "FAILED" if why else "done"
            now = time.monotonic()
            left = time_left((now - began) / n_done * (len(cells) - n_done))
            print(f"[{n_done}/{len(cells)}] {cell.folder.name} {status} in {time_left(now - started)}; "
                  f"{len(running)} running, {left} left", flush=True)
    return failed


def gpu_groups():
    """["0,1", "2,3"]: the GPUs of each run, nproc a run."""
    names = gpus.split(",") if gpus else []
    return [",".join(names[i:i + nproc]) for i in range(0, len(names) - nproc + 1, nproc)]


def start(cell, path, env):
    """Starts a cell's trainer. Raises BlockingIOError where another sweep has one at work in its folder."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-m", "torch.distributed.run"] if nproc > 1 else [sys.executable]
    line = [*program, *command(cell, path)[1:]]
    with open(cell.folder / "output.log", "ab") as log:
        # The trainer inherits this lock with the open file and holds it as long as it lives, even when
        # the sweep dies. filelock cannot do that: its file is closed in the processes that we start.
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # a session of its own: a terminal's Ctrl-C reaches the trainer through us alone, once
        return subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
        )


def reason(cell, code):
    """Why a run whose trainer ended with this exit code failed, in one line; empty where it finished."""
    why = f"killed by signal {-code}" if code < 0 else f"exit {code}"
    if code == 0:
        if cell.has("result.json"):
            return ""
        why = "wrote no result.json"
    output = (cell.folder / "output.log").read_text(encoding="utf-8", errors="replace").strip()
    return f"{why}: {output.splitlines()[-1] if output else 'no output'}"


# ------------------------------------------------------------------------------- main

def check_settings():
    if trainer not in ("train_lm.py", "train_vit.py"):
        raise UserError(f"--trainer={trainer}: expects train_lm.py or train_vit.py")
    for name, value, least in (("jobs", jobs, 0), ("nproc", nproc, 1), ("threads", threads, 0)):
        if value < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    if gpus and not gpu_groups():
        raise UserError(f"--gpus={gpus} are fewer than --nproc={nproc}")


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
    path = os.path.relpath(Path(__file__).resolve().parents[1] / trainer)
    cells = make_cells(path)
    compared_with = baseline(cells)
    # refuses results of other settings before anything runs
    results = [finished(cell) for cell in cells]
    if dry_run:
        print_commands(cells, path)
        return
    make_folder(out_dir)

    stop = StopSignal()
    failed = {}
    if not collect_only:
        todo = [cell for cell, result in zip(cells, results) if not result]
        n_broken = sum(cell.has("ckpt.pt") for cell in todo)
        print(f"{len(cells)} cells: {len(cells) - len(todo)} finished, {n_broken} to resume, "
              f"{len(todo) - n_broken} to start", flush=True)
        failed = run(todo, path, stop)
        results = [finished(cell) for cell in cells]

    summary, curves = collect(cells, results, failed, out_dir, skip=FREE_ON_RESUME)
    if stop.signal:
        n_done = len(cells) - results.count(None)
        print(f"stopped by signal {stop.signal}, {n_done} of {len(cells)} runs done: "
              "the same command goes on")
        raise SystemExit(128 + stop.signal)

    report(cells, summary, out_dir, rows, columns, metric, compared_with)
    if figure and curves:
        from nanorank.figures import sweep as figures
        print("figures: " + ", ".join(figures.sweep(out_dir)))
    if failed:
        print(f"{len(failed)} of {len(cells)} runs failed; the same command tries them again:",
              *(f"  {name}: {why}" for name, why in failed.items()), sep="\n", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    with user_errors("sweep.py"):
        configure(globals())
        main()
