"""
The device a script runs on: which it is, in what dtype, how fast.
"""
import contextlib
import ctypes
import math
import re
import time

import torch

from nanorank.errors import UserError, one_line

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# words in a chip's name, and its FLOP/s in 16 bits without sparsity, data sheets from memory, not compared
# again. The first row that fits counts, so the special ones come first. None: a part of a chip, or a slower
# one of that name.
PEAKS = (
    ("MIG", None), ("GRID", None), ("Laptop", None), ("Max-Q", None), ("4090 D", None), ("5090 D", None),
    ("GB300", 2500e12), ("GB200", 2500e12), ("B300", 2250e12), ("B200", 2250e12),
    ("GH200", 989e12), ("H200 NVL", 835e12), ("H200", 989e12),
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12),
    ("H800 PCIe", 756e12), ("H800", 989e12), ("H20", 148e12),
    ("A100", 312e12), ("A800", 312e12), ("A40", 150e12), ("A30", 165e12), ("A10", 125e12),
    ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12),
    ("RTX 6000 Ada", 364e12), ("RTX A6000", 155e12),
    ("RTX 5090", 209e12), ("RTX 4090", 165e12), ("RTX 3090", 71e12),
    ("V100S", 130e12), ("V100-PCIE", 112e12), ("V100", 125e12), ("T4", 65e12),
    ("MI300X", 1307e12),
)


def pick_device(name="auto"):
    """The torch.device of --device=auto|cpu|cuda|cuda:1|mps.

    Raises UserError for one that this machine does not have.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if has_mps else "cpu"

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None:
        found = False
    elif device.type == "cuda":
        found = (device.index or 0) < torch.cuda.device_count()
    else:
        found = device.type == "cpu" or (device.type == "mps" and has_mps)
    if not found:
        raise UserError(f"--device={name} is not on this machine (torch {torch.__version__}); "
                        "try --device=cpu")

    if device.type == "cpu":
        keep_freed_memory()
    return device


def pick_dtype(name, device):
    """The torch dtype of --dtype=auto|float32|bfloat16|float16.

    auto is bfloat16 on a GPU that has it in hardware, else float32.
    """
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    if name not in DTYPES:
        raise UserError(f"--dtype={name}: expects auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type != "cuda":
        raise UserError("--dtype=float16 needs a GPU, which scales gradients; use float32 or bfloat16")
    return DTYPES[name]


def keep_freed_memory():
    """Tells glibc to keep freed memory.

    By default it returns blocks of the size of activations to the system at
    once, and every step pays for the page faults again (8 to 14 % of a
    ViT-S/16 step). Does nothing under another libc.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # from malloc.h, in bytes
    # TypeError: CDLL(None) on Windows
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(m_trim_threshold, 1 << 30)
        libc.mallopt(m_mmap_threshold, 1 << 30)


def synchronize(device):
    """Waits for the device, so that the next reading of a clock is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device):
    """NVIDIA H100 80GB HBM3, or cpu, mps."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def data_sheet_peak(name):
    """FLOP/s of the chip that torch gives this name, 0 where it is not known: "NVIDIA A100-SXM4-80GB"."""
    for words, peak in PEAKS:
        if re.search(rf"(?<!\w){words}(?!\w)", name):  # whole words: an A1000 is no A100
            return peak or 0
    return 0


def peak_flops(device, dtype):
    """(FLOP/s that a step is compared with, where the number is from).

    The data sheet's dense peak where the chip is known, else a GEMM timed here.
    """
    name = device_name(device)
    if device.type == "cuda" and dtype != torch.float32 and data_sheet_peak(name):
        return data_sheet_peak(name), f"{name} data sheet, 16 bit dense"

    largest = 2048 if device.type == "cpu" else 8192
    began = time.perf_counter()
    n = 128
    seconds = gemm_seconds(n, device, dtype)
    # small products say little, but where the dtype is emulated a large one takes a minute
    while n < largest and seconds < 0.05:
        n *= 2
        seconds = gemm_seconds(n, device, dtype)
    # others may use the machine too: the best of several
    for _ in range(5):
        if time.perf_counter() - began < 1:
            seconds = min(seconds, gemm_seconds(n, device, dtype))
    return 2 * n**3 / seconds, f"{n} x {n} GEMM measured here"


def gemm_seconds(n, device, dtype):
    """Seconds that an n x n matrix product takes, the better of two: the first one starts libraries."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def slow_dtype(device, dtype):
    """How many times as long a product takes as in float32, where this CPU emulates the dtype; else 0."""
    if device.type != "cpu" or dtype == torch.float32:
        return 0
    n = 256
    ratios = []
    for _ in range(3):
        ratios.append(gemm_seconds(n, device, dtype) / gemm_seconds(n, device, torch.float32))
    slower = sorted(ratios)[1]  # the median: others may use the machine too
    return slower if slower > 2 else 0


def compile_error(device):
    """Why torch.compile does not work on this machine, one line; empty where it does. Takes seconds."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # torch has a class for each tool that can be missing
        return one_line(str(error).strip().partition("\n")[0], 200) or type(error).__name__
    return ""
