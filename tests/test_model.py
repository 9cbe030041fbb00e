"""
The GPT against Hugging Face's, SDPA against a plain softmax, decay groups and optimizer steps
against the formulas.
"""
import math

import pytest
import torch
from conftest import off_initial
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GROUP_OF, Attention, decay_groups, init_weights, load_gpt, make_optimizers
from nanorank.errors import UserError
from nanorank.flops import flops_per_token
from nanorank.generate import generate
from nanorank.loss import head_loss
from nanorank.restore import saved_args

SHAPE = {"vocab_size": 120, "block_size": 24, "n_layer": 3, "n_head": 4, "n_embd": 32}


def gpt(seed=0, **changes):
    return off_initial(GPT(**{**SHAPE, **changes}), seed)


def transposed(name, p):
    """Hugging Face's Conv1D holds the blocks' matrices transposed."""
    return p.T if p.ndim == 2 and ".h." in name else p


def hugging_face(model):
    """Hugging Face's GPT-2 with our weights."""
    transformers = pytest.importorskip("transformers")
    a = model.args
    config = transformers.GPT2Config(
        vocab_size=a["vocab_size"], n_positions=a["block_size"], n_embd=a["n_embd"], n_layer=a["n_layer"],
        n_head=a["n_head"], activation_function="gelu", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    state = {name: transposed(name, p) for name, p in model.state_dict().items()}
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
    ours = dict(model.named_parameters())
    for name, p in theirs.named_parameters():
        assert torch.allclose(transposed(name, ours[name].grad), p.grad, atol=1e-6), name


def test_greedy_generation_is_that_of_hugging_face():
    model = gpt(bias=True).eval()
    idx = tokens(2, 4)
    want = hugging_face(model).generate(idx, max_new_tokens=15, do_sample=False, eos_token_id=None,
                                        pad_token_id=0)
    assert torch.equal(generate(model, idx, 15, temperature=0), want)


def test_generation_samples_what_it_may():
    model = gpt()
    out = generate(model, tokens(50, 30), 3, top_k=5, n_tokens=60)  # longer than block_size: cropped
    assert out.shape == (50, 33) and out[:, 30:].max() < 60
    logits, last = model(out[:, -25:-1])[0][:, -1, :60], out[:, -1]
    assert all(last[i] in logits[i].topk(5).indices for i in range(50))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_softmax_of_scores_times_values(causal):
    torch.manual_seed(0)
    n_embd, n_head, T = 24, 3, 7
    r = n_embd // n_head
    attention = Attention(n_embd, n_head, bias=True, dropout=0.0, causal=causal).double()
    x = torch.randn(2, T, n_embd, dtype=torch.float64)
    W, b = attention.c_attn.weight, attention.c_attn.bias
    want = attention.c_proj.bias.expand(2, T, n_embd)
    for h in range(n_head):
        head = slice(h * r, (h + 1) * r)
        q, k, v = [x @ W_i[head].T + b_i[head] for W_i, b_i in zip(W.chunk(3), b.chunk(3))]
        scores = q @ k.mT / math.sqrt(r)
        if causal:
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        want = want + scores.softmax(-1) @ v @ attention.c_proj.weight[:, head].T
    assert torch.allclose(attention(x), want, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_is_plain_cross_entropy(dtype):
    torch.manual_seed(0)
    x = torch.randn(3000, 16, requires_grad=True)
    w = torch.randn(8000, 16, requires_grad=True)  # enough for chunks
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
    assert tied.transformer.wte.weight is tied.lm_head.weight
    assert untied.transformer.wte.weight is not untied.lm_head.weight
    want = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    for kind in ("weight", "bias"):
        want.add(f"transformer.ln_f.{kind}")
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            want.update(f"transformer.h.{i}.{part}.{kind}" for i in range(3))
    assert set(tied.state_dict()) == set(untied.state_dict()) == want
    assert not any(name.endswith(".bias") for name in gpt(bias=False).state_dict())


def test_saved_arguments_are_nanogpts_where_the_model_is():
    nanogpts = {*SHAPE, "dropout", "bias"}
    others = {"tied": False, "mlp": False, "post_norm": True, "rope": True, "n_kv_head": 2, "qk_norm": True}
    assert gpt().args.keys() == {*nanogpts, *others}
    assert saved_args(gpt().args).keys() == nanogpts
    for name, value in others.items():
        args = saved_args(gpt(**{name: value}).args)
        assert args.keys() == {*nanogpts, name} and args[name] is value


def test_load_gpt_takes_nanogpts_prefixes_and_refuses_the_rest():
    model = gpt()
    state = {f"_orig_mod.{name}": p for name, p in model.state_dict().items()}
    again = load_gpt({"model": state, "model_args": model.args})
    x = tokens(1, 9)
    assert torch.equal(again(x)[0], model(x)[0])
    for bad in (
        [],
        {},
        {"model": state},
        {"model": {}, "model_args": model.args},
        {"model": 3, "model_args": model.args},
        {"model": state, "model_args": {**model.args, "n_layer": 2}},
        {"model": state, "model_args": {**model.args, "n_head": 5}},
        {"model": state, "model_args": {**model.args, "surprise": 1}},
    ):
        with pytest.raises(UserError):
            load_gpt(bad)


def test_init_is_gpt2s_and_a_function_of_the_seed():
    model, other, same = [GPT(**{**SHAPE, "n_embd": 128}) for _ in range(3)]
    init_weights(model, 1)
    init_weights(other, 2)
    init_weights(same, 1)
    for (name, p), q, s in zip(model.named_parameters(), other.parameters(), same.parameters()):
        assert torch.equal(p, s), name
        if p.ndim == 2:
            std = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
            assert not torch.equal(p, q) and p.std().item() == pytest.approx(std, rel=0.05), name
        else:
            value = 0.0 if name.endswith("bias") else 1.0
            assert torch.equal(p, torch.full_like(p, value)), name


def test_flops_are_what_torch_counts():
    """torch's FlopCounterMode sees every matrix product, those of attention where it runs as plain ones."""
    model, T, B = gpt(bias=False), 24, 2
    x = tokens(B, T)
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        F.cross_entropy(model(x)[0].flatten(0, 1), x.flatten()).backward()
    assert flops_per_token(model, T) * B * T == counter.get_total_flops()

# -------------------------------------------------- weight decay and optimizers

def group_of(name):
    """The decay group that a parameter of this name must be in."""
    if "ln_" in name or name.endswith("bias"):
        return "none"
    if ".attn." in name:
        return "attn"
    return "mlp" if ".mlp." in name else "embed"


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"bias": False}])
def test_groups_partition_the_parameters(changes):
    model = gpt(**changes)
    groups = decay_groups(model, 1, 2, 3)
    assert {g["name"]: g["weight_decay"] for g in groups} == {"attn": 1, "mlp": 2, "embed": 3, "none": 0}
    names = {id(p): name for name, p in model.named_parameters()}
    placed = [(names[id(p)], g["name"]) for g in groups for p in g["params"]]
    assert sorted(placed) == sorted((name, group_of(name)) for name in names.values())


def test_group_names_cover_every_matrix_once():
    ends = [end for ends in GROUP_OF.values() for end in ends]
    assert len(ends) == len(set(ends))


def test_a_matrix_without_a_home_is_refused():
    model = gpt()
    model.adapter = nn.Linear(3, 3)
    with pytest.raises(UserError, match=r"adapter\.weight"):
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
    m = {p: torch.zeros_like(w) for p, w in want.items()}
    v = {p: torch.zeros_like(w) for p, w in want.items()}
    for t in (1, 2):
        model(tokens(2, 8), tokens(2, 8).roll(1))[1].backward()
        for g in groups:
            for p in g["params"]:
                grad, decay = p.grad.double(), g["weight_decay"]
                if name == "adam":
                    grad = grad + decay * want[p]  # L2 in the loss
                else:
                    want[p] *= 1 - lr * decay  # decoupled
                if name == "sgd":
                    m[p] = momentum * m[p] + grad
                    want[p] -= lr * m[p]
                else:
                    m[p] = beta1 * m[p] + (1 - beta1) * grad
                    v[p] = beta2 * v[p] + (1 - beta2) * grad**2
                    want[p] -= lr * (m[p] / (1 - beta1**t)) / ((v[p] / (1 - beta2**t)).sqrt() + eps)
        optimizer.step()
        optimizer.zero_grad()
        for p, w in want.items():
            assert torch.allclose(p.double(), w, atol=2e-6), t
            p.data.copy_(w)
            want[p] = p.detach().double().clone()


def test_muon_takes_the_blocks_and_adamw_the_rest():
    model = gpt()
    lr = 0.01
    groups = decay_groups(model, 0.5, 0.25, 0.125)
    muon, adamw = make_optimizers(groups, "muon", lr, 0.9, 0.95, 1e-8, 0.9, "cpu")
    assert {g["name"]: g["weight_decay"] for g in muon.param_groups} == {"attn": 0.5, "mlp": 0.25}
    assert {g["name"]: g["weight_decay"] for g in adamw.param_groups} == {"embed": 0.125, "none": 0.0}

    before = {p: p.detach().clone() for p in model.parameters()}
    model(tokens(2, 8), tokens(2, 8))[1].backward()
    muon.step()
    for g in muon.param_groups:
        for p in g["params"]:
            change = before[p] * (1 - lr * g["weight_decay"]) - p.detach()
            rows = getattr(p, "rows", len(p))
            for update, grad in zip(change.split(rows), p.grad.split(rows)):
                update = update / (lr * 0.2 * math.sqrt(max(update.shape)))
                # Newton-Schulz leaves the gradient's singular vectors and values near 1
                assert 0.5 < torch.linalg.svdvals(update).max() < 1.35
                assert (update * grad).sum() > 0
    with pytest.raises(UserError, match="adamw, adam, sgd or muon"):
        make_optimizers(groups, "lion", lr, 0.9, 0.95, 1e-8, 0.9, "cpu")


def test_muon_updates_q_k_and_v_as_torchs_does_each_matrix_alone():
    """Five steps to the bit, in the middle of them a state dict saved and loaded."""
    model = gpt(bias=False)
    groups = decay_groups(model, 0.5, 0.25, 0.0)
    muon, _ = make_optimizers(groups, "muon", 0.01, 0.9, 0.95, 1e-8, 0.9, "cpu")
    alone = {}  # q, k and v of every layer, and the other matrices as they are
    for name, p in model.named_parameters():
        if name.endswith("c_attn.weight"):
            alone[name] = [nn.Parameter(part.detach().clone()) for part in p.chunk(3)]
        elif ".attn.c_proj" in name or ".mlp." in name:
            alone[name] = [nn.Parameter(p.detach().clone())]
    wd = {name: 0.5 if ".attn." in name else 0.25 for name in alone}
    params = [{"params": alone[name], "weight_decay": wd[name]} for name in alone]
    want = torch.optim.Muon(params, lr=0.01, momentum=0.9, adjust_lr_fn="match_rms_adamw")

    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        for name, parts in alone.items():
            grads = [torch.randn(part.shape, generator=generator) for part in parts]
            grads = [grad * 10.0**i for i, grad in enumerate(grads)]  # those of v are the largest
            model.get_parameter(name).grad = torch.cat(grads)
            for part, grad in zip(parts, grads):
                part.grad = grad
        muon.step()
        want.step()
        for name, parts in alone.items():
            assert torch.equal(model.get_parameter(name), torch.cat(parts)), (step, name)
        if step == 2:
            saved = muon.state_dict()
            muon, _ = make_optimizers(groups, "muon", 0.01, 0.9, 0.95, 1e-8, 0.9, "cpu")
            muon.load_state_dict(saved)
    for p, state in muon.state.items():
        assert state["momentum_buffer"].shape == p.shape


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
    grad = model.lm_head.weight.grad.clone()
    model.zero_grad()
    expected.backward()
    assert (grad - model.lm_head.weight.grad).norm() < tolerance * grad.norm()


@pytest.mark.parametrize("changes", [{"n_embd": 30}, {"n_layer": 0}, {"vocab_size": 0}])
def test_impossible_shapes(changes):
    with pytest.raises(UserError, match="n_embd"):
        GPT(**{**SHAPE, **changes})


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(AssertionError, match="block_size"):
        gpt()(tokens(1, 25))
