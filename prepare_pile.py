"""
Raw text in, token ids that trainers memory-map out: `data/NAME/`, as batches.py describes it.

    python prepare_pile.py --source=python                       # this Python's own library, as bytes; seconds, no download
    python prepare_pile.py                                       # the Pile's public mirror, streamed, GPT-2's BPE
    python prepare_pile.py --source=a.jsonl.zst,folder --dataset=mine --val_source=val.jsonl.zst
    python prepare_pile.py --num_shards=4 --shard_index=0        # the first of four machines, see below

Sources: `python`, files or folders (comma-separated) of .jsonl, .jsonl.zst, .jsonl.gz, .parquet, .txt, or a Hugging Face
dataset (org/name, or org/name/folder) of such files. A .txt file is a document; over 1 MiB it is cut behind a line into several.

Splits: where files carry the names of splits (train/00.jsonl.zst, val.jsonl.zst, ...) or --val_source, --test_source are given,
those; else a hash of each document's text decides, whatever its place, the workers and the machines.

Ids: tiktoken's encode_ordinary and end-of-text for each document. Lone surrogates become U+FFFD, as tiktoken does it. A document
that overflows tiktoken's regex (some 300,000 spaces in a row and more) is encoded in pieces of 50,000 characters.

Killed at any instant and run again it goes on from its last safe point, and ends in the same bytes as an undisturbed run;
meta.json, without which no trainer reads the folder, comes last. Several machines: the same command with --num_shards=N and
--shard_index=0 ... N-1, in one shared folder, or in several that are copied together; then any one of them once more.
On machines with more than some 32 cores, several such parts side by side on the one machine feed more workers.

Memory does not grow with the input: 2 workers + 4 chunks of 1 MiB in flight, the longest documents (--max_document_mb) aside.
"""
import contextlib
import fcntl
import glob
import gzip
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

import numpy as np

from batches import read_meta
from common import StopSignal, input_errors, save_json, time_left
from configurator import configure

# ------------------------------------------------------------------------------------------------------------ settings
# what to read
source = "monology/pile-uncopyrighted"  # python, files or folders (comma-separated), or a Hugging Face dataset id
val_source = ""                         # files or folders of the val split; empty: files named so, else by hash
test_source = ""                        # files or folders of the test split; empty: files named so, else by hash
val_fraction = 0.02                     # of the documents, by hash, where val has no files of its own
test_fraction = 0.02                    # of the documents, by hash, where test has no files of its own
text_key = "text"                       # key (.jsonl) or column (.parquet) of the text
max_document_mb = 64                    # MiB; longer lines and documents are bad records
# what to write
dataset = "auto"                        # name of the folder in data_dir; auto: python for --source=python, else pile
data_dir = "data"                       # folder of all data sets
tokenizer = "auto"                      # byte or a tiktoken encoding; auto: byte for --source=python, else gpt2
shard_tokens = 100_000_000              # tokens of a file, after which the next is begun
# how
num_shards = 1                          # parts that the work is split in, one process each, on any machines
shard_index = 0                         # which part this process makes, from 0
workers = 0                             # processes that tokenise; 0: one per core
safe_interval = 10.0                    # seconds between safe points: what a kill can cost
# ---------------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "val", "test")
SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".txt")
MADE_WITH = ("source", "val_source", "test_source", "val_fraction", "test_fraction", "text_key", "max_document_mb", "tokenizer")
EOT = "<|endoftext|>"
CHUNK = 1 << 20      # bytes of text that go to a worker at once
OVERLONG = b"\0"     # stands in for a line that is too long; no JSON begins so
NAMED = 5            # bad records named per reason


def main():
    with input_errors("prepare_pile.py"):
        stopped = prepare()
    if stopped:
        raise SystemExit(128 + stopped)


def prepare():
    """Makes this process's part, and meta.json if it was the last one. Returns the signal that stopped it, else 0."""
    if not (0 <= val_fraction and 0 <= test_fraction and val_fraction + test_fraction < 1):
        raise ValueError(f"--val_fraction={val_fraction} --test_fraction={test_fraction}: expects two shares that leave some for train")
    for name, least in (("num_shards", 1), ("shard_index", 0), ("shard_tokens", 1), ("max_document_mb", 1), ("workers", 0)):
        if globals()[name] < least:
            raise ValueError(f"--{name}={globals()[name]}: expects {least} or more")
    if shard_index >= num_shards:
        raise ValueError(f"--shard_index={shard_index}: expects 0 to {num_shards - 1} with --num_shards={num_shards}")
    made_with = {name: globals()[name] for name in MADE_WITH}
    if tokenizer == "auto":
        made_with["tokenizer"] = "byte" if source == "python" else "gpt2"
    name = ("python" if source == "python" else "pile") if dataset == "auto" else dataset
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise ValueError(f"--dataset={dataset}: expects a plain name; --data_dir says where it lies")
    folder = os.path.join(data_dir, name)

    if os.path.exists(os.path.join(folder, "meta.json")):
        meta = read_meta(folder)
        refuse_other(folder, meta.get("settings", {}), made_with)
        print(f"{folder} is finished: {totals(meta)}; nothing to do")
        return 0
    vocab_size, eot = vocabulary(made_with["tokenizer"])
    files = find_all_files()
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    names = repr([(file.split, file.name) for file in files]).encode()
    made_with |= {"shard_tokens": shard_tokens, "num_shards": num_shards, "files": f"{len(files)}:{zlib.crc32(names):08x}"}

    os.makedirs(folder, exist_ok=True)
    for path in glob.glob(os.path.join(glob.escape(folder), "part_*.json")):
        with open(path, encoding="utf-8") as file:
            refuse_other(folder, json.load(file)["settings"], made_with)
    with only_process(os.path.join(folder, f".part_{shard_index:05d}.lock")):
        part = Part(folder, made_with, dtype, files)
        if not part.record["done"]:
            stop = StopSignal()
            try:
                tokenise(part, files, stop)
            except BrokenProcessPool:
                print("prepare_pile.py: a worker died (out of memory? then lower --workers); "
                      "the same command again goes on from here", file=sys.stderr)
                raise SystemExit(1) from None
            if stop.signal:
                print(f"stopped by signal {stop.signal}: the same command again goes on from here", flush=True)
                return stop.signal
        merge(folder, made_with, {"source": source, "vocab_size": vocab_size, "eot": eot, "dtype": dtype})
    return 0


def refuse_other(folder, theirs, ours):
    """Raises ValueError that names the first setting in which a folder begun earlier differs from this run."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            flag = "input files " if name == "files" else f"--{name}="
            raise ValueError(f"{folder} was made with {flag}{theirs.get(name)}, not {flag}{value}: "
                             "choose another --dataset, or delete the folder")


@contextlib.contextmanager
def only_process(path):
    """Holds the lock file `path`; the kernel lets go of it however this process ends, and forked workers do not inherit it."""
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is at work on this part ({path} is locked)") from None
        yield


class InputError(ValueError):
    """A line for the user, complete as it is."""

# ------------------------------------------------------------------------------------------------------ finding the text

class Input(NamedTuple):
    split: str  # where its documents go; empty: by hash
    path: str   # to open; hf:// on the hub
    name: str   # below its source, the same on all machines
    size: int   # bytes


def find_all_files():
    """Every input file, those of val and test first, in the same order on all machines."""
    given = [file._replace(split=split) for split, places in (("val", val_source), ("test", test_source)) if places
             for file in find_files(places)]
    taken, paths = {file.split for file in given}, {os.path.abspath(file.path) for file in given}
    found = [file for file in find_files(source) if file.split not in taken and os.path.abspath(file.path) not in paths]
    files = given + sorted(found, key=lambda file: not file.split)
    if all(file.split for file in files):
        raise ValueError(f"--source={source}: no files are left for the train split")
    print(f"{len(files)} files, {sum(file.size for file in files) / 1e6:,.1f} MB; " + ", ".join(
        f"{split}: " + (f"{n} of the files" if (n := sum(file.split == split for file in files)) else f"{share:.1%} of documents by hash")
        for split, share in shares(files).items() if split != "train"), flush=True)
    return files


def shares(files):
    """The share of hashed documents that each split gets: none for those that have files of their own."""
    own = {file.split for file in files}
    val, test = (0.0 if split in own else share for split, share in (("val", val_fraction), ("test", test_fraction)))
    return {"train": 1.0 - val - test, "val": val, "test": test}


def find_files(places):
    """The files of a source, sorted; their `split` set where their names say it. Raises ValueError where there are none."""
    if places == "python":
        return walk(sysconfig.get_path("stdlib"), (".py",), ("site-packages", "dist-packages", "test", "tests", "idle_test"))
    found = []
    for place in places.split(","):
        if os.path.isdir(place):
            files = walk(place, SUFFIXES)
        elif os.path.exists(place):
            files = [Input("", place, os.path.basename(place), os.path.getsize(place))]
        elif re.fullmatch(r"\w[\w.-]*/\w[\w./-]*", place) and not place.endswith(SUFFIXES):
            files = hub_files(place)
        else:
            raise ValueError(f"no file or folder {place!r}, and no Hugging Face id (org/name) either")
        files = [file for file in files if file.name.endswith(SUFFIXES)]
        if not files:
            raise ValueError(f"{place}: expects files in {', '.join(SUFFIXES)}")
        named = [file._replace(split=split_of(file.name)) for file in files]
        found += named if any(file.split == "train" for file in named) else files
    # train files are hashed for those of val and test that have no files
    return [file._replace(split="") if file.split == "train" else file for file in found]


def split_of(name):
    for split, words in (("train", "train"), ("val", "val|valid|validation|dev"), ("test", "test")):
        if re.search(rf"(^|[/._-])({words})([/._-]|\d|$)", name):
            return split
    return ""


def walk(root, suffixes, without=()):
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in without and not name.startswith((".", "__pycache__"))]
        for path in (os.path.join(folder, name) for name in names if name.endswith(suffixes) and not name.startswith(".")):
            files.append(Input("", path, os.path.relpath(path, root), os.path.getsize(path)))
    return sorted(files, key=lambda file: file.name)


def hub_files(place):
    """The files of a Hugging Face dataset org/name[/folder], at its newest revision, which the paths pin."""
    hub = need("huggingface_hub", f"--source={place}")
    repo, below = "/".join(place.split("/")[:2]), "/".join(place.split("/")[2:])
    try:
        info = hub.HfApi().dataset_info(repo, files_metadata=True, timeout=10)
    except Exception as error:  # of httpx, requests or huggingface_hub, as versions differ
        raise ValueError(f"{place} is no file or folder here, and the Hugging Face hub did not give it: {first_line(error)}") from None
    return [Input("", f"hf://datasets/{repo}@{info.sha}/{file.rfilename}", file.rfilename, file.size or 0)
            for file in sorted(info.siblings, key=lambda file: file.rfilename)
            if not below or file.rfilename.startswith(below.rstrip("/") + "/")]


def need(module, what):
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise InputError(f"{what} needs {package}: pip install {package}") from None


def first_line(error):
    return (str(getattr(error, "strerror", None) or error).strip() or type(error).__name__).splitlines()[0][:200]

# ------------------------------------------------------------------------------------------------------ reading the text

class Chunk(NamedTuple):
    """Some 1 MiB of a file: a block of JSON lines, a piece of plain text (both as bytes), or a list of parquet values."""
    kind: str    # jsonl, txt, parquet
    split: str
    path: str
    first: int   # number of its first line or row, from 1
    data: bytes | list
    seen: float  # share of the file read with it


def read_chunks(file):
    """The chunks of a file, the same ones every time. Raises ValueError that names a file which is damaged or cut short."""
    count, seen = 1, 0.0
    try:
        with open_input(file.path) as raw:
            if file.name.endswith(".parquet"):
                for texts, seen in parquet_blocks(raw, file.path):
                    yield Chunk("parquet", file.split, file.path, count, texts, seen)
                    count += len(texts)
                return
            kind, blocks = ("jsonl", line_blocks) if ".jsonl" in file.name else ("txt", text_blocks)
            for block in blocks(decompressed(raw, file.path)):
                yield Chunk(kind, file.split, file.path, count, block, raw.tell() / max(file.size, 1))
                count += block.count(b"\n")
    except InputError:
        raise
    except Exception as error:  # pyarrow, gzip, zlib and the hub's clients raise a dozen kinds
        raise ValueError(f"{file.path}: cannot be read on, damaged or cut short? ({first_line(error)}); "
                         "what is done is kept, the same command goes on once it is whole") from None


def open_input(path):
    if path.startswith("hf://"):
        return need("huggingface_hub", path).HfFileSystem().open(path, block_size=32 << 20)
    return open(path, "rb")


def decompressed(raw, path):
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.endswith(".zst"):  # pyarrow's stream refuses a truncated file, zstandard's does not
        return io.BufferedReader(need("pyarrow", path).CompressedInputStream(raw, "zstd"), CHUNK)
    return raw


def line_blocks(file):
    """Blocks of whole lines, CHUNK bytes or a line more; OVERLONG for a line of more than --max_document_mb."""
    rest = bytearray()
    while block := file.read(CHUNK):
        cut = block.rfind(b"\n") + 1
        if cut:
            start = block.find(b"\n") if rest == OVERLONG else 0
            yield bytes(rest) + block[start:cut]
            rest = bytearray(block[cut:])
        elif rest != OVERLONG:
            rest += block
            if len(rest) > max_document_mb << 20:
                rest = bytearray(OVERLONG)
    if rest:
        yield bytes(rest)


def text_blocks(file):
    """Pieces of 1 to 2 CHUNK bytes, cut behind a line where there is one, else between two characters."""
    block = file.read(CHUNK)
    while more := file.read(CHUNK):
        cut = block.rfind(b"\n") + 1
        if not cut:
            cut = len(block) - 1
            while cut > len(block) - 4 and block[cut] & 0xC0 == 0x80:
                cut -= 1
        yield block[:cut]
        block = block[cut:] + more
    if block:
        yield block


def parquet_blocks(raw, path):
    """(values, share of the file) some CHUNK bytes at a time."""
    parquet = need("pyarrow.parquet", path).ParquetFile(raw, pre_buffer=False, buffer_size=CHUNK)
    if text_key not in parquet.schema_arrow.names:
        raise InputError(f"{path}: no column {text_key!r} in {', '.join(parquet.schema_arrow.names)}: name it with --text_key")
    texts, size, rows = [], 0, 0
    for batch in parquet.iter_batches(batch_size=64, columns=[text_key]):
        texts += batch.column(0).to_pylist()
        size, rows = size + batch.nbytes, rows + len(batch)
        if size >= CHUNK:
            yield texts, rows / parquet.metadata.num_rows
            texts, size = [], 0
    if texts:
        yield texts, 1.0

# --------------------------------------------------------------------------------------------------- from text to tokens

def vocabulary(name):
    """(vocabulary size, end-of-text id) of a tokenizer. Raises ValueError that says how to supply it where it is missing."""
    if name == "byte":
        return 257, 256
    tiktoken = need("tiktoken", f"--tokenizer={name}")
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"--tokenizer={name}: expects byte, {', '.join(sorted(tiktoken.list_encoding_names()))}")
    try:
        enc = tiktoken.get_encoding(name)
    except Exception as error:  # of requests, or a ValueError for a file that came damaged
        raise ValueError(f"tiktoken cannot fetch the vocabulary of {name} ({first_line(error)[:60]}...); offline: set TIKTOKEN_CACHE_DIR "
                         "to a folder copied from a machine that has used it, or take --tokenizer=byte") from None
    if EOT not in enc.special_tokens_set:
        raise ValueError(f"--tokenizer={name} has no {EOT}, which ends documents here")
    return enc.n_vocab, enc.eot_token


def encode(texts, tokenizer):
    """Ids of all texts, end-of-text after each (an integer array): tiktoken's encode_ordinary(text) + [eot], text by text."""
    if tokenizer == "byte":
        end = np.array([256], dtype=np.uint16)
        return np.concatenate([ids for text in texts for ids in (np.frombuffer(text.encode(), np.uint8), end)])
    enc = importlib.import_module("tiktoken").get_encoding(tokenizer)
    joined = EOT.join([*texts, ""])
    if joined.count(EOT) == len(texts):  # no text contains it: one call for all, without the GIL, without lists of ints
        with contextlib.suppress(ValueError):  # the regex overflowed
            return enc.encode_to_numpy(joined, allowed_special={EOT}, disallowed_special=())
    return np.array([i for text in texts for i in (*encode_alone(enc, text), enc.eot_token)], dtype=np.uint32)


def encode_alone(enc, text, piece=50_000):
    try:
        return enc.encode_ordinary(text)
    except ValueError:
        return [i for start in range(0, len(text), piece) for i in enc.encode_ordinary(text[start:start + piece])]


class Encoded(NamedTuple):
    ids: dict        # split: bytes
    documents: dict  # split: number of them
    bad: dict        # reason: (count, the first few line or row numbers)
    size: int        # bytes of text


def encode_chunk(chunk, tokenizer, dtype, share, text_key, max_bytes):
    """What a worker does: records -> texts -> splits -> ids. A pure function of its arguments, which travel to the worker."""
    texts, bad, size = {split: [] for split in SPLITS}, {}, 0
    records = {"jsonl": lambda data: data.split(b"\n"), "txt": lambda data: [data], "parquet": list}[chunk.kind](chunk.data)
    for number, record in enumerate(records, chunk.first):
        if chunk.kind == "jsonl" and not record.strip():
            continue
        try:
            text, utf8 = text_of(record, chunk.kind, text_key, max_bytes)
        except ValueError as error:
            bad.setdefault(str(error), []).append(number)
            continue
        u = int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "little") / 2**64
        split = chunk.split or ("test" if u < share["test"] else "val" if u < share["test"] + share["val"] else "train")
        texts[split].append(text)
        size += len(utf8)
    little = np.dtype(dtype).newbyteorder("<")
    return Encoded({split: encode(texts[split], tokenizer).astype(little).tobytes() for split in SPLITS if texts[split]},
                   {split: len(texts[split]) for split in SPLITS}, {why: (len(n), n[:NAMED]) for why, n in bad.items()}, size)


def text_of(record, kind, text_key, max_bytes):
    """The text of a record, as str and as UTF-8. Raises ValueError with the reason why it has none."""
    if record == OVERLONG:
        raise ValueError("longer than --max_document_mb")
    try:
        text = record if kind == "parquet" else record.decode()
        if kind == "jsonl":
            text = json.loads(text)
    except UnicodeDecodeError:
        raise ValueError("invalid UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("broken JSON") from None
    if kind == "jsonl":
        if not isinstance(text, dict):
            raise ValueError("no JSON object")
        if text_key not in text:
            raise ValueError(f"no key {text_key!r}")
        text = text[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is no string")
    try:
        utf8 = text.encode()
    except UnicodeEncodeError:  # lone surrogates
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        utf8 = text.encode()
    if len(utf8) > max_bytes:
        raise ValueError("longer than --max_document_mb")
    return text, utf8

# ------------------------------------------------------------------------------------------------------------- the work

def tokenise(part, files, stop):
    """Reads, hands out, appends, until the part is done or a signal came. What is done is safe, however it ends."""
    by_file = len(files) >= num_shards  # else every part reads all files and takes every num_shards-th chunk
    mine = [i for i in range(len(files)) if not by_file or i % num_shards == shard_index]
    at_file, at_chunk = part.record["file"], part.record["chunk"]
    if at_file or at_chunk:
        print(f"going on at chunk {at_chunk} of {files[at_file].path}: {part.tokens():,} tokens are done", flush=True)
    work = partial(encode_chunk, tokenizer=part.record["settings"]["tokenizer"], dtype=part.dtype, share=shares(files),
                   text_key=text_key, max_bytes=max_document_mb << 20)
    n_workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    most = 2 * n_workers + 4  # chunks in flight
    pending, in_flight = deque(), 0
    progress = Progress(part, sum(files[i].size for i in mine))
    seen = sum(files[i].size for i in mine if i < at_file)

    def take():
        size, future, *after = pending.popleft()
        result = future.result()
        part.add(result, *after)
        progress(result.size, after[-1])
        return size

    # forked workers share what is imported and the vocabulary; no thread of ours runs yet
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(n_workers, mp_context=context, initializer=start_worker) as pool:
        try:
            for i in mine:
                if i < at_file or stop.signal:
                    continue
                for number, chunk in enumerate(read_chunks(files[i]), 1):
                    if stop.signal:
                        break
                    if i == at_file and number <= at_chunk or not by_file and (i + number) % num_shards != shard_index:
                        continue
                    size = len(chunk.data) if chunk.kind != "parquet" else sum(len(str(text)) for text in chunk.data)
                    while pending and (len(pending) >= most or in_flight + size > most * CHUNK):
                        in_flight -= take()
                    pending.append((size, pool.submit(work, chunk), i, number, chunk.path, seen + chunk.seen * files[i].size))
                    in_flight += size
                seen += files[i].size
        finally:  # also where a file turned out to be damaged
            while pending:
                take()
            part.save()
            progress.line()
    if not stop.signal:
        part.finish()


def start_worker():
    """Leaves signals to the parent, and ends when that is gone, however it went."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


class Part:
    """What one process writes: token files, and a record of them and of the place in the input they reach to.

    The record is the truth, replaced whole at every safe point: after a kill the files are cut back to it. A file is called
    .bin.tmp until it is full and the record says so.
    """

    def __init__(self, folder, made_with, dtype, files):
        self.folder, self.dtype, self.files = folder, dtype, files
        self.path = os.path.join(folder, f"part_{shard_index:05d}.json")
        self.open, self.saved = {}, time.monotonic()
        for stray in glob.glob(glob.escape(self.path) + ".tmp*"):
            os.unlink(stray)
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                self.record = json.load(file)
            if self.record["sizes"] != self.sizes():
                raise ValueError(f"files of --source={source} that were read already have changed since: delete {folder} to begin anew")
        else:
            self.record = {"settings": made_with, "done": False, "file": 0, "chunk": 0, "bad_records": {},
                           "splits": {split: {"tokens": 0, "documents": 0, "files": []} for split in SPLITS}}
        self.name_full_files()
        for split in SPLITS:
            for shard in self.record["splits"][split]["files"]:
                path = os.path.join(folder, shard["name"]) + ("" if self.is_full(shard) else ".tmp")
                size = shard["tokens"] * np.dtype(dtype).itemsize
                if not os.path.exists(path) or os.path.getsize(path) < size:
                    raise ValueError(f"{path} is missing or shorter than {self.path} says: delete {folder} to begin anew")
                if not self.is_full(shard):
                    self.open[split] = open(path, "r+b")
                    self.open[split].truncate(size)
                    self.open[split].seek(size)

    def is_full(self, shard):
        return shard["tokens"] >= shard_tokens or self.record["done"]

    def sizes(self):
        """Checksum of the sizes of the files that were read to their ends."""
        return f"{zlib.crc32(repr([file.size for file in self.files[:self.record['file']]]).encode()):08x}"

    def tokens(self):
        return sum(split["tokens"] for split in self.record["splits"].values())

    def add(self, encoded, file, chunk, path, seen):
        """Appends what came of chunk number `chunk` of files[file]."""
        for split, documents in encoded.documents.items():
            self.record["splits"][split]["documents"] += documents
        for split, ids in encoded.ids.items():
            self.append(split, ids)
        for reason, (count, numbers) in encoded.bad.items():
            bad = self.record["bad_records"].setdefault(reason, {"count": 0, "first": []})
            bad["count"] += count
            bad["first"] += [f"{path}:{number}" for number in numbers][:NAMED - len(bad["first"])]
        self.record["file"], self.record["chunk"] = file, chunk
        full = any(split["files"] and self.is_full(split["files"][-1]) for split in self.record["splits"].values())
        if full or time.monotonic() - self.saved >= safe_interval:
            self.save()

    def append(self, split, ids):
        mine = self.record["splits"][split]
        if split not in self.open:
            part = f"part{shard_index:03d}_" if num_shards > 1 else ""
            mine["files"].append({"name": f"{split}_{part}{len(mine['files']):05d}.bin", "tokens": 0, "crc32": "00000000"})
            self.open[split] = open(os.path.join(self.folder, mine["files"][-1]["name"] + ".tmp"), "wb")
        shard, tokens = mine["files"][-1], len(ids) // np.dtype(self.dtype).itemsize
        self.open[split].write(ids)
        shard["tokens"] += tokens
        shard["crc32"] = f"{zlib.crc32(ids, int(shard['crc32'], 16)):08x}"
        mine["tokens"] += tokens

    def save(self):
        """A safe point: files, then the record, then the names of files that are full."""
        for file in self.open.values():
            file.flush()
            os.fsync(file.fileno())
        save_json(self.path, self.record | {"sizes": self.sizes()})
        self.name_full_files()
        self.saved = time.monotonic()

    def name_full_files(self):
        for split in SPLITS:
            for shard in self.record["splits"][split]["files"]:
                path = os.path.join(self.folder, shard["name"])
                if self.is_full(shard) and os.path.exists(path + ".tmp"):
                    if split in self.open:
                        self.open.pop(split).close()
                    os.replace(path + ".tmp", path)

    def finish(self):
        if self.record["bad_records"] and not any(split["documents"] for split in self.record["splits"].values()):
            os.unlink(self.path)
            raise ValueError(f"no document found, {bad_line(self.record)}")
        self.record["done"] = True
        self.save()


def merge(folder, made_with, about):
    """Writes meta.json once all parts are done, the same whoever does it."""
    parts, missing = [], []
    for i in range(num_shards):
        path = os.path.join(folder, f"part_{i:05d}.json")
        record = {"done": False}
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                record = json.load(file)
        parts.append(record)
        missing += [] if record["done"] else [str(i)]
    if missing:
        print(f"part {shard_index} is done; meta.json follows when --shard_index={','.join(missing)} of --num_shards={num_shards} are too "
              f"(other machines: copy their files into {folder}, then run any part again)")
        return
    meta = {"tokenizer": made_with["tokenizer"], **about, "checksum": "crc32", "splits": {}, "bad_records": {}, "settings": made_with}
    for split in SPLITS:
        mine = [record["splits"][split] for record in parts]
        meta["splits"][split] = {"tokens": sum(m["tokens"] for m in mine), "documents": sum(m["documents"] for m in mine),
                                 "files": [file for m in mine for file in m["files"]]}
        for file in meta["splits"][split]["files"]:
            path = os.path.join(folder, file["name"])
            if not os.path.exists(path) or os.path.getsize(path) != file["tokens"] * np.dtype(about["dtype"]).itemsize:
                raise ValueError(f"{path} is missing or not of the size its part record says: copy it again")
    for record in parts:
        for reason, bad in record["bad_records"].items():
            all_bad = meta["bad_records"].setdefault(reason, {"count": 0, "first": []})
            all_bad["count"] += bad["count"]
            all_bad["first"] = (all_bad["first"] + bad["first"])[:NAMED]
    if not sum(split["documents"] for split in meta["splits"].values()):
        raise ValueError(f"{folder}: no document found in --source={source}")
    save_json(os.path.join(folder, "meta.json"), meta)
    print(f"{folder} is finished: {totals(meta)}")
    if meta["bad_records"]:
        print(bad_line(meta))
    for split in SPLITS:
        if not meta["splits"][split]["tokens"]:
            print(f"note: the {split} split is empty" + (f": raise --{split}_fraction or give --{split}_source" if split != "train" else ""))


def totals(meta):
    return ", ".join(f"{name} {split['tokens']:,} tokens of {split['documents']:,} documents" for name, split in meta["splits"].items())


def bad_line(record):
    return "bad records, left out: " + "; ".join(f"{bad['count']:,} {reason} ({', '.join(bad['first'])}{', ...' * (bad['count'] > len(bad['first']))})"
                                                 for reason, bad in record["bad_records"].items())


class Progress:
    """A line now and then: share of the input, tokens, speed since this process began, time left by bytes of input."""

    def __init__(self, part, total):
        self.part, self.total, self.text, self.seen, self.first_seen = part, total, 0, 0.0, None
        self.begin = self.last = time.monotonic()
        self.first_tokens = part.tokens()
        self.tty = sys.stderr.isatty()

    def __call__(self, text, seen):
        if self.first_seen is None:
            self.first_seen, self.begin = seen, min(self.begin, time.monotonic())
        self.text, self.seen = self.text + text, seen
        if time.monotonic() - self.last > (0.5 if self.tty else 10):
            self.last = time.monotonic()
            self.line()

    def line(self):
        seconds = max(time.monotonic() - self.begin, 1e-9)
        share = self.seen / max(self.total, 1)
        left = seconds * (self.total - self.seen) / max(self.seen - (self.first_seen or 0), 1)
        tokens = self.part.tokens()
        print(f"{share:6.1%}  {tokens:,} tokens  {(tokens - self.first_tokens) / seconds / 1e6:.2f} M tokens/s  "
              f"{self.text / seconds / 1e6:.1f} MB/s of text  {time_left(left)} left", file=sys.stderr,
              end="\r" if self.tty and share < 1 else "\n", flush=True)


if __name__ == "__main__":
    configure(globals())
    main()
