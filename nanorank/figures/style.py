"""
The parts that all figures share: style and colours, runs in a table, axes, files.
"""
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from nanorank.checkpoints import run_of
from nanorank.errors import UserError
from nanorank.files import writing
from nanorank.tables import read_csv

# Okabe & Ito's colours, safe for the colour-blind; 7 colours and 8 markers make 56 pairs
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX*"
PRODUCTS = {"qk": r"$W_K^\top W_Q$", "ov": r"$P\,W_V$"}
FACTORS = {"qk": ("W_K", "W_Q"), "ov": ("P", "W_V")}
MOST_RUNS = 4  # rows of a figure that has a row a run
HEAD_COLUMNS = ("checkpoint", "step", "layer", "head", "product", "d_head")
plt.rcParams.update({
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
})


def look(i):
    """Colour and marker of the i-th run."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def shade(i, n):
    """The i-th of n colours that go from dark to bright."""
    return plt.get_cmap("viridis")(0.9 * i / max(1, n - 1))


def read_runs(path, columns):
    """read_csv with two more columns: `run`, a short name, and `place`, the layer with its stack if any."""
    table = read_csv(path, columns).copy()  # in one piece: spectra.csv has hundreds of columns
    folders = table["checkpoint"].astype(str).map(run_of)
    table["run"] = folders.map(short_names(list(folders.unique())))
    if "layer" in table:
        table["place"] = table["layer"].astype(str)
    if "stack" in table:  # encoder or decoder, empty where a model has one stack
        table["stack"] = table["stack"].fillna("")
        table["place"] = (table["stack"] + " " + table["place"]).str.strip()
    return table


def short_names(folders):
    """{run folder: its name in a legend}: the last part of the path where that tells runs apart."""
    names = [os.path.basename(folder) for folder in folders]
    if len(set(names)) < len(names):
        names = folders
    if len(names) > 1 and max(map(len, names)) > 24:
        # long names: leave out what they share
        start = os.path.commonprefix(names)
        end = os.path.commonprefix([name[::-1] for name in names])
        middles = [f"...{name[len(start):len(name) - len(end)]}" for name in names]
        names = middles if len(set(middles)) == len(names) else folders
    return dict(zip(folders, names))


def pick(table, **values):
    """The rows that have these values in these columns."""
    for name, value in values.items():
        table = table[table[name] == value]
    return table


def by_run(table):
    """[(short name, its rows), ...] in the file's order, the first MOST_RUNS of them."""
    return list(table.groupby("run", sort=False))[:MOST_RUNS]


def last_rows(table):
    """The rows of each run's last checkpoint."""
    last = table.groupby("run")["checkpoint"].transform("last")
    return table[table["checkpoint"] == last].copy()


def has_snapshots(table):
    """Whether some run has checkpoints of several steps."""
    return bool((table.groupby("run")["step"].nunique() > 1).any())


def rank_column(path, table):
    """rank95, or however the threshold rank's column is called."""
    for name in table.columns:
        if name.startswith("rank"):
            return name
    raise UserError(f"{path}: no column rank95 or the like")


def label_layers(axis, places):
    """Names an axis's integer positions by layer, some twelve of them at most."""
    some = range(0, len(places), 1 + (len(places) - 1) // 12)
    axis.set_ticks(list(some), [places[i] for i in some])
    if axis.axis_name == "x" and any(" " in place for place in places):  # encoder 0, encoder 1, ...
        axis.set_tick_params(rotation=60)


def whole_numbers(*axes):
    for axis in axes:
        axis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))


def legend(fig, ax, columns):
    """One legend above all panels, of the lines in `ax`, in as many columns as fit."""
    lines, labels = ax.get_legend_handles_labels()
    fit = int(fig.get_figwidth() * 12 / (6 + max(map(len, labels))))  # some 12 letters an inch
    fig.legend(lines, labels, loc="outside upper center", ncols=max(1, min(6, columns, fit)))


def write(fig, path, name, dpi=160):
    """NAME.png and NAME.pdf in a folder, or beside the file `path`; returns the PNG's path."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    base = os.path.join(folder, name)
    with writing(f"{base}.png"):
        fig.savefig(f"{base}.png", dpi=dpi)
    fig.set_layout_engine("none")  # as laid out for the PNG: twice would take as long again
    with writing(f"{base}.pdf"):
        fig.savefig(f"{base}.pdf", dpi=dpi)
    plt.close(fig)
    return f"{base}.png"
