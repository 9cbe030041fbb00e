"""The GPT against Hugging Face's, SDPA against a plain softmax, decay groups and optimizer steps against the formulas."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import model as model_module
from model import GPT, Attention, decay_groups, head_loss, init_weights, load_gpt, make_optimizers

SHAPE = {"vocab_size": 120, "block_size": 24, "n_layer": 3, "n_head": 4, "n_embd": 32}


def gpt(seed=0, **changes):
    model = GPT(**{**SHAPE, **changes})
    init_weights(model, seed)
    with torch.no_grad():  # biases and norms off their initial values, so that a mix-up shows
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def hugging_face(model):
    """Hugging Face's GPT-2 with our weights: its Conv1D holds matrices transposed."""
    transformers = pytest.importorskip("transformers")
    a = model.args
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=a["vocab_size"], n_positions=a["block_size"], n_embd=a["n_embd"], n_layer=a["n_layer"], n_head=a["n_head"],
        activation_function="gelu", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0)).eval()
    state = {name: p.T if p.ndim == 2 and ".h." in name else p for name, p in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and not missing
    return theirs


def tokens(*shape):
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def test_logits_loss_and_gradients_are_those_of_hugging_face():
    model = gpt(bias=True)
    theirs = hugging_face(model)
    idx = tokens(2, 25)
    x, y = idx[:, :-1], idx[:, 1:].clone()
    y[0, :5] = -1
    logits, none = model(x)
    want = theirs(x).logits
    assert none is None and torch.allclose(logits, want, atol=1e-5)
    none, loss = model(x, y)
    assert none is None
    expected = F.cross_entropy(want.flatten(0, 1), y.flatten(), ignore_index=-1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for name, p in theirs.named_parameters():
        ours = dict(model.named_parameters())[name].grad
        assert torch.allclose(ours.T if p.ndim == 2 and ".h." in name else ours, p.grad, atol=1e-6), name


def test_greedy_generation_is_that_of_hugging_face():
    model = gpt(bias=True).eval()
    idx = tokens(2, 4)
    want = hugging_face(model).generate(idx, max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(idx, 15, temperature=0), want)


def test_generation_samples_what_it_may():
    model = gpt()
    out = model.generate(tokens(50, 30), 3, top_k=5, n_tokens=60)  # longer than block_size: cropped
    assert out.shape == (50, 33) and out[:, 30:].max() < 60
    x, top = model(out[:, -25:-1])[0][:, -1, :60], out[:, -1]
    assert all(top[i] in x[i].topk(5).indices for i in range(50))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_softmax_of_scores_times_values(causal):
    torch.manual_seed(0)
    attention = Attention(n_embd=24, n_head=3, bias=True, dropout=0.0, causal=causal).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    W, b, r = attention.c_attn.weight, attention.c_attn.bias, 8
    want = attention.c_proj.bias.expand(2, 7, 24)
    for h in range(3):
        q, k, v = (x @ W[i * 24 + h * r:i * 24 + (h + 1) * r].T + b[i * 24 + h * r:i * 24 + (h + 1) * r] for i in range(3))
        scores = q @ k.mT / math.sqrt(r)
        if causal:
            scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        want = want + scores.softmax(-1) @ v @ attention.c_proj.weight[:, h * r:(h + 1) * r].T
    assert torch.allclose(attention(x), want, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_is_plain_cross_entropy(dtype):
    torch.manual_seed(0)
    x, w = torch.randn(3000, 16, requires_grad=True), torch.randn(8000, 16, requires_grad=True)  # enough for chunks
    y = torch.randint(-1, 8000, (3000,))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = head_loss(x, w, y)
    assert loss.dtype == torch.float32  # summed there, whatever the logits are
    loss.backward()
    got = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    expected = F.cross_entropy(x @ w.T, y, ignore_index=-1)
    expected.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, theirs in zip(got, (x.grad, w.grad)):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_untied_head_and_state_dict_names():
    tied, untied = gpt(), gpt(tied=False)
    assert tied.transformer.wte.weight is tied.lm_head.weight and untied.transformer.wte.weight is not untied.lm_head.weight
    assert "tied" not in tied.args and untied.args["tied"] is False  # nanoGPT's model_args, where nanoGPT can hold the model
    names = set(tied.state_dict())
    assert names == set(untied.state_dict()) == {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "lm_head.weight",
        "transformer.ln_f.bias", *(f"transformer.h.{i}.{part}.{kind}" for i in range(3) for kind in ("weight", "bias")
                                   for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"))}
    assert not any(name.endswith(".bias") for name in gpt(bias=False).state_dict())


def test_load_gpt_takes_nanogpts_prefixes_and_refuses_the_rest():
    model = gpt()
    state = {f"_orig_mod.{name}": p for name, p in model.state_dict().items()}
    again = load_gpt({"model": state, "model_args": model.args})
    x = tokens(1, 9)
    assert torch.equal(again(x)[0], model(x)[0])
    for bad in ({}, {"model": state}, {"model": {}, "model_args": model.args}, {"model": state, "model_args": {**model.args, "n_layer": 2}},
                {"model": state, "model_args": {**model.args, "surprise": 1}}, {"model": 3, "model_args": model.args}, [],
                {"model": state, "model_args": {**model.args, "n_head": 5}}):
        with pytest.raises(ValueError):
            load_gpt(bad)


def test_init_is_gpt2s_and_a_function_of_the_seed():
    model, other, same = GPT(**{**SHAPE, "n_embd": 128}), GPT(**{**SHAPE, "n_embd": 128}), GPT(**{**SHAPE, "n_embd": 128})
    init_weights(model, 1)
    init_weights(other, 2)
    init_weights(same, 1)
    for (name, p), q, s in zip(model.named_parameters(), other.parameters(), same.parameters()):
        assert torch.equal(p, s), name
        if p.ndim == 2:
            std = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
            assert not torch.equal(p, q) and p.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert torch.equal(p, torch.full_like(p, 0.0 if name.endswith("bias") else 1.0)), name


def test_flops_are_what_torch_counts():
    """torch's FlopCounterMode sees every matrix product, those of attention where it runs as plain ones."""
    from torch.utils.flop_counter import FlopCounterMode
    model, T, B = gpt(bias=False), 24, 2
    x = tokens(B, T)
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        F.cross_entropy(model(x)[0].flatten(0, 1), x.flatten()).backward()
    assert model.flops_per_token(T) * B * T == counter.get_total_flops()

# ------------------------------------------------------------------------------------------- weight decay and optimizers

def test_groups_partition_the_parameters():
    for model in (gpt(), gpt(tied=False), gpt(bias=False)):
        groups = {g["name"]: g for g in decay_groups(model, 1, 2, 3)}
        assert {name: g["weight_decay"] for name, g in groups.items()} == {"attn": 1, "mlp": 2, "embed": 3, "none": 0}
        names = {id(p): name for name, p in model.named_parameters()}
        listed = [names[id(p)] for g in groups.values() for p in g["params"]]
        assert sorted(listed) == sorted(names.values())
        for name in listed:
            group = next(g["name"] for g in groups.values() if any(names[id(p)] == name for p in g["params"]))
            want = "none" if "ln_" in name or name.endswith("bias") else "attn" if ".attn." in name else "mlp" if ".mlp." in name else "embed"
            assert group == want, name


def test_a_matrix_without_a_home_is_refused():
    model = gpt()
    model.adapter = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"adapter\.weight"):
        decay_groups(model, 0, 0, 0)


@pytest.mark.parametrize("wd", [0.0, 0.3])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_one_step_is_the_exact_update(name, wd):
    """The first steps of each group against the update written out in float64."""
    model = gpt()
    lr, beta1, beta2, eps, momentum = 0.01, 0.9, 0.95, 1e-8, 0.8
    groups = decay_groups(model, wd, 2 * wd, 3 * wd)
    (optimizer,) = make_optimizers(groups, name, lr, beta1, beta2, eps, momentum, "cpu")
    want = {p: p.detach().double().clone() for p in model.parameters()}
    m, v = ({p: torch.zeros_like(w) for p, w in want.items()} for _ in range(2))
    for t in (1, 2):
        model(tokens(2, 8), tokens(2, 8).roll(1))[1].backward()
        for g in groups:
            for p in g["params"]:
                gradient, decay = p.grad.double(), g["weight_decay"]
                if name == "adam":
                    gradient = gradient + decay * want[p]  # L2 in the loss
                else:
                    want[p] *= 1 - lr * decay  # decoupled
                if name == "sgd":
                    m[p] = momentum * m[p] + gradient
                    want[p] -= lr * m[p]
                else:
                    m[p] = beta1 * m[p] + (1 - beta1) * gradient
                    v[p] = beta2 * v[p] + (1 - beta2) * gradient**2
                    want[p] -= lr * (m[p] / (1 - beta1**t)) / ((v[p] / (1 - beta2**t)).sqrt() + eps)
        optimizer.step()
        optimizer.zero_grad()
        for p, w in want.items():
            assert torch.allclose(p.double(), w, atol=2e-6), t
            p.data.copy_(w)
            want[p] = p.detach().double().clone()


def test_muon_takes_the_blocks_and_adamw_the_rest():
    model = gpt()
    groups = decay_groups(model, 0.5, 0.25, 0.125)
    muon, adamw = make_optimizers(groups, "muon", 0.01, 0.9, 0.95, 1e-8, 0.9, "cpu")
    assert {g["name"]: g["weight_decay"] for g in muon.param_groups} == {"attn": 0.5, "mlp": 0.25}
    assert {g["name"]: g["weight_decay"] for g in adamw.param_groups} == {"embed": 0.125, "none": 0.0}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(tokens(2, 8), tokens(2, 8))[1].backward()
    muon.step()
    for g in muon.param_groups:
        for p in g["params"]:
            name = next(n for n, q in model.named_parameters() if q is p)
            update = (before[name] * (1 - 0.01 * g["weight_decay"]) - p.detach()) / (0.01 * 0.2 * math.sqrt(max(p.shape)))
            s = torch.linalg.svdvals(update)  # Newton-Schulz leaves the gradient's singular vectors and values near 1
            assert 0.5 < s.max() < 1.35, name
            assert (update * p.grad).sum() > 0
    with pytest.raises(ValueError, match="adamw, adam, sgd or muon"):
        make_optimizers(groups, "lion", 0.01, 0.9, 0.95, 1e-8, 0.9, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_compiled_model_is_the_eager_one(dtype, tolerance):
    """In one graph, under autocast too."""
    model = gpt()
    compiled = torch.compile(model, fullgraph=True)
    x, y = tokens(2, 24), tokens(2, 24).roll(1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = compiled(x, y)[1]
    expected = model(x, y)[1]
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    expected.backward()
    assert (gradient - model.lm_head.weight.grad).norm() < tolerance * gradient.norm()


def test_impossible_shapes():
    for changes in ({"n_embd": 30}, {"n_layer": 0}, {"vocab_size": 0}):
        with pytest.raises(ValueError, match="n_embd"):
            GPT(**{**SHAPE, **changes})
    with pytest.raises(ValueError, match="block_size"):
        gpt()(tokens(1, 25))


def test_group_names_cover_every_matrix_once():
    ends = [end for ends in model_module.GROUP_OF.values() for end in ends]
    assert len(ends) == len(set(ends))
