"""bench.py takes every path it times for real, and refuses what it cannot time."""
import json
import os

import pytest
from conftest import one_line_exit_2, script

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


def test_wrong_input(tmp_path):
    one_line_exit_2(script("-m", "scripts.bench", "speed"), "no benchmark speed")
    one_line_exit_2(script("-m", "scripts.bench", "step", f"--peer={tmp_path}"), "holds no model.py")
    one_line_exit_2(script("-m", "scripts.bench", "--repeats=0"), "--repeats=0")
