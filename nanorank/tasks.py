"""
Synthetic tasks for train_lm.py's --dataset=NAME, whose rows are a pure function of (seed, row number).

    split = TaskSplit("recall", "train", block_size=32)   # has the methods of tokens.TokenSplit
    x, y = split.sample(seed=1337, start=0, count=16)     # inputs, targets (16, 32) int64; -1: no loss there

A new task is a function like recall() in TASKS. All its rows must have the same number of targets, so that
the mean over micro-batches and processes is the mean over targets.
"""
import numpy as np

from nanorank.errors import UserError
from nanorank.rng import GAMMA, hash64, mix64, to_unit
from nanorank.tokens import IGNORE

EVAL_ROWS = 4096         # of val and of test
TRAIN_ROWS = 2**40       # more than any run sees
KEYS, VALUES = 16, 16    # recall: tokens 0 ... KEYS - 1 are keys, the next VALUES are values


def recall(random, block_size):
    """Associative recall: block_size / 4 pairs of a key and its value, then as many queries.

    A query is one of these keys, followed by its value, which is the target. The keys of a row are distinct.
    random(k): (rows, k) numbers, uniform in [0, 1). Returns inputs and targets (rows, block_size).
    """
    n = block_size // 4
    if block_size % 4 or not 1 <= n <= KEYS:
        raise UserError(f"--block_size={block_size}: recall has 4 tokens a pair, "
                        f"so it needs a multiple of 4 up to {4 * KEYS}")
    keys = random(KEYS).argsort(1)[:, :n]
    values = KEYS + (VALUES * random(n)).astype(np.int64)
    asked = (n * random(n)).astype(np.int64)

    x = np.empty((len(keys), 4 * n), dtype=np.int64)
    x[:, 0:2 * n:2] = keys
    x[:, 1:2 * n:2] = values
    x[:, 2 * n::2] = np.take_along_axis(keys, asked, 1)
    x[:, 2 * n + 1::2] = np.take_along_axis(values, asked, 1)
    y = np.full_like(x, IGNORE)
    y[:, 2 * n::2] = x[:, 2 * n + 1::2]
    return x, y


TASKS = {"recall": (KEYS + VALUES, recall)}  # name: (vocabulary size, function)


class TaskSplit:
    """One split of a task, with the attributes and methods of TokenSplit; val and test know no seed."""

    def __init__(self, task, split, block_size):
        self.block_size = block_size
        self.split = split
        vocab_size, self.make = TASKS[task]
        self.meta = {"tokenizer": task, "vocab_size": vocab_size}
        self.n_rows = self.n_windows = TRAIN_ROWS if split == "train" else EVAL_ROWS
        self.n_tokens = self.n_rows * block_size
        self.rows(np.arange(1))  # a block_size that does not fit fails here

    def generate(self, key, index):
        """Rows number index (int array) of the stream `key`: inputs and targets (len(index), block_size)."""
        state = mix64(np.uint64(key) + index.astype(np.uint64))[:, None]
        used = 0

        def random(k):  # splitmix64, a generator for each row
            nonlocal used
            step = np.arange(used + 1, used + k + 1, dtype=np.uint64)
            used += k
            return to_unit(mix64(state + step * np.uint64(GAMMA)))

        return self.make(random, self.block_size)

    def sample(self, seed, start, count):
        """Rows number start ... start + count - 1 of the training stream of `seed`."""
        return self.generate(hash64(hash64(seed)), np.arange(start, start + count))

    def rows(self, index):
        """Rows number index of this split. An index of -1 is a row of padding, its targets IGNORE."""
        key = hash64(("train", "val", "test").index(self.split))
        x, y = self.generate(key, index)
        y[index < 0] = IGNORE
        return x, y

    def fingerprint(self):
        """Tells this data from other data when a run is resumed."""
        return f"{self.meta['tokenizer']} {self.meta['vocab_size']}"
