"""
The products that L2 on the factors regularises in attention as it is built today, and their metrics.

    for product, (A, B) in products_of(layer).items():
        s, table = measure_product(layer, product, A, B)
        table["gap_planes"]

Under L2, factors shrink to the smallest norm that leaves the model's function as it is. How small that is
depends on what may change between W_Q and W_K, or between W_V and P, without changing the function:

    plain           any invertible r x r matrix: the nuclear norm of A B^T
    grouped         the same matrix for all queries of a key: the nuclear norm of W_K^T [W_Q,1^T ... W_Q,g^T],
                    and of [P_1; ...; P_g] W_V, one for each key/value head (qk_stacked, ov_stacked)
    rotary          a complex number for each plane j: the sum of |a_j| |b_j|, where a_j, b_j are the two
                    rows of W_K and of W_Q (of all g queries) that turn together
    partly rotary   both, added: planes of the rows that turn, the nuclear norm of the others
    q and k normed  a positive factor: nothing. L2 shrinks W_Q and W_K without changing the function
"""
import math

import torch
from torch.linalg import vector_norm

from nanorank.spectra import as_heads, factors_of, gaussian_nuclear, measure, rank_name, ranks, ratio


def products_of(layer):
    """{"qk": (A, B), "ov": (A, B)} of an AttentionLayer, a product for each query head; where queries share
    keys also "qk_stacked" and "ov_stacked", one for each of the n key/value heads.

    qk_stacked: A = W_K^T (n, d, r), B = [W_Q,1^T; ...; W_Q,g^T] (n, g d, r).
    ov_stacked: A = [P_1; ...; P_g] (n, g d, r), B = W_V^T (n, d, r).
    """
    products = factors_of(layer)
    g = group_size(layer)
    if g > 1:
        W_Q = layer.W_Q.unflatten(0, (-1, g)).transpose(1, 2).flatten(2)  # (n, r, g d)
        P = layer.P.unflatten(0, (-1, g)).flatten(1, 2)                   # (n, g d, r)
        products["qk_stacked"] = layer.W_K[::g].mT, W_Q.mT
        products["ov_stacked"] = P, layer.W_V[::g].mT
    return products


def group_size(layer):
    """How many query heads share a key/value head."""
    n_head = len(layer.W_Q)
    return n_head // (getattr(layer, "n_kv_head", 0) or n_head)


def regulariser_of(layer, product):
    """What L2 on the factors is to a product: nuclear (its nuclear norm), planes (the sum over rotary
    planes), stacked (the stacked product's row says it), none (no norm of it: q and k are normed)."""
    if product.startswith("qk") and getattr(layer, "qk_norm", False):
        return "none"
    if group_size(layer) > 1 and not product.endswith("_stacked"):
        return "stacked"
    return "planes" if rope_in(layer, product) else "nuclear"


def rope_in(layer, product):
    """The Rope of a product that takes in all queries of its keys, else None."""
    whole = "qk" if group_size(layer) == 1 else "qk_stacked"
    return getattr(layer, "rope", None) if product == whole else None


def measure_product(layer, product, A, B, threshold=0.95, exact=False):
    """(singular values, metrics, metrics of rotary planes) of a product of a layer: spectra.measure(A, B),
    and plane_metrics where the product turns in planes, else {}."""
    s, table = measure(A, B, threshold, exact)
    rope = rope_in(layer, product)
    if rope is None:
        return s, table, {}
    rest = 0.0
    if rope.dim < A.shape[-1]:
        rest = measure(A[..., rope.dim:], B[..., rope.dim:], threshold, exact)[1]["nuclear"]
    return s, table, plane_metrics(A, B, rope, rest, threshold)


def plane_metrics(A, B, rope, rest=0.0, threshold=0.95):
    """Metrics of products of factors whose columns turn in planes: {name: list over heads}.

    A (n, d, r), B (n, d', r): column i is row i of W_K, of W_Q; rope says which turn together. a_j, b_j are
    the two columns of plane j. rest: nuclear norms of the product of the columns that do not turn.

        planes95          how many planes hold 95 % of the sum of |a_j| |b_j|
        nuclear_planes    the sum of |a_j| |b_j|, plus the nuclear norm of the rest
        gap_planes        (half_sq_norm - nuclear_planes) / half_sq_norm, in [0, 1]; 0 where L2 is that norm
        imbalance_planes  |D_A - D_B| / (|D_A| + |D_B|), where D_A holds |a_j|^2 of every plane and A^T A of
                          the rest, D_B likewise
    """
    A, B, _ = as_heads(A, B)
    first, second = columns_of(rope)
    dim = rope.dim
    a, b = (vector_norm(X, dim=-2, dtype=torch.float64).square() for X in (A, B))  # (n, r)
    half = (a + b).sum(-1) / 2
    a = a[:, first] + a[:, second]  # (n, planes): |a_j|^2
    b = b[:, first] + b[:, second]
    products = (a * b).sqrt().sort(descending=True).values
    nuclear = products.sum(-1) + torch.as_tensor(rest, dtype=torch.float64, device=a.device)

    AA, BB = (X[..., dim:].double().mT @ X[..., dim:].double() for X in (A, B))
    D_A, D_B = (torch.cat([x, G.flatten(1)], dim=1) for x, G in ((a, AA), (b, BB)))
    table = {
        planes_name(threshold): ranks(products, threshold),
        "nuclear_planes": nuclear,
        "gap_planes": ratio(half - nuclear, half).clamp(0, 1),
        "imbalance_planes": ratio(vector_norm(D_A - D_B, dim=1),
                                  vector_norm(D_A, dim=1) + vector_norm(D_B, dim=1)),
    }
    return {name: values.tolist() for name, values in table.items()}


def columns_of(rope):
    """(first, second): the two columns of each plane, tensors of rope.dim / 2 indices."""
    j = torch.arange(rope.dim // 2)
    if rope.interleaved:
        return 2 * j, 2 * j + 1
    return j, j + rope.dim // 2


def planes_name(threshold):
    """planes95 for 0.95, as spectra.rank_name."""
    return rank_name(threshold).replace("rank", "planes")


def gaussian_planes(d_A, d_B, r, dim):
    """Mean nuclear_planes for Gaussian A (d_A, r), B (d_B, r) scaled to |A|_F = |B|_F = 1, of which the first
    dim columns turn. As in spectra.gaussian_nuclear: a random head of equal norms has gap_planes = 1 - this.

    The share of |A|_F^2 that c of the r columns have is Beta(d_A c / 2, d_A (r - c) / 2).
    """
    planes = dim // 2 * mean_norm(d_A, 2, r) * mean_norm(d_B, 2, r)
    rest = r - dim
    if rest == 0:
        return planes
    return planes + gaussian_nuclear(d_A, d_B, rest) * mean_norm(d_A, rest, r) * mean_norm(d_B, rest, r)


def mean_norm(d, c, r):
    """Mean norm of c of the r columns of a Gaussian (d, r) matrix of norm 1: the mean of Beta's root."""
    x, whole = d * c / 2, d * r / 2
    logarithm = math.lgamma(x + 0.5) - math.lgamma(x) + math.lgamma(whole) - math.lgamma(whole + 0.5)
    return math.exp(logarithm)
