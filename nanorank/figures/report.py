"""
report.html: one page to explore every head, drawn from heads.csv and spectra.csv of a folder.

    python analyze.py out/demo-0 out/demo-4 --report
    python -m scripts.figures report out/analysis      # draws it again from the CSV files

The page holds plotly's script and its numbers, so it is one file and opens offline.
Its own script is in the template, report.html beside this file.
"""
import base64
import json
import math
import os

import numpy as np
import pandas as pd

from nanorank.errors import UserError
from nanorank.figures import style
from nanorank.files import write_atomic
from nanorank.spectra import gaussian_nuclear, gaussian_spectrum

TEMPLATE = os.path.join(os.path.dirname(__file__), "report.html")
COLUMNS = (*style.HEAD_COLUMNS, "half_sq_norm", "nuclear")
KEY = ["product", "place", "head"]  # what tells a checkpoint's rows apart; place: the layer with its stack
NO_METRICS = {"checkpoint", "step", "stack", "layer", "d_head", "run", *KEY}
MOST_NUMBERS = 900_000  # 5 MB as base64 of float32: with plotly's script the page stays under 10 MB


def report(folder):
    """Writes report.html into a folder with heads.csv and, for the singular values, spectra.csv.

    Returns its path. Raises UserError where plotly is not installed.
    """
    script = plotly_script()
    heads = style.read_runs(os.path.join(folder, "heads.csv"), COLUMNS)
    spectra = heads.iloc[:0]
    spectra_csv = os.path.join(folder, "spectra.csv")
    if os.path.exists(spectra_csv):
        spectra = style.read_runs(spectra_csv, style.HEAD_COLUMNS)

    # a checkpoint may be called </script>: so no tag begins inside the data
    data = json.dumps(page_data(heads, spectra), allow_nan=False).replace("<", r"\u003c")
    with open(TEMPLATE, encoding="utf-8") as file:
        page = file.read()
    page = page.replace("<!-- data -->", data).replace("<!-- plotly -->", script)
    path = os.path.join(folder, "report.html")
    write_atomic(path, lambda file: file.write(page.encode()))
    return path


def plotly_script():
    """The text of plotly.js. Raises UserError where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("the report needs plotly: pip install -r requirements-report.txt") from None
    return get_plotlyjs()


def page_data(heads, spectra):
    """The page's numbers as an object for JSON, from read_runs' tables of heads.csv and spectra.csv.

    Metrics, products and stacks are those that the tables have. Of many checkpoints some are left out.
    """
    heads = heads.assign(stack=heads.get("stack", "")).drop_duplicates(["checkpoint", *KEY])
    metrics = [name for name in heads.select_dtypes("number") if name not in NO_METRICS]
    places = heads[["place", "stack"]].drop_duplicates()
    products = list(heads["product"].unique())
    runs = style.by_run(heads)
    spectra = spectra[spectra["run"].isin([name for name, _ in runs])]

    room = MOST_NUMBERS - singular_values(spectra).size
    numbers_a_step = sum(len(rows[KEY].drop_duplicates()) for _, rows in runs) * len(metrics)
    most_steps = max(2, room // max(1, numbers_a_step))

    curves = {}  # {(nuclear norm, r): the spectrum of random factors}
    tables = [run_data(name, rows, spectra, metrics, most_steps, curves) for name, rows in runs]
    for table in tables:
        where = list(places["place"])
        table["rows"] = [[products.index(row[0]), where.index(row[1]), *row[2:]] for row in table["rows"]]
    return {"metrics": metrics, "products": list(map(str, products)), "places": list(places["place"]),
            "stacks": list(places["stack"]), "curves": list(curves.values()), "runs": tables}


def run_data(name, heads, spectra, metrics, most_steps, curves):
    """A run's part of the page: float32 arrays are in base64, NaN where the CSV files have nothing."""
    rows = heads.drop_duplicates(KEY)
    keys = pd.MultiIndex.from_frame(rows[KEY])
    checkpoints = list(heads["checkpoint"].unique())
    some = np.linspace(0, len(checkpoints) - 1, min(len(checkpoints), most_steps)).round().astype(int)
    shown = [checkpoints[i] for i in some]  # the first and the last among them
    values = []
    for checkpoint in shown:
        own = heads[heads["checkpoint"] == checkpoint].set_index(KEY)
        values.append(own[metrics].reindex(keys))

    spectra = spectra[spectra["checkpoint"] == shown[-1]].drop_duplicates(KEY).set_index(KEY)
    spectra = singular_values(spectra).reindex(keys)
    return {
        "name": str(name),
        "checkpoints": list(map(str, shown)),
        "left_out": len(checkpoints) - len(shown),
        "steps": [int(heads.loc[heads["checkpoint"] == path, "step"].iloc[0]) for path in shown],
        "rows": rows[[*KEY, "d_head"]].to_numpy().tolist(),
        "values": base64_of(values),    # (steps, rows, metrics)
        "spectra": base64_of(spectra),  # (rows, largest r), of the last checkpoint
        "curve": gaussian_curves(values[-1], spectra, curves),
    }


def singular_values(spectra):
    """The columns s1, s2, ... of a table."""
    return spectra.filter(regex=r"^s\d+$")


def base64_of(table):
    return base64.b64encode(np.asarray(table, dtype="<f4").tobytes()).decode()


def gaussian_curves(heads, spectra, curves):
    """For each head the index of its Gaussian spectrum in `curves`, which gets what it lacks; -1 for none.

    heads, spectra: metrics and singular values of one checkpoint, row by row.
    A curve is for factors of norm 1. Its sum follows from gap_gaussian, since the CSV files have no shapes.
    """
    if not {"gap_gaussian", "norm_A", "norm_B"} <= set(heads):
        return [-1] * len(heads)
    nuclear = (1 - heads["gap_gaussian"]) * heads["half_sq_norm"] / (heads["norm_A"] * heads["norm_B"])
    indices = []
    for x, r in zip(nuclear.round(6), spectra.notna().sum(axis=1)):
        known = 0 < x <= 1 and r > 0  # not so where a factor is 0, or spectra.csv lacks the head
        if known and (x, r) not in curves:
            curves[x, r] = gaussian_curve(x, r)
        indices.append(list(curves).index((x, r)) if known else -1)
    return indices


def gaussian_curve(nuclear, r):
    """Mean singular values [r] of random factors of norm 1 whose mean nuclear norm is this.

    It grows with d / r for factors (d, r), so bisection finds d / r, on small draws.
    """
    small = min(r, 64)
    low, high = 1 / small, 1e4
    while high > 1.01 * low:
        ratio = math.sqrt(low * high)
        d = max(1, round(ratio * small))
        if gaussian_nuclear(d, d, small) < nuclear:
            low = ratio
        else:
            high = ratio
    d = max(1, round(low * r))
    curve = gaussian_spectrum(d, d, r)
    return [float(f"{x:.4g}") for x in curve * nuclear / curve.sum()]
