"""
A grid of runs of one trainer: a folder a run, resumable, and the tables of what came out.

    python -m scripts.sweep config/sweep/wd_grid.py --jobs=2                                # runs what is not finished yet, then tabulates all
    python -m scripts.sweep config/sweep/wd_grid.py --gpus=0,1,2,3                          # one run a GPU; --nproc=4: torchrun, four GPUs a run
    python -m scripts.sweep --configs=config/demo.py --grid="attn_wd=0,1,4; seed=1,2"  # any settings of the trainer
    python -m scripts.sweep config/sweep/wd_grid.py --dry_run | parallel --jobs 2           # GNU parallel as the engine, or a Slurm array of N jobs:
    python -m scripts.sweep config/sweep/wd_grid.py --dry_run | sed -n "${SLURM_ARRAY_TASK_ID}p" | bash
    python -m scripts.sweep config/sweep/wd_grid.py --collect_only                          # tables of what is there by now

The grid is `setting=value,value; setting=value,...`: every combination is a cell. Settings joined by + vary together, a value for all or
one each: `attn_wd+mlp_wd=0,1`, `learning_rate+min_lr=1e-3:1e-4,3e-3:3e-4`. Runs of one seed share initialisation and data order across
cells (both are the trainer's seed and nothing else), so differences between cells are paired over seeds.

A finished run is skipped, a broken one resumed, one that fails does not stop the others and is named at the end (exit 1). Ctrl-C or SIGTERM
lets the running trainers save; the same command goes on. Writes OUT_DIR/CELL/ (the trainer's files and output.log), sweep.csv (a row a run:
settings, results, last ranks), curves.csv (ranks, norms and validation over training), table.md (T1), paired.csv and figures.
"""
import ast
import csv
import fcntl
import io
import itertools
import json
import math
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
from nanorank.files import write_atomic

# --------------------------------------------------------------------------------------------------------------- settings
trainer = "train_lm.py"         # train_lm.py or train_vit.py
configs = "config/demo.py"      # config files handed to the trainer, separated by spaces or commas
fixed = ""                      # further flags for every run: "--max_iters=300 --n_layer=2"
grid = "attn_wd=0,0.3,1,3; mlp_wd=0.3,1,3; seed=1,2,3,4,5"
out_dir = "out/sweep"           # where the runs' folders and the tables go
# how
jobs = 0                        # runs at a time, 0: one, or one for each of --gpus
gpus = ""                       # GPUs to use ("0,1,2,3"), nproc for each run at a time; empty: whatever the trainer finds
nproc = 1                       # processes a run, under torchrun where over 1
threads = 0                     # OMP_NUM_THREADS of each process, 0: cores / (jobs * nproc)
dry_run = False                 # print the command of every cell, a line each, and end
collect_only = False            # run nothing, tabulate
figure = True                   # draw the figures (needs matplotlib)
# table
rows = "attn_wd"                # the setting that has a row a value
columns = "mlp_wd"              # the setting that has a column a value; a grid of more has a table for each combination of the rest
metric = ""                     # a column of sweep.csv; empty: test_acc where there is one, else test_ppl

SHAPE = ("vocab_size", "block_size", "patch_size", "n_layer", "n_head", "n_embd", "mlp", "post_norm", "bias", "tied", "pool", "positions",
         "image_size")  # result.json has the model's own; 0 stands for what the trainer makes of it
RESULT, LOG = "result.json", "output.log"

# ------------------------------------------------------------------------------------------------------------------- grid

class Cell(NamedTuple):
    """One run: the settings that vary {name: value}, its folder (named after them), and all settings that the trainer will have."""
    values: dict
    folder: str
    settings: dict

    @property
    def name(self):
        return os.path.basename(self.folder)


def read_grid(text, defaults):
    """The axes of a grid, each a list of {setting: value}. Raises UserError naming what is wrong with which part of the text.

    defaults: the trainer's settings {name: default}, whose types the values must have.
    """
    axes, seen = [], set()
    for part in filter(None, map(str.strip, text.replace("\n", ";").split(";"))):
        left, equals, right = part.partition("=")
        names = [known(name.strip(), defaults, f"in the grid: {name.strip() or part!r}") for name in left.split("+")]
        values = [value.strip() for value in right.split(",")]
        if not equals or not all(values):
            raise UserError(f"--grid: {part!r} lacks a value; write {names[0]}=VALUE,VALUE,...")
        for name in names:
            if name in seen or name in ("out_dir", "init_from", "overwrite", "eval_only"):
                raise UserError(f"--grid: {name} " + ("stands there twice" if name in seen else "is what sweep.py itself sets; it cannot vary"))
            seen.add(name)
        axis = []
        for value in values:
            each = value.split(":") if len(names) > 1 else [value]
            each = each * len(names) if len(each) == 1 else each
            if len(each) != len(names):
                raise UserError(f"--grid: {value!r} is not one value for all of {left.strip()}, nor one each")
            axis.append({name: parse(f"--grid: {name}", defaults[name], x) for name, x in zip(names, each)})
            if axis[-1] in axis[:-1]:
                raise UserError(f"--grid: {left.strip()}={value} stands there twice")
        axes.append(axis)
    if not axes:
        raise UserError('--grid is empty; write --grid="attn_wd=0,1; seed=1,2"')
    return axes


def as_text(value):
    """A setting's value as it stands in commands and folder names: 0.1, 3e-05, 1, true."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def make_cells(path):
    """(axes, [Cell, ...], the names of settings that do not matter to a finished run) of this sweep of the trainer at `path`.

    Raises UserError, or ends with the line that the trainer itself would end with, where grid, configs or flags are wrong.
    """
    try:
        with open(path, encoding="utf-8") as file:
            constants = {node.targets[0].id: node.value for node in ast.parse(file.read()).body
                         if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
        free = ast.literal_eval(constants["FREE_ON_RESUME"])
    except (OSError, KeyError):
        raise UserError(f"--trainer={trainer}: expects train_lm.py or train_vit.py") from None
    defaults = script_settings({"__file__": path})
    axes = read_grid(grid, defaults)
    base = {"__file__": path, **defaults}
    configure(base, argv=arguments())  # what the trainer will make of them
    cells = []
    for combination in itertools.product(*axes):
        values = {name: value for part in combination for name, value in part.items()}
        name = ",".join(f"{name}={as_text(value)}" for name, value in values.items()).replace("/", "_")
        cells.append(Cell(values, os.path.join(out_dir, name), {**current(base), **values}))
    for name, least in (("jobs", 0), ("nproc", 1), ("threads", 0)):
        if globals()[name] < least:
            raise UserError(f"--{name}={globals()[name]} must be at least {least}")
    if len(gpus.split(",")) < nproc and gpus:
        raise UserError(f"--gpus={gpus} are fewer than --nproc={nproc}")
    for name, value in (("rows", rows), ("columns", columns)):
        known(value, defaults, f"--{name}={value}")
    return axes, cells, free


def arguments():
    """configs and fixed as the trainer's command line has them."""
    try:
        return [*configs.replace(",", " ").split(), *shlex.split(fixed)]
    except ValueError as error:
        raise UserError(f"--fixed={fixed}: {error}") from None


def command(cell, path, python=("python",), torchrun=("torchrun",)):
    """The command line of a cell, a list; it starts a run, resumes a broken one, and leaves nothing to ask."""
    fresh = cell.settings["init_from"] not in ("scratch", "auto", "resume") and not os.path.exists(os.path.join(cell.folder, "ckpt.pt"))
    begin = [f"--init_from={cell.settings['init_from'] if fresh else 'auto'}"]
    if not os.path.exists(os.path.join(cell.folder, RESULT)):
        begin.append("--overwrite")  # of a run killed before its first checkpoint; where there is one, auto resumes it
    launcher = [*torchrun, "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else list(python)
    return [*launcher, path, *arguments(), *(f"--{name}={as_text(value)}" for name, value in cell.values.items()),
            f"--out_dir={cell.folder}", *begin]


def finished(cell, free):
    """result.json of a finished cell, None where there is none. Raises UserError where it was made with other settings."""
    path = os.path.join(cell.folder, RESULT)
    try:
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path} is damaged; delete it, and the run is finished again") from None
    taken = cell.settings["init_from"] not in ("scratch", "auto", "resume")  # a checkpoint's shape, whatever the settings say
    differ = [f"{name} was {result.get(name)}, is {value}" for name, value in cell.settings.items()
              if name not in free and result.get(name) != value and not (name in SHAPE and (taken or type(value) is int and value == 0))]
    if differ:
        raise UserError(f"{path} is of another run: {'; '.join(differ)}; --out_dir goes elsewhere, or delete that folder")
    return result

# ------------------------------------------------------------------------------------------------------------------- runs

def run(cells, path, stop):
    """Trains these cells, so many at a time, until all have ended or a signal stops them; returns {cell's name: why it failed}."""
    devices = [",".join(group) for group in zip(*[iter(gpus.split(","))] * nproc)] if gpus else [""]
    at_once = jobs or len(devices)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or max(1, cores // (at_once * nproc)))}
    free_slots, waiting, running, failed, took = list(range(at_once)), list(cells), {}, {}, []
    while waiting or running:
        while waiting and free_slots and not stop.signal:
            cell, slot = waiting.pop(0), free_slots.pop(0)
            try:
                os.makedirs(cell.folder, exist_ok=True)
                log = open(os.path.join(cell.folder, LOG), "ab")
            except OSError as error:  # a full disk; those that run have their own to say
                failed[cell.name] = str(error)
                free_slots.append(slot)
                continue
            with log:
                try:
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the trainer inherits it, so it lasts as long as it does
                except BlockingIOError:
                    failed[cell.name] = "another sweep's trainer is at work in its folder"
                    free_slots.append(slot)
                    continue
                visible = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if gpus else {}
                line = command(cell, path, [sys.executable], [sys.executable, "-m", "torch.distributed.run"])
                process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**environment, **visible},
                                           start_new_session=True)  # a terminal's Ctrl-C reaches it through us alone, once
            running[process] = cell, slot, time.monotonic()
        if stop.signal:
            print(f"signal {stop.signal}: {len(running)} runs save and end", flush=True)
            for process in running:
                process.send_signal(stop.signal)
            for process in running:
                process.wait()
            return failed
        time.sleep(0.1)
        for process in [process for process in running if process.poll() is not None]:
            cell, slot, start = running.pop(process)
            free_slots.append(slot)
            seconds, why = time.monotonic() - start, reason(cell, process.returncode)
            if why:
                failed[cell.name] = why
            else:
                took.append(seconds)
            busy = sum(time.monotonic() - start for *_, start in running.values())
            left = (statistics.mean(took) * (len(waiting) + len(running)) - busy) / at_once if took else 0
            print(f"[{len(cells) - len(waiting) - len(running)}/{len(cells)}] {cell.name} {'FAILED' if why else 'done'} in {time_left(seconds)}; "
                  f"{len(running)} running" + f", {time_left(max(0, left))} left" * bool(took), flush=True)
    return failed


def reason(cell, code):
    """Why a run whose trainer ended with this exit code failed, in one line; empty where it finished."""
    if code == 0 and os.path.exists(os.path.join(cell.folder, RESULT)):
        return ""
    with open(os.path.join(cell.folder, LOG), encoding="utf-8", errors="replace") as file:
        last = ([line.strip() for line in file if line.strip()] or ["no output"])[-1]
    return f"{f'wrote no {RESULT}' if code == 0 else f'killed by signal {-code}' if code < 0 else f'exit {code}'}: {last}"

# ---------------------------------------------------------------------------------------------------------------- collect

def collect(cells, results, failed, free):
    """(rows of sweep.csv, rows of curves.csv), dicts; a cell without a result has a row that says so, and no numbers."""
    summary, curves = [], []
    for cell in cells:
        result = results[cell.name]
        row = {"cell": cell.name, "status": "done" if result else "failed" if cell.name in failed else "missing", **cell.values}
        if result:
            row.update({name: value for name, value in result.items() if name not in free and name not in row})
            log = measurements(os.path.join(cell.folder, "log.jsonl"))
            for line in log:
                curves.append({"cell": cell.name, **cell.values, **{name: f"{value:.6g}" for name, value in line.items()}})
            ranked = [line for line in log if "norm_all" in line]
            if ranked:
                first, last = ranked[0], ranked[-1]
                row.update({name: value for name, value in last.items() if name.startswith(("attn_", "layer"))})
                for name in [name for name in last if name.startswith("norm_")]:
                    row.update({f"{name}_first": first[name], f"{name}_last": last[name]})
                row["norm_growth"] = last["norm_all"] / first["norm_all"]
        summary.append(row)
    return summary, curves


def measurements(path):
    """The lines of a log.jsonl that hold ranks, norms or validation, those of one step as one dict; none where there is no log."""
    steps = {}
    if not os.path.exists(path):
        print(f"note: {path} is missing; its run has no ranks and norms in the tables", file=sys.stderr)
        return []
    with open(path, encoding="utf-8") as file:
        for line in map(json.loads, file):
            kept = {name: math.nan if value is None else value for name, value in line.items()  # null: it was not finite
                    if name.startswith(("attn_", "layer", "norm_", "val_"))}
            if kept:
                steps.setdefault(line["step"], {"step": line["step"]}).update(kept)
    return list(steps.values())


def write_csv(name, table):
    """OUT_DIR/name from rows (dicts), with every column that any of them has."""
    names = {column: None for row in table for column in row}
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomic(os.path.join(out_dir, name), lambda file: file.write(text.getvalue().encode()))

# ----------------------------------------------------------------------------------------------------------------- tables

def t_quantile(df, p=0.975):
    """Student's t with df = 1, 2, ... degrees of freedom: the t that it stays below with probability p >= 0.5.

    Bisection of the distribution function, a finite sum for whole df (Abramowitz & Stegun 26.7.3, 26.7.4).
    """
    def inside(t):  # P(|T| < t)
        angle = math.atan(t / math.sqrt(df))
        term = total = math.cos(angle) if df % 2 else 1.0
        for k in range(3 if df % 2 else 2, df - 1, 2):
            term *= (k - 1) / k * math.cos(angle)**2
            total += term
        if df % 2:
            return 2 / math.pi * (angle + (math.sin(angle) * total if df > 1 else 0))
        return math.sin(angle) * total

    low, high = 0.0, 1.0
    while inside(high) < 2 * p - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 2 * p - 1 else (low, middle)
    return high


def interval(values):
    """(mean, sample standard deviation, low, high) with the 95 % t interval of the mean; nan where one value is not enough, or none is."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan, math.nan, math.nan
    sd = statistics.stdev(values)
    half = t_quantile(len(values) - 1) * sd / math.sqrt(len(values))
    return mean, sd, mean - half, mean + half


def by_seed(axes, summary, cells, name):
    """{combination of what varies beside rows, columns and seed and is not settled by them, as text: {(row's value, column's value):
    {seed: metric, None where there is no result}}}, in the grid's order."""
    shown = (rows, columns, "seed")
    known_by = {tuple(cell.settings[key] for key in shown) for cell in cells}
    rest = [key for axis in axes for key in axis[0] if key not in shown]
    rest = [key for key in rest if len({(*(cell.settings[k] for k in shown), cell.values[key]) for cell in cells}) > len(known_by)]
    tables = {}
    for cell, row in zip(cells, summary):
        title = ", ".join(f"{key}={as_text(cell.values[key])}" for key in rest)
        value = row.get(name)
        at = cell.settings[rows], cell.settings[columns]
        value = math.nan if row["status"] == "done" and value is None else value  # null in result.json: not finite
        tables.setdefault(title, {}).setdefault(at, {})[cell.settings["seed"]] = value
    return tables


def table_lines(table, name, best):
    """One table as lines of markdown: mean +- standard deviation over seeds; the number of seeds where it is not all of them.

    best: max or min, whose mean stands between **; None for none.
    """
    heights, widths = (list(dict.fromkeys(at[i] for at in table)) for i in (0, 1))
    means, texts = {}, {}
    for at, seeds in table.items():
        there = [value for value in seeds.values() if value is not None]
        texts[at] = "missing" if not there else ""
        if there:
            means[at], sd, *_ = interval(there)
            texts[at] = f"{means[at]:.4g}" + f" ± {sd:.2g}" * (len(there) > 1) + f" ({len(there)} of {len(seeds)})" * (len(there) < len(seeds))
    finite = {at: mean for at, mean in means.items() if math.isfinite(mean)}
    if best and len(finite) > 1:
        at = best(finite, key=finite.get)
        texts[at] = f"**{texts[at]}**"
    lines = [[f"{name}: {rows} \\ {columns}" if rows != columns else name, *map(as_text, widths)]]
    lines += [[as_text(row), *(texts.get((row, column), "") for column in widths)] for row in heights]
    wide = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * w for w in wide])
    return ["| " + " | ".join(text.ljust(w) for text, w in zip(line, wide)) + " |" for line in lines]


def paired(title, table, name):
    """Differences to coupled decay (both settings equal) in the same column, over the seeds that have both: rows of paired.csv."""
    out = []
    for (row, column), seeds in table.items():
        coupled = table.get((column, column))
        if not coupled or row == column:
            continue
        both = [seed for seed, value in seeds.items() if value is not None and coupled.get(seed) is not None]
        mean, sd, low, high = interval([seeds[seed] - coupled[seed] for seed in both]) if both else [math.nan] * 4
        out.append({"table": title, "metric": name, columns: column, rows: row, "against": f"{rows}={as_text(column)}", "difference": mean,
                    "sd": sd, "low": low, "high": high, "seeds": len(both), "seeds_in_grid": len(seeds)})
    return out


def report(axes, cells, summary):
    """Writes table.md and paired.csv, prints both."""
    name = metric or ("test_acc" if any("test_acc" in row for row in summary) else "test_ppl")
    if not any(name in row for row in summary):
        if metric and any(row["status"] == "done" for row in summary):
            raise UserError(f"--metric={metric} is no column of {os.path.join(out_dir, 'sweep.csv')}")
        return print("no finished run yet, no table")
    best = max if name.endswith("acc") else min if name.endswith(("ppl", "loss")) else None
    tables = by_seed(axes, summary, cells, name)
    lines, differences = [], []
    for title, table in tables.items():
        lines += [*([f"{title}:", ""] if title else []), *table_lines(table, name, best), ""]
        if rows.endswith("_wd") and columns.endswith("_wd") and rows != columns:
            differences += paired(title, table, name)
    done = sum(row["status"] == "done" for row in summary)
    seeds = len({cell.settings["seed"] for cell in cells})
    lines.append(f"{name}, mean ± sample standard deviation over {seeds} seed{'s' * (seeds > 1)}" + f", {'highest' if best is max else 'lowest'} bold"
                 * (best is not None) + f"; {done} of {len(cells)} runs done.")
    if differences:
        lines += ["", f"Difference in {name} to coupled decay ({rows} = {columns}), paired over seeds, with its 95 % t interval:", "",
                  f"| {columns} | {rows} | difference | 95 % interval | seeds |", "|---|---|---|---|---|"]
        for x in differences:
            few = f" of {x['seeds_in_grid']}" * (x["seeds"] < x["seeds_in_grid"])
            span = f"{x['low']:+.4g} to {x['high']:+.4g}" if x["seeds"] > 1 else "takes two seeds"
            where = f"{x['table']}, " * bool(x["table"])
            found = f"{x['difference']:+.4g} | {span}" if x["seeds"] else "missing | "
            lines.append(f"| {where}{as_text(x[columns])} | {as_text(x[rows])} | {found} | {x['seeds']}{few} |")
        write_csv("paired.csv", differences)
    text = "\n".join(lines) + "\n"
    write_atomic(os.path.join(out_dir, "table.md"), lambda file: file.write(text.encode()))
    if sys.stdout.isatty():
        on, parts = "\033[1m", text.split("**")
        text = parts[0] + "".join((on if i % 2 == 0 else "\033[0m") + part for i, part in enumerate(parts[1:]))
    print("\n" + text, end="", flush=True)

# ------------------------------------------------------------------------------------------------------------------- main

def main():
    with user_errors(os.path.basename(__file__)):
        path = os.path.relpath(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), trainer))
        axes, cells, free = make_cells(path)
        results = {cell.name: finished(cell, free) for cell in cells}  # and those of other settings are refused before anything runs
        if dry_run:
            for cell in cells:  # finished ones too: a job array counts lines
                print(shlex.join(command(cell, path)))
            return
        os.makedirs(out_dir, exist_ok=True)
    stop, failed = StopSignal(), {}
    if not collect_only:
        todo = [cell for cell in cells if not results[cell.name]]
        broken = sum(os.path.exists(os.path.join(cell.folder, "ckpt.pt")) for cell in todo)
        print(f"{len(cells)} cells: {len(cells) - len(todo)} finished, {broken} to resume, {len(todo) - broken} to start", flush=True)
        failed = run(todo, path, stop)
    with user_errors(os.path.basename(__file__)):
        results = {cell.name: finished(cell, free) for cell in cells}
        summary, curves = collect(cells, results, failed, free)
        write_csv("sweep.csv", summary)
        if curves:
            write_csv("curves.csv", curves)
        if stop.signal:
            print(f"stopped by signal {stop.signal}, {sum(map(bool, results.values()))} of {len(cells)} runs done: the same command goes on")
            raise SystemExit(128 + stop.signal)
        report(axes, cells, summary)
        if figure and curves:
            from nanorank.figures import sweep as figures
            print("figures: " + ", ".join(figures.sweep(out_dir)))
    if failed:
        print(f"{len(failed)} of {len(cells)} runs failed; the same command tries them again:", file=sys.stderr)
        for name, why in failed.items():
            print(f"  {name}: {why}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    configure(globals())
    main()
