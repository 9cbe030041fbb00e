"""
Figures of the models that theory speaks of: factorised models and two parameters (scripts/theory.py),
associative recall by a transformer of attention alone (scripts/theory_attention.py, config/recall.py).

Each takes a folder and returns the path of the PNG in it.
"""
import json
import os
import pathlib

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from nanorank.errors import UserError
from nanorank.figures.style import COLOURS, MARKERS, PRODUCTS, look, pick, shade, write
from nanorank.tables import read_csv

RUNS = {
    "Adam with L2": "optimizer == 'adam_l2' and grad_noise == 0",
    "AdamW, exact gradient": "optimizer == 'adamw' and grad_noise == 0",
    "AdamW, noisy gradient": "optimizer == 'adamw' and grad_noise > 0",
}


def factorised_models(folder):
    """The linear models of Kobayashi et al. 2024: gradient flow (a to d), depth 3 (e), Adam and AdamW (f).

    Predictions are dashed; the problem is recovery where nothing else is said.
    """
    def read(name, *columns):
        return read_csv(os.path.join(folder, name), ("optimizer", "depth", "grad_noise", "lam", *columns))

    curves = read("curves.csv", "problem", "seed", "t", "sum_sq", "two_nuclear", "discrepancy")
    spectra = read("spectra.csv", "problem", "seed", "step", "i", "s", "s_target")
    predictions = read("predictions.csv", "i", "s")
    flow = curves.query("seed == 0 and optimizer == 'flow' and depth == 2")
    recovery = spectra.query("seed == 0 and problem == 'recovery'")
    if flow.empty or recovery.empty:
        raise UserError(f"{folder}: the figure needs recovery and flow:2 among the runs of scripts/theory.py")
    lams = np.unique(flow["lam"])[1:]  # without 0
    lams = lams[np.linspace(0, len(lams) - 1, 4).round().astype(int)[:3]]

    def over_lam(ax, runs, marker="o", colour=None, label=None):
        """Last singular values against lam. runs: a query. colour: None for one for each singular value."""
        last = recovery.query(runs)
        last = last[last["step"] == last["step"].max()]
        for i, line in predictions.query(runs).groupby("i"):
            points = last.query("i == @i")
            if recovery.query("i == @i")["s_target"].max() > 1e-9:
                rings = {"color": colour or COLOURS[i], "markersize": 5, "fillstyle": "none"}
                ax.plot(line["lam"], line["s"], "--", color=rings["color"], linewidth=1)
                ax.plot(points["lam"], points["s"], marker, label=label if i == 0 else None, **rings)
        ax.set(xlabel=r"$\lambda$", ylabel="singular values at the end")

    fig, ((a, b, c), (d, e, f)) = plt.subplots(2, 3, figsize=(10.5, 6.4))
    norms_over_time(a, flow, lams)
    discrepancy_over_time(b, flow, lams)
    over_lam(c, "optimizer == 'flow' and depth == 2")
    c.set_title(r"(c) dashed: $\max(s_i(M) - \lambda, 0)$")
    spectrum_over_time(d, flow, recovery, lams[-1])
    over_lam(e, "optimizer == 'flow' and depth == 3")
    e.set_title("(e) depth 3, dashed: the Schatten-2/3 minimum")
    for (label, runs), marker, colour in zip(RUNS.items(), "+xo", COLOURS):
        over_lam(f, f"depth == 2 and {runs}", marker, colour, label)
    f.set(title="(f) the Adams, dashed: predictions", ylim=(-0.1, 1.45 * recovery["s_target"].max()))
    f.legend(loc="upper right")
    return write(fig, folder, "factorised_models", dpi=110)


def norms_over_time(ax, flow, lams):
    """Squared norms of the factors against twice the nuclear norm of their product."""
    for colour, lam in zip(COLOURS, lams):
        own = flow.query("problem == 'recovery' and lam == @lam")
        ax.plot(own["t"], own["sum_sq"], color=colour, label=rf"$\lambda$ = {lam:g}")
        ax.plot(own["t"], own["two_nuclear"], ":", color=colour)
    ax.plot([], [], "k-", label=r"$|A|^2 + |B|^2$")
    ax.plot([], [], "k:", label=r"$2\,|AB^\top|_*$")
    most = flow.query("t < 8")["sum_sq"].max()
    ax.set(title="(a) L2 becomes the nuclear norm", xlabel="t", xlim=(0, 8), ylim=(0, 1.45 * most))
    ax.legend(loc="upper center", ncols=2)


def discrepancy_over_time(ax, flow, lams):
    """How fast the factors become balanced, on every problem."""
    t = np.linspace(0, 25, 100)
    for colour, lam in zip(COLOURS, lams):
        ax.plot(t, np.exp(-2 * lam * t), "--", color=colour, linewidth=1)
        for marker, (problem, own) in zip(MARKERS, flow.query("lam == @lam").groupby("problem")):
            left = own["discrepancy"] / own["discrepancy"].iloc[0]
            label = problem if lam == lams[-1] else None
            ax.plot(own["t"], left, marker, color=colour, markersize=4, fillstyle="none", label=label)
    ax.set_title(r"(b) $|A^\top A - B^\top B|_F$, start = 1; dashed: $e^{-2\lambda t}$")
    ax.set(xlabel="t, colours as in (a)", yscale="log", xlim=(0, 25), ylim=(1e-7, 300))
    ax.legend(loc="upper right")


def spectrum_over_time(ax, flow, recovery, lam):
    times = flow.query("problem == 'recovery' and lam == @lam")["t"]
    spectra = recovery.query("optimizer == 'flow' and depth == 2 and lam == @lam")
    targets = np.unique(recovery["s_target"])[::-1]
    for i, s in enumerate(targets[targets > 1e-9]):
        ax.plot(times, spectra.query("i == @i")["s"], color=COLOURS[i])
        ax.axhline(max(s - lam, 0), color=COLOURS[i], linestyle="--", linewidth=1)
    ax.set_title(rf"(d) $\lambda$ = {lam:g}, dashed: $\max(s_i(M) - \lambda, 0)$")
    ax.set(xlabel="t", ylabel="singular values", xscale="log", xlim=(0.1, None))


def two_parameters(folder):
    """Trajectories of two parameters over the loss's contours; rings show where they are expected to end."""
    columns = ("form", "optimizer", "grad_noise", "lam", "w1", "w2", "loss", "w1_expected", "w2_expected")
    table = read_csv(os.path.join(folder, "scalars.csv"), columns)

    # the loss is a quadratic: its coefficients follow from the rows
    def basis(x, y):
        return np.stack([x**2, x * y, y**2, x, y, np.ones_like(x)], -1)

    coefficients = np.linalg.lstsq(basis(table["w1"], table["w2"]), table["loss"], rcond=None)[0]
    x, y = np.meshgrid(np.linspace(-0.05, 1.25, 200), np.linspace(-0.12, 1.3, 200))
    loss = basis(x, y) @ coefficients
    ring = {"color": "black", "markersize": 9, "fillstyle": "none", "zorder": 5}

    fig, axes = plt.subplots(2, 3, figsize=(10.5, 7), sharex=True, sharey=True)
    for line, form, symbol in zip(axes, ("free", "factorised"), (r"$w$ free", r"$w = a\,b$")):
        for ax, (title, runs) in zip(line, RUNS.items()):
            ax.contour(x, y, loss, levels=np.geomspace(0.002, 1, 9), colors="0.8", linewidths=0.7)
            ax.axhline(0, color="0.5", linewidth=0.5)
            ax.axvline(0, color="0.5", linewidth=0.5)
            for colour, (lam, own) in zip(COLOURS, pick(table, form=form).query(runs).groupby("lam")):
                end = own.iloc[-1]
                ax.plot(own["w1"], own["w2"], color=colour, linewidth=1, label=rf"$\lambda$ = {lam:g}")
                ax.plot(end["w1"], end["w2"], "o", color=colour, markersize=4)
                ax.plot(end["w1_expected"], end["w2_expected"], "o", **ring)
            ax.set_title(f"{title}, {symbol}")
        line[0].set_ylabel("$w_2$")
    for ax in axes[1]:
        ax.set_xlabel("$w_1$")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=8)
    return write(fig, folder, "two_parameters", dpi=110)


OPTIMIZERS = {
    "gd": "gradient descent",
    "momentum": "momentum",
    "adam_l2": "Adam with L2",
    "adamw": "AdamW",
}


def attention_balance(folder):
    """|P^T P - W_V W_V^T| of a transformer over training, and its nuclear against its Frobenius norms."""
    columns = ("optimizer", "lam", "t", "layer", "product", "discrepancy", "predicted", "half_sq_norm",
               "nuclear")
    table = pick(read_csv(os.path.join(folder, "attention.csv"), columns), product="ov")
    for column in ("discrepancy", "predicted"):
        table[column] = table[column] ** 2
    both = table.groupby(["optimizer", "lam", "t"], sort=False)  # the norm over both layers
    table = both[["discrepancy", "predicted", "half_sq_norm", "nuclear"]].sum().reset_index()
    table[["discrepancy", "predicted"]] **= 0.5

    fig, axes = plt.subplots(2, 4, figsize=(11.5, 5.6), sharex="col", sharey="row")
    for (a, b), (name, title) in zip(axes.T, OPTIMIZERS.items()):
        for i, (lam, run) in enumerate(pick(table, optimizer=name).groupby("lam")):
            colour = COLOURS[i]
            a.plot(run["t"], run["predicted"], "--", color=colour, linewidth=1)
            a.plot(run["t"], run["discrepancy"], MARKERS[i], color=colour, markersize=4, fillstyle="none",
                   markevery=2, label=rf"$\lambda$ = {lam:g}")
            b.plot(run["t"], run["half_sq_norm"], color=colour)
            b.plot(run["t"], run["nuclear"], ":", color=colour)
        a.set(title=title, yscale="log")
        a.legend(loc="lower left")
        beta = r" / (1 - $\beta$)" if name == "momentum" else ""
        b.set_xlabel(f"t = sum of step sizes{beta}")
    axes[0, 0].set_ylabel(r"$|P^\top P - W_V W_V^\top|_F$; dashed: $e^{-2\lambda t}$")
    axes[1, 0].set_ylabel("norms of OV, both layers")
    axes[1, 0].plot([], [], "k-", label=r"$(|P|^2 + |W_V|^2)/2$")
    axes[1, 0].plot([], [], "k:", label=r"$|P\,W_V|_*$")
    axes[1, 0].legend()
    return write(fig, folder, "attention_balance", dpi=110)


def recall(folder):
    """Associative recall over weight decay: rank, imbalance of OV, nuclear norm against Frobenius norms."""
    runs = recall_runs(folder)
    wds = [f"{result['attn_wd']:g}" for result, _ in runs]

    fig, (a, b, c) = plt.subplots(1, 3, figsize=(10.5, 3.4))
    for i, (product, symbol) in enumerate(PRODUCTS.items()):
        ranks = [log[f"attn_rank95_{product}"].iloc[-1] for _, log in runs]
        a.plot(range(len(runs)), ranks, label=f"rank95 of {symbol}", **look(i))
    accuracies = [f"{100 * result['test_acc']:.0f}" for result, _ in runs]
    a.set_xticks(range(len(runs)), map("\n".join, zip(wds, accuracies)))
    a.set_title("(a) rank at the end, mean over layers")
    a.set(xlabel="weight decay; test accuracy in %", ylim=(0, None))
    a.legend()

    for i, (_, log) in enumerate(runs):
        colour = shade(i, len(runs))
        b.plot(log["step"], log["attn_imbalance_ov"], color=colour, label=wds[i])
        c.plot(log["step"], log["attn_half_sq_norm_ov"], color=colour)
        c.plot(log["step"], log["attn_nuclear_ov"], ":", color=colour)
    b.set_title(r"(b) $|P^\top P - W_V W_V^\top|$ / $(|P^\top P| + |W_V W_V^\top|)$")
    b.set(xlabel="step", ylim=(0, None))
    b.legend(title="weight decay", ncols=2)
    c.plot([], [], "k-", label=r"$(|P|^2 + |W_V|^2)/2$")
    c.plot([], [], "k:", label=r"$|P\,W_V|_*$")
    c.set(title="(c) nuclear norm against Frobenius norms", xlabel="step", ylim=(0, None))
    c.legend()
    return write(fig, folder, "recall", dpi=110)


def recall_runs(folder):
    """[(result.json, the lines of log.jsonl that hold ranks), ...] of the finished runs, by weight decay."""
    runs = []
    for path in sorted(pathlib.Path(folder).glob("*/result.json")):
        log = pd.read_json(path.with_name("log.jsonl"), lines=True)
        if "attn_rank95_ov" not in log:
            raise UserError(f"{path}: no ranks in its log.jsonl; train with --rank_interval")
        runs.append((json.loads(path.read_text()), log.dropna(subset="attn_rank95_ov")))
    if not runs:
        raise UserError(f"{folder}: no finished run (*/result.json) in it")
    return sorted(runs, key=lambda run: run[0]["attn_wd"])
