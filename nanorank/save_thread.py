"""
Writing checkpoints while training goes on.
"""
import copy
from concurrent.futures import ThreadPoolExecutor

import torch

from nanorank.device import synchronize
from nanorank.files import save_pt


class SaveThread:
    """Writes checkpoints in a thread, one at a time.

    save(path, ckpt) waits for the one before, copies all tensors and returns. wait() returns once all is on
    disk. Both raise what went wrong with the one before, OSError for a full disk. The copies take as much
    memory of the host again as the checkpoint, page-locked where tensors are on a GPU.
    """

    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.coming = None

    def save(self, path, ckpt):
        self.wait()
        self.coming = self.thread.submit(save_pt, path, copied(ckpt))

    def wait(self):
        coming = self.coming
        self.coming = None
        if coming:
            coming.result()


def copied(ckpt):
    """A checkpoint's containers and tensors once more, on the host. Tensors that share memory still do."""
    copies = {}  # by place in memory, shape and strides
    result = copy_nested(ckpt, copies)
    for device in {key[0] for key in copies}:
        synchronize(device)  # until then the copies are under way
    return result


def copy_nested(x, copies):
    if isinstance(x, dict):
        again = copy.copy(x)  # with what torch notes beside a state dict's tensors
        for name, value in x.items():
            again[name] = copy_nested(value, copies)
        return again
    if isinstance(x, (list, tuple)):
        return type(x)(copy_nested(value, copies) for value in x)
    if not isinstance(x, torch.Tensor):
        return x
    key = x.device, x.dtype, x.data_ptr(), x.shape, x.stride()
    if key not in copies:
        there = torch.empty_like(x, device="cpu", pin_memory=x.device.type == "cuda")
        copies[key] = there.copy_(x.detach(), non_blocking=True)
    return copies[key]
