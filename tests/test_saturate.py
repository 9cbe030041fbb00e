"""Scaled models against closed forms, models multiplied by hand, Hugging Face's; heads; post_norm."""
import csv
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import load, one_line_exit_2, refused, script, write_data
from test_model import gpt, hugging_face, tokens
from torch import nn
from torch.nn import functional as F

from model import GPT, Attention, ViT, init_weights, load_gpt
from nanorank.errors import UserError
from nanorank.restore import saved_args
from nanorank.saturation import Heads, Net, alike, exponent, open_heads, scaled, scaling, states
from scripts import saturate
from scripts.saturate_models import attention_weights, hugging_face_net, our_net

CPU = torch.device("cpu")


def our(model, dtype=torch.float64):
    return our_net(model, {}, CPU, dtype)


def plain_net(blocks, limit=1e150):
    """A Net of modules run one after the other."""
    def run(batch, on_attention=None):
        for block in blocks:
            batch = block(batch)
        return batch
    return Net(blocks, run, blocks, list(blocks.parameters()), limit, None, {}, 1, 8, "blocks")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(paths, ...): saturate.main in this process; returns {file: rows as they are on disk}."""
    def go(*paths, **settings):
        out = tmp_path / "out"
        defaults = {"out_dir": str(out), "device": "cpu", "figure": False, "curves": False, "samples": 6}
        with monkeypatch.context() as patch:
            for name, value in {**defaults, **settings}.items():
                assert hasattr(saturate, name), name
                patch.setattr(saturate, name, value)
            saturate.main([str(path) for path in paths])
        return {path.name: list(csv.DictReader(open(path))) for path in out.glob("*.csv")}
    return go

# --------------------------------------------------------------------------- scaling, closed forms

def test_scaling_takes_every_parameter_once_and_gives_it_back():
    model = gpt(bias=True)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    parameters = our(model, torch.float32).parameters
    with scaled(parameters, 3.0):
        assert model.transformer.wte.weight is model.lm_head.weight  # tied: thrice, not nine times
        for name, p in model.state_dict().items():  # norms and biases too
            assert torch.equal(p, 3 * before[name]), name
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with pytest.raises(RuntimeError), scaled(parameters, 3.0):
        raise RuntimeError
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    vit = ViT(3, 8, 4, 1, 2, 8)
    fixed = vit.sincos2d.clone()
    with scaled(our_net(vit, {}, CPU, torch.float32).parameters, 3.0):
        assert torch.equal(vit.sincos2d, fixed)
    with scaled(our_net(vit, {}, CPU, torch.float32, fixed_positions=True).parameters, 3.0):
        assert torch.equal(vit.sincos2d, 3 * fixed)
    assert torch.equal(vit.sincos2d, fixed)


def test_relu_net_is_homogeneous_of_its_depth():
    """Layer l of a bias-free ReLU net is of degree l + 1, whatever c, and its direction does not move."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(9, 9, bias=False), nn.ReLU()) for _ in range(4)]
    net = plain_net(nn.ModuleList(layers).double())
    batches = torch.randn(3, 2, 5, 9, dtype=torch.float64)
    curve = scaling(net, batches, [1.0, 2.0, 7.0, 1000.0], reference=50.0)
    for factor, table in curve.items():
        for layer, (cosine, log_ratio, saturated) in enumerate(table):
            assert cosine == pytest.approx(1, abs=1e-12) and saturated == pytest.approx(1, abs=1e-12)
            assert log_ratio == pytest.approx(min(layer + 1, 4) * math.log(factor), abs=1e-10)
    assert [exponent(curve, layer) for layer in range(5)] == pytest.approx([1, 2, 3, 4, 4], abs=1e-12)
    biased = plain_net(nn.ModuleList([nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9)]).double())
    cosines = scaling(biased, batches, [1000.0])[1000.0][:, 0]
    assert cosines[1] == pytest.approx(1, abs=1e-12)
    assert cosines[2] < 0.999  # c^2 W2 relu(W1 x + b1) + c b2


def test_cosines_are_means_over_tokens():
    a = [[3.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0], [1e100, 1e100]]
    b = [[6.0, 0.0], [2.0, 0.0], [0.0, 0.0], [1.0, 0.0], [-1e100, -1e100]]
    cosine, log_ratio, n = alike(*torch.tensor([[a], [b]], dtype=torch.float64))
    assert n == 5
    assert cosine == pytest.approx(1 + 0 + 1 + 0 - 1)  # 1 for two zero vectors, 0 for one
    assert log_ratio == pytest.approx(math.log(2))


def attention(scores_of):
    """An Attention of one head on one-hot inputs: tokens i, j score scores_of[i][j], values are one-hot."""
    n = len(scores_of)
    module = Attention(n, 1, bias=False, dropout=0.0, causal=False).double()
    W_Q = torch.tensor(scores_of, dtype=torch.float64).T * n**0.5
    eye = torch.eye(n, dtype=torch.float64)
    module.c_attn.weight.data = torch.cat([W_Q, eye, eye])
    module.c_proj.weight.data = eye
    return module


def test_a_saturated_head_is_the_mean_over_its_best_scores():
    """Scores known by hand: one best key, ties of two and of three, equal scores."""
    table = [[0.1, 0.3, 0.2, 0.3 - 1e-3], [0.5, 0.1, 0.5, 0.1], [7e5, -1.0, 7e5, 7e5], [0.0, 0.0, 0.0, 0.0]]
    best = torch.tensor([[0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.float64)
    want = best / best.sum(-1, keepdim=True)
    module, x = attention(table), torch.eye(4, dtype=torch.float64)[None]
    heads = Heads(torch.ones(4, 4, dtype=torch.bool), torch.arange(4)[:, None])
    with torch.no_grad(), scaled(module.parameters(), 1000.0):
        weights = attention_weights(module, module.c_attn(x))
        assert torch.allclose(weights[0, 0], want, atol=1e-12)
        assert torch.allclose(module(x) / 1e6, want[None], atol=1e-12)  # P W_V scaled is of degree 2
    heads.add(0, weights)
    (row,) = heads.rows({})
    distances = [1, 1, (2 + 0 + 1) / 3, (3 + 2 + 1) / 4]  # of the attended positions from 0, 1, 2, 3
    assert row["positions"] == (1 + 2 + 3 + 4) / 4 and row["available"] == 4
    assert row["distance"] == pytest.approx(np.mean(distances))
    assert row["entropy"] == pytest.approx((0 + math.log(2) + math.log(3) + math.log(4)) / 4, abs=1e-9)
    assert row["kind"] == "mixed"


@pytest.mark.parametrize("kind", ["argmax", "mean"])
def test_kinds_and_distances_of_causal_heads(kind):
    """Each token looks at the one before it, or at all it may; the first has no choice."""
    T = 20
    reach = torch.ones(T, T, dtype=torch.bool).tril()
    weights = reach / reach.sum(-1, keepdim=True)
    if kind == "argmax":
        weights = torch.zeros(T, T)
        weights[0, 0] = 1
        weights[range(1, T), range(T - 1)] = 1
    heads = Heads(reach, torch.arange(T)[:, None])
    for _ in range(2):
        heads.add(3, weights.expand(2, 1, T, T))
    (row,) = heads.rows({"step": 7})
    n = np.arange(1, T + 1)
    assert (row["step"], row["layer"], row["head"], row["kind"]) == (7, 3, 0, kind)
    assert row["positions"] == pytest.approx(1 if kind == "argmax" else n.mean())
    assert row["available"] == pytest.approx(n.mean())
    assert row["distance"] == pytest.approx((T - 1) / T if kind == "argmax" else ((n - 1) / 2).mean())
    assert row["entropy"] == pytest.approx(0 if kind == "argmax" else np.log(n).mean(), abs=1e-6)

# ------------------------------------------------------------------------------------ whole models

@pytest.mark.parametrize("post_norm", [False, True])
def test_states_are_those_of_a_model_multiplied_by_hand(post_norm):
    model = gpt(bias=True, post_norm=post_norm).double()
    x = tokens(2, 24)
    by_hand = GPT(**model.args).double()
    by_hand.load_state_dict({name: 1000 * p for name, p in model.state_dict().items()})
    with torch.no_grad():
        h = [[], []]
        for one, found in zip((model, by_hand), h):
            y = one.transformer.wte(x) + one.transformer.wpe(torch.arange(24))
            for block in one.transformer.h:
                y = block(y)
                found.append(y)
            found.append(one.transformer.ln_f(y))
    table = scaling(our(model), x.split(1), [1000.0])[1000.0]
    for (cosine, log_ratio, _), a, b in zip(table, *h, strict=True):
        assert cosine == pytest.approx(float(F.cosine_similarity(a, b, dim=-1).mean()), abs=1e-9)
        assert log_ratio == pytest.approx(float((b.norm(dim=-1) / a.norm(dim=-1)).log().mean()), abs=1e-9)


def test_attention_weights_are_what_the_model_uses():
    """A block's attention, rebuilt from what on_attention gets, is the block's own, scaled or not."""
    torch.manual_seed(0)
    vit = ViT(3, 16, 4, 2, 2, 16, pool="cls")
    init_weights(vit, 0)
    for model, x in ((gpt(bias=True), tokens(2, 24)), (vit, torch.randn(2, 3, 16, 16, dtype=torch.float64))):
        net, seen, got = our(model), {}, {}

        def keep(key, module, inputs, output, got=got):
            got[key] = output

        for i, block in enumerate(model.transformer.h):
            block.attn.c_attn.register_forward_hook(partial(keep, (i, "c_attn")))
            block.attn.c_proj.register_forward_hook(partial(keep, (i, "c_proj")))
        for factor in (1.0, 1000.0):
            states(net, x, factor, seen.__setitem__)
            for i, block in enumerate(model.transformer.h):
                v = got[i, "c_attn"].chunk(3, -1)[2].unflatten(-1, (block.attn.n_head, -1)).transpose(1, 2)
                y = (seen[i] @ v).transpose(1, 2).flatten(2)
                want = y @ (factor * block.attn.c_proj.weight.T) + factor * block.attn.c_proj.bias
                assert torch.allclose(got[i, "c_proj"], want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_hugging_faces_gpt2_gives_the_same_numbers(dtype, tolerance):
    model = gpt(bias=True)
    theirs = hugging_face(model).transformer
    theirs.set_attn_implementation("eager")
    ours, theirs = our(model, dtype), hugging_face_net(theirs, "theirs", CPU, dtype)
    x, tables, rows = tokens(4, 24), [], []
    for net in (ours, theirs):
        heads = open_heads(net, x)
        assert torch.equal(heads.reach, torch.ones(24, 24, dtype=torch.bool).tril())
        tables.append(scaling(net, x.split(2), [4.0, 1000.0], reference=1000.0, on_attention=heads.add))
        rows.append(heads.rows({}))
    for factor in (4.0, 1000.0):
        assert tables[0][factor].shape == (4, 3)
        assert np.allclose(tables[0][factor], tables[1][factor], atol=tolerance)
    assert len(rows[0]) == len(rows[1]) == 12
    for a, b in zip(*rows):
        assert a["kind"] == b["kind"]
        for name in ("positions", "distance", "entropy"):
            assert a[name] == pytest.approx(b[name], abs=100 * tolerance), name


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twelve_layers_scaled_a_thousandfold_are_finite(dtype, post_norm):
    model = gpt(n_layer=12, bias=True, post_norm=post_norm)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight *= 10  # scores of 1e15
    net = our(model, dtype)
    heads = open_heads(net, tokens(1, 24))
    table = scaling(net, [tokens(1, 24)], [1000.0], on_attention=heads.add)[1000.0]
    assert np.isfinite(table).all() and (np.abs(table[:, 0]) <= 1 + 1e-6).all()
    assert table[-1, 1] == pytest.approx(math.log(1000), abs=0.1)  # the last norm's scale
    for row in heads.rows({}):
        assert 1 <= row["positions"] <= 12.5  # deep post-norm tokens grow alike: ties
        assert 0 <= row["entropy"] < math.log(24)


def test_what_float_cannot_hold_is_refused_by_layer():
    torch.manual_seed(0)
    deep = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(40)])
    x = torch.randn(1, 3, 8)
    words = r"layer \d+ reaches .* under parameters x 1000.*lower --c, or --dtype=float64"
    with pytest.raises(UserError, match=words):
        scaling(plain_net(deep, 1e18), [x], [1000.0])
    deep = deep.double()
    nn.init.eye_(deep[0].weight)
    assert np.isfinite(scaling(plain_net(deep, 1e150), [x.double()], [1000.0])[1000.0]).all()
    with pytest.raises(UserError, match=r"layer 0 reaches nan"):
        states(plain_net(deep, 1e150), x.double() * math.nan)

# -------------------------------------------------------------------------------------- the script

def test_a_run_folder_over_training(tmp_path, train, data_dir, run, capsys):
    """Snapshots in order; the fresh model is that of the run's step 0, of the same seed; columns; figures."""
    out = tmp_path / "lm"
    train(out, snapshot_steps="0,10,20", rank_interval=20)
    tables = run(out, data_dir=str(data_dir), curves=True, figure=True, CURVE=(1.0, 10.0))
    rows, heads, curves = (tables[f"{name}.csv"] for name in ("saturation", "heads_saturated", "scaling"))
    assert list(rows[0])[:7] == ["checkpoint", "step", "init", "layer", "c", "cosine", "norm_ratio"]
    columns = ["checkpoint", "step", "layer", "head", "positions", "distance", "entropy", "kind"]
    assert list(heads[0])[:8] == columns
    trained = [row for row in rows if row["init"] == "trained"]
    expected = [(step, layer) for step in ("0", "10", "20") for layer in ("0", "1", "output")]
    assert [(row["step"], row["layer"]) for row in trained] == expected
    fresh = [row for row in rows if row["init"] == "random"]
    for a, b in zip(trained[:3], fresh, strict=True):
        assert b["step"] == "20"
        for name in ("cosine", "norm_ratio", "param_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-12)
    weights = load(out / "step_0000020.pt")["model"]
    weights.pop("lm_head.weight")  # tied
    norm = math.sqrt(sum(float(p.double().square().sum()) for p in weights.values()))
    assert float(trained[-1]["param_norm"]) == pytest.approx(norm, rel=1e-9)
    assert len(heads) == 3 * 2 * 2 and {row["kind"] for row in heads} <= {"argmax", "mean", "mixed"}
    models = {(row["init"], row["norm"], row["bias"]) for row in curves}
    untrained = {("untrained", norm, bias) for norm in ("pre", "post") for bias in ("False", "True")}
    assert models == {("trained", "pre", "False")} | untrained
    for row in curves:
        if row["c"] == "1.0":
            assert float(row["cosine"]) == pytest.approx(1) and float(row["norm_ratio"]) == pytest.approx(1)
        if row["layer"] == "output":
            assert float(row["k"]) == pytest.approx(1, abs=1e-2)  # behind a norm
    printed = capsys.readouterr().out
    assert "6 x 32 tokens of" in printed and "over training" in printed and "argmax" in printed
    figures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert figures == ["heads_saturated.png", "saturation.png", "scaling.png"]
    again = run(out, batch_size=1)  # the data are where the checkpoint's run had them
    for a, b in zip(rows + heads, again["saturation.csv"] + again["heads_saturated.csv"], strict=True):
        for name, value in a.items():
            assert value == b[name] or float(value) == pytest.approx(float(b[name]), rel=1e-9), name
    once = [path.read_bytes() for path in sorted((tmp_path / "out").glob("*d*.csv"))]
    run(out, data_dir=str(data_dir), batch_size=1)
    assert once == [path.read_bytes() for path in sorted((tmp_path / "out").glob("*d*.csv"))]


@pytest.mark.parametrize("changes", [{}, {"pool": "cls", "positions": "learned"}])
def test_vits_on_images(tmp_path, image_dir, run, changes):
    model = ViT(7, 16, 4, 2, 2, 16, **changes)
    init_weights(model, 3)
    config = {"dataset": "pictures", "standardize": True}
    ckpt = {"model": model.state_dict(), "model_args": model.args, "iter_num": 5, "config": config}
    torch.save(ckpt, tmp_path / "vit.pt")
    tables = run(tmp_path / "vit.pt", data_dir=str(image_dir), curves=True, seed=3, CURVE=(1.0, 2.0))
    rows, n = tables["saturation.csv"], 16 + bool(changes)
    for a, b in zip(rows[:3], rows[3:], strict=True):
        assert (a["init"], b["init"]) == ("trained", "random")
        assert a["cosine"] == b["cosine"]  # it was initialised with this seed
    for row in tables["heads_saturated.csv"]:
        assert float(row["available"]) == n and 0 <= float(row["distance"]) <= math.dist((0, 0), (3, 3))
    assert {row["init"] for row in tables["scaling.csv"]} == {"trained", "random"}


def test_tasks_are_data_too(tmp_path, run, capsys):
    model = GPT(32, 32, 1, 2, 16)
    init_weights(model, 0)
    config = {"dataset": "recall"}
    ckpt = {"model": model.state_dict(), "model_args": model.args, "iter_num": 0, "config": config}
    torch.save(ckpt, tmp_path / "recall.pt")
    rows = run(tmp_path / "recall.pt", reinit=False)["saturation.csv"]
    assert len(rows) == 2 and "6 x 32 tokens of data/recall" in capsys.readouterr().out


def test_distances_of_images_are_on_their_grid():
    vit = ViT(3, 12, 4, 1, 2, 8, pool="cls")
    init_weights(vit, 0)
    heads = open_heads(our(vit), torch.randn(1, 3, 12, 12, dtype=torch.float64))
    assert heads.distances[1, 9] == pytest.approx(math.sqrt(8))
    assert heads.distances[1, 3] == 2 and heads.distances[0, 5] == 0
    assert heads.reach.all() and len(heads.reach) == 10


def test_hugging_face_folders(tmp_path, run, capsys):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 120, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 64}
    gpt2 = transformers.GPT2Config(vocab_size=120, n_positions=64, n_embd=16, n_layer=2, n_head=2,
                                   bos_token_id=0, eos_token_id=0)
    t5 = transformers.T5Config(vocab_size=120, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                               decoder_start_token_id=0)
    models = {
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **small)),
        "bert": transformers.BertModel(transformers.BertConfig(**small)),
        "t5": transformers.T5ForConditionalGeneration(t5),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    capsys.readouterr()
    tables = run(*(tmp_path / name for name in models), block_size=12, curves=False)
    printed = capsys.readouterr().out
    for name in models:
        rows = [row for row in tables["saturation.csv"] if row["checkpoint"].endswith(name)]
        own = {init: [row for row in rows if row["init"] == init] for init in ("trained", "random")}
        for rows in own.values():
            assert [row["layer"] for row in rows] == ["0", "1", "output"]
            assert all(abs(float(row["cosine"])) <= 1 and float(row["norm_ratio"]) > 100 for row in rows)
        assert own["trained"][0]["cosine"] != own["random"][0]["cosine"]
        heads = [row for row in tables["heads_saturated.csv"] if row["checkpoint"].endswith(name)]
        available = 6.5 if name in ("gpt2", "llama") else 12.0
        assert len(heads) == 4 and {float(row["available"]) for row in heads} == {available}
    assert printed.count("6 x 12 random tokens of its 120") == 4
    assert "T5Stack" in printed  # the encoder


def test_text_for_hugging_face_must_be_in_its_vocabulary(tmp_path, run, capsys):
    transformers = pytest.importorskip("transformers")
    for folder, n in (("fits", 50), ("not", 49)):
        write_data(tmp_path / folder, {"val": [np.arange(300) % n]}, vocab_size=n)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=1,
                                     bos_token_id=0, eos_token_id=0)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "model")
    run(tmp_path / "model", data_dir=str(tmp_path), dataset="fits", reinit=False)
    assert f"6 x 16 tokens of {tmp_path}/fits, val" in capsys.readouterr().out
    with pytest.raises(UserError, match="vocabulary of 50"):
        run(tmp_path / "model", data_dir=str(tmp_path), dataset="not")


def test_bad_input_is_one_line(tmp_path, run, data_dir):
    model = GPT(257, 16, 1, 1, 8)
    init_weights(model, 0)
    good = {"model": model.state_dict(), "model_args": model.args, "config": {"dataset": "text"}}
    torch.save(good, tmp_path / "good.pt")
    torch.save({**good, "config": {}}, tmp_path / "silent.pt")
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    nans = {name: p * math.nan for name, p in model.state_dict().items()}
    torch.save({**good, "model": nans}, tmp_path / "nan.pt")
    torch.save({**good, "model_args": {**model.args, "n_layer": 2}}, tmp_path / "layers.pt")
    small = GPT(64, 16, 1, 1, 8)
    torch.save({**good, "model": small.state_dict(), "model_args": small.args}, tmp_path / "small.pt")
    (tmp_path / "folder").mkdir()
    cases = [
        ("good.pt", {"c": 1.0}, "--c=1:"),
        ("good.pt", {"tie": 0.0}, "--tie=0"),
        ("good.pt", {"dtype": "bfloat16"}, "16 bits"),
        ("good.pt", {"samples": 0}, "--samples=0"),
        ("good.pt", {"split": "dev"}, "--split=dev"),
        ("good.pt", {"dataset": "nothing"}, "nothing is not a prepared data set"),
        ("good.pt", {"device": "tpu"}, "--device=tpu"),
        ("missing.pt", {}, "no such file"),
        ("silent.pt", {}, "--dataset=NAME"),
        ("bare.pt", {}, "no model_args"),
        ("nan.pt", {}, "holds NaN"),
        ("layers.pt", {}, "not a GPT checkpoint"),
        ("small.pt", {}, "vocabulary of 64"),
        ("folder", {}, "no model in it"),
    ]
    for path, settings, words in cases:
        with refused(words):
            run(tmp_path / path, **{"data_dir": str(data_dir), **settings})
    with refused("which checkpoint"):
        run()
    result = script("-m", "scripts.saturate", tmp_path / "bare.pt", f"--out_dir={tmp_path}")
    one_line_exit_2(result, "saturate.py:", "bare.pt", "no model_args")

# --------------------------------------------------------------------------------------- post_norm

@pytest.mark.parametrize("mlp", [True, False])
def test_post_norm_is_the_norm_of_each_sum(mlp):
    model = gpt(bias=True, post_norm=True, mlp=mlp)
    x = tokens(2, 9)
    y = model.transformer.wte(x) + model.transformer.wpe(torch.arange(9))
    for block in model.transformer.h:
        y = F.layer_norm(y + block.attn(y), (32,), block.ln_1.weight, block.ln_1.bias)
        if mlp:
            y = F.layer_norm(y + block.mlp(y), (32,), block.ln_2.weight, block.ln_2.bias)
    assert torch.allclose(model(x)[0], y @ model.lm_head.weight.T, atol=1e-5)
    assert not [name for name in model.state_dict() if "ln_f" in name]
    assert model.args["post_norm"] is True and "post_norm" not in saved_args(gpt().args)
    again = load_gpt({"model": model.state_dict(), "model_args": model.args})
    assert torch.equal(again(x)[0], model(x)[0])


def test_post_norm_trains_and_stays(tmp_path, train):
    result = train(tmp_path / "post", post_norm=True)
    assert result["post_norm"] is True and result["test_loss"] < 4.5  # ln 257 = 5.5 to begin with
    assert load(tmp_path / "post" / "ckpt.pt")["model_args"]["post_norm"] is True
