"""
Short runs of trials/faults.py, and faults at chosen moments: two runs in one folder, full and read-only
disks, clocks that jump, losses and gradients that are not finite.
"""
import contextlib
import errno
import itertools
import math
import os
import pathlib
import resource
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    REPO,
    TINY,
    assert_same_weights,
    environment,
    flags,
    load,
    logged,
    run_main,
    signalled_in_step,
    torchrun,
)
from conftest import command as run

import nanorank.run
import nanorank.run_setup
import train_lm
import train_vit
from nanorank.distributed import exit_codes
from nanorank.errors import user_errors
from nanorank.files import make_folder
from nanorank.run_folder import RunLog, lock_folder
from nanorank.tables import read_csv


def ends(code, call, capsys, *words):
    """Asserts that a call ends as at the bottom of train_lm.py, with one line that has these words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, exit_codes("train_lm.py"):
        call()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == code and len(lines) == 1, lines
    for word in words:
        assert str(word) in lines[0], lines[0]


# --------------------------------------------------------------- random moments

UNSHARE = ["unshare", "-rm"] if os.geteuid() else []  # root may mount as it is


def trials(tmp_path, *args):
    """Runs faults.py, in a namespace of its own where it mounts. Returns the number of trials."""
    alone = UNSHARE if "disk" in args else []
    seed = time.time_ns() % 2**31
    faults = [sys.executable, "tests/trials/faults.py", *args, f"--seed={seed}", f"--out_dir={tmp_path}"]
    result = run(*alone, *faults)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = read_csv(tmp_path / "faults.csv")
    assert (rows["survived"] == rows["faults"]).all() and (rows["faults"] > 0).all(), rows
    return len(rows)


@pytest.mark.slow
def test_killed_and_on_a_full_disk_at_random_moments(tmp_path):
    probe = "mount -t tmpfs -o size=1m probe /mnt && umount /mnt"
    mounts = run(*UNSHARE, "bash", "-c", probe).returncode == 0
    disk = ["disk"] if mounts else []
    n = trials(tmp_path, "train_lm", "prepare_pile", "prepare_imagenet", *disk, "--kills=1")
    assert n == (7 if mounts else 3)
    if not mounts:
        pytest.skip("kills are survived; the full disk needs a tmpfs, and none can be mounted here")


@pytest.mark.slow
def test_vit_sweep_signals_and_torchrun(tmp_path):
    assert trials(tmp_path, "train_vit", "sweep", "saves", "signals", "torchrun", "--kills=1") == 11


# ---------------------------------------------------------- one run in a folder

def test_a_second_run_in_the_folder_is_refused(train, tmp_path, data_dir, capsys):
    """While the first lives; evaluation may look on, and a kill leaves nothing in the way."""
    long = {"max_iters": 100_000, "eval_interval": 20}
    settings = {**TINY, **long, "data_dir": data_dir, "out_dir": tmp_path}
    command = [sys.executable, "train_lm.py", *flags(**settings)]
    process = subprocess.Popen(command, cwd=REPO, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert any("step 40:" in line for line in process.stdout)
        for how in ({"init_from": "auto"}, {"init_from": "scratch", "overwrite": True}):
            ends(2, lambda how=how: train(tmp_path, **long, **how), capsys,
                 "another run is at work in", tmp_path)
        train(tmp_path, **long, eval_only=True)
        assert process.poll() is None and (tmp_path / "eval.json").exists()
    finally:
        process.kill()
        process.communicate()
    n_steps = load(tmp_path / "ckpt.pt")["iter_num"] + 3
    assert train(tmp_path, init_from="resume", max_iters=n_steps)["steps"] == n_steps


def test_killed_before_its_first_save_it_starts_by_the_same_command(train, tmp_path):
    (tmp_path / "log.jsonl").touch()
    assert train(tmp_path, max_iters=1, init_from="auto")["steps"] == 1


def test_resuming_a_finished_run_changes_nothing(train, tmp_path):
    train(tmp_path, max_iters=5)
    before = load(tmp_path / "ckpt.pt")
    train(tmp_path, max_iters=5, init_from="auto")
    after = load(tmp_path / "ckpt.pt")
    assert str(before["optimizer"]) == str(after["optimizer"])
    assert before["log_bytes"] == after["log_bytes"]


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", no_locks)
    lock_folder(tmp_path)


# ------------------------------------------------------------------------ disks

@contextlib.contextmanager
def largest_file(size):
    """No file of this process may grow beyond so many bytes. A program meets it as a quota: an OSError."""
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
            ends(1, lambda: train(tmp_path / "a", init_from="resume"), capsys,
                 f"File too large (the file that was there is whole): '{path}'",
                 "train_lm.py: ", "--init_from=resume goes on from the last save")
        assert path.read_bytes() == before and not list(path.parent.glob("*.tmp*"))
    resumed = train(tmp_path / "a", init_from="resume")
    assert_same_weights(tmp_path / "straight" / "ckpt.pt", path)
    assert resumed["test_loss"] == straight["test_loss"]


def test_a_disk_full_from_the_start_leaves_no_run_behind(train, tmp_path, capsys):
    with largest_file(10_000):
        ends(1, lambda: train(tmp_path), capsys, tmp_path, "once that is mended")
    assert train(tmp_path, max_iters=1)["steps"] == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_cannot_grow_is_named(tmp_path):
    log = RunLog(tmp_path, 0, {"wandb_log": False})
    os.unlink(log.path)
    os.symlink("/dev/full", log.path)
    with pytest.raises(OSError, match=f"No space left on device: '{log.path}'"):
        log.write(1, {"train_loss": 2.0})


def test_a_folder_that_cannot_be_written_to(train, tmp_path, capsys):
    """Refused before anything is loaded or evaluated."""
    train(tmp_path / "a", max_iters=1)
    with read_only(tmp_path):
        for how in ({"init_from": "resume"}, {"eval_only": True}):
            ends(2, lambda how=how: train(tmp_path / "a", **how), capsys, tmp_path / "a")
        ends(2, lambda: train(tmp_path / "b"), capsys, tmp_path / "b")


def test_a_full_disk_is_no_mistake_of_the_user(tmp_path, monkeypatch):
    """Where a folder cannot be made for lack of space, scripts exit with 1, not 2."""
    def full(*args, **settings):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a"))

    monkeypatch.setattr(os, "makedirs", full)
    with pytest.raises(SystemExit) as stop, user_errors("analyze.py"):
        make_folder(str(tmp_path / "a"))
    assert stop.value.code == 1


@contextlib.contextmanager
def read_only(folder):
    """A folder that nothing can be written to: by its mode, or for root by a read-only mount over itself."""
    if os.geteuid():
        folders = [folder, *filter(pathlib.Path.is_dir, folder.rglob("*"))]
        modes = {path: path.stat().st_mode for path in folders}
        for path in modes:
            path.chmod(0o500)
        yield
        for path, mode in modes.items():
            path.chmod(mode)
        return
    if run("mount", "--bind", folder, folder).returncode:
        pytest.skip("root cannot mount here")
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_refuses_ends_both_processes(train, tmp_path, data_dir):
    """Under torchrun the first process says why, the other does not wait for it, and the run goes on."""
    path = tmp_path / "a" / "ckpt.pt"
    train(tmp_path / "a", max_iters=10, batch_size=2)
    before = path.read_bytes()
    settings = {**TINY, "data_dir": data_dir, "batch_size": 2, "out_dir": tmp_path / "a"}
    command = [*torchrun(2), "train_lm.py", *flags(**settings), "--init_from=resume"]
    with largest_file(len(before) // 2):
        result = run(*command)
    assert result.returncode == 1, result.stderr
    assert "train_lm.py: [Errno 27]" in result.stderr, result.stderr
    assert "ckpt.pt'; once that is mended" in result.stderr, result.stderr
    assert "]: Traceback" not in result.stderr, result.stderr  # torchrun's own has no [rank1]: before it
    assert "process 1 lost another one" in result.stderr, result.stderr
    assert path.read_bytes() == before
    result = run(*command)
    assert result.returncode == 0 and load(path)["iter_num"] == 20, result.stderr


# ----------------------------------------------------------------------- clocks

def test_clocks_that_jump_change_nothing(train, tmp_path, monkeypatch):
    """An hour forwards or two back at every look: durations are read from another clock."""
    straight = train(tmp_path / "straight")
    jumps = itertools.cycle((3600.0, -7200.0))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    jumpy = train(tmp_path / "jumpy")
    assert_same_weights(tmp_path / "straight" / "ckpt.pt", tmp_path / "jumpy" / "ckpt.pt")
    assert 0 < jumpy["seconds"] < 60 and jumpy["test_loss"] == straight["test_loss"]
    assert min(logged(tmp_path / "jumpy", "tokens_per_s")) > 0


# ------------------------------------------------------------------- not finite

def assert_good_checkpoint(path):
    """The checkpoint of step 10, as it was before the loss went bad."""
    ckpt = load(path)
    assert ckpt["iter_num"] == 10 and all(p.isfinite().all() for p in ckpt["model"].values())


def test_float16_that_overflows_at_any_scale_stops(train, tmp_path, capsys, monkeypatch):
    """The loss stays finite, every step is skipped, the scale halves. Scaler and autocast are real."""
    forward = train_lm.GPT.forward
    monkeypatch.setattr(nanorank.run_setup, "pick_dtype", lambda *_: torch.float16)
    # a large GEMM takes a CPU minutes in float16
    monkeypatch.setattr(nanorank.run, "peak_flops", lambda *_: (1e12, "not measured"))
    train(tmp_path / "sound")
    assert load(tmp_path / "sound" / "ckpt.pt")["scaler"]["scale"] == 65536

    def steep(self, x, y=None):
        logits, loss = forward(self, x, y)
        return logits, loss * (1e30 if self.training else 1)

    monkeypatch.setattr(train_lm.GPT, "forward", steep)
    ends(1, lambda: train(tmp_path / "a", max_iters=100), capsys,
         "train_lm.py: gradients overflow float16", "--learning_rate", tmp_path / "a" / "ckpt.pt")
    ckpt = load(tmp_path / "a" / "ckpt.pt")
    assert 20 <= ckpt["iter_num"] <= 40 and 1e-5 < ckpt["scaler"]["scale"] < 65536
    train(tmp_path / "b", max_iters=0)
    # as at the start: all steps were skipped
    assert_same_weights(tmp_path / "a" / "ckpt.pt", tmp_path / "b" / "ckpt.pt")


def test_a_vit_loss_that_is_not_finite_keeps_the_good_checkpoint(tmp_path, image_dir, capsys, monkeypatch):
    cross_entropy, calls = train_vit.F.cross_entropy, []

    def poisoned(*args, **settings):
        loss = cross_entropy(*args, **settings)
        calls.append(loss.requires_grad)
        return loss * math.nan if sum(calls) == 14 else loss

    settings = {
        "dataset": "pictures", "data_dir": str(image_dir), "out_dir": str(tmp_path), "device": "cpu",
        "image_size": 16, "patch_size": 4, "n_layer": 1, "n_head": 2, "n_embd": 16,
        "batch_size": 4, "total_batch_size": 4, "max_iters": 20,
        "eval_interval": 10, "log_interval": 5, "eval_iters": 1,
    }
    monkeypatch.setattr(train_vit.F, "cross_entropy", poisoned)
    ends(1, lambda: run_main(train_vit, settings), capsys,
         "train_vit.py: loss nan", "at step 13 on process 0", tmp_path / "ckpt.pt")
    assert_good_checkpoint(tmp_path / "ckpt.pt")


POISON = """
import math, os, sys
sys.path.insert(0, {repo!r})
import train_lm
from nanorank.distributed import exit_codes
from nanorank.run import Run

forward, calls = train_lm.GPT.forward, []

def poisoned(self, x, y=None):
    logits, loss = forward(self, x, y)
    calls.append(self.training)
    if os.environ["RANK"] == "1" and self.training and sum(calls) == 14:
        if {what!r} == "loss":
            loss = loss * math.nan
        else:
            loss = loss + 0 * (loss - loss.detach()).sqrt()
    return logits, loss

train_lm.GPT.forward = poisoned
train_lm.configure(vars(train_lm))
with exit_codes("train_lm.py"):
    train_lm.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_one_of_two_processes_is_poisoned(tmp_path, data_dir, what):
    """Both end. The one whose loss it is says so; a gradient is everybody's by then."""
    poison = tmp_path / "poison.py"
    poison.write_text(POISON.format(repo=str(REPO), what=what))
    settings = {**TINY, "data_dir": data_dir, "batch_size": 2, "out_dir": tmp_path / "a"}
    result = run(*torchrun(2), poison, *flags(**settings))
    said = [line for line in result.stderr.splitlines() if line.startswith("train_lm.py:")]
    where = f"at step 13 on process {1 if what == 'loss' else 0}"
    assert result.returncode == 1 and len(said) == 1, result.stderr
    assert "nan" in said[0] and where in said[0], said
    assert_good_checkpoint(tmp_path / "a" / "ckpt.pt")
