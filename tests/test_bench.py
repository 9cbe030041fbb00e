"""bench.py takes every path it times for real, and refuses what it cannot time."""
import json
import os

import pytest
from conftest import one_line_exit_2, script

PEER = os.environ.get("NANOGPT", "")  # a checkout of karpathy/nanoGPT


@pytest.mark.slow
def test_ratios_of_real_paths(tmp_path):
    result = script("-m", "scripts.bench", "start", "checkpoint", "--repeats=1", f"--out_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["path"] for row in rows] == ["start", "checkpoint"]
    for row in rows:
        assert 0 < row["floor_seconds"] and row["ratio"] == row["seconds"] / row["floor_seconds"]
        assert row["what"] in result.stdout and f"{row['ratio']:.2f}" in result.stdout


@pytest.mark.skipif(not PEER, reason="NANOGPT names no checkout of karpathy/nanoGPT")
def test_nanogpt_takes_the_same_steps(tmp_path):
    result = script("-m", "scripts.bench", "step", "--repeats=3", f"--peer={PEER}", f"--out_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    peers = [row for row in json.loads((tmp_path / "bench.json").read_text())["rows"] if "nanoGPT" in row["floor"]]
    assert len(peers) == 2 and all(row["losses_apart"] < 1e-4 for row in peers)


def test_wrong_input(tmp_path):
    one_line_exit_2(script("-m", "scripts.bench", "speed"), "no benchmark speed")
    one_line_exit_2(script("-m", "scripts.bench", "step", f"--peer={tmp_path}"), "holds no model.py")
    one_line_exit_2(script("-m", "scripts.bench", "--repeats=0"), "--repeats=0")
