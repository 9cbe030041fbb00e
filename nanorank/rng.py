"""
Random numbers without a generator: pure functions of a seed and a sample number.

    index = shuffled(n, seed, start, count)   # of an endless stream over range(n), reshuffled each epoch
    u = uniform(seed, "crop", numbers, 22)    # (len(numbers), 22) in [0, 1)
    lam = beta(0.2, seed, "mixup", numbers)   # (len(numbers),)

There is no state to save: a run draws the same numbers after a resume and on any number of processes.
"""
import itertools
import math

import numpy as np

from nanorank.errors import UserError

GAMMA = 0x9E3779B97F4A7C15  # splitmix64's step, 2**64 / golden ratio


def hash64(number):
    """A Python int below 2**64 that depends on every bit of `number`."""
    return int(mix64(np.array([(number + GAMMA) & (2**64 - 1)], dtype=np.uint64))[0])


def mix64(x):
    """splitmix64's finaliser on a uint64 array (Steele et al. 2014); sums and products wrap."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def to_unit(x):
    """A uint64 array as float64 in [0, 1), from the upper 53 bits."""
    return (x >> np.uint64(11)) * 2.0**-53


def uniform(seed, purpose, numbers, k=None):
    """Uniform float64 in [0, 1) for each sample number, (n,), or (n, k) with a k; a larger k adds columns.

    Numbers drawn for other purposes (any string) are independent of these.
    """
    key = hash64(seed)
    for byte in purpose.encode():
        key = hash64(key + byte)
    counter = mix64(np.asarray(numbers).astype(np.uint64) + np.uint64(key))
    columns = np.arange(1, (k or 1) + 1, dtype=np.uint64)
    values = to_unit(mix64(counter[:, None] + columns * np.uint64(GAMMA)))
    return values[:, 0] if k is None else values


def beta(alpha, seed, purpose, numbers):
    """A Beta(alpha, alpha) variate for each sample number, float64 (n,)."""
    if not 0 < alpha < np.inf:
        raise UserError(f"alpha={alpha}: Beta(alpha, alpha) expects a positive number")
    numbers = np.asarray(numbers)
    if alpha > 1:  # Ulrich 1984, no rejection
        u, v = uniform(seed, purpose, numbers, 2).T
        return 0.5 + 0.5 * np.sqrt(1 - u ** (2 / (2 * alpha - 1))) * np.cos(2 * np.pi * v)

    # Johnk 1964 by rejection; in logarithms, because u ** (1 / alpha) underflows at small alpha
    out = np.empty(len(numbers))
    todo = np.arange(len(numbers))
    for tries in itertools.count():  # each accepts at least half of them
        if not len(todo):
            return out
        u = np.log(1 - uniform(seed, f"{purpose} {tries}", numbers[todo], 2)) / alpha
        total = np.logaddexp(u[:, 0], u[:, 1])
        out[todo] = np.exp(u[:, 0] - total)
        todo = todo[total > 0]


def shuffled(n, seed, start, count):
    """Items start ... start + count - 1 of an endless stream: range(n), permuted anew in each epoch."""
    epoch, position = np.divmod(np.arange(start, start + count, dtype=np.int64), n)
    out = np.empty_like(position)
    for e in np.unique(epoch):
        key = hash64(hash64(seed) + int(e))
        out[epoch == e] = permute(position[epoch == e], n, key)
    return out


def permute(i, n, key):
    """Where a pseudo-random permutation of range(n), chosen by `key`, sends i (an int array). O(1) memory.

    A Feistel network on two digits to the base ceil(sqrt(n)), walked along its cycles until the value is
    below n (Black & Rogaway 2002, "generalised Feistel").
    """
    base = np.uint64(math.isqrt(max(n - 1, 0)) + 1)
    keys = mix64(np.arange(6, dtype=np.uint64) + np.uint64(key & (2**64 - 1)))
    out = np.array(i, dtype=np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = np.divmod(out[todo], base)
        for k in keys:
            left, right = right, (left + mix64(right + k) % base) % base
        out[todo] = left * base + right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)
