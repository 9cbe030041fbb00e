"""Singular values and metrics against float64 SVDs of the whole product and against their definitions."""
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from nanorank import spectra, threads
from nanorank.spectra import (
    gaussian_nuclear,
    measure,
    metrics,
    ov_factors,
    qk_factors,
    singular_values,
    svd,
)
from nanorank.watch import summary

d, r = 96, 16


def gaussian(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def conditioned(*shape, decades):
    """A (..., d, r) matrix with singular values from 1 down to 10^-decades."""
    U, V = torch.linalg.qr(gaussian(*shape)).Q, torch.linalg.qr(gaussian(*shape[:-2], shape[-1], shape[-1])).Q
    return U * torch.logspace(0, -decades, shape[-1], dtype=torch.float64) @ V


def cases():
    torch.manual_seed(0)
    U = torch.linalg.qr(gaussian(d, r)).Q
    steep = torch.logspace(0, -8, r, dtype=torch.float64)
    B = gaussian(5, d, r)
    return {
        "random": (gaussian(5, d, r), gaussian(5, d, r)),
        "rank 5 x full": (gaussian(5, d, 5) @ gaussian(5, 5, r), gaussian(5, d, r)),
        "rank 5 x rank 5": (gaussian(5, d, 5) @ gaussian(5, 5, r), gaussian(5, d, 5) @ gaussian(5, 5, r)),
        "condition 1e8": (conditioned(5, d, r, decades=8), gaussian(5, d, r)),
        "condition 1e8 twice": (conditioned(5, d, r, decades=8), conditioned(5, d, r, decades=8)),
        # |A B^T| far below |A| |B|
        "large against small": ((U * steep)[None], (U.flip(-1) * steep.flip(-1))[None]),
        "zero": (torch.zeros(5, d, r), gaussian(5, d, r)),
        "float32": (gaussian(5, d, r).float(), gaussian(5, d, r).float()),
        "bfloat16": (gaussian(5, d, r).bfloat16(), gaussian(5, d, r).bfloat16()),
        "wide": (gaussian(5, r // 2, r), gaussian(5, r // 2, r)),  # fewer rows than columns
        "different heights": (gaussian(5, d, r), gaussian(5, 2 * d, r)),
        "large": (1e30 * gaussian(5, d, r), 1e30 * B),
        "small": (1e-30 * gaussian(5, d, r), 1e-30 * B),
        "one column": (gaussian(5, d, 1), gaussian(5, d, 1)),
        "mixed": (torch.cat([torch.zeros(1, d, r), conditioned(1, d, r, decades=12), gaussian(3, d, r)]), B),
    }


@pytest.mark.parametrize("exact", [False, True], ids=["gram", "qr"])
@pytest.mark.parametrize("case", cases())
def test_singular_values_of_the_whole_product(case, exact):
    A, B = cases()[case]
    full = torch.linalg.svdvals(A.double() @ B.double().mT)[..., :A.shape[-1]]
    s = singular_values(A, B, exact)
    assert s.shape == (*A.shape[:-2], A.shape[-1]) and s.dtype == torch.float64
    error = (s[..., :full.shape[-1]] - full).abs() / full[..., :1].clamp(min=1e-300)
    assert error.max() < (1e-13 if exact else 1e-7)
    assert (s[..., full.shape[-1]:] <= 1e-7 * full[..., :1]).all() and (s.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("case", cases())
def test_metrics_by_their_definitions(case):
    A, B = (X.double() for X in cases()[case])
    table = metrics(A, B)
    for i, W in enumerate(A @ B.mT):
        s = np.linalg.svd(W.numpy(), compute_uv=False)[:A.shape[-1]]
        s = np.where(s > 1e-13 * s[0], s, 0.0)  # what the SVD of the product cannot know
        half = 0.5 * (A[i].norm() ** 2 + B[i].norm() ** 2).item()
        AA, BB = A[i].T @ A[i], B[i].T @ B[i]
        if s.sum() == 0:
            one = 1.0 if half else 0.0
            want = dict.fromkeys(table, 0) | {"half_sq_norm": half, "gap": one, "imbalance": one}
        else:
            p = s / s.sum()
            cut = max(A.shape[-2], B.shape[-2]) * np.finfo(np.float32).eps * s[0]
            want = {
                "rank95": next(k for k in range(1, len(s) + 1) if s[:k].sum() >= 0.95 * s.sum()),
                "numerical_rank": (s > cut).sum(),
                "stable_rank": (s**2).sum() / s[0] ** 2,
                "effective_rank": math.exp(-sum(x * math.log(x) for x in p if x > 0)),
                "nuclear": s.sum(), "frobenius": W.norm().item(), "spectral": s[0],
                "half_sq_norm": half,
                "gap": (half - s.sum()) / half,
                "imbalance": ((AA - BB).norm() / (AA.norm() + BB.norm())).item(),
            }
        want |= {"norm_A": A[i].norm().item(), "norm_B": B[i].norm().item()}
        got = {name: values[i] for name, values in table.items()}
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-9), (case, i, name)
        assert 0 <= got["gap"] <= 1 and 0 <= got["imbalance"] <= 1 + 1e-12


def test_a_head_of_zeros_is_all_zeros():
    table = metrics(torch.zeros(2, d, r), torch.zeros(2, d, r))
    assert all(values == [0, 0] for values in table.values())


def test_a_balanced_head_has_no_gap():
    torch.manual_seed(1)
    U, s, Vh = torch.linalg.svd(gaussian(d, d))
    A, B = U[:, :r] * s[:r].sqrt(), Vh[:r].T * s[:r].sqrt()
    table = metrics(A, B)
    assert table["gap"] == pytest.approx(0, abs=1e-12) and table["imbalance"] == pytest.approx(0, abs=1e-12)
    assert table["nuclear"] == pytest.approx(s[:r].sum().item()) and table["numerical_rank"] == r


@pytest.mark.parametrize("threshold, rank, column", [
    (0.95, 10, "rank95"), (0.9, 9, "rank90"), (0.5, 5, "rank50"),
    (1.0, 10, "rank100"), (0.995, 10, "rank99.5"), (0.01, 1, "rank1")])
def test_threshold_rank_at_exact_fractions(threshold, rank, column):
    I = torch.eye(10, dtype=torch.float64)  # noqa: E741
    assert metrics(I, I, threshold)[column] == rank


def test_numpy_in_and_plain_numbers_out():
    A = np.random.default_rng(0).normal(size=(3, d, r)).astype(np.float32)
    table = metrics(A, A)
    assert all(type(x) in (int, float) for values in table.values() for x in values)
    assert type(metrics(A[0], A[0])["rank95"]) is int


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_is_refused_by_index(value):
    A = gaussian(3, d, r)
    A[2, 4, 4] = value
    with pytest.raises(ValueError, match=r"\[2\]"):
        metrics(A, gaussian(3, d, r))


def test_shapes_and_thresholds_that_make_no_sense():
    shapes = ((d, r), (d, r + 1)), ((2, d, r), (3, d, r)), ((r,), (r,)), ((d, r), (r,)), ((0, r), (0, r))
    for A, B in shapes:
        with pytest.raises(ValueError, match="factors"):
            metrics(gaussian(*A), gaussian(*B))
    for threshold in (0, -1, 1.1, math.nan):
        with pytest.raises(ValueError, match="threshold"):
            metrics(gaussian(d, r), gaussian(d, r), threshold)


def test_factors_are_the_products_of_the_paper():
    W_Q, W_K, W_V, P = gaussian(2, r, d), gaussian(2, r, d), gaussian(2, r, d), gaussian(2, d, r)
    A, B = qk_factors(W_Q, W_K)
    assert torch.allclose(A @ B.mT, W_K.mT @ W_Q)
    A, B = ov_factors(W_V, P)
    assert torch.allclose(A @ B.mT, P @ W_V)


def test_summary_is_the_mean_over_heads_and_layers():
    class Layer:
        def __init__(self, layer):
            self.layer, self.W_Q, self.W_K, self.W_V, self.P = layer, *gaussian(3, 2, r, d), gaussian(2, d, r)

    layers = [Layer(0), Layer(1)]
    log = summary(layers)
    gaps = [gap for x in layers for gap in metrics(*qk_factors(x.W_Q, x.W_K))["gap"]]
    assert log["attn_gap_qk"] == pytest.approx(sum(gaps) / 4)
    assert log["layer1_rank95_ov"] == sum(metrics(*ov_factors(layers[1].W_V, layers[1].P))["rank95"]) / 2


def hard_heads(n, d, r, seed):
    """Pairs of factors of every awkward kind: graded, rank-deficient, misaligned, of very different sizes."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    A, B = normal(2, n, d, r)
    for i in range(n):
        decades = torch.rand(1, generator=g) * 12
        k = int(torch.randint(1, r + 1, (1,), generator=g))
        kind = i % 6
        if kind == 1:
            A[i] *= torch.logspace(0, -float(decades), r, dtype=torch.float64)
        if kind == 2:
            A[i] = A[i, :, :k] @ normal(k, r)
        if kind == 3:  # what A has much of, B has little of
            A[i] *= torch.logspace(0, -float(decades), r, dtype=torch.float64)
            B[i] *= torch.logspace(-float(decades), 0, r, dtype=torch.float64)
        if kind == 4:
            A[i] += 1e6 * normal(d, 1) @ normal(1, r)
        if kind == 5:
            A[i], B[i] = A[i] * 10 ** float(decades), B[i] * 10 ** -float(decades)
    return A, B


def test_thousands_of_hard_heads_against_qr():
    """The fast way is within 1e-7 of the largest singular value; its counts are those of the exact way."""
    for seed in range(4):
        A, B = hard_heads(600, 40, 12, seed)
        fast, exact = measure(A, B), measure(A, B, exact=True)
        assert ((fast[0] - exact[0]).abs() <= 1.01e-7 * exact[0][:, :1]).all()
        for rank in ("rank95", "numerical_rank"):
            assert fast[1][rank] == exact[1][rank]


def test_most_heads_go_the_fast_way(monkeypatch):
    """Ordinary heads never see a QR, and the awkward ones do."""
    def no(*args):
        raise AssertionError("QR")

    monkeypatch.setattr(spectra, "by_qr", no)
    metrics(*torch.randn(2, 8, 256, 64, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(AssertionError, match="QR"):
        metrics(*hard_heads(6, 40, 12, 0))


def test_gpus_way_on_a_cpu(monkeypatch):
    """All heads at once, as on a GPU: the same numbers, dead, singular and infinite heads among them."""
    A, B = hard_heads(60, 40, 12, 1)
    A[3], B[4] = 0, 0
    want = measure(A, B)
    monkeypatch.setattr(spectra, "by_gram", spectra.all_at_once)
    got = measure(A, B)
    assert ((got[0] - want[0]).abs() <= 2e-7 * want[0][:, :1]).all() and got[1]["rank95"] == want[1]["rank95"]
    A[7, 0, 0] = math.inf
    with pytest.raises(ValueError, match=r"\[7\]"):
        measure(A, B)


@pytest.mark.parametrize("way", [spectra.by_gram, spectra.all_at_once], ids=["cpu", "gpu"])
def test_heads_without_eigenvalues_go_the_exact_way(monkeypatch, way):
    """Where L^T (B^T B) L overflows, and where the eigenvalues do not converge."""
    monkeypatch.setattr(spectra, "by_gram", way)
    A, B = gaussian(2, 3, d, r)
    want = singular_values(A, B, exact=True)
    A[1] *= 1e80
    B[1] *= 1e80
    s = singular_values(A, B)
    assert torch.allclose(s[1] / 1e160, want[1]) and torch.allclose(s[::2], want[::2])

    def no(M):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", no)
    assert torch.allclose(singular_values(A, B)[::2], want[::2])


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_are_left_as_they_were(two_threads):
    """Heads on two threads: the same numbers; then numpy and torch have theirs back, after errors too."""
    before = [pool["num_threads"] for pool in threads.blas().info()]
    A, B = torch.randn(2, 16, 1024, 32)
    want = [measure(A[i:i + 1], B[i:i + 1])[0] for i in range(16)]
    assert torch.equal(measure(A, B)[0], torch.cat(want))
    A[5, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"\[5\]"):
        measure(A, B)
    assert [pool["num_threads"] for pool in threads.blas().info()] == before
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:  # a thread that is new to torch
        assert pool.submit(torch.get_num_threads).result() == 2


@pytest.mark.parametrize("d_A, d_B, r", [(96, 96, 32), (200, 64, 16), (8, 12, 16)])
def test_gaussian_nuclear(d_A, d_B, r):
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    g = torch.Generator().manual_seed(0)
    direct = []
    for _ in range(50):
        A, B = (torch.randn(d, r, generator=g, dtype=torch.float64) for d in (d_A, d_B))
        direct.append(float(torch.linalg.matrix_norm(A @ B.mT, "nuc") / A.norm() / B.norm()))
    assert gaussian_nuclear(d_A, d_B, r) == pytest.approx(sum(direct) / 50, rel=0.02)
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()


def test_svd_of_the_product():
    A, B = gaussian(3, d, r), gaussian(3, 2 * d, r)
    U, s, V = svd(A, B)
    assert torch.allclose(U * s[:, None] @ V.mT, A.double() @ B.double().mT)
    assert torch.allclose(s, singular_values(A, B, exact=True))
    assert torch.allclose(U.mT @ U, torch.eye(r).double().expand(3, r, r))
