"""
Figures of scripts/theory.py and of associative recall: F1, F2, F5. `python -m scripts.figures factorised_models out/factored` draws them.
"""
import contextlib
import glob
import json
import os

import matplotlib.pyplot as plt
import numpy as np

from nanorank.errors import UserError
from nanorank.figures.style import COLOURS, MARKERS, PRODUCTS, STYLE, read, write


def table(path, columns):
    """A CSV file as numpy columns: numbers where every value is one, else strings; of a sweep.csv the runs that are done. Raises UserError
    as read() does."""
    rows, out = [row for row in read(path, columns) if row.get("status", "done") == "done"], {}
    if not rows:
        raise UserError(f"{path}: no run is done")
    for name in rows[0]:
        out[name] = np.array([row[name] for row in rows])
        with contextlib.suppress(ValueError):
            out[name] = out[name].astype(float)
    return out


def pick(columns, **wanted):
    """The rows of table()'s columns where each of these columns has this value."""
    keep = np.all([columns[name] == value for name, value in wanted.items()], axis=0)
    return {name: column[keep] for name, column in columns.items()}


def factorised_models(folder):
    """P1's linear models, from the CSV files of scripts/theory.py: four panels of gradient flow, one of depth 3, one of Adam and AdamW;
    predictions dashed, recovery where nothing else is said. Returns the PNG's path."""
    run = ("optimizer", "depth", "grad_noise", "lam")
    curves = table(os.path.join(folder, "curves.csv"), ("problem", *run, "seed", "t", "sum_sq", "two_nuclear", "discrepancy"))
    spectra = table(os.path.join(folder, "spectra.csv"), ("problem", *run, "seed", "step", "i", "s", "s_target"))
    predictions = table(os.path.join(folder, "predictions.csv"), (*run, "i", "s"))
    curves, spectra = pick(curves, seed=0), pick(spectra, seed=0)
    recovery = pick(spectra, problem="recovery")
    flow = pick(curves, optimizer="flow", depth=2)
    if not len(flow["t"]) or not len(recovery["s"]):
        raise UserError(f"{folder}: F1 wants recovery, and flow:2 among the runs of scripts/theory.py")
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
        return write(fig, folder, "factorised_models")


def recall(folder):
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
            raise UserError(f"{path}: no ranks in its log.jsonl; train with --rank_interval")
        runs.append((result["attn_wd"], result, {name: np.array([line[name] for line in log]) for name in log[0]}))
    if not runs:
        raise UserError(f"{folder}: no finished run (*/result.json) in it")
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
        return write(fig, folder, "recall")


def two_parameters(folder):
    """Two parameters, from scalars.csv of scripts/theory.py: trajectories over the loss's contours; rings: where they are expected to end.
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
        return write(fig, folder, "two_parameters")
