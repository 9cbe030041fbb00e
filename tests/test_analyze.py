"""analyze.py's numbers against the model's own attention and float64 SVDs; what it writes; what it refuses."""
import csv
import math
import os
import pickle

import pytest
import torch
from conftest import one_line_exit_2, script

import analyze
import figures
from checkpoints import Checkpoint
from families import attention_layers
from model import GPT, init_weights

ARGS = {"vocab_size": 64, "block_size": 16, "n_layer": 2, "n_head": 3, "n_embd": 24, "dropout": 0.0, "bias": True}


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
        with monkeypatch.context() as patch:
            for name, value in {"out_dir": str(tmp_path / "out"), "device": "cpu", **settings}.items():
                patch.setattr(analyze, name, value)
            analyze.main([str(path) for path in paths])
        return [list(csv.DictReader(open(tmp_path / "out" / name))) for name in ("heads.csv", "norms.csv")]
    return go


def test_heads_are_the_models_own(tmp_path):
    """Scores and outputs rebuilt from the extracted heads equal those of the attention module (q k^T without biases)."""
    model = save(tmp_path / "a.pt")
    x = torch.randn(1, 5, 24)
    for layer, block in zip(Checkpoint(str(tmp_path / "a.pt")).attention_layers(), model.transformer.h, strict=True):
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
    assert list(heads[0]) == ["checkpoint", "step", "layer", "head", "product", "d_head", "rank95", "numerical_rank", "stable_rank",
                              "effective_rank", "nuclear", "frobenius", "spectral", "half_sq_norm", "gap", "imbalance", "norm_A", "norm_B",
                              "gap_gaussian"]
    assert [(r["layer"], r["product"], r["head"]) for r in heads] == [(str(i), p, str(h)) for i in (0, 1) for p in ("qk", "ov") for h in range(3)]
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


def test_threshold_names_its_column_and_exact_agrees(tmp_path, run):
    save(tmp_path / "a.pt")
    fast, _ = run(tmp_path / "a.pt", threshold=0.9)
    exact, _ = run(tmp_path / "a.pt", threshold=0.9, exact=True)
    assert "rank90" in fast[0] and "rank95" not in fast[0]
    assert [r["rank90"] for r in fast] == [r["rank90"] for r in exact]


def test_norms_and_cosines_over_a_run(tmp_path, run):
    folder = tmp_path / "run"
    folder.mkdir()
    models = [save(folder / f"step_000000{i}.pt", seed=i, step=i) for i in (1, 2)]
    save(folder / "ckpt.pt", seed=2, step=2)  # the same step as the last snapshot: left out
    heads, norms = run(folder)
    assert list(norms[0]) == ["checkpoint", "step", "group", "norm", "parameters", "cos_prev"]
    assert {r["checkpoint"] for r in heads} == {str(folder / "step_0000001.pt"), str(folder / "step_0000002.pt")}
    flat = [torch.cat([p.detach().double().flatten() for p in m.parameters()]) for m in models]
    rows = {(r["step"], r["group"]): r for r in norms}
    assert {g for _, g in rows} == {"all", "attn", "mlp", "embed", "layer_0", "layer_1"}
    for i, step in enumerate("12"):
        assert float(rows[step, "all"]["norm"]) == pytest.approx(flat[i].norm().item())
        assert int(rows[step, "all"]["parameters"]) == len(flat[i])  # the tied head counts once
        attn = [p for name, p in models[i].named_parameters() if ".attn." in name]
        assert float(rows[step, "attn"]["norm"]) == pytest.approx(math.sqrt(sum(float(p.detach().double().pow(2).sum()) for p in attn)))
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
    run(tmp_path / "one", tmp_path / "two")
    out = capsys.readouterr().out
    assert "side by side" in out and "attn_wd" in out and "6.25" in out and "heads.png" in out
    save(tmp_path / "one" / "step_0000003.pt", seed=3, step=3)
    run(tmp_path / "one" / "step_0000003.pt", tmp_path / "two" / "ckpt.pt", tmp_path / "two")
    assert capsys.readouterr().out.count("6.25") == 1  # the end's perplexity does not stand beside an earlier snapshot; no run twice
    assert os.path.getsize(tmp_path / "out" / "heads.png") > 10_000 and os.path.getsize(tmp_path / "out" / "heads.pdf") > 5_000


def test_other_state_dicts(tmp_path, run):
    """Bare, under torch.compile's and DDP's prefixes, in half precision: the same rows."""
    model = save(tmp_path / "a.pt")
    want, _ = run(tmp_path / "a.pt")
    state = {f"module._orig_mod.{name}": p for name, p in model.state_dict().items()}
    torch.save(state, tmp_path / "bare.pt")
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)  # the mask of an old nanoGPT
    torch.save({"model": state, "model_args": ARGS}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for got in (run(tmp_path / "bare.pt", n_head=3)[0], run(tmp_path / "old.pt")[0]):
        assert [r["nuclear"] for r in got] == [r["nuclear"] for r in want]
    torch.save({"model": {name: p.bfloat16() for name, p in state.items()}, "model_args": ARGS}, tmp_path / "half.pt")
    half, _ = run(tmp_path / "half.pt")
    assert all(float(a["nuclear"]) == pytest.approx(float(b["nuclear"]), rel=0.02) for a, b in zip(half, want))


class Canary:
    def __reduce__(self):
        return os.system, ("touch canary-was-run",)


def test_what_is_refused(tmp_path):
    model = save(tmp_path / "a.pt")
    state = model.state_dict()
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"model": {"encoder.conv.weight": torch.ones(3, 3)}, "model_args": ARGS}, tmp_path / "other.pt")
    torch.save({"model": {k: v for k, v in state.items() if "h.1.attn.c_proj.weight" not in k}, "model_args": ARGS}, tmp_path / "lacks.pt")
    torch.save({"model": state, "model_args": {**ARGS, "n_head": 5}}, tmp_path / "heads.pt")
    sick = {k: v.clone() for k, v in state.items()}
    sick["transformer.h.0.attn.c_attn.weight"][0, 0] = math.nan
    torch.save({"model": sick, "model_args": ARGS}, tmp_path / "nan.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": Canary()}))
    (tmp_path / "short.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, words in (("bare.pt", ["--n_head"]), ("other.pt", ["c_attn", "encoder.conv.weight"]), ("lacks.pt", ["h.1.attn.c_proj.weight"]),
                        ("heads.pt", ["5 heads"]), ("nan.pt", ["layer 0", "qk", "[0]"]), ("evil.pt", ["plain tensors"]),
                        ("short.pt", ["plain tensors"]), ("text.pt", ["plain tensors"]), ("empty", ["ckpt.pt"]), ("absent.pt", ["absent.pt"])):
        with pytest.raises(ValueError) as error:
            for checkpoint in analyze.open_all([str(tmp_path / name)]):
                analyze.head_rows(checkpoint, "cpu")
        message = str(error.value)
        assert all(word in message for word in [*words, name]) and "\n" not in message, message
    assert not os.path.exists("canary-was-run")


def test_the_command_line_itself(tmp_path):
    one_line_exit_2(script("analyze.py", tmp_path / "absent.pt"), "absent.pt")
    one_line_exit_2(script("analyze.py"), "python analyze.py")
    save(tmp_path / "a.pt")
    one_line_exit_2(script("analyze.py", tmp_path / "a.pt", "--threshold=2"), "threshold 2")
    done = script("analyze.py", tmp_path / "a.pt", f"--out_dir={tmp_path / 'out'}")
    assert done.returncode == 0 and "layer 1 ov" in done.stdout, done.stderr
    assert script("figures.py", "heads", tmp_path / "out" / "heads.csv").stdout.strip().endswith("heads.png")
    one_line_exit_2(script("figures.py", "heads", tmp_path / "a.csv"), "a.csv")
    one_line_exit_2(script("sample.py", tmp_path / "a.pt", "--tokenizer=byte", "--prompt=abc"), "vocabulary of 64")


def test_sample_prints_text(train, tmp_path, data_dir):
    train(tmp_path / "a", max_iters=2)
    done = script("sample.py", tmp_path / "a", "--prompt=def f(", "--max_new_tokens=20", "--num_samples=2")
    assert done.returncode == 0 and done.stdout.count("def f(") == 2, done.stderr
    assert script("sample.py", tmp_path / "a", "--prompt=def f(", "--max_new_tokens=20", "--num_samples=2").stdout == done.stdout


def test_figure_of_what_is_not_a_heads_csv(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column checkpoint"):
        figures.heads(str(tmp_path / "x.csv"))


def test_the_family_table_reads_what_it_says():
    with pytest.raises(ValueError, match="no attention found"):
        list(attention_layers({"a.b": torch.ones(2)}, 1))
