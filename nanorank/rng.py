"""
Random numbers without a generator: pure functions of a seed and a sample number.

    index = shuffled(n, seed, start, count)        # an endless stream over range(n), each epoch a fresh permutation
    u = uniform(seed, "crop", numbers, 22)         # (len(numbers), 22) in [0, 1)

A run that resumes, and one on another number of processes, draws the same numbers: there is no state to save.
"""
import math

import numpy as np

from nanorank.errors import UserError


def hash64(number):
    """A Python int below 2**64 that depends on every bit of `number`."""
    return int(mix64(np.array([(number + 0x9E3779B97F4A7C15) & (2**64 - 1)], dtype=np.uint64))[0])


def mix64(x):
    """splitmix64's finaliser on a uint64 array (Steele et al. 2014); sums and products wrap."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def uniform(seed, purpose, numbers, k=None):
    """Uniform float64 in [0, 1) for each sample number: (len(numbers),), or (len(numbers), k) where k is given.

    Numbers drawn for other purposes (any string) are independent of these; a larger k only adds columns.
    """
    key = hash64(seed)
    for byte in purpose.encode():
        key = hash64(key + byte)
    counter = mix64(np.asarray(numbers).astype(np.uint64) + np.uint64(key))
    counter = counter[:, None] + np.arange(1, (k or 1) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    values = (mix64(counter) >> np.uint64(11)) * 2.0**-53
    return values[:, 0] if k is None else values


def beta(alpha, seed, purpose, numbers):
    """A Beta(alpha, alpha) variate for each sample number, float64 (len(numbers),). Raises UserError unless alpha > 0."""
    if not 0 < alpha < np.inf:
        raise UserError(f"alpha={alpha}: Beta(alpha, alpha) expects a positive number")
    if alpha > 1:  # Ulrich 1984, no rejection
        u, v = uniform(seed, purpose, numbers, 2).T
        return 0.5 + 0.5 * np.sqrt(1 - u ** (2 / (2 * alpha - 1))) * np.cos(2 * np.pi * v)
    out, todo, tries = np.empty(len(numbers)), np.arange(len(numbers)), 0
    while len(todo):  # Johnk 1964, in logarithms: u ** (1 / alpha) underflows at small alpha; at least half are done in a round
        u = np.log(1 - uniform(seed, f"{purpose} {tries}", np.asarray(numbers)[todo], 2)) / alpha
        total = np.logaddexp(u[:, 0], u[:, 1])
        out[todo] = np.exp(u[:, 0] - total)
        todo, tries = todo[total > 0], tries + 1
    return out


def shuffled(n, seed, start, count):
    """Items number start ... start + count - 1 of an endless stream over range(n), every epoch a fresh permutation. int64 (count,)."""
    position = np.arange(start, start + count, dtype=np.int64)
    epoch, position = position // n, position % n
    out = np.empty_like(position)
    for e in np.unique(epoch):
        out[epoch == e] = permute(position[epoch == e], n, hash64(hash64(seed) + int(e)))
    return out


def permute(i, n, key):
    """Where a pseudo-random permutation of range(n), chosen by `key`, sends i (an int array). O(1) memory.

    A Feistel network on pairs (left, right) of digits to the base ceil(sqrt(n)), walked along its cycles until the value is
    below n, which nearly all are at once (Black & Rogaway 2002, "generalised Feistel").
    """
    base = np.uint64(math.isqrt(max(n - 1, 0)) + 1)
    keys = mix64(np.arange(6, dtype=np.uint64) + np.uint64(key & (2**64 - 1)))
    out = np.array(i, dtype=np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] // base, out[todo] % base
        for k in keys:
            left, right = right, (left + mix64(right + k) % base) % base
        out[todo] = left * base + right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)
