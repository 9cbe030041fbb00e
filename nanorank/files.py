"""
Files written so that a kill loses nothing, and read so that nothing in them runs.

    save_pt("ckpt.pt", checkpoint)     # a temporary file beside it, fsynced, renamed
    checkpoint = load_pt("ckpt.pt")    # tensors and plain containers alone, checksums verified
"""
import contextlib
import json
import math
import os
import re
import warnings
import zipfile
from collections import Counter

import torch

from nanorank.errors import UserError


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


def save_pt(path, checkpoint):
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


def load_pt(path, device="cpu", mmap=False, verify=True):
    """A checkpoint from disk; code hidden in it is refused, never run. Raises UserError naming the file and what is wrong.

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
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # torch raises a dozen kinds for truncated, foreign and malicious files
        code = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        reason = (str(error).splitlines() or [""])[0][:150]
        if "weights_only" in reason:  # torch's advice to load it unsafely is no advice
            reason = f"it would run {code[1]}" if code else ""
        reason = f" ({reason})" if reason else ""
        raise UserError(f"{path}: damaged, or not a checkpoint of plain tensors{reason}") from None


def check_archive(path, verify):
    """The sizes of a zip's records. Raises UserError where they are packed (torch's are not: a bomb); verify: or not what their CRC32 says."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(x.compress_type != zipfile.ZIP_STORED for x in records) or sum(x.file_size for x in records) > os.path.getsize(path):
            raise UserError("compressed or overlapping records, torch writes none")
        for record in records if verify else ():
            if record.CRC:  # 0: written without, torch.serialization.set_crc32_options(False)
                with archive.open(record) as file:
                    while file.read(1 << 20):  # raises BadZipFile at the end
                        pass
    return [x.file_size for x in records]


def check_tensors(raw, size, records, depth=100, most=10**6):
    """Raises UserError where the containers that a file of `size` bytes holds are nested without end, or a tensor is larger than the file
    (views of stride 0 are), or not plain: sparse, quantized, nested, on the meta device; or its memory no record's (sizes `records`, of a zip:
    memory-mapped, torch would read into the next)."""
    level, count, memory = [raw], 0, {}
    while level:
        for x in level:
            if isinstance(x, torch.Tensor):
                if x.layout != torch.strided or x.is_quantized or x.is_nested or x.is_meta:
                    raise UserError("a tensor that is sparse, quantized, nested or without data: dequantise or densify it first")
                if x.numel() * x.element_size() > size:
                    raise UserError(f"a tensor of shape {tuple(x.shape)} in a file of {size} bytes; save what was expanded with .contiguous()")
                memory[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        inside = [x for x in level if isinstance(x, (dict, list, tuple))]
        depth, count = depth - 1, count + sum(map(len, inside))
        if depth < 0 or count > most:
            raise UserError("containers nested without end")
        level = [y for x in inside for y in (x.values() if isinstance(x, dict) else x)]
    memory.pop(0, None)  # of tensors without elements
    if records is not None and Counter(memory.values()) - Counter(records):
        raise UserError("records of other sizes than the tensors that they hold")
