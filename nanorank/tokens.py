"""
data/NAME/ on disk -> memory-mapped tokens, read in batches that are a pure function of (data, seed, index).

prepare_pile.py writes the folder: flat little-endian uint16 or uint32 token files and meta.json,

    {"tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256, "dtype": "uint16", "source": "...",
     "checksum": "crc32",
     "splits": {"train": {"tokens": 9, "documents": 1,
                          "files": [{"name": "train.bin", "tokens": 9, "crc32": "0a1b2c3d"}]},
                "val": {...}, "test": {...}}}

Training draws sequences 0, 1, 2, ... of an endless stream. Each epoch is a permutation of the windows
[i * block_size, (i + 1) * block_size] of every file. It is computed, not stored, so it costs nothing
whatever the corpus, and neither resuming nor another number of processes needs a generator's state.
"""
import json
import os
import zlib

import numpy as np

from nanorank.errors import UserError
from nanorank.rng import shuffled

IGNORE = -1        # target of a padded position
CHECKED = 1 << 28  # splits up to this many bytes are compared with their checksums when opened (0.1 s)
AGAIN = "copy it again, or run prepare_pile.py for this data set again"


class TokenSplit:
    """One split (train, val, test) of a data folder, memory-mapped.

    n_tokens: tokens in it. n_windows: full windows of block_size + 1 tokens. n_rows: n_windows and the
    shorter tails of files. Raises UserError that names file and fix where the folder is absent, truncated
    or not what its meta.json says.
    """

    def __init__(self, folder, split, block_size):
        self.folder = folder
        self.block_size = block_size
        self.meta = read_meta(folder)
        self.n_tokens = 0
        self.n_windows = 0
        self.files = []         # a file's tokens as windows (n, block_size + 1)
        self.first_window = []  # of each file, its number in the split
        self.tails = []         # what is left of a file behind its last window

        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[self.meta["dtype"]])
        files = self.meta["splits"].get(split, {}).get("files", [])
        n_bytes = sum(file["tokens"] for file in files) * dtype.itemsize
        for file in files:
            tokens = open_tokens(os.path.join(folder, file["name"]), file["tokens"], dtype)
            if n_bytes <= CHECKED:
                check_crc32(folder, file, AGAIN)
            self.add_file(tokens)

        self.n_rows = self.n_windows + len(self.tails)
        if self.n_rows == 0:
            more = "more text" if split == "train" else f"--{split}_fraction or --{split}_source of its own"
            raise UserError(f"{folder}: the {split} split holds {self.n_tokens} tokens, too few to predict "
                            f"any; prepare it again (prepare_pile.py) with {more}")
        if split == "train" and self.n_windows == 0:
            raise UserError(f"{folder}: no file of the train split holds block_size + 1 = {block_size + 1} "
                            "tokens; lower --block_size")

    def add_file(self, tokens):
        T, step = self.block_size, tokens.itemsize
        n = max(0, (len(tokens) - 1) // T)
        if n > 0:
            # windows overlap by one token: the last target of one is the first input of the next
            windows = np.lib.stride_tricks.as_strided(tokens, (n, T + 1), (T * step, step), writeable=False)
            self.files.append(windows)
            self.first_window.append(self.n_windows)
        tail = tokens[n * T:]
        if len(tail) > 1:
            self.tails.append(tail)
        self.n_tokens += len(tokens)
        self.n_windows += n

    def windows(self, index):
        """Windows number index, an int array in [0, n_windows), as int64 (len(index), block_size + 1)."""
        if len(self.files) == 1:
            return self.check_ids(self.files[0][index].astype(np.int64))
        out = np.empty((len(index), self.block_size + 1), dtype=np.int64)
        owner = np.searchsorted(self.first_window, index, side="right") - 1
        for f in np.unique(owner):
            mine = owner == f
            out[mine] = self.files[f][index[mine] - self.first_window[f]]
        return self.check_ids(out)

    def check_ids(self, ids):
        if ids.max(initial=0) >= self.meta["vocab_size"]:
            raise UserError(f"{self.folder}: token id {ids.max()} is not in the vocabulary of "
                            f"{self.meta['vocab_size']} that its meta.json states: the data is damaged, "
                            "prepare it again")
        return ids

    def sample(self, seed, start, count):
        """Inputs and targets (count, block_size) of sequences start, start + 1, ... of a seed's stream."""
        window = self.windows(shuffled(self.n_windows, seed, start, count))
        return window[:, :-1], window[:, 1:]

    def rows(self, index):
        """Inputs and targets (len(index), block_size) of rows number index: windows file by file, then tails.

        All rows together predict every token but each file's first exactly once. Tails are padded, and an
        index of -1 is a row of padding: their targets are IGNORE.
        """
        x = np.zeros((len(index), self.block_size), dtype=np.int64)
        y = np.full_like(x, IGNORE)
        full = (index >= 0) & (index < self.n_windows)
        if full.any():
            window = self.windows(index[full])
            x[full], y[full] = window[:, :-1], window[:, 1:]
        for i in np.flatnonzero(index >= self.n_windows):
            tail = self.check_ids(self.tails[index[i] - self.n_windows].astype(np.int64))
            n = len(tail) - 1
            x[i, :n], y[i, :n] = tail[:-1], tail[1:]
        return x, y

    def fingerprint(self):
        """A string that tells one data set from another: its tokenizer and a checksum of checksums."""
        files = [(split, file["name"], file["tokens"], file.get("crc32"))
                 for split, entry in sorted(self.meta["splits"].items()) for file in entry["files"]]
        return f"{self.meta['tokenizer']} {zlib.crc32(json.dumps(files).encode()):08x}"


def open_splits(open_split):
    """{"train", "val", "test": open_split(name)}, without "test" where the data folder has none."""
    data = {split: open_split(split) for split in ("train", "val")}
    files = data["val"].meta["splits"].get("test", {}).get("files", [])
    if any(file.get("tokens", file.get("bytes")) for file in files):
        data["test"] = open_split("test")
    return data


def held_out(data):
    """The splits to evaluate on: val, and test where there is one."""
    return [split for split in data if split != "train"]


def read_meta(folder):
    """meta.json of a folder of tokens, checked. A UserError names the command that makes the folder."""
    name = os.path.basename(os.path.normpath(folder))
    flags = {"pile": "", "python": " --source=python"}.get(name, f" --source=YOUR_TEXT --dataset={name}")
    meta = load_meta(folder, check_token_meta, f"python prepare_pile.py{flags}")
    check_apart(folder, meta)
    return meta


def check_token_meta(meta):
    """Raises ValueError, KeyError or the like where meta is not what prepare_pile.py writes."""
    for name, split in meta["splits"].items():
        for file in split["files"]:
            plain_name = os.path.basename(file["name"]) == file["name"]
            if not plain_name or type(file["tokens"]) is not int or not 0 <= file["tokens"] < 2**48:
                raise ValueError(f"bad file entry {str(file)[:80]}")
        n_tokens = sum(file["tokens"] for file in split["files"])
        if split.get("tokens") not in (None, n_tokens):
            raise ValueError(f"the tokens of its {name} files do not sum to {str(split['tokens'])[:40]}")
    vocab_size = meta["vocab_size"]
    is_size = type(vocab_size) is int and 1 <= vocab_size <= 2**22
    if meta["dtype"] not in ("uint16", "uint32") or not is_size:
        raise ValueError("dtype is uint16 or uint32, vocab_size a positive int, 2**22 at most")
    if not isinstance(meta["tokenizer"], str):
        raise ValueError("tokenizer is a name")


def load_meta(folder, check, command):
    """meta.json of a data folder that passes check(meta). command: the one that makes such a folder."""
    path = os.path.join(folder, "meta.json")
    make = f"make it with: {command}"
    if not os.path.exists(path):
        raise UserError(f"{folder} is not a prepared data set ({path} is missing); {make}")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        check(meta)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not what its script writes ({reason}); {make}") from None
    return meta


def check_apart(folder, meta):
    """Raises UserError where val or test shares a file with train: a loss on it would tell nothing.

    The same file is one listed twice, linked, or of the same size and checksum.
    """
    train = {}  # {path, (device, inode) or (size, checksum): name}
    splits = sorted(meta["splits"].items(), key=lambda item: item[0] != "train")
    for split, entry in splits:
        for file in entry["files"]:
            path = os.path.join(folder, file["name"])
            marks = [path]
            if os.path.exists(path):
                stat = os.stat(path)
                marks.append((stat.st_dev, stat.st_ino))
            size = file.get("tokens", file.get("bytes"))
            # images of the same shapes and labels have the same index
            if size and file.get("crc32") and not path.endswith(".idx"):
                marks.append(f"{size} {file['crc32']}")
            for mark in marks:
                if split == "train":
                    train[mark] = file["name"]
                elif mark in train:
                    raise UserError(f"{path} of the {split} split is {train[mark]} of train: a loss on it "
                                    "would tell nothing; prepare the data again, with splits of their own")


def open_tokens(path, n_tokens, dtype):
    """A token file as a read-only memory map, its size checked."""
    check_file_size(path, n_tokens * dtype.itemsize, AGAIN)
    if n_tokens == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(n_tokens,)))


def check_file_size(path, n_bytes, fix):
    """Raises UserError where a file does not hold the bytes that meta.json states. fix: the advice."""
    if not os.path.exists(path):
        raise UserError(f"{path} is missing: {fix}")
    size = os.path.getsize(path)
    if size != n_bytes:
        raise UserError(f"{path} holds {size} bytes, not the {n_bytes} that were written: {fix}")


def check_crc32(folder, file, fix):
    """Raises UserError where a file's bytes are not those that its entry in meta.json was made of."""
    path, value = os.path.join(folder, file["name"]), file.get("crc32")
    if value is not None and crc32(path) != value:
        raise UserError(f"{path} is damaged, its checksum is not the one in meta.json: {fix}")


def crc32(path, chunk=1 << 24):
    """crc32 of a file as 8 hex digits."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(chunk):
            value = zlib.crc32(block, value)
    return f"{value:08x}"
