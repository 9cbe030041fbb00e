"""
CSV in, figures out: one function a figure, PNG and PDF beside the CSV it was drawn from.

    python figures.py heads out/analysis/heads.csv      # rank of every head by layer (F3a), and over training
    python figures.py f4 out/analysis/heads.csv         # half_sq_norm against nuclear, norms of the factors (F4)
    python figures.py heatmap out/analysis/heads.csv    # rank of every head, layer x head
    python figures.py spectra out/analysis/spectra.csv  # singular values, a line a layer
    python figures.py norms out/analysis/norms.csv      # norms and directions over training (N1, N2)
    python figures.py f1 out/factored                   # theory: balance, soft thresholding, depth, AdamW (train_factored.py); f5: scalars
    python figures.py f2 out/recall                     # associative recall: the runs in this folder's folders, over their weight decay
    python figures.py f3a out/sweep/sweep.csv           # rank against attn_wd by layer (F3a); f3b: mean over all; or from a heads.csv
    python figures.py t1 out/sweep/sweep.csv            # heatmap over attn_wd x mlp_wd (T1); n3: norm growth over learning rate x decay (N3)
    python figures.py over_training out/sweep           # rank and validation against step, a line a decay; or of run folders
    python figures.py all                               # every figure under results/

all: results/NAME/FIGURE.png is drawn again from what lies beside it, the file that FIGURE reads above (a folder: the files that its script
writes there); where sweep.csv lies, whatever the grid allows. What lacks its file stays as it is, and is named.
"""
import contextlib
import csv
import glob
import json
import os
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from checkpoints import run_of
from common import input_errors

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe & Ito, colour-blind safe; 7 and 8 markers: 56 pairs
MARKERS = "osD^vPX*"
PRODUCTS = {"qk": r"$W_K^\top W_Q$", "ov": r"$P\,W_V$"}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "legend.frameon": False,
         "figure.constrained_layout.use": True, "pdf.fonttype": 42, "savefig.dpi": 160}
KEYS = ("checkpoint", "step", "layer", "head", "product", "d_head")
MOST_RUNS = 4  # rows of a figure that has a row a run


def heads(path, chosen=()):
    """Threshold rank of every head by layer (F3a), and its mean over training where there are snapshots, from heads.csv; one colour a
    run; chosen: layers to show. Returns the PNG's path. Raises ValueError where the file is not a heads.csv."""
    rows = read(path, KEYS)
    rank, runs = rank_column(path, rows), by_run(rows)
    trained = any(len({row["step"] for row in run}) > 1 for run in runs.values())
    layers = list(dict.fromkeys(layer_of(row) for row in rows if not chosen or int(row["layer"]) in chosen))
    if not layers:
        raise ValueError(f"{path}: no layer {', '.join(map(str, chosen))}")
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


def f4(path):
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
        return write(fig, os.path.dirname(path), "f4")


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
        raise ValueError(f"{path}: no run with two steps in it")
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
    drawn = [draw(os.path.join(folder, "heads.csv")) for draw in (lambda path: heads(path, chosen), f4, heatmap)]
    drawn.append(spectra(os.path.join(folder, "spectra.csv")))
    if "fits" in tables:
        drawn.append(norms(os.path.join(folder, "norms.csv")))
    return drawn

# ------------------------------------------------------------------------------------------------------------------- theory

def table(path, columns):
    """A CSV file as numpy columns: numbers where every value is one, else strings; of a sweep.csv the runs that are done. Raises ValueError
    as read() does."""
    rows, out = [row for row in read(path, columns) if row.get("status", "done") == "done"], {}
    if not rows:
        raise ValueError(f"{path}: no run is done")
    for name in rows[0]:
        out[name] = np.array([row[name] for row in rows])
        with contextlib.suppress(ValueError):
            out[name] = out[name].astype(float)
    return out


def pick(columns, **wanted):
    """The rows of table()'s columns where each of these columns has this value."""
    keep = np.all([columns[name] == value for name, value in wanted.items()], axis=0)
    return {name: column[keep] for name, column in columns.items()}


def f1(folder):
    """P1's linear models, from the CSV files of train_factored.py: four panels of gradient flow, one of depth 3, one of Adam and AdamW;
    predictions dashed, recovery where nothing else is said. Returns the PNG's path."""
    run = ("optimizer", "depth", "grad_noise", "lam")
    curves = table(os.path.join(folder, "curves.csv"), ("problem", *run, "seed", "t", "sum_sq", "two_nuclear", "discrepancy"))
    spectra = table(os.path.join(folder, "spectra.csv"), ("problem", *run, "seed", "step", "i", "s", "s_target"))
    predictions = table(os.path.join(folder, "predictions.csv"), (*run, "i", "s"))
    curves, spectra = pick(curves, seed=0), pick(spectra, seed=0)
    recovery = pick(spectra, problem="recovery")
    flow = pick(curves, optimizer="flow", depth=2)
    if not len(flow["t"]) or not len(recovery["s"]):
        raise ValueError(f"{folder}: F1 wants recovery, and flow:2 among the runs of train_factored.py")
    lams = np.unique(flow["lam"])[1:]  # without the control
    lams = lams[np.linspace(0, len(lams) - 1, 4).round().astype(int)[:3]]

    def finals(ax, colour, marker, label="", **wanted):
        """Last singular values against lam, the prediction dashed; colour: None for one each."""
        last, dense = pick(recovery, **wanted), pick(predictions, **wanted)
        last = pick(last, step=last["step"].max(initial=0))
        for i in np.unique(dense["i"]).astype(int):
            if recovery["s_target"][recovery["i"] == i].max() > 1e-9:
                line, points = pick(dense, i=i), pick(last, i=i)
                ax.plot(line["lam"], line["s"], "--", color=colour or COLOURS[i], linewidth=1)
                ax.plot(points["lam"], points["s"], marker, color=colour or COLOURS[i], markersize=5, fillstyle="none", label="" if i else label)
        ax.set_xlabel(r"$\lambda$")
        ax.set_ylabel("singular values at the end")

    with plt.rc_context({**STYLE, "savefig.dpi": 110}):
        fig, ((a, b, c), (d, e, f)) = plt.subplots(2, 3, figsize=(10.5, 6.4))
        for colour, lam in zip(COLOURS, lams):
            rows = pick(flow, problem="recovery", lam=lam)
            t = np.linspace(0, 25, 100)
            a.plot(rows["t"], rows["sum_sq"], color=colour, label=rf"$\lambda$ = {lam:g}")
            a.plot(rows["t"], rows["two_nuclear"], ":", color=colour)
            b.plot(t, np.exp(-2 * lam * t), "--", color=colour, linewidth=1)
            for marker, name in zip(MARKERS, np.unique(flow["problem"])):
                rows = pick(flow, problem=name, lam=lam)
                b.plot(rows["t"], rows["discrepancy"] / rows["discrepancy"][0], marker, color=colour, markersize=4, fillstyle="none",
                       label=name if lam == lams[-1] else "")
        a.plot([], [], "k-", label=r"$|A|^2 + |B|^2$")
        a.plot([], [], "k:", label=r"$2\,|AB^\top|_*$")
        a.set(title="(a) L2 becomes the nuclear norm", xlabel="t", xlim=(0, 8), ylim=(0, 1.45 * flow["sum_sq"][flow["t"] < 8].max()))
        b.set(title=r"(b) $|A^\top A - B^\top B|_F$, start = 1; dashed: $e^{-2\lambda t}$", xlabel="t, colours as in (a)", yscale="log",
              xlim=(0, 25), ylim=(1e-7, 300))
        finals(c, None, "o", optimizer="flow", depth=2)
        c.set_title(r"(c) dashed: $\max(s_i(M) - \lambda, 0)$")
        lam = lams[-1]
        times = pick(flow, problem="recovery", lam=lam)
        for i, s in enumerate(np.unique(recovery["s_target"])[::-1]):
            rows = pick(recovery, optimizer="flow", depth=2, lam=lam, i=i)
            if s > 1e-9:
                d.plot(times["t"], rows["s"], color=COLOURS[i])
                d.axhline(max(s - lam, 0), color=COLOURS[i], linestyle="--", linewidth=1)
        d.set(title=rf"(d) $\lambda$ = {lam:g}, dashed: $\max(s_i(M) - \lambda, 0)$", xlabel="t", ylabel="singular values", xscale="log",
              xlim=(0.1, None))
        finals(e, None, "o", optimizer="flow", depth=3)
        e.set_title("(e) depth 3, dashed: the Schatten-2/3 minimum")
        finals(f, COLOURS[0], "+", "Adam with L2", optimizer="adam_l2", depth=2)
        finals(f, COLOURS[1], "x", "AdamW, exact gradient", optimizer="adamw", depth=2, grad_noise=0)
        finals(f, COLOURS[2], "o", "AdamW, noisy gradient", optimizer="adamw", depth=2, grad_noise=1)
        f.set(title="(f) the Adams, dashed: predictions", ylim=(-0.1, 1.45 * recovery["s_target"].max()))
        a.legend(loc="upper center", ncols=2)
        b.legend(loc="upper right")
        f.legend(loc="upper right")
        return write(fig, folder, "f1")


def f2(folder):
    """Associative recall over weight decay, from log.jsonl and result.json of the runs in this folder's folders: rank of both products,
    imbalance of OV over training, nuclear norm against half the squared Frobenius norms. Returns the PNG's path."""
    runs = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*", "result.json"))):
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
        with open(os.path.join(os.path.dirname(path), "log.jsonl"), encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        log = [line for line in lines if "attn_rank95_ov" in line]
        if not log:
            raise ValueError(f"{path}: no ranks in its log.jsonl; train with --rank_interval")
        runs.append((result["attn_wd"], result, {name: np.array([line[name] for line in log]) for name in log[0]}))
    if not runs:
        raise ValueError(f"{folder}: no finished run (*/result.json) in it")
    runs.sort(key=lambda run: run[0])
    with plt.rc_context({**STYLE, "savefig.dpi": 110}):
        fig, (a, b, c) = plt.subplots(1, 3, figsize=(10.5, 3.4))
        x = np.arange(len(runs))
        for i, (product, symbol) in enumerate(PRODUCTS.items()):
            a.plot(x, [log[f"attn_rank95_{product}"][-1] for _, _, log in runs], "-" + MARKERS[i], color=COLOURS[i], label=f"rank95 of {symbol}")
        a.set_xticks(x, [f"{wd:g}\n{100 * result['test_acc']:.0f}" for wd, result, _ in runs])
        a.set(title="(a) rank at the end, mean over layers", xlabel="weight decay; test accuracy in %", ylim=(0, None))
        a.legend()
        for i, (wd, _, log) in enumerate(runs):
            colour = plt.cm.viridis(0.9 * i / max(1, len(runs) - 1))
            b.plot(log["step"], log["attn_imbalance_ov"], color=colour, label=f"{wd:g}")
            c.plot(log["step"], log["attn_half_sq_norm_ov"], color=colour)
            c.plot(log["step"], log["attn_nuclear_ov"], ":", color=colour)
        b.set(title=r"(b) $|P^\top P - W_V W_V^\top|$ / $(|P^\top P| + |W_V W_V^\top|)$", xlabel="step", ylim=(0, None))
        b.legend(title="weight decay", ncols=2)
        c.plot([], [], "k-", label=r"$(|P|^2 + |W_V|^2)/2$")
        c.plot([], [], "k:", label=r"$|P\,W_V|_*$")
        c.set(title="(c) nuclear norm against Frobenius norms", xlabel="step", ylim=(0, None))
        c.legend()
        return write(fig, folder, "f2")


def f5(folder):
    """Two parameters, from scalars.csv of train_factored.py: trajectories over the loss's contours; rings: where they are expected to end.
    Returns the PNG's path."""
    rows = table(os.path.join(folder, "scalars.csv"), ("form", "optimizer", "grad_noise", "lam", "w1", "w2", "loss", "w1_expected", "w2_expected"))
    forms = {"free": r"$w$ free", "factorised": r"$w = a\,b$"}
    optimizers = {("adam_l2", False): "Adam with L2", ("adamw", False): "AdamW, exact gradient", ("adamw", True): "AdamW, noisy gradient"}
    w = np.stack([rows["w1"], rows["w2"]])
    basis = np.stack([w[0]**2, w[0] * w[1], w[1]**2, w[0], w[1], np.ones(w.shape[1])], 1)
    q = np.linalg.lstsq(basis, rows["loss"], rcond=None)[0]  # the loss is a quadratic: its coefficients from the rows
    x, y = np.meshgrid(np.linspace(-0.05, 1.25, 200), np.linspace(-0.12, 1.3, 200))
    loss = q[0] * x**2 + q[1] * x * y + q[2] * y**2 + q[3] * x + q[4] * y + q[5]
    with plt.rc_context({**STYLE, "savefig.dpi": 110}):
        fig, axes = plt.subplots(2, 3, figsize=(10.5, 7), sharex=True, sharey=True)
        for line, (form, symbol) in zip(axes, forms.items()):
            for ax, ((optimizer, noisy), title) in zip(line, optimizers.items()):
                ax.contour(x, y, loss, levels=np.geomspace(0.002, 1, 9), colors="0.8", linewidths=0.7)
                ax.axhline(0, color="0.5", linewidth=0.5)
                ax.axvline(0, color="0.5", linewidth=0.5)
                here = pick(rows, form=form, optimizer=optimizer)
                here = {name: column[(here["grad_noise"] > 0) == noisy] for name, column in here.items()}
                for colour, lam in zip(COLOURS, np.unique(here["lam"])):
                    path = pick(here, lam=lam)
                    ax.plot(path["w1"], path["w2"], color=colour, linewidth=1, label=rf"$\lambda$ = {lam:g}")
                    ax.plot(path["w1"][-1], path["w2"][-1], "o", color=colour, markersize=4)
                    ax.plot(path["w1_expected"][-1], path["w2_expected"][-1], "o", color="black", markersize=9, fillstyle="none",
                            zorder=5)
                ax.set_title(f"{title}, {symbol}")
        for ax in axes[1]:
            ax.set_xlabel("$w_1$")
        for ax in axes[:, 0]:
            ax.set_ylabel("$w_2$")
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=8)
        return write(fig, folder, "f5")

# ------------------------------------------------------------------------------------------------------------------- sweeps

def varied(name):
    """{setting: value as text} of a run by its name: attn_wd=0.4,seed=2 as sweep.py names it, else a decay at its end (demo-4, vit/6)."""
    name = os.path.basename(name)
    number = re.search(r"(?:^|[-_])(\d+(?:\.\d+)?)$", name)
    return dict(part.split("=", 1) for part in name.split(",") if "=" in part) or ({"attn_wd": number[1]} if number else {})


def setting_of(name, path):
    """The attn_wd of a run by its name. Raises ValueError naming the file that holds it."""
    if "attn_wd" not in varied(name):
        raise ValueError(f"{path}: the name of run {name} does not tell its attn_wd; sweep.py's do, or a number at the end (demo-4)")
    return float(varied(name)["attn_wd"])


def rest_of(names, given, always=""):
    """{name: what varies between runs beside `given` and the seed, as text}; settings that `given` determine are left out, but for `always`."""
    settings = {name: varied(name) for name in names}
    key = {name: tuple(x.get(k) for k in given) for name, x in settings.items()}
    keys = [k for k in dict.fromkeys(k for x in settings.values() for k in x) if k not in (*given, "seed")
            and (k == always or len({(key[name], x.get(k)) for name, x in settings.items()}) > len(set(key.values())))]
    return {name: ", ".join(f"{k}={x[k]}" for k in keys if k in x) for name, x in settings.items()}


def rank_points(path):
    """Ranks at the end of training against attn_wd as a list of dicts {wd, rest, layer, product, rank}, and what one of them stands for:
    from a heads.csv every head, from a sweep.csv every layer of every run; and the width of the heads."""
    rows = read(path, ())
    if "cell" in rows[0]:
        rows = [row for row in rows if row["status"] == "done"]
        layers = [column[:-len("_rank95_qk")] for column in (rows or [{}])[0] if re.fullmatch(r"layer\d+_rank95_qk", column)]
        if not layers or "attn_wd" not in rows[0]:
            raise ValueError(f"{path}: no run is done that has ranks and an attn_wd")
        rest = rest_of([row["cell"] for row in rows], ("attn_wd",))
        points = [{"wd": float(row["attn_wd"]), "rest": rest[row["cell"]], "layer": ("", int(layer[5:])), "product": product,
                   "rank": float(row[f"{layer}_rank95_{product}"])} for row in rows for layer in layers for product in PRODUCTS]
        return points, "layer (mean over its heads) of every run", int(rows[0]["n_embd"]) // int(rows[0]["n_head"])
    read(path, KEYS)
    rank, runs = rank_column(path, rows), {}
    for row in rows:
        runs.setdefault(run_of(row["checkpoint"]), []).append(row)
    rest = rest_of(runs, ("attn_wd",))
    points = [{"wd": setting_of(name, path), "rest": rest[name], "layer": layer_of(row), "product": row["product"], "rank": float(row[rank])}
              for name, run in runs.items() for row in last_of(run)]
    return points, "head", max(int(row["d_head"]) for row in rows)


def f3a(path, chosen=()):
    """F3a: rank95 of both products at the end against attn_wd, a column a layer (four, evenly spaced, or those chosen), the line their mean,
    a colour for each value of what else the grid varies; every head from a heads.csv of several runs, means over heads from a sweep.csv."""
    points, what, width = rank_points(path)
    layers = sorted({x["layer"] for x in points if not chosen or x["layer"][1] in chosen})
    if not layers:
        raise ValueError(f"{path}: no layer {', '.join(map(str, chosen))}")
    if not chosen:
        layers = [layers[i] for i in sorted(set(np.linspace(0, len(layers) - 1, 4).round().astype(int)))]
    wds, groups = sorted({x["wd"] for x in points}), list(dict.fromkeys(x["rest"] for x in points))
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(2, len(layers), figsize=(max(4, 0.8 + 2.3 * len(layers)), 5.2), sharex=True, sharey=True, squeeze=False)
        for line, (product, symbol) in zip(axes, PRODUCTS.items()):
            for ax, layer in zip(line, layers):
                here = [x for x in points if x["product"] == product and x["layer"] == layer]
                for i, group in enumerate(groups):
                    at = [[x["rank"] for x in here if x["rest"] == group and x["wd"] == wd] for wd in wds]
                    beside = 0.6 * ((i + 0.5) / len(groups) - 0.5)  # groups stand side by side
                    ax.scatter([k + beside for k, ranks in enumerate(at) for _ in ranks], sum(at, []), s=14, color=COLOURS[i % len(COLOURS)],
                               marker=MARKERS[i % len(MARKERS)], alpha=0.6, linewidth=0)
                    ax.plot([k + beside for k, ranks in enumerate(at) if ranks], [np.mean(ranks) for ranks in at if ranks], linewidth=1,
                            color=COLOURS[i % len(COLOURS)], label=group)
                ax.set_title(f"{symbol}, layer {' '.join(map(str, layer)).strip()}")
        for ax in axes[-1]:
            ax.set_xticks(range(len(wds)), [f"{wd:g}" for wd in wds])
            ax.set_xlabel("attn_wd")
        for ax in axes[:, 0]:
            ax.set_ylabel(f"rank95 (heads of width {width})")
        axes[0, 0].set_ylim(0, 1.03 * width)
        fig.supxlabel(f"dots: each {what}; lines: their mean", fontsize=8)
        if any(groups):
            legend(fig, axes[0, 0], len(groups))
        return write(fig, os.path.dirname(path), "f3a")


def f3b(path):
    """F3b: rank95 of both products at the end against attn_wd, mean over all heads and layers; the band holds the middle half of them
    (heads.csv: of heads, sweep.csv: of layers and seeds). Returns the PNG's path."""
    points, what, width = rank_points(path)
    wds, groups = sorted({x["wd"] for x in points}), list(dict.fromkeys(x["rest"] for x in points))
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.2), sharey=True)
        for ax, (product, symbol) in zip(axes, PRODUCTS.items()):
            for i, group in enumerate(groups):
                at = {k: [x["rank"] for x in points if x["product"] == product and x["rest"] == group and x["wd"] == wd] for k, wd in enumerate(wds)}
                at = {k: ranks for k, ranks in at.items() if ranks}
                low, high = np.array([np.quantile(ranks, (0.25, 0.75)) for ranks in at.values()]).T
                ax.plot(list(at), [np.mean(ranks) for ranks in at.values()], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
                        markersize=4, label=group)
                ax.fill_between(list(at), low, high, color=COLOURS[i % len(COLOURS)], alpha=0.15, linewidth=0)
            ax.set_title(symbol)
            ax.set_xlabel("attn_wd")
            ax.set_xticks(range(len(wds)), [f"{wd:g}" for wd in wds])
        axes[0].set_ylabel(f"rank95 (heads of width {width})")
        axes[0].set_ylim(0, 1.03 * width)
        fig.supxlabel(f"lines: mean over heads and layers; bands: the middle half, of every {what}", fontsize=8)
        if any(groups):
            legend(fig, axes[0], len(groups))
        return write(fig, os.path.dirname(path), "f3b")


def t1(path):
    """T1 from sweep.csv: test perplexity (test_acc where there is one) over attn_wd x mlp_wd, mean +- sample standard deviation over seeds;
    the number of seeds where some are missing; a panel for each combination of what else the grid varies. Returns the PNG's path."""
    rows = read(path, ("cell", "status", "attn_wd", "mlp_wd"))
    name = next((name for name in ("test_acc", "test_ppl") if name in rows[0]), None)
    if name is None:
        raise ValueError(f"{path}: no run is done")
    return grid_figure(path, rows, "t1", ("attn_wd", "mlp_wd"), name, {"test_acc": "test accuracy", "test_ppl": "test perplexity"}[name], "cividis")


def n3(path):
    """N3 from sweep.csv: norm of all parameters at the end over that at the start, learning rate x decay, a panel an optimizer (and each
    combination of what else the grid varies); colours on a logarithmic scale around 1, no growth. Returns the PNG's path."""
    rows = read(path, ("cell", "status", "learning_rate", "attn_wd", "norm_all_first", "norm_all_last"))
    rows = [{**row, "growth": float(row["norm_all_last"]) / float(row["norm_all_first"]) if row["status"] == "done" else ""} for row in rows]
    return grid_figure(path, rows, "n3", ("learning_rate", "attn_wd"), "growth", "norm at the end / at the start", "PuOr_r", centred=True)


def grid_figure(path, rows, figure, given, value, label, colours, centred=False):
    """A heatmap of the mean of column `value` over the two settings `given` (rows, columns), a panel for each combination of the rest."""
    rest = rest_of([row["cell"] for row in rows], given, always="optimizer")
    panels = {}
    for row in rows:
        x = float(row[value] or "nan") if row["status"] == "done" else None
        panels.setdefault(rest[row["cell"]], {}).setdefault(tuple(float(varied(row["cell"]).get(k) or row[k]) for k in given), []).append(x)
    panels = dict(list(panels.items())[:MOST_RUNS])
    means = {title: {at: np.mean([x for x in xs if x is not None]) for at, xs in cells.items() if any(x is not None for x in xs)}
             for title, cells in panels.items()}
    every = np.array([x for cells in means.values() for x in cells.values()])
    every = every[np.isfinite(every)]
    if not every.size:
        raise ValueError(f"{path}: no run is done")
    norm = matplotlib.colors.Normalize(every.min(), every.max())
    if centred:
        most = max(np.abs(np.log(every)).max(), 1e-3)
        norm = matplotlib.colors.LogNorm(np.exp(-most), np.exp(most))
    with plt.rc_context({**STYLE, "axes.spines.top": True, "axes.spines.right": True}):
        wide = max(len({at[1] for at in cells}) for cells in panels.values())
        high = max(len({at[0] for at in cells}) for cells in panels.values())
        fig, axes = plt.subplots(1, len(panels), figsize=((0.9 + 0.95 * wide) * len(panels) + 0.9, 1.2 + 0.55 * high), squeeze=False)
        for ax, (title, cells) in zip(axes[0], panels.items()):
            heights, widths = (sorted({at[i] for at in cells}) for i in (0, 1))
            image = np.array([[means[title].get((y, x), np.nan) for x in widths] for y in heights])
            colour_map = plt.get_cmap(colours).copy()
            colour_map.set_bad("0.85")
            shown = ax.imshow(image, cmap=colour_map, norm=norm, aspect="auto", interpolation="none")
            for (y, x), mean in np.ndenumerate(image):
                xs = cells.get((heights[y], widths[x]), [])
                there = [v for v in xs if v is not None]
                text = f"{mean:.4g}" if there else "missing" if xs else ""
                text += f"\n± {np.std(there, ddof=1):.2g}" if len(there) > 1 else ""
                text += f"\n({len(there)} of {len(xs)})" if 0 < len(there) < len(xs) else ""
                red, green, blue, _ = shown.to_rgba(mean) if np.isfinite(mean) else (0.85, 0.85, 0.85, 1)
                ax.text(x, y, text, ha="center", va="center", fontsize=8, color="black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white")
            ax.set_xticks(range(len(widths)), [f"{x:g}" for x in widths])
            ax.set_yticks(range(len(heights)), [f"{y:g}" for y in heights])
            ax.set(title=title, xlabel=given[1], ylabel=given[0])
        fig.colorbar(shown, ax=axes, label=label, format="%.3g").ax.yaxis.set_minor_formatter("{x:.3g}")
        return write(fig, os.path.dirname(path), figure)


def over_training(folder):
    """Rank95 of both products and validation (accuracy where there is one, else perplexity) against step, a line an attn_wd: mean over seeds,
    the band from the least to the most; from sweep.py's curves.csv, else log.jsonl of the runs in this folder's folders; a row of panels
    for each combination of what else the grid varies. Returns the PNG's path."""
    path, runs = os.path.join(folder, "curves.csv"), {}
    if os.path.exists(path):
        for row in read(path, ("cell", "step", "attn_rank95_qk", "attn_rank95_ov", "val_loss")):
            runs.setdefault(row["cell"], []).append(row)
    else:
        for log in sorted(glob.glob(os.path.join(glob.escape(folder), "*", "log.jsonl"))):
            with open(log, encoding="utf-8") as file:
                runs[os.path.basename(os.path.dirname(log))] = [json.loads(line) for line in file]
    if not runs:
        raise ValueError(f"{folder}: no curves.csv and no run (*/log.jsonl) in it")
    accuracy = any("val_acc" in row for run in runs.values() for row in run)
    panels = {"attn_rank95_qk": f"rank95 of {PRODUCTS['qk']}", "attn_rank95_ov": f"rank95 of {PRODUCTS['ov']}",
              **({"val_acc": "validation accuracy"} if accuracy else {"val_loss": "validation perplexity"})}
    rest = rest_of(runs, ("attn_wd",))
    groups = list(dict.fromkeys(rest.values()))[:MOST_RUNS]
    wds = sorted({setting_of(name, folder) for name in runs})
    with plt.rc_context({**STYLE, "savefig.dpi": 110}):
        fig, axes = plt.subplots(len(groups), 3, figsize=(10.5, 2.7 * len(groups) + 0.4), sharex=True, squeeze=False)
        for line, group in zip(axes, groups):
            for ax, (name, label) in zip(line, panels.items()):
                for i, wd in enumerate(wds):
                    steps = {}
                    for run, rows in runs.items():
                        for row in rows if rest[run] == group and setting_of(run, folder) == wd else ():
                            if row.get(name) not in (None, ""):
                                steps.setdefault(int(row["step"]), []).append(float(row[name]))
                    t, values = sorted(steps), [np.exp(steps[step]) if name == "val_loss" else np.array(steps[step]) for step in sorted(steps)]
                    colour = plt.get_cmap("viridis")(0.9 * i / max(1, len(wds) - 1))
                    ax.plot(t, [v.mean() for v in values], color=colour, linewidth=1.2, label=f"{wd:g}")
                    ax.fill_between(t, [v.min() for v in values], [v.max() for v in values], color=colour, alpha=0.2, linewidth=0)
                ax.set_title(label + f", {group}" * bool(group))
            for ax in line[:2]:
                ax.set_ylim(0, 1.04 * ax.get_ylim()[1])
            if not accuracy:
                line[2].set_yscale("log")
                line[2].yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
                line[2].yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
                line[2].yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        for ax in axes[-1]:
            ax.set_xlabel("step")
        lines, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(lines, labels, title="attn_wd", loc="outside right center")
        return write(fig, folder, "over_training")


def sweep(folder):
    """All that the grid of a sweep.py's out_dir allows: t1 where it varies attn_wd and mlp_wd apart, n3 where the learning rate, f3a, f3b and
    over_training where attn_wd. Returns the PNGs' paths, none where no run is done."""
    path = os.path.join(folder, "sweep.csv")
    rows = read(path, ("cell", "status"))
    if not any(row["status"] == "done" and row.get("norm_all_last") for row in rows):
        return []
    runs = [varied(row["cell"]) for row in rows]
    varies = {name for run in runs for name in run if len({x.get(name) for x in runs}) > 1}
    pairs = {(run.get("attn_wd"), run.get("mlp_wd")) for run in runs}
    apart = len(pairs) > max(len({pair[i] for pair in pairs}) for i in (0, 1))
    drawn = [t1(path)] if apart else []
    if {"learning_rate", "attn_wd"} <= varies:
        return [*drawn, n3(path)]
    return [*drawn, f3a(path), f3b(path), over_training(folder)] if "attn_wd" in varies else drawn


def everything(root="results"):
    """Draws all figures under results/ again; returns (the PNGs' paths, a line for each that lacks what it is drawn from)."""
    drawn, left = [], []
    for folder, _, files in sorted(os.walk(root)):
        if "sweep.csv" in files:
            drawn += sweep(folder)
        for name, draw in FIGURES.items():
            png = os.path.join(folder, f"{name}.png")
            if f"{name}.png" in files and png not in drawn:
                beside = [os.path.normpath(os.path.join(folder, file)) for file in SOURCES.get(name, ("heads.csv",))]
                try:
                    drawn.append(draw(next((path for path in beside if os.path.exists(path)), beside[0])))
                except (ValueError, OSError) as error:
                    left.append(f"{png} stays as it is: {error}")
    return drawn, left

# ---------------------------------------------------------------------------------------------------------------- helpers

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


def rank_column(path, rows):
    """rank95, or whatever the threshold rank's column is called. Raises ValueError where there is none."""
    name = next((name for name in rows[0] if name.startswith("rank")), None)
    if name is None:
        raise ValueError(f"{path}: no column rank95 or the like")
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
    fig.savefig(f"{base}.png")
    fig.set_layout_engine("none")  # as laid out for the PNG: twice would take as long again
    fig.savefig(f"{base}.pdf")
    plt.close(fig)
    return f"{base}.png"


FIGURES = {"heads": heads, "f4": f4, "heatmap": heatmap, "spectra": spectra, "norms": norms, "f1": f1, "f2": f2, "f5": f5,
           "f3a": f3a, "f3b": f3b, "t1": t1, "n3": n3, "over_training": over_training}
SOURCES = {"spectra": ("spectra.csv",), "norms": ("norms.csv",), "f1": (".",), "f2": (".",), "f5": (".",), "over_training": (".",),
           "f3a": ("heads.csv", "sweep.csv"), "f3b": ("heads.csv", "sweep.csv"), "t1": ("sweep.csv",), "n3": ("sweep.csv",)}  # else heads.csv

if __name__ == "__main__":
    with input_errors("figures.py"):
        if sys.argv[1:] in (["--help"], ["-h"]):
            print(__doc__.strip())
        elif sys.argv[1:] == ["all"]:
            drawn, left = everything()
            print("\n".join(drawn))
            print("".join(f"{line}\n" for line in left), end="", file=sys.stderr)
        elif len(sys.argv) == 3 and sys.argv[1] in FIGURES:
            print(FIGURES[sys.argv[1]](sys.argv[2]))
        else:
            raise ValueError(f"usage: python figures.py all, or {'|'.join(FIGURES)} FILE.csv or FOLDER")
