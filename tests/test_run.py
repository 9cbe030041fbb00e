"""
nanorank.run on its own: how a batch is split, and who may use a run's folder.
"""
import errno
import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    REPO,
    TINY,
    assert_same_weights,
    command,
    environment,
    flags,
    logged,
    one_line_exit_2,
    refused,
    script,
    torchrun,
)

import model
import nanorank.run
import train_lm
from nanorank import device, distributed, run_settings, run_setup
from nanorank.run import Run
from nanorank.run_folder import lock_folder


def split_batch(total, most, world_size=1, **settings):
    """(batch_size, grad_accum_steps) of a run."""
    settings = {"total_batch_size": total, "batch_size": most, **settings}
    return run_settings.split_batch(settings, world_size)


@pytest.mark.parametrize("total, most, world_size, want", [
    (128, 16, 8, (16, 1)),
    (128, 16, 1, (16, 8)),
    (12, 5, 1, (4, 3)),  # the largest divisor of the process's share that fits
    (12, 5, 2, (3, 2)),
    (7, 5, 1, (1, 7)),
    (4, 100, 2, (2, 1)),
])
def test_a_micro_step_takes_the_largest_divisor_that_fits(total, most, world_size, want):
    assert split_batch(total, most, world_size) == want


def test_mixup_takes_even_micro_batches():
    assert split_batch(12, 5, 2, mixup=0.2) == (2, 3)
    assert split_batch(12, 5, 2, mixup=0.0, cutmix=0.0) == (3, 2)
    with refused("--batch_size=1 must be even"):
        split_batch(4, 1, cutmix=1.0)
    with refused("each process's share of --total_batch_size=6"):  # 3 images a process
        split_batch(6, 4, 2, mixup=0.2)


def test_the_processes_must_divide_the_batch(tmp_path, data_dir):
    with refused("--total_batch_size=4", "3 processes"):
        split_batch(4, 4, 3)
    args = flags(**{**TINY, "data_dir": data_dir, "out_dir": tmp_path / "a"})
    run = command(*torchrun(3), "train_lm.py", *args)
    lines = [line for line in run.stderr.splitlines() if line.startswith("train_lm.py:")]
    assert run.returncode == 1 and len(lines) == 1 and "--total_batch_size=4" in lines[0], run.stderr


def test_the_micro_batch_that_runs_is_the_one_that_was_split(train, tmp_path):
    train(tmp_path / "two", batch_size=2, max_iters=5)
    train(tmp_path / "three", batch_size=3, max_iters=5)
    assert_same_weights(tmp_path / "two" / "ckpt.pt", tmp_path / "three" / "ckpt.pt")


# A notebook: a mistake, then two runs into the same folder; then another process asks for it.
TWICE = """
import subprocess, sys
import train_lm
from nanorank.errors import UserError

settings = dict(arg.removeprefix("--").split("=") for arg in sys.argv[1:])
types = {name: type(getattr(train_lm, name)) for name in settings}
vars(train_lm).update({name: types[name](text) for name, text in settings.items()})
train_lm.max_iters = 2

train_lm.optimizer = "lion"
try:
    train_lm.main()
except UserError as error:
    mistake = error  # keeps the frames of the first call alive, and with them its lock
train_lm.optimizer = "adamw"
train_lm.main()
train_lm.overwrite = True
train_lm.main()

train_lm.optimizer = "lion"
try:
    train_lm.main()
except UserError as error:
    mistake = error
other = subprocess.run([sys.executable, "train_lm.py", "--overwrite", *sys.argv[1:]])
sys.exit(other.returncode)
"""


@pytest.mark.slow
def test_one_process_is_not_locked_out_of_its_folder_but_another_is(tmp_path, data_dir):
    out_dir = tmp_path / "a"
    args = flags(**{**TINY, "data_dir": data_dir, "out_dir": out_dir})
    one_line_exit_2(script("-c", TWICE, *args), f"another run is at work in {out_dir}")
    assert (out_dir / "result.json").exists()
    # the lock ended with the process
    assert script("train_lm.py", "--overwrite", *args).returncode == 0


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch, code):
    def flock(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    assert lock_folder(str(tmp_path)) is None
    assert lock_folder(str(tmp_path)) is None


# ------------------------------------------------------- several nodes, launchers

APART = """
import os, sys
sys.path.insert(0, {repo!r})
import train_lm
from configurator import configure
from nanorank.distributed import exit_codes

configure(vars(train_lm))
train_lm.out_dir = train_lm.out_dir + os.environ["RANK"]  # nodes that do not share a disk
with exit_codes("train_lm.py"):
    train_lm.main()
"""


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_nodes_that_would_train_apart_are_refused(train, tmp_path, data_dir, processes):
    """One process finds a checkpoint, the other none: without the check each would train its own model."""
    script = tmp_path / "apart.py"
    script.write_text(APART.format(repo=str(REPO)))
    train(tmp_path / "run0", total_batch_size=4, batch_size=2, max_iters=4)
    args = flags(**{**TINY, "data_dir": data_dir, "out_dir": tmp_path / "run", "init_from": "auto",
                    "batch_size": 2, "max_iters": 4})
    run = command(*torchrun(processes), script, *args)
    lines = [line for line in run.stderr.splitlines() if line.startswith("train_lm.py:")]
    assert run.returncode == 1 and "processes differ in what they resume or read" in lines[0], run.stderr


def test_a_launcher_that_sets_rank_and_world_size_alone(tmp_path, data_dir, monkeypatch):
    """As MPI and some job systems do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = [sys.executable, "train_lm.py", *flags(**{**TINY, "data_dir": data_dir, "out_dir": tmp_path / "a",
                                                     "batch_size": 2, "max_iters": 3})]
    processes = []
    for rank in (0, 1):
        env = environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        processes.append(subprocess.Popen(args, cwd=REPO, env=env, stdout=subprocess.DEVNULL))
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert json.loads((tmp_path / "a" / "result.json").read_text())["processes"] == 2


def test_several_processes_on_an_apple_gpu_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("--device=cpu"):
        distributed.init_process_group(torch.device("mps"))


# ----------------------------------------------------------- a fork's own groups

@pytest.mark.parametrize("ends", [
    {"wte": ("wte.weight",), "rest": ("wpe.weight", "head.weight")},  # a group renamed and split
    {"embed": ("wte.weight", "wpe.weight", "head.weight")},
])
def test_decay_groups_may_have_other_names(train, tmp_path, monkeypatch, ends):
    """A fork that renames its groups trains, resumes and gets its time constants."""
    kept = {name: model.GROUP_OF[name] for name in ("attn", "mlp")}

    def groups(net, attn_wd, mlp_wd, embed_wd, qk_wd, qk_decay):
        placed = {name: [] for name in (*kept, *ends, "none")}
        for name, p in net.named_parameters():
            homes = [group for group, tails in {**kept, **ends}.items() if name.endswith(tails)]
            placed[homes[0] if p.ndim > 1 else "none"].append(p)
        return [{"name": name, "params": params, "weight_decay": embed_wd} for name, params in placed.items()]

    monkeypatch.setattr(train_lm, "decay_groups", groups)
    train(tmp_path / "a", max_iters=4, eval_interval=2)
    result = train(tmp_path / "a", max_iters=6, init_from="resume")
    for name in ends:
        assert result[f"decay_time_constants_{name}"] == pytest.approx(result["decay_time_constants"])


# ------------------------------------------------------- device, compile, MFU

def test_mfu_is_never_above_100_percent(train, tmp_path, monkeypatch, capsys):
    """A peak of 1 FLOP/s, as if others had used the machine while it was measured."""
    monkeypatch.setattr(nanorank.run, "peak_flops", lambda *_: (1.0, "measured at a busy moment"))
    train(tmp_path / "a")
    mfu = logged(tmp_path / "a", "mfu")
    assert mfu[0] == 1 and 0 < min(mfu) and max(mfu) <= 1
    assert capsys.readouterr().out.count("MFU is against the fastest steps") == 1


def test_the_peak_is_the_best_of_several_timings(monkeypatch):
    cpu = torch.device("cpu")
    seconds = iter([1e-3, 2e-3, 4e-3, 8e-3, 0.09, 0.5, 0.3, 0.08, 0.2, 0.4])  # n = 128 to 2048, then again
    monkeypatch.setattr(device, "gemm_seconds", lambda *_: next(seconds))
    assert device.peak_flops(cpu, torch.float32) == (2 * 2048**3 / 0.08, "2048 x 2048 GEMM measured here")


def test_an_emulated_dtype_costs_no_minutes(monkeypatch):
    """bfloat16 without instructions: 0.3 GFLOP/s here, 57 s for one product of 2048."""
    def emulated(n, _, dtype):
        return 2 * n**3 / (0.3e9 if dtype == torch.bfloat16 else 100e9)

    cpu = torch.device("cpu")
    monkeypatch.setattr(device, "gemm_seconds", emulated)
    flops, source = device.peak_flops(cpu, torch.bfloat16)
    assert flops == pytest.approx(0.3e9) and source.startswith("256 x 256")
    assert device.slow_dtype(cpu, torch.bfloat16) == pytest.approx(333, rel=0.01)
    assert device.slow_dtype(cpu, torch.float32) == 0


def test_a_cpu_without_bfloat16_is_said_at_once(tmp_path, data_dir, monkeypatch):
    """oneDNN is told that the CPU has no more than AVX2: then bfloat16 is emulated."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    args = flags(**{**TINY, "data_dir": data_dir, "out_dir": tmp_path / "a", "max_iters": 2})
    began = time.monotonic()
    run = script("train_lm.py", "--dtype=bfloat16", *args)
    assert run.returncode == 0, run.stderr
    assert "note: this CPU emulates bfloat16" in run.stdout.splitlines()[0]
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("spelling", [False, "OFF", "Auto"])
def test_switched_off_nothing_is_compiled(train, tmp_path, monkeypatch, spelling):
    monkeypatch.setattr(torch, "compile", None)
    train(tmp_path / "a", compile=spelling, max_iters=2)


def test_without_a_compiler_compile_is_one_line(tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    args = flags(**{**TINY, "data_dir": data_dir, "out_dir": tmp_path / "a", "compile": True})
    run = script("train_lm.py", *args)
    one_line_exit_2(run, "--compile=True", "No working C++ compiler", "--compile=False does without")


def test_auto_does_without_a_compiler_and_says_so(monkeypatch, capsys):
    run = SimpleNamespace(settings={"compile": "auto"}, device=torch.device("cuda"), print=print)
    monkeypatch.setattr(run_setup, "compile_error", lambda _: "no compiler")
    assert Run.should_compile(run) is False
    assert "the model runs without: no compiler" in capsys.readouterr().out
    monkeypatch.setattr(run_setup, "compile_error", lambda _: "")
    assert Run.should_compile(run) is True
