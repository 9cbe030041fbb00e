"""
Figures of saturated transformers (Merrill et al. 2021), drawn from scripts/saturate.py's CSV files.

Each takes the path of its CSV file and returns the path of the PNG beside it.
"""
import os

import matplotlib.pyplot as plt
import numpy as np

from nanorank.figures import style
from nanorank.figures.style import look

KINDS = {"argmax": "#0072B2", "mixed": "0.65", "mean": "#D55E00"}


def saturation(path):
    """Cosine of each layer's state to its state under all parameters x c, trained and random, at the end.

    Where there are snapshots, also over training, beside the norm of the parameters.
    """
    table = style.read_runs(path, ("checkpoint", "step", "init", "layer", "c", "cosine", "param_norm"))
    runs = list(table.groupby("run", sort=False))
    layers = list(max((run for _, run in runs), key=len)["place"].unique())
    trained = style.has_snapshots(table)
    panels = 3 if trained else 1

    fig, axes = plt.subplots(1, panels, figsize=(3.7 * panels - 0.2, 3.1), squeeze=False)
    left, *over = axes[0]
    for i, (name, run) in enumerate(runs):
        last = style.last_rows(run)
        for init, line, fill in (("trained", "-", "full"), ("random", "--", "none")):
            own = style.pick(last, init=init)
            if len(own):
                x = own["place"].map(layers.index)
                label = f"{name}, {init}"
                left.plot(x, own["cosine"], line, markersize=4, fillstyle=fill, label=label, **look(i))
        if trained:
            steps = run.query("init == 'trained' and place != 'output'").groupby("step", sort=False)
            over[0].plot(steps["cosine"].mean(), markersize=3, **look(i))
            over[1].plot(steps["param_norm"].first(), markersize=3, **look(i))

    some = [*range(0, len(layers) - 1, 1 + (len(layers) - 2) // 10), len(layers) - 1]
    left.set_xticks(some, [layers[i] for i in some])
    left.set_title(rf"cosine to parameters $\times$ {table['c'].iloc[0]:g}")
    left.set_xlabel("layer, then what the head reads")
    if trained:
        over[0].set(title="cosine, mean over blocks", xlabel="step")
        over[1].set(title="norm of the parameters", xlabel="step", ylim=(0, None))
    for ax in axes[0, :2]:
        ax.set_ylim(min(0, ax.get_ylim()[0]), 1)
    style.legend(fig, left, 2 * len(runs))
    return style.write(fig, path, "saturation")


def heads_saturated(path):
    """How many positions saturated heads attend to, how far off, and their kinds by layer; a row a run."""
    columns = ("checkpoint", "layer", "head", "positions", "distance", "kind", "available")
    runs = style.by_run(style.last_rows(style.read_runs(path, columns)))

    fig, axes = plt.subplots(len(runs), 3, figsize=(10, 2.5 * len(runs) + 0.4), squeeze=False)
    for (name, run), (a, b, c) in zip(runs, axes):
        kinds = [run[run["kind"] == kind] for kind in KINDS]
        bars = {"stacked": True, "color": list(KINDS.values()), "label": list(KINDS)}
        available = max(2.0, run["available"].max())
        farthest = max(1.0, run["distance"].max())

        a.hist([own["positions"] for own in kinds], np.geomspace(0.94, 1.06 * available, 24), **bars)
        a.axvline(available, color="black", linestyle=":", linewidth=0.8)
        a.set(title=f"positions attended, {name}", ylabel="heads", xscale="log")
        a.set_xlabel("positions, mean over queries; dotted: all")

        b.hist([own["distance"] for own in kinds], np.linspace(0, 1.02 * farthest, 24), **bars)
        b.set(title="distance of what is attended", ylabel="heads")
        b.set_xlabel("tokens (of images patches), mean over queries")

        counts = run.pivot_table("head", "layer", "kind", aggfunc="count")
        counts = counts.reindex(columns=list(KINDS)).fillna(0)
        floor = 0
        for kind, colour in KINDS.items():
            c.bar(counts.index, counts[kind], bottom=floor, color=colour)
            floor = floor + counts[kind]
        c.set(title="kinds by layer", xlabel="layer", ylabel="heads")
        style.whole_numbers(a.yaxis, b.yaxis, c.xaxis, c.yaxis)
    style.legend(fig, axes[0, 0], 3)
    return style.write(fig, path, "heads_saturated")


def scaling(path):
    """The output under all parameters x c, against the saturated and against the unscaled output.

    The right panel has the norm of the last block's state with the exponent k of its fit c^k.
    """
    shape = ("checkpoint", "init", "norm", "bias", "layer", "c")
    table = style.read_runs(path, (*shape, "cosine_saturated", "cosine", "norm_ratio", "k"))
    table["label"] = table.apply(scaling_label, axis=1)

    fig, (a, b, d) = plt.subplots(1, 3, figsize=(10.5, 3.7))
    for i, (label, own) in enumerate(table.groupby("label", sort=False)):
        line = {**look(i), "markersize": 3.5, "linewidth": 1}
        output = own[own["place"] == "output"]
        blocks = own[own["place"] != "output"]
        block = blocks[blocks["place"] == blocks["place"].iloc[-1]]
        a.plot(output["c"], output["cosine_saturated"], label=label, **line)
        b.plot(output["c"], output["cosine"], **line)
        d.loglog(block["c"], block["norm_ratio"], label=f"$k$ = {block['k'].iloc[0]:.2f}", **line)

    a.set_title(r"output $f(c\theta)$: cosine to the saturated one")
    b.set_title(r"output $f(c\theta)$: cosine to $f(\theta)$")
    for ax in (a, b):
        ax.set_ylim(min(0, ax.get_ylim()[0]), 1.02)
    d.set_title(r"last block: $\|f(c\theta)\|\, /\, \|f(\theta)\|$, fitted $c^k$")
    d.xaxis.set_major_formatter("{x:g}")
    d.xaxis.set_minor_formatter("")
    d.legend()
    for ax in (a, b, d):
        ax.set_xlabel("$c$")
    style.legend(fig, a, 3)
    return style.write(fig, path, "scaling")


def scaling_label(row):
    """`demo-4 trained pre-norm, biases`, `untrained post-norm`: the run only where its weights matter."""
    label = row["init"]
    if row["init"] != "untrained":
        label = f"{row['run']} {label}"
    if isinstance(row["norm"], str):  # empty where the architecture is not known
        label += f" {row['norm']}-norm"
        if row["bias"]:
            label += ", biases"
    return label


def saturated(folder, tables):
    """Draws what saturate.py's out_dir allows. tables: the files it wrote. Returns the PNGs' paths."""
    figures = {"saturation.csv": saturation, "heads_saturated.csv": heads_saturated, "scaling.csv": scaling}
    return [draw(os.path.join(folder, name)) for name, draw in figures.items() if name in tables]
