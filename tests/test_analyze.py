"""analyze.py against the model's own attention and float64 SVDs; what it writes; what it refuses."""
import csv
import json
import math
import os
import pickle
import re

import pytest
import torch
from conftest import one_line_exit_2, script

import analyze
from model import GPT, init_weights, load_gpt
from nanorank import spectra
from nanorank.checkpoints import Checkpoint, open_all
from nanorank.errors import UserError
from nanorank.families import attention_layers
from nanorank.figures import heads as figures
from nanorank.measure import head_rows
from nanorank.watch import summary

ARGS = {"vocab_size": 64, "block_size": 16, "n_layer": 2, "n_head": 3, "n_embd": 24, "dropout": 0.0,
        "bias": True}
PRODUCTS = ("qk", "ov")


def save(path, seed=0, step=0, **changes):
    model = GPT(**ARGS)
    init_weights(model, seed)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[8:16] = 0  # W_Q of layer 1, head 1
    torch.save({"model": model.state_dict(), "model_args": ARGS, "iter_num": step, **changes}, path)
    return model


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(paths, ...): analyze.main in this process; returns the rows of heads.csv and norms.csv."""
    def go(*paths, **settings):
        settings = {"out_dir": str(tmp_path / "out"), "device": "cpu", "figure": False, **settings}
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setattr(analyze, name, value)
            analyze.main([str(path) for path in paths])
        return rows_of(tmp_path, "heads"), rows_of(tmp_path, "norms")
    return go


def rows_of(tmp_path, name):
    return list(csv.DictReader(open(tmp_path / "out" / f"{name}.csv")))


def assert_figures(tmp_path, *names):
    for name in names:
        assert os.path.getsize(tmp_path / "out" / f"{name}.png") > 10_000
        assert os.path.getsize(tmp_path / "out" / f"{name}.pdf") > 5_000


def norm(tensors):
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in tensors))


def refused(words):
    return pytest.raises(UserError, match=re.escape(words))


def test_heads_are_the_models_own(tmp_path):
    """Scores and outputs rebuilt from the extracted heads equal the module's (q k^T without biases)."""
    model = save(tmp_path / "a.pt")
    x = torch.randn(1, 5, 24)
    layers = Checkpoint(str(tmp_path / "a.pt")).attention_layers()
    for layer, block in zip(layers, model.transformer.h, strict=True):
        q, k, v = (x @ block.attn.c_attn.weight.T).split(24, dim=2)
        for h in range(3):
            cut = slice(8 * h, 8 * h + 8)
            scores = q[0, :, cut] @ k[0, :, cut].T
            assert torch.allclose(x[0] @ (layer.W_K[h].T @ layer.W_Q[h]).T @ x[0].T, scores, atol=1e-6)
            written = v[0, :, cut] @ block.attn.c_proj.weight[:, cut].T
            assert torch.allclose(x[0] @ (layer.P[h] @ layer.W_V[h]).T, written, atol=1e-6)


def test_heads_csv_against_float64_svd(tmp_path, run):
    model = save(tmp_path / "a.pt", step=7)
    heads, _ = run(tmp_path / "a.pt")
    assert list(heads[0]) == [
        "checkpoint", "step", "layer", "head", "product", "d_head", "rank95", "numerical_rank", "stable_rank",
        "effective_rank", "nuclear", "frobenius", "spectral", "half_sq_norm", "gap", "imbalance",
        "norm_A", "norm_B", "gap_gaussian"]
    order = [(layer, product, head) for layer in "01" for product in PRODUCTS for head in "012"]
    assert [(r["layer"], r["product"], r["head"]) for r in heads] == order
    assert {(r["checkpoint"], r["step"], r["d_head"]) for r in heads} == {(str(tmp_path / "a.pt"), "7", "8")}
    for row in heads:
        attn, h = model.transformer.h[int(row["layer"])].attn, int(row["head"])
        W_Q, W_K, W_V = (attn.c_attn.weight[24 * i + 8 * h:24 * i + 8 * h + 8].double() for i in range(3))
        W = W_K.T @ W_Q if row["product"] == "qk" else attn.c_proj.weight[:, 8 * h:8 * h + 8].double() @ W_V
        s = torch.linalg.svdvals(W)
        assert float(row["nuclear"]) == pytest.approx(s.sum().item(), rel=1e-6, abs=1e-12)
        assert float(row["spectral"]) == pytest.approx(s[0].item(), rel=1e-6, abs=1e-12)
        want = int((s.cumsum(0) < 0.95 * s.sum()).sum()) + 1 if s.sum() > 1e-12 else 0
        assert int(row["rank95"]) == want
        assert "nan" not in row.values()
    dead = next(r for r in heads if (r["layer"], r["head"], r["product"]) == ("1", "1", "qk"))
    assert dead["rank95"] == dead["numerical_rank"] == "0"


def test_a_new_metric_is_one_line(tmp_path, run, monkeypatch):
    """One more entry in the dict of spectra.metrics_of is in heads.csv and in the training log."""
    metrics_of = spectra.metrics_of
    monkeypatch.setattr(spectra, "metrics_of", lambda s, *args: {**metrics_of(s, *args), "second": s[:, 1]})
    save(tmp_path / "a.pt")
    heads, _ = run(tmp_path / "a.pt")
    log = summary(Checkpoint(str(tmp_path / "a.pt")).attention_layers())
    for product in PRODUCTS:
        second = [float(r["s2"]) for r in rows_of(tmp_path, "spectra") if r["product"] == product]
        assert [float(r["second"]) for r in heads if r["product"] == product] == second
        assert log[f"attn_second_{product}"] == pytest.approx(sum(second) / 6)


def test_threshold_names_its_column_and_exact_agrees(tmp_path, run):
    save(tmp_path / "a.pt")
    fast, _ = run(tmp_path / "a.pt", threshold=0.9)
    exact, _ = run(tmp_path / "a.pt", threshold=0.9, exact=True)
    assert "rank90" in fast[0] and "rank95" not in fast[0]
    assert [r["rank90"] for r in fast] == [r["rank90"] for r in exact]


def test_a_flag_that_says_what_is_known_is_no_error(tmp_path, run):
    save(tmp_path / "a.pt")
    want, _ = run(tmp_path / "a.pt")
    for settings in ({"n_head": 3}, {"d_head": 8}, {"n_kv_head": 3}):
        assert run(tmp_path / "a.pt", **settings)[0] == want


def test_norms_and_cosines_over_a_run(tmp_path, run):
    folder = tmp_path / "run"
    folder.mkdir()
    models = [save(folder / f"step_000000{i}.pt", seed=i, step=i) for i in (1, 2)]
    save(folder / "ckpt.pt", seed=2, step=2)  # the same step as the last snapshot: left out
    heads, norms = run(folder)
    assert list(norms[0]) == ["checkpoint", "step", "group", "norm", "parameters", "cos_prev"]
    assert {r["checkpoint"] for r in heads} == {str(folder / f"step_000000{i}.pt") for i in (1, 2)}
    flat = [torch.cat([p.detach().double().flatten() for p in m.parameters()]) for m in models]
    rows = {(r["step"], r["group"]): r for r in norms}
    assert {g for _, g in rows} == {"all", "attn", "mlp", "embed", "layer_0", "layer_1"}
    for i, step in enumerate("12"):
        assert float(rows[step, "all"]["norm"]) == pytest.approx(flat[i].norm().item())
        assert int(rows[step, "all"]["parameters"]) == len(flat[i])  # the tied head counts once
        attn = [p for name, p in models[i].named_parameters() if ".attn." in name]
        assert float(rows[step, "attn"]["norm"]) == pytest.approx(norm(attn))
        layer = [p for name, p in models[i].named_parameters() if ".h.1." in name]
        assert int(rows[step, "layer_1"]["parameters"]) == sum(p.numel() for p in layer)
    assert rows["1", "all"]["cos_prev"] == ""
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=0).item()
    assert float(rows["2", "all"]["cos_prev"]) == pytest.approx(cosine)


def test_runs_side_by_side(tmp_path, run, capsys):
    for name, seed in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "ckpt.pt", seed=seed, step=5)
        (tmp_path / name / "result.json").write_text('{"attn_wd": 1, "test_ppl": 6.25, "steps": 5}')
    run(tmp_path / "one", tmp_path / "two", figure=True)
    out = capsys.readouterr().out
    assert "side by side" in out and "attn_wd" in out and "6.25" in out and "heads.png" in out
    save(tmp_path / "one" / "step_0000003.pt", seed=3, step=3)
    run(tmp_path / "one" / "step_0000003.pt", tmp_path / "two" / "ckpt.pt", tmp_path / "two")
    # the last step's perplexity does not stand beside an earlier snapshot, and no run is there twice
    assert capsys.readouterr().out.count("6.25") == 1
    assert_figures(tmp_path, "heads")


def test_other_state_dicts(tmp_path, run):
    """Bare, under torch.compile's and DDP's prefixes, in half precision: the same rows."""
    model = save(tmp_path / "a.pt")
    want, _ = run(tmp_path / "a.pt")
    state = {f"module._orig_mod.{name}": p for name, p in model.state_dict().items()}
    torch.save(state, tmp_path / "bare.pt")
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)  # the mask of an old nanoGPT
    old = {"model": state, "model_args": ARGS}
    torch.save(old, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for got in (run(tmp_path / "bare.pt", n_head=3)[0], run(tmp_path / "old.pt")[0]):
        assert [r["nuclear"] for r in got] == [r["nuclear"] for r in want]
    state = {name: p.bfloat16() for name, p in state.items()}
    torch.save({"model": state, "model_args": ARGS}, tmp_path / "half.pt")
    half, _ = run(tmp_path / "half.pt")
    for a, b in zip(half, want, strict=True):
        assert float(a["nuclear"]) == pytest.approx(float(b["nuclear"]), rel=0.02)


def test_norms_of_other_families(tmp_path, run):
    """Groups by structure: in attention, in a block, in none; norms in none of them; stacks apart."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32, "vocab_size": 50}
    model = transformers.T5Model(transformers.T5Config(**sizes))
    model.save_pretrained(tmp_path / "t5")
    _, norms = run(tmp_path / "t5")
    rows = {r["group"]: r for r in norms}
    layers = {f"{side}_layer_{i}" for side in ("encoder", "decoder") for i in (0, 1)}
    assert set(rows) == {"all", "attn", "mlp", "embed"} | layers
    parts = {"all": "", "attn": "Attention", "mlp": "DenseReluDense", "embed": "shared",
             "decoder_layer_1": "decoder.block.1."}
    for group, part in parts.items():
        own = {name: p for name, p in model.named_parameters() if part in name}
        if group in ("attn", "mlp", "embed"):
            own = {name: p for name, p in own.items() if "layer_norm" not in name}
        assert int(rows[group]["parameters"]) == sum(p.numel() for p in own.values()), group
        assert float(rows[group]["norm"]) == pytest.approx(norm(own.values()))
    run(tmp_path / "t5", norms=False, out_dir=str(tmp_path / "other"))
    assert not (tmp_path / "other" / "norms.csv").exists() and (tmp_path / "other" / "heads.csv").exists()


def test_norms_where_attention_has_no_module_of_its_own(tmp_path, run):
    """OLMo 1 of AI2 (q, k, v, o beside the MLP in a block) and XLM (attentions.0, ffns.0)."""
    shapes = {"att_proj": (24, 8), "attn_out": (8, 8), "ff_proj": (32, 8), "ff_out": (8, 16)}
    olmo = {f"transformer.blocks.{i}.{name}": shape for i in (0, 1) for name, shape in shapes.items()}
    attentions = [f"attentions.{i}.{name}" for i in (0, 1) for name in ("q_lin", "k_lin", "v_lin", "out_lin")]
    ffns = [f"ffns.{i}.{name}" for i in (0, 1) for name in ("lin1", "lin2")]
    xlm = dict.fromkeys(attentions + ffns, (8, 8))
    for model, attn, mlp in ((olmo, 2 * 8 * 32, 2 * 8 * 48), (xlm, 2 * 4 * 64, 2 * 2 * 64)):
        state = {f"{name}.weight": torch.randn(shape) for name, shape in model.items()}
        torch.save({**state, "wte.weight": torch.ones(5, 8)}, tmp_path / "a.pt")
        _, norms = run(tmp_path / "a.pt", n_head=2)
        sizes = {r["group"]: int(r["parameters"]) for r in norms}
        assert (sizes["attn"], sizes["mlp"], sizes["embed"]) == (attn, mlp, 40)
        assert sizes["layer_1"] == (attn + mlp) // 2


def test_cosines_are_over_what_two_checkpoints_share(tmp_path, run):
    """A vocabulary that grew changes no direction of the rest; NaN in a tensor is refused by name."""
    (tmp_path / "run").mkdir()
    state = {"h.0.attn.c_attn.weight": torch.randn(24, 8), "h.0.attn.c_proj.weight": torch.randn(8, 8)}
    for step, vocab in ((1, 5), (2, 9)):
        torch.save({**state, "wte.weight": torch.randn(vocab, 8)}, tmp_path / "run" / f"step_{step}.pt")
    _, norms = run(tmp_path / "run", n_head=2)
    (cosine,) = [r["cos_prev"] for r in norms if r["step"] == "2" and r["group"] == "all"]
    assert float(cosine) == pytest.approx(1)
    torch.save({**state, "wte.weight": torch.full((5, 8), math.nan)}, tmp_path / "nan.pt")
    with refused("wte.weight holds NaN or inf"):
        run(tmp_path / "nan.pt", n_head=2)


def test_growth_is_fitted(tmp_path, run, capsys):
    """A run whose norm grows as 3 + 2 sqrt(t), exactly: the fit says so; and its figure is drawn."""
    folder, base = tmp_path / "run", save(tmp_path / "base.pt")
    folder.mkdir()
    state = {name: p.detach().double() for name, p in base.state_dict().items()}
    del state["lm_head.weight"]  # tied
    size = norm(state.values())
    for t in (0, 4, 9, 25, 100):
        scaled = {name: p * (3 + 2 * math.sqrt(t)) / size for name, p in state.items()}
        torch.save({"model": scaled, "model_args": ARGS, "iter_num": t}, folder / f"step_{t:07d}.pt")
    run(folder, figure=True)
    fits = {(r["group"], r["function"]): r for r in rows_of(tmp_path, "fits")}
    best = fits["all", "sqrt(t)"]
    assert list(best) == ["run", "group", "function", "a", "b", "r2", "points"]
    assert best["points"] == "4"  # log t has no t = 0
    assert [float(best[name]) for name in ("a", "b", "r2")] == pytest.approx([2, 3, 1])
    assert all(float(fits["all", name]["r2"]) < 0.999 for name in ("t", "t^(1/4)", "log(t)"))
    assert ("layer_1", "t") in fits
    assert "1.0000*" in capsys.readouterr().out
    assert_figures(tmp_path, "norms")


def test_singular_values_are_written(tmp_path, run):
    save(tmp_path / "a.pt")
    heads, _ = run(tmp_path / "a.pt", figure=True)
    for row, s in zip(heads, rows_of(tmp_path, "spectra"), strict=True):
        assert all(row[name] == s[name] for name in ("layer", "head", "product"))
        values = [float(s[f"s{i}"]) for i in range(1, 9)]
        assert sum(values) == pytest.approx(float(row["nuclear"])) and values == sorted(values, reverse=True)
    assert_figures(tmp_path, "heads", "nuclear_norm", "heatmap", "spectra")


def test_gaussian_baseline_is_what_random_heads_have(tmp_path, run):
    model = GPT(**{**ARGS, "n_embd": 96, "n_head": 6, "n_layer": 4})
    init_weights(model, 0)
    torch.save({"model": model.state_dict(), "model_args": model.args}, tmp_path / "a.pt")
    heads, _ = run(tmp_path / "a.pt")
    for product in PRODUCTS:
        own = [r for r in heads if r["product"] == product]
        gap, gaussian = (sum(float(r[name]) for r in own) / 24 for name in ("gap", "gap_gaussian"))
        assert gap == pytest.approx(gaussian, abs=0.01) and gap > 0.03


def test_compare_two_runs(tmp_path, run, capsys):
    for name, seed in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "ckpt.pt", seed=seed, step=5, config={"attn_wd": seed / 2, "mlp_wd": 0.1})
        (tmp_path / name / "result.json").write_text(json.dumps({"test_ppl": 6.0 + seed, "steps": 5}))
    heads, _ = run(tmp_path / "one", tmp_path / "two", compare=True)
    out = capsys.readouterr().out
    assert "attn_wd: A 0.5, B 1.0" in out and "mlp_wd" not in out
    assert "test_ppl: A 7.0000, B 8.0000, B - A +1.0000" in out
    rows = rows_of(tmp_path, "compare")
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        own = [r for r in heads if (r["layer"], r["product"]) == (row["layer"], row["product"])]
        values = [float(r[row["metric"]]) for r in own]  # three heads of each run
        a, b = sum(values[:3]) / 3, sum(values[3:]) / 3
        assert float(row["a"]) == pytest.approx(a)
        assert float(row["difference"]) == pytest.approx(b - a, abs=1e-12)

    with refused("--compare takes two"):
        run(tmp_path / "one", compare=True)
    save(tmp_path / "one" / "step_0000002.pt", seed=4, step=2)
    run(tmp_path / "one" / "step_0000002.pt", tmp_path / "one" / "ckpt.pt", compare=True)  # two of one run
    assert "A = " in capsys.readouterr().out
    save(tmp_path / "one" / "step_0000005.pt", seed=1, step=5)
    with refused("--compare: both are the same step"):
        run(tmp_path / "one" / "step_0000005.pt", tmp_path / "one" / "ckpt.pt", compare=True)
    one_layer = GPT(**{**ARGS, "n_layer": 1})
    more_heads = GPT(**{**ARGS, "n_head": 6})
    for model, words in ((one_layer, "different layers: layer 1 ov, layer 1 qk"), (more_heads, "6 of 4 in")):
        torch.save({"model": model.state_dict(), "model_args": model.args}, tmp_path / "other.pt")
        with refused(words):
            run(tmp_path / "one" / "ckpt.pt", tmp_path / "other.pt", compare=True)


@pytest.mark.parametrize("settings, words", [
    ({"n_head": -1}, "--n_head=-1"),
    ({"threshold": 2}, "threshold 2"),
    ({"layers": "99"}, "--layers=99"),
    ({"layers": "a"}, "--layers=a"),
    ({"n_head": 5}, "has 3, by its model_args"),
    ({"d_head": 5}, "are 8 wide"),
    ({"pattern": "x"}, "--pattern=x"),
    ({"truncate": 0.9}, "go together"),
    ({"save": "x.pt"}, "go together"),
    ({"truncate": 1.5, "save": "x.pt"}, "threshold 1.5"),
    ({"truncate": 0.9, "save": __file__}, "is there already"),
])
def test_settings_that_make_no_sense(tmp_path, run, settings, words):
    save(tmp_path / "a.pt")
    with refused("which checkpoint? python analyze.py"):
        run()
    with refused(words) as error:
        run(tmp_path / "a.pt", **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bias", [True, False])
def test_truncation(tmp_path, run, bias, capsys):
    """At threshold 1.0 the same logits, balanced; below, the best approximations of that rank."""
    args = {**ARGS, "bias": bias, "tied": False}
    model = GPT(**args)
    init_weights(model, 3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))), alpha=0.3)
        model.transformer.h[1].attn.c_attn.weight[8:16] = 0  # a dead head
    model.requires_grad_(False)
    ckpt = {"model": model.state_dict(), "model_args": args, "iter_num": 3, "config": {"dataset": "text"}}
    torch.save(ckpt, tmp_path / "a.pt")
    x = torch.arange(12)[None]
    for threshold in (1.0, 0.6):
        small = tmp_path / f"{threshold}.pt"
        heads, _ = run(tmp_path / "a.pt", truncate=threshold, save=str(small), threshold=threshold)
        cut = load_gpt(torch.load(small, weights_only=True))
        after, _ = run(small, exact=True, threshold=1.0)
        for row, new in zip(heads, after, strict=True):
            k = int(row["rank60" if threshold < 1 else "rank100"])
            assert int(new["numerical_rank"]) == min(k, int(row["numerical_rank"]))
            if not bias:  # a query's bias takes a row of W_K
                assert float(new["gap"]) < 1e-6 and float(new["imbalance"]) < 1e-6
        if threshold == 1.0:
            assert torch.allclose(cut(x)[0], model(x)[0], atol=1e-4 * float(model(x)[0].abs().max()))
        else:
            assert not torch.allclose(cut(x)[0], model(x)[0], atol=1e-2)
            before, new = model.transformer.h[0].attn, cut.transformer.h[0].attn
            W, V = (a.c_attn.weight.detach().double().view(3, 3, 8, 24) for a in (before, new))
            U, s, Vh = torch.linalg.svd(W[1, 0].T @ W[0, 0])
            k = int(heads[0]["rank60"])
            assert torch.allclose(V[1, 0].T @ V[0, 0], (U[:, :k] * s[:k]) @ Vh[:k], atol=1e-5)
    assert "--eval_only" in capsys.readouterr().out


def test_what_train_lm_leaves(train, run, tmp_path, capsys):
    """A run's ckpt.pt with its optimizer and settings; truncated, train_lm evaluates it."""
    train(tmp_path / "a", max_iters=4)
    heads, _ = run(tmp_path / "a" / "ckpt.pt", truncate=0.5, save=str(tmp_path / "small.pt"))
    assert len(heads) == 2 * 2 * 2 and "from its model_args" in capsys.readouterr().out
    train(tmp_path / "b", init_from=str(tmp_path / "small.pt"), eval_only=True)
    assert "test perplexity" in capsys.readouterr().out.replace("test ppl", "test perplexity")


def test_truncation_is_for_our_gpts(tmp_path, run):
    state = {"layers.0.attn.qkv.weight": torch.randn(24, 8), "layers.0.attn.proj.weight": torch.randn(8, 8)}
    torch.save(state, tmp_path / "vit.pt")
    with refused("--truncate takes a GPT"):
        run(tmp_path / "vit.pt", n_head=2, truncate=0.9, save=str(tmp_path / "b.pt"))
    assert not (tmp_path / "b.pt").exists()


class Canary:
    def __reduce__(self):
        return os.system, ("touch canary-was-run",)


def test_what_is_refused(tmp_path):
    model = save(tmp_path / "a.pt")
    state = model.state_dict()
    torch.save(state, tmp_path / "bare.pt")
    other = {"encoder.conv.weight": torch.ones(3, 3)}
    lacks = {k: v for k, v in state.items() if "h.1.attn.c_proj.weight" not in k}
    torch.save({"model": other, "model_args": ARGS}, tmp_path / "other.pt")
    torch.save({"model": lacks, "model_args": ARGS}, tmp_path / "lacks.pt")
    torch.save({"model": state, "model_args": {**ARGS, "n_head": 5}}, tmp_path / "heads.pt")
    sick = {k: v.clone() for k, v in state.items()}
    sick["transformer.h.0.attn.c_attn.weight"][0, 0] = math.nan
    torch.save({"model": sick, "model_args": ARGS}, tmp_path / "nan.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": Canary()}))
    (tmp_path / "short.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty").mkdir()
    expected = {
        "bare.pt": ["--n_head"], "other.pt": ["c_attn", "encoder.conv.weight"],
        "lacks.pt": ["h.1.attn.c_proj.weight"], "heads.pt": ["5 heads"],
        "nan.pt": ["layer 0", "qk", "[0]"], "evil.pt": ["plain tensors"],
        "short.pt": ["plain tensors"], "text.pt": ["plain tensors"], "empty": ["ckpt.pt"], "absent.pt": [],
    }
    for name, words in expected.items():
        with pytest.raises(UserError) as error:
            for checkpoint in open_all([str(tmp_path / name)]):
                head_rows(checkpoint, "cpu")
        message = str(error.value)
        assert all(word in message for word in [*words, name]) and "\n" not in message, message
    assert not os.path.exists("canary-was-run")


def test_the_command_line_itself(tmp_path):
    one_line_exit_2(script("analyze.py", tmp_path / "absent.pt"), "absent.pt")
    save(tmp_path / "a.pt")
    done = script("analyze.py", tmp_path / "a.pt", f"--out_dir={tmp_path / 'out'}")
    assert done.returncode == 0 and "layer 1 ov" in done.stdout, done.stderr
    drawn = script("-m", "scripts.figures", "heads", tmp_path / "out" / "heads.csv")
    assert drawn.stdout.strip().endswith("heads.png")
    sample = script("-m", "scripts.sample", tmp_path / "a.pt", "--tokenizer=byte", "--prompt=abc")
    one_line_exit_2(sample, "vocabulary of 64")


def test_sample_prints_text(train, tmp_path, data_dir):
    train(tmp_path / "a", max_iters=2)
    flags = ["--prompt=def f(", "--max_new_tokens=20", "--num_samples=2"]
    done = script("-m", "scripts.sample", tmp_path / "a", *flags)
    assert done.returncode == 0 and done.stdout.count("def f(") == 2, done.stderr
    assert script("-m", "scripts.sample", tmp_path / "a", *flags).stdout == done.stdout


def test_figure_of_what_is_not_a_heads_csv(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column checkpoint"):
        figures.heads(str(tmp_path / "x.csv"))


def test_the_family_table_reads_what_it_says():
    with pytest.raises(ValueError, match="no attention found"):
        list(attention_layers({"a.b": torch.ones(2)}, 1))
