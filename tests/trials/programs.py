"""
The programs that faults.py troubles, small inputs for them, and the files that must come out.
"""
import json
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from nanorank.tables import write_csv

REPO = pathlib.Path(__file__).resolve().parents[2]

# fields that depend on time or place: they are not compared
VOLATILE = ("seconds", "tokens_per_s", "images_per_s", "mfu", "log_bytes", "out_dir")

LOG_INTERVAL = 5
TRAINING = {
    "max_iters": 60, "warmup_iters": 5, "eval_interval": 10, "eval_iters": 2, "log_interval": LOG_INTERVAL,
    "rank_interval": 10, "snapshot_steps": "every:20", "n_layer": 2, "n_head": 2, "n_embd": 32,
    "dropout": 0.1, "batch_size": 4, "total_batch_size": 8, "device": "cpu", "init_from": "auto",
}


class Program(NamedTuple):
    """A script to trouble.

    command: command line behind `python`, without the flag that says where the output goes.
    place: that flag. files: folder -> {name: contents that are compared}.
    first_save: pattern of the files that its first save leaves.
    """
    name: str
    command: tuple
    place: str
    files: Callable
    first_save: str

    def args(self, folder):
        return [*self.command, f"--{self.place}={folder}"]


def programs(work, save_in_thread=False):
    """{name: Program}. Their inputs are made in the folder `work`: some text, some pictures."""
    training = {**TRAINING, "save_in_thread": save_in_thread}
    rng = np.random.default_rng(0)
    write_text(work / "text", rng)
    write_pictures(work / "pictures", rng)

    # time between safe points is short beside the whole
    prepare = {"dataset": "made", "workers": 2, "safe_interval": 0.02}
    pile = {**prepare, "source": work / "text", "tokenizer": "byte", "shard_tokens": 1_000_000,
            "val_fraction": 0.003, "test_fraction": 0.003}
    imagenet = {**prepare, "source": work / "pictures", "short_side": 24,
                "val_fraction": 0.02, "test_fraction": 0.03}
    lm = {**training, "dataset": "made", "data_dir": work / "prepare_pile", "block_size": 32}
    vit = {**training, "dataset": "made", "data_dir": work / "prepare_imagenet",
           "image_size": 16, "patch_size": 4}
    fixed = {name: x for name, x in lm.items() if name != "init_from"}
    sweep = {"configs": "config/demo.py", "fixed": " ".join(flags({**fixed, "max_iters": 10})),
             "grid": "attn_wd=0,1", "jobs": 2, "figure": False}
    made = [
        Program("train_lm", ("train_lm.py", *flags(lm)), "out_dir", run_files, "ckpt.pt"),
        Program("train_vit", ("train_vit.py", *flags(vit)), "out_dir", run_files, "ckpt.pt"),
        Program("prepare_pile", ("prepare_pile.py", *flags(pile)), "data_dir", all_files, "made/part_*.json"),
        Program("prepare_imagenet", ("-m", "scripts.prepare_imagenet", *flags(imagenet)), "data_dir",
                all_files, "made/part.json"),
        Program("sweep", ("-m", "scripts.sweep", *flags(sweep)), "out_dir", sweep_files, "*/ckpt.pt"),
    ]
    return {program.name: program for program in made}


def flags(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def write_text(folder, rng):
    """200 files of 60 documents of 600 characters."""
    folder.mkdir()
    source = (REPO / "model.py").read_text() + (REPO / "train_lm.py").read_text()
    for i in range(200):
        starts = rng.integers(0, len(source) - 600, 60)
        lines = [json.dumps({"text": source[start:start + 600]}) for start in starts]
        (folder / f"{i:03d}.jsonl").write_text("\n".join(lines) + "\n")


def write_pictures(folder, rng):
    """3000 small pictures of noise in 5 classes."""
    for i in range(3000):
        path = folder / f"c{i % 5}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 30 + i % 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def write_table(path, rows, key):
    """Writes rows, dicts, to a CSV file, in place of those that have the same in the columns `key`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows).astype(str)
    if path.exists():
        table = pd.concat([pd.read_csv(path, dtype=str, keep_default_na=False), table])
    write_csv(path, table.drop_duplicates(key, keep="last"))


# ---------------------------------------------------- files, as they are compared

def all_files(folder):
    """Every file to the byte, but for lock files."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run_files(folder):
    """What a trainer leaves. Of source/ only the names."""
    found = {}
    for path in folder.iterdir():
        found[path.name] = sorted(os.listdir(path)) if path.is_dir() else ""
        if path.suffix == ".pt":
            found[path.name] = plain(torch.load(path, weights_only=True))
        elif path.name == "result.json":
            found[path.name] = plain(json.loads(path.read_text()))
        elif path.name == "log.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            # before it stops, a run reports the steps since its last report: an extra line
            found[path.name] = plain([line for line in lines if not is_extra(line)])
    return found


def is_extra(line):
    return "train_loss" in line and (line["step"] + 1) % LOG_INTERVAL != 0


def sweep_files(folder):
    """Every run, and the tables without times."""
    found = {cell.name: run_files(cell) for cell in folder.iterdir() if cell.is_dir()}
    for name in ("curves.csv", "table.md"):
        found[name] = (folder / name).read_text()
    found["sweep.csv"] = plain(pd.read_csv(folder / "sweep.csv", dtype=str).to_dict("records"))
    return found


def plain(x):
    """A checkpoint or JSON that compares to the bit: tensors as dtype, shape and bytes; VOLATILE left out."""
    if isinstance(x, torch.Tensor):
        data = x.contiguous().view(torch.uint8).numpy().tobytes() if x.dim() else repr(x.item())
        return str(x.dtype), tuple(x.shape), data
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items() if name not in VOLATILE}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return repr(x)


def differences(expected, found, where=""):
    """Where two runs' files differ, one more or one less included: a list of paths into them."""
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        expected, found = dict(enumerate(expected)), dict(enumerate(found))
    if isinstance(expected, dict) and isinstance(found, dict):
        out = []
        for name in {**expected, **found}:
            out += differences(expected.get(name), found.get(name), f"{where}/{name}")
        return out
    if expected == found:
        return []
    return [f"{where}: {str(expected)[:60]} is {str(found)[:60]}"]
