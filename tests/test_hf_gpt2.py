"""
GPT-2 in Hugging Face's format as a start: logits against transformers', every way that it can be saved.
"""
import json

import pytest
import torch
from conftest import REPO, TINY, flags, load, one_line_exit_2, refused, script

from model import load_gpt
from nanorank.hf_gpt2 import TAKES, open_init

transformers = pytest.importorskip("transformers")

SHAPE = {"vocab_size": 257, "n_positions": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}


def gpt2(activation="gelu", **config):
    """A random GPT2LMHeadModel whose biases and norms are not at their initial values, in eval mode."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**SHAPE, "activation_function": activation, **config})
    model = transformers.GPT2LMHeadModel(config)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def logits_of(model, idx):
    with torch.no_grad():
        return model(idx).logits if hasattr(model, "config") else model(idx)[0]


def largest_difference(folder, theirs):
    """Between the logits of transformers' model and of ours from this folder."""
    _, ckpt = open_init(str(folder))
    idx = torch.randint(257, (3, 64))
    ours = load_gpt(ckpt).eval()
    return float((logits_of(ours, idx) - logits_of(theirs, idx)).abs().max())


@pytest.mark.parametrize("how", ["safetensors", "bin", "untied", "bare", "shards", "file"])
def test_logits_are_transformers(tmp_path, how):
    theirs = gpt2(tie_word_embeddings=how != "untied")
    folder = tmp_path / "model"
    if how == "bare":  # openai-community/gpt2 has no prefix transformer. and keeps its causal masks
        state = {name.removeprefix("transformer."): p for name, p in theirs.state_dict().items()}
        del state["lm_head.weight"]
        state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        theirs.config.save_pretrained(folder)
        torch.save(state, folder / "pytorch_model.bin")
    elif how == "bin":
        theirs.config.save_pretrained(folder)
        torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    else:
        theirs.save_pretrained(folder, max_shard_size="40KB" if how == "shards" else "5GB")
    if how == "shards":
        assert len(list(folder.glob("*.safetensors"))) > 1
    path = folder / "model.safetensors" if how == "file" else folder

    assert largest_difference(path, theirs) < 2e-5
    args = open_init(str(path))[1]["model_args"]
    assert args["tied"] == (how != "untied") and args["vocab_size"] == 257 and args["block_size"] == 64


def test_gelu_new_is_named(tmp_path, capsys):
    """Their tanh formula against our exact gelu: near, and said."""
    theirs = gpt2("gelu_new")
    theirs.save_pretrained(tmp_path)
    assert 0 < largest_difference(tmp_path, theirs) < 0.05
    out = capsys.readouterr().out.strip()
    assert "gelu_new" in out and "0.0005" in out and len(out.splitlines()) == 1
    x = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    exact, tanh = [torch.nn.functional.gelu(x, approximate=kind) for kind in ("none", "tanh")]
    assert 0.0004 < float((exact - tanh).abs().max()) < 0.0005


@pytest.mark.parametrize("config, word", [
    ({"activation_function": "relu"}, "activation_function=relu"),
    ({"n_inner": 100}, "n_inner=100"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ({"scale_attn_weights": False}, "scale_attn_weights=False"),
    ({"model_type": "llama"}, "a llama of Hugging Face"),
    ({"n_head": "two"}, "are no counts: n_layer=2, n_head=two"),
    ({"n_layer": 3}, "not a GPT checkpoint"),
    ({"n_layer": 10**9}, "model_args describe more"),
])
def test_what_our_gpt_is_not_is_refused(tmp_path, config, word):
    gpt2().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, **config}))
    with refused(word):
        load_gpt(open_init(str(tmp_path))[1])


def test_training_goes_on_from_it(tmp_path, data_dir):
    """No flag tells the shape: it is the checkpoint's, in the settings, in ckpt.pt and in result.json."""
    gpt2().save_pretrained(tmp_path / "hf")
    settings = {name: x for name, x in TINY.items() if name not in ("n_layer", "n_head", "n_embd")}
    settings = {**settings, "data_dir": data_dir, "out_dir": tmp_path / "run", "init_from": tmp_path / "hf"}
    run = script("train_lm.py", *flags(**{**settings, "max_iters": 2}))
    assert run.returncode == 0, run.stderr
    assert "n_layer=2" in run.stdout and "bias=True" in run.stdout and "n_layer=12" not in run.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    ckpt = load(tmp_path / "run" / "ckpt.pt")
    for found in (result, ckpt["config"]):
        assert (found["n_layer"], found["n_head"], found["n_embd"], found["bias"]) == (2, 2, 32, True)
    assert ckpt["model"]["transformer.h.0.attn.c_attn.weight"].shape == (96, 32)
    again = script("train_lm.py", *flags(**{**settings, "init_from": "resume", "max_iters": 4}))
    assert again.returncode == 0, again.stderr
    assert load(tmp_path / "run" / "ckpt.pt")["iter_num"] == 4


def test_names_that_are_no_checkpoint(tmp_path):
    """One line: what is taken, and the hub's name of GPT-2."""
    start = script("train_lm.py", "--init_from=gpt2", f"--out_dir={tmp_path / 'a'}", "--device=cpu")
    one_line_exit_2(start, "gpt2: no such file or folder", "openai-community/gpt2")
    one_line_exit_2(script("analyze.py", "gpt2"), "gpt2: no such file or folder", "openai-community/gpt2")
    for path in (tmp_path, tmp_path / "nowhere.pt", REPO / "docs"):
        with refused(str(path), TAKES):
            open_init(str(path))
