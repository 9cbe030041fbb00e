"""
Batches: a permutation each epoch, the same on any number of processes; every token evaluated once;
damage refused.
"""
import json
import zlib

import numpy as np
import pytest
import torch
from conftest import write_data

from nanorank.prefetch import prefetch
from nanorank.rng import permute, shuffled
from nanorank.tokens import TokenSplit, crc32

SIZES = (100, 7, 33, 1)  # tokens in the files of the folder


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(n):
    seen = [tuple(permute(np.arange(n), n, key)) for key in (0, 1, 2**64 - 1)]
    assert all(sorted(order) == list(range(n)) for order in seen)
    assert n < 64 or len(set(seen)) == 3


def test_permute_spreads():
    """Far corpora: neighbours end far apart, uniformly (a chi-squared over 64 bins, 99.9 % quantile 103)."""
    out = permute(np.arange(100_000), 10**12, 7)
    assert len(np.unique(out)) == 100_000 and out.min() >= 0 and out.max() < 10**12
    counts = np.histogram(out, bins=64, range=(0, 10**12))[0]
    expected = 100_000 / 64
    assert ((counts - expected) ** 2 / expected).sum() < 103
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.02


def test_stream_is_without_replacement_until_an_epoch_ends():
    stream = shuffled(10, seed=3, start=0, count=40).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in stream)
    assert len({tuple(epoch) for epoch in stream}) == 4
    assert not np.array_equal(stream[0], shuffled(10, seed=4, start=0, count=10))


@pytest.mark.parametrize("world_size, batch_size", [(1, 64), (2, 32), (8, 8), (2, 8)])
def test_any_cut_of_the_stream_gives_the_same_sequences(world_size, batch_size):
    """The union of what the processes read is the one stream."""
    pieces = []
    for micro_step in range(64 // world_size // batch_size):
        for rank in range(world_size):
            first = 5 * 64 + (micro_step * world_size + rank) * batch_size
            pieces.append(shuffled(1000, 1, first, batch_size))
    assert np.array_equal(np.concatenate(pieces), shuffled(1000, seed=1, start=5 * 64, count=64))


@pytest.fixture
def folder(tmp_path):
    """Files of SIZES tokens whose values tell their place."""
    files = [np.arange(n) + 1000 * i for i, n in enumerate(SIZES)]
    splits = {"train": files, "val": [file + 1 for file in files], "test": [np.arange(3)]}
    return write_data(tmp_path / "d", splits, vocab_size=4000)


def test_windows_are_consecutive_tokens_of_one_file(folder):
    split = TokenSplit(str(folder), "train", block_size=8)
    assert split.n_tokens == 141 and split.n_windows == 12 + 0 + 4
    x, y = split.sample(seed=0, start=0, count=16)
    assert x.shape == y.shape == (16, 8) and (y == x + 1).all() and (np.diff(x, axis=1) == 1).all()
    assert sorted(x[:, 0]) == [8 * i for i in range(12)] + [2000 + 8 * i for i in range(4)]


@pytest.mark.parametrize("block_size", [1, 2, 8, 32, 99, 200])
def test_rows_predict_every_token_once(folder, block_size):
    split = TokenSplit(str(folder), "val", block_size)
    x, y = split.rows(np.append(np.arange(split.n_rows), -1))
    real = y >= 0
    assert (y[real] == x[real] + 1).all() and not real[-1].any()
    # tokens are numbered from 1; a file's first token has nothing before it
    want = [1000 * file + i for file, n in enumerate(SIZES) for i in range(2, n + 1)]
    assert sorted(y[real]) == want


def test_uint32_ids(tmp_path):
    tokens = [70_000, 1, 100_000, 5]
    folder = write_data(tmp_path / "d", {"train": [tokens]}, vocab_size=100_001, dtype="uint32")
    assert TokenSplit(str(folder), "train", 3).windows(np.array([0])).tolist() == [tokens]


def test_prefetch_keeps_order():
    out = list(prefetch(lambda i: (np.array([i]), np.array([2 * i])), range(5), torch.device("cpu")))
    assert [(int(x), int(y)) for x, y in out] == [(i, 2 * i) for i in range(5)]


def test_crc32_is_zlibs(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert crc32(tmp_path / "x", chunk=7) == f"{zlib.crc32(b'abc' * 1000):08x}"


def test_fingerprint_follows_the_data(folder):
    before = TokenSplit(str(folder), "train", 8).fingerprint()
    write_data(folder, {"train": [np.arange(100) + 1], "val": [np.arange(100)]}, vocab_size=4000)
    assert TokenSplit(str(folder), "train", 8).fingerprint() != before

# ----------------------------------------------------------------------- damage

# bytes that meta.json becomes, None: it is removed
DAMAGED_META = {
    "absent": None,
    "not json": b"{",
    "not utf-8": b"\xff\xfe{}",
    "a list": b"[]",
    "no splits": b"{}",
}
# the same for train_00000.bin, 100 tokens of 2 bytes
DAMAGED_FILE = {
    "no file": lambda data: None,
    "truncated": lambda data: data[:-2],
    "odd length": lambda data: data[:-1],
    "longer": lambda data: data + b"\0\0",
}


def damage(folder, how):
    meta_path, train = folder / "meta.json", folder / "train_00000.bin"
    meta = json.loads(meta_path.read_text())
    files = meta["splits"]["train"]["files"]
    path, data = meta_path, b""
    if how in DAMAGED_META:
        data = DAMAGED_META[how]
    elif how in DAMAGED_FILE:
        path, data = train, DAMAGED_FILE[how](train.read_bytes())
    else:
        if how == "path":
            files[0]["name"] = "../d/train_00000.bin"
        if how == "dtype":
            meta["dtype"] = "float32"
        if how == "vocab":
            meta["vocab_size"] = "many"
        if how == "negative":
            files[0]["tokens"] = -1
        if how == "ids":
            meta["vocab_size"] = 50
        if how == "empty":
            files.clear()
        data = json.dumps(meta).encode()
    path.unlink()
    if data is not None:
        path.write_bytes(data)


@pytest.mark.parametrize("how, words", [
    ("absent", "prepare_pile.py --source=YOUR_TEXT --dataset=d"),
    ("not json", "prepare_pile.py"),
    ("not utf-8", "meta.json"),
    ("a list", "meta.json"),
    ("no splits", "splits"),
    ("no file", "is missing"),
    ("truncated", "holds 198 bytes"),
    ("odd length", "holds 199 bytes"),
    ("longer", "holds 202 bytes"),
    ("path", "bad file entry"),
    ("dtype", "uint16"),
    ("vocab", "vocab_size"),
    ("negative", "bad file entry"),
    ("ids", "not in the vocabulary of 50"),
    ("empty", "do not sum"),
])
def test_damaged_folders_are_refused_in_words(folder, how, words):
    damage(folder, how)
    with pytest.raises(ValueError, match=words) as error:
        TokenSplit(str(folder), "train", 8).windows(np.arange(16))
    assert "\n" not in str(error.value)


def test_too_short_for_the_context(folder):
    with pytest.raises(ValueError, match="lower --block_size"):
        TokenSplit(str(folder), "train", 500)
    assert TokenSplit(str(folder), "val", 500).n_rows == 3  # evaluation takes what there is
