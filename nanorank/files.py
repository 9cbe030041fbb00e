"""
Writes files so that a kill loses nothing, and reads checkpoints so that nothing in them runs.

    save_pt("ckpt.pt", checkpoint)     # a temporary file beside it, fsynced, renamed
    checkpoint = load_pt("ckpt.pt")    # tensors and plain containers only, checksums verified
"""
import contextlib
import errno
import json
import math
import os
import re
import warnings
import zipfile
from collections import Counter

import torch

from nanorank.errors import UserError, is_disk_error
from nanorank.foreign_files import what_file_is, what_pickle_holds

try:
    import fcntl
except ImportError:  # Windows has no such locks: nothing keeps two processes apart there
    fcntl = None

# ------------------------------------------------------------ writing

def make_folder(path):
    """Makes a folder to write to, if it is not there. Raises UserError where it cannot be written to."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        if is_disk_error(error):  # no fault of the command, which can go on later
            raise
        raise UserError(f"{path} cannot be made ({error.strerror}): --out_dir goes elsewhere") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{path} cannot be written to: --out_dir goes elsewhere")


def lock_file(path):
    """Locks the file `path`. Returns it open: closing it unlocks it, and so does the end of the process.

    Raises BlockingIOError where another process holds the lock. A file system without locks keeps nobody out.
    fcntl.lockf, not filelock, which uses flock: forked workers would inherit that and hold it on, and where a
    file system has none, filelock leaves a marker file that a kill would leave behind.
    """
    file = open(path, "ab")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise BlockingIOError(error.errno, "locked by another process", path) from None
    return file


@contextlib.contextmanager
def writing(path, note=""):
    """Errors of the disk inside become an OSError that names `path`; note: text to add to its message.

    torch's archive writer raises RuntimeError and keeps the OSError as its context.
    """
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
    """Calls write(file) on a temporary file beside `path`, fsyncs it and renames it.

    A kill leaves the old file or the new one, whole. Raises OSError naming `path` where the disk is full or
    refuses; the old file stays.
    """
    path = os.path.realpath(path)  # a link stays, and the file that it points to is replaced
    temporary = f"{path}.tmp{os.getpid()}"
    note = " (the file that was there is whole)" if os.path.exists(path) else ""
    try:
        with writing(path, note):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        if os.name == "posix":
            sync_folder(os.path.dirname(path))  # else a power cut may undo the renaming
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def sync_folder(path):
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_pt(path, checkpoint):
    """Writes a checkpoint of tensors, numbers, strings and plain containers."""
    write_atomic(path, lambda file: torch.save(checkpoint, file))


def save_json(path, obj):
    text = to_json(obj, indent=2) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def to_json(obj, indent=None):
    """JSON that any reader takes: numbers that are not finite become null."""
    try:
        return json.dumps(obj, indent=indent, allow_nan=False)
    except ValueError:
        finite = {}
        for name, x in obj.items():
            is_finite = not isinstance(x, float) or math.isfinite(x)
            finite[name] = x if is_finite else None
        return json.dumps(finite, indent=indent)

# ------------------------------------------------------------ reading

def load_pt(path, device="cpu", mmap=False, verify=True):
    """A checkpoint from disk, which may come from a stranger or from a failing disk.

    Refused, with a UserError that names the file and the reason:
    - code in the pickle (weights_only=True), which torch.load would run otherwise
    - records that do not match their CRC-32, which torch writes but does not check: a flipped bit of a weight
    - compressed records, which torch never writes: a small file could unpack to more than the memory
    - tensors larger than the file (views of stride 0), and containers nested without end, for the same reason
    - tensors that are sparse, quantized, nested or without data: no code here measures them
    - records whose size is not that of their tensor: memory-mapped, torch would read on into the next

    mmap: leave tensors on disk until they are used; files of torch before 1.6 are read whole.
    verify=False skips the checksums of a file that was verified before.
    """
    try:
        with open(path, "rb"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about foreign pickles
            size = os.path.getsize(path)
            is_zip = zipfile.is_zipfile(path)
            record_sizes = check_records(path, size, verify) if is_zip else None
            raw = torch.load(path, map_location=device, weights_only=True, mmap=mmap and is_zip)
            check_tensors(raw, size, record_sizes)
            return raw
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # torch raises a dozen kinds for truncated, foreign and malicious files
        known = what_file_is(path)
        if known:
            raise UserError(f"{path}: {known}") from None
        known = what_pickle_holds(path)
        if known:
            raise UserError(f"{path}: no checkpoint of plain tensors: {known}") from None
        reason = why_not(str(error))
        raise UserError(f"{path}: damaged, or not a checkpoint of plain tensors{reason}") from None


def why_not(message):
    """The reason in brackets from the message of torch or of a check below, else an empty string."""
    lines = message.splitlines() or [""]
    reason = lines[0][:150]
    if re.search("weights_only|trust|unsafe", message):  # torch advises to load such a file unsafely
        code = re.search(r"(?:GLOBAL|global) ([\w.]+)", message)
        reason = f"it would run {code[1]}" if code else ""
    return f" ({reason})" if reason else ""


def check_records(path, size, verify):
    """The sizes of a zip's records. Raises where they are compressed or overlap, or fail their checksums."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        if compressed or sum(record.file_size for record in records) > size:
            raise UserError("compressed or overlapping records, torch writes none")
        for record in records:
            # a CRC of 0: written without, by torch.serialization.set_crc32_options(False)
            if verify and record.CRC:
                with archive.open(record) as file:
                    while file.read(1 << 20):  # raises BadZipFile at the end where the CRC does not match
                        pass
    return [record.file_size for record in records]


def check_tensors(raw, size, record_sizes, most_levels=100, most_items=10**6):
    """Raises where a file of `size` bytes holds containers nested without end, tensors that are not plain or
    are larger than the file, or (record_sizes: of a zip, else None) tensors whose memory is no record's."""
    memory = {}  # {address: bytes}, each storage once
    items = 0
    depth = 0
    level = [raw]
    while level:
        inside = []
        for x in level:
            if isinstance(x, torch.Tensor):
                check_tensor(x, size)
                storage = x.untyped_storage()
                memory[storage.data_ptr()] = storage.nbytes()
            elif isinstance(x, (dict, list, tuple)):
                items += len(x)
                if depth == most_levels or items > most_items:
                    raise UserError("containers nested without end")
                inside.extend(x.values() if isinstance(x, dict) else x)
        depth += 1
        level = inside

    memory.pop(0, None)  # of tensors without elements
    if record_sizes is not None and Counter(memory.values()) - Counter(record_sizes):
        raise UserError("records of other sizes than the tensors that they hold")


def check_tensor(x, size):
    if type(x).__name__ in ("DTensor", "ShardedTensor"):
        raise UserError("tensors that are shards of one process")
    if x.layout != torch.strided or x.is_quantized or x.is_nested or x.is_meta:
        raise UserError("a tensor that is sparse, quantized, nested or without data: "
                        "dequantise or densify it first")
    if x.numel() * x.element_size() > size:
        raise UserError(f"a tensor of shape {tuple(x.shape)} in a file of {size} bytes; "
                        "save what was expanded with .contiguous()")
