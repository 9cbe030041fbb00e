"""
Figures of the heads of checkpoints, drawn from the CSV files of analyze.py.
"""
import os

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from nanorank.errors import UserError
from nanorank.figures.style import (
    COLOURS,
    KEYS,
    MARKERS,
    MOST_RUNS,
    PRODUCTS,
    STYLE,
    by_run,
    identity,
    label_layers,
    last_of,
    layer_of,
    legend,
    rank_column,
    read,
    write,
)


def heads(path, chosen=()):
    """Threshold rank of every head by layer (F3a), and its mean over training where there are snapshots, from heads.csv; one colour a
    run; chosen: layers to show. Returns the PNG's path. Raises UserError where the file is not a heads.csv."""
    rows = read(path, KEYS)
    rank, runs = rank_column(path, rows), by_run(rows)
    trained = any(len({row["step"] for row in run}) > 1 for run in runs.values())
    layers = list(dict.fromkeys(layer_of(row) for row in rows if not chosen or int(row["layer"]) in chosen))
    if not layers:
        raise UserError(f"{path}: no layer {', '.join(map(str, chosen))}")
    with plt.rc_context(STYLE):
        width = 7.2 + max(0, len(layers) - 16) * 0.12
        fig, axes = plt.subplots(1 + trained, 2, figsize=(min(width, 14), 2.6 * (1 + trained) + 0.3), sharey=True, squeeze=False)
        for column, (product, symbol) in enumerate(PRODUCTS.items()):
            for i, (name, run) in enumerate(runs.items()):
                colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
                run = [row for row in run if row["product"] == product]
                last = [row for row in last_of(run) if layer_of(row) in layers]
                n_head = 1 + max((int(row["head"]) for row in last), default=0)  # heads of a layer stand side by side, runs too
                within = [0.8 * ((i + (int(row["head"]) + 0.5) / n_head) / len(runs) - 0.5) for row in last]
                x = [layers.index(layer_of(row)) + shift for row, shift in zip(last, within)]
                axes[0, column].scatter(x, [float(row[rank]) for row in last], s=max(3, 40 / (len(layers) * len(runs))**0.5),
                                        color=colour, marker=marker, alpha=0.8, linewidth=0, label=name)
                steps = sorted({int(row["step"]) for row in run})
                if trained:
                    at = [[float(row[rank]) for row in run if int(row["step"]) == step] for step in steps]
                    axes[1, column].plot(steps, [sum(v) / len(v) for v in at], color=colour, marker=marker, markersize=3, label=name)
            axes[0, column].set_title(f"{symbol}, every head" + " at the end" * trained)
            axes[0, column].set_xlabel("layer")
            label_layers(axes[0, column].xaxis, layers)
            if trained:
                axes[1, column].set_title(f"{symbol}, mean over heads")
                axes[1, column].set_xlabel("step")
        widths = "/".join(sorted({row["d_head"] for row in rows}, key=int))
        for ax in axes[:, 0]:
            ax.set_ylabel(f"{rank} (heads of width {widths})")
        axes[0, 0].set_ylim(0, 1.05 * max(int(row["d_head"]) for row in rows))
        legend(fig, axes[0, 0], len(runs))
        return write(fig, os.path.dirname(path), "heads")


def nuclear_norm(path):
    """F4 from heads.csv, a row a run: half_sq_norm against nuclear of every head, with the diagonal that balanced heads lie on and what
    Gaussian factors of the same shapes and norms would give; and the norms of the two factors against each other."""
    rows = read(path, (*KEYS, "half_sq_norm", "nuclear", "gap_gaussian", "norm_A", "norm_B"))
    runs = dict(list(by_run(rows).items())[:MOST_RUNS])
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(len(runs), 4, figsize=(11.5, 2.75 * len(runs) + 0.3), squeeze=False)
        for (name, run), line in zip(runs.items(), axes):
            layers = list(dict.fromkeys(map(layer_of, run)))
            for column, (product, symbol) in enumerate(PRODUCTS.items()):
                last = [row for row in last_of(run) if row["product"] == product]
                colour = [layers.index(layer_of(row)) for row in last]
                half, nuclear, gap, norm_A, norm_B = (np.array([float(row[key]) for row in last])
                                                      for key in ("half_sq_norm", "nuclear", "gap_gaussian", "norm_A", "norm_B"))
                ax = line[column]
                ax.scatter(half, half * (1 - gap), s=12, facecolor="none", edgecolor="0.55", linewidth=0.6, label="Gaussian factors")
                points = ax.scatter(half, nuclear, s=9, c=colour, cmap="viridis", vmin=0, vmax=max(1, len(layers) - 1), linewidth=0, label="heads")
                identity(ax, np.concatenate([half, nuclear]), "balanced")
                ax.set_title(f"{symbol}, {name}")
                a, b = {"qk": ("W_K", "W_Q"), "ov": ("P", "W_V")}[product]
                ax.set_xlabel(rf"$\frac{{1}}{{2}}(\|{a}\|^2 + \|{b}\|^2)$")
                ax.set_ylabel(f"nuclear norm of {symbol}")
                ax = line[2 + column]
                ax.scatter(norm_A, norm_B, s=9, c=colour, cmap="viridis", vmin=0, vmax=max(1, len(layers) - 1), linewidth=0)
                identity(ax, np.concatenate([norm_A, norm_B]), "equal")
                ax.set_xlabel(rf"$\|{a}\|$")
                ax.set_ylabel(rf"$\|{b}\|$")
            bar = fig.colorbar(points, ax=line[3], label="layer")
            label_layers(bar.ax.yaxis, layers)
        legend(fig, axes[0, 0], 3)
        return write(fig, os.path.dirname(path), "nuclear_norm")


def heatmap(path):
    """Threshold rank of every head, layer x head, from heads.csv; a row a run, both products on one scale."""
    rows = read(path, KEYS)
    rank, runs = rank_column(path, rows), dict(list(by_run(rows).items())[:MOST_RUNS])
    with plt.rc_context(STYLE):
        sizes = {name: len(set(map(layer_of, run))) for name, run in runs.items()}
        fig, axes = plt.subplots(len(runs), 2, figsize=(7.2, sum(0.9 + min(4.5, 0.35 * n + 0.5) for n in sizes.values())), squeeze=False,
                                 gridspec_kw={"height_ratios": [min(4.5, 0.35 * n + 0.5) for n in sizes.values()]})
        for (name, run), line in zip(runs.items(), axes):
            last, layers = last_of(run), list(dict.fromkeys(map(layer_of, run)))
            for ax, (product, symbol) in zip(line, PRODUCTS.items()):
                table = np.full((len(layers), 1 + max(int(row["head"]) for row in last)), np.nan)
                for row in last:
                    if row["product"] == product:
                        table[layers.index(layer_of(row)), int(row["head"])] = float(row[rank])
                image = ax.imshow(table, cmap="cividis", vmin=0, vmax=max(int(row["d_head"]) for row in last), aspect="auto", interpolation="none")
                ax.set_title(f"{symbol}, {name}")
                ax.set_xlabel("head")
                ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
                label_layers(ax.yaxis, layers)
            line[0].set_ylabel("layer")
            fig.colorbar(image, ax=line, label=rank)
        return write(fig, os.path.dirname(path), "heatmap")


def spectra(path):
    """Singular values of both products, relative to the largest, from spectra.csv: a line a layer (median over its heads), a row a run."""
    rows = read(path, (*KEYS, "s1"))
    runs = dict(list(by_run(rows).items())[:MOST_RUNS])
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(len(runs), 2, figsize=(7.6, 2.6 * len(runs) + 0.2), sharey=True, squeeze=False)
        for (name, run), panels in zip(runs.items(), axes):
            layers = list(dict.fromkeys(map(layer_of, run)))
            colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(layers)))
            for ax, (product, symbol) in zip(panels, PRODUCTS.items()):
                for colour, layer in zip(colours, layers):
                    s = np.array([[float(row[f"s{i}"]) for i in range(1, int(row["d_head"]) + 1)] for row in run
                                  if row["product"] == product and layer_of(row) == layer])
                    if s.size and s.max() > 0:
                        s = s[s[:, 0] > 0]
                        line = np.median(s / s[:, :1], axis=0)
                        ax.semilogy(range(1, len(line) + 1), np.where(line > 1e-13, line, np.nan), color=colour, linewidth=1)  # zeros left out
                ax.set_title(f"{symbol}, {name}")
                ax.set_xlabel("index $i$")
            panels[0].set_ylabel(r"$s_i / s_1$, median over heads")
            scale = plt.cm.ScalarMappable(matplotlib.colors.Normalize(-0.5, len(layers) - 0.5), matplotlib.colors.ListedColormap(colours))
            label_layers(fig.colorbar(scale, ax=panels, label="layer").ax.yaxis, layers)
        low = min(ax.get_ylim()[0] for ax in axes.flat)
        axes[0, 0].set_ylim(max(low, 1e-8), 1.5)
        return write(fig, os.path.dirname(path), "spectra")


def norms(path):
    """Norms of the parameters over training with the best fit a sqrt(t) + b (N1), and the cosine to the checkpoint before (N2), from norms.csv."""
    rows = [row for row in read(path, ("checkpoint", "step", "group", "norm", "cos_prev")) if int(row["step"]) >= 0]
    runs = dict(list(by_run(rows).items())[:MOST_RUNS])
    if not any(len({row["step"] for row in run}) > 1 for run in runs.values()):
        raise UserError(f"{path}: no run with two steps in it")
    groups = ["all", "attn", "mlp", "embed"]
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(len(runs), 2, figsize=(7.6, 2.6 * len(runs) + 0.3), squeeze=False)
        for (name, run), (left, right) in zip(runs.items(), axes):
            for i, group in enumerate(groups):
                t, norm, cosine = np.array([(int(row["step"]), float(row["norm"]), float(row["cos_prev"] or "nan")) for row in run
                                            if row["group"] == group]).reshape(-1, 3).T
                left.plot(t, norm, color=COLOURS[i], marker=MARKERS[i], markersize=3, linewidth=0.8, label=group)
                if (t > 0).sum() > 2:
                    a, b = np.polyfit(np.sqrt(t[t > 0]), norm[t > 0], 1)
                    curve = np.linspace(0, t.max(), 200)
                    left.plot(curve, a * np.sqrt(curve) + b, color="0.4", linestyle="--", linewidth=0.7,
                              label=r"$a\sqrt{t} + b$" if i == len(groups) - 1 else None)
                right.plot(t, cosine, color=COLOURS[i], marker=MARKERS[i], markersize=3, linewidth=0.8)
            right.ticklabel_format(axis="y", useOffset=False)
            blocks = {row["group"] for row in run} - set(groups)
            for group in blocks:
                t, cosine = np.array([(int(row["step"]), float(row["cos_prev"] or "nan")) for row in run if row["group"] == group]).T
                right.plot(t, cosine, color="0.7", linewidth=0.5, zorder=0, label="each layer" if group == min(blocks) else None)
            left.set_title(f"norm of the parameters, {name}")
            right.set_title(f"cosine to the checkpoint before, {name}")
            left.set_ylim(bottom=0)
            for ax in (left, right):
                ax.set_xlabel("step")
        lines, labels = axes[0, 0].get_legend_handles_labels()
        more = axes[0, 1].get_legend_handles_labels()
        fig.legend(lines + more[0], labels + more[1], loc="outside upper center", ncols=6)
        return write(fig, os.path.dirname(path), "norms")


def analysis(folder, tables, chosen=()):
    """All that analyze.py draws in its out_dir: `tables` are those it wrote. Returns the PNGs' paths."""
    drawn = [draw(os.path.join(folder, "heads.csv")) for draw in (lambda path: heads(path, chosen), nuclear_norm, heatmap)]
    drawn.append(spectra(os.path.join(folder, "spectra.csv")))
    if "fits" in tables:
        drawn.append(norms(os.path.join(folder, "norms.csv")))
    return drawn
