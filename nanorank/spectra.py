"""
Singular values of A B^T from its factors, without forming the product, and the metrics of attention heads.

    table = metrics(A, B)        # A, B (..., d, r), torch or numpy -> {"rank95": [...], ...}
    s = singular_values(A, B)    # (..., r) float64, descending
    A, B = qk_factors(W_Q, W_K)  # W_Q, W_K (H, r, d) -> the factors of W_K^T W_Q
    A, B = ov_factors(W_V, P)    # W_V (H, r, d), P (H, d, r) -> the factors of P W_V
    log = summary(layers)        # {"attn_rank95_qk": 24.4, ...}: means over heads

A new metric is one line in `metrics_of`: the training log and heads.csv then have it.
The file opens with the definitions and the exact way. The fast way, with its error bound, comes after.
"""
import functools

import numpy as np
import torch
from torch.linalg import matrix_norm

from nanorank.errors import UserError
from nanorank.threads import as_float64, over_heads

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps
TOLERANCE = 1e-7  # largest error bound, relative to s_1, that the fast way may have


def metrics_of(s, AA, BB, d, threshold=0.95):
    """The metrics of n products A B^T: {name: tensor (n,)}.

    s (n, r): singular values, descending. AA = A^T A, BB = B^T B (n, r, r). All float64.
    d: rows of A or of B, whichever has more.

        rank95          smallest k with s_1 + ... + s_k >= 0.95 (s_1 + ... + s_r);
                        rank90 at threshold 0.9, and so on
        numerical_rank  number of s_i > d * eps * s_1, with the eps of float32
        stable_rank     (s_1^2 + ... + s_r^2) / s_1^2
        effective_rank  exp(entropy of s / (s_1 + ... + s_r)) (Roy & Vetterli 2007)
        nuclear         s_1 + ... + s_r
        frobenius       (s_1^2 + ... + s_r^2)^(1/2)
        spectral        s_1
        half_sq_norm    (|A|_F^2 + |B|_F^2) / 2, at least the nuclear norm
        gap             (half_sq_norm - nuclear) / half_sq_norm, 0 where A^T A = B^T B
        imbalance       |A^T A - B^T B|_F / (|A^T A|_F + |B^T B|_F)
        norm_A, norm_B  |A|_F, |B|_F

    The ranks are 0 where A B^T = 0. All metrics are 0 where A = B = 0.
    """
    top = s[:, 0]
    nuclear = s.sum(-1)
    p = ratio(s, nuclear[:, None])
    entropy = -torch.special.xlogy(p, p).sum(-1)
    norm_A = norm_from_gram(AA)
    norm_B = norm_from_gram(BB)
    half = (norm_A**2 + norm_B**2) / 2
    return {
        rank_name(threshold): ranks(s, threshold),
        "numerical_rank": (s > d * EPS32 * top[:, None]).sum(-1),
        "stable_rank": ratio((s**2).sum(-1), top**2),
        "effective_rank": torch.where(top > 0, entropy.exp(), 0.0),
        "nuclear": nuclear,
        "frobenius": (s**2).sum(-1).sqrt(),
        "spectral": top,
        "half_sq_norm": half,
        "gap": ratio(half - nuclear, half).clamp(0, 1),
        "imbalance": ratio(matrix_norm(AA - BB), matrix_norm(AA) + matrix_norm(BB)),
        "norm_A": norm_A,
        "norm_B": norm_B,
    }


def exact_way(A, B, buffer=None):
    """Singular values of A B^T for numpy arrays A (d, r), B (d', r), within 1e-13 of the largest.

    A = Q_A R_A and B = Q_B R_B, so A B^T = Q_A (R_A R_B^T) Q_B^T: those of an r x r matrix.
    """
    R_A = np.linalg.qr(as_float64(A), mode="r")
    R_B = np.linalg.qr(as_float64(B), mode="r")
    return np.linalg.svd(R_A @ R_B.T, compute_uv=False)


def ratio(x, y):
    """x / y, and 0 where x = y = 0."""
    return x / torch.where(y > 0, y, 1.0)


def norm_from_gram(G):
    """|X|_F from X^T X (..., r, r) -> (...)."""
    return G.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()


def ranks(s, threshold):
    """The threshold rank, 0 where all of s is 0; s (..., r), descending -> (...)."""
    r = s.shape[-1]
    total = s.sum(-1, keepdim=True)
    enough = threshold * total * (1 - r * EPS)  # at threshold 1, rounding must not ask for one more
    k = (s.cumsum(-1) < enough).sum(-1) + 1
    return torch.where(total[..., 0] > 0, k.clamp(max=r), 0)


def rank_name(threshold):
    """rank95 for 0.95, rank99.5 for 0.995. Raises UserError outside (0, 1]."""
    if not 0 < threshold <= 1:
        raise UserError(f"threshold {threshold} is not in (0, 1]")
    return f"rank{100 * threshold:.10g}"


# -----------------------------------------------------------------------------
# what to call

def qk_factors(W_Q, W_K):
    """Factors (A, B) of W_K^T W_Q, each (..., d, r), from W_Q, W_K (..., r, d)."""
    return W_K.mT, W_Q.mT


def ov_factors(W_V, P):
    """Factors (A, B) of P W_V, each (..., d, r), from W_V (..., r, d) and P (..., d, r)."""
    return P, W_V.mT


def factors_of(layer):
    """{"qk": (A, B), "ov": (A, B)} of an object with W_Q, W_K, W_V (H, r, d) and P (H, d, r)."""
    return {"qk": qk_factors(layer.W_Q, layer.W_K), "ov": ov_factors(layer.W_V, layer.P)}


def singular_values(A, B, exact=False):
    """Singular values of A B^T for A (..., d, r), B (..., d', r): float64 (..., r), descending.

    Within 1e-7 of the largest, or 1e-13 if exact.
    Raises UserError for shapes that do not fit, and for NaN or inf.
    """
    return measure(A, B, exact=exact)[0]


def metrics(A, B, threshold=0.95, exact=False):
    """The metrics of A B^T, defined in metrics_of: {name: number, or nested list of the leading shape}.

    Raises UserError for shapes that do not fit, and for NaN or inf.
    """
    return measure(A, B, threshold, exact)[1]


def measure(A, B, threshold=0.95, exact=False):
    """(singular values, metrics) of A B^T, as singular_values and metrics return them.

    rank95 and numerical_rank are the same whether exact or not.
    """
    A, B, leading = as_heads(A, B)
    d = max(A.shape[1], B.shape[1])
    squares, AA, BB = by_gram(A, B)
    live = check_finite(AA, BB, leading)

    # the fast way where its error bound allows, the exact way for the other heads
    s, unsure = from_squares(squares, AA, BB, live, d, threshold)
    redo = live if exact else unsure
    if redo.any():
        s[redo] = by_qr(A, B, redo.nonzero()[:, 0].tolist()).to(s.device)

    table = metrics_of(s, AA, BB, d, threshold)
    table = {name: values.reshape(leading).tolist() for name, values in table.items()}
    return s.reshape(*leading, -1), table


def svd(A, B):
    """Thin SVD of A B^T in float64, for A (..., d, r), B (..., d', r) with d, d' >= r.

    Returns U (..., d, r), s (..., r) descending, V (..., d', r).
    """
    Q_A, R_A = torch.linalg.qr(A.double())
    Q_B, R_B = torch.linalg.qr(B.double())
    U, s, Vh = torch.linalg.svd(R_A @ R_B.mT)
    return Q_A @ U, s, Q_B @ Vh.mT


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
    from nanorank.regulariser import measure_product, products_of  # which needs this module
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


def as_heads(A, B):
    """A (n, d, r), B (n, d', r) as tensors, views where possible, and their leading dimensions.

    Raises UserError for shapes that do not fit.
    """
    A, B = torch.as_tensor(A).detach(), torch.as_tensor(B).detach()
    fit = A.ndim == B.ndim >= 2 and A.shape[:-2] == B.shape[:-2] and A.shape[-1] == B.shape[-1]
    if not fit or A.numel() == 0 or B.numel() == 0:
        raise UserError("factors of A B^T must be (..., d, r) and (..., d', r), "
                        f"got {tuple(A.shape)} and {tuple(B.shape)}")
    leading = A.shape[:-2]
    if A.device.type == "mps":  # has no float64
        A, B = A.cpu(), B.cpu()
    return A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:]), leading


def check_finite(AA, BB, leading):
    """Which heads (n,) have two nonzero factors. Raises UserError for NaN or inf, naming the head."""
    norm_A = norm_from_gram(AA)
    norm_B = norm_from_gram(BB)
    finite = (norm_A * norm_B).isfinite()
    if not finite.all():
        first = int((~finite).nonzero()[0])
        index = [int(i) for i in np.unravel_index(first, leading)]
        raise UserError(f"NaN or inf in the factors of head {index}")
    return (norm_A > 0) & (norm_B > 0)


# -----------------------------------------------------------------------------
# the fast way: Gram matrices alone
#
# With L L^T = A^T A, the r x r matrix L^T (B^T B) L has the eigenvalues s^2. A^T A and B^T B
# take one pass over the factors, but squaring costs half the digits. So each head gets an error
# bound, and where it is too large the exact way does the head again. All is in float64: on a CPU
# by numpy, head by head on a thread per core; on a GPU by torch, all heads at once.

def by_gram(A, B):
    """Eigenvalues s^2 (n, r), ascending, and A^T A, B^T B (n, r, r) for A (n, d, r), B (n, d', r).

    The eigenvalues are NaN where A^T A has no Cholesky factor: zero, or too close to singular.
    """
    if A.device.type != "cpu":
        return all_at_once(A, B)
    columns = zip(*over_heads(gram_way, A, B, range(len(A))))
    squares, AA, BB = (torch.from_numpy(np.stack(column)) for column in columns)
    return squares, AA, BB


def gram_way(A, B, buffer):
    """by_gram for one head's numpy arrays."""
    AA, BB = gram(A, buffer), gram(B, buffer)
    try:
        L = np.linalg.cholesky(AA + 8 * EPS * np.linalg.norm(AA) * np.eye(len(AA)))
        return np.linalg.eigvalsh(L.T @ BB @ L), AA, BB
    except np.linalg.LinAlgError:
        return np.full(len(AA), np.nan), AA, BB


def gram(X, buffer):
    """X^T X (r, r) of an array X (d, r) in float64, as many rows at a time as fit into the buffer."""
    G = 0
    rows = max(1, len(buffer) // X.shape[1])
    for i in range(0, len(X), rows):
        Y = as_float64(X[i:i + rows], buffer)
        G = G + Y.T @ Y  # numpy sees the symmetry and does half the work
    return G


def all_at_once(A, B):
    """by_gram in batched torch operations, for a GPU."""
    A, B = A.double(), B.double()
    AA, BB = A.mT @ A, B.mT @ B
    jitter = (8 * EPS * matrix_norm(AA))[:, None].expand(AA.shape[:2])
    L, failed = torch.linalg.cholesky_ex(AA + jitter.diag_embed())
    ok = failed == 0
    M = (L.mT @ BB @ L).where(ok[:, None, None], 0.0).nan_to_num()
    squares = torch.linalg.eigvalsh(M)
    return squares.where(ok[:, None], torch.nan), AA, BB


def from_squares(squares, AA, BB, live, d, threshold):
    """Singular values (n, r), descending, from by_gram's eigenvalues; which heads (n,) need the exact way.

    Rounding moves an eigenvalue s^2 by at most e = 256 eps |A^T A|_F |B^T B|_F. (Of these 256 the
    worst factors that we could make reach 180; the jitter on A^T A takes 8.) So s moves by at most
    e / s, and by at most sqrt(e).
    """
    e = (256 * EPS * matrix_norm(AA) * matrix_norm(BB))[:, None]
    s = torch.where(live[:, None], squares.clamp(min=0).sqrt().flip(-1), 0.0)
    bound = torch.where(live[:, None], e / torch.maximum(s, e.sqrt()), 0.0)  # (n, r)
    inaccurate = ~(bound <= TOLERANCE * s[:, :1]).all(-1)  # written so that NaN is inaccurate too

    # rank95 compares (s_1 + ... + s_k) / sum(s), which can be off by `share`
    share = (bound.sum(-1) / s.sum(-1).clamp(min=1e-300))[:, None]
    unsure_rank = ranks(s, threshold - share) != ranks(s, threshold + share)

    # numerical_rank counts s_i > cut * s_1
    cut = d * EPS32
    low, high = (s - bound).clamp(min=0), s + bound
    most = (high > cut * low[:, :1]).sum(-1)
    least = (low > cut * high[:, :1]).sum(-1)
    return s, live & (inaccurate | unsure_rank | (most != least))


def by_qr(A, B, heads):
    """Singular values (len(heads), r) of these heads of A (n, d, r), B (n, d', r), the exact way."""
    if A.device.type == "cpu":
        s = torch.from_numpy(np.stack(over_heads(exact_way, A, B, heads)))
    else:
        R_A = torch.linalg.qr(A[heads].double(), mode="r").R
        R_B = torch.linalg.qr(B[heads].double(), mode="r").R
        s = torch.linalg.svdvals(R_A @ R_B.mT)
    return torch.nn.functional.pad(s, (0, A.shape[-1] - s.shape[-1]))  # min(d, d', r) -> r


# -----------------------------------------------------------------------------
# what random factors have

@functools.lru_cache
def gaussian_nuclear(d_A, d_B, r):
    """Mean nuclear norm of A B^T for Gaussian A (d_A, r), B (d_B, r) scaled to |A|_F = |B|_F = 1.

    A random head has nuclear = norm_A * norm_B * this; if the two norms are equal, gap = 1 - this.
    The 16 draws have their own seed. Above 512 columns the shapes are scaled down: only ratios matter.
    With A = Q R it is enough to draw R (Bartlett 1933): R_ii^2 is chi^2(d_A - i) with i from 0, and
    the entries right of it are N(0, 1).
    """
    draws = 16
    rng = np.random.default_rng(0)
    scale = max(1.0, r / 512)
    d_A, d_B, r = (max(1, round(x / scale)) for x in (d_A, d_B, r))

    def draw_R(d):
        i = np.arange(min(d, r))
        R = np.triu(rng.normal(size=(draws, len(i), r)), 1)
        R[:, i, i] = rng.chisquare(d - i, (draws, len(i))) ** 0.5
        return R / np.linalg.matrix_norm(R, keepdims=True)

    return float(np.linalg.svdvals(draw_R(d_A) @ draw_R(d_B).mT).sum(-1).mean())
