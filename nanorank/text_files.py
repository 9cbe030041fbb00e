"""
Reads files of text, here or on the Hugging Face hub, in chunks, the same ones every time.

    for file in find_texts("folder,more.jsonl.zst"):    # nanorank/text_sources.py
        for chunk in read_chunks(file, text_key="text", max_bytes=64 << 20):
            chunk.data    # whole JSON lines or a piece of plain text (bytes), or a list of parquet values

Formats: .jsonl, .jsonl.zst, .jsonl.gz, .json.gz, .parquet, .txt, and where there are none of those .arrow (of
datasets' save_to_disk) and .csv. Unreadable input is a UserError that names the file.
"""
import glob
import gzip
import io
import json
import math
import os
from typing import NamedTuple

from nanorank.data_folder import BadRecord
from nanorank.errors import UserError
from nanorank.inputs import Input, need, open_input, open_parquet

try:
    from orjson import loads  # twice as fast as json
except ImportError:
    from json import loads

JSON_LINES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".json.zst")
SUFFIXES = (*JSON_LINES, ".parquet", ".txt")
# Formats that the datasets library reads, where a place has none of the above. On those it would break a
# promise: its text builder turns "\r\n" into "\n", stops at invalid UTF-8, holds a line of any length (1.8 GB
# for one of 300 MB), and takes none of the Pile's .zst without another package. Its parquet builder holds
# row groups whole (1.5 GB for 518 MB of text, where pyarrow's reader takes 0.1 GB).
DATASETS = {".arrow": "arrow", ".csv": "csv"}
CHUNK = 1 << 20                   # bytes of input in a chunk
OVERLONG = b"\0 too long"         # replaces a line that is too long; no JSON begins so
BOM = b"\xef\xbb\xbf"            # what Windows' editors put before UTF-8; it is no part of the text


class Chunk(NamedTuple):
    """About 1 MiB of a file."""
    kind: str    # json (lines), text (a piece), values (of a column)
    file: Input
    first: int   # number of its first line or row, from 1
    data: bytes | list
    seen: float  # share of the file that has been read with it

    def size(self):
        """Bytes held; characters for values."""
        if self.kind == "values":
            return sum(len(str(text)) for text in self.data)
        return len(self.data)


def read_chunks(file, text_key, max_bytes, size=CHUNK):
    """The chunks of a file, about `size` bytes each, the same ones every time.

    A line longer than max_bytes becomes OVERLONG. text_key: the column of a table.
    Raises UserError naming a file that is damaged or cut short.
    """
    first = 1
    with open_input(file.path, 32 << 20) as raw:
        if file.name.endswith(JSON_LINES):
            kind, blocks = "json", line_blocks(raw, file, size, max_bytes)
        elif file.name.endswith((".parquet", *DATASETS)):
            kind, blocks = "values", table_blocks(raw, file, size, text_key)
        else:
            kind, blocks = "text", text_blocks(raw, file, size)
        for data, seen in blocks:
            yield Chunk(kind, file, first, data, seen)
            first += len(data) if kind == "values" else data.count(b"\n")


def line_blocks(raw, file, size, max_bytes):
    """Yields (whole lines, share of the file read): `size` bytes and up to a line more."""
    text = raw
    if file.name.endswith(".gz"):  # pyarrow's stream refuses gzip's padding
        text = gzip.GzipFile(fileobj=raw)
    elif file.name.endswith(".zst"):  # pyarrow's stream notices a truncated file, zstandard's does not
        text = io.BufferedReader(need("pyarrow", file.path).CompressedInputStream(raw, "zstd"), size)
    rest = bytearray()  # a line whose end is not yet read
    while block := text.read(size):
        end = block.rfind(b"\n") + 1
        if end:
            start = block.find(b"\n") if rest == OVERLONG else 0
            yield bytes(rest) + block[start:end], raw.tell() / file.size
            rest = bytearray(block[end:])
        elif rest != OVERLONG:
            rest += block
            if len(rest) > max_bytes:
                rest = bytearray(OVERLONG)
    if rest:
        yield bytes(rest), 1.0


def text_blocks(raw, file, size):
    """Yields (piece, share of the file read): at most `size` bytes, cut behind a line or a character."""
    rest = b""
    raw.seek(file.start)
    while block := rest + raw.read(min(size - len(rest), file.stop - raw.tell())):
        end = len(block)
        if end == size:
            end = last_start(block) or end
        yield block[:end], (raw.tell() - file.start) / file.size
        rest = block[end:]


def last_start(block):
    """Where the last line in some bytes begins, or if they are all one line, the last character of UTF-8."""
    newline = block.rfind(b"\n")
    if newline >= 0:
        return newline + 1
    at = len(block) - 1
    while at > 0 and block[at] & 0xC0 == 0x80:
        at -= 1
    return at


def table_blocks(raw, file, size, text_key):
    """Yields (list of values, share of the rows read): about `size` bytes. The share is 0 for DATASETS."""
    if file.name.endswith(".parquet"):
        table = open_parquet(raw, file.path, size)
        check_column(file, text_key, table.schema_arrow.names)
        batches = table.iter_batches(batch_size=64, columns=[text_key])
        n_rows = table.metadata.num_rows
    else:
        datasets = need("datasets", file.path)
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # one line of ours says what is wrong
        path = file.path if file.path.startswith("hf://") else glob.escape(file.path)
        kind = DATASETS[os.path.splitext(file.name)[1]]
        table = datasets.load_dataset(kind, data_files=path, split="train", streaming=True)
        batches = table.with_format("arrow").iter(batch_size=64)
        n_rows = math.inf

    texts = []
    n_bytes = 0
    rows = 0
    for batch in batches:
        check_column(file, text_key, batch.schema.names)
        batch = batch.select([text_key])
        texts += batch.column(0).to_pylist()
        n_bytes += batch.nbytes
        rows += batch.num_rows
        if n_bytes >= size:
            yield texts, rows / n_rows
            texts = []
            n_bytes = 0
    if texts:
        yield texts, 1.0


def check_column(file, text_key, columns):
    if text_key not in columns:
        raise UserError(f"{file.path}: no column {text_key!r} among {', '.join(columns)}; "
                        "--text_key names it")

# -----------------------------------------------------------------------------
# chunks to texts

def records_of(chunk):
    """Yields (number in the file, record): lines that are not blank, values, or one piece of plain text."""
    if chunk.kind == "values":
        yield from enumerate(chunk.data, chunk.first)
        return
    data = chunk.data
    if chunk.first == 1:
        data = data.removeprefix(BOM)
    if chunk.kind == "text":
        yield chunk.first, data
        return
    for number, line in enumerate(data.split(b"\n"), chunk.first):
        if line.strip():
            yield number, line


def text_of(record, kind, text_key, max_bytes):
    """The text of a record, as str and as UTF-8. Raises BadRecord with the reason if it has none."""
    if record == OVERLONG:
        raise BadRecord("longer than --max_document_mb")
    text = record
    try:
        if kind == "json":
            text = parse(record)[text_key]
        elif kind == "text":
            text = record.decode()
    except UnicodeDecodeError:
        raise BadRecord("invalid UTF-8") from None
    except KeyError:
        raise BadRecord(f"no key {text_key!r}") from None
    except TypeError:  # a list or number has no keys
        raise BadRecord("not a JSON object") from None
    except (ValueError, RecursionError):
        raise BadRecord("broken JSON") from None
    if not isinstance(text, str):
        raise BadRecord(f"{text_key!r} is not a string")
    try:
        utf8 = text.encode()
    except UnicodeEncodeError:  # lone surrogates
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        utf8 = text.encode()
    if len(utf8) > max_bytes:
        raise BadRecord("longer than --max_document_mb")
    return text, utf8


def parse(line):
    try:
        return loads(line)
    except ValueError:  # orjson refuses lone surrogates
        return json.loads(line.decode())
