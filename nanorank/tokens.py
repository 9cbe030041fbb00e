"""
`data/NAME/` on disk -> checked, memory-mapped, and read in batches that are a pure function of (data, seed, index).

The folder, as prepare_pile.py writes it: flat little-endian uint16 or uint32 token files and `meta.json`,

    {"tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256, "dtype": "uint16", "source": "...", "checksum": "crc32",
     "splits": {"train": {"tokens": 9, "documents": 1, "files": [{"name": "train.bin", "tokens": 9, "crc32": "0a1b2c3d"}]},
                "val": {...}, "test": {...}}}

Training draws sequence number 0, 1, 2, ... of an endless stream: each epoch is a permutation of the windows
[i * block_size, (i + 1) * block_size] of every file, computed, not stored, so it costs nothing whatever the corpus, and
resuming, other world sizes and evaluation need no generator state.
"""
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from nanorank.errors import UserError
from nanorank.rng import shuffled

IGNORE = -1  # target of a padded position
CHECKED = 1 << 28  # bytes of a split whose checksums are verified when it is opened (0.1 s); prepare_pile.py verifies any, run again


class TokenSplit:
    """One split (train, val, test) of a data folder, memory-mapped.

    n_tokens: tokens in it; n_windows: full windows of block_size + 1 tokens; n_rows: n_windows and the shorter tails of files.
    Raises UserError naming file and fix where the folder is absent, truncated or not what its meta.json says.
    """

    def __init__(self, folder, split, block_size):
        self.folder, self.block_size = folder, block_size
        self.meta = read_meta(folder)
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[self.meta["dtype"]])
        self.n_tokens, self.n_windows = 0, 0
        self.files, self.firsts, self.tails = [], [], []  # token arrays as windows (n, block_size + 1), their first window's number
        files = self.meta["splits"].get(split, {}).get("files", [])
        small = sum(file["tokens"] for file in files) * dtype.itemsize <= CHECKED
        for file in files:
            tokens = open_tokens(os.path.join(folder, file["name"]), file["tokens"], dtype)
            if small:
                check_crc32(folder, file, "copy it again, or run prepare_pile.py for this data set again")
            self.n_tokens += len(tokens)
            n = max(0, (len(tokens) - 1) // block_size)
            if n:
                step = dtype.itemsize
                self.files.append(np.lib.stride_tricks.as_strided(tokens, (n, block_size + 1), (block_size * step, step), writeable=False))
                self.firsts.append(self.n_windows)
                self.n_windows += n
            if len(tokens) - n * block_size > 1:
                self.tails.append(tokens[n * block_size:])
        self.n_rows = self.n_windows + len(self.tails)
        if not self.n_rows:
            raise UserError(f"{folder}: the {split} split holds {self.n_tokens} tokens, too few to predict any; prepare more text")
        if split == "train" and not self.n_windows:
            raise UserError(f"{folder}: no file of the train split holds block_size + 1 = {block_size + 1} tokens; lower --block_size")

    def windows(self, index):
        """Windows number index (an int array in [0, n_windows)) as int64 (len(index), block_size + 1), by one gather per file."""
        if len(self.files) == 1:
            out = self.files[0][index].astype(np.int64)  # one strided gather
        else:
            out = np.empty((len(index), self.block_size + 1), dtype=np.int64)
            owner = np.searchsorted(self.firsts, index, side="right") - 1
            for f in np.unique(owner):
                out[owner == f] = self.files[f][index[owner == f] - self.firsts[f]]
        return self.known(out)

    def known(self, ids):
        """The same ids. Raises UserError for one that is not in the vocabulary."""
        if ids.max(initial=0) >= self.meta["vocab_size"]:
            raise UserError(f"{self.folder}: token id {ids.max()} is not in the vocabulary of {self.meta['vocab_size']} "
                             "that its meta.json states: the data is damaged, prepare it again")
        return ids

    def sample(self, seed, start, count):
        """Sequences number start ... start + count - 1 of the training stream of `seed`: inputs and targets (count, block_size)."""
        window = self.windows(shuffled(self.n_windows, seed, start, count))
        return window[:, :-1], window[:, 1:]

    def rows(self, index):
        """Rows number index (ints in [0, n_rows), file by file, then tails) as inputs and targets (len(index), block_size).

        Read all rows once and every token but each file's first is predicted once. Tails are padded, and an index of -1
        is a row of padding: their targets are IGNORE.
        """
        x = np.zeros((len(index), self.block_size), dtype=np.int64)
        y = np.full_like(x, IGNORE)
        full = (index >= 0) & (index < self.n_windows)
        if full.any():
            window = self.windows(index[full])
            x[full], y[full] = window[:, :-1], window[:, 1:]
        for i in np.flatnonzero(index >= self.n_windows):
            tail = self.known(self.tails[index[i] - self.n_windows].astype(np.int64))
            x[i, :len(tail) - 1], y[i, :len(tail) - 1] = tail[:-1], tail[1:]
        return x, y

    def fingerprint(self):
        """What tells one prepared data set from another: its tokenizer and the checksum of its files' checksums."""
        files = [(split, file["name"], file["tokens"], file.get("crc32"))
                 for split, entry in sorted(self.meta["splits"].items()) for file in entry["files"]]
        return f"{self.meta['tokenizer']} {zlib.crc32(json.dumps(files).encode()):08x}"


def read_meta(folder):
    """meta.json of a data folder, checked. Raises UserError that names the command which makes the folder."""
    path = os.path.join(folder, "meta.json")
    name = os.path.basename(os.path.normpath(folder))
    flags = {"pile": "", "python": " --source=python"}.get(name, f" --source=YOUR_TEXT --dataset={name}")
    make = f"make it with: python prepare_pile.py{flags}"
    if not os.path.exists(path):
        raise UserError(f"{folder} is not a prepared data set ({path} is missing); {make}")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        for name, split in meta["splits"].items():
            for file in split["files"]:
                if os.path.basename(file["name"]) != file["name"] or type(file["tokens"]) is not int or not 0 <= file["tokens"] < 2**48:
                    raise UserError(f"bad file entry {str(file)[:80]}")
            if split.get("tokens") not in (None, sum(file["tokens"] for file in split["files"])):
                raise UserError(f"the tokens of its {name} files do not sum to {str(split['tokens'])[:40]}")
        if meta["dtype"] not in ("uint16", "uint32") or type(meta["vocab_size"]) is not int or not 1 <= meta["vocab_size"] <= 2**22:
            raise UserError("dtype is uint16 or uint32, vocab_size a positive int, 2**22 at most")
        if not isinstance(meta["tokenizer"], str):
            raise UserError("tokenizer is a name")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not what prepare_pile.py writes ({type(error).__name__}: {error}); {make}") from None
    check_apart(folder, meta)
    return meta


def check_apart(folder, meta):
    """Raises UserError where val or test share a file with train: listed in both, the same by a link, or of the same size and checksum."""
    train = {}
    for name, split in sorted(meta["splits"].items(), key=lambda item: item[0] != "train"):
        for file in split["files"]:
            path, size = os.path.join(folder, file["name"]), file.get("tokens", file.get("bytes"))
            stat = os.stat(path) if os.path.exists(path) else None
            crc = None if path.endswith(".idx") else file.get("crc32")  # images of the same shapes and labels have the same index
            for mark in (path, stat and (stat.st_dev, stat.st_ino), size and crc and f"{size} {crc}"):
                if mark and name == "train":
                    train[mark] = file["name"]
                elif mark and mark in train:
                    raise UserError(f"{path} of the {name} split is {train[mark]} of train: a loss on it would tell nothing; "
                                     "prepare the data again, with splits of their own")


def open_tokens(path, n_tokens, dtype):
    """A token file as a read-only memory map, its size checked against meta.json."""
    size = os.path.getsize(path) if os.path.exists(path) else -1
    if size != n_tokens * dtype.itemsize:
        state = "is missing" if size < 0 else f"holds {size} bytes where meta.json says {n_tokens * dtype.itemsize}"
        raise UserError(f"{path} {state}: copy it again, or run prepare_pile.py for this data set again")
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(n_tokens,))) if n_tokens else np.empty(0, dtype)


def check_crc32(folder, file, fix):
    """Raises UserError where a file's bytes are not those that its entry in meta.json was made of; fix: what to do about it."""
    path, value = os.path.join(folder, file["name"]), file.get("crc32")
    if value is not None and crc32(path) != value:
        raise UserError(f"{path} is damaged, its checksum is not the one in meta.json: {fix}")


def crc32(path, chunk=1 << 24):
    """crc32 of a file as 8 hex digits, what meta.json states for it."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(chunk):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def prefetch(make, keys, device):
    """Yields make(key), a tuple of numpy arrays, as tensors on `device` for each key; on CUDA pinned and copied one ahead."""
    if device.type != "cuda":
        for key in keys:
            yield tuple(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in make(key))
        return

    def load(key):
        return tuple(torch.from_numpy(np.ascontiguousarray(array)).pin_memory().to(device, non_blocking=True) for array in make(key))

    use = (torch.cuda.set_device, (device,)) if device.index is not None else (None, ())  # a thread's GPU is the first until it says so
    with ThreadPoolExecutor(1, initializer=use[0], initargs=use[1]) as thread:
        ahead = None
        for key in keys:
            ready, ahead = ahead, thread.submit(load, key)
            if ready:
                yield ready.result()
        if ahead:
            yield ahead.result()

# ------------------------------------------------------------------------------------------------------------- shuffling
