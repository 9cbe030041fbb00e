"""
Rank, norms and balance of every attention head in a checkpoint: tables, CSV files and figures.

    python analyze.py out/lm/ckpt.pt                   # ours or nanoGPT's
    python analyze.py openai-community/gpt2            # a Hugging Face hub id, folder, file; docs/families.md
    python analyze.py pythia-70m                       # a folder of step*, checkpoint-*: one run, in order
    python analyze.py out/demo-0 out/demo-4 --compare  # two runs: all snapshots, differences by layer
    python analyze.py out/demo-4 --report              # report.html: every head in the browser
    python analyze.py model.pt --pattern=wq.weight,wk.weight,wv.weight,wo.weight --n_head=8
    python analyze.py out/lm/ckpt.pt --truncate=0.95 --save=small.pt

Writes to OUT_DIR:
    heads.csv      a row per checkpoint, layer, head and product: qk is W_K^T W_Q, ov is P W_V;
                   qk_stacked, ov_stacked: of all queries of a key/value head (nanorank/regulariser.py)
    spectra.csv    singular values of the last checkpoint of each run
    norms.csv      a row per checkpoint and group of parameters
    fits.csv       curves fitted to the norms, where a run has three checkpoints or more
    compare.csv    with --compare, two runs layer by layer
and figures of them. The metrics are defined in nanorank/spectra.py, `metrics_of`.
"""
import json
import os
import re

import pandas as pd
from tqdm import tqdm

from configurator import configure
from nanorank.checkpoints import NOT_MODELS, SUFFIXES, expand, open_all, run_of
from nanorank.device import pick_device
from nanorank.errors import UserError, user_errors
from nanorank.families import left_out
from nanorank.files import make_folder
from nanorank.measure import head_rows
from nanorank.norms import CURVES, fit_rows, norm_rows
from nanorank.positions import remarks_on
from nanorank.spectra import rank_name
from nanorank.tables import gap_lines, plane_columns, write_csv
from nanorank.truncate import save_truncated, truncatable

# what is measured
out_dir = "out/analysis"    # where the CSV files and the figures go
threshold = 0.95            # rank95 is the smallest k with s_1 + ... + s_k >= 0.95 sum(s)
exact = False               # QR of every head: singular values to 1e-13 of the largest instead of 1e-7
device = "auto"             # where the spectra are computed: auto, cpu, cuda
norms = True                # norms.csv, which reads all tensors; without it attention's alone are read
# what is shown
figure = True               # draw the figures (needs matplotlib)
layers = ""                 # layers in the figure of heads: all, or some as 5,7,9
report = False              # report.html in OUT_DIR, a page to explore every head (needs plotly)
compare = False             # two runs or checkpoints: their differences layer by layer, and compare.csv
# models that do not say how their heads lie (nanorank/schemes.py knows most)
n_head = 0                  # heads per layer
n_kv_head = 0               # key/value heads per layer, where queries share them (else told from shapes)
d_head = 0                  # width of a head, instead of n_head, where stacks have different numbers of heads
stack_heads = ""            # heads of each stack, where stacks differ: encoder:3,decoder:4
pattern = ""                # ends of the names of q,k,v,o (or qkv,o or q,kv,o) after the layer's path
rope = ""                   # whether q and k turn: none, half, interleaved, half:64 (nanorank/positions.py)
layout = "separate"         # how heads lie in it: separate fused conv grouped gated mla lens codegen
state_dict = ""             # which of several state dicts in a file, by its key
# truncation of a GPT checkpoint of train_lm.py or nanoGPT
truncate = 0.0              # cut both products of every head to this threshold rank, with --save
save = ""                   # the truncated checkpoint, for train_lm.py --init_from=FILE --eval_only


def main(paths):
    """Measures the checkpoints that `paths` stand for; prints tables, writes CSV files, draws figures."""
    files = expand(paths)
    check_settings(paths, files)
    shown_layers = [int(x) for x in layers.split(",")] if layers else []
    make_folder(out_dir)

    # measure the heads, then the norms, checkpoint by checkpoint: each run in order of step
    heads, norm_table = [], []
    spectra, configs, sources, remarks = {}, {}, {}, {}  # by run, of its last checkpoint
    previous = None
    options = {"n_head": n_head, "n_kv_head": n_kv_head, "d_head": d_head,
               "pattern": pattern, "layout": layout, "state_dict": state_dict, "heads": stack_heads,
               "rope": rope}
    bar = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=len(files) * (1 + norms), disable=None, smoothing=0, bar_format=bar) as progress:
        for ckpt in open_all(paths, **options):
            progress.set_description(os.path.basename(ckpt.path))
            run = run_name(ckpt.path, files)
            modules = ckpt.modules()
            sources[run] = check_heads(ckpt, modules, shown_layers)
            remarks[run] = left_out(modules, ckpt.shapes)
            remarks[run] += remarks_on(modules, ckpt.shapes, ckpt.configs, rope)
            configs[run] = ckpt.configs.get("its config", {})
            raw = truncatable(ckpt) if save else None

            rows, spectra[run] = head_rows(ckpt, pick_device(device), threshold, exact, progress.update)
            if d_head and all(row["d_head"] != d_head for row in rows):
                width = f"are {rows[0]['d_head']} wide, by {sources[run]}"
                raise UserError(f"--d_head={d_head}: heads of {ckpt.path} {width}")
            heads += rows

            if norms:
                same_run = previous and run_of(previous.path) == run_of(ckpt.path)
                norm_table += norm_rows(ckpt, previous if same_run else None, progress.update)
            previous = ckpt
    fits = fit_rows(norm_table)

    # print tables
    table = heads_table(heads, files)
    runs = dict(list(table.groupby("run", sort=False)))
    last = {run: rows[rows["checkpoint"] == rows["checkpoint"].iloc[-1]] for run, rows in runs.items()}
    for run, rows in runs.items():
        print_heads(run, last[run], sources[run], remarks[run])
        if rows["checkpoint"].nunique() > 1:
            print_trajectory(run, rows)
    print_ignored(paths, files)
    print_fits(fits)
    comparison = print_comparison(last, configs) if compare else []
    if not compare and len(runs) > 1:
        print_side_by_side(last)

    # write CSV files
    tables = {"heads": heads, "spectra": sum(spectra.values(), []), "norms": norm_table,
              "fits": fits, "compare": comparison}
    tables = {name: rows for name, rows in tables.items() if rows}
    written = [f"{write_table(name, rows)} ({len(rows):,} rows)" for name, rows in tables.items()]
    if save:
        save_truncated(save, ckpt, raw, truncate)
    print(f"\nwrote {', '.join(written)}")

    if figure:
        from nanorank.figures import heads as figures
        from nanorank.figures.style import MOST_RUNS
        drawn = ", ".join(figures.analysis(out_dir, list(tables), shown_layers))
        if len(runs) > MOST_RUNS:
            drawn += f" (nuclear_norm, heatmap, spectra, norms: the first {MOST_RUNS} of {len(runs)} runs)"
        print(f"figures: {drawn}")
    if report:
        from nanorank.figures import report as page
        print(f"report: {page.report(out_dir)}")


def run_name(path, files):
    """The run that a checkpoint belongs to. With --compare, each of two checkpoints is a run of its own."""
    return path if compare and len(files) == 2 else run_of(path)


def write_table(name, rows):
    """Writes OUT_DIR/NAME.csv; `stack`, `regulariser` only where they tell something. Returns the path."""
    table = pd.DataFrame(rows, dtype=object)
    for column, usual in (("stack", ""), ("regulariser", "nuclear")):
        if column in table and all(table[column] == usual):
            table = table.drop(columns=column)
    return write_csv(os.path.join(out_dir, f"{name}.csv"), table)


def check_settings(paths, files):
    """Raises UserError for settings that do not fit together, or do not fit the files."""
    if not paths:
        raise UserError("which checkpoint? python analyze.py out/lm/ckpt.pt; --help lists the settings")
    if report:
        from nanorank.figures.report import plotly_script
        plotly_script()  # raises UserError now, not after an hour
    rank_name(threshold)
    for name in ("n_head", "n_kv_head", "d_head"):
        if globals()[name] < 0:
            raise UserError(f"--{name}={globals()[name]} must not be negative")
    if layers and not re.fullmatch(r"\d+(,\d+)*", layers):
        raise UserError(f"--layers={layers}: expects numbers separated by commas")
    if (truncate > 0) != bool(save):
        raise UserError("--truncate=0.95 and --save=FILE go together")
    if save:
        rank_name(truncate)
        if os.path.exists(save):
            raise UserError(f"--save={save} is there already: give another name, or delete it")
        if len(files) != 1:
            raise UserError(f"--truncate takes one checkpoint, not {len(files)}: choose one, say {files[-1]}")
    runs = {run_name(path, files) for path in files}
    if compare and len(runs) != 2:
        raise UserError(f"--compare takes two runs or checkpoints, not {len(runs)}")


def check_heads(ckpt, modules, shown_layers):
    """Returns what told the number of heads. Raises UserError if --n_head or --layers do not fit."""
    counts, sources = zip(*(ckpt.heads_of(module) for module in modules))
    source = ", ".join(dict.fromkeys(sources))
    if n_head and n_head not in counts:
        there = ", ".join(str(count) for count in sorted(set(counts)))
        raise UserError(f"--n_head={n_head}: {ckpt.path} has {there}, by {source}")
    if shown_layers and not any(module.layer in shown_layers for module in modules):
        raise UserError(f"--layers={layers}: {ckpt.path} has none of them")
    return source


# -----------------------------------------------------------------------------
# printed tables

def heads_table(rows, files):
    """The rows of heads.csv as a DataFrame with two more columns: `run` and `label` (layer 3 qk)."""
    table = pd.DataFrame(rows)
    runs = {path: run_name(path, files) for path in table["checkpoint"].unique()}
    table["run"] = table["checkpoint"].map(runs)
    label = table["stack"] + " layer " + table["layer"].astype(str) + " " + table["product"]
    table["label"] = label.str.strip()
    return table


def layer_means(heads, columns):
    """Means over heads of these metrics: a row for each layer and product, then one for each product."""
    keys = heads["label"], "all " + heads["product"]
    groups = [heads.groupby(key, sort=False)[columns] for key in keys]
    return pd.concat([group.agg(lambda x: sum(x.dropna()) / (x.count() or float("nan"))) for group in groups])


def print_heads(run, heads, source, remarks):
    """The metrics of a run's last checkpoint by layer, and remarks on what was left out."""
    columns = [rank_name(threshold), "stable_rank", "effective_rank", "nuclear", "half_sq_norm"]
    columns += ["gap", "gap_gaussian", "imbalance", *plane_columns(heads)]
    step = heads["step"].iloc[0]
    at_step = f", step {step}" if step >= 0 else ""
    widths = "/".join(str(width) for width in sorted(set(heads["d_head"])))
    print(f"\n{run}{at_step}: means over heads of width {widths} (how many heads: from {source})")
    print(layer_means(heads, columns).to_string(float_format="%.3f", na_rep="-"))
    for line in gap_lines(heads):
        print(line)
    for remark in remarks:
        print(f"note: {remark}")


def print_trajectory(run, heads):
    """The threshold rank and the gap of a run over training."""
    columns = [rank_name(threshold), "gap", *plane_columns(heads)]
    table = heads.pivot_table(index=["checkpoint", "step"], columns="product", values=columns, sort=False)
    table = table[columns].droplevel("checkpoint")
    table.columns = [f"{metric} {product}" for metric, product in table.columns]
    print(f"\n{run} over training, means over heads and layers")
    print(table.reset_index().to_string(index=False, float_format="%.3f", na_rep="-"))


def print_ignored(paths, files):
    """Names a model file that was left out, because it stands beside folders of checkpoints."""
    if not any(os.path.isdir(file) for file in files):
        return
    for path in map(os.path.normpath, paths):
        names = os.listdir(path) if os.path.isdir(path) and path not in files else []
        models = [name for name in names if name.endswith(SUFFIXES) and not re.match(NOT_MODELS, name)]
        ignored = [name for name in models if os.path.join(path, name) not in files]
        if ignored:
            print(f"\nnote: {path} was taken for the checkpoints in it; "
                  f"{ignored[0]} beside them is left out (give it by name)")


def print_fits(fits):
    """R^2 of each curve for the groups that every run has, the best marked; fits.csv has the layers too."""
    fits = [row for row in fits if row["group"] in ("all", "attn", "mlp", "embed")]
    if not fits:
        return
    table = pd.DataFrame(fits)
    table = table.pivot_table("r2", index=["run", "group"], columns="function", sort=False)[list(CURVES)]
    best = table.eq(table.max(axis=1), axis=0)
    cells = table.map("{:.4f}".format) + best.map({True: "*", False: " "}.get)
    print("\nR^2 of norm = a f(t) + b over training, * the best (layers: fits.csv)")
    print(cells.reset_index().rename_axis(columns=None).to_string(index=False, col_space=9))


def result_of(heads):
    """The numbers in the result.json beside a checkpoint, if they are of the same step; else {}."""
    path = os.path.join(os.path.dirname(heads["checkpoint"].iloc[0]), "result.json")
    try:
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
    except (OSError, ValueError):
        return {}
    same_step = isinstance(result, dict) and result.get("steps") == heads["step"].iloc[0]
    return {name: x for name, x in result.items() if isinstance(x, (int, float))} if same_step else {}


def print_side_by_side(last):
    """The last checkpoints of several runs: threshold rank by layer, and numbers of their result.json."""
    rank = rank_name(threshold)
    ranks = pd.concat({run: layer_means(heads, [rank])[rank] for run, heads in last.items()}, axis=1)
    print(f"\n{rank} side by side, means over heads")
    print(ranks.to_string(float_format="%.2f", na_rep="-"))

    results = pd.DataFrame({run: pd.Series(result_of(heads), dtype=float) for run, heads in last.items()})
    names = ["attn_wd", "mlp_wd", "decay_time_constants", "test_loss", "test_ppl", "test_acc"]
    if "test_loss" not in results.index or results.loc["test_loss"].isna().any():
        names += ["val_loss", "val_ppl", "val_acc"]  # a data set may be without test
    results = results.reindex(names).dropna(how="all").rename({"decay_time_constants": "sum(lr)*attn_wd"})
    if len(results):
        print("\n" + results.to_string(float_format="%.4g", na_rep="-"))


def print_comparison(last, configs):
    """Two checkpoints by layer; the settings that differ, the results. Returns the rows of compare.csv."""
    if len(last) != 2:
        raise UserError(f"--compare: both are the same step of {next(iter(last))}")
    (name_a, a), (name_b, b) = last.items()
    check_same_layers(name_a, a, name_b, b)
    columns = [rank_name(threshold), "effective_rank", "nuclear", "gap"]
    columns += [name for name in plane_columns(a) if name in b]
    means_a = layer_means(a, columns)
    means_b = layer_means(b, columns).loc[means_a.index]
    table = pd.concat({"A": means_a, "B": means_b, "B - A": means_b - means_a}, axis=1)
    print(f"\nA = {name_a}\nB = {name_b}\nmeans over heads")
    print(table.swaplevel(axis=1)[columns].to_string(float_format="%.3f", col_space=8, na_rep="-"))

    config_a, config_b = configs[name_a], configs[name_b]
    for name in sorted(config_a.keys() & config_b.keys() - {"out_dir"}):
        if config_a[name] != config_b[name]:
            print(f"{name}: A {config_a[name]}, B {config_b[name]}")
    result_a, result_b = result_of(a), result_of(b)
    for name in ("test_loss", "test_ppl", "test_acc"):
        if name in result_a and name in result_b:
            x, y = result_a[name], result_b[name]
            print(f"{name}: A {x:.4f}, B {y:.4f}, B - A {y - x:+.4f}")

    rows = []
    for label, heads in a.groupby("label", sort=False):
        place = dict(heads[["stack", "layer", "product"]].iloc[0])
        for metric in means_a.loc[label].dropna().index:
            x, y = means_a.at[label, metric], means_b.at[label, metric]
            rows.append({**place, "metric": metric, "a": x, "b": y, "difference": y - x})
    return rows


def check_same_layers(name_a, a, name_b, b):
    """Raises UserError unless both have the same layers, with heads of the same number and width."""
    a, b = (heads.groupby("label", sort=False)["d_head"].agg(["size", "first"]) for heads in (a, b))
    different = a.index.symmetric_difference(b.index)
    if len(different):
        raise UserError(f"--compare: {name_a} and {name_b} have different layers: {', '.join(different[:4])}")
    for label, (count, width) in a.iterrows():
        if (count, width) != tuple(b.loc[label]):
            raise UserError(f"--compare: {label} has {count} heads of {width} in {name_a}, "
                            f"{b.at[label, 'size']} of {b.at[label, 'first']} in {name_b}")


if __name__ == "__main__":
    with user_errors("analyze.py"):
        main(configure(globals(), positional="CKPT [CKPT ...]"))
