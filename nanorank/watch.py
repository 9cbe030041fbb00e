"""
Rank and norms of a model while it trains.
"""
import math

from nanorank.families import attention_layers
from nanorank.spectra import summary


def attention_ranks(model):
    """Means over heads of every metric of both products, {"attn_rank95_qk": ..., "attn_gap_ov": ...}.

    The threshold rank is also given by layer, {"layer0_rank95_qk": ...}.
    """
    return summary(attention_layers(model.state_dict(), model.args["n_head"]))


def group_norms(groups):
    """Frobenius norm of all parameters and of each decay group, {"norm_all": ..., "norm_attn": ...}."""
    norms = {}
    for group in groups:
        norms[f"norm_{group['name']}"] = math.hypot(*[float(p.detach().norm()) for p in group["params"]])
    return {"norm_all": math.hypot(*norms.values()), **norms}
