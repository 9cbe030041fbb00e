"""
What all figures share: style and colours, CSV rows read and sorted by run, axes, files written.
"""
import csv
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from nanorank.checkpoints import run_of
from nanorank.errors import UserError
from nanorank.files import writing

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe & Ito, colour-blind safe; 7 and 8 markers: 56 pairs
MARKERS = "osD^vPX*"
PRODUCTS = {"qk": r"$W_K^\top W_Q$", "ov": r"$P\,W_V$"}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "legend.frameon": False,
         "figure.constrained_layout.use": True, "pdf.fonttype": 42, "savefig.dpi": 160}
MOST_RUNS = 4  # rows of a figure that has a row a run
KEYS = ("checkpoint", "step", "layer", "head", "product", "d_head")


def read(path, columns):
    """The rows of a CSV file, dicts of strings. Raises UserError naming the file where it is not there, empty or lacks columns."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}") from None
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        raise UserError(f"{path}: no rows, or no column {missing[0]}")
    return rows


def rank_column(path, rows):
    """rank95, or whatever the threshold rank's column is called. Raises UserError where there is none."""
    name = next((name for name in rows[0] if name.startswith("rank")), None)
    if name is None:
        raise UserError(f"{path}: no column rank95 or the like")
    return name


def by_run(rows):
    """{short name: rows} run by run; the last part of its path where that tells runs apart."""
    runs = {}
    for row in rows:
        runs.setdefault(run_of(row["checkpoint"]), []).append(row)
    names = [os.path.basename(name) for name in runs]
    names = list(runs) if len(set(names)) < len(names) else names
    start, end = os.path.commonprefix(names), os.path.commonprefix([name[::-1] for name in names])[::-1]
    if len(names) > 1 and max(map(len, names)) > 24:  # what they share tells nothing
        names = [f"...{name[len(start):len(name) - len(end)]}" for name in names]
        names = list(runs) if len(set(names)) < len(names) else names
    return dict(zip(names, runs.values()))


def last_of(run):
    """The rows of a run's last checkpoint."""
    return [row for row in run if row["checkpoint"] == run[-1]["checkpoint"]]


def layer_of(row):
    return row.get("stack", ""), int(row["layer"])


def label_layers(axis, layers):
    """Names an axis's integer positions by layer, some twelve of them at most."""
    some = range(0, len(layers), 1 + (len(layers) - 1) // 12)
    axis.set_ticks(list(some), [" ".join(map(str, layers[i])).strip() for i in some])
    if axis.axis_name == "x" and any(stack for stack, _ in layers):
        axis.set_tick_params(rotation=60)


def identity(ax, values, label):
    """The diagonal over the range of values, and a little margin around it."""
    low, high = 0.95 * values.min(), 1.05 * values.max() or 1.0
    ax.plot([low, high], [low, high], color="black", linewidth=0.7, linestyle="--", label=label, zorder=0)
    ax.set_xlim(low, high)


def legend(fig, ax, columns):
    lines, labels = ax.get_legend_handles_labels()
    fit = int(fig.get_figwidth() * 12 / (6 + max(map(len, labels))))  # some 12 letters an inch
    fig.legend(lines, labels, loc="outside upper center", ncols=max(1, min(6, columns, fit)))


def write(fig, folder, name):
    """NAME.png and NAME.pdf in the folder; returns the PNG's path."""
    base = os.path.join(folder, name)
    with writing(f"{base}.png"):
        fig.savefig(f"{base}.png")
    fig.set_layout_engine("none")  # as laid out for the PNG: twice would take as long again
    with writing(f"{base}.pdf"):
        fig.savefig(f"{base}.pdf")
    plt.close(fig)
    return f"{base}.png"
