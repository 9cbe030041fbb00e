"""
Fuzzers under hypothesis: the configurator, the data readers and the checkpoint loader take any bytes.

    seen = FUZZERS["data"](1000, folder)     # {"refused": n, "valid": n} of 1000 examples

An example that is neither refused as it should be nor valid is an AssertionError, or any other error.
"""
import contextlib
import io
import json
import math
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from conftest import write_data
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from trials.spoilt import ABSENT, LIES, header_of, llama_like, places, put, with_header, write_images

import train_lm
from configurator import configure, current
from nanorank.checkpoints import Checkpoint
from nanorank.errors import UserError, user_errors
from nanorank.images import ImageSplit
from nanorank.spectra import factors_of, metrics
from nanorank.tokens import TokenSplit

SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TREE = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def budget(n):
    return settings(max_examples=n, derandomize=True, database=None, deadline=None,
                    suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])


def lied(value, paths, changes):
    """The same nested JSON with changes (number of a path, x), but where another took the place away."""
    for i, x in changes:
        path = paths[i % len(paths)]
        with contextlib.suppress(KeyError, IndexError, TypeError, ValueError):
            value = put(value, path, x) if path or x is not ABSENT else value
    return value


def fuzz_configurator(n, folder):
    """Any flags and config file: settings of their defaults' types, or one line and exit 2 (--help: 0)."""
    defaults = current(vars(train_lm))
    path = Path(folder, "c.py")
    seen = {"refused": 0, "valid": 0}
    odd = ["true", "1e5", "1e999", "-1", "nan", "[1]", "(" * 300, "1_0", "0x10"]
    names = st.sampled_from(sorted(defaults)) | st.text(max_size=12)
    values = st.text(max_size=12) | st.integers().map(str) | st.floats().map(str) | st.sampled_from(odd)
    joined = st.builds(lambda name, value: [f"--{name}={value}"], names, values)
    apart = st.builds(lambda name, value: [f"--{name}", value], names, values)
    flags = st.lists(joined | apart, max_size=4)
    line = st.builds(lambda name, value: f"{name} = {value}\n", names, values) | st.text(max_size=20)
    lines = st.lists(line, max_size=4).map(lambda lines: "".join(lines).encode(errors="surrogatepass"))

    @budget(n)
    @given(flags, lines | st.binary(max_size=60), st.booleans())
    def run(flags, content, with_file):
        path.write_bytes(content)
        argv = sum(flags, [str(path)] if with_file else [])
        scope = {**vars(train_lm)}
        err = io.StringIO()
        try:
            with (contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()),
                  warnings.catch_warnings(), user_errors("train_lm.py")):
                warnings.simplefilter("ignore")
                configure(scope, "CKPT", argv)
        except SystemExit as stop:
            seen["refused"] += 1
            lines = err.getvalue().splitlines()
            assert (stop.code, len(lines)) in ((0, 0), (2, 1)), (stop.code, lines)
            return
        seen["valid"] += 1
        for name, default in defaults.items():
            assert type(scope[name]) is type(default), (name, scope[name])
            assert scope[name] == scope[name], name  # no nan

    # for speed: the script is parsed once
    with mock.patch("configurator.script_settings", lambda settings: dict(defaults)):
        run()
    return seen


def fuzz_data(n, folder):
    """Any meta.json and data: a UserError naming the folder, or ids in the vocabulary, images in bounds."""
    folder = Path(folder)
    seen = {"refused": 0, "valid": 0}
    rng = np.random.default_rng(0)
    sizes = {"train": 300, "val": 60, "test": 50}
    write_data(folder / "tokens", {split: [rng.integers(0, 256, size)] for split, size in sizes.items()})
    metas = {"tokens": json.loads((folder / "tokens" / "meta.json").read_text()),
             "images": write_images(folder / "images", rng)}
    change = st.tuples(st.integers(0), st.one_of(st.just(ABSENT), st.sampled_from(LIES[:18]), TREE))

    def read(kind, split):
        if kind == "tokens":
            x = TokenSplit(str(folder / "tokens"), split, 8)
            ids, targets = x.rows(np.arange(min(x.n_rows, 9)))
            assert ids.min() >= 0 and max(ids.max(), targets.max()) < x.meta["vocab_size"]
        else:
            x = ImageSplit(str(folder / "images"), split)
            n = min(x.n_images, 3)
            boxes = np.stack([np.zeros(n), np.zeros(n), x.heights[:n], x.widths[:n]], 1)
            x.read(np.arange(n), boxes.astype(np.int64))
            assert x.labels.max() < len(x.meta["classes"])
        assert str(x.fingerprint())

    @budget(n)
    @given(st.sampled_from(sorted(metas)), st.lists(change, min_size=1, max_size=2), st.binary(max_size=80),
           st.integers(0, 3))
    def run(kind, changes, noise, how):
        meta = lied(metas[kind], [*places(metas[kind])], changes)
        content = noise if how == 0 else json.dumps(meta).encode()
        (folder / kind / "meta.json").write_bytes(content)
        file = folder / kind / ("train_00000.bin" if kind == "tokens" else "train.idx")
        whole = file.read_bytes()
        if how == 1:
            same_size = len(noise) % 2 == 1
            file.write_bytes((noise + whole)[:len(whole)] if same_size else noise)
        try:
            for split in ("train", "val"):
                read(kind, split)
            seen["valid"] += 1
        except UserError as error:
            seen["refused"] += 1
            assert str(folder / kind) in str(error), error
        finally:
            file.write_bytes(whole)
    run()
    return seen


def fuzz_loader(n, folder):
    """Mutated .safetensors and torch files: a UserError that names the file, or heads that are measured."""
    folder = Path(folder)
    seen = {"refused": 0, "valid": 0}
    raw = {"model": llama_like(), "model_args": {"n_head": 4}, "iter_num": 3}
    save_file(llama_like(), folder / "a.safetensors")
    torch.save(raw, folder / "a.pt")
    torch.save(raw, folder / "b.pt", _use_new_zipfile_serialization=False)
    wholes = {name: (folder / name).read_bytes() for name in ("a.safetensors", "a.pt", "b.pt")}
    header, size = header_of(wholes["a.safetensors"])
    starts = {"a.safetensors": size + 8, "a.pt": 1500, "b.pt": 2000}  # bytes before the weights, some
    paths = [path for path in places(header) if path]
    numbers = st.integers(-10, 5000)
    edit = st.tuples(st.booleans(), st.integers(0), st.binary(min_size=1, max_size=6))
    value = st.one_of(st.just(ABSENT), TREE, numbers, st.lists(numbers, max_size=3))
    lies = st.lists(st.tuples(st.integers(0, len(paths) - 1), value), max_size=2)

    def measure(path):
        for layer in Checkpoint(str(path), n_head=4).attention_layers():
            for factors in factors_of(layer).values():
                try:
                    table = metrics(*factors)
                except ValueError as error:  # weights that are not finite
                    raise UserError(f"{path}: {error}") from None
                assert all(math.isfinite(x) for values in table.values() for x in values)

    @budget(n)
    @given(st.sampled_from(sorted(wholes)), st.lists(edit, min_size=1, max_size=3), lies, st.booleans())
    def run(name, edits, lies, in_header):
        data = bytearray(wholes[name])
        if name == "a.safetensors" and in_header and lies:
            data = with_header(wholes[name], json.dumps(lied(header, paths, lies)).encode())
        else:
            for early, at, noise in edits:
                at %= starts[name] if early else len(data)
                data[at:at + len(noise)] = noise
        path = folder / f"x{name[1:]}"
        path.write_bytes(data)
        try:
            measure(path)
            seen["valid"] += 1
        except UserError as error:
            seen["refused"] += 1
            assert str(path) in str(error), error
    run()
    return seen


FUZZERS = {"configurator": fuzz_configurator, "data": fuzz_data, "loader": fuzz_loader}
