"""
Rank and norms of a model while it trains.

    rank = RankLogger(model, every=1000)
    for step in range(steps):
        ...
        log.update(rank(step))    # {"attn_rank95_qk": ..., ...} at steps 0, 1000, ..., else {}
"""
import contextlib
import math

import torch

from nanorank.errors import UserError
from nanorank.families import attention_layers
from nanorank.live import LiveModel
from nanorank.regulariser import measure_product, products_of
from nanorank.spectra import metrics, ov_factors, qk_factors, rank_name


class RankLogger:
    """Means over heads of every metric of both products of a model in memory, every so many steps.

    rank(step) -> {"attn_rank95_qk": 24.4, ..., "layer0_rank95_qk": ...}, or {} between the steps. Names and
    heads are looked up once; weights are read when they are asked for, a layer at a time.

    model: as it trains, wrapped or not (nanorank/live.py). Under FSDP and fully_shard all processes must
    call rank(step), and all get the numbers; under DDP one is enough.
    every: steps between measurements; 0: never. threshold: 0.95 gives rank95.
    options: n_head, d_head, n_kv_head where the model does not count its heads; pattern and layout for names
    that schemes.SCHEMES lacks; rope (half, interleaved, none) where it does not say whether q and k turn.
    Raises UserError where no attention is found, or nothing tells the number of heads.
    """

    def __init__(self, model, every=1000, threshold=0.95, **options):
        self.every = every
        self.threshold = threshold
        self.live = LiveModel(model, **options)

    def __call__(self, step):
        if not self.every or step % self.every:
            return {}
        return summary(self.live.attention_layers(), self.threshold)


def summary(layers, threshold=0.95):
    """For a training log: means over all heads of each metric, {"attn_rank95_qk": ..., "attn_gap_ov": ...},
    and of the threshold rank by layer, {"layer0_rank95_qk": ...}, or {"encoder_layer0_rank95_qk": ...}
    where a model has several stacks.

    Where queries share keys, also means over key/value heads, as attn_gap_qk_stacked; where q and k turn in
    planes, also attn_planes95_qk, attn_gap_planes_qk (regulariser.py).

    layers: an iterable of objects with layer, perhaps stack, n_kv_head, rope, W_Q, W_K, W_V (H, r, d) and
    P (H, d, r).
    Raises UserError for NaN or inf, naming layer, product and head.
    """
    rank = rank_name(threshold)
    heads, by_layer = {}, {}
    for layer in layers:
        stack = getattr(layer, "stack", "")
        prefix = f"{stack}_" if stack else ""
        for product, (A, B) in products_of(layer).items():
            try:
                _, table, planes = measure_product(layer, product, A, B, threshold)
            except UserError as error:
                where = f"{stack} layer {layer.layer}".strip()
                raise UserError(f"{where}, {product}: {error}") from None
            for name, values in {**table, **planes}.items():
                heads.setdefault(f"attn_{name}_{product}", []).extend(values)
            by_layer[f"{prefix}layer{layer.layer}_{rank}_{product}"] = table[rank]
    return {name: sum(values) / len(values) for name, values in {**heads, **by_layer}.items()}


def attention_ranks(model):
    """Means over heads of every metric of both products, {"attn_rank95_qk": ..., "attn_gap_ov": ...}.

    The threshold rank is also given by layer, {"layer0_rank95_qk": ...}. model: a GPT or ViT of model.py.
    """
    configs = {"model_args": model.args}
    layers = list(attention_layers(model.state_dict(), model.args["n_head"], configs))
    shapes = {tuple(W.shape for W in matrices(layer)) for layer in layers}
    if len(shapes) == 1 and all(map(is_plain, layers)):
        with contextlib.suppress(UserError):  # summary names the layer that is not finite
            return summary_at_once(layers)
    return summary(layers)


def is_plain(layer):
    """Whether each head's products are W_K^T W_Q and P W_V as they stand, and there are no others."""
    shares_keys = getattr(layer, "n_kv_head", 0) not in (0, len(layer.W_Q))
    return not (shares_keys or getattr(layer, "rope", None) or getattr(layer, "qk_norm", False))


def matrices(layer):
    return layer.W_Q, layer.W_K, layer.W_V, layer.P


def summary_at_once(layers, threshold=0.95):
    """summary(layers) to the digit, for layers of one shape: two calls of metrics, not two a layer."""
    W_Q, W_K, W_V, P = [torch.stack(all_layers) for all_layers in zip(*map(matrices, layers))]  # (L, H, r, d)
    tables = {"qk": metrics(*qk_factors(W_Q, W_K), threshold), "ov": metrics(*ov_factors(W_V, P), threshold)}
    result = {}
    for product, table in tables.items():
        for name, by_layer in table.items():  # a list of heads for each layer
            result[f"attn_{name}_{product}"] = mean(sum(by_layer, []))
    rank = rank_name(threshold)
    for i, layer in enumerate(layers):
        for product, table in tables.items():
            result[f"layer{layer.layer}_{rank}_{product}"] = mean(table[rank][i])
    return result


def mean(values):
    return sum(values) / len(values)


def group_norms(groups):
    """Frobenius norm of all parameters and of each decay group, {"norm_all": ..., "norm_attn": ...}."""
    norms = {}
    for group in groups:
        norms[f"norm_{group['name']}"] = math.hypot(*[float(p.detach().norm()) for p in group["params"]])
    return {"norm_all": math.hypot(*norms.values()), **norms}
