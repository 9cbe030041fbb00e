"""
The tables of a grid of runs: a row a run, curves over training, means over seeds, paired differences.

scripts/sweep.py calls collect() and report() with its cells. A cell has a name, a folder, the settings
that vary (`values`) and all `settings`.
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

def collect(cells, results, failed, skip):
    """(rows of sweep.csv, rows of curves.csv), dicts.

    results: {cell's name: its result.json, or None}. failed: the names of cells that failed.
    skip: names in result.json that have no column. A cell without a result has a row without numbers.
    """
    summary = []
    curves = []
    for cell in cells:
        result = results[cell.name]
        if result is None:
            status = "failed" if cell.name in failed else "missing"
            summary.append({"cell": cell.name, "status": status, **cell.values})
            continue
        row = {"cell": cell.name, "status": "done", **cell.values}
        for name, value in result.items():
            if name not in skip and name not in row:
                row[name] = value
        log = measurements(os.path.join(cell.folder, "log.jsonl"))
        row.update(last_ranks(log))
        summary.append(row)
        for line in log:
            numbers = {name: f"{value:.6g}" for name, value in line.items()}
            curves.append({"cell": cell.name, **cell.values, **numbers})
    return summary, curves


def measurements(path):
    """The ranks, norms and validation in a log.jsonl, a dict a step; none where there is no log."""
    if not os.path.exists(path):
        print(f"note: {path} is missing; its run has no ranks and norms in the tables", file=sys.stderr)
        return []
    steps = {}
    with open(path, encoding="utf-8") as file:
        for text in file:
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
    first = ranked[0]
    last = ranked[-1]
    row = {name: value for name, value in last.items() if name.startswith(("attn_", "layer"))}
    for name in last:
        if name.startswith("norm_"):
            row[f"{name}_first"] = first[name]
            row[f"{name}_last"] = last[name]
    row["norm_growth"] = last["norm_all"] / first["norm_all"]
    return row


# ---------------------------------------------------------------------------- average

def interval(values):
    """(mean, sample standard deviation, low, high) with the 95 % t interval of the mean.

    The last three are nan for fewer than two values, or where one is not finite.
    """
    values = list(values)
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan, math.nan, math.nan
    sd = statistics.stdev(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    return mean, sd, mean - half, mean + half


def tabulate(cells, summary, rows, columns, metric):
    """A DataFrame with a row a cell: title, row, column, seed, done, value.

    row, column: the values of the settings named `rows` and `columns`. title: what else varies, as text.
    value: the metric, nan where it was not finite or the run is not done.
    """
    settings = pd.DataFrame([cell.settings for cell in cells], dtype=object)
    shown = list(dict.fromkeys([rows, columns, "seed"]))
    varied = [name for name in cells[0].values if name not in shown]
    rest = undetermined(settings[[*shown, *varied]], shown)

    lines = []
    for cell, row in zip(cells, summary):
        done = row["status"] == "done"
        value = row.get(metric) if done else None
        lines.append({
            "title": ", ".join(f"{name}={as_text(cell.values[name])}" for name in rest),
            "row": cell.settings[rows],
            "column": cell.settings[columns],
            "seed": cell.settings["seed"],
            "done": done,
            "value": math.nan if value is None else float(value),
        })
    return pd.DataFrame(lines)


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
    texts = {}
    means = {}
    for at, seeds in table.groupby(["row", "column"], sort=False):
        texts[at] = cell_text(seeds)
        mean = interval(seeds.loc[seeds["done"], "value"])[0]
        if math.isfinite(mean):
            means[at] = mean
    if best and len(means) > 1:
        at = best(means, key=means.get)
        texts[at] = f"**{texts[at]}**"

    wide = pd.Series(texts).unstack(fill_value="")
    wide = wide.reindex(index=table["row"].unique(), columns=table["column"].unique())
    wide = wide.rename(index=as_text, columns=as_text).rename_axis(corner)
    return wide.to_markdown(disable_numparse=True)


def paired(table, rows, columns, metric):
    """Differences to coupled decay (both settings equal) in the same column: rows of paired.csv.

    They are paired over the seeds that both have.
    """
    out = []
    for title, group in table.groupby("title", sort=False):
        by_cell = group.groupby(["row", "column"], sort=False)
        cells = {at: seeds.set_index("seed") for at, seeds in by_cell}
        for (row, column), seeds in cells.items():
            if row == column or (column, column) not in cells:
                continue
            pairs = seeds.join(cells[column, column], rsuffix="_coupled")
            pairs = pairs[pairs["done"] & pairs["done_coupled"].eq(True)]
            mean, sd, low, high = interval(pairs["value"] - pairs["value_coupled"])
            out.append({
                "table": title,
                "metric": metric,
                columns: column,
                rows: row,
                "against": f"{rows}={as_text(column)}",
                "difference": mean,
                "sd": sd,
                "low": low,
                "high": high,
                "seeds": len(pairs),
                "seeds_in_grid": len(seeds),
            })
    return out


def paired_markdown(differences, rows, columns):
    lines = []
    for x in differences:
        where = as_text(x[columns])
        if x["table"]:
            where = f"{x['table']}, {where}"
        seeds = str(x["seeds"])
        if x["seeds"] < x["seeds_in_grid"]:
            seeds += f" of {x['seeds_in_grid']}"
        difference = f"{x['difference']:+.4g}" if x["seeds"] else "missing"
        span = ""
        if x["seeds"] == 1:
            span = "takes two seeds"
        elif x["seeds"] > 1:
            span = f"{x['low']:+.4g} to {x['high']:+.4g}"
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


def report(cells, summary, out_dir, rows, columns, metric=""):
    """Writes table.md and paired.csv into out_dir and prints the former.

    rows, columns: the settings that have a row and a column a value. metric: a column of sweep.csv;
    empty: the first of MAIN_METRICS that is one. Raises UserError where the metric is no column.
    """
    names = {name for row in summary for name in row}
    is_done = [row["status"] == "done" for row in summary]
    if metric and metric not in names and any(is_done):
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
    parts.append(
        f"{metric}, mean ± sample standard deviation over {seeds}{word}; "
        f"{sum(is_done)} of {len(cells)} runs done."
    )

    differences = []
    if rows.endswith("_wd") and columns.endswith("_wd") and rows != columns:
        differences = paired(table, rows, columns, metric)
    if differences:
        parts.append(
            f"Difference in {metric} to coupled decay ({rows} = {columns}), paired over seeds, "
            "with its 95 % t interval:"
        )
        parts.append(paired_markdown(differences, rows, columns))
        write_csv(os.path.join(out_dir, "paired.csv"), differences)

    text = "\n\n".join(parts) + "\n"
    write_atomic(os.path.join(out_dir, "table.md"), lambda file: file.write(text.encode()))
    if sys.stdout.isatty():
        text = re.sub(r"\*\*(.+?)\*\*", "\033[1m\\1\033[0m", text)
    print("\n" + text, end="", flush=True)
