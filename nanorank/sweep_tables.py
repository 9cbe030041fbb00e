"""
The tables of a grid of runs: a row a run, curves over training, means over seeds, paired differences.

For scripts/sweep.py, whose cells have a folder, the settings that vary (`values`) and all `settings`.
"""
import json
import math
import os
import re
import statistics
import sys

import pandas as pd
from scipy import stats

from nanorank.errors import UserError
from nanorank.files import write_atomic
from nanorank.tables import undetermined, write_csv


def as_text(value):
    """A setting's value as it stands in commands, tables and folder names: 0.1, 3e-05, 1, true."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


# ---------------------------------------------------------------------------- collect

def collect(cells, results, failed, out_dir, skip):
    """Writes sweep.csv and curves.csv; returns their rows.

    results: each cell's result.json or None. failed: names of folders. skip: what gets no column.
    """
    summary, curves = [], []
    for cell, result in zip(cells, results):
        name = cell.folder.name
        if result is None:
            status = "failed" if name in failed else "missing"
            summary.append({"cell": name, "status": status, **cell.values})
            continue
        log = measurements(cell.folder / "log.jsonl")
        row = {"cell": name, "status": "done", **cell.values}
        row.update({key: x for key, x in result.items() if key not in skip and key not in row})
        summary.append({**row, **last_ranks(log)})
        for line in log:
            numbers = {key: f"{x:.6g}" for key, x in line.items()}
            curves.append({"cell": name, **cell.values, **numbers})
    write_csv(os.path.join(out_dir, "sweep.csv"), summary)
    if curves:
        write_csv(os.path.join(out_dir, "curves.csv"), curves)
    return summary, curves


def measurements(path):
    """The ranks, norms and validation in a log.jsonl, a dict a step; none where there is no log."""
    if not path.exists():
        print(f"note: {path} is missing; its run has no ranks and norms in the tables", file=sys.stderr)
        return []
    steps = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        step = line["step"]
        for name, value in line.items():
            if name.startswith(("attn_", "layer", "norm_", "val_")):
                row = steps.setdefault(step, {"step": step})
                row[name] = math.nan if value is None else value  # null: it was not finite
    return list(steps.values())


def last_ranks(log):
    """The last ranks of a run, and the norms at its first and last measurement."""
    ranked = [line for line in log if "norm_all" in line]
    if not ranked:
        return {}
    first, last = ranked[0], ranked[-1]
    row = {name: x for name, x in last.items() if name.startswith(("attn_", "layer"))}
    for name in last:
        if name.startswith("norm_"):
            row[f"{name}_first"] = first[name]
            row[f"{name}_last"] = last[name]
    return {**row, "norm_growth": last["norm_all"] / first["norm_all"]}


# ---------------------------------------------------------------------------- average

def interval(values):
    """(mean, sample standard deviation, low, high) with the 95 % t interval of the mean, else nan."""
    values = list(values)
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan, math.nan, math.nan
    sd = statistics.stdev(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    return mean, sd, mean - half, mean + half


def tabulate(cells, summary, rows, columns, metric):
    """A DataFrame with a row a cell: title (what else varies, as text), row, column, seed, done, value."""
    settings = pd.DataFrame([cell.settings for cell in cells], dtype=object)
    shown = list(dict.fromkeys([rows, columns, "seed"]))
    varied = [name for name in cells[0].values if name not in shown]
    rest = undetermined(settings[[*shown, *varied]], shown)
    titles = [", ".join(f"{name}={as_text(cell.values[name])}" for name in rest) for cell in cells]
    return pd.DataFrame({
        "title": titles,
        "row": settings[rows],
        "column": settings[columns],
        "seed": settings["seed"],
        "done": [row["status"] == "done" for row in summary],
        "value": pd.Series([row.get(metric) for row in summary], dtype=float),
    })


def cell_text(seeds):
    """`9.42 ± 0.12`: mean and standard deviation over seeds; the number of seeds where some are missing."""
    done = seeds.loc[seeds["done"], "value"]
    if done.empty:
        return "missing"
    mean, sd, _, _ = interval(done)
    text = f"{mean:.4g}"
    if len(done) > 1:
        text += f" ± {sd:.2g}"
    if len(done) < len(seeds):
        text += f" ({len(done)} of {len(seeds)})"
    return text


def markdown(table, corner, best=None):
    """One table of tabulate()'s rows and columns as markdown. best: max or min, whose mean is bold."""
    cells = table.groupby(["row", "column"], sort=False)
    texts = {at: cell_text(seeds) for at, seeds in cells}
    means = {at: interval(seeds.loc[seeds["done"], "value"])[0] for at, seeds in cells}
    finite = [at for at in means if math.isfinite(means[at])]
    if best and len(finite) > 1:
        at = best(finite, key=means.get)
        texts[at] = f"**{texts[at]}**"
    wide = pd.Series(texts).unstack(fill_value="")
    wide = wide.reindex(index=table["row"].unique(), columns=table["column"].unique())
    wide = wide.rename(index=as_text, columns=as_text).rename_axis(corner)
    return wide.to_markdown(disable_numparse=True)


def paired(table, rows, columns, metric, baseline):
    """The rows of paired.csv: differences to the baseline's cell, paired over seeds.

    baseline: {rows or columns: value}; what it leaves open is that of the cell itself. {}: coupled decay in
    the same column.
    """
    out = []
    for title, group in table.groupby("title", sort=False):
        cells = {at: seeds.set_index("seed") for at, seeds in group.groupby(["row", "column"], sort=False)}
        for (row, column), seeds in cells.items():
            wanted = baseline or {rows: column}
            other = wanted.get(rows, row), wanted.get(columns, column)
            if (row, column) == other or other not in cells:
                continue
            pairs = seeds.join(cells[other], rsuffix="_other")
            pairs = pairs[pairs["done"] & pairs["done_other"].eq(True)]
            mean, sd, low, high = interval(pairs["value"] - pairs["value_other"])
            out.append({
                "table": title, "metric": metric, columns: column, rows: row,
                "against": ", ".join(f"{name}={as_text(value)}" for name, value in wanted.items()),
                "difference": mean, "sd": sd, "low": low, "high": high,
                "seeds": len(pairs), "seeds_in_grid": len(seeds),
            })
    return out


def paired_markdown(differences, rows, columns):
    lines = []
    for x in differences:
        where = as_text(x[columns])
        if x["table"]:
            where = f"{x['table']}, {where}"
        n = x["seeds"]
        seeds = f"{n} of {x['seeds_in_grid']}" if n < x["seeds_in_grid"] else str(n)
        difference = f"{x['difference']:+.4g}" if n else "missing"
        span = f"{x['low']:+.4g} to {x['high']:+.4g}" if n > 1 else ""
        if n == 1:
            span = "needs two seeds"
        lines.append([where, as_text(x[rows]), difference, span, seeds])
    table = pd.DataFrame(lines, columns=[columns, rows, "difference", "95 % interval", "seeds"])
    return table.to_markdown(index=False, disable_numparse=True)


# ----------------------------------------------------------------------------- report

MAIN_METRICS = ("test_acc", "test_ppl", "val_acc", "val_ppl")  # data may be without test


def main_metric(names):
    """The first of MAIN_METRICS among the names of columns, None if there is none."""
    for metric in MAIN_METRICS:
        if metric in names:
            return metric
    return None


def report(cells, summary, out_dir, rows, columns, metric="", baseline=None):
    """Writes table.md, which it prints, and paired.csv into out_dir; metric "": the first of MAIN_METRICS.

    baseline: {rows or columns: value} of the cell that the others are compared with, None: coupled decay.
    """
    names = {name for row in summary for name in row}
    n_done = sum(row["status"] == "done" for row in summary)
    if metric and metric not in names and n_done:
        raise UserError(f"--metric={metric} is no column of {os.path.join(out_dir, 'sweep.csv')}")
    metric = metric or main_metric(names)
    if metric not in names:
        print("no finished run yet, no table")
        return
    if metric in MAIN_METRICS[2:]:
        print(f"the data has no test split: tables show {metric}")
    best, word = None, ""
    if metric.endswith("acc"):
        best, word = max, ", highest bold"
    elif metric.endswith(("ppl", "loss")):
        best, word = min, ", lowest bold"

    table = tabulate(cells, summary, rows, columns, metric)
    corner = metric if rows == columns else f"{metric}: {rows} \\ {columns}"
    parts = []
    for title, group in table.groupby("title", sort=False):
        if title:
            parts.append(f"{title}:")
        parts.append(markdown(group, corner, best))
    n_seeds = table["seed"].nunique()
    seeds = "1 seed" if n_seeds == 1 else f"{n_seeds} seeds"
    parts.append(f"{metric}, mean ± sample standard deviation over {seeds}{word}; "
                 f"{n_done} of {len(cells)} runs done.")

    differences = []
    if baseline or (rows.endswith("_wd") and columns.endswith("_wd") and rows != columns):
        differences = paired(table, rows, columns, metric, baseline or {})
    if differences:
        other = differences[0]["against"] if baseline else f"coupled decay ({rows} = {columns})"
        parts.append(f"Difference in {metric} to {other}, paired over seeds, with its 95 % t interval:")
        parts.append(paired_markdown(differences, rows, columns))
        write_csv(os.path.join(out_dir, "paired.csv"), differences)

    text = "\n\n".join(parts) + "\n"
    write_atomic(os.path.join(out_dir, "table.md"), lambda file: file.write(text.encode()))
    if sys.stdout.isatty():
        text = re.sub(r"\*\*(.+?)\*\*", "\033[1m\\1\033[0m", text)
    print("\n" + text, end="", flush=True)
