"""
The tables that scripts/saturate.py prints of the rows that it writes.
"""
import pandas as pd

from nanorank.checkpoints import run_of

SHOWN = (1.25, 2.0, 5.0, 10.0)  # c in the table of scaling curves


def print_tables(tables, c):
    """Prints {file name: rows}: each run's last checkpoint, layer by layer, and the run over training."""
    for run, table in by_run(tables["saturation.csv"]):
        last = last_of(table).pivot_table(["cosine", "norm_ratio"], "layer", "init", sort=False)
        print(f"\n{run}: states against those under all parameters x {c:g}, means over tokens")
        print(last.to_string(float_format="{:.4g}".format))
        trained = table[table.init == "trained"]
        if trained.step.nunique() > 1:
            part = trained.layer.astype(str).where(trained.layer == "output", "blocks")
            over = trained.pivot_table("cosine", ["step", "param_norm"], part, sort=False)
            print("over training (cosines: mean over blocks, and of the output)")
            print(over.to_string(float_format="{:.4f}".format))

    for run, table in by_run(tables["heads_saturated.csv"]):
        layers = last_of(table).groupby("layer")
        means = layers[["positions", "available", "distance", "entropy"]].mean()
        print(f"\n{run}: heads under all parameters x {c:g}, and means over their queries")
        print(layers.kind.value_counts().unstack(fill_value=0).join(means).to_string(float_format="%.3f"))

    if tables["scaling.csv"]:
        table = pd.DataFrame(tables["scaling.csv"])
        model = ["checkpoint", "init", "norm", "bias"]
        output = table[(table.layer == "output") & table.c.isin(SHOWN)]
        wide = output.pivot_table(["cosine", "cosine_saturated"], model, "c", sort=False)
        # the output's own k is 1 after a norm
        wide["k of the last block"] = table[table.layer != "output"].groupby(model).k.last()
        print(f"\noutput under all parameters x c: cosine to f(theta), and to f({c:g} theta); "
              "k: |f(c theta)| = c^k |f(theta)|")
        print(wide.to_string(float_format="{:.4f}".format))


def by_run(rows):
    """(run, its rows as a DataFrame) of each run, in order."""
    table = pd.DataFrame(rows, columns=list(rows[0]) if rows else ["checkpoint"])
    return table.groupby(table.checkpoint.map(run_of), sort=False)


def last_of(table):
    """The rows of a run's last checkpoint."""
    return table[table.checkpoint == table.checkpoint.iloc[-1]]
