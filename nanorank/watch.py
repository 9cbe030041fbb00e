"""
Rank and norms of a model while it trains.

    rank = RankLogger(model, every=1000)
    for step in range(steps):
        ...
        log.update(rank(step))    # {"attn_rank95_qk": ..., ...} at steps 0, 1000, ..., else {}
"""
import math

from nanorank.families import attention_layers
from nanorank.live import LiveModel
from nanorank.spectra import summary


class RankLogger:
    """Means over heads of every metric of both products of a model in memory, every so many steps.

    rank(step) -> {"attn_rank95_qk": 24.4, ..., "layer0_rank95_qk": ...}, or {} between the steps. Names and
    heads are looked up once; weights are read when they are asked for, a layer at a time.

    model: as it trains, wrapped or not (nanorank/live.py). Under FSDP and fully_shard all processes must
    call rank(step), and all get the numbers; under DDP one is enough.
    every: steps between measurements; 0: never. threshold: 0.95 gives rank95.
    options: n_head, d_head, n_kv_head where the model does not count its heads; pattern and layout for names
    that families.SCHEMES lacks; rope (half, interleaved, none) where it does not say whether q and k turn.
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


def attention_ranks(model):
    """Means over heads of every metric of both products, {"attn_rank95_qk": ..., "attn_gap_ov": ...}.

    The threshold rank is also given by layer, {"layer0_rank95_qk": ...}. model: a GPT or ViT of model.py.
    """
    configs = {"model_args": model.args}
    return summary(attention_layers(model.state_dict(), model.args["n_head"], configs))


def group_norms(groups):
    """Frobenius norm of all parameters and of each decay group, {"norm_all": ..., "norm_attn": ...}."""
    norms = {}
    for group in groups:
        norms[f"norm_{group['name']}"] = math.hypot(*[float(p.detach().norm()) for p in group["params"]])
    return {"norm_all": math.hypot(*norms.values()), **norms}
