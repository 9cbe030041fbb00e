"""
CSV tables through pandas, for every script but the trainers.

    heads = read_csv("out/demo/heads.csv", ["layer", "head", "product"])    # a DataFrame
    write_csv("out/demo/heads.csv", rows)                                   # rows: dicts, or a DataFrame
"""
import re

import pandas as pd

from nanorank.errors import UserError
from nanorank.files import write_atomic


def read_csv(path, columns=()):
    """A CSV file as a DataFrame, every digit kept. Raises UserError where it lacks rows or `columns`."""
    try:
        table = pd.read_csv(path, float_precision="round_trip")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path} is no CSV table: {error}") from None
    for name in columns:
        if name not in table:
            raise UserError(f"{path}: no column {name}")
    if table.empty:
        raise UserError(f"{path}: no rows")
    return table


def write_csv(path, rows):
    """Writes a list of dicts, or a DataFrame, as CSV, whole or not at all. Returns the path.

    Of dicts, numbers are written as Python prints them (NaN as nan), None and what a row lacks is left empty.
    """
    table = rows
    if not isinstance(rows, pd.DataFrame):
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]
        table = pd.DataFrame(cells, columns=columns)
    text = table.to_csv(index=False, lineterminator="\n")
    write_atomic(path, lambda file: file.write(text.encode()))
    return path


def undetermined(table, given, always=()):
    """The columns that the columns `given` do not settle: rows equal in `given` differ in them.

    always: columns that are named in any case.
    """
    n_groups = len(table[given].drop_duplicates())
    others = [name for name in table if name not in given]
    return [name for name in others
            if name in always or len(table[[*given, name]].drop_duplicates()) > n_groups]


# ------------------------------------------------------------ heads.csv: what decay regularises

# the column `regulariser`, and how its gap is computed
HOW = {
    "nuclear": "nuclear norm",
    "planes": "sum over rotary planes of |a_j| |b_j|",
    "none": "q and k are normed, so decay does not regularise their product",
}


def plane_columns(heads):
    """The columns on rotary planes that heads.csv has, for printed tables: planes95, gap_planes ..."""
    names = [name for name in heads if re.match(r"planes\d|(gap|imbalance)_planes", name)]
    return [name for name in names if heads[name].notna().any()]  # another run's may be the ones


def whole_products(heads, product):
    """The rows of heads.csv of "qk" or "ov": stacked over its queries where they share a key/value head."""
    stacked = heads["product"] == f"{product}_stacked"
    keys = [name for name in ("model", "checkpoint", "stack", "layer") if name in heads]
    layers = pd.MultiIndex.from_frame(heads[keys].fillna(""))
    grouped = layers.isin(layers[stacked])  # a model may share keys in one stack alone
    return heads[stacked | ((heads["product"] == product) & ~grouped)]


def regularised(heads, product):
    """The rows of heads.csv on whose factors L2 acts as a norm of their product, of "qk" or "ov".

    These are whole_products. In columns of their own: `norm`, what L2 becomes, its `norm_gap` and
    `norm_gap_gaussian`; `regulariser` names it.
    """
    rows = whole_products(heads, product).copy()
    if "regulariser" not in rows:
        rows["regulariser"] = "nuclear"
    planes = rows["regulariser"] == "planes"
    names = {"norm": ("nuclear", "nuclear_planes"), "norm_gap": ("gap", "gap_planes"),
             "norm_gap_gaussian": ("gap_gaussian", "gap_planes_gaussian")}
    for name, (plain, by_plane) in names.items():
        rows[name] = rows[plain].where(~planes, rows[by_plane]) if planes.any() else rows[plain]
    return rows


def how(rows, product):
    """How the gap of the rows of regularised() is computed, in words."""
    said = ", elsewhere ".join(HOW[name] for name in rows["regulariser"].unique())
    planes = rows[rows["regulariser"] == "planes"]
    if len(planes) and (2 * planes["planes"] < planes["d_head"]).any():
        said += " plus the nuclear norm of the rows that do not turn"
    stacked = rows["product"] != product
    if stacked.any() and set(rows["regulariser"]) != {"none"}:
        said += ", of each key/value head with all its queries"
        said += "" if stacked.all() else " where queries share keys"
    return said


def gap_lines(heads):
    """A line on each product whose gap is not that of the plain W_K^T W_Q or P W_V, for rows of heads.csv."""
    lines = []
    for product in ("qk", "ov"):
        rows = regularised(heads, product)
        if set(rows["product"]) == {product} and set(rows["regulariser"]) == {"nuclear"}:
            continue
        gaps = rows[rows["regulariser"] != "none"]
        numbers = "none"
        if len(gaps):
            gap, gaussian = gaps["norm_gap"].mean(), gaps["norm_gap_gaussian"].mean()
            numbers = f"{gap:.3f} (Gaussian factors {gaussian:.3f})"
        lines.append(f"gap that decay closes, {product}: {numbers}; {how(rows, product)}")
    return lines
