"""
How the function of a transformer changes when all its parameters are multiplied by c (Merrill et al. 2021).

    heads = open_heads(net, batches[0])
    curve = scaling(net, batches, [1.0, 2.0, 1000.0], on_attention=heads.add)    # {c: (layers + 1, 3)}
    k = exponent(curve, layer=0)                 # |f(c theta)| = c^k |f(theta)|
    rows = heads.rows({"checkpoint": "ckpt.pt"}) # what each head of the scaled model attends to

`net` is a Net, which scripts/saturate_models.py makes of a checkpoint. `batches` are its inputs.
A layer's state is what a block writes. After the states of all layers comes the output: what the head reads.
"""
import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from nanorank.errors import UserError

FEW = 0.1   # a query attends to few positions: to one, or to at most this share of those it may look at
MANY = 0.5  # to many: to at least this share, and to two or more
MOST = 0.9  # a head is "argmax" or "mean" where this share of its queries attends to few or to many


class Net(NamedTuple):
    """A model to be measured."""
    model: nn.Module
    run: Callable          # run(batch, on_attention=None) -> output (B, T, d);
                           # calls on_attention(layer, weights (B, H, T, T)) for each layer
    blocks: nn.ModuleList  # the modules whose outputs are the layers' states
    parameters: list       # the tensors that are multiplied by c, tied ones once
    limit: float           # largest absolute value that the norms of this model can square
    fresh: Callable        # fresh() -> a Net of the same shape, newly initialised
    config: dict           # settings of the run that trained it, empty where unknown
    vocab_size: int        # 0 for a model of images
    block_size: int        # longest sequence, in tokens
    name: str              # for messages


@contextlib.contextmanager
def scaled(parameters, factor):
    """Multiplies these tensors by `factor` inside a with block; afterwards their bits are as before."""
    kept = [(p, p.data) for p in parameters]
    try:
        for p, data in kept:
            p.data = data * factor
        yield
    finally:
        for p, data in kept:
            p.data = data


@torch.no_grad()
def states(net, batch, factor=1.0, on_attention=None):
    """The states of a batch under all parameters x factor: a list of (B, T, d), one a block, then the output.

    Raises UserError that names the first layer whose state is too large for the model's norms.
    """
    found = []

    def keep(module, inputs, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as stack, scaled(net.parameters, factor):
        for block in net.blocks:
            stack.callback(block.register_forward_hook(keep).remove)
        found.append(net.run(batch, on_attention))

    for layer, x in enumerate(found):
        largest = float(x.abs().max())
        if not largest < net.limit:  # true of NaN as well
            where = "the output" if layer == len(net.blocks) else f"layer {layer}"
            raise UserError(f"{where} reaches {largest:.3g} under parameters x {factor:g}, its norms hold "
                            f"{net.limit:.3g}: lower --c, or --dtype=float64")
    return found


def alike(a, b):
    """Compares states b with a, both (B, T, d). Returns sums over tokens: [cosine, ln(|b| / |a|), tokens].

    The cosine of two zero vectors counts as 1, that of a zero and a nonzero vector as 0.
    """
    if a.device.type != "mps":  # mps has no float64
        a, b = a.double(), b.double()
    a = a.flatten(0, -2)  # (B * T, d)
    b = b.flatten(0, -2)
    norm_a = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    norm_b = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    both_zero = (norm_a == 0) & (norm_b == 0)
    nonzero = ((norm_a > 0) & (norm_b > 0))[:, 0]
    norm_a, norm_b = norm_a[nonzero], norm_b[nonzero]
    # divide first: the product |a| |b| may overflow
    cosine = ((a[nonzero] / norm_a) * (b[nonzero] / norm_b)).sum() + both_zero.sum()
    log_ratio = (norm_b / norm_a).log().sum()
    return np.array([float(cosine), float(log_ratio), len(a)])


def scaling(net, batches, factors, reference=0.0, on_attention=None):
    """How the states change under all parameters x c, for each c of `factors`.

    Returns {c: array (layers + 1, 3)}. The columns are means over tokens: the cosine to the state at c = 1,
    ln of the ratio of norms to that state, and the cosine to the state at c = reference (0 without one).
    on_attention gets the attention weights at the last c.
    """
    totals = dict.fromkeys(factors, 0.0)
    for batch in tqdm(batches, desc=net.name, leave=False, disable=None):
        plain = states(net, batch)
        far = states(net, batch, reference) if reference else None
        for factor in factors:
            now = states(net, batch, factor, on_attention if factor == factors[-1] else None)
            table = []
            for layer, x in enumerate(now):
                cosine, log_ratio, tokens = alike(plain[layer], x)
                cosine_far = alike(far[layer], x)[0] if reference else 0.0
                table.append([cosine, log_ratio, cosine_far, tokens])
            totals[factor] = totals[factor] + np.array(table)
    return {factor: total[:, :3] / total[:, 3:] for factor, total in totals.items()}


def exponent(curve, layer):
    """k of |f(c theta)| = c^k |f(theta)|: least squares of ln of the norm ratio on ln c, no intercept."""
    x, y = np.array([(math.log(factor), table[layer, 1]) for factor, table in curve.items()]).T
    return float(x @ y / (x @ x))

# ------------------------------------------------------------------------------------------ heads

class Heads:
    """Sums over batches of the positions that the heads of each layer attend to.

    reach: bool (T, T), where a query (row) may look. places: (T, any), where tokens lie, for distances.
    tie: a position is attended where its weight is at least this share of the row's largest.
    """

    def __init__(self, reach, places, tie=0.5):
        self.reach = reach
        self.tie = tie
        self.available = reach.sum(-1).double()  # (T,)
        self.choice = self.available > 1         # the first token of a causal model has none
        self.distances = torch.cdist(places.double(), places.double())
        self.sums = {}  # {layer: (5, H)}: positions, distance, entropy, queries that attend to few, to many
        self.sequences = {}  # {layer: how many}

    def add(self, layer, weights):
        """Adds the attention weights (B, H, T, T) of one layer and batch."""
        weights = weights.detach().cpu().double()
        attended = (weights >= self.tie * weights.amax(-1, keepdim=True)) & self.reach
        positions = attended.sum(-1).double()  # (B, H, T)
        distance = (attended * self.distances).sum(-1) / positions.clamp(min=1)
        entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)
        few = (positions <= torch.clamp(FEW * self.available, min=1)) & self.choice
        many = (positions >= torch.clamp(MANY * self.available, min=2)) & self.choice
        sums = [x.sum((0, 2)).double() for x in (positions, distance, entropy, few, many)]
        self.sums[layer] = self.sums.get(layer, 0) + torch.stack(sums)
        self.sequences[layer] = self.sequences.get(layer, 0) + len(weights)

    def rows(self, key):
        """The rows of heads_saturated.csv, a dict a head that begins with `key`. All are means over queries.

        positions: attended ones. distance: to these, in tokens (in images: in patches). entropy: of the
        weights, in nats. kind: argmax, mean or mixed. available: positions that the query may look at.
        """
        rows = []
        for layer, sums in sorted(self.sums.items()):
            sequences = self.sequences[layer]
            queries = sequences * len(self.reach)
            most = MOST * sequences * int(self.choice.sum())
            available = sequences * float(self.available.sum()) / queries
            for head, (positions, distance, entropy, few, many) in enumerate(sums.T.tolist()):
                kind = "mixed"
                if few >= most:
                    kind = "argmax"
                elif many >= most:
                    kind = "mean"
                rows.append({**key, "layer": layer, "head": head, "positions": positions / queries,
                             "distance": distance / queries, "entropy": entropy / queries, "kind": kind,
                             "available": available})
        return rows


def open_heads(net, batch, tie=0.5):
    """A Heads for this model and sequence length: queries may look where the unscaled model has weight."""
    seen = []

    def on_attention(layer, weights):
        seen.append((weights > 0).flatten(0, 1).any(0).cpu())

    states(net, batch, on_attention=on_attention)
    reach = torch.stack(seen).any(0)
    T = len(reach)
    places = torch.arange(T)[:, None]
    if not net.vocab_size:  # patches lie on a grid
        side = math.isqrt(T)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        if T > side * side:  # put the class token in the middle
            places = torch.cat([torch.full((1, 2), (side - 1) / 2), places])
    return Heads(reach, places, tie)
