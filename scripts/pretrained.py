"""
The heads of pretrained models beside Gaussian factors, of the heads.csv that analyze.py makes of them.

    python analyze.py out/models/* --figure=False --norms=False --out_dir=out/pretrained
    python -m scripts.pretrained out/pretrained/heads.csv results/pretrained

Writes to the folder heads.csv (a row a head), summary.csv (means over the heads of each model and product)
and the figures of both. models.csv in it names the models, in the order of the figures, and their decay.
The models must still lie where analyze.py read them: their widths are read from there.
"""
import functools
import os
import sys

import numpy as np
import pandas as pd
import torch

from nanorank.checkpoints import Checkpoint
from nanorank.errors import UserError, user_errors
from nanorank.spectra import measure
from nanorank.tables import read_csv, regularised, write_csv

KEYS = ["model", "stack", "layer", "head", "product", "d_head"]


@functools.lru_cache
def gaussian_rank95(d_A, d_B, r):
    """Mean rank95 of A B^T over 16 draws of Gaussian A (d_A, r), B (d_B, r)."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(16, d, r, generator=generator) for d in (d_A, d_B))
    _, table = measure(A, B)
    return float(np.mean(table["rank95"]))


def gaussian_imbalance(norm_A, norm_B, d_A, d_B, r, planes):
    """The imbalance of Gaussian A (d_A, r), B (d_B, r) of these norms, from means of squares.

    Of A of norm 1, |A^T A|^2 is (d_A + r + 1) / (d_A r) in the mean, and <A^T A, B^T B> is 1 / r. The squared
    norms of its r / 2 planes have 2 (d_A + 1) / (d_A r) and 2 / r instead.
    """
    overlap = 2 / r if planes else 1 / r
    size_A, size_B = ((2 * (d + 1) if planes else d + r + 1) / (d * r) for d in (d_A, d_B))
    a, b = norm_A**2 * size_A**0.5, norm_B**2 * size_B**0.5  # |A^T A|, |B^T B|
    difference = a**2 + b**2 - 2 * norm_A**2 * norm_B**2 * overlap
    return np.maximum(difference, 0.0)**0.5 / (a + b)


def heads_of_model(path, rows):
    """The rows of one checkpoint in heads.csv, with the gap that L2 closes and what Gaussian factors have."""
    layer = next(Checkpoint(path).attention_layers())
    d = layer.W_Q.shape[-1]
    g = len(layer.W_Q) // (layer.n_kv_head or len(layer.W_Q))  # query heads of a key
    products = []
    for product, table in rows.groupby("product", sort=False):
        name = product.removesuffix("_stacked")
        right = regularised(rows, name)  # of these products, stacked where queries share keys
        table = table.assign(right_gap=np.nan, right_gap_gaussian=np.nan, right_imbalance=np.nan)
        is_planes = False
        if right["product"].iloc[0] == product and right["regulariser"].iloc[0] != "none":
            is_planes = right["regulariser"].iloc[0] == "planes"
            table["right_gap"] = right["norm_gap"]
            table["right_gap_gaussian"] = right["norm_gap_gaussian"]
            table["right_imbalance"] = right["imbalance_planes" if is_planes else "imbalance"]
        wide = g * d if product.endswith("_stacked") else d
        d_A, d_B = (wide, d) if name == "ov" else (d, wide)
        r = int(table["d_head"].iloc[0])
        table["rank95_gaussian"] = gaussian_rank95(d_A, d_B, r)
        table["right_imbalance_gaussian"] = gaussian_imbalance(
            table["norm_A"], table["norm_B"], d_A, d_B, r, is_planes).where(table["right_gap"].notna())
        products.append(table)
    return pd.concat(products).sort_index()


def summary_of(heads):
    """Means over the heads of each model, stack and product; `right` ones over key/value heads if stacked."""
    columns = ["rank95", "rank95_gaussian", "gap", "gap_gaussian", "imbalance", "right_gap",
               "right_gap_gaussian", "right_imbalance", "right_imbalance_gaussian", "norm_A", "norm_B"]
    groups = heads.groupby(["model", "stack", "product"], sort=False)
    table = groups[columns].mean()
    table.insert(0, "heads", groups.size())
    table.insert(1, "d_head", groups["d_head"].first())
    return table.reset_index()


def rounded(table, digits):
    """The table with its numbers as text of so many digits."""
    def text(x):
        return "" if pd.isna(x) else f"{x:.{digits}g}"
    floats = table.select_dtypes("float").columns
    return table.assign(**{name: table[name].map(text) for name in floats})


def main(path, folder):
    names = list(read_csv(os.path.join(folder, "models.csv"), ["model"])["model"])
    table = read_csv(path, ["checkpoint", "layer", "head", "product", "rank95"])
    table["model"] = [os.path.basename(name.rstrip("/")) for name in table["checkpoint"]]
    unknown = sorted(set(table["model"]) ^ set(names))
    if unknown:
        raise UserError(f"{', '.join(unknown)}: not in both of {path} and {folder}/models.csv")
    for column, usual in (("stack", ""), ("regulariser", "nuclear")):
        if column not in table:
            table[column] = usual
    table["stack"] = table["stack"].fillna("")

    by_model = {}
    for checkpoint, rows in table.groupby("checkpoint", sort=False):
        by_model[rows["model"].iloc[0]] = heads_of_model(checkpoint, rows)
    heads = pd.concat([by_model[name] for name in names])
    columns = ["regulariser", "rank95", "rank95_gaussian", "gap", "gap_gaussian", "imbalance", "right_gap",
               "right_gap_gaussian", "right_imbalance", "right_imbalance_gaussian", "norm_A", "norm_B"]
    heads = heads[[*KEYS, *columns]]
    write_csv(os.path.join(folder, "heads.csv"), rounded(heads, 5))
    write_csv(os.path.join(folder, "summary.csv"), rounded(summary_of(heads), 5))

    from nanorank.figures import pretrained
    print(pretrained.pretrained(os.path.join(folder, "heads.csv")))
    print(pretrained.factors(os.path.join(folder, "heads.csv")))


if __name__ == "__main__":
    with user_errors("pretrained.py"):
        if sys.argv[1:] in (["--help"], ["-h"]):
            print(__doc__.strip())
        elif len(sys.argv) == 3:
            main(*sys.argv[1:])
        else:
            raise UserError("usage: python -m scripts.pretrained heads.csv FOLDER")
