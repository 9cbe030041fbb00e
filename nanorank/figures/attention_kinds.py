"""
A figure of a sweep over kinds of attention: rotary positions, QK-norm, grouped queries.
"""
import os

import matplotlib.pyplot as plt

from nanorank.checkpoints import run_of
from nanorank.errors import UserError
from nanorank.figures import style
from nanorank.figures.style import HEAD_COLUMNS, PRODUCTS, look, pick
from nanorank.tables import read_csv


def attention_kinds(folder):
    """What decay of attention does under rotary positions, QK-norm and grouped queries: a line a kind.

    Draws heads.csv of analyze.py and sweep.csv of the same runs, whose grid has rope, qk_norm and n_kv_head.
    Lines: means over layers, heads and seeds; bars: from the lowest to the highest seed.
    """
    path = os.path.join(folder, "heads.csv")
    table = style.last_rows(style.read_runs(path, HEAD_COLUMNS))
    if "planes95" not in table:
        raise UserError(f"{path}: no planes95, so no run has rotary positions")
    table["cell"] = table["checkpoint"].map(run_of).map(os.path.basename)
    sweep_path = os.path.join(folder, "sweep.csv")
    runs = read_csv(sweep_path, ("cell", "rope", "qk_norm", "n_kv_head", "attn_wd", "seed", "test_ppl"))
    runs = runs[runs["status"] == "done"]
    runs["kind"] = [kind_of(run) for _, run in runs.iterrows()]
    for product in PRODUCTS:
        ranks = pick(table, product=product).groupby("cell")["rank95"].mean()
        runs[f"rank95_{product}"] = runs["cell"].map(ranks)
    runs["planes95"] = runs["cell"].map(table.groupby("cell")["planes95"].mean())

    d_head = table["d_head"].max()
    panels = {
        "rank95_qk": f"rank95 of {PRODUCTS['qk']}, of {d_head}",
        "planes95": f"rotary planes that hold 95 %, of {d_head // 2}",
        "rank95_ov": f"rank95 of {PRODUCTS['ov']}, of {d_head}",
        "test_ppl": "test perplexity",
    }
    wds = sorted(runs["attn_wd"].unique())
    kinds = list(runs["kind"].unique())
    fig, axes = plt.subplots(1, len(panels), figsize=(11, 3.2))
    for ax, (name, title) in zip(axes, panels.items()):
        for i, kind in enumerate(kinds):
            own = pick(runs, kind=kind).dropna(subset=name)
            seeds = own.groupby("attn_wd")[name].agg(["mean", "min", "max"])
            if seeds.empty:
                continue
            x = [wds.index(wd) + 0.05 * (i - len(kinds) / 2) for wd in seeds.index]
            below, above = seeds["mean"] - seeds["min"], seeds["max"] - seeds["mean"]
            ax.errorbar(x, seeds["mean"], [below, above], markersize=4, label=kind, **look(i))
        ax.set_title(title)
        ax.set_xticks(range(len(wds)), [f"{wd:g}" for wd in wds])
        ax.set_xlabel("attn_wd")
        if name != "test_ppl":
            ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
    style.legend(fig, axes[0], len(kinds))
    return style.write(fig, folder, "attention_kinds")


def kind_of(run):
    """plain, or what a run's attention has: rotary + QK-norm."""
    parts = []
    if run["rope"]:
        parts.append("rotary")
    if run["qk_norm"]:
        parts.append("QK-norm")
    if run["n_kv_head"]:
        parts.append("grouped")
    return " + ".join(parts) or "plain"
