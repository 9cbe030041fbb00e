"""
Processes and devices: torchrun's process group, the device, its dtype, its speed.
"""
import contextlib
import ctypes
import math
import os
import platform
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanorank.errors import UserError


class World(NamedTuple):
    """Where this process stands: `rank` of `size` processes in all, and its torch.device."""
    rank: int
    size: int
    device: torch.device


def init_dist(device="auto"):
    """Joins torchrun's process group where there is one (nccl on CUDA, gloo elsewhere) and picks the device. Returns a World.

    device: auto, cpu, cuda, cuda:1, mps ... Raises UserError for one that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        there = {"cpu": True, "cuda": (device.index or 0) < torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
        there = there.get(device.type, False)
    except RuntimeError:
        there = False
    if not there:
        raise UserError(f"--device={device} is not on this machine (torch {torch.__version__}); try --device=cpu")
    if device.type == "cpu":
        keep_freed_memory()
    if "RANK" not in os.environ:  # no torchrun
        return World(0, 1, device)
    if device.type == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise UserError(f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']} is more than the {torch.cuda.device_count()} GPUs here")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo: flags that must not touch the GPU
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # torchrun keeps its store over restarts, and with it the addresses of processes that are dead: connecting to these would wait for ever.
        # on several machines the counts can differ, so there nothing is done: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun
        store, rank, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend)
    return World(dist.get_rank(), dist.get_world_size(), device)


def keep_freed_memory():
    """Has glibc keep freed memory: it gives blocks the size of activations back at once, and each step would fault them in anew (ViT-S/16's
    step took 8 to 14 % longer then, RESULTS.md "Speed"). Does nothing under another libc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: CDLL(None) on Windows
        libc = ctypes.CDLL(None)
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h, in bytes
            libc.mallopt(option, 1 << 30)


def pick_dtype(dtype, device):
    """The torch dtype of autocast for --dtype=auto|float32|bfloat16|float16: auto is bf16 on a GPU that has it, else float32."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if dtype not in names:
        raise UserError(f"--dtype={dtype}: expects auto, {', '.join(names)}")
    if dtype == "float16" and device.type != "cuda":
        raise UserError("--dtype=float16 needs a GPU (its gradients are scaled there); use float32 or bfloat16")
    return names[dtype]


def all_sum(world, *numbers):
    """The sums of these numbers over all processes, as floats, added in float64."""
    if world.size == 1:
        return [float(x) for x in numbers]
    total = torch.tensor([float(x) for x in numbers], dtype=torch.float64)
    dist.all_reduce(total)  # on the CPU, through gloo
    return total.tolist()


def synchronize(device):
    """Waits for the device, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_flops(device, dtype):
    """FLOP/s to hold a step against, and where the figure is from: NVIDIA's dense peak where known, else a GEMM timed here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    dense_16bit = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "A6000": 155e12,
                   "L40S": 362e12, "4090": 165e12, "3090": 71e12, "V100": 125e12, "T4": 65e12}
    for chip, peak in dense_16bit.items():
        if device.type == "cuda" and dtype != torch.float32 and chip in name:
            return peak, f"{name} data sheet, 16 bit dense"
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, f"{n} x {n} GEMM measured here"


def pick_device(device="auto"):
    """The torch.device of --device=auto|cpu|cuda|cuda:1|mps. Raises UserError for one that is not there."""
    return init_dist(device).device
