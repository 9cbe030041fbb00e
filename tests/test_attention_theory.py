"""Which product L2 regularises in an attention layer: rates and smallest norms, in float64 with autograd.

Gradient descent on |attention(x) - y|^2 / 2 + (lam / 2) |W|^2, with a real softmax. A balance D that follows
the theory (docs/theory.md) shrinks by (1 - lr lam)^2 a step, up to terms of order lr^2.
"""
import math

import pytest
import torch

from model import GPT, decay_groups, init_weights
from nanorank.tasks import TaskSplit

LAM = 0.5
LR = 1e-3
STEPS = 1000
D_MODEL, R, T = 8, 4, 6


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

# ------------------------------------------------------------------------------------ one attention layer

def attention(x, W, rope=0, qk_norm=""):
    """Causal attention, x (B, T, d) -> (B, T, d). W: Q (H, r, d), K and V (n, r, d), P (H, d, r).

    rope: how many rows of each head turn, row j with row j + rope / 2. qk_norm: "head" or "layer".
    """
    q, k, v = [x[:, None] @ W[name].mT for name in "QKV"]  # (B, H or n, T, r)
    if qk_norm:
        over = -1 if qk_norm == "head" else (1, 3)
        q = W["q_gain"] * q / q.square().mean(over, keepdim=True).sqrt()
        k = W["k_gain"] * k / k.square().mean(over, keepdim=True).sqrt()
    if rope:
        q, k = turn(q, rope), turn(k, rope)
    shared = len(W["Q"]) // len(W["K"])
    k, v = [z.repeat_interleave(shared, 1) for z in (k, v)]
    future = torch.ones(T, T).triu(1).bool()
    scores = (q @ k.mT / R**0.5).masked_fill(future, -math.inf)
    return (scores.softmax(-1) @ v @ W["P"].mT).sum(1)


def turn(z, rope):
    """Rotary positions: z (B, H, T, r), whose first `rope` rows are rope / 2 planes."""
    angle = torch.arange(T)[:, None] * 10.0 ** -torch.arange(rope // 2)
    a, b, rest = z.split([rope // 2, rope // 2, z.shape[-1] - rope], -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), rest], -1)


def make_layer(n_head=2, n_kv_head=2, qk_norm=""):
    g = torch.Generator().manual_seed(0)
    size = 0.3 if qk_norm else 0.7  # under QK-norm gradients are proportional to 1 / size
    W = {
        "Q": size * torch.randn(n_head, R, D_MODEL, generator=g),
        "K": size * torch.randn(n_kv_head, R, D_MODEL, generator=g),
        "V": 0.7 * torch.randn(n_kv_head, R, D_MODEL, generator=g),
        "P": 0.7 * torch.randn(n_head, D_MODEL, R, generator=g),
    }
    if qk_norm:
        W["q_gain"], W["k_gain"] = 1 + 0.3 * torch.randn(2, R, generator=g)
    return W


def train(W, **kind):
    """The layer after STEPS of gradient descent with L2 on its matrices; gains have none."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 8, T, D_MODEL, generator=g)
    W = {name: p.clone().requires_grad_() for name, p in W.items()}
    for _ in range(STEPS):
        loss = (attention(x, W, **kind) - y).square().sum((1, 2)).mean() / 2
        for p, grad in zip(W.values(), torch.autograd.grad(loss, list(W.values()))):
            lam = LAM if p.ndim == 3 else 0.0
            p.data -= LR * (grad + lam * p.data)
    return {name: p.detach() for name, p in W.items()}

# ---------------------------------------------------------------------------------------------- balances

def gram(A):
    return A @ A.mT


def stacked(W):
    """One balance a key/value head, the plain one where queries are not grouped: {product: (n, r, r)}."""
    n = len(W["K"])
    QQ = gram(W["Q"]).unflatten(0, (n, -1)).sum(1)
    PP = gram(W["P"].mT).unflatten(0, (n, -1)).sum(1)
    return {"qk": gram(W["K"]) - QQ, "ov": PP - gram(W["V"])}


def per_head(W):
    """The plain balances of every query head with the key/value head that it shares: {product: (H, r, r)}."""
    n = len(W["K"])
    QQ = gram(W["Q"]).unflatten(0, (n, -1))
    PP = gram(W["P"].mT).unflatten(0, (n, -1))
    K, V = gram(W["K"])[:, None], gram(W["V"])[:, None]
    return {"qk": (K - QQ).flatten(0, 1), "ov": (PP - V).flatten(0, 1)}


def plane_norms(W, rope):
    """|a_j|^2 and |b_j|^2 of every plane, b over all queries that share the key: two of (n, rope / 2)."""
    def of(A):
        return A[:, :rope].square().sum(-1).unflatten(1, (2, -1)).sum(1)

    return of(W["K"]), of(W["Q"]).unflatten(0, (len(W["K"]), -1)).sum(1)


def error(before, after):
    """|after - c before| / |c before| of matrices (n, r, r), one for each, else of numbers.

    c = (1 - LR LAM)^(2 STEPS) is 1 / e, so an error of 1 % in D is one of 1 % in its rate.
    """
    want = before * (1 - LR * LAM) ** (2 * STEPS)
    if before.ndim == 3:
        return torch.linalg.matrix_norm(after - want) / torch.linalg.matrix_norm(want)
    return (after / want - 1).abs()


def follows(before, after):
    return bool((error(before, after) < 0.01).all())


def departs(before, after):
    return bool((error(before, after) > 0.03).all())


@pytest.mark.slow
@pytest.mark.parametrize("n_kv_head", [2, 1])
def test_plain_and_grouped_balances_decay_at_2_lam(n_kv_head):
    """Stacked over the queries that share a head; the plain ones of a single query head do not."""
    W = make_layer(2, n_kv_head)
    after = train(W)
    for product, D in stacked(W).items():
        assert follows(D, stacked(after)[product])
        if n_kv_head == 1:
            assert departs(per_head(W)[product], per_head(after)[product])


@pytest.mark.slow
@pytest.mark.parametrize("rope", [R, R // 2])
@pytest.mark.parametrize("n_kv_head", [2, 1])
def test_rotary_planes_decay_at_2_lam_and_nothing_else_does(n_kv_head, rope):
    """Whole and partial: the rows that do not turn keep their matrix, the rows that do only their planes."""
    W = make_layer(2, n_kv_head)
    after = train(W, rope=rope)
    a, b = plane_norms(W, rope)
    a_after, b_after = plane_norms(after, rope)
    assert follows(a - b, a_after - b_after)

    D, D_after = stacked(W)["qk"], stacked(after)["qk"]
    assert departs(D, D_after)
    assert departs(D[:, :rope, :rope], D_after[:, :rope, :rope])
    if rope < R:
        assert follows(D[:, rope:, rope:], D_after[:, rope:, rope:])
    assert follows(stacked(W)["ov"], stacked(after)["ov"])


@pytest.mark.slow
@pytest.mark.parametrize("qk_norm, over", [("head", (1, 2)), ("layer", (0, 1, 2))])
@pytest.mark.parametrize("n_kv_head, rope", [(2, 0), (1, R)])
def test_under_qk_norm_the_squared_norms_decay_at_2_lam(n_kv_head, rope, qk_norm, over):
    """Each head's where a head is normed, the layer's where all heads are at once; OV is as before."""
    W = make_layer(2, n_kv_head, qk_norm)
    after = train(W, rope=rope, qk_norm=qk_norm)
    for name in "QK":
        assert follows(W[name].square().sum(over), after[name].square().sum(over))
    if qk_norm == "layer":  # the heads' own norms are off by several times the layer's
        whole = error(W["Q"].square().sum(), after["Q"].square().sum())
        assert error(W["Q"].square().sum((1, 2)), after["Q"].square().sum((1, 2))).min() > 5 * whole
    assert departs(stacked(W)["qk"], stacked(after)["qk"])
    assert follows(stacked(W)["ov"], stacked(after)["ov"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"n_kv_head": 1}, {"rope": True}, {"qk_norm": True}])
def test_the_gpt_of_model_py_keeps_the_same_balances(kind):
    """On associative recall, by torch's SGD with weight_decay."""
    model = GPT(32, 16, n_layer=1, n_head=2, n_embd=16, bias=False, tied=False, mlp=False, **kind)
    init_weights(model, 0)
    n = kind.get("n_kv_head", 2)
    attn = model.transformer.h[0].attn
    attn.c_attn.weight.data *= 15  # about 1 / sqrt(16)

    def heads():
        q, k, v = attn.c_attn.weight.detach().clone().split([16, 8 * n, 8 * n])
        P = attn.c_proj.weight.detach().clone().unflatten(1, (2, 8)).transpose(0, 1)
        return {"Q": q.view(2, 8, 16), "K": k.view(n, 8, 16), "V": v.view(n, 8, 16), "P": P}

    before = heads()
    optimizer = torch.optim.SGD(decay_groups(model, attn_wd=LAM, mlp_wd=0.0, embed_wd=0.0), LR)
    x, y = [torch.from_numpy(z) for z in TaskSplit("recall", "train", 16).sample(0, 0, 16)]
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x, y)[1].backward()
        optimizer.step()
    after = heads()

    assert follows(stacked(before)["ov"], stacked(after)["ov"])
    if "rope" in kind:
        a, b = plane_norms(before, 8)
        a_after, b_after = plane_norms(after, 8)
        assert follows(a - b, a_after - b_after)
    elif "qk_norm" in kind:
        for name in "QK":
            assert follows(before[name].square().sum((1, 2)), after[name].square().sum((1, 2)))
    else:
        assert follows(stacked(before)["qk"], stacked(after)["qk"])

# ----------------------------------------------------------------------- the smallest norm of a function

def any_matrix(theta):
    """Any G near the identity: theta (n, r, r)."""
    return torch.eye(theta.shape[-1]) + theta


def a_complex_number_per_plane(theta):
    """G that commutes with the rotations of rows j and j + rope / 2: theta (n, 2, rope / 2), 0 for G = 1."""
    x, y = (1 + theta[:, 0]).diag_embed(), theta[:, 1].diag_embed()
    return torch.cat([torch.cat([x, -y], 2), torch.cat([y, x], 2)], 1)


def transformed(W, G, product):
    """The same function by other factors: W_Q -> G W_Q, W_K -> G^-T W_K; or W_V -> G W_V, P -> P G^-1."""
    shared = len(W["Q"]) // len(W["K"])
    inverse = torch.linalg.inv(G)
    if product == "qk":
        return {**W, "Q": G.repeat_interleave(shared, 0) @ W["Q"], "K": inverse.mT @ W["K"]}
    return {**W, "V": G @ W["V"], "P": W["P"] @ inverse.repeat_interleave(shared, 0)}


def half_sq_norm(W, product):
    names = {"qk": "QK", "ov": "VP"}[product]
    return sum(W[name].square().sum() for name in names) / 2


def minimised(value, *thetas):
    """The smallest value(*thetas), and where it is."""
    thetas = [theta.requires_grad_() for theta in thetas]
    optimizer = torch.optim.LBFGS(thetas, max_iter=2000, tolerance_grad=1e-11, tolerance_change=1e-15,
                                  history_size=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = value(*thetas)
        loss.backward()
        return loss

    optimizer.step(closure)
    return value(*thetas).item(), [theta.detach() for theta in thetas]


def stacked_nuclear(W, product, rows=slice(None)):
    """Sum over key/value heads of |W_K^T [W_Q,1 ... W_Q,g]|_* or |[P_1; ...; P_g] W_V|_*."""
    n = len(W["K"])
    queries = W["Q"].unflatten(0, (n, -1))
    outputs = W["P"].unflatten(0, (n, -1))
    total = 0.0
    for i in range(n):
        if product == "qk":
            M = W["K"][i][rows].mT @ torch.cat(list(queries[i]), 1)[rows]  # (d, g d)
        else:
            M = torch.cat(list(outputs[i])) @ W["V"][i]                    # (g d, d)
        total += torch.linalg.svdvals(M).sum().item()
    return total


def outputs(W, **kind):
    x = torch.randn(3, T, D_MODEL, generator=torch.Generator().manual_seed(2))
    return attention(x, W, **kind)


@pytest.mark.parametrize("product", ["qk", "ov"])
@pytest.mark.parametrize("n_head, n_kv_head", [(2, 2), (4, 2)])
def test_smallest_norm_of_a_plain_or_grouped_layer_is_the_stacked_nuclear_norm(n_head, n_kv_head, product):
    W = make_layer(n_head, n_kv_head)
    smallest, (theta,) = minimised(
        lambda theta: half_sq_norm(transformed(W, any_matrix(theta), product), product),
        torch.zeros(n_kv_head, R, R))
    balanced = transformed(W, any_matrix(theta), product)
    assert smallest == pytest.approx(stacked_nuclear(W, product), abs=1e-6)
    assert torch.allclose(outputs(balanced), outputs(W), atol=1e-9)
    assert stacked(balanced)[product].abs().max() < 1e-3
    if n_head > n_kv_head:  # less than the query heads' own nuclear norms together
        own = {**W, "K": W["K"].repeat_interleave(2, 0), "V": W["V"].repeat_interleave(2, 0)}
        assert smallest < 0.95 * stacked_nuclear(own, product)


@pytest.mark.parametrize("rope", [R, R // 2])
@pytest.mark.parametrize("n_head", [2, 4])
def test_smallest_norm_of_a_rotary_layer_is_a_group_lasso_over_planes(n_head, rope):
    """sum_j |a_j| |b_j|, and the stacked nuclear norm of the rows that do not turn."""
    W = make_layer(n_head, 2)

    def G(theta, rest):
        blocks = zip(a_complex_number_per_plane(theta), any_matrix(rest))
        return torch.stack([torch.block_diag(*pair) for pair in blocks])

    smallest, thetas = minimised(lambda *thetas: half_sq_norm(transformed(W, G(*thetas), "qk"), "qk"),
                                 torch.zeros(2, 2, rope // 2), torch.zeros(2, R - rope, R - rope))
    a, b = plane_norms(W, rope)
    lasso = (a * b).sqrt().sum().item()
    if rope < R:
        lasso += stacked_nuclear(W, "qk", slice(rope, None))
    assert smallest == pytest.approx(lasso, abs=1e-6)
    assert lasso > stacked_nuclear(W, "qk") + 0.1
    balanced = transformed(W, G(*thetas), "qk")
    assert torch.allclose(outputs(balanced, rope=rope), outputs(W, rope=rope), atol=1e-9)


def test_a_matrix_that_balances_a_plain_layer_changes_a_rotary_one():
    W = make_layer()
    _, (theta,) = minimised(lambda theta: half_sq_norm(transformed(W, any_matrix(theta), "qk"), "qk"),
                            torch.zeros(2, R, R))
    balanced = transformed(W, any_matrix(theta), "qk")
    assert torch.allclose(outputs(balanced), outputs(W), atol=1e-9)
    assert (outputs(balanced, rope=R) - outputs(W, rope=R)).abs().max() > 0.1


def test_smallest_norm_under_qk_norm_is_0():
    W = make_layer(4, 2, "head")

    def scaled(log_q, log_k):
        return {**W, "Q": log_q.exp()[:, None, None] * W["Q"], "K": log_k.exp()[:, None, None] * W["K"]}

    smallest, logs = minimised(lambda *logs: half_sq_norm(scaled(*logs), "qk"),
                               torch.zeros(4), torch.zeros(2))
    assert 0 < smallest < 1e-6
    assert torch.allclose(outputs(scaled(*logs), rope=R, qk_norm="head"), outputs(W, rope=R, qk_norm="head"),
                          atol=1e-9)
