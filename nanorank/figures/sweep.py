"""
Figures over a grid of runs: F3a, F3b, T1, N3, and rank over training. `python -m scripts.figures rank_by_layer out/sweep/sweep.csv` draws them.
"""
import glob
import json
import os
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from nanorank.checkpoints import run_of
from nanorank.errors import UserError
from nanorank.figures.style import (
    COLOURS,
    KEYS,
    MARKERS,
    MOST_RUNS,
    PRODUCTS,
    STYLE,
    last_of,
    layer_of,
    legend,
    rank_column,
    read,
    write,
)


def varied(name):
    """{setting: value as text} of a run by its name: attn_wd=0.4,seed=2 as sweep.py names it, else a decay at its end (demo-4, vit/6)."""
    name = os.path.basename(name)
    number = re.search(r"(?:^|[-_])(\d+(?:\.\d+)?)$", name)
    return dict(part.split("=", 1) for part in name.split(",") if "=" in part) or ({"attn_wd": number[1]} if number else {})


def setting_of(name, path):
    """The attn_wd of a run by its name. Raises UserError naming the file that holds it."""
    if "attn_wd" not in varied(name):
        raise UserError(f"{path}: the name of run {name} does not tell its attn_wd; sweep.py's do, or a number at the end (demo-4)")
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
            raise UserError(f"{path}: no run is done that has ranks and an attn_wd")
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


def rank_by_layer(path, chosen=()):
    """F3a: rank95 of both products at the end against attn_wd, a column a layer (four, evenly spaced, or those chosen), the line their mean,
    a colour for each value of what else the grid varies; every head from a heads.csv of several runs, means over heads from a sweep.csv."""
    points, what, width = rank_points(path)
    layers = sorted({x["layer"] for x in points if not chosen or x["layer"][1] in chosen})
    if not layers:
        raise UserError(f"{path}: no layer {', '.join(map(str, chosen))}")
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
        return write(fig, os.path.dirname(path), "rank_by_layer")


def mean_rank(path):
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
        return write(fig, os.path.dirname(path), "mean_rank")


def wd_grid(path):
    """T1 from sweep.csv: test perplexity (test_acc where there is one) over attn_wd x mlp_wd, mean +- sample standard deviation over seeds;
    the number of seeds where some are missing; a panel for each combination of what else the grid varies. Returns the PNG's path."""
    rows = read(path, ("cell", "status", "attn_wd", "mlp_wd"))
    name = next((name for name in ("test_acc", "test_ppl") if name in rows[0]), None)
    if name is None:
        raise UserError(f"{path}: no run is done")
    return grid_figure(path, rows, "wd_grid", ("attn_wd", "mlp_wd"), name, {"test_acc": "test accuracy", "test_ppl": "test perplexity"}[name], "cividis")


def norm_growth(path):
    """N3 from sweep.csv: norm of all parameters at the end over that at the start, learning rate x decay, a panel an optimizer (and each
    combination of what else the grid varies); colours on a logarithmic scale around 1, no growth. Returns the PNG's path."""
    rows = read(path, ("cell", "status", "learning_rate", "attn_wd", "norm_all_first", "norm_all_last"))
    rows = [{**row, "growth": float(row["norm_all_last"]) / float(row["norm_all_first"]) if row["status"] == "done" else ""} for row in rows]
    return grid_figure(path, rows, "norm_growth", ("learning_rate", "attn_wd"), "growth", "norm at the end / at the start", "PuOr_r", centred=True)


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
        raise UserError(f"{path}: no run is done")
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
        raise UserError(f"{folder}: no curves.csv and no run (*/log.jsonl) in it")
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
                ax.set_title(label + (",\n" if len(group) > 16 else ", ") * bool(group) + group)
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
    drawn = [wd_grid(path)] if apart else []
    if {"learning_rate", "attn_wd"} <= varies:
        return [*drawn, norm_growth(path)]
    return [*drawn, rank_by_layer(path), mean_rank(path), over_training(folder)] if "attn_wd" in varies else drawn
