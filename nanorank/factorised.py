"""
Linear models whose weight is a product, W = A_1 ... A_n, with L2 on the factors (Kobayashi et al. 2024).

    A = torch.randn(2, 10, 10, dtype=torch.float64)         # two factors
    dA = gradient(A, X, Y, mask)                            # of |mask * (X W - Y)|^2 / 2
    measure(A)["discrepancy"]                               # |A_1^T A_1 - A_2 A_2^T|
    expected("flow", m, lam=0.3, depth=2)                   # where the singular values of W end

Known in advance: under gradient flow, A_1^T A_1 - A_2 A_2^T shrinks as exp(-2 lam t), whatever the loss is.
n factors have sum |A_l|^2 >= n sum_i s_i^(2/n), s_i the singular values of W, with equality where these
differences are 0; for n = 2 it is twice the nuclear norm.
"""
import functools
import itertools
import math

import torch

from nanorank.spectra import ranks

LOSSES = ("recovery", "regression", "completion")


def problems(names, seeds, size, rank, samples):
    """Returns X, Y, mask (problem, 1, seed, size, size), rest (problem, 1, seed) and M (seed, size, size).

    The loss is L(W) = |mask * (X W - Y)|^2 / 2 + rest. M is the matrix to be found, of singular values
    2, ..., 4 / rank, 2 / rank. names: of LOSSES. samples: rows of regression's X; Y has noise of sd 0.1.
    Completion sees 60 % of the entries.
    """
    parts = {name: [] for name in LOSSES}  # name: (X, Y, mask, rest) of each seed
    targets = []
    eye, ones, zero = torch.eye(size), torch.ones(size, size), torch.zeros(())
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        U, V = torch.linalg.qr(torch.randn(2, size, size, generator=g)).Q
        s = 2 * torch.arange(rank, rank - size, -1).clamp(min=0) / rank
        M = U * s @ V
        targets.append(M)
        parts["recovery"].append((eye, M, ones, zero))

        X = torch.randn(samples, size, generator=g) / math.sqrt(samples)
        Y = X @ M + 0.1 * torch.randn(samples, size, generator=g) / math.sqrt(samples)
        Q, R = torch.linalg.qr(X)  # |X W - Y|^2 = |R W - Q^T Y|^2 + |Y - Q Q^T Y|^2
        rest = (Y - Q @ (Q.T @ Y)).square().sum() / 2
        parts["regression"].append((R, Q.T @ Y, ones, rest))

        seen = (torch.rand(size, size, generator=g) < 0.6).double()
        parts["completion"].append((eye, M, seen, zero))

    over_seeds = [map(torch.stack, zip(*parts[name])) for name in names]
    X, Y, mask, rest = [torch.stack(over_problems)[:, None] for over_problems in zip(*over_seeds)]
    return X, Y, mask, rest, torch.stack(targets)


def product(A):
    """W = A_1 ... A_n from factors A (n, ..., size, size)."""
    return functools.reduce(torch.matmul, A)


def gradient(A, X, Y, mask, noise=0.0, generator=None):
    """dL/dA_l for all factors, shaped like A (n, ..., size, size); L = |mask * (X W - Y)|^2 / 2.

    It is (A_1 ... A_(l-1))^T G (A_(l+1) ... A_n)^T, G = dL/dW with Gaussian noise of sd `noise`.
    """
    left = list(itertools.accumulate(A, torch.matmul))  # A_1, A_1 A_2, ..., W
    G = X.mT @ (mask * (X @ left[-1] - Y))
    if noise:
        G = G + noise * torch.randn(G.shape, generator=generator)

    out = []
    for before, factor in zip(left[-2::-1], A.flip(0)):  # from the last factor to the second
        out.append(before.mT @ G)
        G = G @ factor.mT
    out.append(G)
    return torch.stack(out[::-1])


def update(name, A, dL, lam, lr, state, step, beta=0.9, beta2=0.999, eps=1e-8):
    """The parameters A after one step of flow, gd, momentum, adam_l2 or adamw.

    dL: function A -> dL/dA. lam: strengths of L2, broadcast against A. state: a dict, empty at first.
    """
    def decayed(A):
        return dL(A) + lam * A

    if name == "flow":  # dA/dt = -dL/dA - lam A by Runge-Kutta: error O(lr^4)
        k1 = decayed(A)
        k2 = decayed(A - lr / 2 * k1)
        k3 = decayed(A - lr / 2 * k2)
        k4 = decayed(A - lr * k3)
        return A - lr / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    if name == "gd":
        return A - lr * decayed(A)
    if name == "momentum":
        state["v"] = beta * state.get("v", 0) + dL(A) + lam * A
        return A - lr * state["v"]

    g = dL(A)
    if name == "adam_l2":
        g = g + lam * A
    else:  # adamw: the decay bypasses the moments
        A = A * (1 - lr * lam)
    state["m"] = beta * state.get("m", 0) + (1 - beta) * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g**2
    m = state["m"] / (1 - beta**(step + 1))
    v = state["v"] / (1 - beta2**(step + 1))
    return A - lr * m / (v.sqrt() + eps)


def measure(A):
    """{name: tensor (...)} of factors A (n, ..., size, size), and the singular values "s" (..., size) of W.

    sum_sq: sum of |A_l|^2. two_nuclear: its lower bound n sum s^(2/n), which is 2 |W|_* for n = 2.
    discrepancy: norm of all A_l^T A_l - A_(l+1) A_(l+1)^T. rank95: 95 % pseudo-rank of W.
    """
    n = len(A)
    s = torch.linalg.svdvals(product(A))
    D = A[:-1].mT @ A[:-1] - A[1:] @ A[1:].mT
    return {
        "sum_sq": A.square().sum((0, -2, -1)),
        "two_nuclear": n * (s**(2 / n)).sum(-1),
        "discrepancy": D.square().sum((0, -2, -1)).sqrt(),
        "rank95": ranks(s, 0.95),
        "s": s,
    }


def measured_rate(t, discrepancy):
    """-d ln(discrepancy) / dt by least squares, down to 1e-3 of its start: t (n), (n, ...) -> (...)."""
    keep = (discrepancy > 1e-3 * discrepancy[0]).cumprod(0).double()
    t = t.reshape(-1, *[1] * (discrepancy.ndim - 1))
    t = t - (keep * t).sum(0) / keep.sum(0)
    return -(keep * t * discrepancy.clamp(min=1e-300).log()).sum(0) / (keep * t**2).sum(0)


def closed_form(m, lam, depth):
    """argmin over s of (s - m)^2 / 2 + lam depth / 2 s^(2 / depth), for each of m (n).

    Depth 2 is soft thresholding. Deeper ones are solved on a grid, whose minimum is global.
    """
    if depth == 2:
        return (m - lam).clamp(min=0)
    s = torch.linspace(0, 1, 20_001)[:, None] * m
    objective = (s - m) ** 2 / 2 + lam * depth / 2 * s ** (2 / depth)
    return s.gather(0, objective.argmin(0)[None])[0]


def expected(optimizer, m, lam, depth, noise=0.0):
    """Where the singular values of W should end if L = |W - M|^2 / 2 and M has the singular values m (n).

    Every optimizer but adamw minimises L + L2. AdamW divides the gradient by its size. Exact gradients
    vanish at the minimum of L, so no decay is felt. Under noise of sd sigma on dL/dW, an entry of dL/dA in
    column j has sd sigma |b_j|. Where this is all of the size and the columns are alike, |b_j|^2 is
    |W|_* / size, so AdamW is gradient descent with L2 of strength lam sigma sqrt(|W|_* / size). This is our
    own derivation, for depth 2.
    """
    if optimizer != "adamw":
        return closed_form(m, lam, depth)
    s = m
    for _ in range(100 if noise else 0):  # fixed point, damped
        strength = lam * noise * (s.sum() / len(m)).sqrt()
        s = (s + closed_form(m, strength, depth)) / 2
    return s
