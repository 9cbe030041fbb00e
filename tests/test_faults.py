"""What faults.py tries at length, in short; and faults at chosen moments: two runs in one folder, a full and a read-only disk, clocks, overflow."""
import contextlib
import csv
import itertools
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPO, TINY, assert_same_weights, environment, flags, load, signalled_in_step, torchrun

import train_lm
import train_vit
from nanorank.run import RunLog

PROBE = "mount -t tmpfs -o size=1m probe /mnt && umount /mnt"


def trials(tmp_path, *args):
    """Runs faults.py, in a namespace of its own where that is needed to mount; its rows {trial: row}."""
    alone = ["unshare", "-rm"] if "disk" in args and os.geteuid() else []
    result = subprocess.run([*alone, sys.executable, "tests/faults.py", *args, f"--out_dir={tmp_path}"], cwd=REPO, env=environment(),
                            capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    with open(tmp_path / "faults.csv", newline="") as file:
        rows = {row["trial"]: row for row in csv.DictReader(file)}
    assert all(int(row["survived"]) == int(row["faults"]) > 0 for row in rows.values()), rows
    return rows


def ends(code, call, capsys, *words):
    """Asserts that a call ends with this exit status and one line on stderr that has these words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == code and len(lines) == 1, lines
    for word in words:
        assert str(word) in lines[0], lines[0]

# -------------------------------------------------------------------------------------------------------- random moments

def test_killed_and_on_a_full_disk_at_random_moments(tmp_path):
    probe = PROBE if os.geteuid() == 0 else f"unshare -rm bash -c '{PROBE}'"
    mounts = subprocess.run(["bash", "-c", probe], capture_output=True).returncode == 0
    rows = trials(tmp_path, "train_lm", "prepare_pile", "prepare_imagenet", *["disk"] * mounts, "--kills=2", f"--seed={time.time_ns() % 2**31}")
    assert len(rows) == 3 + 4 * mounts
    if not mounts:
        pytest.skip("kills are survived; a full disk: no small tmpfs can be mounted here, not by unshare -rm either")


@pytest.mark.slow
def test_vit_sweep_signals_and_torchrun(tmp_path):
    assert len(trials(tmp_path, "train_vit", "sweep", "saves", "signals", "torchrun", "--kills=2", f"--seed={time.time_ns() % 2**31}")) == 11

# ------------------------------------------------------------------------------------------------------ one run in a folder

def test_a_second_run_in_the_folder_is_refused(train, tmp_path, data_dir, capsys):
    """While the first lives; evaluation may look on, and a kill leaves nothing in the way."""
    long = {"max_iters": 100_000, "eval_interval": 20}
    process = subprocess.Popen([sys.executable, "train_lm.py", *flags(**{**TINY, **long, "data_dir": data_dir, "out_dir": tmp_path})], cwd=REPO,
                               env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert any("step 40:" in line for line in process.stdout)
        for how in ({"init_from": "auto"}, {"init_from": "scratch", "overwrite": True}):
            ends(2, lambda how=how: train(tmp_path, **long, **how), capsys, "another run is at work in", tmp_path)
        train(tmp_path, **long, eval_only=True)
        assert process.poll() is None and (tmp_path / "eval.json").exists()
    finally:
        process.kill()
        process.communicate()
    at = load(tmp_path / "ckpt.pt")["iter_num"]
    assert train(tmp_path, init_from="resume", max_iters=at + 3)["steps"] == at + 3


def test_killed_before_its_first_save_it_starts_by_the_same_command(train, tmp_path):
    (tmp_path / "log.jsonl").touch()
    assert train(tmp_path, max_iters=1, init_from="auto")["steps"] == 1


def test_resuming_a_finished_run_changes_nothing(train, tmp_path):
    train(tmp_path, max_iters=5)
    before = load(tmp_path / "ckpt.pt")
    train(tmp_path, max_iters=5, init_from="auto")
    after = load(tmp_path / "ckpt.pt")
    assert str(before["optimizer"]) == str(after["optimizer"]) and before["log_bytes"] == after["log_bytes"]

# ------------------------------------------------------------------------------------------------------------------ disks

@contextlib.contextmanager
def largest_file(size):
    """No file of this process may grow beyond so many bytes: to a program it is a quota, an OSError at any write."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_disk_that_refuses_ends_training_and_keeps_what_was_saved(train, tmp_path, capsys):
    straight = train(tmp_path / "straight")
    with signalled_in_step(10), pytest.raises(SystemExit):
        train(tmp_path / "a")
    path = tmp_path / "a" / "ckpt.pt"
    before = path.read_bytes()
    for share in (0.5, 0.999):
        with largest_file(int(share * len(before))):
            ends(1, lambda: train(tmp_path / "a", init_from="resume"), capsys, f"File too large (the file that was there is whole): '{path}'",
                 "train_lm.py: ", "--init_from=resume goes on from the last save")
        assert path.read_bytes() == before and not list(path.parent.glob("*.tmp*"))
    resumed = train(tmp_path / "a", init_from="resume")
    assert_same_weights(tmp_path / "straight" / "ckpt.pt", path)
    assert resumed["test_loss"] == straight["test_loss"]


def test_a_disk_full_from_the_start_leaves_no_run_behind(train, tmp_path, capsys):
    with largest_file(10_000):
        ends(1, lambda: train(tmp_path), capsys, "ckpt.pt" if (tmp_path / "source").exists() else "", "once that is mended")
    assert train(tmp_path, max_iters=1)["steps"] == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_cannot_grow_is_named(tmp_path):
    log = RunLog(tmp_path, 0, {})
    os.unlink(log.path)
    os.symlink("/dev/full", log.path)
    with pytest.raises(OSError, match=f"No space left on device: '{log.path}'"):
        log(1, train_loss=2.0)


def test_a_folder_that_cannot_be_written_to(train, tmp_path, capsys):
    """Refused before anything is loaded or evaluated."""
    train(tmp_path / "a", max_iters=1)
    with read_only(tmp_path):
        for settings in ({"init_from": "resume"}, {"eval_only": True}):
            ends(2, lambda settings=settings: train(tmp_path / "a", **settings), capsys, tmp_path / "a")
        ends(2, lambda: train(tmp_path / "b"), capsys, tmp_path / "b")


@contextlib.contextmanager
def read_only(folder):
    """A folder that nothing can be written to: by its mode, for root, who does not mind that, by a read-only mount of it over itself."""
    if os.geteuid():
        modes = {path: path.stat().st_mode for path in (folder, *filter(pathlib.Path.is_dir, folder.rglob("*")))}
        for path in modes:
            path.chmod(0o500)
        yield
        for path, mode in modes.items():
            path.chmod(mode)
        return
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        pytest.skip("root cannot mount here")
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_refuses_ends_both_processes(train, tmp_path, data_dir):
    """Under torchrun: the first process says why, the other does not wait for it for ever, and the run goes on."""
    same = {**TINY, "data_dir": data_dir, "batch_size": 2}
    train(tmp_path / "a", max_iters=10, batch_size=2)
    before = (tmp_path / "a" / "ckpt.pt").read_bytes()
    command = [*torchrun(2), "train_lm.py", *flags(**{**same, "out_dir": tmp_path / "a"}), "--init_from=resume"]
    with largest_file(len(before) // 2):
        run = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=90)
    assert run.returncode == 1 and "train_lm.py: [Errno 27]" in run.stderr and "ckpt.pt'; once that is mended" in run.stderr, run.stderr
    assert "]: Traceback" not in run.stderr and "process 1 lost another one" in run.stderr  # torchrun's own has no [rank1]: before it
    assert (tmp_path / "a" / "ckpt.pt").read_bytes() == before
    run = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=90)
    assert run.returncode == 0 and load(tmp_path / "a" / "ckpt.pt")["iter_num"] == 20, run.stderr

# ------------------------------------------------------------------------------------------------------------------ clocks

def test_clocks_that_jump_change_nothing(train, tmp_path, monkeypatch):
    """An hour forwards or back at every look: durations are of another clock."""
    straight, jumps = train(tmp_path / "straight"), itertools.cycle((3600.0, -7200.0))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    jumpy = train(tmp_path / "jumpy")
    assert_same_weights(tmp_path / "straight" / "ckpt.pt", tmp_path / "jumpy" / "ckpt.pt")
    assert 0 < jumpy["seconds"] < 60 and jumpy["test_loss"] == straight["test_loss"]
    lines = [json.loads(line) for line in (tmp_path / "jumpy" / "log.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_s"] > 0 for line in lines if "tokens_per_s" in line)

# ------------------------------------------------------------------------------------------------------------- silently wrong

def test_float16_that_overflows_at_any_scale_stops(train, tmp_path, capsys, monkeypatch):
    """The loss stays finite, every step is skipped, the scale halves; the real scaler and autocast, on the CPU."""
    forward = train_lm.GPT.forward
    monkeypatch.setattr(train_lm, "pick_dtype", lambda *_: torch.float16)
    monkeypatch.setattr(train_lm, "peak_flops", lambda *_: (1e12, "not measured: a CPU's large float16 GEMM takes minutes"))
    train(tmp_path / "sound")
    assert load(tmp_path / "sound" / "ckpt.pt")["scaler"]["scale"] == 65536

    def steep(self, x, y=None):
        logits, loss = forward(self, x, y)
        return logits, loss * (1e30 if self.training else 1)
    monkeypatch.setattr(train_lm.GPT, "forward", steep)
    ends(1, lambda: train(tmp_path / "a", max_iters=100), capsys, "train_lm.py: gradients overflow float16", "--learning_rate",
         tmp_path / "a" / "ckpt.pt")
    checkpoint = load(tmp_path / "a" / "ckpt.pt")
    assert 20 <= checkpoint["iter_num"] <= 40 and 1e-5 < checkpoint["scaler"]["scale"] < 65536
    train(tmp_path / "b", max_iters=0)
    assert_same_weights(tmp_path / "a" / "ckpt.pt", tmp_path / "b" / "ckpt.pt")  # as at the start: all was skipped


def test_a_vit_loss_that_is_not_finite_keeps_the_good_checkpoint(tmp_path, image_dir, capsys, monkeypatch):
    entropy, calls = train_vit.F.cross_entropy, []

    def poisoned(*args, **settings):
        loss = entropy(*args, **settings)
        calls.append(loss.requires_grad)
        return loss * math.nan if sum(calls) == 14 else loss
    settings = {"dataset": "pictures", "data_dir": str(image_dir), "image_size": 16, "patch_size": 4, "n_layer": 1, "n_head": 2, "n_embd": 16,
                "batch_size": 4, "total_batch_size": 4, "max_iters": 20, "eval_interval": 10, "log_interval": 5, "eval_iters": 1, "device": "cpu",
                "out_dir": str(tmp_path)}
    monkeypatch.setattr(train_vit.F, "cross_entropy", poisoned)
    for name, value in settings.items():
        monkeypatch.setattr(train_vit, name, value)
    ends(1, train_vit.main, capsys, "train_vit.py: loss nan", "at step 13 on process 0", tmp_path / "ckpt.pt")
    checkpoint = load(tmp_path / "ckpt.pt")
    assert checkpoint["iter_num"] == 10 and all(p.isfinite().all() for p in checkpoint["model"].values())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_one_of_two_processes_is_poisoned(tmp_path, data_dir, what):
    """Both end, the one that has it says so; a gradient is both's by then."""
    poison = tmp_path / "poison.py"
    poison.write_text(f"""
import math, os, sys
sys.path.insert(0, {str(REPO)!r})
import train_lm
forward, calls = train_lm.GPT.forward, []
def poisoned(self, x, y=None):
    logits, loss = forward(self, x, y)
    calls.append(self.training)
    if os.environ["RANK"] == "1" and self.training and sum(calls) == 14:
        loss = loss * math.nan if {what!r} == "loss" else loss + 0 * (loss - loss.detach()).sqrt()
    return logits, loss
train_lm.GPT.forward = poisoned
train_lm.configure(vars(train_lm))
train_lm.main()
""")
    settings = {**TINY, "data_dir": data_dir, "batch_size": 2, "out_dir": tmp_path / "a"}
    run = subprocess.run([*torchrun(2), poison, *flags(**settings)], cwd=REPO, env=environment(), capture_output=True, text=True, timeout=90)
    said = [line for line in run.stderr.splitlines() if line.startswith("train_lm.py:")]
    who = "process 1" if what == "loss" else "process 0"
    assert run.returncode == 1 and len(said) == 1 and "nan" in said[0] and f"at step 13 on {who}" in said[0], run.stderr
    checkpoint = load(tmp_path / "a" / "ckpt.pt")
    assert checkpoint["iter_num"] == 10 and all(p.isfinite().all() for p in checkpoint["model"].values())
