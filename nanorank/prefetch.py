"""
Reading from disk, and preparing batches on a GPU, while computing.
"""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


def read_ahead(read, items, initializer=None):
    """Yields read(item) for each item; a thread reads the next one meanwhile: two results are in memory.

    initializer: what the thread does first.
    """
    with ThreadPoolExecutor(1, initializer=initializer) as thread:
        coming = None
        for item in items:
            ready = coming
            coming = thread.submit(read, item)
            if ready:
                yield ready.result()
            del ready  # let go before waiting for the next
        if coming:
            yield coming.result()


def prefetch(read, keys, device, prepare=None):
    """Yields read(key), a tuple of numpy arrays, as tensors on `device` for each key.

    prepare: what is done with them there, if anything: then prepare(key, *tensors), a tuple of tensors, is
    yielded. On CUDA a thread reads, pins, copies and prepares one ahead, on a stream of its own.
    """
    if device.type != "cuda":
        for key in keys:
            batch = tuple(as_tensor(array).to(device) for array in read(key))
            yield prepare(key, *batch) if prepare else batch
        return

    stream = torch.cuda.Stream(device)

    def load(key):
        pinned = [as_tensor(array).pin_memory() for array in read(key)]  # no copy of what is pinned
        with torch.cuda.stream(stream):
            batch = tuple(x.to(device, non_blocking=True) for x in pinned)
            if prepare:
                batch = prepare(key, *batch)
            return batch, stream.record_event()

    def use_device():  # a thread's GPU is the first one until it says so
        if device.index is not None:
            torch.cuda.set_device(device)

    for batch, done in read_ahead(load, keys, use_device):
        here = torch.cuda.current_stream(device)
        here.wait_event(done)  # the GPU waits, not the host
        for x in batch:
            x.record_stream(here)  # its memory is not used again before `here` is through with it
        yield batch


def as_tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))
