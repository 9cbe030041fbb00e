"""
The tables that scripts/saturate.py prints of the rows that it writes.
"""
import pandas as pd

from nanorank.checkpoints import run_of

SHOWN = (1.25, 2.0, 5.0, 10.0)  # c in print_scaling's table


def by_run(rows):
    """(run, its rows as a DataFrame) of each run, in order."""
    table = pd.DataFrame(rows)
    return table.groupby(table.checkpoint.map(run_of), sort=False)


def last_of(table):
    """The rows of a run's last checkpoint."""
    return table[table.checkpoint == table.checkpoint.iloc[-1]]


def print_saturation(rows, c):
    """Each run's last checkpoint beside the fresh model, layer by layer; then the run over training."""
    for run, table in by_run(rows):
        print(f"\n{run}: cosine to the state under all parameters x {c:g}, mean over tokens, "
              "and the ratio of norms")
        columns = {}
        for init, model in last_of(table).groupby("init", sort=False):
            columns["layer"] = list(model.layer)
            columns[init] = [f"{x:.4f}" for x in model.cosine]
            columns[f"{init}_ratio"] = [f"{x:.3g}" for x in model.norm_ratio]
        print(pd.DataFrame(columns).to_string(index=False))

        trained = table[table.init == "trained"]
        if trained.step.nunique() == 1:
            continue
        lines = []
        for step, model in trained.groupby("step", sort=False):
            is_output = model.layer == "output"
            lines.append({
                "step": step,
                "norm": f"{model.param_norm.iloc[0]:.2f}",
                "blocks": f"{model.cosine[~is_output].mean():.4f}",
                "output": f"{model.cosine[is_output].mean():.4f}",
            })
        print("over training (cosines: mean over blocks, and of the output)")
        print(pd.DataFrame(lines).to_string(index=False))


def print_heads(rows, c):
    """Kinds of heads and means over heads, layer by layer, of each run's last checkpoint."""
    for run, table in by_run(rows):
        last = last_of(table)
        available = last.available.iloc[0]
        print(f"\n{run}: heads under all parameters x {c:g}; "
              f"positions of {available:.1f} (means over queries)")
        lines = []
        for layer, heads in last.groupby("layer", sort=False):
            line = {"layer": layer}
            for kind in ("argmax", "mean", "mixed"):
                line[kind] = (heads.kind == kind).sum()
            line["positions"] = f"{heads.positions.mean():.2f}"
            line["distance"] = f"{heads.distance.mean():.2f}"
            line["entropy"] = f"{heads.entropy.mean():.3f}"
            lines.append(line)
        print(pd.DataFrame(lines).to_string(index=False))


def print_scaling(rows, c):
    """Each model's exponent k, and how near its output under c is to the plain and the saturated output."""
    print("\noutput under all parameters x c: cosine to f(theta), and (sat) "
          f"to f({c:g} theta); k: |f(c theta)| = c^k |f(theta)| of the last block")
    table = pd.DataFrame(rows)
    lines = []
    for label, model in table.groupby(table.apply(label_of, axis=1), sort=False):
        output = model[model.layer == "output"].set_index("c")
        last_block = model[model.layer != "output"].iloc[-1]  # the output's own k is 1 after a norm
        line = {"": label, "k": f"{last_block.k:.2f}"}
        for column, mark in (("cosine", ""), ("cosine_saturated", "sat:")):
            for factor in SHOWN:
                if factor in output.index:
                    line[f"{mark}c={factor:g}"] = f"{output[column][factor]:.4f}"
        lines.append(line)
    print(pd.DataFrame(lines).to_string(index=False))


def label_of(row):
    label = row["init"] if row["init"] == "untrained" else f"{row['checkpoint'][-30:]} {row['init']}"
    if row["norm"]:
        label += f", {row['norm']}-norm"
    if row["bias"]:
        label += " with biases"
    return label
