"""
Figures of a grid of runs: rank and perplexity against weight decay, norm growth, curves over training.

Each returns the path of its PNG, which lies beside what it was drawn from.
"""
import contextlib
import os
import pathlib
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import colors, ticker

from nanorank.checkpoints import run_of
from nanorank.errors import UserError
from nanorank.figures import style
from nanorank.figures.style import HEAD_COLUMNS, MOST_RUNS, PRODUCTS, look, pick
from nanorank.sweep_tables import cell_text, interval
from nanorank.tables import read_csv, undetermined


def varied(name):
    """{setting: value as text} of a run by its name: attn_wd=0.4,seed=2, or attn_wd alone: demo-4, vit/6."""
    name = os.path.basename(name)
    settings = dict(part.split("=", 1) for part in name.split(",") if "=" in part)
    number = re.search(r"(?:^|[-_])(\d+(?:\.\d+)?)$", name)
    if not settings and number:
        settings["attn_wd"] = number[1]
    return settings


def attn_wd_of(name, path):
    if "attn_wd" not in varied(name):
        raise UserError(f"{path}: the name of run {name} does not tell its attn_wd; call runs "
                        "attn_wd=4,seed=1 as scripts/sweep.py does, or let their names end in it (demo-4)")
    return float(varied(name)["attn_wd"])


def rest_of(names, given, always=()):
    """{run's name: what varies beside `given` and the seed, as text}; what `given` settle is left out."""
    runs = pd.DataFrame([varied(name) for name in names], index=list(names))
    runs = runs.reindex(columns=list(dict.fromkeys([*given, *runs])))
    rest = [name for name in undetermined(runs, given, always) if name != "seed"]
    texts = {}
    for name, run in runs[rest].iterrows():
        texts[name] = ", ".join(f"{setting}={value}" for setting, value in run.dropna().items())
    return texts


def decays_of(runs, path):
    """(decay of attention, what else varies, as text) of each run in a column of names: two columns.

    A decay is (attn_wd,). Where qk_wd varies too, and some run has no decay on attention at all, it is
    (attn_wd, qk_wd): that of W_V and P, and that of W_Q and W_K.
    """
    names, given = runs.unique(), ["attn_wd"]
    decays = {name: (attn_wd_of(name, path),) for name in names}
    halves = {}
    for name, (attn_wd,) in decays.items():
        qk_wd = float(varied(name).get("qk_wd", "nan"))
        halves[name] = (attn_wd, attn_wd if qk_wd < 0 else qk_wd)  # -1: as attn_wd
    if (0, 0) in halves.values():
        decays, given = halves, ["attn_wd", "qk_wd"]
    return runs.map(decays), runs.map(rest_of(names, given))


def decay_text(decay):
    """0.5, or 0.5, qk_wd=0 where W_Q and W_K have a decay of their own."""
    return ", qk_wd=".join(f"{wd:g}" for wd in decay)

# --------------------------------------------------------------- rank at the end

def rank_points(path):
    """Ranks at the end: (table of decay, rest, layer, place, product, rank; what a row is; heads' width)."""
    table = read_csv(path)
    if "cell" not in table:
        table = style.last_rows(style.read_runs(path, HEAD_COLUMNS))
        table["rank"] = table[style.rank_column(path, table)]
        table["decay"], table["rest"] = decays_of(table["checkpoint"].map(run_of), path)
        return table, "head", table["d_head"].max()

    table = table[table["status"] == "done"]
    columns = [name for name in table if re.fullmatch(r"layer\d+_rank95_(qk|ov)", name)]
    if table.empty or not columns or "attn_wd" not in table:
        raise UserError(f"{path}: no run is done that has ranks and an attn_wd")
    d_head = table["n_embd"].iloc[0] // table["n_head"].iloc[0]
    table = table.melt("cell", columns, value_name="rank")
    table[["place", "product"]] = table["variable"].str.extract(r"layer(\d+)_rank95_(\w+)")
    table["layer"] = table["place"].astype(int)
    table["decay"], table["rest"] = decays_of(table["cell"], path)
    return table, "layer (mean over its heads) of every run", int(d_head)


def rank_by_layer(path):
    """Threshold rank at the end against attn_wd, for four layers, a colour for what else the grid varies."""
    points, dot, d_head = rank_points(path)
    by = ["stack", "layer"] if "stack" in points else ["layer"]
    places = points.sort_values(by)["place"].unique()
    places = places[np.unique(np.linspace(0, len(places) - 1, 4).round().astype(int))]
    decays = sorted(points["decay"].unique())
    groups = list(points["rest"].unique())

    size = (max(4, 0.8 + 2.3 * len(places)), 5.2)
    fig, axes = plt.subplots(2, len(places), figsize=size, sharex=True, sharey=True, squeeze=False)
    for line, (product, symbol) in zip(axes, PRODUCTS.items()):
        for ax, place in zip(line, places):
            for i, group in enumerate(groups):
                own = pick(points, product=product, place=place, rest=group)
                beside = 0.6 * ((i + 0.5) / len(groups) - 0.5)  # groups stand side by side
                x = own["decay"].map(decays.index) + beside
                ax.scatter(x, own["rank"], s=14, alpha=0.6, linewidth=0, **look(i))
                mean = own["rank"].groupby(x).mean()
                ax.plot(mean, linewidth=1, color=look(i)["color"], label=group)
            ax.set_title(f"{symbol}, layer {place}")
    fig.supxlabel(f"dots: each {dot}; lines: their mean", fontsize=8)
    label_ranks(fig, axes, decays, groups, d_head)
    return style.write(fig, path, "rank_by_layer")


def mean_rank(path):
    """Threshold rank at the end against attn_wd, mean over all heads and layers; band: the middle half."""
    points, dot, d_head = rank_points(path)
    decays = sorted(points["decay"].unique())
    groups = list(points["rest"].unique())

    fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.2), sharey=True, squeeze=False)
    for ax, (product, symbol) in zip(axes[0], PRODUCTS.items()):
        for i, group in enumerate(groups):
            own = pick(points, product=product, rest=group)
            ranks = own["rank"].groupby(own["decay"].map(decays.index))
            band = ranks.quantile([0.25, 0.75]).unstack()
            colour = look(i)["color"]
            ax.plot(ranks.mean(), markersize=4, label=group, **look(i))
            ax.fill_between(band.index, band[0.25], band[0.75], color=colour, alpha=0.15, linewidth=0)
        ax.set_title(symbol)
    fig.supxlabel(f"lines: mean over heads and layers; bands: the middle half, of every {dot}", fontsize=8)
    label_ranks(fig, axes, decays, groups, d_head)
    return style.write(fig, path, "mean_rank")


def label_ranks(fig, axes, decays, groups, d_head):
    ticks = [decay_text(decay).replace(", ", ",\n").replace("=", "\n= ") for decay in decays]
    for ax in axes[-1]:
        ax.set_xticks(range(len(decays)), ticks)
        ax.set_xlabel("attn_wd")
    for ax in axes[:, 0]:
        ax.set_ylabel(f"rank95 (heads of width {d_head})")
    axes[0, 0].set_ylim(0, 1.03 * d_head)
    if any(groups):
        style.legend(fig, axes[0, 0], len(groups))

# ------------------------------------------------------------------ two settings

def wd_grid(path):
    """Test perplexity or accuracy (val's if there is no test) over attn_wd x mlp_wd, mean +- sd."""
    table = read_csv(path, ("cell", "status", "attn_wd", "mlp_wd"))
    for split in ("test", "val"):
        for name, word in (("acc", "accuracy"), ("ppl", "perplexity")):
            if f"{split}_{name}" in table:
                table["value"] = table[f"{split}_{name}"]
                label = f"{split} {word}"
                return grid_figure(path, table, "wd_grid", ["attn_wd", "mlp_wd"], label, "cividis")
    raise UserError(f"{path}: no run is done")


def norm_growth(path):
    """Norm of all parameters, end over start, learning rate x decay; colours are logarithmic around 1."""
    columns = ("cell", "status", "learning_rate", "attn_wd", "norm_all_first", "norm_all_last")
    table = read_csv(path, columns)
    table["value"] = table["norm_all_last"] / table["norm_all_first"]
    given = ["learning_rate", "attn_wd"]
    label = "norm at the end / at the start"
    return grid_figure(path, table, "norm_growth", given, label, "PuOr_r", centred=True)


def grid_figure(path, table, figure, given, label, colour_map, centred=False):
    """A heatmap of the mean `value` over the two settings `given`, a panel for what else the grid varies."""
    for name in given:  # a run that is missing has no value where the setting does not vary
        table[name] = table[name].fillna(table[name].max())
    table["done"] = table["status"] == "done"
    table["rest"] = table["cell"].map(rest_of(table["cell"], given, always=["optimizer"]))
    panels = dict(list(table.groupby("rest", sort=False))[:MOST_RUNS])
    images = {}
    for title, panel in panels.items():
        image = panel[panel["done"]].pivot_table("value", *given, aggfunc=strict_mean)
        heights, widths = (sorted(panel[name].unique()) for name in given)
        images[title] = image.reindex(index=heights, columns=widths).astype(float)

    means = np.concatenate([image.to_numpy().ravel() for image in images.values()])
    finite = means[np.isfinite(means)]
    if not len(finite):
        raise UserError(f"{path}: no run is done")
    norm = colors.Normalize(finite.min(), finite.max())
    if centred:
        most = max(np.abs(np.log(finite)).max(), 1e-3)
        norm = colors.LogNorm(np.exp(-most), np.exp(most))
    colour_map = plt.get_cmap(colour_map).with_extremes(bad="0.85")

    n_rows, n_columns = (max(image.shape[i] for image in images.values()) for i in (0, 1))
    size = ((0.9 + 0.95 * n_columns) * len(panels) + 0.9, 1.2 + 0.55 * n_rows)
    fig, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for ax, (title, image) in zip(axes[0], images.items()):
        shown = ax.imshow(image, cmap=colour_map, norm=norm, aspect="auto", interpolation="none")
        for (height, width), seeds in panels[title].groupby(given):
            text = cell_text(seeds).replace(" ±", "\n±").replace(" (", "\n(")
            at = image.columns.get_loc(width), image.index.get_loc(height)
            colour = text_colour(shown, image.loc[height, width])
            ax.text(*at, text, ha="center", va="center", fontsize=8, color=colour)
        ax.set_xticks(range(image.shape[1]), [f"{x:g}" for x in image.columns])
        ax.set_yticks(range(image.shape[0]), [f"{y:g}" for y in image.index])
        ax.set(title=title, xlabel=given[1], ylabel=given[0])
        ax.spines[:].set_visible(True)
    bar = fig.colorbar(shown, ax=axes, label=label, format="%.3g")
    bar.ax.yaxis.set_minor_formatter("{x:.3g}")
    return style.write(fig, path, figure)


def strict_mean(values):
    """The mean, nan where one of the values is: a run that diverged is not left out."""
    return values.to_numpy().mean()


def text_colour(image, value):
    """Black or white, whichever can be read on the colour that the image gives to `value`."""
    if not np.isfinite(value):
        return "black"
    red, green, blue, _ = image.to_rgba(value)
    bright = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
    return "black" if bright else "white"

# ----------------------------------------------------------------- over training

def over_training(folder):
    """Threshold rank and validation against step, a line a decay: mean over seeds; band: all of them.

    A row of panels for each combination of what else the grid varies.
    """
    curves = read_curves(folder)
    curves["val_ppl"] = np.exp(curves["val_loss"])
    groups = curves["rest"].unique()[:MOST_RUNS]
    decays = sorted(curves["decay"].unique())
    panels = {f"attn_rank95_{product}": f"rank95 of {symbol}" for product, symbol in PRODUCTS.items()}
    if "val_acc" in curves:
        panels["val_acc"] = "validation accuracy"
    else:
        panels["val_ppl"] = "validation perplexity"

    size = (10.5, 2.7 * len(groups) + 0.4)
    fig, axes = plt.subplots(len(groups), 3, figsize=size, sharex=True, squeeze=False)
    for line, group in zip(axes, groups):
        for ax, (name, label) in zip(line, panels.items()):
            for i, decay in enumerate(decays):
                own = pick(curves, rest=group, decay=decay)
                steps = own.dropna(subset=name).groupby("step")[name].agg(["mean", "min", "max"])
                colour = style.shade(i, len(decays))
                ax.plot(steps["mean"], color=colour, linewidth=1.2, label=decay_text(decay))
                ax.fill_between(steps.index, steps["min"], steps["max"], color=colour, alpha=0.2, linewidth=0)
            if len(group) > 40:  # a line a setting
                label += ",\n" + group.replace(", ", ",\n")
            elif group:
                label += f",\n{group}" if len(group) > 16 else f", {group}"
            ax.set_title(label)
        for ax in line[:2]:
            ax.set_ylim(0, 1.04 * ax.get_ylim()[1])
        if "val_ppl" in panels:
            line[2].set_yscale("log")
            line[2].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            line[2].yaxis.set_major_formatter("{x:g}")
            line[2].yaxis.set_minor_formatter("")
    for ax in axes[-1]:
        ax.set_xlabel("step")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(lines, labels, title="attn_wd", loc="outside right center")
    return style.write(fig, folder, "over_training", dpi=110)


def difference_over_training(folder):
    """Validation loss without decay on attention minus that with it, over training.

    A panel for each combination of what else the grid varies, a line a decay: the mean over seeds, paired.
    Band: its 95 % t interval.
    """
    differences = loss_differences(folder)
    groups = differences.index.unique("rest")[:MOST_RUNS]
    fig, axes = plt.subplots(1, len(groups), figsize=(0.8 + 2.9 * len(groups), 3), squeeze=False)
    for ax, group in zip(axes[0], groups):
        for i, (decay, values) in enumerate(differences.loc[group].items()):
            steps = {step: interval(seeds) for step, seeds in values.dropna().groupby("step")}
            if steps:
                mean, _, low, high = zip(*steps.values())
                label = decay_text(decay)
                ax.plot(list(steps), mean, markersize=3, linewidth=1.2, label=label, **look(i))
                ax.fill_between(list(steps), low, high, color=look(i)["color"], alpha=0.2, linewidth=0)
        ax.axhline(0, color="0.5", linewidth=0.8)
        ax.set_title(group.replace(", ", ",\n"))
        ax.set_xlabel("step")
        ax.legend(title="attn_wd", fontsize=8)
    none = "attn_wd = 0" if len(differences.columns[0]) == 1 else "no decay"
    axes[0, 0].set_ylabel(f"val loss (nats),\n{none} minus others")
    fig.supxlabel("below zero: no decay on attention is better\nbands: 95 % t intervals", fontsize=8)
    return style.write(fig, folder, "difference_over_training", dpi=110)


def loss_differences(folder):
    """A DataFrame with a column a decay of attention: the same seed's val_loss without it minus that with it.

    Its index is (rest, seed, step); decay and rest are those of read_curves.
    """
    curves = read_curves(folder)
    curves["seed"] = curves["cell"].map(lambda name: varied(name).get("seed", ""))
    curves = curves[curves["step"] > 0]  # at step 0 all runs of a seed are the same
    losses = curves.pivot_table("val_loss", ["rest", "seed", "step"], "decay")
    none = [decay for decay in losses if set(decay) == {0}]
    differences = pd.DataFrame()
    if none:
        differences = -losses.drop(columns=none).sub(losses[none[0]], axis=0).dropna(how="all")
    if differences.empty:
        raise UserError(f"{folder}: the runs lack attn_wd=0, or another to compare it with")
    return differences.reindex(curves["rest"].unique(), level="rest")  # in the grid's order


def read_curves(folder):
    """Ranks and validation over training, from curves.csv or log.jsonl files; a run is a `cell`.

    Its decay and what else the grid varies, rest, are those of decays_of.
    """
    columns = ["cell", "step", "attn_rank95_qk", "attn_rank95_ov", "val_loss"]
    path = os.path.join(folder, "curves.csv")
    if os.path.exists(path):
        curves = read_csv(path, columns)
    else:
        logs = sorted(pathlib.Path(folder).glob("*/log.jsonl"))
        if not logs:
            raise UserError(f"{folder}: no curves.csv and no run (*/log.jsonl) in it")
        curves = pd.concat(pd.read_json(log, lines=True).assign(cell=log.parent.name) for log in logs)
        for name in columns:
            if name not in curves:
                raise UserError(f"{folder}: no {name} in the runs' log.jsonl")

    curves["decay"], curves["rest"] = decays_of(curves["cell"], folder)
    return curves


def sweep(folder):
    """Draws what scripts/sweep.py's out_dir allows. Returns the PNGs' paths, none if no run is done."""
    path = os.path.join(folder, "sweep.csv")
    table = read_csv(path, ("cell", "status"))
    if "norm_all_last" not in table or table["norm_all_last"].isna().all():
        return []
    runs = pd.DataFrame([varied(name) for name in table["cell"]])
    varies = {name for name in runs if runs[name].nunique(dropna=False) > 1}
    drawn = []
    if {"attn_wd", "mlp_wd"} <= varies:
        n_pairs = len(runs[["attn_wd", "mlp_wd"]].drop_duplicates())
        if n_pairs > max(runs["attn_wd"].nunique(), runs["mlp_wd"].nunique()):  # they vary apart
            drawn.append(wd_grid(path))
    if {"learning_rate", "attn_wd"} <= varies:
        drawn.append(norm_growth(path))
    elif "attn_wd" in varies:
        drawn += [rank_by_layer(path), mean_rank(path), over_training(folder)]
        with contextlib.suppress(UserError):  # no pair of runs that differ in attn_wd alone has ended
            drawn.append(difference_over_training(folder))
    return drawn
