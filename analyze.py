"""
Rank, norms and balance of every attention head in a checkpoint: a table, CSV files and a figure.

    python analyze.py out/lm/ckpt.pt                      # ours or nanoGPT's
    python analyze.py out/demo-0 out/demo-4               # run folders: every snapshot, and the runs side by side
    python analyze.py ckpt.pt --threshold=0.9 --exact --out_dir=out/looked

Writes OUT_DIR/heads.csv (a row per checkpoint, layer, head, product), norms.csv (a row per checkpoint and parameter group) and
heads.png, heads.pdf. `qk` is W_K^T W_Q, `ov` is P W_V; the metrics are defined in spectra.py and PAPER section 4.
"""
import csv
import io
import json
import os
import re

from tqdm import tqdm

from checkpoints import expand, open_all, run_of
from common import init_dist, input_errors, write_atomic
from configurator import configure
from spectra import metrics, ov_factors, qk_factors, rank_name

out_dir = "out/analysis"    # where the CSV files and the figure go
threshold = 0.95            # of the threshold rank: smallest k with s_1 + ... + s_k >= threshold * sum(s); its column is rank95
exact = False               # QR of every head in float64 (singular values to 1e-13 of the largest instead of 1e-7)
n_head = 0                  # heads per layer, for checkpoints that do not say
device = "auto"             # where the spectra are computed: auto, cpu, cuda
figure = True               # draw heads.png and heads.pdf (needs matplotlib)


def head_rows(checkpoint, device):
    """The rows of heads.csv for one checkpoint, dicts. Raises ValueError naming checkpoint, layer and product."""
    rows = []
    for layer in checkpoint.attention_layers():
        for product, factors in (("qk", qk_factors(layer.W_Q, layer.W_K)), ("ov", ov_factors(layer.W_V, layer.P))):
            try:
                table = metrics(*(X.to(device) for X in factors), threshold, exact)
            except ValueError as error:
                raise ValueError(f"{checkpoint.path}: layer {layer.layer}, {product}: {error}") from None
            for head in range(len(layer.W_Q)):
                rows.append({"checkpoint": checkpoint.path, "step": checkpoint.step, "stack": layer.stack, "layer": layer.layer,
                             "head": head, "product": product, "d_head": layer.W_Q.shape[-2],
                             **{name: values[head] for name, values in table.items()}})
    return rows


def groups_of(name):
    """The rows of norms.csv that a parameter counts in."""
    kinds = {"attn": r"attn|attention", "mlp": r"mlp|feed_forward|ffn", "embed": r"wte|wpe|lm_head|embed"}
    layer = re.search(r"(?:^|\.)h\.(\d+)\.", name)
    return ["all"] + [kind for kind, pattern in kinds.items() if re.search(pattern, name)][:1] * ("ln_" not in name) \
        + ([f"layer_{layer[1]}"] if layer else [])


def norm_rows(checkpoint, previous):
    """The rows of norms.csv for one checkpoint; previous: the one before it in its run, or None. Scalars are left out."""
    sums, seen = {}, set()
    for name, p in checkpoint.tensors.items():
        if p.ndim == 0 or not p.is_floating_point() or p.data_ptr() in seen:
            continue  # tied weights count once
        seen.add(p.data_ptr())
        q = previous.tensors.get(name) if previous else None
        q = q if q is not None and q.shape == p.shape else p.new_zeros(()).expand(p.shape)
        for block, other in zip(p.reshape(-1).split(1 << 22), q.reshape(-1).split(1 << 22)):
            block, other = block.double(), other.double()
            added = (block @ block, block @ other, other @ other, block.numel())
            for group in groups_of(name):
                sums[group] = [a + float(b) for a, b in zip(sums.get(group, (0, 0, 0, 0)), added)]
    return [{"checkpoint": checkpoint.path, "step": checkpoint.step, "group": group, "norm": pp**0.5, "parameters": int(n),
             "cos_prev": pq / (pp * qq) ** 0.5 if pp * qq else ""} for group, (pp, pq, qq, n) in sums.items()]


def write_csv(path, rows):
    """Rows (dicts with the same keys) as CSV; the column `stack` only where some model has several."""
    columns = [name for name in rows[0] if name != "stack" or any(row["stack"] for row in rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, lambda file: file.write(text.getvalue().encode()))

# ----------------------------------------------------------------------------------------------------------------- tables

def mean(rows, column):
    return sum(row[column] for row in rows) / len(rows)


def by_layer(rows):
    """{label: rows} per stack, layer and product, then all of each product."""
    groups = {}
    for row in rows:  # in order of layer, qk before ov
        groups.setdefault(f"{row['stack']} layer {row['layer']} {row['product']}".strip(), []).append(row)
    return {**groups, **{f"all {product}": [row for row in rows if row["product"] == product] for product in ("qk", "ov")}}


def print_table(run, step, rows):
    """One checkpoint: layer x product, means over heads."""
    columns = [rank_name(threshold), "stable_rank", "effective_rank", "nuclear", "half_sq_norm", "gap", "imbalance"]
    print(f"\n{run}{f', step {step}' if step >= 0 else ''}: means over heads of width {rows[0]['d_head']}")
    print(f"{'':14}" + "".join(f"{name:>16}" for name in columns))
    for label, group in by_layer(rows).items():
        print(f"{label:14}" + "".join(f"{mean(group, name):16.3f}" for name in columns))


def print_trajectory(run, checkpoints):
    """Several checkpoints of one run: the threshold rank over training."""
    rank = rank_name(threshold)
    columns = ("step", f"{rank} qk", f"{rank} ov", "gap qk", "gap ov")
    print(f"\n{run} over training, means over heads and layers\n" + "".join(f"{name:>14}" for name in columns))
    for step, rows in checkpoints:
        qk, ov = ([r for r in rows if r["product"] == product] for product in ("qk", "ov"))
        print(f"{step:14}{mean(qk, rank):14.2f}{mean(ov, rank):14.2f}{mean(qk, 'gap'):14.3f}{mean(ov, 'gap'):14.3f}")


def print_side_by_side(runs):
    """The last checkpoints of several runs: threshold rank by layer, and what their result.json tells."""
    rank, names = rank_name(threshold), list(runs)
    width = max(16, *(len(name) + 2 for name in names))
    print(f"\n{rank} side by side, means over heads\n{'':14}" + "".join(f"{name:>{width}}" for name in names))
    tables = [by_layer(checkpoints[-1][1]) for checkpoints in runs.values()]
    for label in tables[0]:
        cells = [f"{mean(table[label], rank):.2f}" if label in table else "-" for table in tables]
        print(f"{label:14}" + "".join(f"{cell:>{width}}" for cell in cells))
    results = []
    for name in names:
        step, rows = runs[name][-1]
        path = os.path.join(os.path.dirname(rows[0]["checkpoint"]), "result.json")
        result = json.load(open(path, encoding="utf-8")) if os.path.exists(path) else {}
        results.append(result if result.get("steps") == step else {})  # not the end's perplexity beside an earlier snapshot's ranks
    for key in ("attn_wd", "mlp_wd", "decay_time_constants", "test_loss", "test_ppl", "test_acc"):
        if any(key in result for result in results):
            label = {"decay_time_constants": "sum(lr)*attn_wd"}.get(key, key)
            cells = [f"{result[key]:.4g}" if isinstance(result.get(key), (int, float)) else "-" for result in results]
            print(f"{label:14}" + "".join(f"{cell:>{width}}" for cell in cells))

# ------------------------------------------------------------------------------------------------------------------ main

def main(paths):
    """Returns {run: [(step, rows of heads.csv)]}."""
    with input_errors("analyze.py"):
        if not paths:
            raise ValueError("which checkpoint? python analyze.py out/lm/ckpt.pt; --help lists the settings")
        rank_name(threshold)
        world = init_dist(device)
        total = len(expand(paths))
        os.makedirs(out_dir, exist_ok=True)
        heads, norms, runs, previous = [], [], {}, None
        with tqdm(total=total, unit="checkpoint", disable=None) as progress:
            for checkpoint in open_all(paths, n_head):
                run = run_of(checkpoint.path)
                rows = head_rows(checkpoint, world.device)
                runs.setdefault(run, []).append((checkpoint.step, rows))
                heads += rows
                norms += norm_rows(checkpoint, previous if previous and run_of(previous.path) == run else None)
                previous = checkpoint
                progress.update()
        write_csv(os.path.join(out_dir, "heads.csv"), heads)
        write_csv(os.path.join(out_dir, "norms.csv"), norms)
    for run, checkpoints in runs.items():
        print_table(run, *checkpoints[-1])
        if len(checkpoints) > 1:
            print_trajectory(run, checkpoints)
    if len(runs) > 1:
        print_side_by_side(runs)
    print(f"\nwrote {out_dir}/heads.csv ({len(heads):,} rows), {out_dir}/norms.csv ({len(norms):,} rows)")
    if figure:
        import figures
        print(f"figure: {figures.heads(os.path.join(out_dir, 'heads.csv'))}")
    return runs


if __name__ == "__main__":
    main(configure(globals(), positional="CKPT [CKPT ...]"))
