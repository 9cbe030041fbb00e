"""The products that L2 regularises in attention of today, by their definitions; which models turn."""
import csv
import json
import math
import re

import pandas as pd
import pytest
import torch
from conftest import REPO

import analyze
from nanorank.checkpoints import Checkpoint
from nanorank.errors import UserError
from nanorank.families import attention_layers, find_attention
from nanorank.figures import heads as figures
from nanorank.heads import AttentionLayer, Rope
from nanorank.measure import head_rows
from nanorank.positions import HALF, INTERLEAVED, norm_of, positions_of
from nanorank.regulariser import gaussian_planes, measure_product, plane_metrics, products_of, regulariser_of
from nanorank.spectra import gaussian_nuclear, metrics
from nanorank.tables import regularised
from nanorank.watch import RankLogger, attention_ranks, summary

d, r, H, n = 24, 8, 6, 2


def gaussian(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def layer_of(n_kv_head=H, rope=None, qk_norm=False):
    torch.manual_seed(0)
    W_K, W_V = (gaussian(n_kv_head, r, d).repeat_interleave(H // n_kv_head, 0) for _ in range(2))
    return AttentionLayer("", 0, gaussian(H, r, d), W_K, W_V, gaussian(H, d, r), n_kv_head, rope, qk_norm)


def pairs(rope):
    """The rows of each plane, written out."""
    if rope.interleaved:
        return [(i, i + 1) for i in range(0, rope.dim, 2)]
    return [(i, i + rope.dim // 2) for i in range(rope.dim // 2)]


ROPES = [Rope(8), Rope(8, True), Rope(4), Rope(4, True), Rope(2)]


@pytest.mark.parametrize("n_kv_head", [H, n])
@pytest.mark.parametrize("rope", ROPES)
def test_planes_by_their_definition(rope, n_kv_head):
    """Row by row, against measure_product; the rows that do not turn by a float64 SVD of their product."""
    layer = layer_of(n_kv_head, rope)
    product = "qk" if n_kv_head == H else "qk_stacked"
    _, plain, table = measure_product(layer, product, *products_of(layer)[product])
    g = H // n_kv_head
    for i in range(n_kv_head):
        K = layer.W_K[i * g]
        Q = torch.cat([layer.W_Q[i * g + h] for h in range(g)], dim=1)  # (r, g d)
        a2 = [float(K[list(pair)].square().sum()) for pair in pairs(rope)]
        b2 = [float(Q[list(pair)].square().sum()) for pair in pairs(rope)]
        sizes = sorted((math.sqrt(a * b) for a, b in zip(a2, b2)), reverse=True)
        K_rest, Q_rest = K[rope.dim:], Q[rope.dim:]
        nuclear = sum(sizes) + float(torch.linalg.svdvals(K_rest.T @ Q_rest).sum())
        half = float(K.square().sum() + Q.square().sum()) / 2
        KK, QQ = K_rest @ K_rest.T, Q_rest @ Q_rest.T
        norms = [math.sqrt(sum(x * x for x in squares) + float(G.square().sum())) for squares, G in
                 ((a2, KK), (b2, QQ), ([a - b for a, b in zip(a2, b2)], KK - QQ))]
        assert table["planes95"][i] == next(k for k in range(1, 9) if sum(sizes[:k]) >= 0.95 * sum(sizes))
        assert table["nuclear_planes"][i] == pytest.approx(nuclear)
        assert table["gap_planes"][i] == pytest.approx((half - nuclear) / half)
        assert table["imbalance_planes"][i] == pytest.approx(norms[2] / (norms[0] + norms[1]))
        assert plain["nuclear"][i] <= nuclear * (1 + 1e-12) and table["gap_planes"][i] > 0


def test_stacked_products_by_their_definition():
    layer = layer_of(n)
    products = products_of(layer)
    assert list(products) == ["qk", "ov", "qk_stacked", "ov_stacked"]
    for i in range(n):
        own = range(3 * i, 3 * i + 3)
        qk = torch.cat([layer.W_K[3 * i].T @ layer.W_Q[h] for h in own], dim=1)  # (d, g d)
        ov = torch.cat([layer.P[h] @ layer.W_V[3 * i] for h in own])             # (g d, d)
        for product, W in (("qk_stacked", qk), ("ov_stacked", ov)):
            A, B = products[product]
            assert torch.allclose(A[i] @ B[i].mT, W)
            table = metrics(A, B)
            assert table["nuclear"][i] == pytest.approx(float(torch.linalg.svdvals(W).sum()))
    K, Q = layer.W_K[0], layer.W_Q[:3]
    D = K @ K.T - sum(W @ W.T for W in Q)  # the balance of the table in docs/theory.md
    size = (K @ K.T).norm() + sum(W @ W.T for W in Q).norm()
    assert metrics(*products["qk_stacked"])["imbalance"][0] == pytest.approx(float(D.norm() / size))


@pytest.mark.parametrize("n_kv_head", [H, n])
@pytest.mark.parametrize("rope", [Rope(8), Rope(8, True)])
def test_balanced_planes_have_no_gap_and_the_same_function(rope, n_kv_head):
    """The smallest norm among all factors of a function: each plane of W_K times a number, that of W_Q by
    its inverse. Minimised over the numbers, half_sq_norm is nuclear_planes."""
    layer = layer_of(n_kv_head, rope)
    product = "qk" if n_kv_head == H else "qk_stacked"
    A, B = products_of(layer)[product]
    first, second = (list(x) for x in zip(*pairs(rope)))
    log_size = torch.zeros(len(A), 1, r // 2, dtype=torch.float64, requires_grad=True)

    def half():
        scale = torch.zeros(len(A), 1, r, dtype=torch.float64)
        scale[..., first] = log_size
        scale[..., second] = log_size
        return ((A * scale.exp()).square().sum((1, 2)) + (B * (-scale).exp()).square().sum((1, 2))) / 2

    search = {"max_iter": 200, "tolerance_grad": 1e-12, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([log_size], **search)

    def closure():
        optimizer.zero_grad()
        loss = half().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    want = plane_metrics(A, B, rope)["nuclear_planes"]
    assert half().tolist() == pytest.approx(want, rel=1e-8)
    assert metrics(A, B)["gap"][0] > 0.05


@pytest.mark.parametrize("d_A, d_B, width, dim", [
    (24, 24, 8, 8), (24, 72, 8, 4), (200, 64, 16, 16), (8, 12, 16, 8)])
def test_gaussian_planes(d_A, d_B, width, dim):
    torch.manual_seed(0)
    A, B = gaussian(400, d_A, width), gaussian(400, d_B, width)
    rest = metrics(A[..., dim:], B[..., dim:])["nuclear"] if dim < width else 0.0
    table = plane_metrics(A, B, Rope(dim), rest)
    mean = sum(x / float(a.norm() * b.norm()) for x, a, b in zip(table["nuclear_planes"], A, B)) / 400
    assert gaussian_planes(d_A, d_B, width, dim) == pytest.approx(mean, rel=0.01)


def test_one_plane_is_the_whole_and_zeros_have_no_gap():
    A = gaussian(3, d, 2)
    table = plane_metrics(A, A, Rope(2))
    assert table["planes95"] == [1, 1, 1] and table["gap_planes"] == pytest.approx([0, 0, 0], abs=1e-12)
    assert gaussian_planes(d, d, 2, 2) == pytest.approx(1) and gaussian_nuclear(d, d, 2) < 0.99
    zeros = plane_metrics(torch.zeros(2, d, r), torch.zeros(2, d, r), Rope(4))
    assert all(values == [0, 0] for values in zeros.values())


def test_what_decay_regularises():
    def said(layer):
        return {product: regulariser_of(layer, product) for product in products_of(layer)}

    assert said(layer_of()) == {"qk": "nuclear", "ov": "nuclear"}
    assert said(layer_of(rope=Rope(8))) == {"qk": "planes", "ov": "nuclear"}
    assert said(layer_of(n)) == {"qk": "stacked", "ov": "stacked", "qk_stacked": "nuclear",
                                 "ov_stacked": "nuclear"}
    assert said(layer_of(n, Rope(8)))["qk_stacked"] == "planes"
    assert said(layer_of(n, Rope(8), True)) == {"qk": "none", "ov": "stacked", "qk_stacked": "none",
                                                "ov_stacked": "nuclear"}


def test_the_training_log_has_what_applies():
    plain = summary([layer_of()])
    assert not [name for name in plain if "planes" in name or "stacked" in name]
    turned = summary([layer_of(rope=Rope(8))])
    assert turned.keys() - plain.keys() == {f"attn_{name}_qk" for name in (
        "planes95", "nuclear_planes", "gap_planes", "imbalance_planes")}
    assert {name: turned[name] for name in plain} == plain
    grouped = summary([layer_of(n, Rope(8))], threshold=0.9)
    assert {"attn_gap_qk_stacked", "attn_gap_planes_qk_stacked", "attn_planes90_qk_stacked",
            "layer0_rank90_ov_stacked"} <= grouped.keys() and "attn_gap_planes_qk" not in grouped

# ------------------------------------------------------------ our own checkpoints

OURS = {"n_layer": 1, "n_head": H, "n_embd": 48, "block_size": 16, "vocab_size": 64, "bias": False}
PATH = "transformer.h.0.attn"


def own_state(n_kv_head=H, qk_norm=False):
    torch.manual_seed(1)
    state = {f"{PATH}.c_attn.weight": torch.randn(48 + 2 * n_kv_head * 8, 48),
             f"{PATH}.c_proj.weight": torch.randn(48, 48)}
    if qk_norm:
        state.update({f"{PATH}.{x}_norm.weight": torch.ones(8) for x in "qk"})
    return state


def test_our_own_models(tmp_path):
    """Rows [W_Q: n_head r][W_K: n_kv_head r][W_V: n_kv_head r] of c_attn; rope, n_kv_head in model_args."""
    state = own_state(n, qk_norm=True)
    args = {**OURS, "rope": True, "n_kv_head": n, "qk_norm": True}
    torch.save({"model": state, "model_args": args}, tmp_path / "a.pt")
    (layer,) = Checkpoint(str(tmp_path / "a.pt")).attention_layers()
    q, k, v = state[f"{PATH}.c_attn.weight"].split([48, 16, 16])
    assert torch.equal(layer.W_Q[5], q[40:]) and torch.equal(layer.W_K[3], k[8:])
    assert torch.equal(layer.W_V[2], v[:8]) and layer[6:] == (n, Rope(8), True)
    rows, _ = head_rows(Checkpoint(str(tmp_path / "a.pt")), "cpu")
    last = {row["product"]: row["head"] for row in rows}
    assert last == {"qk": 5, "ov": 5, "qk_stacked": 1, "ov_stacked": 1}

    plain = {**own_state(), "transformer.wpe.weight": torch.randn(16, 48)}
    (layer,) = attention_layers(plain, configs={"its model_args": OURS})
    assert layer[6:] == (H, None, False)


def test_a_gpt_in_training():
    class Model(torch.nn.Module):
        args = {**OURS, "rope": True}

        def __init__(self):
            super().__init__()
            parts = {name: torch.nn.Linear(48, rows, bias=False) for name, rows in
                     (("c_attn", 144), ("c_proj", 48))}
            block = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict(parts)})
            self.transformer = torch.nn.ModuleDict({"h": torch.nn.ModuleList([block])})

    model = Model()
    log = attention_ranks(model)
    assert log["attn_planes95_qk"] == 4 and log == RankLogger(model, every=1)(0)

# ------------------------------------------------------------ which models turn

def test_every_model_type_was_tried():
    """results/trust/rotary.csv: the pairing under which a random model's output stays, and no other."""
    with open(REPO / "results" / "trust" / "rotary.csv", newline="") as file:
        tried = {row["kind"]: row for row in csv.DictReader(file)}
    for pairing, types in (("half", HALF), ("interleaved", INTERLEAVED)):
        for model_type in types:
            row = tried[model_type]
            assert row["stays"].split("/")[0] == row["nanorank"].split("/")[0] == pairing, model_type
            assert float(row["least_change_otherwise"]) > 5e-4, model_type


@pytest.mark.parametrize("kind, turns", [
    ("llama", "half"), ("qwen3", "half"), ("gpt_neox", "half"), ("phi", "half"), ("falcon", "half"),
    ("gptj", "interleaved"), ("glm", "interleaved"), ("cohere2", "interleaved none"), ("gpt2", "none"),
    ("smollm3", "half none"), ("modernbert", "half"), ("mixtral", "half"),
])
def test_a_models_output_stays_under_our_pairing_alone(kind, turns):
    pytest.importorskip("transformers")
    from trials import rotary
    line = rotary.examine(kind)
    assert set(turns.split()) == {says[0] for _, _, says in line["kept"]}
    for fits, change, (pairing, _) in line["kept"]:
        assert pairing in fits and (pairing == "none" or (fits == [pairing] and change > 5e-4))


def module_of(names, layer=0, path="model.layers.{}.self_attn", d=32):
    """The only attention module of a model whose q, k, v, o have these names."""
    names = [f"{path.format(layer)}.{name}.weight" for name in names.split()]
    shapes = {name: (d, d) for name in names}
    return find_attention(shapes)[-1], shapes


LLAMA = "q_proj k_proj v_proj o_proj"


@pytest.mark.parametrize("names, config, pairing, rows", [
    (LLAMA, {"model_type": "llama"}, "half", 1.0),
    (LLAMA, {"model_type": "stablelm"}, "half", 0.25),
    (LLAMA, {"model_type": "phi", "partial_rotary_factor": 0.4}, "half", 0.4),
    (LLAMA, {"model_type": "gptj", "rotary_dim": 16}, "interleaved", 16),
    (LLAMA, {"model_type": "glm", "rope_parameters": {"partial_rotary_factor": 0.5}}, "interleaved", 0.5),
    (LLAMA, {"model_type": "llava", "text_config": {"model_type": "gemma"}}, "half", 1.0),
    (LLAMA, {"model_type": "opt"}, "none", 0.0),
    (LLAMA, {"model_type": "smollm3", "no_rope_layers": [0]}, "none", 0.0),
    (LLAMA, {"model_type": "smollm3"}, "", 0.0),
    (LLAMA, {"model_type": "cohere2", "layer_types": ["full_attention"]}, "none", 0.0),
    (LLAMA, {"model_type": "cohere2"}, "", 0.0),
    (LLAMA, {"model_type": "strange", "rope_theta": 1e4}, "", 0.0),
    (LLAMA, {"model_type": "mistral", "rope_parameters": {"rope_type": "proportional"}}, "", 0.0),
    ("query_key_value dense", {"model_type": "falcon", "alibi": True}, "none", 0.0),
    ("wq wk wv wo", {"dim": 32, "n_layers": 1, "n_heads": 4, "norm_eps": 1e-5}, "interleaved", 1.0),
    ("wq wk wv wo", {"dim": 32, "n_heads": 4}, "", 0.0),
    ("c_q c_k c_v c_proj", {"model_config": {"sequence_len": 8, "n_kv_head": 4}}, "half", 1.0),
])
def test_positions_by_config(names, config, pairing, rows):
    module, shapes = module_of(names)
    found = positions_of(module, shapes, {"config.json": config})
    assert found[:2] == (pairing, rows)
    if not pairing:  # the flag tells what nothing else does
        assert positions_of(module, shapes, {"config.json": config}, "half:16")[:2] == ("half", 16)
    else:
        assert "config.json" in found.source


@pytest.mark.parametrize("names", [
    "q_norm.weight k_norm.weight", "q_layernorm.weight k_layernorm.weight", "q_ln.weight k_ln.weight",
    "query_layernorm.weight key_layernorm.weight", "q_layernorm.norms.0.weight k_layernorm.norms.0.weight"])
def test_norms_of_q_and_k_are_found(names):
    module, shapes = module_of(LLAMA)
    assert norm_of(module, shapes, {}) == ""
    q, k = (f"{module.path}.{name}" for name in names.split())
    assert norm_of(module, {**shapes, q: (8,)}, {}) == ""
    assert norm_of(module, {**shapes, q: (8,), k: (8,)}, {}) == q

# ------------------------------------------------------------ analyze.py

@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(path, ..., name=value, ...): what analyze.main prints, and the rows of heads.csv."""
    def go(*paths, **settings):
        usual = {"out_dir": str(tmp_path / "out"), "device": "cpu", "figure": False, "norms": False}
        settings = {**usual, **settings}
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setattr(analyze, name, value)
            analyze.main([str(path) for path in paths])
        with open(tmp_path / "out" / "heads.csv", newline="") as file:
            return capsys.readouterr().out, list(csv.DictReader(file))
    return go


def hugging_face(folder, kind, **settings):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 64,
             "vocab_size": 99, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **settings})
    transformers.AutoModel.from_config(config).save_pretrained(folder)


def mean(rows, product, column):
    values = [float(row[column]) for row in rows if row["product"] == product]
    return sum(values) / len(values)


def test_llama_by_planes_of_all_queries(tmp_path, run):
    hugging_face(tmp_path / "llama", "Llama", num_key_value_heads=4)
    out, rows = run(tmp_path / "llama", figure=True)
    gap, gaussian = (mean(rows, "qk_stacked", name) for name in ("gap_planes", "gap_planes_gaussian"))
    assert (f"gap that decay closes, qk: {gap:.3f} (Gaussian factors {gaussian:.3f}); sum over rotary planes "
            "of |a_j| |b_j|, of each key/value head with all its queries\n") in out
    gap = mean(rows, "ov_stacked", "gap")
    assert f"gap that decay closes, ov: {gap:.3f} (" in out
    assert "rotary positions (config.json: model_type llama): 100 % of the rows" in out
    assert gap < 0.2 and mean(rows, "qk_stacked", "gap_planes") == pytest.approx(gaussian, abs=0.01)
    assert {row["product"]: row["regulariser"] for row in rows} == {
        "qk": "stacked", "ov": "stacked", "qk_stacked": "planes", "ov_stacked": "nuclear"}
    assert all(row["planes"] == row["gap_planes"] == "" for row in rows if row["product"] != "qk_stacked")

    table = figures.style.read_runs(str(tmp_path / "out" / "heads.csv"), ())
    own = regularised(table, "qk")
    assert figures.norm_label(own, "W") == figures.SUM_OVER_PLANES
    assert figures.title(own, "qk", "W", "llama") == "W, llama\nall queries of a key"
    assert own["norm_gap"].mean() == pytest.approx(mean(rows, "qk_stacked", "gap_planes"))


def test_planes_of_two_models_and_over_training(tmp_path, run):
    for step in (1, 2):
        hugging_face(tmp_path / "run" / f"step{step}", "Llama")
    hugging_face(tmp_path / "other", "Llama", hidden_size=32, head_dim=8)
    out, rows = run(tmp_path / "run")
    line = next(line for line in out.splitlines() if "gap_planes qk" in line)
    assert "planes95 qk" in line and "planes95 ov" not in line
    run(tmp_path / "run" / "step1", tmp_path / "other", compare=True)
    with open(tmp_path / "out" / "compare.csv", newline="") as file:
        compared = list(csv.DictReader(file))
    planes = [row for row in compared if row["metric"] == "gap_planes"]
    assert [row["product"] for row in planes] == ["qk", "qk"]
    assert float(planes[0]["a"]) == pytest.approx(sum(float(row["gap_planes"]) for row in rows[:8]) / 8)


def test_a_rotary_run_beside_a_plain_one(tmp_path, run):
    """heads.csv then has columns on planes that the plain run leaves empty."""
    for step in (1, 2):
        hugging_face(tmp_path / "turns" / f"step{step}", "Llama")
        hugging_face(tmp_path / "plain" / f"step{step}", "GPT2")
    out, _ = run(tmp_path / "turns", tmp_path / "plain")
    of_plain = out[out.index("plain over training"):]
    assert "planes95" in out and "planes95" not in of_plain.partition("side by side")[0]


def test_keys_shared_in_one_stack_alone():
    """The rows that L2 acts on are the stacked ones in the text, the plain ones in the vision tower."""
    rows = []
    for stack, products in (("text", ("qk", "qk", "qk_stacked")), ("vision", ("qk", "qk"))):
        for product in products:
            said = "stacked" if (stack, product) == ("text", "qk") else "nuclear"
            rows.append({"checkpoint": "a", "stack": stack, "layer": 0, "product": product, "nuclear": 1.0,
                         "gap": 0.1, "gap_gaussian": 0.2, "regulariser": said})
    found = regularised(pd.DataFrame(rows), "qk")
    assert list(zip(found["stack"], found["product"])) == [("text", "qk_stacked"), *[("vision", "qk")] * 2]


def test_qwen_3_has_no_gap_of_qk(tmp_path, run):
    hugging_face(tmp_path / "qwen", "Qwen3", num_key_value_heads=4, head_dim=16)
    out, rows = run(tmp_path / "qwen")
    assert "gap that decay closes, qk: none; q and k are normed, so decay does not regularise" in out
    assert "note: q and k are normed (layers.0.self_attn.q_norm.weight)" in out
    assert {row["regulariser"] for row in rows if row["product"].startswith("qk")} == {"none"}
    assert mean(rows, "qk_stacked", "gap_planes") > 0 and "gap that decay closes, ov: 0.1" in out


def test_partly_rotary(tmp_path, run):
    hugging_face(tmp_path / "neox", "GPTNeoX", num_attention_heads=4)
    out, rows = run(tmp_path / "neox")
    assert re.search(r"closes, qk: 0.0\d+ .*\|b_j\| plus the nuclear norm of the rows that do not", out)
    assert "25 % of the rows of each head turn, j and j + half" in out
    assert {row["planes"] for row in rows} == {"2", ""} and "closes, ov" not in out


def test_unknown_positions_are_asked_for(tmp_path, run):
    hugging_face(tmp_path / "a", "Llama")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "model_type": "strange"}))
    out, rows = run(tmp_path / "a")
    assert "is not known" in out and "--rope=half" in out and "gap that decay closes" not in out
    assert "regulariser" not in rows[0] and "planes" not in rows[0]
    out, turned = run(tmp_path / "a", rope="interleaved:4")
    assert "(--rope): 4 rows of each head turn, 2j and 2j + 1 together" in out
    assert {row["planes"] for row in turned} == {"2", ""}
    for old, new in zip(rows, turned, strict=True):
        assert all(new[name] == value for name, value in old.items())
    refusals = {"quarter": "expects none, half", "half:5": "5 of 8 rows", "half:10": "10 of 8"}
    for word, refusal in refusals.items():
        with pytest.raises(UserError, match=refusal):
            run(tmp_path / "a", rope=word)
    hugging_face(tmp_path / "b", "Llama")
    contradictions = {"none": "says half", "half:4": "says that 8 rows of each head turn",
                      "half:1": "says that 8 rows of each head turn"}
    for word, answer in contradictions.items():
        with pytest.raises(UserError, match=f"--rope={word}: config.json: model_type llama {answer}"):
            run(tmp_path / "b", rope=word)
    assert run(tmp_path / "b", rope="half:8")[1] == run(tmp_path / "b")[1]
