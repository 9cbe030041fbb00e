"""
Plumbing that only a bug fix would ever change: processes, devices, files, signals. No settings, nothing at import.
"""
import contextlib
import ctypes
import errno
import json
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from typing import NamedTuple

import torch
import torch.distributed as dist

from configurator import one_line

# ------------------------------------------------------------------------------------------------ processes and devices

class World(NamedTuple):
    """Where this process stands: `rank` of `size` processes in all, and its torch.device."""
    rank: int
    size: int
    device: torch.device


def init_dist(device="auto"):
    """Joins torchrun's process group where there is one (nccl on CUDA, gloo elsewhere) and picks the device. Returns a World.

    device: auto, cpu, cuda, cuda:1, mps ... Raises ValueError for one that is not there.
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
        raise ValueError(f"--device={device} is not on this machine (torch {torch.__version__}); try --device=cpu")
    if device.type == "cpu":
        keep_freed_memory()
    if "RANK" not in os.environ:  # no torchrun
        return World(0, 1, device)
    if device.type == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']} is more than the {torch.cuda.device_count()} GPUs here")
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
        raise ValueError(f"--dtype={dtype}: expects auto, {', '.join(names)}")
    if dtype == "float16" and device.type != "cuda":
        raise ValueError("--dtype=float16 needs a GPU (its gradients are scaled there); use float32 or bfloat16")
    return names[dtype]


def print0(*args, **kwargs):
    """Prints on the first process alone, at once."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, **kwargs, flush=True)


@contextlib.contextmanager
def input_errors(script, every_process=False):
    """What fails inside is the user's input: one line on stderr and exit status 2 instead of a traceback; 1 where it is a disk, full or broken.

    every_process: for what can fail on one process alone; else the first of each machine speaks for all.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        disk = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        if every_process or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"{script}: {one_line(error)}" + "; once that is mended the same command goes on" * disk, file=sys.stderr, flush=True)
        if not every_process and dist.is_initialized():
            dist.destroy_process_group()  # its threads would abort a process that ends with them
        raise SystemExit(1 if disk else 2) from None


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

# --------------------------------------------------------------------------------------------------------------- files

@contextlib.contextmanager
def writing(path, note=""):
    """What a disk refuses inside becomes an OSError that names this file, also where torch's archive writer has hidden it; note: what to add."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        if not cause:
            raise
        raise OSError(cause.errno, f"{cause.strerror}{note}", path) from None


def write_atomic(path, write):
    """Calls write(file) on a temporary file beside `path`, fsyncs and renames it: a kill leaves the old file or the new, whole.

    Raises OSError that names `path` where the disk is full or refuses: the old file stays."""
    path = os.path.realpath(path)  # where a link points to, the link stays
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with writing(path, " (the file that was there is whole)" if os.path.exists(path) else ""):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        if os.name == "posix":  # and the rename itself
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def save(path, checkpoint):
    """Writes a checkpoint of tensors, numbers, strings and plain containers."""
    write_atomic(path, lambda file: torch.save(checkpoint, file))


def save_json(path, obj):
    write_atomic(path, lambda file: file.write((to_json(obj, indent=2) + "\n").encode()))


def to_json(obj, indent=None):
    """JSON that any reader takes: numbers that are not finite become null."""
    try:
        return json.dumps(obj, indent=indent, allow_nan=False)
    except ValueError:
        obj = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in obj.items()}
        return json.dumps(obj, indent=indent)


def load(path, device="cpu", mmap=False, verify=True):
    """A checkpoint from disk; code hidden in it is refused, never run. Raises ValueError naming the file and what is wrong.

    mmap: leave the tensors on disk until they are used (where the format allows; those of torch before 1.6 do not). verify: hold the
    records against their checksums, which torch writes but does not read. No tensor claims more memory than the file has bytes.
    """
    try:
        with open(path, "rb"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks about foreign pickles
            archive = zipfile.is_zipfile(path)
            records = check_archive(path, verify) if archive else None
            raw = torch.load(path, map_location=device, weights_only=True, mmap=mmap and archive)
            check_tensors(raw, os.path.getsize(path), records)
            return raw
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except Exception as error:  # torch raises a dozen kinds for truncated, foreign and malicious files
        code = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        reason = (str(error).splitlines() or [""])[0][:150]
        if "weights_only" in reason:  # torch's advice to load it unsafely is no advice
            reason = f"it would run {code[1]}" if code else ""
        reason = f" ({reason})" if reason else ""
        raise ValueError(f"{path}: damaged, or not a checkpoint of plain tensors{reason}") from None


def check_archive(path, verify):
    """The sizes of a zip's records. Raises ValueError where they are packed (torch's are not: a bomb); verify: or not what their CRC32 says."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(x.compress_type != zipfile.ZIP_STORED for x in records) or sum(x.file_size for x in records) > os.path.getsize(path):
            raise ValueError("compressed or overlapping records, torch writes none")
        for record in records if verify else ():
            if record.CRC:  # 0: written without, torch.serialization.set_crc32_options(False)
                with archive.open(record) as file:
                    while file.read(1 << 20):  # raises BadZipFile at the end
                        pass
    return [x.file_size for x in records]


def check_tensors(raw, size, records, depth=100, most=10**6):
    """Raises ValueError where the containers that a file of `size` bytes holds are nested without end, or a tensor is larger than the file
    (views of stride 0 are), or not plain: sparse, quantized, nested, on the meta device; or its memory no record's (sizes `records`, of a zip:
    memory-mapped, torch would read into the next)."""
    level, count, memory = [raw], 0, {}
    while level:
        for x in level:
            if isinstance(x, torch.Tensor):
                if x.layout != torch.strided or x.is_quantized or x.is_nested or x.is_meta:
                    raise ValueError("a tensor that is sparse, quantized, nested or without data: dequantise or densify it first")
                if x.numel() * x.element_size() > size:
                    raise ValueError(f"a tensor of shape {tuple(x.shape)} in a file of {size} bytes; save what was expanded with .contiguous()")
                memory[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        inside = [x for x in level if isinstance(x, (dict, list, tuple))]
        depth, count = depth - 1, count + sum(map(len, inside))
        if depth < 0 or count > most:
            raise ValueError("containers nested without end")
        level = [y for x in inside for y in (x.values() if isinstance(x, dict) else x)]
    memory.pop(0, None)  # of tensors without elements
    if records is not None and Counter(memory.values()) - Counter(records):
        raise ValueError("records of other sizes than the tensors that they hold")

# ------------------------------------------------------------------------------------------------------- signals, times

class StopSignal:
    """Notes SIGTERM and SIGINT; a second one ends the process at once. `signal` is the number of the first, 0 before."""

    def __init__(self):
        self.signal, self.time = 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        echo = "RANK" in os.environ and time.monotonic() - self.time < 2  # torchrun hands on a Ctrl-C that we got already
        if self.signal and not echo:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.time = number, time.monotonic()

    def anywhere(self, world):
        """The signal that any process got, 0 for none, the same answer on all of them."""
        if world.size == 1:
            return self.signal
        flag = torch.tensor(self.signal)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)  # on the CPU, through gloo: no wait for the GPU
        return int(flag)


def time_left(seconds):
    """1h02m, 3m20s, 15s."""
    seconds = int(seconds)
    h, m, s = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"
