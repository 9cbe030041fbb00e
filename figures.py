"""
CSV in, figures out: one function a figure, PNG and PDF beside the CSV it was drawn from.

    python figures.py heads out/analysis/heads.csv      # rank of every head, and over training: what analyze.py draws at its end
"""
import csv
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from checkpoints import run_of
from common import input_errors

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]  # Okabe & Ito, colour-blind safe
MARKERS = "osD^vPX*"
PRODUCTS = {"qk": r"$W_K^\top W_Q$", "ov": r"$P\,W_V$"}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "legend.frameon": False,
         "figure.constrained_layout.use": True, "pdf.fonttype": 42, "savefig.dpi": 160}


def heads(path):
    """Threshold rank of every head by layer, and its mean over training where there are snapshots, from heads.csv; one colour a
    run. Returns the PNG's path. Raises ValueError where the file is not a heads.csv."""
    rows = read(path, ("checkpoint", "step", "layer", "head", "product", "d_head"))
    rank = next((name for name in rows[0] if name.startswith("rank")), None)
    if rank is None:
        raise ValueError(f"{path}: no column rank95 or the like")
    runs = {}
    for row in rows:
        runs.setdefault(run_of(row["checkpoint"]), []).append(row)
    short = [os.path.basename(name) for name in runs]
    runs = {name if short.count(os.path.basename(name)) > 1 else os.path.basename(name): run for name, run in runs.items()}
    trained = any(len({row["step"] for row in run}) > 1 for run in runs.values())
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1 + trained, 2, figsize=(7.2, 2.6 * (1 + trained) + 0.3), sharey=True, squeeze=False)
        for column, (product, symbol) in enumerate(PRODUCTS.items()):
            for i, (name, run) in enumerate(runs.items()):
                colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
                run = [row for row in run if row["product"] == product]
                last = [row for row in run if row["checkpoint"] == run[-1]["checkpoint"]]
                layers = sorted({(row.get("stack", ""), int(row["layer"])) for row in last})
                n_head = 1 + max(int(row["head"]) for row in last)  # heads of a layer stand side by side, runs too
                within = [0.8 * ((i + (int(row["head"]) + 0.5) / n_head) / len(runs) - 0.5) for row in last]
                x = [layers.index((row.get("stack", ""), int(row["layer"]))) + shift for row, shift in zip(last, within)]
                axes[0, column].scatter(x, [float(row[rank]) for row in last], s=max(3, 40 / (len(layers) * len(runs))**0.5),
                                        color=colour, marker=marker, alpha=0.8, linewidth=0, label=name)
                steps = sorted({int(row["step"]) for row in run})
                if trained:
                    at = [[float(row[rank]) for row in run if int(row["step"]) == step] for step in steps]
                    axes[1, column].plot(steps, [sum(v) / len(v) for v in at], color=colour, marker=marker, markersize=3, label=name)
            axes[0, column].set_title(f"{symbol}, every head at the end")
            axes[0, column].set_xlabel("layer")
            axes[0, column].set_xticks(range(len(layers)), [" ".join(map(str, layer)).strip() for layer in layers])
            if trained:
                axes[1, column].set_title(f"{symbol}, mean over heads")
                axes[1, column].set_xlabel("step")
        for ax in axes[:, 0]:
            ax.set_ylabel(f"{rank} (heads of width {rows[0]['d_head']})")
        axes[0, 0].set_ylim(0, 1.05 * max(int(row["d_head"]) for row in rows))
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(runs)))
        return write(fig, path)


def read(path, columns):
    """The rows of a CSV file, dicts of strings. Raises ValueError naming the file where it is not there, empty or lacks columns."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from None
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"{path}: no rows, or no column {missing[0]}")
    return rows


def write(fig, path):
    """PNG and PDF beside `path`; returns the PNG's."""
    base = os.path.splitext(path)[0]
    fig.savefig(f"{base}.pdf")
    fig.savefig(f"{base}.png")
    plt.close(fig)
    return f"{base}.png"


FIGURES = {"heads": heads}

if __name__ == "__main__":
    with input_errors("figures.py"):
        if len(sys.argv) != 3 or sys.argv[1] not in FIGURES:
            if sys.argv[1:] in (["--help"], ["-h"]):
                print(__doc__.strip())
                raise SystemExit(0)
            raise ValueError(f"usage: python figures.py {'|'.join(FIGURES)} FILE.csv")
        print(FIGURES[sys.argv[1]](sys.argv[2]))
