"""
Rank, norms and balance of every attention head in a checkpoint: tables, CSV files and figures.

    python analyze.py out/lm/ckpt.pt                      # ours or nanoGPT's
    python analyze.py Llama-2-7b-hf                       # a Hugging Face folder, file or hub id; timm, TransformerLens, torch ... (README)
    python analyze.py out/demo-0 out/demo-4 --compare     # run folders: every snapshot; and the differences layer by layer
    python analyze.py pythia-70m                          # a folder of step*, checkpoint-*: norms over training and what they grow like
    python analyze.py model.pt --pattern=wq.weight,wk.weight,wv.weight,wo.weight --n_head=8
    python analyze.py out/lm/ckpt.pt --truncate=0.95 --save=small.pt

Writes OUT_DIR/heads.csv (a row per checkpoint, layer, head, product), spectra.csv (the singular values of each run's last checkpoint), norms.csv
(a row per checkpoint and parameter group), fits.csv (three checkpoints or more) and figures of them. `qk` is W_K^T W_Q, `ov` is P W_V;
the metrics are defined in spectra.py and PAPER section 4.
"""
import csv
import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from configurator import configure
from nanorank.checkpoints import NOT_MODELS, SUFFIXES, expand, open_all, run_of
from nanorank.device import init_dist
from nanorank.errors import UserError, user_errors
from nanorank.families import is_block, left_out
from nanorank.files import load_pt, save_pt, write_atomic
from nanorank.spectra import gaussian_nuclear, measure, ov_factors, qk_factors, rank_name, ranks, svd

out_dir = "out/analysis"    # where the CSV files and the figures go
threshold = 0.95            # of the threshold rank: smallest k with s_1 + ... + s_k >= threshold * sum(s); its column is rank95
exact = False               # QR of every head in float64 (singular values to 1e-13 of the largest instead of 1e-7)
n_head = 0                  # heads per layer, for checkpoints that do not say
n_kv_head = 0               # key/value heads per layer, where queries share them (else told from shapes)
d_head = 0                  # width of a head, instead of n_head (where stacks have different numbers of heads)
pattern = ""                # ends of the names of q,k,v,o (or qkv,o) after the layer's path, for models that families.py does not know
layout = "separate"         # how heads lie in what --pattern names: separate, fused, grouped, conv, lens (families.LAYOUTS)
state_dict = ""             # which of several state dicts in a file, by its key
device = "auto"             # where the spectra are computed: auto, cpu, cuda
norms = True                # norms.csv: reads all tensors; False those of attention alone (torch's .pt, .bin once whole, for their checksums)
figure = True               # draw the figures (needs matplotlib)
layers = ""                 # layers in the figure of heads: all, or some as 5,7,9
compare = False             # two runs or checkpoints: their differences layer by layer, and compare.csv
truncate = 0.0              # cut both products of every head to this threshold rank (1.0 changes nothing); one GPT checkpoint of ours, with --save
save = ""                   # where the truncated checkpoint goes: for train_lm.py --init_from=FILE --eval_only


# ------------------------------------------------------------------------------------------------------------------- rows

def head_rows(checkpoint, device, done=lambda part: None):
    """(rows of heads.csv, rows of spectra.csv) of one checkpoint, dicts. Raises UserError naming checkpoint, layer and product."""
    rows, spectra, modules = [], [], checkpoint.modules()
    for layer in read_ahead(checkpoint.attention_layer, modules):
        for product, factors in (("qk", qk_factors(layer.W_Q, layer.W_K)), ("ov", ov_factors(layer.W_V, layer.P))):
            try:
                A, B = (X.to(device) for X in factors)
                s, table = measure(A, B, threshold, exact)
            except ValueError as error:
                where = f"{layer.stack} layer {layer.layer}".strip()
                raise UserError(f"{checkpoint.path}: {where}, {product}: {str(error).replace('product [', 'head [')}") from None
            baseline = gaussian_nuclear(A.shape[-2], B.shape[-2], A.shape[-1])
            for head in range(len(s)):
                key = {"checkpoint": checkpoint.path, "step": checkpoint.step, "stack": layer.stack, "layer": layer.layer, "head": head,
                       "product": product, "d_head": A.shape[-1]}
                row = {**key, **{name: values[head] for name, values in table.items()}}
                gaussian = baseline * row["norm_A"] * row["norm_B"]  # the nuclear norm of random factors of these shapes and norms
                rows.append({**row, "gap_gaussian": 1 - gaussian / row["half_sq_norm"] if row["half_sq_norm"] else 0.0})
                spectra.append({**key, **{f"s{i}": x for i, x in enumerate(s[head].tolist(), 1)}})
        done(1 / len(modules))
    return rows, spectra


def read_ahead(read, items):
    """Yields read(item) for each; a thread reads the next from disk meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        coming = [thread.submit(read, item) for item in items[:1]]
        for item in [*items[1:], None]:
            ready = coming.pop().result()
            if item is not None:
                coming.append(thread.submit(read, item))
            yield ready
            del ready  # before the next one is waited for


def groups_of(checkpoint):
    """{parameter's name: the rows of norms.csv that it counts in}: all; attn, mlp (what else is in a block) or embed (what is in none:
    embeddings, patch projection, heads), norms' own parameters in none of these; and its layer."""
    modules = checkpoint.modules()
    blocks, attention, lists = {}, set(), {}
    for module in modules:
        prefix = f"{module.stack}_" if module.stack not in ("", "cross") else ""
        blocks.setdefault(module.block, prefix)
        names = [x for entry in module.names for x in ([entry] if isinstance(entry, str) else entry)]
        attention.update({f"{name.removesuffix('weight')}" for name in names} if is_block(module) else {f"{module.path}."})
        if is_block(module) and "." in module.path:  # attentions.3, ffns.3, layer_norm1.3: lists side by side
            lists[module.block.rstrip(".").rpartition(".")[0]] = prefix
    groups = {}
    for name in checkpoint.parameters():
        places = {match[0]: prefix for block, prefix in blocks.items() if block and (match := re.match(re.escape(block) + r"(\d+)(?=\.)", name))}
        places |= {match[0]: prefix for parent, prefix in lists.items()
                   if (match := re.match(re.escape(parent) + r"\.?\w+\.(\d+)(?=\.)", name))}
        block = max(places, key=len, default=None)  # transformer.h.3
        own = name.startswith(tuple(attention)) or (not any(map(is_block, modules)) and re.search(r"attn|attention|EncDec", name, re.I))
        kind = "attn" if own else "mlp" if block is not None else "embed"
        groups[name] = ["all"] + [kind] * (not re.search(r"norm|(^|[._])ln([._\d]|$)", name, re.I))
        if block is not None:
            groups[name].append(f"{places[block]}layer_{re.search('[0-9]+$', block)[0]}")
    return groups


def norm_rows(checkpoint, previous, done=lambda part: None):
    """The rows of norms.csv for one checkpoint; previous: the one before it in its run, or None. Scalars are left out, what is tied counts once."""
    groups, sums, batches = groups_of(checkpoint), {}, [[]]
    for name in groups:  # batches of some 32 M numbers: what was read is let go before the next
        batches[-1].append(name)
        if sum(np.prod(checkpoint.shapes[x]) for x in batches[-1]) > 1 << 25:
            batches.append([])

    def read(batch):
        same = [name for name in batch if previous and previous.shapes.get(name) == checkpoint.shapes[name]]
        return checkpoint.read(batch), previous.read(same) if previous else {}

    for tensors, before in read_ahead(read, [batch for batch in batches if batch]):
        for name, p in tensors.items():
            pp, pq, qq = dot_products(p, before.get(name))
            if not np.isfinite(pp):
                raise UserError(f"{checkpoint.path}: {name} holds NaN or inf")
            added = np.array([pp, pq, qq, pp * (name in before), p.numel()])
            for group in groups[name]:
                sums[group] = sums.get(group, 0) + added
        done(len(tensors) / len(groups))
    return [{"checkpoint": checkpoint.path, "step": checkpoint.step, "group": group, "norm": float(pp**0.5), "parameters": int(n),
             "cos_prev": float(pq / (same * qq) ** 0.5) if same * qq else ""}  # over what both have in the same shape
            for group, (pp, pq, qq, same, n) in sums.items()]


def dot_products(p, q=None):
    """(p.p, p.q, q.q) in float64, block by block; q: a tensor of p's shape, or None for zeros."""
    total = np.zeros(3)
    for i in range(0, p.numel(), 1 << 20):
        x = p.reshape(-1)[i:i + (1 << 20)].double()
        total[0] += float(x @ x)
        if q is not None:
            y = q.reshape(-1)[i:i + (1 << 20)].double()
            total[1:] += float(x @ y), float(y @ y)
    return total


CURVES = {"t": lambda t: t, "sqrt(t)": np.sqrt, "t^(1/4)": lambda t: t**0.25, "log(t)": np.log}


def fit_rows(rows):
    """Least squares of norm = a f(t) + b for each run and group of norms.csv with three steps above 0 or more: rows of fits.csv
    (run, group, function, a, b, r2, points). P2 compares t, sqrt(t) and others by R^2."""
    series, fits = {}, []
    for row in rows:
        if row["step"] > 0:
            series.setdefault((run_of(row["checkpoint"]), row["group"]), []).append((row["step"], row["norm"]))
    for (run, group), points in series.items():
        t, y = np.array(points, dtype=float).T
        if len(set(t)) < 3 or np.ptp(y) == 0:
            continue
        for function, f in CURVES.items():
            X = np.stack([f(t), np.ones_like(t)], 1)
            (a, b), residuals = (coefficients := np.linalg.lstsq(X, y)[0]), y - X @ coefficients
            r2 = 1 - residuals @ residuals / ((y - y.mean()) @ (y - y.mean()))
            fits.append({"run": run, "group": group, "function": function, "a": float(a), "b": float(b), "r2": float(r2), "points": len(t)})
    return fits


def write_csv(name, rows):
    """OUT_DIR/name from rows (dicts) as CSV; the column `stack` only where some model has several. Returns its path."""
    columns = {column: None for row in rows for column in row if column != "stack" or any(row["stack"] for row in rows)}
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = os.path.join(out_dir, name)
    write_atomic(path, lambda file: file.write(text.getvalue().encode()))
    return path

# ----------------------------------------------------------------------------------------------------------------- tables

def mean(rows, column):
    return sum(row[column] for row in rows) / len(rows)


def by_layer(rows):
    """{label: rows} per stack, layer and product, then all of each product."""
    groups = {}
    for row in rows:  # in order of layer, qk before ov
        groups.setdefault(f"{row['stack']} layer {row['layer']} {row['product']}".strip(), []).append(row)
    return {**groups, **{f"all {product}": [row for row in rows if row["product"] == product] for product in ("qk", "ov")}}


def print_table(run, step, rows, heads_from, remarks):
    """One checkpoint: layer x product, means over heads; how heads were counted, and what was left out."""
    columns = [rank_name(threshold), "stable_rank", "effective_rank", "nuclear", "half_sq_norm", "gap", "gap_gaussian", "imbalance"]
    widths = "/".join(str(width) for width in sorted({row["d_head"] for row in rows}))
    print(f"\n{run}{f', step {step}' if step >= 0 else ''}: means over heads of width {widths} (how many heads: from {heads_from})")
    table = by_layer(rows)
    width = max(14, *(len(label) + 1 for label in table))
    print(" " * width + "".join(f"{name:>16}" for name in columns))
    for label, group in table.items():
        print(f"{label:{width}}" + "".join(f"{mean(group, name):16.3f}" for name in columns))
    for remark in remarks:
        print(f"note: {remark}")


def print_trajectory(run, checkpoints):
    """Several checkpoints of one run: the threshold rank over training."""
    rank = rank_name(threshold)
    columns = ("step", f"{rank} qk", f"{rank} ov", "gap qk", "gap ov")
    print(f"\n{run} over training, means over heads and layers\n" + "".join(f"{name:>14}" for name in columns))
    for step, rows in checkpoints:
        qk, ov = ([r for r in rows if r["product"] == product] for product in ("qk", "ov"))
        print(f"{step:14}{mean(qk, rank):14.2f}{mean(ov, rank):14.2f}{mean(qk, 'gap'):14.3f}{mean(ov, 'gap'):14.3f}")


def print_fits(fits):
    """R^2 of each curve, the best marked, for the groups that every run has (layers are in fits.csv)."""
    table = {}
    for row in fits:
        if row["group"] in ("all", "attn", "mlp", "embed"):
            table.setdefault((row["run"], row["group"]), {})[row["function"]] = row["r2"]
    if table:
        print("\nR^2 of norm = a f(t) + b over training, * the best (layers: fits.csv)\n" + " " * 30 + "".join(f"{name:>12}" for name in CURVES))
        for (run, group), r2 in table.items():
            cells = [f"{r2[name]:.4f}{'*' if r2[name] == max(r2.values()) else ' '}" for name in CURVES]
            print(f"{run[-20:]:>20} {group:9}" + "".join(f"{cell:>12}" for cell in cells))


def result_of(step, rows):
    """What a run's result.json tells, where it is about this step: not the end's perplexity beside an earlier snapshot's ranks."""
    try:
        with open(os.path.join(os.path.dirname(rows[0]["checkpoint"]), "result.json"), encoding="utf-8") as file:
            result = json.load(file)
    except (OSError, ValueError):  # none, or none that can be read
        result = {}
    return result if isinstance(result, dict) and result.get("steps") == step else {}


def print_side_by_side(runs):
    """The last checkpoints of several runs: threshold rank by layer, and what their result.json tells."""
    rank, names = rank_name(threshold), list(runs)
    width = max(16, *(len(name) + 2 for name in names))
    print(f"\n{rank} side by side, means over heads\n{'':14}" + "".join(f"{name:>{width}}" for name in names))
    tables = [by_layer(checkpoints[-1][1]) for checkpoints in runs.values()]
    for label in tables[0]:
        cells = [f"{mean(table[label], rank):.2f}" if label in table else "-" for table in tables]
        print(f"{label:14}" + "".join(f"{cell:>{width}}" for cell in cells))
    results = [result_of(*checkpoints[-1]) for checkpoints in runs.values()]
    for key in ("attn_wd", "mlp_wd", "decay_time_constants", "test_loss", "test_ppl", "test_acc"):
        if any(key in result for result in results):
            label = {"decay_time_constants": "sum(lr)*attn_wd"}.get(key, key)
            cells = [f"{result[key]:.4g}" if isinstance(result.get(key), (int, float)) else "-" for result in results]
            print(f"{label:14}" + "".join(f"{cell:>{width}}" for cell in cells))


def print_comparison(runs, settings):
    """Two checkpoints (the last ones of two runs), layer by layer: each metric of A, of B, and B - A. Returns the rows of compare.csv.

    settings: the two runs' settings, {name: value}; those that differ are printed. Raises UserError where the layers are not the same.
    """
    (name_a, a), (name_b, b) = [(name, by_layer(checkpoints[-1][1])) for name, checkpoints in runs.items()]
    if a.keys() != b.keys():
        raise UserError(f"--compare: {name_a} and {name_b} have different layers: {', '.join(sorted(a.keys() ^ b.keys())[:4])}")
    columns = [rank_name(threshold), "effective_rank", "nuclear", "gap"]
    for label in a:
        x, y = ((len(table[label]), table[label][0]["d_head"]) for table in (a, b))
        if x != y:
            raise UserError(f"--compare: {label} has {x[0]} heads of {x[1]} in {name_a}, {y[0]} of {y[1]} in {name_b}")
    print(f"\nA = {name_a}\nB = {name_b}\nmeans over heads\n{'':16}" + "".join(f"{name:^33}" for name in columns)
          + f"\n{'':16}" + f"{'A':>11}{'B':>11}{'B - A':>11}" * len(columns))
    rows = []
    for label in a:
        values = [(mean(a[label], name), mean(b[label], name)) for name in columns]
        print(f"{label:16}" + "".join(f"{x:11.3f}{y:11.3f}{y - x:+11.3f}" for x, y in values))
        if not label.startswith("all "):
            one = a[label][0]
            rows += [{"stack": one["stack"], "layer": one["layer"], "product": one["product"], "metric": name, "a": x, "b": y, "difference": y - x}
                     for name, (x, y) in zip(columns, values)]
    for name in sorted(settings[0].keys() & settings[1].keys()):
        if settings[0][name] != settings[1][name] and name != "out_dir":
            print(f"{name}: A {settings[0][name]}, B {settings[1][name]}")
    results = [result_of(*checkpoints[-1]) for checkpoints in runs.values()]
    for key in ("test_loss", "test_ppl", "test_acc"):
        if all(isinstance(result.get(key), (int, float)) for result in results):
            x, y = (result[key] for result in results)
            print(f"{key}: A {x:.4f}, B {y:.4f}, B - A {y - x:+.4f}")
    return rows

# ------------------------------------------------------------------------------------------------------------- truncation

def truncated(state, n_head, threshold):
    """A GPT's state dict with every head's products cut to their threshold rank: for W_K^T W_Q = U S V^T, of whose singular values the
    first k stay, W_K' = S^(1/2) U^T and W_Q' = S^(1/2) V^T with rows beyond k zero; so too P and W_V. Same shapes; balanced; at threshold
    1.0 the same function. What biases do is kept whole: the value's moves into the output's; the key's the softmax cancels; the query's
    adds g = W_K^T b_q to the scores of a key, which a row beyond k carries where there is one, else b_q in the new basis.
    Returns (state dict, mean k of the QK products, mean k of the OV products)."""
    state, kept = dict(state), {"qk": [], "ov": []}
    for name in [name for name in state if name.endswith("attn.c_attn.weight")]:
        path = name.removesuffix("c_attn.weight")
        weights, b = state[name].double(), state.get(path + "c_attn.bias")
        d = weights.shape[1]
        W_Q, W_K, W_V = weights.view(3, n_head, d // n_head, d)
        P = state[path + "c_proj.weight"].double().view(d, n_head, d // n_head).transpose(0, 1)
        factors = {}
        for product, (A, B) in (("qk", qk_factors(W_Q, W_K)), ("ov", ov_factors(W_V, P))):
            U, s, V = svd(A, B)
            k = ranks(s, threshold)
            root = torch.where(torch.arange(s.shape[-1]) < k[:, None], s, 0).sqrt()[:, None]
            factors[product] = U * root, V * root  # (H, d, r), their product cut to rank k
            kept[product] += k.tolist()
            if b is not None and product == "qk":
                b_q, _, b_v = b.double().view(3, n_head, d // n_head, 1)
                g, new = W_K.mT @ b_q, torch.zeros_like(b_q)
                for h in range(n_head):
                    if k[h] < s.shape[-1]:
                        new[h, k[h]] = g[h].norm().sqrt()
                        factors["qk"][0][h, :, k[h]] = g[h, :, 0] / g[h].norm().sqrt().clamp(min=1e-300)
                    else:
                        new[h] = (U[h].mT @ g[h]) / root[h].mT
                state[path + "c_attn.bias"] = torch.cat([new.reshape(d), torch.zeros(2 * d)]).to(b.dtype)
                state[path + "c_proj.bias"] = (state[path + "c_proj.bias"].double() + (P @ b_v).sum(0)[:, 0]).to(b.dtype)
        (new_K, new_Q), (new_P, new_V) = factors["qk"], factors["ov"]
        state[name] = torch.cat([W.mT.reshape(d, d) for W in (new_Q, new_K, new_V)]).to(state[name].dtype)
        state[path + "c_proj.weight"] = new_P.transpose(0, 1).reshape(d, d).to(state[name].dtype)
    return state, *(sum(k) / len(k) for k in kept.values())


def truncatable(checkpoint):
    """What a checkpoint's file holds. Raises UserError where it is not a GPT of ours or nanoGPT's."""
    raw = load_pt(checkpoint.path) if os.path.isfile(checkpoint.path) and not checkpoint.path.endswith(".safetensors") else {}
    biases = [name.endswith(("attn.c_attn.bias", "attn.c_proj.bias")) for name in checkpoint.tensors]
    if not isinstance(raw.get("model_args"), dict) or not isinstance(raw.get("config") or {}, dict) \
            or checkpoint.modules()[0].scheme.layout != "conv" or sum(biases) not in (0, 2 * len(checkpoint.modules())):
        raise UserError(f"{checkpoint.path}: --truncate takes a GPT checkpoint of train_lm.py's or nanoGPT's (with model_args)")
    return raw


def save_truncated(checkpoint, raw):
    """Writes --save, and says how to evaluate it."""
    heads, _ = checkpoint.heads_of(checkpoint.modules()[0])
    state = checkpoint.read(checkpoint.tensors)
    state, qk, ov = truncated(state, heads, truncate)
    keep = {key: raw[key] for key in ("model_args", "iter_num", "best_val_loss", "config") if key in raw}
    save_pt(save, {"model": state, **keep, "truncated": truncate})
    print(f"\nwrote {save}: of {raw['model_args']['n_embd'] // heads} directions a head {qk:.2f} stay in QK, {ov:.2f} in OV (means); evaluate it:\n"
          f"    python train_lm.py --init_from={save} --eval_only --dataset={raw.get('config', {}).get('dataset', 'DATASET')}")

# ------------------------------------------------------------------------------------------------------------------ main

def check_settings(paths):
    """Raises UserError for settings that make no sense together."""
    if not paths:
        raise UserError("which checkpoint? python analyze.py out/lm/ckpt.pt; --help lists the settings")
    rank_name(threshold)
    if (truncate > 0) != bool(save):
        raise UserError("--truncate=0.95 and --save=FILE go together")
    if save and os.path.exists(save):
        raise UserError(f"--save={save} is there already")
    if truncate:
        rank_name(truncate)
    for name in ("n_head", "n_kv_head", "d_head"):
        if globals()[name] < 0:
            raise UserError(f"--{name}={globals()[name]} must not be negative")
    if layers and not re.fullmatch(r"\d+(,\d+)*", layers):
        raise UserError(f"--layers={layers}: expects numbers separated by commas")


def main(paths):
    """Returns {run: [(step, rows of heads.csv)]}."""
    with user_errors("analyze.py"):
        check_settings(paths)
        world = init_dist(device)
        found = expand(paths)
        apart = compare and len(found) == 2  # two checkpoints, of one run perhaps
        if save and len(found) != 1:
            raise UserError(f"--truncate takes one checkpoint, not {len(found)}")
        if compare and not apart and len(set(map(run_of, found))) != 2:
            raise UserError(f"--compare takes two runs or checkpoints, not {len(set(map(run_of, found)))}")
        os.makedirs(out_dir, exist_ok=True)
        heads, spectra, norm_table, runs, sources, settings, previous, raw = [], [], [], {}, {}, {}, None, None
        options = {"n_head": n_head, "n_kv_head": n_kv_head, "d_head": d_head, "pattern": pattern, "layout": layout, "state_dict": state_dict}
        chosen = [int(x) for x in layers.split(",")] if layers else []
        bar = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with tqdm(total=len(found) * (1 + norms), disable=None, smoothing=0, bar_format=bar) as progress:
            for checkpoint in open_all(paths, **options):
                run, modules = checkpoint.path if apart else run_of(checkpoint.path), checkpoint.modules()
                progress.set_description(os.path.basename(checkpoint.path))
                counts, told = zip(*(checkpoint.heads_of(module) for module in modules))
                told = ", ".join(dict.fromkeys(told))
                if n_head and n_head not in counts:
                    raise UserError(f"--n_head={n_head}: {checkpoint.path} has {', '.join(map(str, sorted(set(counts))))}, by {told}")
                if chosen and not {module.layer for module in modules} & {*chosen}:
                    raise UserError(f"--layers={layers}: {checkpoint.path} has none of them")
                raw = truncatable(checkpoint) if save else None
                sources[run] = told, left_out(modules, checkpoint.shapes)
                settings[run] = checkpoint.configs.get("its config", {})
                rows, singular = head_rows(checkpoint, world.device, progress.update)
                if d_head and d_head not in {row["d_head"] for row in rows}:
                    raise UserError(f"--d_head={d_head}: heads of {checkpoint.path} are {rows[0]['d_head']} wide, by {told}")
                runs.setdefault(run, []).append((checkpoint.step, rows))
                spectra = [row for row in spectra if apart or run_of(row["checkpoint"]) != run] + singular  # of a run the last
                heads += rows
                if norms:
                    before = previous if previous and run_of(previous.path) == run_of(checkpoint.path) else None
                    norm_table += norm_rows(checkpoint, before, progress.update)
                previous = checkpoint
        fits = fit_rows(norm_table)
        tables = {"heads.csv": heads, "spectra.csv": spectra, "norms.csv": norm_table, "fits.csv": fits}
        for run, checkpoints in runs.items():
            print_table(run, *checkpoints[-1], *sources[run])
            if len(checkpoints) > 1:
                print_trajectory(run, checkpoints)
        for path in map(os.path.normpath, paths):
            beside = [name for name in os.listdir(path) if name.endswith(SUFFIXES) and not re.match(NOT_MODELS, name)] if os.path.isdir(path) else []
            ignored = [name for name in beside if path not in found and os.path.join(path, name) not in found]
            if ignored and any(os.path.isdir(file) for file in found):
                print(f"\nnote: {path} was taken for the checkpoints in it; {ignored[0]} beside them is left out (give it by name)")
        print_fits(fits)
        if compare:
            tables["compare.csv"] = print_comparison(runs, list(settings.values()))
        elif len(runs) > 1:
            print_side_by_side(runs)
        written = [f"{write_csv(name, rows)} ({len(rows):,} rows)" for name, rows in tables.items() if rows]
        if save:
            save_truncated(checkpoint, raw)
        print(f"\nwrote {', '.join(written)}")
        if figure:
            from nanorank.figures import heads as figures
            drawn = figures.analysis(out_dir, [name.removesuffix(".csv") for name, rows in tables.items() if rows], chosen)
            print(f"figures: {', '.join(drawn)}" + f" (nuclear_norm, heatmap, spectra, norms: the first {figures.MOST_RUNS} of {len(runs)} runs)"
                  * (len(runs) > figures.MOST_RUNS))
    return runs


if __name__ == "__main__":
    main(configure(globals(), positional="CKPT [CKPT ...]"))
