"""
Text on disk or on the Hugging Face hub -> its files -> chunks of some 1 MiB, the same ones every time.

    for file in find_files("folder,more.jsonl.zst"):
        for chunk in read_chunks(file, text_key="text", max_bytes=64 << 20):
            chunk.data    # a block of whole JSON lines, a piece of plain text (bytes), or a list of parquet values

Formats: .jsonl, .jsonl.zst, .jsonl.gz, .parquet, .txt. What a caller's input is to blame for is a ValueError that names the file.
"""
import gzip
import importlib
import io
import os
import re
import sysconfig
from typing import NamedTuple

from nanorank.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".txt")
CHUNK = 1 << 20    # bytes of input in a chunk
OVERLONG = b"\0 too long"  # stands in for a line that is: no JSON begins so


class InputError(UserError):
    """A message that is complete as it is."""


def need(module, what):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{what} needs {module.partition('.')[0]}: pip install {module.partition('.')[0]}") from None


def first_line(error):
    return (str(getattr(error, "strerror", None) or error).strip() or type(error).__name__).splitlines()[0][:150]

# -------------------------------------------------------------------------------------------------------------- files

class Input(NamedTuple):
    split: str  # where its documents go; empty: by hash
    path: str   # to open; hf:// on the hub
    name: str   # below its source, the same on all machines
    size: int   # bytes


def find_files(places):
    """The files of a source, sorted, `split` set to val or test where names say so. Raises UserError where there are none."""
    if places in ("python", "packages"):
        library = walk(sysconfig.get_path("stdlib"), (".py",), without=("site-packages", "dist-packages", "test", "tests", "idle_test"))
        return library + (walk(sysconfig.get_path("purelib"), (".py", ".pyi", ".md", ".rst", ".txt")) if places == "packages" else [])
    found = []
    for place in places.split(","):
        if os.path.isdir(place):
            files = walk(place, SUFFIXES)
        elif os.path.exists(place):
            files = [Input("", place, os.path.basename(place), os.path.getsize(place))]
        elif re.fullmatch(r"\w[\w.-]*/\w[\w./-]*", place) and not place.endswith(SUFFIXES):
            files = hub_files(place)
        else:
            raise UserError(f"--source={place}: no such file or folder, and no Hugging Face id (org/name) either")
        files = [file for file in files if file.name.endswith(SUFFIXES)]
        if not files:
            raise UserError(f"{place}: expects files in {', '.join(SUFFIXES)}")
        if any(split_in_name(file.name) == "train" for file in files):
            files = [file._replace(split=split_in_name(file.name).replace("train", "")) for file in files]
        found += files
    return found


def split_in_name(name):
    for split, words in (("train", "train"), ("val", "val|valid|validation|dev"), ("test", "test")):
        if re.search(rf"(^|[/._-])({words})([/._-]|\d|$)", name):
            return split
    return ""


def walk(root, suffixes, without=()):
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in without and not name.startswith(".")]
        for path in (os.path.join(folder, name) for name in names if name.endswith(suffixes) and not name.startswith(".")):
            files.append(Input("", path, os.path.relpath(path, root), os.path.getsize(path)))
    return sorted(files, key=lambda file: file.name)


def hub_files(place):
    """The files of a Hugging Face dataset, org/name or org/name/folder, at its newest revision, which their paths pin."""
    hub = need("huggingface_hub", f"--source={place}")
    repo, below = "/".join(place.split("/")[:2]), "/".join(place.split("/")[2:]).rstrip("/")
    try:
        info = hub.HfApi().dataset_info(repo, files_metadata=True, timeout=10)
    except Exception as error:  # of httpx, requests or huggingface_hub, as versions differ
        raise UserError(f"{place} is no file or folder here, and the Hugging Face hub did not give it: {first_line(error)}") from None
    return [Input("", f"hf://datasets/{repo}@{info.sha}/{file.rfilename}", file.rfilename, file.size or 1)
            for file in sorted(info.siblings, key=lambda file: file.rfilename) if file.rfilename.startswith(below and below + "/")]

# ------------------------------------------------------------------------------------------------------ files to chunks

class Chunk(NamedTuple):
    """Some 1 MiB of a file: a block of JSON lines, a piece of plain text (both bytes), or a list of parquet values."""
    kind: str    # jsonl, txt, parquet
    split: str   # where its documents go; empty: by hash
    first: int   # number of its first line or row, from 1
    data: bytes | list
    seen: float  # share of the file that is read with it


def read_chunks(file, text_key, max_bytes, size=CHUNK):
    """The chunks of a file, some `size` bytes each, the same ones every time; a line beyond max_bytes becomes OVERLONG.

    Raises UserError naming a file that is damaged or cut short.
    """
    kind, blocks = ("parquet", parquet_blocks) if file.name.endswith(".parquet") else \
        ("jsonl", line_blocks) if ".jsonl" in file.name else ("txt", text_blocks)
    first = 1
    try:
        with need("huggingface_hub", file.path).HfFileSystem().open(file.path, block_size=32 << 20) \
                if file.path.startswith("hf://") else open(file.path, "rb") as raw:
            for data, seen in blocks(raw, file, size, text_key if kind == "parquet" else max_bytes):
                yield Chunk(kind, file.split, first, data, seen)
                first += len(data) if kind == "parquet" else data.count(b"\n")
    except InputError:
        raise
    except Exception as error:  # pyarrow, gzip, zlib and the hub's clients raise a dozen kinds
        raise UserError(f"{file.path}: damaged or cut short ({first_line(error)}); what is done is kept, "
                         "and the same command goes on once the file is whole") from None


def line_blocks(raw, file, size, max_bytes):
    """Blocks of whole lines, size bytes and up to a line more. A line beyond max_bytes becomes OVERLONG."""
    text, rest = raw, bytearray()
    if file.name.endswith(".gz"):
        text = gzip.GzipFile(fileobj=raw)
    elif file.name.endswith(".zst"):  # pyarrow's stream tells a truncated file, zstandard's does not
        text = io.BufferedReader(need("pyarrow", file.path).CompressedInputStream(raw, "zstd"), size)
    while block := text.read(size):
        cut = block.rfind(b"\n") + 1
        if cut:
            yield bytes(rest) + block[block.find(b"\n") if rest == OVERLONG else 0:cut], raw.tell() / file.size
            rest = bytearray(block[cut:])
        elif rest != OVERLONG:
            rest += block
            if len(rest) > max_bytes:
                rest = bytearray(OVERLONG)
    if rest:
        yield bytes(rest), 1.0


def text_blocks(raw, file, size, _):
    """Pieces of at most size bytes, cut behind a line where there is one, else between two characters."""
    rest = b""
    while block := rest + raw.read(size - len(rest)):
        cut = len(block)
        if cut == size:
            cut = block.rfind(b"\n") + 1
            if not cut:
                cut = next(i for i in range(size - 1, 0, -1) if block[i] & 0xC0 != 0x80)  # where a character begins
        yield block[:cut], raw.tell() / file.size
        rest = block[cut:]


def parquet_blocks(raw, file, size, text_key):
    """Lists of values, some size bytes each."""
    parquet = need("pyarrow.parquet", file.path).ParquetFile(raw, pre_buffer=False, buffer_size=size)
    if text_key not in parquet.schema_arrow.names:
        raise InputError(f"{file.path}: no column {text_key!r} among {', '.join(parquet.schema_arrow.names)}; --text_key names it")
    texts, held, rows = [], 0, 0
    for batch in parquet.iter_batches(batch_size=64, columns=[text_key]):
        texts += batch.column(0).to_pylist()
        held, rows = held + batch.nbytes, rows + len(batch)
        if held >= size or rows == parquet.metadata.num_rows:
            yield texts, rows / parquet.metadata.num_rows
            texts, held = [], 0
