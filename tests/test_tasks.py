"""Synthetic tasks and what train_lm.py does with them; attention-only models; the figure of recall."""
import json

import numpy as np
import pytest
import torch
from conftest import assert_same_weights, load, one_line_exit_2, script, signalled_in_step

from model import GPT, decay_groups, init_weights, load_gpt
from nanorank import tasks
from nanorank.errors import UserError
from nanorank.figures import theory as figures
from nanorank.restore import saved_args
from nanorank.tasks import KEYS, TASKS, VALUES, TaskSplit

RECALL = {"dataset": "recall", "mlp": False, "n_head": 1, "block_size": 16, "batch_size": 16,
          "total_batch_size": 32}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(tasks, "EVAL_ROWS", 300)


def test_recall_is_answerable_and_only_answers_count():
    """Distinct keys with values, then queries; a query's target is the value of its key; no others."""
    x, y = TaskSplit("recall", "train", 32).sample(seed=7, start=3, count=200)
    assert x.shape == y.shape == (200, 32) and x.dtype == y.dtype == np.int64
    assert ((y >= 0).sum(1) == 8).all()
    assert (np.flatnonzero((y >= 0).any(0)) == np.arange(16, 32, 2)).all()
    for row, targets in zip(x, y):
        table = dict(zip(row[0:16:2], row[1:16:2]))
        assert len(table) == 8 and max(table) < KEYS
        assert KEYS <= min(table.values()) and max(table.values()) < KEYS + VALUES
        assert [table[q] for q in row[16::2]] == list(targets[16::2]) == list(row[17::2])
    # 200 rows * 8 over 16 keys and over 16 values: 100 each, standard deviations 7 and 10
    counts = np.bincount(x[:, :16].ravel(), minlength=KEYS + VALUES)
    assert len(counts) == TASKS["recall"][0] and counts.min() > 60 and counts.max() < 140


def test_a_row_is_a_function_of_seed_and_number():
    split = TaskSplit("recall", "train", 16)
    whole = split.sample(5, 100, 64)
    pieces = [split.sample(5, 100 + i, 8) for i in range(0, 64, 8)]
    assert all(np.array_equal(a, np.concatenate(b)) for a, b in zip(whole, zip(*pieces)))
    assert not np.array_equal(whole[0], split.sample(6, 100, 64)[0])
    assert len(np.unique(whole[0], axis=0)) == 64
    x, y = TaskSplit("recall", "val", 16).rows(np.array([4, -1, 4095]))
    assert (y[1] == -1).all() and (y[[0, 2]] >= 0).any()
    assert not np.array_equal(x, TaskSplit("recall", "test", 16).rows(np.array([4, -1, 4095]))[0])


def test_a_block_size_that_does_not_fit_is_refused(tmp_path):
    for block_size in (18, 4 * KEYS + 4):
        with pytest.raises(UserError, match=f"--block_size={block_size}"):
            TaskSplit("recall", "train", block_size)
    options = ["--dataset=recall", "--block_size=18", f"--out_dir={tmp_path}", "--device=cpu"]
    result = script("train_lm.py", *options)
    one_line_exit_2(result, "--block_size=18")


def test_attention_only_models(tmp_path):
    """Attention of both layers and nothing else; saved and loaded; model_args name it only where it is on."""
    model = GPT(64, 16, n_layer=2, n_head=1, n_embd=32, bias=False, mlp=False)
    init_weights(model, 0)
    names = [name for name, _ in model.named_parameters()]
    assert not any("mlp" in name or "ln_2" in name for name in names)
    assert sum("attn" in name for name in names) == 4
    assert [g["name"] for g in decay_groups(model, 1, 2, 3)] == ["attn", "embed", "none"]
    x = torch.randint(64, (2, 16))
    t = model.transformer
    h = t.wte(x) + t.wpe(torch.arange(16))
    for block in t.h:
        h = h + block.attn(block.ln_1(h))
    assert torch.equal(model(x)[0], model.lm_head(t.ln_f(h)))
    again = load_gpt({"model": model.state_dict(), "model_args": model.args})
    assert torch.equal(again(x)[0], model(x)[0]) and model.args["mlp"] is False
    assert "mlp" not in saved_args(GPT(64, 16, 1, 1, 32).args)


def test_twenty_steps_are_ten_and_ten(train, tmp_path):
    """Bitwise, accumulation and accuracies too; and two micro-batches are one batch."""
    straight = train(tmp_path / "straight", **RECALL)
    with signalled_in_step(10), pytest.raises(SystemExit):
        train(tmp_path / "resumed", **RECALL)
    assert load(tmp_path / "resumed" / "ckpt.pt")["iter_num"] == 10
    resumed = train(tmp_path / "resumed", **RECALL, init_from="resume")
    assert_same_weights(tmp_path / "straight" / "ckpt.pt", tmp_path / "resumed" / "ckpt.pt")
    assert straight["test_acc"] == resumed["test_acc"]
    assert straight["test_loss"] == resumed["test_loss"]
    train(tmp_path / "one", **{**RECALL, "batch_size": 32})
    assert_same_weights(tmp_path / "straight" / "ckpt.pt", tmp_path / "one" / "ckpt.pt", tolerance=1e-5)


def test_loss_and_accuracy_are_those_of_the_saved_model(train, tmp_path):
    result = train(tmp_path, **RECALL, learning_rate=3e-3, max_iters=40)
    x, y = map(torch.tensor, TaskSplit("recall", "test", 16).rows(np.arange(300)))
    logits = load_gpt(load(tmp_path / "ckpt.pt"))(x)[0][y >= 0]
    y = y[y >= 0]
    assert result["test_acc"] == pytest.approx((logits.argmax(-1) == y).double().mean().item(), abs=1e-4)
    assert result["test_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"val_acc", "test_acc", "attn_imbalance_ov"} <= {key for line in lines for key in line}
    assert result["mlp"] is False


@pytest.mark.slow
def test_recall_is_drawn_from_run_folders(train, tmp_path):
    for wd in (0.0, 1.0):
        train(tmp_path / str(wd), **RECALL, attn_wd=wd, max_iters=10)
    assert figures.recall(str(tmp_path)) == str(tmp_path / "recall.png")
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    one_line_exit_2(script("-m", "scripts.figures", "recall", tmp_path / "0.0"), "no finished run")


@pytest.mark.slow
def test_recall_is_learned_without_decay(tmp_path):
    result = script("train_lm.py", "config/recall.py", f"--out_dir={tmp_path}", "--max_iters=1800")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "result.json").read_text())["test_acc"] > 0.99
