"""
torchrun's processes: how a run joins them, and how a process ends.
"""
import contextlib
import os
import re
import sys
import zlib

import torch
import torch.distributed as dist

from configurator import speak
from nanorank.errors import UserError, is_disk_error, one_line


def init_process_group(device):
    """Joins torchrun's process group: nccl on CUDA, gloo elsewhere. Returns this process's device."""
    # torchrun sets all of these, other launchers RANK and WORLD_SIZE alone
    world_size = int(os.environ["WORLD_SIZE"])
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    local_rank = int(os.environ.get("LOCAL_RANK", int(os.environ["RANK"]) % local_world_size))
    backend = "gloo"
    if device.type == "mps":
        raise UserError("several processes cannot share an Apple GPU: use --device=cpu, or one process")
    if device.type == "cuda":
        n_gpus = torch.cuda.device_count()
        if local_world_size > n_gpus:
            raise UserError(f"--nproc_per_node={local_world_size} is more than the {n_gpus} GPUs here")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # gloo sends what must not make the GPU wait, such as the stop signal

    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or local_world_size != world_size:
        dist.init_process_group(backend)
        return device

    # torchrun keeps its store over a restart, and with it the addresses of dead processes. Connecting
    # to these waits for ever, so each restart gets keys of its own. On several machines the counts can
    # differ: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun there.
    store, rank, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart_{restart}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return device


def all_sum(*numbers):
    """The sums of these numbers over all processes, in float64."""
    numbers = [float(x) for x in numbers]
    if not dist.is_initialized():
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, through gloo
    dist.all_reduce(total)
    return total.tolist()


training = False  # set by Run: before it all processes fail alike, from then on one may fail alone


def check_alike(text, where):
    """Raises UserError on every process unless this text is the same on all of them."""
    h = zlib.crc32(text.encode()) >> 12  # 20 bits, so that sums of squares are exact in float64
    n, total, squares = all_sum(1, h, h * h)
    if n * squares != total * total:  # equal only where all are equal (Cauchy-Schwarz)
        raise UserError(f"processes differ in {where}: {text} on process {os.environ['RANK']}")


@contextlib.contextmanager
def exit_codes(script):
    """At the bottom of a trainer: one line and an exit status for a user's mistake, a disk, a lost process.

    Where all processes fail alike, the first of each machine speaks for them. Under torchrun the process
    ends at once: while Python tidies up, torch's threads abort it now and then.
    """
    script, code = os.path.basename(script), 0
    try:
        yield
    except SystemExit as stop:
        code = stop.code or 0
    except (UserError, OSError, RuntimeError) as error:
        message, code = explain(error)
        if not message:
            raise
        if training:
            print(f"{script}: {message}", file=sys.stderr)
        else:
            speak(f"{script}: {message}")

    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(code)
    if code:
        raise SystemExit(code)


def explain(error):
    """(one line, exit status) of an error that is no bug; an empty line for a bug."""
    go_on = "--init_from=resume goes on from the last save" if training else "the same command goes on"
    if isinstance(error, UserError):
        return one_line(error), 2
    if isinstance(error, OSError):
        if training or is_disk_error(error):
            return f"{one_line(error)}; once that is mended {go_on}", 1
        return one_line(error), 2
    lost = re.search("[Cc]onnection (closed|reset)|Broken pipe", str(error))  # gloo's words
    if lost and "RANK" in os.environ:
        return f"process {os.environ['RANK']} lost another one; {go_on}", 1
    return "", 1
