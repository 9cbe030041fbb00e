"""
Float64 arithmetic on a CPU, head by head, on all cores. For spectra.py.
"""
import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from nanorank.shards import n_cores

BUFFER = 1 << 19  # float64 numbers that a thread converts at a time: 4 MB, a factor of 4096 x 128


def over_heads(way, A, B, heads):
    """[way(A[i], B[i], buffer) for i in heads], on numpy views of CPU tensors A, B (n, d, r).

    Runs on as many threads as torch has and this process may use. In each, numpy and torch have one thread.
    """
    A, B = as_numpy(A), as_numpy(B)
    threads = min(n_cores(), torch.get_num_threads(), len(heads))
    if A[0].size * len(heads) < 1 << 18:  # takes less time than starting threads
        threads = 1
    todo = iter(heads)

    def work(_):
        torch.set_num_threads(1)   # it counts for the thread that calls it
        buffer = np.empty(BUFFER)  # reused: fresh memory for each block costs more than the arithmetic
        with np.errstate(all="ignore"):  # check_finite finds what is not finite
            return [(i, way(A[i], B[i], buffer)) for i in todo]  # the next head that no thread has taken

    with threads_of_torch_kept():
        if threads == 1:
            parts = work(0)
        else:
            with blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
                parts = sorted(sum(pool.map(work, range(threads)), []), key=lambda part: part[0])
    return [result for _, result in parts]


@contextlib.contextmanager
def threads_of_torch_kept():
    """Leaves torch with the threads it had: the number set last counts for every thread new to torch."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_numpy(X):
    """A numpy view of a CPU tensor; of bfloat16, which numpy lacks, its bits in uint16."""
    return (X.view(torch.uint16) if X.dtype == torch.bfloat16 else X).numpy()


@functools.cache
def blas():
    return ThreadpoolController()  # looks through the loaded libraries, some milliseconds


def as_float64(X, buffer=None):
    """X (m, n) in float64, in the buffer if there is one. A bfloat16 X comes as its bits in uint16."""
    if X.dtype == np.uint16:  # the upper half of a float32
        X = np.left_shift(X, 16, dtype=np.uint32).view(np.float32)
    if buffer is None:
        return X.astype(np.float64)
    Y = buffer[:X.size]
    by_columns = X.strides[1] >= X.strides[0]  # keep the order of X in memory
    Y = Y.reshape(X.shape[::-1]).T if by_columns else Y.reshape(X.shape)
    np.copyto(Y, X)
    return Y
