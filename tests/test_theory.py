"""scripts/theory.py against closed forms, torch's own optimizers, and solvers written here."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import one_line_exit_2, refused, script

from nanorank.factorised import expected, gradient, measured_rate, product, update
from nanorank.spectra import metrics
from scripts import theory, theory_attention

LOSSES = ["recovery", "regression", "completion"]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def run(monkeypatch):
    """run(names, optimizer, depth, noise, **settings): theory.train() with them; without names main()."""
    def train(names=None, optimizer="", depth=2, noise=0.0, **settings):
        for name, value in settings.items():
            assert hasattr(theory, name), name
            monkeypatch.setattr(theory, name, value)
        return theory.train(names, optimizer, depth, noise) if names else theory.main()
    return train


def soft(m, lam):
    return (m - lam).clamp(min=0)

# ----------------------------------------------------------------------------------- gradient flow

@pytest.mark.parametrize("depth", [2, 3])
def test_discrepancy_decays_at_2_lam_under_gradient_flow(run, depth):
    """For three losses and any depth, within 1 %; and it is conserved without decay."""
    t, _, log = run(LOSSES, "flow", depth, lams="0,0.1,0.5,1.2", duration=30.0)
    rate = measured_rate(t, log["discrepancy"])  # (problem, lam, seed)
    for i, lam in enumerate((0.1, 0.5, 1.2)):
        assert (rate[:, i + 1] / (2 * lam) - 1).abs().max() < 0.01
    assert (log["discrepancy"][:, :, 0] / log["discrepancy"][0, :, 0] - 1).abs().max() < 1e-5
    gap = log["sum_sq"] - log["two_nuclear"]
    if depth == 2:  # the gap is a Bures distance, so at most |D|_* <= sqrt(r) |D|_F: it falls as fast
        assert (gap <= math.sqrt(theory.size) * log["discrepancy"] + 1e-12).all()
    assert (gap > -1e-9).all()


def test_flow_is_exact():
    """Balanced diagonal factors stay so, and s = a b obeys ds/dt = 2 s (m - lam - s): a logistic curve."""
    m, s0 = torch.tensor([2.0, 1.0, 0.3]), torch.tensor([0.01, 0.2, 1.0])
    lam, lr, steps = 0.5, 0.1, 100
    A = torch.stack([s0.sqrt().diag()] * 2)

    def dL(A):
        return gradient(A, torch.eye(3), m.diag(), torch.ones(3, 3))

    for step in range(steps):
        A = update("flow", A, dL, lam, lr, {}, step)
    k = m - lam
    want = k / (1 + (k / s0 - 1) * torch.exp(-2 * k * lr * steps))
    assert torch.allclose((A[0] @ A[1]).diagonal(), want, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["flow", "gd", "adam_l2"])
def test_recovery_ends_at_soft_thresholding(run, optimizer):
    """Singular values within 1e-4 and the exact rank."""
    lams = (0.1, 0.5, 0.8, 1.2)
    log = run(["recovery"], optimizer, lams="0.1,0.5,0.8,1.2", flow_lr=0.2)[2]
    m = torch.linalg.svdvals(theory.make_problems(["recovery"])[-1])  # (seed, size)
    for i, lam in enumerate(lams):
        s = log["s"][-1, 0, i]
        assert (s - soft(m, lam)).abs().max() < 1e-4
        assert ((s > 1e-4).sum(-1) == (m > lam).sum(-1)).all()


def test_gradient_descent_decays_as_1_minus_eta_lam_squared(run):
    t, _, log = run(LOSSES, "gd", lams="0.1,0.5", duration=30.0)
    rate = measured_rate(t, log["discrepancy"])
    for i, lam in enumerate((0.1, 0.5)):
        want = -2 * math.log(1 - theory.gd_lr * lam) / theory.gd_lr
        assert (rate[:, i] / want - 1).abs().max() < 0.02


@pytest.mark.parametrize("name", ["regression", "completion"])
def test_optimum_is_the_nuclear_norms(run, name):
    """Where there is no formula: min L(W) + lam |W|_* by an independent proximal gradient, to 1e-5, and its
    spectrum to 1e-4 (completion: at lam 0.2; elsewhere the minimum is flat)."""
    lams = (0.1, 0.2, 0.5)
    log = run([name], "flow", lams="0.1,0.2,0.5", flow_lr=0.3, duration=600.0)[2]
    X, Y, mask, rest, _ = theory.make_problems([name])
    step = 1 / float(torch.linalg.svdvals(X).max() ** 2)
    for i, lam in enumerate(lams):
        W = torch.zeros_like(Y)
        for _ in range(2000):
            U, s, V = torch.linalg.svd(W - step * X.mT @ (mask * (X @ W - Y)))
            W = U * soft(s, step * lam)[..., None, :] @ V
        s = torch.linalg.svdvals(W)[0, 0]
        want = (mask * (X @ W - Y)).square().sum((-2, -1))[0, 0] / 2 + rest[0, 0] + lam * s.sum(-1)
        assert (log["loss"][-1, 0, i] + lam / 2 * log["sum_sq"][-1, 0, i] - want).abs().max() < 1e-5
        assert name == "completion" and lam != 0.2 or (log["s"][-1, 0, i] - s).abs().max() < 1e-4


def test_depth_3_ends_at_minima_of_the_schatten_problem(run):
    """Each singular value minimises (s - m)^2 / 2 + lam 3/2 s^(2/3): globally at weak decay, else locally."""
    lams = (0.05, 0.1, 0.5, 1.2)
    log = run(["recovery"], "flow", 3, lams="0.05,0.1,0.5,1.2", duration=150.0)[2]
    m = torch.linalg.svdvals(theory.make_problems(["recovery"])[-1])
    grid = np.linspace(0, 2.2, 220_001)
    for i, lam in enumerate(lams):
        for s, target in zip(log["s"][-1, 0, i].flatten().tolist(), m.flatten().tolist()):
            f = (grid - target) ** 2 / 2 + 1.5 * lam * grid ** (2 / 3)
            local = [0.0, *grid[1:-1][(f[1:-1] < f[:-2]) & (f[1:-1] < f[2:])]]
            assert min(abs(s - x) for x in local) < 1e-3
            if lam <= 0.1:
                assert abs(s - (grid[f.argmin()] if target > 1e-9 else 0)) < 1e-3

# ------------------------------------------------------------------------------------ inequalities

def test_half_the_squares_bound_the_nuclear_norm_and_meet_it_when_balanced():
    """On 4000 pairs of factors; equality after balancing A and B; the gap is at most |A^T A - B^T B|_*."""
    g = torch.Generator().manual_seed(0)
    for d, r in ((12, 4), (5, 8)):
        A = torch.randn(2000, d, r, generator=g)
        B = torch.randn(2000, d, r, generator=g) * torch.rand(2000, 1, r, generator=g)
        table = {name: torch.tensor(x) for name, x in metrics(A, B).items()}
        D = torch.linalg.svdvals(A.mT @ A - B.mT @ B).sum(-1)
        assert (table["half_sq_norm"] >= table["nuclear"] * (1 - 1e-12)).all()
        assert (2 * (table["half_sq_norm"] - table["nuclear"]) <= D * (1 + 1e-9)).all()
        U, s, V = torch.linalg.svd(A @ B.mT)
        k = min(d, r)
        balanced = metrics((U * s.sqrt()[:, None])[..., :k], (V.mT * s.sqrt()[:, None])[..., :k])
        assert torch.tensor(balanced["nuclear"]).allclose(table["nuclear"], rtol=1e-6)
        assert max(balanced["gap"]) < 1e-7 and max(balanced["imbalance"]) < 1e-9

# -------------------------------------------------------------------------------------- optimizers

@pytest.mark.parametrize("name, torchs, options", [
    ("gd", torch.optim.SGD, {}),
    ("momentum", torch.optim.SGD, {"momentum": 0.9}),
    ("adam_l2", torch.optim.Adam, {}),
    ("adamw", torch.optim.AdamW, {}),
])
def test_optimizers_are_torchs(name, torchs, options):
    A = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    M, state = torch.diag(torch.arange(4.0)), {}
    p = A.clone().requires_grad_()
    optimizer = torchs([p], 0.05, weight_decay=0.3, **options)

    def dL(A):
        return gradient(A, torch.eye(4), M, torch.ones(4, 4))

    for step in range(30):
        A = update(name, A, dL, 0.3, 0.05, state, step)
        optimizer.zero_grad()
        ((p[0] @ p[1] - M) ** 2).sum().div(2).backward()
        optimizer.step()
    assert torch.allclose(A, p.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_gradient_is_autograds(depth):
    X, Y, mask, _, _ = theory.make_problems(LOSSES)
    g = torch.Generator().manual_seed(0)
    A = torch.randn(depth, 3, 4, theory.seeds, 10, 10, generator=g).requires_grad_()
    (mask * (X @ product(A) - Y)).square().sum().div(2).backward()
    assert torch.allclose(gradient(A.detach(), X, Y, mask), A.grad, rtol=1e-10)


def test_adamw_feels_decay_only_under_noise(run):
    """Exact gradients: M itself. Noise of sd 1: about soft thresholding by lam sqrt(|W|_* / size)."""
    m = torch.linalg.svdvals(theory.make_problems(["recovery"])[-1])[0]
    for noise, tolerance in ((0.0, 0.02), (1.0, 0.2)):
        s = run(["recovery"], "adamw", 2, noise, lams="1.2", seeds=1)[2]["s"][-1, 0, 0, 0]
        assert (s - expected("adamw", m, 1.2, 2, noise)).abs().max() < tolerance
    assert (expected("adamw", m, 1.2, 2, 0.0) == m).all() and s[0] < m[0] - 0.5

# -------------------------------------------------------------------------------------- the script

def test_the_script_writes_what_the_contract_names(tmp_path):
    short = ["--duration=3", "--adam_duration=0.3", "--seeds=1", "--points=8", "--size=4", "--rank=2"]
    result = script("-m", "scripts.theory", f"--out_dir={tmp_path}", "--lams=0,0.3,1", *short)
    assert result.returncode == 0, result.stderr
    curves, spectra = pd.read_csv(tmp_path / "curves.csv"), pd.read_csv(tmp_path / "spectra.csv")
    key = ["problem", "optimizer", "depth", "lam", "seed", "step"]
    assert list(curves)[:12] == [*key, "t", "loss", "sum_sq", "two_nuclear", "discrepancy", "rank95"]
    assert list(spectra)[:9] == [*key, "i", "s", "s_target"]
    assert set(curves.problem) == set(LOSSES) and set(curves.optimizer) == set(theory.OPTIMIZERS)
    last = curves.query("optimizer == 'flow' and depth == 2").iloc[-1]
    assert last.t == pytest.approx(3) and last.step == 30
    assert (tmp_path / "factorised_models.png").exists() and (tmp_path / "factorised_models.pdf").exists()


def test_scalars_end_where_expected(run, tmp_path):
    """Adam with L2: ridge for a free w, lasso for w = a b. AdamW with exact gradients: nearer to no decay."""
    run(problem="scalars", out_dir=str(tmp_path), adam_duration=10.0, adam_lr=0.02, scalar_lams="0.1,0.6")
    exact = pd.read_csv(tmp_path / "scalars.csv").query("grad_noise == 0")
    last = exact.groupby(["form", "optimizer", "lam"])[["w1", "w2"]].last()
    H, best = np.array([[1, 0.6], [0.6, 1]]), np.array([1, 0.3])
    for (form, optimizer, lam), w in zip(last.index, last.to_numpy()):
        decayed = np.linalg.solve(H + lam * np.eye(2), H @ best)
        if form == "factorised":
            decayed = best - lam * np.linalg.solve(H, np.ones(2))
            if decayed[1] <= 0:
                decayed = np.array([(H @ best)[0] - lam, 0])
        if optimizer == "adam_l2":
            assert np.abs(w - decayed).max() < 1e-3
        else:
            assert np.abs(w - best).max() < np.abs(decayed - best).max() / 3
    assert len(last) == 8 and (tmp_path / "two_parameters.png").exists()


def test_a_transformer_is_balanced_at_2_lam_under_gradient_descent(run, tmp_path):
    """All four optimizers run, and of gradient descent every layer and product is where it should be."""
    run(problem="attention", out_dir=str(tmp_path), attention_lams="0.02", attention_steps=40, points=5)
    table = pd.read_csv(tmp_path / "attention.csv")
    assert set(table["optimizer"]) == set(theory_attention.LR) and set(table["product"]) == {"qk", "ov"}
    last = table[(table["optimizer"] == "gd") & (table["step"] == 40)]
    assert len(last) == 4 and last["t"].iloc[0] == pytest.approx(40 * theory_attention.LR["gd"])
    assert (last["discrepancy"] / last["predicted"] - 1).abs().max() < 0.03
    assert last["predicted"].max() < 0.7 * table["discrepancy"].max()
    assert (tmp_path / "attention_balance.png").exists()


@pytest.mark.parametrize("name, value, words", [
    ("attention_steps", 0, ["--attention_steps=0"]),
    ("problem", "sorting", ["--problem=sorting", "recovery"]),
    ("runs", "flow:1", ["'flow:1'"]),
    ("runs", "lion:2", ["'lion:2'", "adamw"]),
    ("lams", "some", ["--lams=some"]),
    ("lams", "-1", ["--lams=-1"]),
    ("gd_lr", 3.0, ["gd diverged", "step size"]),
    ("rank", 11, ["--rank=11"]),
    ("seeds", 0, ["--seeds=0"]),
    ("flow_lr", 0.0, ["--flow_lr=0.0"]),
    ("samples", 3, ["--samples=3"]),
    ("beta", 1.0, ["--beta=1.0"]),
])
def test_wrong_settings_are_refused(run, tmp_path, name, value, words):
    with refused(*words):
        run(**{"out_dir": str(tmp_path), "runs": "gd:2", name: value})


def test_the_command_line_itself():
    one_line_exit_2(script("-m", "scripts.theory", "--lam=1"), "did you mean lams")
