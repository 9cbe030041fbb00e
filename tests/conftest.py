"""Small real data and scripts run as a user runs them. Nothing is downloaded; nothing outside tmp_path is written."""
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import sysconfig
import zlib

import numpy as np
import pytest
import torch

import train_lm
from nanorank.images import RECORD

REPO = pathlib.Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # as in the subprocesses: sums in the same order, so runs can be compared to the bit


def write_data(folder, splits, vocab_size=257, dtype="uint16", tokenizer="byte"):
    """A data folder from {split: [token arrays, one a file]}."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"tokenizer": tokenizer, "vocab_size": vocab_size, "eot": vocab_size - 1, "dtype": dtype, "source": "test", "splits": {}}
    for split, files in splits.items():
        entry = {"tokens": sum(map(len, files)), "documents": 1, "files": []}
        for i, tokens in enumerate(files):
            data = np.asarray(tokens, dtype=f"<u{2 if dtype == 'uint16' else 4}").tobytes()
            (folder / f"{split}_{i:05d}.bin").write_bytes(data)
            entry["files"].append({"name": f"{split}_{i:05d}.bin", "tokens": len(tokens), "crc32": f"{zlib.crc32(data):08x}"})
        meta["splits"][split] = entry
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with the data set "text": bytes of some of Python's own source files."""
    root = tmp_path_factory.mktemp("data")
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [np.frombuffer((library / f"{name}.py").read_bytes(), dtype=np.uint8)
             for name in ("argparse", "ast", "calendar", "csv", "datetime", "difflib")]
    write_data(root / "text", {"train": files[:4], "val": [files[4][:3000]], "test": [files[5][:2000]]})
    return root


@pytest.fixture(scope="session")
def image_dir(tmp_path_factory):
    """A folder with the image set "pictures": smooth pictures of 7 classes, told apart by colour and direction, of many shapes."""
    folder, rng = tmp_path_factory.mktemp("images") / "pictures", np.random.default_rng(0)
    folder.mkdir()
    meta = {"kind": "images", "classes": [f"c{i}" for i in range(7)], "short_side": 18, "mean": [0.5, 0.4, 0.6], "std": [0.2, 0.25, 0.3],
            "source": "test", "splits": {}}
    for split, n in (("train", 100), ("val", 23), ("test", 31)):
        pixels, index, offset = [], np.zeros(n, dtype=RECORD), 0
        for i in range(n):
            h, w, label = *rng.permutation([18, rng.integers(18, 50)]), int(rng.integers(7))
            y, x = np.mgrid[:h, :w]
            wave = np.sin(x * np.cos(label) / 3 + y * np.sin(label) / 3 + rng.uniform(0, 6))[..., None]
            image = 127 + 60 * wave * np.cos([label, 2 * label, 3 * label]) + rng.normal(0, 20, (h, w, 3))
            pixels.append(image.clip(0, 255).astype(np.uint8).tobytes())
            index[i] = offset, h, w, label
            offset += len(pixels[-1])
        files = {f"{split}.bin": b"".join(pixels), f"{split}.idx": index.tobytes()}
        for name, data in files.items():
            (folder / name).write_bytes(data)
        meta["splits"][split] = {"images": n, "files": [{"name": name, "bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
                                                        for name, data in files.items()]}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder.parent


TINY = {"dataset": "text", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4, "total_batch_size": 4,
        "max_iters": 20, "warmup_iters": 5, "eval_interval": 10, "eval_iters": 2, "rank_interval": 10, "log_interval": 5,
        "device": "cpu", "attn_wd": 1.0, "learning_rate": 1e-2}


@pytest.fixture
def train(monkeypatch, data_dir):
    """train(out_dir=..., ...): train_lm.main() in this process with these settings; returns result.json or None."""
    def run(out_dir, **settings):
        with monkeypatch.context() as patch:
            for name, value in {**TINY, "data_dir": str(data_dir), "out_dir": str(out_dir), **settings}.items():
                assert hasattr(train_lm, name), name
                patch.setattr(train_lm, name, value)
            train_lm.main()
        result = pathlib.Path(out_dir) / "result.json"
        return json.loads(result.read_text()) if result.exists() else None
    return run


@contextlib.contextmanager
def signalled_in_step(number):
    """SIGTERM reaches this process in the optimizer step of that number, counted from here."""
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def signalled(*args):
        steps.append(1)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", signalled)
        yield


def torchrun(processes):
    """The beginning of a command line under torchrun, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_addr=127.0.0.1", f"--master_port={port}"]


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def environment(**extra):
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "offline", **extra}


def script(*args, **kwargs):
    """Runs `python ARGS` in the repository; returns the CompletedProcess with its output as text."""
    return subprocess.run([sys.executable, *map(str, args)], cwd=REPO, env=environment(), capture_output=True, text=True,
                          timeout=300, **kwargs)


def one_line_exit_2(result, *words):
    """Asserts that a script refused its input as the design says: exit 2, one line, no traceback, and these words in it."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_weights(a, b, tolerance=0.0):
    a, b = load(a)["model"], load(b)["model"]
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=tolerance) if tolerance else torch.equal(a[name], b[name]), name
