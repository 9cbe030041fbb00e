"""
CSV in, figures out: one function a figure, PNG and PDF beside the CSV it was drawn from.

    python figures.py heads out/analysis/heads.csv      # rank of every head by layer (F3a), and over training
    python figures.py f4 out/analysis/heads.csv         # half_sq_norm against nuclear, norms of the factors (F4)
    python figures.py heatmap out/analysis/heads.csv    # rank of every head, layer x head
    python figures.py spectra out/analysis/spectra.csv  # singular values, a line a layer
    python figures.py norms out/analysis/norms.csv      # norms and directions over training (N1, N2)
    python figures.py f1 out/factored                   # theory: balance, soft thresholding, depth, AdamW (train_factored.py); f5: scalars
    python figures.py f2 out/recall                     # associative recall: the runs in this folder's folders, over their weight decay
    python figures.py saturation out/saturation/saturation.csv              # N5: by layer, and over training beside the parameter norm
    python figures.py heads_saturated out/saturation/heads_saturated.csv    # N6: what heads attend to; and N4: scaling, of scaling.csv
"""
import contextlib
import csv
import glob
import json
import os
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
    """A CSV file as numpy columns: numbers where every value is one, else strings. Raises ValueError as read() does."""
    rows, out = read(path, columns), {}
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

# -------------------------------------------------------------------------------------------------------------- saturation

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
           "saturation": saturation, "heads_saturated": heads_saturated, "scaling": scaling}

if __name__ == "__main__":
    with input_errors("figures.py"):
        if len(sys.argv) != 3 or sys.argv[1] not in FIGURES:
            if sys.argv[1:] in (["--help"], ["-h"]):
                print(__doc__.strip())
                raise SystemExit(0)
            raise ValueError(f"usage: python figures.py {'|'.join(FIGURES)} FILE.csv or FOLDER")
        print(FIGURES[sys.argv[1]](sys.argv[2]))
