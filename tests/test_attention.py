"""
Attention as it is built today (rotary positions, grouped queries, QK-norm) against Hugging Face's, and the
decay of W_Q and W_K apart from W_V and P against exact singular values.
"""
import math

import pytest
import torch
from conftest import (
    assert_same_weights,
    load,
    log_lines,
    logged,
    off_initial,
    one_line_exit_2,
    refused,
    script,
    signalled_in_step,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import (
    GPT,
    Attention,
    ViT,
    decay_groups,
    init_weights,
    load_gpt,
    load_vit,
    make_optimizers,
    rotate,
)
from nanorank.errors import UserError
from nanorank.flops import flops_per_token
from nanorank.generate import generate
from nanorank.optim import decay_by_rows, polar_factor, shrink_singular_values
from nanorank.restore import saved_args
from nanorank.watch import attention_ranks
from scripts.saturate_models import attention_weights

SHAPE = {"vocab_size": 120, "block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 32}
MODERN = {"rope": True, "n_kv_head": 2, "qk_norm": True}
EACH = [{name: value} for name, value in MODERN.items()]


def gpt(seed=0, **changes):
    return off_initial(GPT(**{**SHAPE, **changes}), seed)


def tokens(*shape):
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(1))

# ------------------------------------------------------------ against Hugging Face

def separate(attention):
    """The state dict of an Attention under Hugging Face's names."""
    state = {}
    for kind in ("weight", "bias"):
        stacked = getattr(attention.c_attn, kind)
        if stacked is not None:
            for name, part in zip("qkv", stacked.split(attention.rows)):
                state[f"{name}_proj.{kind}"] = part
            state[f"o_proj.{kind}"] = getattr(attention.c_proj, kind)
    if attention.qk_norm:
        state["q_norm.weight"] = attention.q_norm.weight
        state["k_norm.weight"] = attention.k_norm.weight
    return state


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("n_embd, n_head, n_kv_head, bias", [
    (32, 4, 0, False), (32, 4, 2, True), (24, 4, 1, False), (64, 8, 4, False), (10, 1, 1, True),
])
def test_attention_is_that_of_hugging_faces_llama_and_qwen3(family, n_embd, n_head, n_kv_head, bias):
    """Rotary positions and grouped queries, with QK-norm in Qwen 3: outputs and gradients in float64."""
    pytest.importorskip("transformers")
    if family == "llama":
        from transformers import LlamaConfig as Config
        from transformers.models.llama.modeling_llama import LlamaAttention as Theirs
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding as Rotary
    else:
        from transformers import Qwen3Config as Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention as Theirs
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding as Rotary
    torch.manual_seed(0)
    config = Config(hidden_size=n_embd, num_attention_heads=n_head, num_key_value_heads=n_kv_head or n_head,
                    head_dim=n_embd // n_head, attention_bias=bias, rms_norm_eps=1e-6)
    config._attn_implementation = "sdpa"
    ours = Attention(n_embd, n_head, bias, 0.0, causal=True, rope=True, n_kv_head=n_kv_head,
                     qk_norm=family == "qwen3").double()
    for p in ours.parameters():
        nn.init.normal_(p)
    theirs = Theirs(config, 0).double().eval()
    theirs.load_state_dict(separate(ours))

    T = 50
    x = torch.randn(2, T, n_embd, dtype=torch.float64)
    positions = Rotary(config)(x, torch.arange(T)[None])
    want, _ = theirs(x, positions, None)
    got = ours(x)
    assert torch.allclose(got, want, atol=1e-5 * want.abs().max().item())
    want.square().sum().backward()
    got.square().sum().backward()
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters())
    grads = torch.cat([theirs.get_parameter(f"{name}_proj.weight").grad for name in "qkv"])
    assert torch.allclose(ours.c_attn.weight.grad, grads, atol=1e-5 * largest)


def hugging_face(model):
    """Hugging Face's Starcoder2, which has our norms and MLP, with our weights."""
    transformers = pytest.importorskip("transformers")
    a = model.args
    config = transformers.Starcoder2Config(
        vocab_size=a["vocab_size"], hidden_size=a["n_embd"], intermediate_size=4 * a["n_embd"],
        num_hidden_layers=a["n_layer"], num_attention_heads=a["n_head"], hidden_act="gelu",
        num_key_value_heads=a["n_kv_head"] or a["n_head"], max_position_embeddings=a["block_size"],
        bos_token_id=0, eos_token_id=0)
    theirs = transformers.Starcoder2ForCausalLM(config).eval()
    t = model.transformer
    state = {"model.embed_tokens.weight": t.wte.weight, "lm_head.weight": model.lm_head.weight}
    parts = {"model.norm": t.ln_f}
    for i, block in enumerate(t.h):
        layer = f"model.layers.{i}"
        state.update({f"{layer}.self_attn.{name}": p for name, p in separate(block.attn).items()})
        parts[f"{layer}.input_layernorm"] = block.ln_1
        parts[f"{layer}.post_attention_layernorm"] = block.ln_2
        parts[f"{layer}.mlp.c_fc"] = block.mlp.c_fc
        parts[f"{layer}.mlp.c_proj"] = block.mlp.c_proj
    for path, part in parts.items():
        state.update({f"{path}.{name}": p for name, p in part.state_dict().items()})
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("n_kv_head", [0, 1, 2])
def test_a_whole_model_is_hugging_faces_starcoder2(n_kv_head):
    """Logits, and greedy generation, which Hugging Face does with a cache of keys and values."""
    model = gpt(rope=True, n_kv_head=n_kv_head).eval()
    theirs = hugging_face(model)
    assert torch.allclose(model(tokens(2, 24))[0], theirs(tokens(2, 24)).logits, atol=1e-5)
    idx = tokens(2, 4)
    want = theirs.generate(idx, max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(model, idx, 15, temperature=0), want)


def test_rotated_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    q, k = rotate(q.expand(1, 1, 20, 8)), rotate(k.expand(1, 1, 20, 8))
    scores = (q @ k.mT)[0, 0]
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand(len(diagonal)), atol=1e-5)
    assert torch.allclose(q.norm(dim=-1), q[..., :1, :].norm(dim=-1), atol=1e-6)

# ------------------------------------------------------------ the model around it

@pytest.mark.parametrize("changes", [{}, *EACH, MODERN])
def test_flops_are_what_torch_counts(changes):
    model, T, B = gpt(bias=False, **changes), 24, 2
    x = tokens(B, T)
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        F.cross_entropy(model(x)[0].flatten(0, 1), x.flatten()).backward()
    assert flops_per_token(model, T) * B * T == counter.get_total_flops()


def test_parameters_and_saved_arguments():
    plain, modern = gpt(bias=False), gpt(bias=False, **MODERN)
    theirs, ours = set(plain.state_dict()), set(modern.state_dict())
    gains = {f"transformer.h.{i}.attn.{name}_norm.weight" for i in range(2) for name in "qk"}
    assert theirs - ours == {"transformer.wpe.weight"} and ours - theirs == gains
    assert modern.transformer.h[0].attn.c_attn.weight.shape == (32 + 16 + 16, 32)
    assert saved_args(modern.args).keys() - saved_args(plain.args).keys() == MODERN.keys()
    groups = {g["name"]: g["params"] for g in decay_groups(modern, 1, 2, 3)}
    none = {id(p) for p in groups["none"]}
    assert all(id(modern.get_parameter(name)) in none for name in gains)

    fresh = GPT(**SHAPE, **MODERN)
    init_weights(fresh, 0)
    assert all(torch.equal(fresh.get_parameter(name), torch.ones(8)) for name in gains)


def test_a_checkpoint_opens_as_what_it_was():
    model = gpt(**MODERN)
    again = load_gpt({"model": model.state_dict(), "model_args": saved_args(model.args)})
    assert torch.equal(again(tokens(2, 9))[0], model(tokens(2, 9))[0])
    long = gpt(block_size=2**20, rope=True)  # no learned positions: nothing grows with it
    load_gpt({"model": long.state_dict(), "model_args": long.args})


@pytest.mark.parametrize("changes, words", [
    ({"n_kv_head": 3}, "n_kv_head=3: expects a divisor of n_head=4"),
    ({"n_kv_head": 8}, "n_kv_head=8"),
    ({"n_kv_head": -1}, "n_kv_head=-1"),
    ({"n_kv_head": 2.0}, "n_kv_head=2.0"),
    ({"n_kv_head": "2"}, "n_kv_head=2"),
    ({"n_kv_head": 1}, "size mismatch"),         # the tensors are of another model
    ({"rope": False}, "wpe.weight"),
    ({"qk_norm": False}, "q_norm.weight"),
    ({"rope": "interleaved"}, "rope=interleaved: expects True or False"),
    ({"qk_norm": None}, "qk_norm=None"),
    ({"rope_theta": 5e5}, "rope_theta"),         # not known
])
def test_unknown_arguments_of_a_checkpoint_are_refused(changes, words):
    model = gpt(**MODERN)
    with refused("a.pt", words):
        load_gpt({"model": model.state_dict(), "model_args": {**model.args, **changes}}, path="a.pt")


def test_impossible_heads():
    with pytest.raises(UserError, match="heads of n_embd / n_head = 3 rows must be even"):
        GPT(**{**SHAPE, "n_embd": 12, "rope": True})
    vit = ViT(3, image_size=16, n_layer=1, n_head=2, n_embd=16)
    with refused("ViT", "rope"):
        load_vit({"model": vit.state_dict(), "model_args": {**vit.args, "rope": True}})


def test_ranks_are_those_of_the_rows():
    """Grouped queries: each query head with the key/value head that it reads."""
    model = gpt(n_kv_head=2)
    found = attention_ranks(model)
    W = model.transformer.h[1].attn.c_attn.weight.double()
    ranks = []
    for h in range(4):
        n = h // 2
        W_Q, W_K = W[8 * h:8 * h + 8], W[32 + 8 * n:32 + 8 * n + 8]
        s = torch.linalg.svdvals(W_K.T @ W_Q)
        ranks.append(1 + int((s.cumsum(0) < 0.95 * s.sum()).sum()))
    assert found["layer1_rank95_qk"] == pytest.approx(sum(ranks) / 4)
    assert "attn_gap_qk_stacked" in found and "attn_planes95_qk" not in found
    assert 0 < attention_ranks(gpt(rope=True))["attn_planes95_qk"] <= 4


@pytest.mark.parametrize("changes", [{}, *EACH, MODERN])
def test_attention_weights_of_a_scaled_model_are_those_of_the_model(changes):
    attention = gpt(**changes).double().transformer.h[0].attn
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    qkv = attention.c_attn(x)
    weights = attention_weights(attention, qkv)
    v = qkv.split(attention.rows, dim=-1)[2].view(2, 9, -1, 8).transpose(1, 2)
    y = weights @ v.repeat_interleave(4 // v.shape[1], dim=1)
    assert torch.allclose(attention.c_proj(y.transpose(1, 2).flatten(2)), attention(x), atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_compiled_model_is_the_eager_one(dtype, tolerance):
    model = gpt(**MODERN)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    x, y = tokens(2, 24), tokens(2, 24).roll(1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = compiled(x, y)[1]
    assert loss.item() == pytest.approx(model(x, y)[1].item(), rel=tolerance)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("changes", [*EACH, MODERN])
def test_autocast_is_near_float32(changes):
    model = gpt(**changes)
    x, y = tokens(2, 24), tokens(2, 24).roll(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, y)[1]
    loss.backward()
    assert loss.item() == pytest.approx(model(x, y)[1].item(), rel=2e-2)

# ------------------------------------------------------------ optimizers

def test_muon_takes_grouped_matrices_each_alone():
    model = gpt(bias=False, n_kv_head=1)
    muon, _ = make_optimizers(decay_groups(model, 0.5, 0.25, 0.0), "muon", 0.01, 0.9, 0.95, 1e-8, 0.9, "cpu")
    p = model.transformer.h[0].attn.c_attn.weight
    alone = [nn.Parameter(part.detach().clone()) for part in p.split([32, 8, 8])]
    want = torch.optim.Muon(alone, lr=0.01, weight_decay=0.5, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for part in alone:
            part.grad = torch.randn_like(part)
        for other in model.parameters():
            other.grad = torch.zeros_like(other)
        p.grad = torch.cat([part.grad for part in alone])
        muon.step()
        want.step()
        assert torch.equal(p, torch.cat(alone))


def random_matrix(singular_values, d, seed=0):
    """A matrix (r, d) in float64 with these r singular values."""
    generator = torch.Generator().manual_seed(seed)
    r = len(singular_values)
    U = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64))[0]
    return U * torch.tensor(singular_values, dtype=torch.float64) @ V.T


@pytest.mark.parametrize("shape", [(8, 32), (3, 32, 64), (2, 2, 16, 16), (1, 5)])
def test_the_polar_factor_is_that_of_the_svd(shape):
    torch.manual_seed(0)
    W = torch.randn(*shape, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    assert torch.allclose(polar_factor(W), U @ Vh, atol=1e-10)
    assert torch.allclose(polar_factor(W.float()), (U @ Vh).float(), atol=1e-5)


def test_nuclear_decay_takes_the_same_off_every_singular_value_and_stops_at_zero():
    size = 0.01
    before = [3.0, 1.0, 0.5, 0.1, 0.02, 0.01, 0.003, 0.0]
    W = random_matrix(before, 20)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    shrink_singular_values(W, size)
    after = (U.T @ W @ Vh.T).diagonal()  # of the old singular vectors, signs kept
    s = torch.tensor(before, dtype=torch.float64)
    assert torch.allclose(U * after @ Vh, W, atol=1e-9)               # no other direction moves
    assert torch.allclose(after, s - size * s / (s**2 + size**2).sqrt(), atol=1e-8)
    assert torch.allclose(after[:4], s[:4] - size, rtol=0, atol=size * 0.006)
    assert after.min() > -1e-12

    for _ in range(500):  # as long as it goes on: all but nothing is left, and no sign has turned
        shrink_singular_values(W, size)
        assert (U.T @ W @ Vh.T).diagonal().min() > -1e-12
    assert W.norm() < 1e-2
    shrink_singular_values(W, 0.0)
    zero = torch.zeros(2, 3, 4)
    shrink_singular_values(zero, size)
    assert torch.equal(zero, torch.zeros(2, 3, 4))


def test_a_tiny_nuclear_decay_takes_at_most_its_size():
    """Newton-Schulz does not get to the end then: what is far below the largest falls by less, never more."""
    size = 1e-6
    before = torch.tensor([5.0, 1.0, 0.1, 1e-2, 1e-4, 1e-6, 1e-8], dtype=torch.float64)
    W = random_matrix(before.tolist(), 20)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    after = W.clone()
    shrink_singular_values(after, size)
    fallen = (U.T @ (W - after) @ Vh.T).diagonal() / size
    assert torch.allclose(fallen[:4], torch.ones(4, dtype=torch.float64), atol=1e-3)
    assert fallen.min() >= 0 and fallen.max() < 1 + 1e-6 and (fallen * size <= before).all()


def one_step(name, qk_wd=-1.0, qk_decay="l2", attn_wd=0.5, **changes):
    """The parameters of a GPT after one step with decay 0.5 on attention, {name: tensor}."""
    lr = 0.01
    model = gpt(**changes)
    groups = decay_groups(model, attn_wd, 0.25, 0.125, qk_wd, qk_decay)
    optimizers = make_optimizers(groups, name, lr, 0.9, 0.95, 1e-8, 0.9, "cpu")
    for _ in range(3):
        model(tokens(2, 8), tokens(2, 8).roll(1))[1].backward()
        decay_by_rows(groups, lr, name)
        for opt in optimizers:
            opt.step()
            opt.zero_grad()
    return {key: p.detach() for key, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon"])
@pytest.mark.parametrize("n_kv_head", [0, 1])
def test_decay_by_rows_is_the_optimizers_own_where_all_rates_are_one(name, n_kv_head):
    own = one_step(name, n_kv_head=n_kv_head)
    by_rows = one_step(name, qk_wd=0.5, n_kv_head=n_kv_head)
    for key, p in own.items():
        tolerance = 1e-6 if name != "muon" else 1e-4  # bfloat16 in its Newton-Schulz
        assert torch.allclose(p, by_rows[key], rtol=tolerance, atol=tolerance), key


@pytest.mark.parametrize("qk_decay", ["l2", "nuclear"])
def test_only_the_rows_of_q_and_k_have_the_other_decay(qk_decay):
    """One decay alone, without a gradient: W_Q and W_K by qk_wd, W_V and P by attn_wd, nothing else."""
    model = gpt(n_kv_head=1)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    decay_by_rows(decay_groups(model, 0.5, 9, 9, 2.0, qk_decay), 0.01, "adamw")
    for key, p in model.named_parameters():
        old = before[key]
        if key.endswith("attn.c_proj.weight"):
            assert torch.allclose(p, old * (1 - 0.01 * 0.5), rtol=1e-6)
        elif key.endswith("c_attn.weight"):
            assert torch.allclose(p[40:], old[40:] * (1 - 0.01 * 0.5), rtol=1e-6)
            if qk_decay == "l2":
                assert torch.allclose(p[:40], old[:40] * (1 - 0.01 * 2.0), rtol=1e-6)
                continue
            for head in range(5):  # four of queries, one of keys
                rows = slice(8 * head, 8 * head + 8)
                s_old, s = torch.linalg.svdvals(old[rows].double()), torch.linalg.svdvals(p[rows].double())
                want = s_old - 0.02 * s_old / (s_old**2 + 0.02**2).sqrt()
                assert torch.allclose(s, want, atol=1e-5)
        else:
            assert torch.equal(p, old), key

# ------------------------------------------------------------ runs

RUNS = [{"rope": True}, {"n_kv_head": 1}, {"qk_norm": True},  # TINY has two heads
        {**MODERN, "n_kv_head": 1, "optimizer": "muon"}, {"qk_wd": 0.3}, {"qk_wd": 0.0},
        {"qk_wd": 0.3, "optimizer": "adam"}, {"qk_decay": "nuclear", "qk_wd": 0.5, "qk_norm": True}]


@pytest.mark.slow
@pytest.mark.parametrize("settings", RUNS)
def test_twenty_steps_are_ten_and_ten(train, tmp_path, settings):
    """To the bit, with dropout: weights, optimizer state, log and result."""
    same = {"dropout": 0.1, **settings}
    straight = train(tmp_path / "a", **same)
    with signalled_in_step(10), pytest.raises(SystemExit):
        train(tmp_path / "b", **same)
    resumed = train(tmp_path / "b", **same, init_from="resume")
    assert_same_weights(tmp_path / "a" / "ckpt.pt", tmp_path / "b" / "ckpt.pt")
    a, b = [load(tmp_path / name / "ckpt.pt") for name in "ab"]
    assert str(a["optimizer"]) == str(b["optimizer"])
    timing = ("seconds", "out_dir", "init_from")
    assert {k: x for k, x in straight.items() if k not in timing} == {
        k: x for k, x in resumed.items() if k not in timing}
    assert log_lines(tmp_path / "a") == log_lines(tmp_path / "b")


@pytest.mark.slow
def test_the_decay_that_is_printed_and_counted(train, tmp_path, capsys):
    """attn is W_V and P then; the sums are of lr times each decay, over a run and its resumption."""
    plain = train(tmp_path / "plain")
    assert "W_Q and W_K:" not in capsys.readouterr().out and "decay_time_constants_qk" not in plain
    same = {"qk_wd": 0.25, "attn_wd": 2.0}
    with signalled_in_step(10), pytest.raises(SystemExit):
        train(tmp_path / "l2", **same)
    result = train(tmp_path / "l2", init_from="resume", **same)
    sum_lr = plain["decay_time_constants"]  # attn_wd is 1
    assert result["decay_time_constants"] == pytest.approx(2 * sum_lr)
    assert result["decay_time_constants_qk"] == pytest.approx(sum_lr / 4)
    out = capsys.readouterr().out
    assert f"W_Q and W_K: weight decay 0.25, {sum_lr / 4:.2f} decay time constants" in out
    assert f"weight decay 2, {2 * sum_lr:.2f} decay time constants" in out

    result = train(tmp_path / "nuclear", qk_decay="nuclear", qk_wd=1.0)
    assert result["nuclear_decay_qk"] == pytest.approx(sum_lr) == result["decay_time_constants"]
    assert "decay_time_constants_qk" not in result
    assert f"nuclear decay 1, {sum_lr:.2f} off each singular value" in capsys.readouterr().out
    with refused("qk_wd was 0.25, is 0.5"):
        train(tmp_path / "l2", init_from="resume", **{**same, "qk_wd": 0.5})


@pytest.mark.slow
def test_nuclear_decay_lowers_the_rank_of_qk_and_leaves_ov(train, tmp_path):
    ranks = {}
    for qk_wd in (0.0, 2.0):
        folder = tmp_path / str(qk_wd)
        train(folder, qk_norm=True, qk_decay="nuclear", qk_wd=qk_wd, max_iters=60, attn_wd=0.0)
        ranks[qk_wd] = logged(folder, "attn_rank95_qk")[-1], logged(folder, "attn_rank95_ov")[-1]
    assert ranks[2.0][0] < 0.7 * ranks[0.0][0] and ranks[2.0][1] > 0.8 * ranks[0.0][1]


@pytest.mark.parametrize("settings, words", [
    ({"n_kv_head": 3}, "n_kv_head=3: expects a divisor of n_head=2"),
    ({"n_kv_head": -1}, "--n_kv_head=-1 must not be negative"),
    ({"rope": True, "n_embd": 30}, "must be even"),
    ({"qk_decay": "nuclaer"}, "--qk_decay=nuclaer: expects l2 or nuclear"),
    ({"qk_decay": "nuclear"}, "--qk_decay=nuclear needs --qk_wd"),
    ({"qk_decay": "nuclear", "qk_wd": 1.0, "optimizer": "adam"}, "acts on the weights"),
    ({"qk_wd": -0.5}, "--qk_wd=-0.5 must not be negative"),
    ({"qk_wd": math.inf}, "--qk_wd=inf"),
])
def test_wrong_settings_are_user_errors(train, tmp_path, settings, words):
    with refused(words):
        train(tmp_path / "a", **settings)


@pytest.mark.slow
def test_the_command_lines(tmp_path):
    one_line_exit_2(script("train_vit.py", "--rope", f"--out_dir={tmp_path}"), "rope")
    one_line_exit_2(script("train_lm.py", "--qk_decay=l1", f"--out_dir={tmp_path}"), "--qk_decay=l1")


def test_runs_from_before_these_settings_resume(train, tmp_path):
    train(tmp_path, max_iters=2)
    ckpt = load(tmp_path / "ckpt.pt")
    for name in (*MODERN, "qk_wd", "qk_decay"):
        del ckpt["config"][name]
    torch.save(ckpt, tmp_path / "ckpt.pt")
    with refused("rope was False, is True"):
        train(tmp_path, max_iters=3, init_from="resume", rope=True)
    with refused("qk_wd was -1.0, is 0.5"):
        train(tmp_path, max_iters=3, init_from="resume", qk_wd=0.5)
    assert train(tmp_path, max_iters=3, init_from="resume")["steps"] == 3


@pytest.mark.slow
def test_a_run_keeps_its_attention(train, tmp_path):
    """Resumed or started from weights as another model: refused in one line. Sampled: it writes."""
    train(tmp_path / "a", max_iters=2, rope=True, n_kv_head=1, qk_norm=True)
    with refused("rope was True, is False"):
        train(tmp_path / "a", max_iters=2, init_from="resume", n_kv_head=1, qk_norm=True)
    result = train(tmp_path / "b", max_iters=1, init_from=str(tmp_path / "a"))
    assert (result["rope"], result["n_kv_head"], result["qk_norm"]) == (True, 1, True)
    run = script("-m", "scripts.sample", tmp_path / "a", "--tokenizer=byte", "--max_new_tokens=40")
    assert run.returncode == 0, run.stderr
    run = script("analyze.py", tmp_path / "a" / "ckpt.pt", "--truncate=0.9", f"--save={tmp_path / 'c.pt'}",
                 f"--out_dir={tmp_path / 'out'}")
    one_line_exit_2(run, "--truncate", "rope")
