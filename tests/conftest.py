"""
Small real data, and scripts run as a user runs them.

Nothing is downloaded, and nothing outside tmp_path is written.
"""
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
from model import init_weights
from nanorank.errors import UserError
from nanorank.images import RECORD

REPO = pathlib.Path(__file__).resolve().parent.parent
SPEED = ("tokens_per_s", "images_per_s", "mfu")  # log entries that differ from run to run
torch.set_num_threads(1)  # as in the subprocesses: sums in the same order, so runs can be compared to the bit

TINY = {
    "dataset": "text", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32,
    "batch_size": 4, "total_batch_size": 4, "max_iters": 20, "warmup_iters": 5,
    "eval_interval": 10, "eval_iters": 2, "rank_interval": 10, "log_interval": 5,
    "device": "cpu", "attn_wd": 1.0, "learning_rate": 1e-2,
}


def crc32(data):
    return f"{zlib.crc32(data):08x}"


def write_data(folder, splits, vocab_size=257, dtype="uint16", tokenizer="byte"):
    """A data folder from {split: [token arrays, one a file]}."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"tokenizer": tokenizer, "vocab_size": vocab_size, "eot": vocab_size - 1, "dtype": dtype,
            "source": "test", "splits": {}}
    for split, files in splits.items():
        entry = {"tokens": sum(map(len, files)), "documents": 1, "files": []}
        for i, tokens in enumerate(files):
            name = f"{split}_{i:05d}.bin"
            data = np.asarray(tokens, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
            (folder / name).write_bytes(data)
            entry["files"].append({"name": name, "tokens": len(tokens), "crc32": crc32(data)})
        meta["splits"][split] = entry
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def write_images(folder, files):
    """Writes {name: bytes} into a folder of images; returns their entries for meta.json."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [{"name": name, "bytes": len(data), "crc32": crc32(data)} for name, data in files.items()]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with the data set "text": bytes of some of Python's own source files."""
    root = tmp_path_factory.mktemp("data")
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "calendar", "csv", "datetime", "difflib")
    files = [np.frombuffer((library / f"{name}.py").read_bytes(), dtype=np.uint8) for name in names]
    write_data(root / "text", {"train": files[:4], "val": [files[4][:3000]], "test": [files[5][:2000]]})
    return root


@pytest.fixture(scope="session")
def image_dir(tmp_path_factory):
    """A folder with the image set "pictures": smooth pictures of many shapes, of 7 classes that colour and
    direction tell apart."""
    folder = tmp_path_factory.mktemp("images") / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    meta = {"kind": "images", "classes": [f"c{i}" for i in range(7)], "short_side": 18,
            "mean": [0.5, 0.4, 0.6], "std": [0.2, 0.25, 0.3], "source": "test", "splits": {}}
    for split, n in (("train", 100), ("val", 23), ("test", 31)):
        pixels = []
        index = np.zeros(n, dtype=RECORD)
        offset = 0
        for i in range(n):
            h, w = rng.permutation([18, rng.integers(18, 50)])
            label = int(rng.integers(7))
            y, x = np.mgrid[:h, :w]
            wave = np.sin(x * np.cos(label) / 3 + y * np.sin(label) / 3 + rng.uniform(0, 6))[..., None]
            image = 127 + 60 * wave * np.cos([label, 2 * label, 3 * label]) + rng.normal(0, 20, (h, w, 3))
            pixels.append(image.clip(0, 255).astype(np.uint8).tobytes())
            index[i] = offset, h, w, label
            offset += len(pixels[-1])
        files = {f"{split}.bin": b"".join(pixels), f"{split}.idx": index.tobytes()}
        meta["splits"][split] = {"images": n, "files": write_images(folder, files)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder.parent


def run_main(trainer, settings):
    """trainer.main() in this process with these settings. Returns result.json, None where there is none."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            assert hasattr(trainer, name), name
            patch.setattr(trainer, name, value)
        trainer.main()
    result = pathlib.Path(settings["out_dir"]) / "result.json"
    return json.loads(result.read_text()) if result.exists() else None


@pytest.fixture
def train(data_dir):
    """train(out_dir, name=value, ...) runs train_lm; returns result.json or None."""
    def run(out_dir, **settings):
        return run_main(train_lm, {**TINY, "data_dir": str(data_dir), "out_dir": str(out_dir), **settings})
    return run


@contextlib.contextmanager
def refused(*words):
    """Asserts that the block raises a UserError with these words in it."""
    with pytest.raises(UserError) as error:
        yield
    for word in words:
        assert word in str(error.value)


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
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
            "--master_addr=127.0.0.1", f"--master_port={port}"]


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def environment(**extra):
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **threads, "WANDB_MODE": "offline", **extra}


def command(*args):
    """Runs a command line in the repository; returns the CompletedProcess with its output as text."""
    return subprocess.run([*map(str, args)], cwd=REPO, env=environment(), capture_output=True, text=True,
                          timeout=300)


def script(*args):
    """Runs `python ARGS` in the repository; returns the CompletedProcess with its output as text."""
    return command(sys.executable, *args)


def one_line_exit_2(result, *words):
    """Asserts that a script refused its input: exit 2, one line, no traceback, and these words in it."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def log_lines(out_dir, without=SPEED):
    """The objects of log.jsonl, without these entries."""
    lines = []
    for text in (out_dir / "log.jsonl").read_text().splitlines():
        lines.append({name: x for name, x in json.loads(text).items() if name not in without})
    return lines


def logged(out_dir, name):
    """The values that a run logged under a name."""
    return [line[name] for line in log_lines(out_dir, without=()) if name in line]


def load(path):
    return torch.load(path, weights_only=True)


def off_initial(model, seed=0):
    """The model, initialised, with biases and norms off their initial values, so that a mix-up shows."""
    init_weights(model, seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def assert_same_weights(a, b, tolerance=0.0):
    """Asserts that two checkpoint files hold the same weights, to the bit where tolerance is 0."""
    a, b = load(a)["model"], load(b)["model"]
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            assert torch.allclose(a[name], b[name], rtol=0, atol=tolerance), name
        else:
            assert torch.equal(a[name], b[name]), name
