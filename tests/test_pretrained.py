"""
scripts/pretrained.py: what Gaussian factors have, and its tables and figures of small models.
"""
import csv

import numpy as np
import pytest
import torch
from conftest import one_line_exit_2, script
from safetensors.torch import save_file

from nanorank.files import save_json
from nanorank.heads import Rope
from nanorank.regulariser import plane_metrics
from nanorank.spectra import measure
from scripts.pretrained import gaussian_imbalance, gaussian_rank95


@pytest.mark.parametrize("planes", [False, True])
def test_gaussian_factors(planes):
    d_A, d_B, r = 96, 192, 16
    torch.manual_seed(1)
    A, B = torch.randn(64, d_A, r), 0.4 * torch.randn(64, d_B, r)
    _, table = measure(A, B)
    imbalance = plane_metrics(A, B, Rope(r, False))["imbalance_planes"] if planes else table["imbalance"]
    norms = (np.array(table[name]) for name in ("norm_A", "norm_B"))
    expected = gaussian_imbalance(*norms, d_A, d_B, r, planes)
    assert float(expected.mean()) == pytest.approx(sum(imbalance) / 64, rel=0.02)
    assert gaussian_rank95(d_A, d_B, r) == pytest.approx(sum(table["rank95"]) / 64, abs=0.3)


def save_model(folder, model_type, n_kv_head, d=32, n_head=4):
    """Two layers of random attention under Llama's names."""
    folder.mkdir()
    r = d // n_head
    tensors = {}
    for i in range(2):
        path = f"model.layers.{i}.self_attn"
        shapes = {"q": (d, d), "k": (n_kv_head * r, d), "v": (n_kv_head * r, d), "o": (d, d)}
        tensors.update({f"{path}.{name}_proj.weight": torch.randn(shape) for name, shape in shapes.items()})
        if model_type == "qwen3":
            tensors.update({f"{path}.{name}_norm.weight": torch.ones(r) for name in "qk"})
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": model_type, "num_attention_heads": n_head, "num_key_value_heads": n_kv_head}
    save_json(str(folder / "config.json"), config)


@pytest.mark.slow
def test_tables_and_figures_of_models(tmp_path):
    kinds = {"plain": ("opt", 4), "grouped": ("llama", 2), "normed": ("qwen3", 4)}
    for name, (model_type, n_kv_head) in kinds.items():
        save_model(tmp_path / name, model_type, n_kv_head)
    paths = [tmp_path / name for name in kinds]
    result = script("analyze.py", *paths, "--figure=False", "--norms=False", f"--out_dir={tmp_path / 'a'}")
    assert result.returncode == 0, result.stderr

    out = tmp_path / "out"
    out.mkdir()
    command = "-m", "scripts.pretrained", tmp_path / "a" / "heads.csv", out
    one_line_exit_2(script(*command), "models.csv")
    (out / "models.csv").write_text("model,weight_decay\nnormed,0\nplain,unknown\ngrouped,0.1\n")
    result = script(*command)
    assert result.returncode == 0, result.stderr

    assert (out / "pretrained.png").exists() and (out / "factors.png").exists()
    with open(out / "summary.csv", newline="") as file:
        rows = {(row["model"], row["product"]): row for row in csv.DictReader(file)}
    assert list(dict.fromkeys(model for model, _ in rows)) == ["normed", "plain", "grouped"]
    assert rows["plain", "qk"]["right_gap"] == rows["plain", "qk"]["gap"]
    assert rows["normed", "qk"]["right_gap"] == rows["grouped", "qk"]["right_gap"] == ""
    assert [int(rows["grouped", product]["heads"]) for product in ("qk", "qk_stacked")] == [8, 4]
    for at in (("plain", "qk"), ("plain", "ov"), ("grouped", "qk_stacked"), ("grouped", "ov_stacked")):
        for name in ("right_gap", "right_imbalance"):  # of random weights, that of Gaussian factors
            assert float(rows[at][name]) == pytest.approx(float(rows[at][f"{name}_gaussian"]), abs=0.06)
