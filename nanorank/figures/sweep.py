"""
Figures of a grid of runs: rank and perplexity against weight decay, norm growth, curves over training.
"""
import glob
import json
import os
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from nanorank.checkpoints import run_of
from nanorank.errors import UserError
from nanorank.figures.style import (
    HEAD_COLUMNS,
    MOST_RUNS,
    PRODUCTS,
    STYLE,
    WIDE_STYLE,
    colour_of,
    last_rows,
    legend,
    look,
    rank_column,
    read_runs,
    write,
)
from nanorank.tables import read_csv, undetermined


def varied(name):
    """{setting: value as text} of a run by its name: attn_wd=0.4,seed=2 as scripts/sweep.py names it.

    Else a number at its end is its attn_wd: demo-4, vit/6.
    """
    name = os.path.basename(name)
    settings = dict(part.split("=", 1) for part in name.split(",") if "=" in part)
    number = re.search(r"(?:^|[-_])(\d+(?:\.\d+)?)$", name)
    if not settings and number:
        settings["attn_wd"] = number[1]
    return settings


def attn_wd_of(name, path):
    """The attn_wd of a run by its name. Raises UserError naming the file that holds it."""
    settings = varied(name)
    if "attn_wd" not in settings:
        raise UserError(
            f"{path}: the name of run {name} does not tell its attn_wd; call runs attn_wd=4,seed=1 as "
            "scripts/sweep.py does, or let their names end in the number (demo-4)"
        )
    return float(settings["attn_wd"])


def rest_of(names, given, always=()):
    """{name: what else varies between these runs, as text}, beside the settings `given` and the seed.

    Settings that `given` determine are left out, except `always`.
    """
    runs = pd.DataFrame([varied(name) for name in names], index=list(names))
    runs = runs.reindex(columns=list(dict.fromkeys([*given, *runs])))
    rest = [name for name in undetermined(runs, given, always) if name != "seed"]
    return {
        name: ", ".join(f"{key}={value}" for key, value in run.dropna().items())
        for name, run in runs[rest].iterrows()
    }


def rank_points(path):
    """Ranks at the end of training: (table, what a row of it is, width of the heads).

    The columns are wd, rest, layer, place, product, rank. From a heads.csv a row is a head; from a
    sweep.csv it is a layer of a run, the mean over its heads.
    """
    table = read_csv(path)
    if "cell" not in table:
        table = last_rows(read_runs(path, HEAD_COLUMNS))
        table["rank"] = table[rank_column(path, table)]
        folders = table["checkpoint"].map(run_of)
        names = folders.unique()
        table["wd"] = folders.map({name: attn_wd_of(name, path) for name in names})
        table["rest"] = folders.map(rest_of(names, ["attn_wd"]))
        return table, "head", table["d_head"].max()

    table = table[table["status"] == "done"]
    columns = [name for name in table if re.fullmatch(r"layer\d+_rank95_(qk|ov)", name)]
    if table.empty or not columns or "attn_wd" not in table:
        raise UserError(f"{path}: no run is done that has ranks and an attn_wd")
    d_head = table["n_embd"].iloc[0] // table["n_head"].iloc[0]
    table = table.melt(["cell", "attn_wd"], columns, value_name="rank")
    table[["place", "product"]] = table["variable"].str.extract(r"layer(\d+)_rank95_(\w+)")
    table["layer"] = table["place"].astype(int)
    table["wd"] = table["attn_wd"]
    table["rest"] = table["cell"].map(rest_of(table["cell"].unique(), ["attn_wd"]))
    return table, "layer (mean over its heads) of every run", int(d_head)


def rank_by_layer(path, chosen=()):
    """Threshold rank of both products at the end against attn_wd, a column a layer; the lines are means.

    path: a sweep.csv (a dot is a layer of a run) or a heads.csv of several runs (a dot is a head).
    chosen: numbers of the layers to show; if empty, four that are evenly spaced.
    A colour for each value of what else the grid varies. Returns the PNG's path.
    """
    points, dot, d_head = rank_points(path)
    if chosen:
        points = points[points["layer"].isin(chosen)]
    if points.empty:
        raise UserError(f"{path}: no layer {', '.join(map(str, chosen))}")
    by = ["stack", "layer"] if "stack" in points else ["layer"]
    places = list(points.sort_values(by)["place"].unique())
    if not chosen:
        spaced = np.linspace(0, len(places) - 1, 4).round().astype(int)
        places = [places[i] for i in sorted(set(spaced))]
    wds = sorted(points["wd"].unique())
    groups = list(points["rest"].unique())

    with plt.rc_context(STYLE):
        size = (max(4, 0.8 + 2.3 * len(places)), 5.2)
        fig, axes = plt.subplots(2, len(places), figsize=size, sharex=True, sharey=True, squeeze=False)
        for line, (product, symbol) in zip(axes, PRODUCTS.items()):
            for ax, place in zip(line, places):
                here = points[(points["product"] == product) & (points["place"] == place)]
                for i, group in enumerate(groups):
                    own = here[here["rest"] == group]
                    beside = 0.6 * ((i + 0.5) / len(groups) - 0.5)  # groups stand side by side
                    x = own["wd"].map(wds.index) + beside
                    mean = own.groupby(x)["rank"].mean()
                    ax.scatter(x, own["rank"], s=14, alpha=0.6, linewidth=0, **look(i))
                    ax.plot(mean.index, mean, linewidth=1, color=colour_of(i), label=group)
                ax.set_title(f"{symbol}, layer {place}")

        label_wds(axes[-1], wds)
        for ax in axes[:, 0]:
            ax.set_ylabel(f"rank95 (heads of width {d_head})")
        axes[0, 0].set_ylim(0, 1.03 * d_head)
        fig.supxlabel(f"dots: each {dot}; lines: their mean", fontsize=8)
        if any(groups):
            legend(fig, axes[0, 0], len(groups))
        return write(fig, os.path.dirname(path), "rank_by_layer")


def mean_rank(path):
    """Threshold rank of both products at the end against attn_wd, mean over all heads and layers.

    The band holds the middle half of them: of heads from a heads.csv, of layers and seeds from a
    sweep.csv. Returns the PNG's path.
    """
    points, dot, d_head = rank_points(path)
    wds = sorted(points["wd"].unique())
    groups = list(points["rest"].unique())

    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.2), sharey=True)
        for ax, (product, symbol) in zip(axes, PRODUCTS.items()):
            for i, group in enumerate(groups):
                own = points[(points["product"] == product) & (points["rest"] == group)]
                ranks = own.groupby(own["wd"].map(wds.index))["rank"]
                mean = ranks.mean()
                low = ranks.quantile(0.25)
                high = ranks.quantile(0.75)
                ax.plot(mean.index, mean, markersize=4, label=group, **look(i))
                ax.fill_between(mean.index, low, high, color=colour_of(i), alpha=0.15, linewidth=0)
            ax.set_title(symbol)
        label_wds(axes, wds)
        axes[0].set_ylabel(f"rank95 (heads of width {d_head})")
        axes[0].set_ylim(0, 1.03 * d_head)
        note = f"lines: mean over heads and layers; bands: the middle half, of every {dot}"
        fig.supxlabel(note, fontsize=8)
        if any(groups):
            legend(fig, axes[0], len(groups))
        return write(fig, os.path.dirname(path), "mean_rank")


def label_wds(axes, wds):
    for ax in axes:
        ax.set_xticks(range(len(wds)), [f"{wd:g}" for wd in wds])
        ax.set_xlabel("attn_wd")


def wd_grid(path):
    """Test perplexity (or accuracy; of val where there is no test) over attn_wd x mlp_wd, mean +- sample sd.

    A panel for each combination of what else the grid varies. path: a sweep.csv. Returns the PNG's path.
    """
    table = read_csv(path, ("cell", "status", "attn_wd", "mlp_wd"))
    given = ["attn_wd", "mlp_wd"]
    for split in ("test", "val"):
        for name, word in (("acc", "accuracy"), ("ppl", "perplexity")):
            metric = f"{split}_{name}"
            if metric in table:
                return grid_figure(path, table, "wd_grid", given, metric, f"{split} {word}", "cividis")
    raise UserError(f"{path}: no run is done")


def norm_growth(path):
    """Norm of all parameters at the end over that at the start, learning rate x decay, a panel an optimizer.

    Colours are logarithmic around 1, no growth. path: a sweep.csv. Returns the PNG's path.
    """
    columns = ("cell", "status", "learning_rate", "attn_wd", "norm_all_first", "norm_all_last")
    table = read_csv(path, columns)
    table["growth"] = table["norm_all_last"] / table["norm_all_first"]
    label = "norm at the end / at the start"
    given = ["learning_rate", "attn_wd"]
    return grid_figure(path, table, "norm_growth", given, "growth", label, "PuOr_r", centred=True)


def grid_figure(path, table, figure, given, value, label, colours, centred=False):
    """A heatmap of the mean of column `value` over the two settings `given` (rows, columns).

    A panel for each combination of what else the grid varies.
    """
    for name in given:  # a run that is missing has no value where the setting does not vary
        table[name] = table[name].fillna(table[name].max())
    table["done"] = table["status"] == "done"
    table["rest"] = table["cell"].map(rest_of(table["cell"], given, always=["optimizer"]))
    panels = list(table.groupby("rest", sort=False))[:MOST_RUNS]

    drawn = pd.concat([panel[panel["done"]] for _, panel in panels])
    means = drawn.groupby(["rest", *given])[value].agg(strict_mean)
    finite = means[np.isfinite(means)]
    if finite.empty:
        raise UserError(f"{path}: no run is done")
    if centred:
        most = max(np.abs(np.log(finite)).max(), 1e-3)
        norm = matplotlib.colors.LogNorm(np.exp(-most), np.exp(most))
    else:
        norm = matplotlib.colors.Normalize(finite.min(), finite.max())
    colour_map = plt.get_cmap(colours).copy()
    colour_map.set_bad("0.85")

    with plt.rc_context({**STYLE, "axes.spines.top": True, "axes.spines.right": True}):
        n_rows, n_columns = (max(panel[name].nunique() for _, panel in panels) for name in given)
        size = ((0.9 + 0.95 * n_columns) * len(panels) + 0.9, 1.2 + 0.55 * n_rows)
        fig, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
        for ax, (title, panel) in zip(axes[0], panels):
            heights, widths = (sorted(panel[name].unique()) for name in given)
            image = panel[panel["done"]].pivot_table(value, *given, aggfunc=strict_mean)
            image = image.reindex(index=heights, columns=widths)
            shown = ax.imshow(image, cmap=colour_map, norm=norm, aspect="auto", interpolation="none")
            for (height, width), seeds in panel.groupby(given):
                y = heights.index(height)
                x = widths.index(width)
                colour = text_colour(shown, image.loc[height, width])
                ax.text(x, y, grid_text(seeds, value), ha="center", va="center", fontsize=8, color=colour)
            ax.set_xticks(range(len(widths)), [f"{x:g}" for x in widths])
            ax.set_yticks(range(len(heights)), [f"{y:g}" for y in heights])
            ax.set(title=title, xlabel=given[1], ylabel=given[0])
        bar = fig.colorbar(shown, ax=axes, label=label, format="%.3g")
        bar.ax.yaxis.set_minor_formatter("{x:.3g}")
        return write(fig, os.path.dirname(path), figure)


def strict_mean(values):
    """The mean, nan where one of the values is: a run that diverged is not left out."""
    return np.mean(values.to_numpy())


def grid_text(seeds, value):
    """`9.42`, `± 0.12` over several seeds, `(4 of 5)` where some are missing; a line each."""
    done = seeds.loc[seeds["done"], value].to_numpy()
    if not len(done):
        return "missing"
    text = f"{np.mean(done):.4g}"
    if len(done) > 1:
        text += f"\n± {np.std(done, ddof=1):.2g}"
    if len(done) < len(seeds):
        text += f"\n({len(done)} of {len(seeds)})"
    return text


def text_colour(image, value):
    """Black or white, whichever can be read on the colour that the image gives to `value`."""
    if not np.isfinite(value):
        return "black"
    red, green, blue, _ = image.to_rgba(value)
    bright = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
    return "black" if bright else "white"


def over_training(folder):
    """Threshold rank of both products and validation against step, a line an attn_wd, mean over seeds.

    The band reaches from the least to the most. Validation is accuracy where there is one, else
    perplexity. folder: one with scripts/sweep.py's curves.csv, else with folders of runs (log.jsonl).
    A row of panels for each combination of what else the grid varies. Returns the PNG's path.
    """
    curves = read_curves(folder)
    runs = curves["cell"].unique()
    curves["wd"] = curves["cell"].map({name: attn_wd_of(name, folder) for name in runs})
    curves["rest"] = curves["cell"].map(rest_of(runs, ["attn_wd"]))
    curves["val_ppl"] = np.exp(curves["val_loss"])
    groups = list(curves["rest"].unique())[:MOST_RUNS]
    wds = sorted(curves["wd"].unique())

    panels = {f"attn_rank95_{product}": f"rank95 of {symbol}" for product, symbol in PRODUCTS.items()}
    accuracy = "val_acc" in curves
    if accuracy:
        panels["val_acc"] = "validation accuracy"
    else:
        panels["val_ppl"] = "validation perplexity"

    with plt.rc_context(WIDE_STYLE):
        size = (10.5, 2.7 * len(groups) + 0.4)
        fig, axes = plt.subplots(len(groups), 3, figsize=size, sharex=True, squeeze=False)
        for line, group in zip(axes, groups):
            for ax, (name, label) in zip(line, panels.items()):
                for i, wd in enumerate(wds):
                    own = curves[(curves["rest"] == group) & (curves["wd"] == wd)]
                    steps = own.dropna(subset=name).groupby("step")[name]
                    mean = steps.mean()
                    colour = plt.get_cmap("viridis")(0.9 * i / max(1, len(wds) - 1))
                    band = {"color": colour, "alpha": 0.2, "linewidth": 0}
                    ax.plot(mean.index, mean, color=colour, linewidth=1.2, label=f"{wd:g}")
                    ax.fill_between(mean.index, steps.min(), steps.max(), **band)
                if group:
                    label += f",\n{group}" if len(group) > 16 else f", {group}"
                ax.set_title(label)
            for ax in line[:2]:
                ax.set_ylim(0, 1.04 * ax.get_ylim()[1])
            if not accuracy:
                line[2].set_yscale("log")
                axis = line[2].yaxis
                axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
                axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
                axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        for ax in axes[-1]:
            ax.set_xlabel("step")
        lines, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(lines, labels, title="attn_wd", loc="outside right center")
        return write(fig, folder, "over_training")


def read_curves(folder):
    """Ranks and validation over training, from curves.csv or log.jsonl files; a run is a `cell`."""
    columns = ["cell", "step", "attn_rank95_qk", "attn_rank95_ov", "val_loss"]
    path = os.path.join(folder, "curves.csv")
    if os.path.exists(path):
        return read_csv(path, columns)
    logs = []
    for log in sorted(glob.glob(os.path.join(glob.escape(folder), "*", "log.jsonl"))):
        with open(log, encoding="utf-8") as file:
            lines = pd.DataFrame([json.loads(line) for line in file])
        logs.append(lines.assign(cell=os.path.basename(os.path.dirname(log))))
    if not logs:
        raise UserError(f"{folder}: no curves.csv and no run (*/log.jsonl) in it")
    curves = pd.concat(logs)
    missing = [name for name in columns if name not in curves]
    if missing:
        raise UserError(f"{folder}: no {missing[0]} in the runs' log.jsonl")
    return curves


def sweep(folder):
    """Draws what scripts/sweep.py's out_dir allows. Returns the PNGs' paths, none if no run is done.

    wd_grid where attn_wd and mlp_wd vary apart. norm_growth where the learning rate and attn_wd vary,
    else rank_by_layer, mean_rank and over_training where attn_wd does.
    """
    path = os.path.join(folder, "sweep.csv")
    table = read_csv(path, ("cell", "status"))
    if "norm_all_last" not in table or table["norm_all_last"].isna().all():
        return []
    runs = pd.DataFrame([varied(name) for name in table["cell"]])
    varies = {name for name in runs if runs[name].nunique(dropna=False) > 1}
    drawn = []
    if {"attn_wd", "mlp_wd"} <= varies:
        n_pairs = len(runs[["attn_wd", "mlp_wd"]].drop_duplicates())
        if n_pairs > max(runs["attn_wd"].nunique(), runs["mlp_wd"].nunique()):
            drawn.append(wd_grid(path))
    if {"learning_rate", "attn_wd"} <= varies:
        drawn.append(norm_growth(path))
    elif "attn_wd" in varies:
        drawn += [rank_by_layer(path), mean_rank(path), over_training(folder)]
    return drawn
