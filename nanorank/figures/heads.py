"""
Figures of attention heads and parameter norms, drawn from analyze.py's CSV files.
"""
import os

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from nanorank.errors import UserError
from nanorank.figures.style import (
    COLOURS,
    HEAD_COLUMNS,
    MARKERS,
    MOST_RUNS,
    PRODUCTS,
    STYLE,
    by_run,
    has_snapshots,
    identity,
    label_layers,
    last_rows,
    legend,
    look,
    rank_column,
    read_runs,
    whole_numbers,
    write,
)

FACTORS = {"qk": ("W_K", "W_Q"), "ov": ("P", "W_V")}


def heads(path, chosen=()):
    """Threshold rank of every head by layer and, where there are snapshots, its mean over training.

    path: a heads.csv. chosen: numbers of the layers to show, all if empty. One colour a run.
    Returns the PNG's path. Raises UserError where the file is not a heads.csv.
    """
    table = read_runs(path, HEAD_COLUMNS)
    rank = rank_column(path, table)
    last = last_rows(table)
    if chosen:
        last = last[last["layer"].isin(chosen)]
    places = list(table.loc[table["layer"].isin(chosen or table["layer"]), "place"].unique())
    if not places:
        raise UserError(f"{path}: no layer {', '.join(map(str, chosen))}")
    runs = list(table["run"].unique())
    trained = has_snapshots(table)
    rows = 2 if trained else 1

    with plt.rc_context(STYLE):
        width = min(14, 7.2 + max(0, len(places) - 16) * 0.12)
        height = 2.6 * rows + 0.3
        fig, axes = plt.subplots(rows, 2, figsize=(width, height), sharey=True, squeeze=False)
        dot_size = max(3, 40 / (len(places) * len(runs)) ** 0.5)

        for (product, symbol), column in zip(PRODUCTS.items(), axes.T):
            ax = column[0]
            for i, name in enumerate(runs):
                own = last[(last["run"] == name) & (last["product"] == product)]
                # heads of a layer stand side by side, runs too
                n_head = own["head"].max() + 1
                within = (i + (own["head"] + 0.5) / n_head) / len(runs) - 0.5
                x = own["place"].map(places.index) + 0.8 * within
                ax.scatter(x, own[rank], s=dot_size, alpha=0.8, linewidth=0, label=name, **look(i))
            at_end = " at the end" if trained else ""
            ax.set_title(f"{symbol}, every head{at_end}")
            ax.set_xlabel("layer")
            label_layers(ax.xaxis, places)

        if trained:
            for (product, symbol), ax in zip(PRODUCTS.items(), axes[1]):
                for i, name in enumerate(runs):
                    own = table[(table["run"] == name) & (table["product"] == product)]
                    mean = own.groupby("step")[rank].mean()
                    ax.plot(mean.index, mean, markersize=3, label=name, **look(i))
                ax.set_title(f"{symbol}, mean over heads")
                ax.set_xlabel("step")

        widths = "/".join(map(str, sorted(table["d_head"].unique())))
        for ax in axes[:, 0]:
            ax.set_ylabel(f"{rank} (heads of width {widths})")
        axes[0, 0].set_ylim(0, 1.05 * table["d_head"].max())
        legend(fig, axes[0, 0], len(runs))
        return write(fig, os.path.dirname(path), "heads")


def nuclear_norm(path):
    """Nuclear norm of every head's product against half the squared norms of its factors, a row a run.

    Balanced heads lie on the diagonal. Grey rings: Gaussian factors of the same shapes and norms.
    The right half plots the norms of the two factors against each other. path: a heads.csv.
    """
    columns = (*HEAD_COLUMNS, "half_sq_norm", "nuclear", "gap_gaussian", "norm_A", "norm_B")
    table = last_rows(read_runs(path, columns))
    runs = by_run(table, MOST_RUNS)

    with plt.rc_context(STYLE):
        size = (11.5, 2.75 * len(runs) + 0.3)
        fig, axes = plt.subplots(len(runs), 4, figsize=size, squeeze=False)
        for (name, run), line in zip(runs, axes):
            places = list(run["place"].unique())
            last_layer = max(1, len(places) - 1)
            dots = {"s": 9, "cmap": "viridis", "vmin": 0, "vmax": last_layer, "linewidth": 0}
            rings = {"s": 12, "facecolor": "none", "edgecolor": "0.55", "linewidth": 0.6}

            for (product, symbol), left, right in zip(PRODUCTS.items(), line[:2], line[2:]):
                own = run[run["product"] == product]
                layer = own["place"].map(places.index)
                half = own["half_sq_norm"]
                a, b = FACTORS[product]

                gaussian = half * (1 - own["gap_gaussian"])
                left.scatter(half, gaussian, label="Gaussian factors", **rings)
                left.scatter(half, own["nuclear"], c=layer, label="heads", **dots)
                identity(left, np.concatenate([half, own["nuclear"]]), "balanced")
                left.set_title(f"{symbol}, {name}")
                left.set_xlabel(rf"$\frac{{1}}{{2}}(\|{a}\|^2 + \|{b}\|^2)$")
                left.set_ylabel(f"nuclear norm of {symbol}")

                points = right.scatter(own["norm_A"], own["norm_B"], c=layer, **dots)
                identity(right, np.concatenate([own["norm_A"], own["norm_B"]]), "equal")
                right.set_xlabel(rf"$\|{a}\|$")
                right.set_ylabel(rf"$\|{b}\|$")

            bar = fig.colorbar(points, ax=line[3], label="layer")
            label_layers(bar.ax.yaxis, places)
        legend(fig, axes[0, 0], 3)
        return write(fig, os.path.dirname(path), "nuclear_norm")


def heatmap(path):
    """Threshold rank of every head, layer x head, a row a run; both products on one scale.

    path: a heads.csv.
    """
    table = last_rows(read_runs(path, HEAD_COLUMNS))
    rank = rank_column(path, table)
    runs = by_run(table, MOST_RUNS)
    heights = [min(4.5, 0.35 * run["place"].nunique() + 0.5) for _, run in runs]

    with plt.rc_context(STYLE):
        size = (7.2, sum(heights) + 0.9 * len(runs))
        ratios = {"height_ratios": heights}
        fig, axes = plt.subplots(len(runs), 2, figsize=size, squeeze=False, gridspec_kw=ratios)
        for (name, run), line in zip(runs, axes):
            places = list(run["place"].unique())
            scale = {"cmap": "cividis", "vmin": 0, "vmax": run["d_head"].max()}
            for ax, (product, symbol) in zip(line, PRODUCTS.items()):
                own = run[run["product"] == product]
                ranks = own.pivot(index="place", columns="head", values=rank)
                ranks = ranks.reindex(index=places, columns=range(run["head"].max() + 1))
                image = ax.imshow(ranks, aspect="auto", interpolation="none", **scale)
                ax.set_title(f"{symbol}, {name}")
                ax.set_xlabel("head")
                whole_numbers(ax.xaxis)
                label_layers(ax.yaxis, places)
            line[0].set_ylabel("layer")
            fig.colorbar(image, ax=line, label=rank)
        return write(fig, os.path.dirname(path), "heatmap")


def spectra(path):
    """Singular values of both products relative to the largest, a line a layer, a row a run.

    Each line is the median over the heads of its layer. path: a spectra.csv.
    """
    table = read_runs(path, (*HEAD_COLUMNS, "s1"))
    runs = by_run(table, MOST_RUNS)

    with plt.rc_context(STYLE):
        size = (7.6, 2.6 * len(runs) + 0.2)
        fig, axes = plt.subplots(len(runs), 2, figsize=size, sharey=True, squeeze=False)
        for (name, run), panels in zip(runs, axes):
            places = list(run["place"].unique())
            colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(places)))
            for ax, (product, symbol) in zip(panels, PRODUCTS.items()):
                for colour, place in zip(colours, places):
                    own = run[(run["product"] == product) & (run["place"] == place)]
                    own = own[own["s1"] > 0]
                    if own.empty:
                        continue
                    names = [f"s{i}" for i in range(1, own["d_head"].iloc[0] + 1)]
                    median = own[names].div(own["s1"], axis=0).median().to_numpy()
                    median = np.where(median > 1e-13, median, np.nan)  # zeros are left out
                    ax.semilogy(range(1, len(median) + 1), median, color=colour, linewidth=1)
                ax.set_title(f"{symbol}, {name}")
                ax.set_xlabel("index $i$")
            panels[0].set_ylabel(r"$s_i / s_1$, median over heads")

            norm = matplotlib.colors.Normalize(-0.5, len(places) - 0.5)
            scale = plt.cm.ScalarMappable(norm, matplotlib.colors.ListedColormap(colours))
            bar = fig.colorbar(scale, ax=panels, label="layer")
            label_layers(bar.ax.yaxis, places)
        low = min(ax.get_ylim()[0] for ax in axes.flat)
        axes[0, 0].set_ylim(max(low, 1e-8), 1.5)
        return write(fig, os.path.dirname(path), "spectra")


def norms(path):
    """Norms of the parameters over training, and the cosine to the checkpoint before, a row a run.

    The dashed line is the best fit of a sqrt(step) + b (Merrill et al. 2021). path: a norms.csv.
    """
    table = read_runs(path, ("checkpoint", "step", "group", "norm", "cos_prev"))
    table = table[table["step"] >= 0]  # -1: not known
    runs = by_run(table, MOST_RUNS)
    if not any(run["step"].nunique() > 1 for _, run in runs):
        raise UserError(f"{path}: no run with two steps in it")
    groups = ["all", "attn", "mlp", "embed"]

    with plt.rc_context(STYLE):
        size = (7.6, 2.6 * len(runs) + 0.3)
        fig, axes = plt.subplots(len(runs), 2, figsize=size, squeeze=False)
        for (name, run), (left, right) in zip(runs, axes):
            for group, colour, marker in zip(groups, COLOURS, MARKERS):
                own = run[run["group"] == group]
                line = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 0.8}
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
                line = {"color": "0.7", "linewidth": 0.5, "zorder": 0}
                right.plot(own["step"], own["cos_prev"], label=label, **line)

            left.set_title(f"norm of the parameters, {name}")
            left.set_ylim(bottom=0)
            right.set_title(f"cosine to the checkpoint before, {name}")
            right.ticklabel_format(axis="y", useOffset=False)
            for ax in (left, right):
                ax.set_xlabel("step")

        lines, labels = axes[0, 0].get_legend_handles_labels()
        more_lines, more_labels = axes[0, 1].get_legend_handles_labels()
        fig.legend(lines + more_lines, labels + more_labels, loc="outside upper center", ncols=6)
        return write(fig, os.path.dirname(path), "norms")


def analysis(folder, tables, chosen=()):
    """Draws what analyze.py's out_dir allows. Returns the PNGs' paths.

    tables: the names of the tables that it wrote. chosen: as in heads().
    """
    heads_csv = os.path.join(folder, "heads.csv")
    drawn = [heads(heads_csv, chosen), nuclear_norm(heads_csv), heatmap(heads_csv)]
    drawn.append(spectra(os.path.join(folder, "spectra.csv")))
    if "fits" in tables:
        drawn.append(norms(os.path.join(folder, "norms.csv")))
    return drawn
