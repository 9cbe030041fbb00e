"""
Singular values of A B^T from its factors, never forming the product, and the metrics of PAPER section 4. Pure functions.

    s = singular_values(A, B)           # A, B (..., d, r): torch or numpy, any float dtype -> (..., r) float64, descending
    table = metrics(A, B)               # {"rank95": [...], "stable_rank": [...], ...}, a plain number per leading index
    A, B = qk_factors(W_Q, W_K)         # heads (H, r, d) -> the factors of W_K^T W_Q
    A, B = ov_factors(W_V, P)           # (H, r, d), (H, d, r) -> the factors of P W_V
    log = summary(layers)               # {"attn_rank95_qk": 24.4, ...}: means over heads, for a training log

The fast way needs the Gram matrices alone: with L L^T = A^T A, the r x r matrix L^T (B^T B) L has the eigenvalues s^2. Squaring
costs half the digits, so each head whose error bound is too large goes the slow way, a QR of the factors. All of it in float64:
on a CPU by numpy, head by head on a thread per core; on a GPU by torch, all heads at once.
"""
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from nanorank.errors import UserError

EPS = torch.finfo(torch.float64).eps
TOLERANCE = 1e-7    # largest error bound, over the largest singular value, that a head may have and go the fast way
BUFFER = 1 << 19    # entries of a factor that a thread has in float64 at a time, 4 MB: one of 4096 x 128


def qk_factors(W_Q, W_K):
    """Factors (A, B) of the QK product W_K^T W_Q, each (..., d, r), from W_Q, W_K (..., r, d)."""
    return W_K.mT, W_Q.mT


def ov_factors(W_V, P):
    """Factors (A, B) of the OV product P W_V, each (..., d, r), from W_V (..., r, d) and P (..., d, r)."""
    return P, W_V.mT


def singular_values(A, B, exact=False):
    """Singular values of A B^T for A (..., d, r), B (..., d', r): float64 torch tensor (..., r), descending.

    Within 1e-7 of the largest (within 1e-13 where exact). Raises UserError for shapes that do not fit and for NaN or inf.
    """
    return measure(A, B, exact=exact)[0]


def metrics(A, B, threshold=0.95, exact=False):
    """The metrics of A B^T, {name: number, or nested list of numbers shaped like the leading dimensions}; see measure."""
    return measure(A, B, threshold, exact)[1]


def measure(A, B, threshold=0.95, exact=False):
    """(singular values, metrics) of A B^T as singular_values and metrics return them.

    Names and definitions: PAPER section 4; the threshold rank is named after its threshold (rank95, rank90); norm_A, norm_B are
    |A|_F, |B|_F. Counts are those of the exact way; a head of all zeros has ranks 0, gap and imbalance 0.
    Raises UserError for shapes that do not fit, and for NaN or inf, naming the index.
    """
    rank = rank_name(threshold)
    A, B, leading = as_heads(A, B)
    cut = max(A.shape[1], B.shape[1]) * torch.finfo(torch.float32).eps
    squares, AA, BB = by_gram(A, B)
    norm_A, norm_B = (G.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt() for G in (AA, BB))
    finite = (norm_A * norm_B).isfinite()
    if not finite.all():
        index = np.unravel_index(int((~finite).nonzero()[0]), leading)
        raise UserError(f"NaN or inf in the factors of product {[int(i) for i in index]} (its index in the batch)")

    # Rounding moves an eigenvalue s^2 by e at most (of 256 at most 180 were seen, with factors made to be bad; the jitter takes 8), so s by
    # e / s, and by sqrt(e) at most. A head where that is too much, or where a count hangs on it, is done again.
    live = (norm_A > 0) & (norm_B > 0)
    e = (256 * EPS * torch.linalg.matrix_norm(AA) * torch.linalg.matrix_norm(BB))[:, None]
    s = torch.where(live[:, None], squares.clamp(min=0).sqrt().flip(-1), 0.0)
    bound = torch.where(live[:, None], e / torch.maximum(s, e.sqrt()), 0.0)
    share = (bound.sum(-1) / s.sum(-1).clamp(min=1e-300))[:, None]  # how far off a partial sum over the sum can be
    low, high = (s - bound).clamp(min=0), s + bound
    slow = ~(bound <= TOLERANCE * s[:, :1]).all(-1)  # NaN too
    slow |= ranks(s, threshold - share) != ranks(s, threshold + share)
    slow |= (low > cut * high[:, :1]).sum(-1) != (high > cut * low[:, :1]).sum(-1)
    slow = live & (slow | exact)
    if slow.any():
        s[slow] = by_qr(A, B, slow.nonzero()[:, 0].tolist()).to(s.device)

    total, top = s.sum(-1), s[:, 0]
    live = top > 0
    one = torch.ones_like(top)  # stands in for a zero denominator; `live` then picks 0
    p = s / torch.where(live, total, one)[:, None]
    half = (norm_A**2 + norm_B**2) / 2
    out = {
        rank: ranks(s, threshold),
        "numerical_rank": (s > cut * top[:, None]).sum(-1),
        "stable_rank": (s**2).sum(-1) / torch.where(live, top, one) ** 2,
        "effective_rank": torch.where(live, torch.exp(-torch.special.xlogy(p, p).sum(-1)), 0.0),
        "nuclear": total,
        "frobenius": (s**2).sum(-1).sqrt(),
        "spectral": top,
        "half_sq_norm": half,
        "gap": ((half - total) / torch.where(half > 0, half, one)).clamp(0, 1),
        "imbalance": imbalance(AA, BB),
        "norm_A": norm_A,
        "norm_B": norm_B,
    }
    return s.reshape(*leading, -1), {name: value.reshape(leading).tolist() for name, value in out.items()}


def svd(A, B):
    """Thin SVD of A B^T for A (..., d, r), B (..., d', r) with d, d' >= r: U (..., d, r), s (..., r) descending, V (..., d', r), in float64."""
    (Q_A, R_A), (Q_B, R_B) = torch.linalg.qr(A.double()), torch.linalg.qr(B.double())
    U, s, Vh = torch.linalg.svd(R_A @ R_B.mT)
    return Q_A @ U, s, Q_B @ Vh.mT


def summary(layers, threshold=0.95):
    """Means over all heads of both products' metrics, {"attn_rank95_qk": ..., "attn_gap_ov": ...}, and the threshold rank by layer,
    {"layer0_rank95_qk": ...}. layers: an iterable of objects with layer, W_Q, W_K, W_V (H, r, d) and P (H, d, r).
    Raises UserError for NaN or inf, naming layer, product and head."""
    heads, by_layer, rank = {}, {}, rank_name(threshold)
    for x in layers:
        for product, factors in (("qk", qk_factors(x.W_Q, x.W_K)), ("ov", ov_factors(x.W_V, x.P))):
            try:
                table = metrics(*factors, threshold)
            except ValueError as error:
                raise UserError(f"layer {x.layer}, {product}: {str(error).replace('product [', 'head [')}") from None
            for name, values in table.items():
                heads.setdefault(f"attn_{name}_{product}", []).extend(values)
            by_layer[f"layer{x.layer}_{rank}_{product}"] = sum(table[rank]) / len(table[rank])
    return {**{name: sum(values) / len(values) for name, values in heads.items()}, **by_layer}


def ranks(s, threshold):
    """Smallest k with s_1 + ... + s_k >= threshold * (s_1 + ... + s_r), 0 for all zeros; s (..., r) descending -> (...)."""
    total = s.sum(-1, keepdim=True)
    short = s.cumsum(-1) < threshold * total * (1 - s.shape[-1] * EPS)  # at threshold 1 round-off must not ask for one more
    return torch.where(total[..., 0] > 0, (short.sum(-1) + 1).clamp(max=s.shape[-1]), 0)


def rank_name(threshold):
    """The column of the threshold rank: rank95 for 0.95, rank99.5 for 0.995. Raises UserError outside (0, 1]."""
    if not 0 < threshold <= 1:
        raise UserError(f"threshold {threshold} is not in (0, 1]")
    return f"rank{100 * threshold:.10g}"


def imbalance(AA, BB):
    """|A^T A - B^T B|_F / (|A^T A|_F + |B^T B|_F), 0 for all zeros, from the Gram matrices (..., r, r) -> (...)."""
    scale = torch.linalg.matrix_norm(AA) + torch.linalg.matrix_norm(BB)
    return torch.linalg.matrix_norm(AA - BB) / torch.where(scale > 0, scale, torch.ones_like(scale))


@functools.lru_cache
def gaussian_nuclear(d_A, d_B, r):
    """Nuclear norm of A B^T for Gaussian A (d_A, r), B (d_B, r) scaled to |A|_F = |B|_F = 1, mean of 16 draws with a seed of their own.

    What no training gives: a random head has nuclear = norm_A * norm_B * this, and where the norms are equal gap = 1 - this.
    Above 512 columns the ratios of d_A, d_B and r tell enough: it is drawn smaller. R of A = Q R is drawn in A's place: R_ii^2 ~
    chi^2(d_A - i), i from 0, and N(0, 1) right of it (Bartlett 1933).
    """
    rng, draws, smaller = np.random.default_rng(0), 16, max(1.0, r / 512)
    d_A, d_B, r = (max(1, round(x / smaller)) for x in (d_A, d_B, r))

    def root(d):
        i = np.arange(min(d, r))
        R = np.triu(rng.normal(size=(draws, len(i), r)), 1)
        R[:, i, i] = rng.chisquare(d - i, (draws, len(i))) ** 0.5
        return R / np.linalg.matrix_norm(R, keepdims=True)

    return float(np.linalg.svdvals(root(d_A) @ root(d_B).mT).sum(-1).mean())

# ------------------------------------------------------------------------------------------------------- heads and threads

def as_heads(A, B):
    """A, B as tensors (n, d, r), (n, d', r), views where possible, and their leading dimensions. Raises UserError where they do not fit."""
    A, B = torch.as_tensor(A).detach(), torch.as_tensor(B).detach()
    if A.ndim < 2 or A.shape[:-2] != B.shape[:-2] or A.shape[-1] != B.shape[-1] or 0 in A.shape or 0 in B.shape:
        raise UserError(f"factors of A B^T must be (..., d, r) and (..., d', r), got {tuple(A.shape)} and {tuple(B.shape)}")
    stacks = [(X.cpu() if X.device.type == "mps" else X).reshape(-1, *X.shape[-2:]) for X in (A, B)]  # MPS has no float64
    return *stacks, A.shape[:-2]


def by_gram(A, B):
    """For stacks A (n, d, r), B (n, d', r): eigenvalues s^2 (n, r), ascending, NaN where they cannot be had, and A^T A, B^T B (n, r, r)."""
    if A.device.type != "cpu":
        return all_at_once(A, B)

    def way(A, B, buffer):
        AA, BB = gram(A, buffer), gram(B, buffer)
        try:
            L = np.linalg.cholesky(AA + 8 * EPS * np.linalg.norm(AA) * np.eye(len(AA)))
            return np.linalg.eigvalsh(L.T @ BB @ L), AA, BB
        except np.linalg.LinAlgError:  # zero, not finite, or less positive than rounding should leave it
            return np.full(len(AA), np.nan), AA, BB

    return over_heads(way, A, B, range(len(A)))


def all_at_once(A, B):
    """by_gram in batched torch operations: the way of a GPU."""
    A, B = A.double(), B.double()
    AA, BB = A.mT @ A, B.mT @ B
    jitter = (8 * EPS * torch.linalg.matrix_norm(AA))[:, None].expand(AA.shape[:2])
    L, failed = torch.linalg.cholesky_ex(AA + jitter.diag_embed())
    squares = torch.linalg.eigvalsh((L.mT @ BB @ L).where((failed == 0)[:, None, None], 0.0).nan_to_num())
    return squares.where((failed == 0)[:, None], torch.nan), AA, BB


def gram(X, buffer):
    """X^T X (r, r) in float64 of an array (d, r), as many rows at a time as fit the float64 buffer."""
    G, rows = 0, max(1, len(buffer) // X.shape[1])
    for i in range(0, len(X), rows):
        Y = as_float64(X[i:i + rows], buffer)
        G = G + Y.T @ Y  # numpy sees that it is symmetric: half the work
    return G


def as_float64(X, buffer=None):
    """The array X in float64, in the buffer where there is one; a bfloat16 comes as its bits in uint16."""
    if X.dtype == np.uint16:  # the upper half of a float32
        X = np.left_shift(X, 16, dtype=np.uint32).view(np.float32)
    if buffer is None:
        return X.astype(np.float64)
    Y = buffer[:X.size].reshape(X.shape) if X.strides[1] < X.strides[0] else buffer[:X.size].reshape(X.shape[::-1]).T
    np.copyto(Y, X)
    return Y


def by_qr(A, B, heads):
    """Singular values (len(heads), r) of these heads of A (n, d, r), B (n, d', r) through a QR of each factor."""
    def way(A, B, buffer):
        R_A, R_B = np.linalg.qr(as_float64(A), mode="r"), np.linalg.qr(as_float64(B), mode="r")
        return (np.linalg.svd(R_A @ R_B.T, compute_uv=False),)

    if A.device.type == "cpu":
        (s,) = over_heads(way, A, B, heads)
    else:
        R_A, R_B = torch.linalg.qr(A[heads].double(), mode="r").R, torch.linalg.qr(B[heads].double(), mode="r").R
        s = torch.linalg.svdvals(R_A @ R_B.mT)
    return torch.nn.functional.pad(s, (0, A.shape[-1] - s.shape[-1]))  # there are min(d, d', r) of them


def over_heads(way, A, B, heads):
    """way(A[i], B[i], buffer) for each head of CPU tensors A, B, given as numpy arrays; each of its outputs stacked. On as many threads as
    torch has and this process may use, in each of which numpy's BLAS has one."""
    A, B = ((X.view(torch.uint16) if X.dtype == torch.bfloat16 else X).numpy() for X in (A, B))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = min(cores, torch.get_num_threads(), len(heads))
    todo = iter(heads)

    def work(_):
        buffer = np.empty(BUFFER)  # one a thread: fresh memory for each block would cost more than the arithmetic on it
        with np.errstate(all="ignore"):  # what is not finite is found by its norm
            return [(i, way(A[i], B[i], buffer)) for i in todo]  # the next head that no other thread has taken

    if threads == 1 or A[0].size * len(heads) < 1 << 18:  # a few small heads: quicker done than shared out
        parts = work(0)
    else:
        with blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
            parts = sorted(sum(pool.map(work, range(threads)), []), key=lambda part: part[0])
    return [torch.from_numpy(np.stack(column)) for column in zip(*(outputs for _, outputs in parts))]


@functools.cache
def blas():
    return ThreadpoolController()  # looks through the loaded libraries, some milliseconds
