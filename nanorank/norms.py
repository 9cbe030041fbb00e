"""
Norms of a checkpoint's parameters by group and layer, and curves fitted to their growth over training.

    rows = norm_rows(ckpt, previous)   # of norms.csv: {"group": "attn", "norm": 31.4, "cos_prev": 0.98, ...}
    fits = fit_rows(rows)              # of fits.csv: {"function": "sqrt(t)", "a": ..., "b": ..., "r2": ...}
"""
import math
import re

import numpy as np

from nanorank.checkpoints import run_of
from nanorank.errors import UserError
from nanorank.groups import NORM, places
from nanorank.prefetch import read_ahead

CURVES = {"t": lambda t: t, "sqrt(t)": np.sqrt, "t^(1/4)": lambda t: t**0.25, "log(t)": np.log}


def norm_rows(checkpoint, previous, done=lambda part: None):
    """The rows of norms.csv for one checkpoint, a dict for each group of parameters.

    cos_prev: the cosine to `previous`, the checkpoint before it in its run or None, over the tensors of the
    same shape. Tied weights count once. Raises UserError for NaN or inf, naming the tensor.
    """
    groups = groups_of(checkpoint)
    shapes = checkpoint.shapes

    def read(batch):
        same = [name for name in batch if previous and previous.shapes.get(name) == shapes[name]]
        return checkpoint.read(batch), previous.read(same) if previous else {}

    # {group: sums of p.p, p.q, q.q, p.p where there is a q, size of p}; q is p in the previous checkpoint
    sums = {}
    for tensors, before in read_ahead(read, batches_of(groups, shapes)):
        for name, p in tensors.items():
            pp, pq, qq = dot_products(p, before.get(name))
            if not np.isfinite(pp):
                raise UserError(f"{checkpoint.path}: {name} holds NaN or inf")
            shared = pp if name in before else 0.0
            for group in groups[name]:
                sums[group] = sums.get(group, 0) + np.array([pp, pq, qq, shared, p.numel()])
        done(len(tensors) / len(groups))

    rows = []
    for group, (pp, pq, qq, shared, n) in sums.items():
        cosine = float(pq / (shared * qq) ** 0.5) if shared * qq else ""
        rows.append({"checkpoint": checkpoint.path, "step": checkpoint.step, "group": group,
                     "norm": float(pp**0.5), "parameters": int(n), "cos_prev": cosine})
    return rows


def groups_of(checkpoint):
    """{parameter's name: the groups that it counts in}.

        transformer.h.3.attn.c_attn.weight    all, attn, layer_3
        transformer.h.3.mlp.c_fc.weight       all, mlp, layer_3
        transformer.h.3.ln_1.weight           all, layer_3
        transformer.wte.weight                all, embed

    attn: in an attention module; mlp: elsewhere in a block; embed: in no block; norms are in none. Layers
    of several stacks are told apart: encoder_layer_3, decoder_layer_3.
    """
    groups = {}
    for name, (kind, layer) in places(checkpoint.parameters(), checkpoint.modules()).items():
        groups[name] = ["all"]
        if not re.search(NORM, name, re.I):
            groups[name].append(kind)
        if layer is not None:
            groups[name].append(layer)
    return groups


def batches_of(names, shapes, most=1 << 25):
    """The names in lists of some 32 M numbers each, which are in memory together."""
    batches = []
    size = most + 1
    for name in names:
        if size > most:
            batches.append([])
            size = 0
        batches[-1].append(name)
        size += math.prod(shapes[name])
    return batches


def dot_products(p, q=None, block=1 << 20):
    """(p.p, p.q, q.q) in float64, block by block; q: a tensor of p's shape, or None for zeros."""
    total = np.zeros(3)
    for i in range(0, p.numel(), block):
        x = p.reshape(-1)[i:i + block].double()
        total[0] += float(x @ x)
        if q is not None:
            y = q.reshape(-1)[i:i + block].double()
            total[1] += float(x @ y)
            total[2] += float(y @ y)
    return total


def fit_rows(rows):
    """The rows of fits.csv: least squares of norm = a f(t) + b for each run and group in norms.csv's rows.

    t: the steps above 0, of which a run needs three. Merrill et al. 2021 find growth like sqrt(t).
    """
    series = {}
    for row in rows:
        if row["step"] > 0:
            key = run_of(row["checkpoint"]), row["group"]
            series.setdefault(key, []).append((row["step"], row["norm"]))

    fits = []
    for (run, group), points in series.items():
        t, y = np.array(points, dtype=float).T
        if len(set(t)) < 3 or np.ptp(y) == 0:
            continue
        for function, f in CURVES.items():
            X = np.stack([f(t), np.ones_like(t)], 1)
            coefficients = np.linalg.lstsq(X, y)[0]
            residuals = y - X @ coefficients
            r2 = 1 - residuals @ residuals / ((y - y.mean()) @ (y - y.mean()))
            a, b = map(float, coefficients)
            fits.append({"run": run, "group": group, "function": function,
                         "a": a, "b": b, "r2": float(r2), "points": len(t)})
    return fits
