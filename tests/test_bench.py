"""bench.py takes every path it times for real, and refuses what it cannot time."""
import json
import os

import pytest
import torch
from conftest import one_line_exit_2, script

from nanorank.tables import read_csv
from scripts import bench_smoke
from scripts.bench_smoke import NeedsGPU, check
from scripts.timing import Setup

PEER = os.environ.get("NANOGPT", "")  # a checkout of karpathy/nanoGPT


def bench(out_dir, *args):
    """The rows of bench.json, and what was printed."""
    result = script("-m", "scripts.bench", *args, f"--out_dir={out_dir}")
    assert result.returncode == 0, result.stderr
    return json.loads((out_dir / "bench.json").read_text())["rows"], result.stdout


@pytest.mark.slow
def test_ratios_of_real_paths(tmp_path):
    rows, printed = bench(tmp_path, "start", "checkpoint", "--repeats=1")
    assert [row["path"] for row in rows] == ["start", "checkpoint"]
    for row in rows:
        assert 0 < row["floor_seconds"] and row["ratio"] == row["seconds"] / row["floor_seconds"]
        assert row["what"] in printed and f"{row['ratio']:.2f}" in printed


@pytest.mark.skipif(not PEER, reason="NANOGPT names no checkout of karpathy/nanoGPT")
def test_nanogpt_takes_the_same_steps(tmp_path):
    rows, _ = bench(tmp_path, "step", "--repeats=3", f"--peer={PEER}")
    peers = [row for row in rows if "nanoGPT" in row["floor"]]
    assert len(peers) == 2 and all(row["losses_apart"] < 1e-4 for row in peers)


@pytest.mark.slow
def test_wrong_input(tmp_path):
    one_line_exit_2(script("-m", "scripts.bench", "speed"), "no benchmark speed")
    one_line_exit_2(script("-m", "scripts.bench", "step", f"--peer={tmp_path}"), "holds no model.py")
    one_line_exit_2(script("-m", "scripts.bench", "--repeats=0"), "--repeats=0")

# ------------------------------------------------------------------- smoke test

def sound(smoke):
    """Works."""
    return "all\nwell"


def unsound(smoke):
    """Does not."""
    check(False, "losses differ")


def elsewhere(smoke):
    """Needs more."""
    raise NeedsGPU("two GPUs")


def test_a_check_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_smoke, "CHECKS", (unsound, elsewhere, sound))
    setup = Setup(torch.device("cpu"), torch.float32, 1)
    assert not bench_smoke.smoke_test(setup, {"step": None}, tmp_path)
    rows = read_csv(tmp_path / "smoke.csv")
    assert rows["check"].tolist() == ["unsound", "elsewhere", "sound", "bench_step"]
    assert rows["result"].tolist() == ["FAILED", "needs two GPUs", "pass", "needs a GPU"]
    assert rows["found"].tolist()[:3] == ["AssertionError: losses differ", "Needs more.", "all well"]
    assert "needs two GPUs" in capsys.readouterr().out
    monkeypatch.setattr(bench_smoke, "CHECKS", (elsewhere, sound))
    assert bench_smoke.smoke_test(setup, {}, tmp_path)


@pytest.mark.slow
def test_smoke_on_a_cpu(tmp_path):
    result = script("-m", "scripts.bench", "smoke", "--device=cpu", f"--out_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    rows = read_csv(tmp_path / "smoke.csv")
    passed = rows[rows["result"] == "pass"]["check"].tolist()
    assert passed == ["machine", "attention_kernels", "compiled_is_eager", "analyze_agrees",
                      "muon_and_resume", "gpt2_small", "process_group", "several_processes", "vit"]
    assert set(rows["result"]) == {"pass", "needs a GPU"}
