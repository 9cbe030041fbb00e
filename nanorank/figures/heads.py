"""
Figures of attention heads and parameter norms, drawn from analyze.py's CSV files.

Each takes the path of its CSV file and returns the path of the PNG beside it.
"""
import os

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, Normalize

from nanorank.errors import UserError
from nanorank.figures import style
from nanorank.figures.style import FACTORS, HEAD_COLUMNS, PRODUCTS, look, pick
from nanorank.tables import regularised

SUM_OVER_PLANES = r"$\sum_j \|a_j\|\,\|b_j\|$ over rotary planes"


def heads(path, chosen=()):
    """Threshold rank of every head by layer, and its mean over training. chosen: layers' numbers, or all."""
    table = style.read_runs(path, HEAD_COLUMNS)
    rank = style.rank_column(path, table)
    last = style.last_rows(table)
    if chosen:
        last = last[last["layer"].isin(chosen)]
    places = list(last["place"].unique())
    if not places:
        raise UserError(f"{path}: no layer {', '.join(map(str, chosen))}")
    runs = list(table["run"].unique())
    trained = style.has_snapshots(table)
    rows = 2 if trained else 1

    width = min(14, 7.2 + max(0, len(places) - 16) * 0.12)
    fig, axes = plt.subplots(rows, 2, figsize=(width, 2.6 * rows + 0.3), sharey=True, squeeze=False)
    dot_size = max(3, 40 / (len(places) * len(runs)) ** 0.5)
    for (product, symbol), (ax, *below) in zip(PRODUCTS.items(), axes.T):
        for i, name in enumerate(runs):
            own = pick(last, run=name, product=product)
            # heads of a layer stand side by side, runs too
            n_head = own["head"].max() + 1
            within = (i + (own["head"] + 0.5) / n_head) / len(runs) - 0.5
            x = own["place"].map(places.index) + 0.8 * within
            ax.scatter(x, own[rank], s=dot_size, alpha=0.8, linewidth=0, label=name, **look(i))
            if trained:
                mean = pick(table, run=name, product=product).groupby("step")[rank].mean()
                below[0].plot(mean, markersize=3, **look(i))
        ax.set(title=f"{symbol}, every head" + (" at the end" if trained else ""), xlabel="layer")
        style.label_layers(ax.xaxis, places)
        if trained:
            below[0].set(title=f"{symbol}, mean over heads", xlabel="step")

    widths = "/".join(map(str, sorted(table["d_head"].unique())))
    for ax in axes[:, 0]:
        ax.set_ylabel(f"{rank} (heads of width {widths})")
    axes[0, 0].set_ylim(0, 1.05 * table["d_head"].max())
    style.legend(fig, axes[0, 0], len(runs))
    return style.write(fig, path, "heads")


def nuclear_norm(path):
    """Nuclear norm of every head against half the squared norms of its factors, and these against each other.

    Balanced heads lie on the diagonal. Grey rings: Gaussian factors of the same shapes and norms.
    Where queries share keys, a dot is a key/value head with all its queries. Where q and k turn, the sum
    over rotary planes takes the nuclear norm's place. Titles and axes say so.
    """
    columns = (*HEAD_COLUMNS, "half_sq_norm", "nuclear", "gap_gaussian", "norm_A", "norm_B")
    runs = style.by_run(style.last_rows(style.read_runs(path, columns)))
    rings = {"s": 12, "facecolor": "none", "edgecolor": "0.55", "linewidth": 0.6}

    fig, axes = plt.subplots(len(runs), 4, figsize=(11.5, 2.75 * len(runs) + 0.3), squeeze=False)
    for (name, run), line in zip(runs, axes):
        places = list(run["place"].unique())
        last_layer = max(1, len(places) - 1)
        for (product, symbol), left, right in zip(PRODUCTS.items(), line[:2], line[2:]):
            own = regularised(run, product)
            layer = own["place"].map(places.index)
            dots = {"c": layer, "s": 9, "cmap": "viridis", "vmin": 0, "vmax": last_layer, "linewidth": 0}
            half, norm = own["half_sq_norm"], own["norm"]
            a, b = FACTORS[product]

            left.scatter(half, half * (1 - own["norm_gap_gaussian"]), label="Gaussian factors", **rings)
            left.scatter(half, norm, label="heads", **dots)
            identity(left, half, norm, "balanced")
            left.set(title=title(own, product, symbol, name), ylabel=norm_label(own, symbol))
            left.set_xlabel(rf"$\frac{{1}}{{2}}(\|{a}\|^2 + \|{b}\|^2)$")

            points = right.scatter(own["norm_A"], own["norm_B"], **dots)
            identity(right, own["norm_A"], own["norm_B"], "equal")
            right.set(xlabel=rf"$\|{a}\|$", ylabel=rf"$\|{b}\|$")
        bar = fig.colorbar(points, ax=line[3], label="layer")
        style.label_layers(bar.ax.yaxis, places)
    style.legend(fig, axes[0, 0], 3)
    return style.write(fig, path, "nuclear_norm")


def title(rows, product, symbol, name):
    """Names the product of rows of tables.regularised, and what is special about it on a second line."""
    notes = []
    if rows["product"].iloc[0] != product:
        notes.append("all queries of a key")
    if "none" in set(rows["regulariser"]):
        notes.append("QK-norm: decay closes no gap")
    return "\n".join([f"{symbol}, {name}", *([", ".join(notes)] if notes else [])])


def norm_label(rows, symbol):
    """The axis label of the norm that L2 on the factors becomes, or of the nuclear norm where it is none."""
    kinds = set(rows["regulariser"])
    if kinds == {"planes"}:
        return SUM_OVER_PLANES
    if "planes" in kinds:
        return f"nuclear norm of {symbol},\nor {SUM_OVER_PLANES}"
    return f"nuclear norm of {symbol}"


def identity(ax, x, y, label):
    """The diagonal over the range of the values, and a little margin around it."""
    low = 0.95 * min(x.min(), y.min())
    high = 1.05 * max(x.max(), y.max()) or 1.0
    ax.plot([low, high], [low, high], "k--", linewidth=0.7, label=label, zorder=0)
    ax.set_xlim(low, high)


def heatmap(path):
    """Threshold rank, layer x head, a row a run; both products on one scale."""
    table = style.last_rows(style.read_runs(path, HEAD_COLUMNS))
    rank = style.rank_column(path, table)
    runs = style.by_run(table)
    heights = [min(4.5, 0.35 * run["place"].nunique() + 0.5) for _, run in runs]

    size = (7.2, sum(heights) + 0.9 * len(runs))
    fig, axes = plt.subplots(len(runs), 2, figsize=size, squeeze=False, height_ratios=heights)
    for (name, run), line in zip(runs, axes):
        places = list(run["place"].unique())
        scale = {"cmap": "cividis", "vmin": 0, "vmax": run["d_head"].max()}
        for ax, (product, symbol) in zip(line, PRODUCTS.items()):
            own = pick(run, product=product)
            ranks = own.pivot(index="place", columns="head", values=rank)
            ranks = ranks.reindex(index=places, columns=range(run["head"].max() + 1))
            image = ax.imshow(ranks, aspect="auto", interpolation="none", **scale)
            ax.set(title=f"{symbol}, {name}", xlabel="head")
            style.whole_numbers(ax.xaxis)
            style.label_layers(ax.yaxis, places)
        line[0].set_ylabel("layer")
        fig.colorbar(image, ax=line, label=rank)
    return style.write(fig, path, "heatmap")


def spectra(path):
    """Singular values relative to the largest: a line a layer, the median over its heads; a row a run."""
    runs = style.by_run(style.read_runs(path, (*HEAD_COLUMNS, "s1")))

    size = (7.6, 2.6 * len(runs) + 0.2)
    fig, axes = plt.subplots(len(runs), 2, figsize=size, sharey=True, squeeze=False)
    for (name, run), line in zip(runs, axes):
        places = list(run["place"].unique())
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(places)))
        for ax, (product, symbol) in zip(line, PRODUCTS.items()):
            for colour, place in zip(colours, places):
                own = pick(run, product=product, place=place).query("s1 > 0")
                if own.empty:
                    continue
                values = own.loc[:, "s1":f"s{own['d_head'].iloc[0]}"]
                median = values.div(own["s1"], axis=0).median().to_numpy()
                median = np.where(median > 1e-13, median, np.nan)  # zeros are left out
                ax.semilogy(range(1, len(median) + 1), median, color=colour, linewidth=1)
            ax.set(title=f"{symbol}, {name}", xlabel="index $i$")
        line[0].set_ylabel(r"$s_i / s_1$, median over heads")

        scale = plt.cm.ScalarMappable(Normalize(-0.5, len(places) - 0.5), ListedColormap(colours))
        bar = fig.colorbar(scale, ax=line, label="layer")
        style.label_layers(bar.ax.yaxis, places)
    low = min(ax.get_ylim()[0] for ax in axes.flat)
    axes[0, 0].set_ylim(max(low, 1e-8), 1.5)
    return style.write(fig, path, "spectra")


def norms(path):
    """Norms of the parameters over training, and the cosine to the checkpoint before, a row a run.

    The dashed line is the best fit of a sqrt(step) + b (Merrill et al. 2021).
    """
    table = style.read_runs(path, ("checkpoint", "step", "group", "norm", "cos_prev"))
    table = table[table["step"] >= 0]  # -1: not known
    if not style.has_snapshots(table):
        raise UserError(f"{path}: no run with two steps in it")
    runs = style.by_run(table)
    groups = ["all", "attn", "mlp", "embed"]

    fig, axes = plt.subplots(len(runs), 2, figsize=(7.6, 2.6 * len(runs) + 0.3), squeeze=False)
    for (name, run), (left, right) in zip(runs, axes):
        for i, group in enumerate(groups):
            own = run[run["group"] == group]
            line = {**look(i), "markersize": 3, "linewidth": 0.8}
            left.plot(own["step"], own["norm"], label=group, **line)
            right.plot(own["step"], own["cos_prev"], **line)

            own = own[own["step"] > 0]
            if len(own) > 2:
                a, b = np.polyfit(np.sqrt(own["step"]), own["norm"], 1)
                t = np.linspace(0, own["step"].max(), 200)
                label = r"$a\sqrt{t} + b$" if group == groups[-1] else None
                left.plot(t, a * np.sqrt(t) + b, "--", color="0.4", linewidth=0.7, label=label)

        layers = run[~run["group"].isin(groups)]
        for i, (_, own) in enumerate(layers.groupby("group")):
            label = "each layer" if i == 0 else None
            right.plot(own["step"], own["cos_prev"], color="0.7", linewidth=0.5, zorder=0, label=label)
        left.set(title=f"norm of the parameters, {name}", xlabel="step", ylim=(0, None))
        right.set(title=f"cosine to the checkpoint before, {name}", xlabel="step")
        right.ticklabel_format(axis="y", useOffset=False)

    lines, labels = axes[0, 0].get_legend_handles_labels()
    more_lines, more_labels = axes[0, 1].get_legend_handles_labels()
    fig.legend(lines + more_lines, labels + more_labels, loc="outside upper center", ncols=6)
    return style.write(fig, path, "norms")


def analysis(folder, tables, chosen=()):
    """Draws what analyze.py's out_dir allows, given the names of its tables; chosen: as in heads()."""
    heads_csv = os.path.join(folder, "heads.csv")
    drawn = [heads(heads_csv, chosen), nuclear_norm(heads_csv), heatmap(heads_csv)]
    drawn.append(spectra(os.path.join(folder, "spectra.csv")))
    if "fits" in tables:
        drawn.append(norms(os.path.join(folder, "norms.csv")))
    return drawn
