"""
Runs of train_lm.py against each other: straight, resumed, killed, on two processes; what it refuses.
"""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    REPO,
    TINY,
    assert_same_weights,
    command,
    environment,
    flags,
    load,
    log_lines,
    logged,
    one_line_exit_2,
    refused,
    script,
    signalled_in_step,
    torchrun,
    write_data,
)

import train_lm
from model import load_gpt
from nanorank.run_settings import parse_steps
from nanorank.tokens import TokenSplit


def test_import_set_main(train, tmp_path):
    result = train(tmp_path / "a", max_iters=2)
    assert result["steps"] == 2 and result["tokens"] == 2 * 4 * 32 and result["attn_wd"] == 1.0
    assert result["test_ppl"] == pytest.approx(math.exp(result["test_loss"]))


def test_data_without_a_test_split(train, tmp_path, data_dir):
    shutil.copytree(data_dir / "text", tmp_path / "data" / "text")
    meta = json.loads((tmp_path / "data" / "text" / "meta.json").read_text())
    meta["splits"]["test"] = {"tokens": 0, "files": []}
    (tmp_path / "data" / "text" / "meta.json").write_text(json.dumps(meta))
    result = train(tmp_path / "a", max_iters=1, data_dir=str(tmp_path / "data"))
    assert result["val_loss"] > 0 and not any(name.startswith("test_") for name in result)
    train(tmp_path / "b", eval_only=True, init_from=str(tmp_path / "a"), data_dir=str(tmp_path / "data"))
    assert "test_loss" not in json.loads((tmp_path / "b" / "eval.json").read_text())


def test_losses_are_those_of_the_saved_model(train, tmp_path, data_dir):
    """Train loss of the last step and whole-split test loss, computed again from scratch."""
    result = train(tmp_path, max_iters=5, log_interval=1, snapshot_steps="4")
    x, y = TokenSplit(str(data_dir / "text"), "train", 32).sample(train_lm.seed, 4 * 4, 4)
    loss = load_gpt(load(tmp_path / "step_0000004.pt"))(torch.tensor(x), torch.tensor(y))[1].item()
    assert logged(tmp_path, "train_loss")[4] == pytest.approx(loss, rel=1e-6)

    tokens = torch.tensor(list((data_dir / "text" / "test_00000.bin").read_bytes()[::2]))
    model, total = load_gpt(load(tmp_path / "ckpt.pt")), 0.0
    for i in range(0, len(tokens) - 1, 32):
        x, y = tokens[i:i + 32], tokens[i + 1:i + 33]
        logits = model(x[None, :len(y)])[0][0]
        total += torch.nn.functional.cross_entropy(logits, y, reduction="sum").item()
    assert result["test_loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon"])
def test_twenty_steps_are_ten_and_ten(train, tmp_path, optimizer):
    """Bitwise, with dropout and accumulation: weights, optimizer state, log and result."""
    same = {"optimizer": optimizer, "dropout": 0.1, "total_batch_size": 8}
    straight = train(tmp_path / "straight", **same)
    with signalled_in_step(10), pytest.raises(SystemExit) as stop:
        train(tmp_path / "resumed", **same)
    assert stop.value.code == 128 + signal.SIGTERM
    assert load(tmp_path / "resumed" / "ckpt.pt")["iter_num"] == 10
    resumed = train(tmp_path / "resumed", **same, init_from="resume")

    assert_same_weights(tmp_path / "straight" / "ckpt.pt", tmp_path / "resumed" / "ckpt.pt")
    a, b = [load(tmp_path / name / "ckpt.pt") for name in ("straight", "resumed")]
    assert str(a["optimizer"]) == str(b["optimizer"])
    for key in ("val_loss", "test_loss", "best_val_loss", "decay_time_constants"):
        assert straight[key] == resumed[key]
    assert log_lines(tmp_path / "straight") == log_lines(tmp_path / "resumed")


def test_snapshots_change_nothing(train, tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b", snapshot_steps="10")
    a, b = [load(tmp_path / name / "ckpt.pt") for name in ("a", "b")]
    assert_same_weights(tmp_path / "a" / "ckpt.pt", tmp_path / "b" / "ckpt.pt")
    assert str(a["optimizer"]) == str(b["optimizer"])


def tiny(out_dir, data_dir, processes=0, **settings):
    """The command line of a tiny run, under torchrun where processes are given."""
    launcher = torchrun(processes) if processes else [sys.executable]
    settings = {**TINY, "data_dir": data_dir, "out_dir": out_dir, **settings}
    return [*launcher, "train_lm.py", *flags(**settings)]


def test_two_processes_are_one(train, tmp_path, data_dir):
    """Gradients accumulated and averaged over two gloo processes, evaluation shared: one process to 1e-6."""
    same = {"total_batch_size": 16, "learning_rate": 1e-3}  # the paper's peak
    one = train(tmp_path / "one", batch_size=8, **same)
    run = command(*tiny(tmp_path / "two", data_dir, processes=2, batch_size=4, **same))
    assert run.returncode == 0, run.stderr[-2000:]
    assert "batch: 4 * 2 processes * 2 micro-steps = 16" in run.stdout
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert_same_weights(tmp_path / "one" / "ckpt.pt", tmp_path / "two" / "ckpt.pt", tolerance=1e-6)
    for key in ("val_loss", "test_loss", "best_val_loss"):
        assert one[key] == pytest.approx(two[key], abs=1e-6)
    for a, b in zip(log_lines(tmp_path / "one"), log_lines(tmp_path / "two"), strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5)


@pytest.mark.slow
def test_the_demo_on_two_processes_from_the_command_line(tmp_path, data_dir):
    """config/demo.py is written for one process: its batch is split, its loss is that of one."""
    demo = ["train_lm.py", "config/demo.py", "--dataset=text", f"--data_dir={data_dir}", "--device=cpu",
            "--max_iters=2", "--warmup_iters=1", "--eval_iters=1", "--snapshot_steps="]
    losses = []
    for launcher in ([sys.executable], torchrun(2)):
        out_dir = tmp_path / str(len(launcher))
        run = command(*launcher, *demo, f"--out_dir={out_dir}")
        assert run.returncode == 0, run.stderr[-2000:]
        losses.append(json.loads((out_dir / "result.json").read_text())["test_loss"])
    assert "batch: 8 * 2 processes * 1 micro-steps = 16" in run.stdout
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("flag, word", [("--atn_wd=0", "did you mean attn_wd"), ("--dtype=f8", "--dtype=f8")])
def test_torchrun_says_an_error_once(tmp_path, flag, word):
    """Found by the configurator, and by the run."""
    result = command(*torchrun(2), "train_lm.py", f"--out_dir={tmp_path}", "--device=cpu", flag)
    said = [line for line in result.stderr.splitlines() if line.startswith("train_lm.py: ")]
    assert result.returncode != 0 and len(said) == 1 and word in said[0], result.stderr


def start_and_signal(args, number, delay_after, word="step 4:"):
    """Starts a run, waits until it prints `word` and a moment more, sends the signal.

    Returns (exit status, output).
    """
    process = subprocess.Popen(args, cwd=REPO, env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    out = ""
    for line in process.stdout:
        out += line
        if word in line:
            break
    time.sleep(delay_after)
    process.send_signal(number)
    out += process.communicate(timeout=120)[0]
    return process.returncode, out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, data_dir, number):
    args = tiny(tmp_path / "a", data_dir, max_iters=100_000, eval_interval=100_000)
    code, out = start_and_signal(args, number, 0.1)
    assert code == 128 + number and "--init_from=resume" in out and "Traceback" not in out
    step = load(tmp_path / "a" / "ckpt.pt")["iter_num"]
    assert f"at step {step}," in out and step > 4 and not (tmp_path / "a" / "result.json").exists()


def test_max_iters_0_evaluates_saves_ends(train, tmp_path):
    result = train(tmp_path, max_iters=0)
    assert result["steps"] == 0 and result["test_loss"] == pytest.approx(math.log(320), abs=0.1)
    ckpt = load(tmp_path / "ckpt.pt")
    assert ckpt["iter_num"] == 0 and ckpt["best_val_loss"] < 7


def test_eval_only_changes_nothing(train, tmp_path):
    with refused("nothing to evaluate"):
        train(tmp_path / "a", eval_only=True)
    result = train(tmp_path / "a")
    before = (tmp_path / "a" / "ckpt.pt").read_bytes()
    train(tmp_path / "b", init_from=str(tmp_path / "a" / "ckpt.pt"), eval_only=True)
    assert sorted(os.listdir(tmp_path / "b")) == ["eval.json"]
    train(tmp_path / "a", eval_only=True)  # the run that is there
    train(tmp_path / "a", init_from="resume", eval_only=True)
    assert (tmp_path / "a" / "ckpt.pt").read_bytes() == before
    for name in ("a", "b"):
        assert json.loads((tmp_path / name / "eval.json").read_text())["test_loss"] == result["test_loss"]


def test_init_from_path_takes_weights_and_starts_at_step_0(train, tmp_path):
    train(tmp_path / "a", max_iters=3)
    old = load(tmp_path / "a" / "ckpt.pt")
    state = {f"_orig_mod.{name}": p for name, p in old["model"].items()}  # as nanoGPT leaves them
    torch.save({"model": state, "model_args": old["model_args"], "iter_num": 3}, tmp_path / "nanogpt.pt")
    start = {"max_iters": 0, "init_from": str(tmp_path / "nanogpt.pt")}
    with refused("nanogpt.pt", "--n_layer=7", "--n_layer=2"):  # another model is asked for
        train(tmp_path / "b", **start, n_layer=7)
    # a default asks for nothing: the settings are the model's, and the same ones resume the run
    with pytest.MonkeyPatch.context() as patch:
        for name in ("n_layer", "n_head", "n_embd"):
            patch.delitem(TINY, name)
        train(tmp_path / "b", **start)
        train(tmp_path / "b", **{**start, "init_from": "resume"})
    assert_same_weights(tmp_path / "a" / "ckpt.pt", tmp_path / "b" / "ckpt.pt")
    b = json.loads((tmp_path / "b" / "result.json").read_text())
    b_ckpt = load(tmp_path / "b" / "ckpt.pt")
    for found in (b, b_ckpt["config"], b_ckpt["model_args"]):
        assert (found["n_layer"], found["n_head"], found["n_embd"]) == (2, 2, 32)
    assert train_lm.n_layer == 12 and b_ckpt["overruled"]["n_layer"] == 12
    with refused("n_layer was 2, is 3"):
        train(tmp_path / "b", init_from="resume", n_layer=3)
    # a run folder; a shorter context
    train(tmp_path / "c", max_iters=1, init_from=str(tmp_path / "a"), block_size=16)
    assert json.loads((tmp_path / "c" / "result.json").read_text())["block_size"] == 16


def is_plain(x):
    if isinstance(x, dict):
        return all(is_plain(y) for pair in x.items() for y in pair)
    if isinstance(x, (list, tuple)):
        return all(map(is_plain, x))
    return type(x) in (int, float, str, bool, type(None), torch.Tensor)


def test_the_checkpoint_is_nanogpts_dict_of_plain_things(train, tmp_path):
    train(tmp_path, snapshot_steps="every:10")
    ckpt = load(tmp_path / "ckpt.pt")
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"} <= ckpt.keys()
    nanogpts = {"vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias"}
    assert set(ckpt["model_args"]) == nanogpts
    assert is_plain(ckpt)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [f"step_00000{i}0.pt" for i in (0, 1, 2)]
    assert set(load(tmp_path / "step_0000010.pt")) == {"model", "model_args", "iter_num", "config"}


def test_the_log_and_the_copy_of_the_source(train, tmp_path):
    train(tmp_path)
    lines = log_lines(tmp_path, without=())
    assert all(isinstance(line["step"], int) for line in lines)
    assert {"train_loss", "lr", "grad_norm", "tokens_per_s", "mfu", "val_loss", "attn_rank95_qk",
            "attn_rank95_ov", "attn_gap_qk", "attn_imbalance_ov", "norm_all", "norm_attn", "layer1_rank95_qk",
            "test_ppl"} <= {key for line in lines for key in line}
    source = tmp_path / "source"
    assert (source / "train_lm.py").read_text() == (REPO / "train_lm.py").read_text()
    code = [*REPO.glob("*.py"), *(REPO / "nanorank").rglob("*.py"), *(REPO / "scripts").glob("*.py")]
    code += (REPO / "nanorank").rglob("*.html")  # the report's template
    assert {path.relative_to(source) for path in source.rglob("*.*")} == {p.relative_to(REPO) for p in code}


def test_wandb_offline(train, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path, max_iters=3, wandb_log=True)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb")) and load(tmp_path / "ckpt.pt")["wandb_id"]


def test_decay_of_attention_lowers_its_rank_and_nothing_else_differs(train, tmp_path):
    """The paper's effect, small: same data and init, attn_wd 0 against 20, 3.5 decay time constants."""
    ranks = {}
    for wd in (0.0, 20.0):
        result = train(tmp_path / str(wd), max_iters=60, attn_wd=wd, learning_rate=5e-3, min_lr=5e-4)
        ranks[wd] = logged(tmp_path / str(wd), "attn_rank95_qk")
    assert result["decay_time_constants"] > 3
    assert ranks[0.0][0] == ranks[20.0][0] and ranks[20.0][-1] < 0.7 * ranks[0.0][-1]

# ----------------------------------------------------------- settings, schedule

def test_defaults_are_the_papers():
    """Kobayashi et al. 2024: context 756, batch 128, eps, betas, clipping, the schedule's three points."""
    published = {"block_size": 756, "total_batch_size": 128, "eps": 1e-8, "beta1": 0.9, "beta2": 0.95,
                 "grad_clip": 1.0, "learning_rate": 1e-3, "warmup_iters": 8000, "optimizer": "adamw",
                 "dataset": "pile"}
    assert {name: getattr(train_lm, name) for name in published} == published
    lr = train_lm.get_lr
    assert lr(0) == 1e-6 and lr(8000) == 1e-3 and lr(4000) == pytest.approx((1e-6 + 1e-3) / 2)
    middle = (8000 + train_lm.max_iters) // 2
    assert lr(train_lm.max_iters) == pytest.approx(1e-4) and lr(middle) == pytest.approx(5.5e-4)

    help_lines = script("train_lm.py", "--help").stdout.splitlines()
    for name in (*published, "attn_wd"):
        line = next(line for line in help_lines if line.startswith(f"  --{name}="))
        assert ("paper" in line) == (name in published)


def test_min_lr_is_a_tenth_of_the_peak(train, tmp_path):
    result = train(tmp_path / "a", learning_rate=1e-5, warmup_iters=1, log_interval=1)
    lr = logged(tmp_path / "a", "lr")
    assert result["min_lr"] == 1e-5 / 10 and max(lr) == lr[1] == 1e-5 and lr[-1] < 2e-6
    assert load(tmp_path / "a" / "ckpt.pt")["config"]["min_lr"] == 1e-5 / 10
    for min_lr in (0.0, 5e-6):
        result = train(tmp_path / str(min_lr), learning_rate=1e-5, min_lr=min_lr, max_iters=1)
        assert result["min_lr"] == min_lr


@pytest.mark.slow
def test_a_run_begun_with_another_min_lr_goes_on_with_it(train, tmp_path, capsys):
    """As runs from when its default was 1e-4: the command that does not name it resumes them to the bit."""
    straight = train(tmp_path / "a", min_lr=1e-4)
    with signalled_in_step(10), pytest.raises(SystemExit):
        train(tmp_path / "b", min_lr=1e-4)
    resumed = train(tmp_path / "b", init_from="auto")
    assert straight["min_lr"] == resumed["min_lr"] == 1e-4
    assert_same_weights(tmp_path / "a" / "ckpt.pt", tmp_path / "b" / "ckpt.pt")
    train(tmp_path / "b", init_from="resume", max_iters=21, learning_rate=2e-2)
    assert "min_lr was 0.0001, is 0.002" in capsys.readouterr().out


@pytest.mark.parametrize("text, steps", [
    ("", set()),
    ("3,7", {3, 7}),
    ("every:10", {0, 10, 20, 25}),
    ("log:3", {0, 1, 5, 25}),
])
def test_snapshot_steps(text, steps):
    assert parse_steps(text, 25) == steps


@pytest.mark.parametrize("settings, word", [
    ({"dataset": "nowhere"}, "prepare_pile.py --source=YOUR_TEXT --dataset=nowhere"),
    ({"device": "cuda:77"}, "--device=cuda:77"),
    ({"device": "toaster"}, "--device=toaster"),
    ({"device": "meta"}, "--device=meta"),
    ({"dtype": "float8"}, "--dtype=float8"),
    ({"dtype": "float16"}, "--dtype=float16"),
    ({"compile": "perhaps"}, "--compile=perhaps"),
    ({"optimizer": "lion"}, "--optimizer=lion"),
    ({"init_from": "resume"}, "ckpt.pt"),
    ({"init_from": "nowhere.pt"}, "nowhere.pt"),
    ({"snapshot_steps": "often"}, "--snapshot_steps=often"),
    ({"snapshot_steps": "every:0"}, "--snapshot_steps=every:0"),
    ({"snapshot_steps": "-5,7"}, "--snapshot_steps=-5,7"),
    ({"n_embd": 33}, "n_embd=33"),
    ({"n_head": 0}, "n_head=0"),
    ({"vocab_size": 100}, "vocab_size is 100"),
    ({"block_size": 100_000}, "lower --block_size"),
    ({"max_iters": -1}, "--max_iters=-1"),
    ({"log_interval": 0}, "--log_interval=0"),
    ({"batch_size": 0}, "--batch_size=0"),
    ({"total_batch_size": 10**25}, "--total_batch_size"),
    ({"dropout": 1.0}, "--dropout=1.0"),
    ({"warmup_lr": -1.0}, "--warmup_lr=-1.0"),
    ({"min_lr": -0.5}, "--min_lr=-0.5"),
    ({"min_lr": 2e-2}, "--min_lr=0.02 is above --learning_rate=0.01"),
    ({"warmup_lr": 2e-2}, "--warmup_lr=0.02 is above --learning_rate=0.01"),
    ({"beta2": 1.0}, "--beta2=1.0"),
])
def test_wrong_settings_are_user_errors(train, tmp_path, settings, word):
    with refused(word):
        train(tmp_path / "a", **settings)


def test_the_command_line_itself(tmp_path):
    result = script("train_lm.py", "--dataset=nowhere", f"--out_dir={tmp_path}")
    one_line_exit_2(result, "prepare_pile.py --source=YOUR_TEXT --dataset=nowhere")
    one_line_exit_2(script("train_lm.py", "--atn_wd=0"), "did you mean attn_wd")


def test_a_run_is_not_overwritten_or_resumed_as_another(train, tmp_path):
    out_dir = tmp_path / "a"
    train(out_dir, max_iters=2)
    before = (out_dir / "ckpt.pt").read_bytes()
    splits = {split: [list(range(i, 200)) * 20] for i, split in enumerate(("train", "val", "test"))}
    other = write_data(tmp_path / "data" / "text", splits).parent
    for settings, word in (
        ({}, "--overwrite"),
        ({"init_from": str(out_dir / "ckpt.pt")}, "--overwrite"),
        ({"init_from": "auto", "attn_wd": 9.0}, "attn_wd was 1.0, is 9.0"),
        ({"init_from": "resume", "n_layer": 3}, "n_layer was 2, is 3"),
        ({"init_from": "resume", "seed": 2}, "seed was 1337, is 2"),
        ({"init_from": "resume", "max_iters": 1}, "is at step 2, beyond --max_iters=1: raise that"),
        ({"init_from": "auto", "max_iters": 1}, "is at step 2, beyond --max_iters=1: raise that"),
        ({"init_from": "resume", "data_dir": str(other)}, "data on disk"),
    ):
        with refused(word):
            train(out_dir, **{"max_iters": 2, **settings})
    assert (out_dir / "ckpt.pt").read_bytes() == before

    (out_dir / "step_0000002.pt").write_bytes(b"of the old run")
    train(out_dir, max_iters=3, overwrite=True)
    assert load(out_dir / "ckpt.pt")["iter_num"] == 3 and not list(out_dir.glob("step_*"))


def sum_lr(steps, **settings):
    """The sum of the learning rates of these steps under other settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(train_lm, name, value)
        return sum(train_lm.get_lr(step) for step in steps)


def test_resuming_with_other_hyperparameters_takes_them_and_says_so(train, tmp_path, capsys):
    train(tmp_path / "a", max_iters=10, min_lr=1e-4)
    new = {"max_iters": 12, "min_lr": 1e-3}
    result = train(tmp_path / "a", init_from="resume", attn_wd=3.0, beta1=0.5, **new)
    assert "attn_wd was 1.0, is 3.0" in capsys.readouterr().out
    same = {"warmup_iters": TINY["warmup_iters"], "learning_rate": TINY["learning_rate"]}
    before = sum_lr(range(10), max_iters=10, min_lr=1e-4, **same)
    after = sum_lr((10, 11), **new, **same)
    assert result["decay_time_constants"] == pytest.approx(before * 1.0 + after * 3.0)
    groups = load(tmp_path / "a" / "ckpt.pt")["optimizer"]["param_groups"]
    assert {group["betas"][0] for group in groups} == {0.5}

# ------------------------------------------------------------------- not finite

def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_saved(train, tmp_path, capsys, monkeypatch):
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def infinite(*args):
        steps.append(1)
        norm = clip(*args)
        return norm + math.inf if len(steps) == 13 else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, eval_interval=1)
    assert stop.value.code == 1
    assert "gradient norm inf at step 12 on process 0" in capsys.readouterr().err
    assert load(tmp_path / "ckpt.pt")["iter_num"] == 12
    log = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in log and "Infinity" not in log


def test_a_hopeless_loss_still_ends_with_a_result(train, tmp_path):
    result = train(tmp_path, max_iters=1, learning_rate=1e4, min_lr=1e4, warmup_iters=0, rank_interval=0)
    assert result["test_ppl"] is None and result["test_loss"] > 700


def test_a_loss_that_is_not_finite_keeps_the_good_checkpoint(train, tmp_path, capsys, monkeypatch):
    forward, calls = train_lm.GPT.forward, []

    def poisoned(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        calls.append(self.training)
        return logits, loss * math.nan if sum(calls) == 14 else loss

    monkeypatch.setattr(train_lm.GPT, "forward", poisoned)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and len(err.strip().splitlines()) == 1
    assert "loss nan" in err and "at step 13 on process 0" in err
    ckpt = load(tmp_path / "ckpt.pt")
    assert ckpt["iter_num"] == 10 and all(p.isfinite().all() for p in ckpt["model"].values())
