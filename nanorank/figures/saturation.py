"""
Figures of saturate.py: N4, N5, N6. `python -m scripts.figures saturation out/saturation/saturation.csv` draws them.
"""
import os

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from nanorank.figures.style import COLOURS, MARKERS, MOST_RUNS, STYLE, by_run, last_of, legend, read, write

KINDS = {"argmax": "#0072B2", "mixed": "0.65", "mean": "#D55E00"}


def saturation(path):
    """N5 from saturation.csv: cosine of each layer's state to that under all parameters x c, trained and random, at the end of each run; where there
    are snapshots also over training, beside the norm of the parameters. Returns the PNG's path."""
    rows = read(path, ("checkpoint", "step", "init", "layer", "c", "cosine", "param_norm"))
    runs = by_run(rows)
    trained = any(len({row["step"] for row in run}) > 1 for run in runs.values())
    layers = list(dict.fromkeys(row["layer"] for row in max(runs.values(), key=len)))
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, 1 + 2 * trained, figsize=(3.7 * (1 + 2 * trained) - 0.2, 3.1), squeeze=False)
        left, *over = axes[0]
        for i, (name, run) in enumerate(runs.items()):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            for init, line in (("trained", "-"), ("random", "--")):
                own = [row for row in last_of(run) if row["init"] == init]
                left.plot([layers.index(row["layer"]) for row in own], [float(row["cosine"]) for row in own], line, color=colour, marker=marker,
                          markersize=4, fillstyle="full" if init == "trained" else "none", label=f"{name}, {init}" if own else None)
            steps = {}
            for row in run:
                if row["init"] == "trained":
                    steps.setdefault(int(row["step"]), []).append(row)
            if over:
                mean = [np.mean([float(row["cosine"]) for row in at if row["layer"] != "output"]) for at in steps.values()]
                over[0].plot(list(steps), mean, color=colour, marker=marker, markersize=3)
                over[1].plot(list(steps), [float(at[0]["param_norm"]) for at in steps.values()], color=colour, marker=marker, markersize=3)
        some = [*range(0, len(layers) - 1, 1 + (len(layers) - 2) // 10), len(layers) - 1]
        left.set_xticks(some, [layers[i] for i in some])
        left.set(title=rf"cosine to parameters $\times$ {float(rows[0]['c']):g}", xlabel="layer, then what the head reads",
                 ylim=(min(0, left.get_ylim()[0]), 1))
        if over:
            over[0].set(title="cosine, mean over blocks", xlabel="step", ylim=(min(0, over[0].get_ylim()[0]), 1))
            over[1].set(title="norm of the parameters", xlabel="step", ylim=(0, None))
        legend(fig, left, 2 * len(runs))
        return write(fig, os.path.dirname(path), "saturation")


def heads_saturated(path):
    """N6 from heads_saturated.csv, a row a run: how many positions heads attend to, how far off, and their kinds layer by layer.
    Returns the PNG's path."""
    rows = read(path, ("checkpoint", "layer", "head", "positions", "distance", "kind", "available"))
    runs = dict(list(by_run(rows).items())[:MOST_RUNS])
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(len(runs), 3, figsize=(10, 2.5 * len(runs) + 0.4), squeeze=False)
        for (name, run), (a, b, c) in zip(runs.items(), axes):
            last = last_of(run)
            layers = sorted({int(row["layer"]) for row in last})
            kinds = {kind: [row for row in last if row["kind"] == kind] for kind in KINDS}
            far = max(2.0, max(float(row["available"]) for row in last))
            for ax, column, edges in ((a, "positions", np.geomspace(0.94, 1.06 * far, 24)),
                                      (b, "distance", np.linspace(0, 1.02 * max(1.0, max(float(row["distance"]) for row in last)), 24))):
                ax.hist([[float(row[column]) for row in own] for own in kinds.values()], edges, stacked=True, color=list(KINDS.values()),
                        label=list(kinds))
                ax.set_ylabel("heads")
                ax.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
            a.axvline(far, color="black", linestyle=":", linewidth=0.8)
            a.set(title=f"positions attended, {name}", xlabel="positions, mean over queries; dotted: all", xscale="log")
            b.set(title="distance of what is attended", xlabel="tokens (of images patches), mean over queries")
            floor = np.zeros(len(layers))
            for kind, own in kinds.items():
                count = np.array([sum(int(row["layer"]) == layer for row in own) for layer in layers])
                c.bar(layers, count, bottom=floor, color=KINDS[kind])
                floor += count
            c.set(title="kinds by layer", xlabel="layer", ylabel="heads")
            for axis in (c.xaxis, c.yaxis):
                axis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        legend(fig, axes[0, 0], 3)
        return write(fig, os.path.dirname(path), "heads_saturated")


def scaling(path):
    """N4 from scaling.csv: the output under all parameters x c against the saturated one and against the unscaled one, and the norm of the
    last block's state with its exponent. Returns the PNG's path."""
    rows = read(path, ("checkpoint", "init", "norm", "bias", "layer", "c", "cosine_saturated", "cosine", "norm_ratio", "k"))
    lines = {}
    for name, run in by_run(rows).items():
        for row in run:
            shape = f"{row['norm']}-norm{', biases' if row['bias'] == 'True' else ''}" if row["norm"] else ""
            lines.setdefault(" ".join([*([] if row["init"] == "untrained" else [name]), row["init"], shape]).strip(), []).append(row)
    with plt.rc_context(STYLE):
        fig, (a, b, d) = plt.subplots(1, 3, figsize=(10.5, 3.7))
        for i, (label, own) in enumerate(lines.items()):
            output, block = ([row for row in own if (row["layer"] == "output") == last] for last in (True, False))
            block = [row for row in block if row["layer"] == block[-1]["layer"]]
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 3.5, "linewidth": 1}
            x = [float(row["c"]) for row in output]
            a.plot(x, [float(row["cosine_saturated"]) for row in output], label=label, **look)
            b.plot(x, [float(row["cosine"]) for row in output], **look)
            d.loglog(x, [float(row["norm_ratio"]) for row in block], label=f"$k$ = {float(block[0]['k']):.2f}", **look)
        a.set(title=r"output $f(c\theta)$: cosine to the saturated one", ylim=(min(0, a.get_ylim()[0]), 1.02))
        b.set(title=r"output $f(c\theta)$: cosine to $f(\theta)$", ylim=(min(0, b.get_ylim()[0]), 1.02))
        d.set(title=r"last block: $\|f(c\theta)\|\, /\, \|f(\theta)\|$, fitted $c^k$")
        d.xaxis.set_major_formatter("{x:g}")
        d.xaxis.set_minor_formatter("")
        d.legend()
        for ax in (a, b, d):
            ax.set_xlabel("$c$")
        legend(fig, a, 3)
        return write(fig, os.path.dirname(path), "scaling")


def saturated(folder, tables):
    """All that saturate.py draws in its out_dir: `tables` are those it wrote. Returns the PNGs' paths."""
    return [draw(os.path.join(folder, f"{draw.__name__}.csv")) for draw in (saturation, heads_saturated, scaling) if f"{draw.__name__}.csv" in tables]
