"""
Figures of pretrained models, drawn from scripts/pretrained.py's heads.csv and the models.csv beside it.

Each takes the path of heads.csv and returns the path of the PNG beside it.
"""
import os

import matplotlib.pyplot as plt
import numpy as np

from nanorank.figures import style
from nanorank.figures.style import COLOURS, FACTORS, PRODUCTS, pick
from nanorank.tables import read_csv, whole_products

COLUMNS = ["model", "stack", "layer", "head", "product", "d_head", "rank95", "rank95_gaussian", "right_gap",
           "right_gap_gaussian", "norm_A", "norm_B"]


def read(path):
    """(heads, models) of heads.csv and models.csv; heads have a column `row`, the model with its stack."""
    heads = read_csv(path, COLUMNS)
    models = read_csv(os.path.join(os.path.dirname(path), "models.csv"), ["model", "weight_decay"])
    heads["stack"] = heads["stack"].fillna("")
    heads["row"] = (heads["model"] + " " + heads["stack"]).str.strip()
    return heads, models


def colours_of(models):
    """{model: colour}, a colour for each weight decay as published."""
    decays = sorted(set(models["weight_decay"].astype(str)))
    colours = dict(zip(decays, COLOURS))
    colours["unknown"] = "0.5"
    return {model: colours[str(decay)] for model, decay in zip(models["model"], models["weight_decay"])}


def pretrained(path):
    """The gap that L2 closes and rank95 over the width, of every head of every model."""
    heads, models = read(path)
    colours = colours_of(models)
    rows = list(heads["row"].unique())
    fig, axes = plt.subplots(1, 4, figsize=(11.5, 0.29 * len(rows) + 1.3), sharey=True)
    for i, (product, symbol) in enumerate(PRODUCTS.items()):
        gaps = whole_products(heads, product)
        strips(axes[i], gaps, gaps["right_gap"], gaps["right_gap_gaussian"], rows, colours)
        axes[i].set(title=symbol, xlabel="gap", xscale="log")
        own = pick(heads, product=product)
        shares = own["rank95"] / own["d_head"], own["rank95_gaussian"] / own["d_head"]
        strips(axes[2 + i], own, *shares, rows, colours)
        axes[2 + i].set(title=symbol, xlabel="rank95 / width of the head", xlim=(0, 1.03))
    low = min(axes[0].get_xlim()[0], axes[1].get_xlim()[0])
    for ax in axes[:2]:
        ax.set_xlim(low, 0.7)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)

    handles = [plt.Line2D([], [], linestyle="", marker="|", color="k", markersize=10, markeredgewidth=1.6,
                          label="Gaussian factors, mean")]
    decays = dict(zip(models["weight_decay"].astype(str), (colours[model] for model in models["model"])))
    for decay in sorted(decays):
        handles.append(plt.Line2D([], [], linestyle="", marker="o", color=decays[decay],
                                  label=f"weight decay {decay}"))
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return style.write(fig, path, "pretrained")


def strips(ax, heads, values, gaussian, rows, colours):
    """A strip for each row: a dot a head, a large one at the mean, a bar at Gaussian factors' mean."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(rows):
        own = heads["row"] == name
        x = values[own].dropna()
        ax.axhline(i, color="0.92", linewidth=6, zorder=0)
        if x.empty:
            ax.annotate("no norm", (0.03, i), xycoords=("axes fraction", "data"), va="center", fontsize=7)
            continue
        colour = colours[heads.loc[own, "model"].iloc[0]]
        jitter = rng.uniform(-0.28, 0.28, len(x))
        ax.scatter(x, i + jitter, s=5, color=colour, alpha=0.45, linewidth=0)
        ax.plot(gaussian[own].mean(), i, "|", color="k", markersize=13, markeredgewidth=1.6)
        ax.plot(x.mean(), i, "o", color=colour, markersize=6, markeredgecolor="k", markeredgewidth=0.8)


def factors(path):
    """Half the squared norms of the factors against the norm that L2 becomes, and the norms of the factors.

    Balanced heads lie on the diagonal. Grey rings: Gaussian factors of the same shapes and norms. As for
    Llama 2 in Kobayashi et al. 2024, a row a model.
    """
    heads, models = read(path)
    rings = {"s": 12, "facecolor": "none", "edgecolor": "0.55", "linewidth": 0.6}
    fig, axes = plt.subplots(len(models), 4, figsize=(8.4, 1.5 * len(models) + 0.6), squeeze=False)
    for row, (name, line) in enumerate(zip(models["model"], axes)):
        for i, (product, symbol) in enumerate(PRODUCTS.items()):
            own = pick(whole_products(heads, product), model=name)
            layer = own["row"] + own["layer"].astype(str).str.zfill(3)
            dots = {"c": layer.rank(method="dense"), "s": 8, "cmap": "viridis", "linewidth": 0}
            half = (own["norm_A"]**2 + own["norm_B"]**2) / 2
            a, b = FACTORS[product]
            left, right = line[i], line[2 + i]
            if own["right_gap"].notna().any():
                left.scatter(half, half * (1 - own["right_gap_gaussian"]), label="Gaussian factors", **rings)
                left.scatter(half, half * (1 - own["right_gap"]), label="heads", **dots)
                diagonal(left, half, half)
            else:
                left.text(0.5, 0.5, "q and k are normed:\nL2 becomes no norm", ha="center", va="center",
                          transform=left.transAxes, fontsize=8)
                left.set(xticks=[], yticks=[])
            right.scatter(own["norm_A"], own["norm_B"], **dots)
            diagonal(right, own["norm_A"], own["norm_B"])
            if row == 0:
                left.set_title(f"norm of {symbol}\nover half squared norms", fontsize=9)
                right.set_title(rf"$\|{b}\|$ over $\|{a}\|$", fontsize=9)
        line[0].set_ylabel(name, fontsize=8)
    for ax in axes.flat:
        ax.tick_params(labelsize=7)
    labelled = max(axes.flat, key=lambda ax: len(ax.get_legend_handles_labels()[1]))
    style.legend(fig, labelled, 3)
    return style.write(fig, path, "factors", dpi=100)


def diagonal(ax, x, y):
    """The diagonal over the range of the values, both axes alike."""
    low = 0.9 * min(x.min(), y.min())
    high = 1.08 * max(x.max(), y.max())
    ax.plot([low, high], [low, high], "k--", linewidth=0.7, label="balanced", zorder=0)
    ax.set(xlim=(low, high), ylim=(low, high))
    ax.locator_params(nbins=4)
