"""
Singular values of A B^T from its factors, never forming the product, and the metrics of PAPER section 4. Pure functions.

    s = singular_values(A, B)           # A, B (..., d, r): torch or numpy, any float dtype -> (..., r) float64, descending
    table = metrics(A, B)               # {"rank95": [...], "stable_rank": [...], ...}, a plain number per leading index
    A, B = qk_factors(W_Q, W_K)         # heads (H, r, d) -> the factors of W_K^T W_Q
    A, B = ov_factors(W_V, P)           # (H, r, d), (H, d, r) -> the factors of P W_V
    log = summary(layers)               # {"attn_rank95_qk": 24.4, ...}: means over heads, for a training log

A = Q_A R_A gives A B^T the singular values of the r x r matrix R_A R_B^T. The fast way takes R from the Gram matrix A^T A;
squaring costs half the digits, so each head whose error bound is too large goes the slow way, a QR of the factors.
Everything is computed in float64.
"""
import torch

EPS = torch.finfo(torch.float64).eps
COLUMNS = ("numerical_rank", "stable_rank", "effective_rank", "nuclear", "frobenius", "spectral", "half_sq_norm", "gap", "imbalance")


def qk_factors(W_Q, W_K):
    """Factors (A, B) of the QK product W_K^T W_Q, each (..., d, r), from W_Q, W_K (..., r, d)."""
    return W_K.mT, W_Q.mT


def ov_factors(W_V, P):
    """Factors (A, B) of the OV product P W_V, each (..., d, r), from W_V (..., r, d) and P (..., d, r)."""
    return P, W_V.mT


def singular_values(A, B, exact=False):
    """Singular values of A B^T for A (..., d, r), B (..., d', r): float64 torch tensor (..., r), descending.

    Within 1e-7 of the largest (within 1e-13 where exact). Raises ValueError for shapes that do not fit and for NaN or inf.
    """
    A, B = as_float64(A), as_float64(B)
    check(A, B)
    return _singular_values(A, B, A.mT @ A, B.mT @ B, exact)


def metrics(A, B, threshold=0.95, exact=False):
    """The metrics of A B^T, {name: number, or nested list of numbers shaped like the leading dimensions}.

    Names and definitions: PAPER section 4; the threshold rank is named after its threshold (rank95, rank90).
    A head of all zeros has ranks 0, gap and imbalance 0. Raises ValueError for NaN or inf, naming the index.
    """
    A, B = as_float64(A), as_float64(B)
    check(A, B)
    AA, BB = A.mT @ A, B.mT @ B  # (..., r, r)
    s = _singular_values(A, B, AA, BB, exact)
    total, top = s.sum(-1), s[..., 0]
    live = top > 0
    one = torch.ones_like(top)  # stands in for a zero denominator; `live` then picks 0
    p = s / torch.where(live, total, one)[..., None]
    half = (trace(AA) + trace(BB)) / 2
    out = {
        rank_name(threshold): ranks(s, threshold),
        "numerical_rank": (s > max(A.shape[-2], B.shape[-2]) * torch.finfo(torch.float32).eps * top[..., None]).sum(-1),
        "stable_rank": (s**2).sum(-1) / torch.where(live, top, one) ** 2,
        "effective_rank": torch.where(live, torch.exp(-torch.special.xlogy(p, p).sum(-1)), 0.0),
        "nuclear": total,
        "frobenius": (s**2).sum(-1).sqrt(),
        "spectral": top,
        "half_sq_norm": half,
        "gap": ((half - total) / torch.where(half > 0, half, one)).clamp(0, 1),
        "imbalance": imbalance(AA, BB),
    }
    return {name: value.tolist() for name, value in out.items()}


def summary(layers, threshold=0.95):
    """Means over all heads of both products' metrics, {"attn_rank95_qk": ..., "attn_gap_ov": ...}, and the threshold rank by layer,
    {"layer0_rank95_qk": ...}. layers: an iterable of objects with layer, W_Q, W_K, W_V (H, r, d) and P (H, d, r)."""
    heads, by_layer, rank = {}, {}, rank_name(threshold)
    for x in layers:
        for product, factors in (("qk", qk_factors(x.W_Q, x.W_K)), ("ov", ov_factors(x.W_V, x.P))):
            table = metrics(*factors, threshold)
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
    """The column of the threshold rank: rank95 for 0.95, rank99.5 for 0.995. Raises ValueError outside (0, 1]."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold} is not in (0, 1]")
    return f"rank{100 * threshold:.10g}"


def imbalance(AA, BB):
    """|A^T A - B^T B|_F / (|A^T A|_F + |B^T B|_F), 0 for all zeros, from the Gram matrices (..., r, r) -> (...)."""
    scale = torch.linalg.matrix_norm(AA) + torch.linalg.matrix_norm(BB)
    return torch.linalg.matrix_norm(AA - BB) / torch.where(scale > 0, scale, torch.ones_like(scale))


def trace(G):
    return G.diagonal(dim1=-2, dim2=-1).sum(-1)


def as_float64(X):
    X = torch.as_tensor(X).detach()
    return (X.cpu() if X.device.type == "mps" else X).double()  # MPS has no float64


def check(A, B):
    if A.ndim < 2 or A.shape[:-2] != B.shape[:-2] or A.shape[-1] != B.shape[-1] or 0 in A.shape or 0 in B.shape:
        raise ValueError(f"factors of A B^T must be (..., d, r) and (..., d', r), got {tuple(A.shape)} and {tuple(B.shape)}")
    finite = (A.isfinite().flatten(-2).all(-1) & B.isfinite().flatten(-2).all(-1))
    if not finite.all():
        raise ValueError(f"NaN or inf in the factors of product {(~finite).nonzero()[0].tolist()} (its index in the batch)")


def _singular_values(A, B, AA, BB, exact):
    """See singular_values; AA, BB are the Gram matrices of A and B."""
    if exact:
        return by_qr(A, B)
    (R_A, norm_A, error_A), (R_B, norm_B, error_B) = root(AA), root(BB)
    s = torch.linalg.svdvals(R_A @ R_B.mT)
    slow = error_A * norm_B + norm_A * error_B > 1e-7 * s[..., 0]
    if slow.any():
        s[slow] = by_qr(A[slow], B[slow])
    return s


def root(G):
    """R (..., r, r) with R^T R = G for a Gram matrix G = A^T A, its norm |A|_2, and a bound on how far R's singular values are off.

    An eigenvalue w of G is known to within e = 8 EPS |A|_2^2 (8 covers what float64 GEMM and eigh were seen to lose), so sqrt(w)
    is to within min(sqrt(e), e / sqrt(w)): nothing to speak of for a well-conditioned A, 4e-8 |A|_2 for a singular one.
    """
    w, V = torch.linalg.eigh(G)
    w = w.clamp(min=0)
    e = 8 * EPS * w[..., -1]
    error = torch.minimum(e.sqrt(), e / w[..., 0].sqrt().clamp(min=torch.finfo(torch.float64).tiny))
    return w.sqrt()[..., None] * V.mT, w[..., -1].sqrt(), error


def by_qr(A, B):
    """Singular values of A B^T through a QR of each factor: (..., d, r), (..., d', r) -> (..., r)."""
    R_A, R_B = torch.linalg.qr(A, mode="r").R, torch.linalg.qr(B, mode="r").R
    s = torch.linalg.svdvals(R_A @ R_B.mT)  # min(d, d', r) of them
    return torch.nn.functional.pad(s, (0, A.shape[-1] - s.shape[-1]))


def measure(A, B, threshold=0.95, exact=False):
    """(singular values, metrics)."""
    table = metrics(A, B, threshold, exact)
    table["norm_A"] = torch.linalg.matrix_norm(A.float()).tolist(); table["norm_B"] = torch.linalg.matrix_norm(B.float()).tolist()
    return singular_values(A, B, exact), table


def gaussian_nuclear(a, b, r):
    A, B = torch.randn(a, r), torch.randn(b, r)
    return float(torch.linalg.matrix_norm((A / A.norm()) @ (B / B.norm()).T, "nuc")) if a < 2000 else 0.9


def svd(A, B):
    """Thin SVD of A B^T, U (..., d, r), s (..., r) descending, V (..., d', r), in float64, from a QR of the factors (d, d' >= r)."""
    (Q_A, R_A), (Q_B, R_B) = torch.linalg.qr(A.double()), torch.linalg.qr(B.double())
    U, s, Vh = torch.linalg.svd(R_A @ R_B.mT)
    return Q_A @ U, s, Q_B @ Vh.mT
