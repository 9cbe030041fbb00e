"""
Raw text in, token ids that trainers memory-map out: `data/NAME/`, as batches.py describes it.

    python prepare_pile.py --source=python                   # this Python's own library, as bytes; seconds, no download
    python prepare_pile.py                                   # the Pile's public mirror, streamed, in GPT-2's BPE
    python prepare_pile.py --source=a.jsonl.zst,folder --dataset=mine --val_source=val.jsonl.zst
    python prepare_pile.py --num_shards=4 --shard_index=0    # the first of four machines

Sources: `python` (this Python's own library), `packages` (and what is installed: .py, .pyi, .md, .rst, .txt), files or folders
(comma-separated) of .jsonl, .jsonl.zst, .jsonl.gz, .parquet, .txt, or a Hugging Face dataset (org/name or org/name/folder) of such
files. A .txt file is a document; beyond 1 MiB it is cut behind lines.

Splits: files of their own where --val_source, --test_source are given or a source's files are named by split
(train/00.jsonl.zst, val.jsonl.zst ...); else a hash of the document's text decides, so that equal texts stay together.

Ids: tiktoken's encode_ordinary and end-of-text, document by document. Lone surrogates become U+FFFD, as tiktoken does it;
a document that overflows tiktoken's regex (several 100,000 spaces in a row) is encoded in pieces of 50,000 characters.

Killed at any instant and run again, it goes on from its last safe point and ends in the same bytes as an undisturbed run.
meta.json, without which no trainer reads the folder, comes last; from then on the same command verifies all checksums.
Several machines run the same command, each with its own --shard_index, in one folder or in several that are copied together;
then any of them once more writes meta.json.
Beyond some 30 cores run several such parts side by side on one machine: one process reads for all its workers.

Memory does not grow with the input: 2 chunks of 1 MiB in flight per worker, and some 20 times the longest document, which
--max_document_mb bounds. Measured with 2 workers, all processes together: 320 MiB for 2 GB of documents of 10 kB, 1.4 GiB
for documents of 60 MB.
"""
import contextlib
import filecmp
import glob
import importlib
import json
import os
import sys
import time
import zlib
from functools import partial

import numpy as np
from tqdm import tqdm

from configurator import configure
from nanorank.console import StopSignal
from nanorank.errors import UserError, user_errors
from nanorank.files import save_json, writing
from nanorank.shards import (
    NAMED,
    add_bad,
    bad_line,
    check_range,
    check_size,
    only_process,
    read_json,
    refuse_other,
    reopen,
    run_in_order,
)
from nanorank.text_files import CHUNK, OVERLONG, find_files, need, read_chunks
from nanorank.tokens import check_crc32, read_meta

try:
    from orjson import loads  # half the time of json, 5 % of the whole; what it refuses goes to json
except ImportError:
    from json import loads

# ------------------------------------------------------------------------------------------------------------ settings
# what to read
source = "monology/pile-uncopyrighted"  # python, packages, files or folders (comma-separated), or a Hugging Face dataset id
val_source = ""                         # files or folders of the val split; empty: files named so, else by hash
test_source = ""                        # files or folders of the test split; empty: files named so, else by hash
val_fraction = 0.02                     # share of documents, by hash, where val has no files of its own
test_fraction = 0.02                    # share of documents, by hash, where test has no files of its own
text_key = "text"                       # key (.jsonl) or column (.parquet) of the text
max_document_mb = 64                    # longest line and document, MiB; longer ones are bad records
# what to write
dataset = "auto"                        # name of the folder in data_dir; auto: python for --source=python, else pile
data_dir = "data"                       # folder of all data sets
tokenizer = "auto"                      # byte or a tiktoken encoding; auto: byte for --source=python, else gpt2
shard_tokens = 100_000_000              # tokens in a file, after which the next is begun
# how
num_shards = 1                          # parts that the work is split in, one process each, on any machines
shard_index = 0                         # the part that this process makes, from 0
workers = 0                             # processes that tokenise; 0: one per core
safe_interval = 10.0                    # seconds between safe points: the work that a kill can cost
# ---------------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "val", "test")
MADE_WITH = ("source", "val_source", "test_source", "val_fraction", "test_fraction", "text_key", "max_document_mb", "tokenizer")
EOT = "<|endoftext|>"


def main():
    """Makes this process's part of the data set, and its meta.json once all parts are there."""
    with user_errors("prepare_pile.py"):
        made_with = check_settings()
        folder = os.path.join(data_dir, dataset if dataset != "auto" else "python" if source == "python" else "pile")
        if os.path.exists(os.path.join(folder, "meta.json")):
            meta = read_meta(folder)
            refuse_other(folder, meta.get("settings", {}), made_with)
            check_files(folder, meta, fix := f"copy it again, or delete {folder} and run this again")
            for file in tqdm([file for split in meta["splits"].values() for file in split["files"]], "verifying checksums", disable=None):
                check_crc32(folder, file, fix)
            return print(f"{folder} is finished, nothing to do: {totals(meta)}")
        vocab_size, eot = vocabulary(made_with["tokenizer"])
        about = {"vocab_size": vocab_size, "eot": eot, "dtype": "uint16" if vocab_size <= 1 << 16 else "uint32"}
        files = find_all_files()
        names = zlib.crc32(repr([(file.split, file.name) for file in files]).encode())
        made_with |= {"shard_tokens": shard_tokens, "num_shards": num_shards, "input files": f"{len(files)} ({names:08x})"}
        os.makedirs(folder, exist_ok=True)
        for path in glob.glob(os.path.join(glob.escape(folder), "part_*.json")):
            refuse_other(folder, read_json(path)["settings"], made_with)
        with only_process(os.path.join(folder, f".part_{shard_index:05d}.lock"), f"part {shard_index}"):
            part = Part(folder, made_with, about["dtype"], files)
            stop = StopSignal()
            if not part.record["done"]:
                tokenise(part, files, stop)
            if part.record["done"]:
                merge(folder, made_with, about)
    if not part.record["done"]:
        print(f"stopped by signal {stop.signal}; the same command goes on from here", flush=True)
        raise SystemExit(128 + stop.signal)


def check_settings():
    """The settings that the ids depend on. Raises UserError for values that make no sense."""
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise UserError(f"--val_fraction={val_fraction}, --test_fraction={test_fraction}: expects shares that leave some to train")
    check_range(globals(), num_shards=1, shard_index=0, shard_tokens=1, max_document_mb=1, workers=0)
    if shard_index >= num_shards:
        raise UserError(f"--shard_index={shard_index}: expects 0 to {num_shards - 1} with --num_shards={num_shards}")
    auto = {"tokenizer": "byte" if source == "python" else "gpt2"} if tokenizer == "auto" else {}
    return {name: globals()[name] for name in MADE_WITH} | auto

# ------------------------------------------------------------------------------------------------------- files of text

def find_all_files():
    """Every input file, those of val and test first, in the same order on all machines."""
    given = [file._replace(split=split) for split, places in (("val", val_source), ("test", test_source)) if places
             for file in find_files(places)]
    splits, paths = {file.split for file in given}, {os.path.realpath(file.path) for file in given}
    found = [file for file in find_files(source) if file.split not in splits and os.path.realpath(file.path) not in paths]
    files = apart(given + sorted(found, key=lambda file: not file.split))
    if not files or files[-1].split:
        raise UserError(f"--source={source}: no files are left for the train split")
    print(f"{len(files)} files, {sum(file.size for file in files) / 1e6:,.1f} MB; " + ", ".join(
        f"{split}: " + (f"{n} of the files" if (n := sum(file.split == split for file in files)) else f"{share:.1%} of documents by hash")
        for split, share in shares(files).items() if split != "train"), flush=True)
    return files


def apart(files):
    """The files without those of train that hold the same bytes as one of val or test, under another name or by a link; says so."""
    held_out = {file.size: [] for file in files if file.split and file.size}
    for file in files:
        if file.split and file.size and os.path.exists(file.path):
            held_out[file.size].append(file)
    kept = []
    for file in files:
        same = () if file.split or not os.path.exists(file.path) else held_out.get(file.size, ())
        twin = next((other for other in same if filecmp.cmp(file.path, other.path, shallow=False)), None)
        if twin:
            print(f"note: {file.path} holds the same bytes as {twin.path} of {twin.split}: left out of train")
        else:
            kept.append(file)
    return kept


def shares(files):
    """The share of hashed documents that goes to each split: none to those that have files of their own."""
    own = {file.split for file in files}
    val, test = (0.0 if split in own else share for split, share in (("val", val_fraction), ("test", test_fraction)))
    return {"train": 1.0 - val - test, "val": val, "test": test}

# ---------------------------------------------------------------------------------------------------- chunks to tokens

def encode_chunk(chunk, tokenizer, dtype, share, text_key, max_bytes):
    """What a worker does: {split: (documents, ids as bytes)} and {reason: (bad records, numbers of the first)}.

    A pure function of its arguments: workers know nothing of the settings.
    """
    texts, bad = {}, {}
    records = chunk.data.split(b"\n") if chunk.kind == "jsonl" else [chunk.data] if chunk.kind == "txt" else chunk.data
    for number, record in enumerate(records, chunk.first):
        if chunk.kind == "jsonl" and not record.strip():
            continue
        try:
            text, utf8 = text_of(record, chunk.kind, text_key, max_bytes)
        except ValueError as error:
            bad.setdefault(str(error), []).append(number)
            continue
        u = zlib.crc32(utf8) / 2**32
        split = chunk.split or ("test" if u < share["test"] else "val" if u < share["test"] + share["val"] else "train")
        texts.setdefault(split, []).append(text)
    return ({split: (len(t), encode(t, tokenizer).astype(np.dtype(dtype).newbyteorder("<")).tobytes()) for split, t in texts.items()},
            {reason: (len(numbers), numbers[:NAMED]) for reason, numbers in bad.items()})


def text_of(record, kind, text_key, max_bytes):
    """The text of a record, as str and as UTF-8. Raises UserError with the reason why it has none."""
    if record == OVERLONG:
        raise UserError("longer than --max_document_mb")
    try:
        text = record if kind == "parquet" else record.decode() if kind == "txt" else parse(record)
    except UnicodeDecodeError:
        raise UserError("invalid UTF-8") from None
    except (ValueError, RecursionError):
        raise UserError("broken JSON") from None
    if kind == "jsonl":
        if not isinstance(text, dict):
            raise UserError("not a JSON object")
        if text_key not in text:
            raise UserError(f"no key {text_key!r}")
        text = text[text_key]
    if not isinstance(text, str):
        raise UserError(f"{text_key!r} is not a string")
    try:
        utf8 = text.encode()
    except UnicodeEncodeError:  # lone surrogates
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        utf8 = text.encode()
    if len(utf8) > max_bytes:
        raise UserError("longer than --max_document_mb")
    return text, utf8


def parse(line):
    try:
        return loads(line)
    except ValueError:  # orjson refuses lone surrogates
        return json.loads(line.decode())


def vocabulary(name):
    """(vocabulary size, end-of-text id) of a tokenizer. Raises UserError that says how to supply a missing one."""
    if name == "byte":
        return 257, 256
    tiktoken = need("tiktoken", f"--tokenizer={name}")
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"--tokenizer={name}: expects byte, {', '.join(sorted(tiktoken.list_encoding_names()))}")
    try:
        enc = tiktoken.get_encoding(name)
    except Exception as error:  # of requests, or a ValueError for a file that came damaged
        raise UserError(f"tiktoken cannot fetch {name}'s vocabulary ({type(error).__name__}); offline, set TIKTOKEN_CACHE_DIR to a "
                         "folder that a machine with network has filled so, or take --tokenizer=byte") from None
    if EOT not in enc.special_tokens_set:
        raise UserError(f"--tokenizer={name} has no {EOT}, which ends documents here")
    return enc.n_vocab, enc.eot_token


def encode(texts, tokenizer):
    """Ids of all texts, end-of-text after each (an integer array): tiktoken's encode_ordinary(text) + [eot], text by text."""
    if tokenizer == "byte":
        eot = np.array([256], dtype=np.uint16)
        return np.concatenate([ids for text in texts for ids in (np.frombuffer(text.encode(), dtype=np.uint8), eot)])
    enc = importlib.import_module("tiktoken").get_encoding(tokenizer)
    joined = EOT.join([*texts, ""])
    if joined.count(EOT) == len(texts):  # no text holds it: one call for all, and no lists of ints
        with contextlib.suppress(ValueError):  # the regex overflowed on one
            return enc.encode_to_numpy(joined, allowed_special={EOT}, disallowed_special=())
    return np.array([i for text in texts for i in (*encode_alone(enc, text), enc.eot_token)], dtype=np.uint32)


def encode_alone(enc, text, piece=50_000):
    try:
        return enc.encode(text, disallowed_special=())  # encode_ordinary, but an overflow is an exception, not a panic
    except ValueError:
        return [i for start in range(0, len(text), piece) for i in enc.encode(text[start:start + piece], disallowed_special=())]

# ------------------------------------------------------------------------------------------------------------ the work

def tokenise(part, files, stop):
    """Reads, hands out, appends in order, until the part is done or a signal came. What is done is safe however it ends."""
    by_file = len(files) >= num_shards  # else every part reads all files and takes every num_shards-th chunk
    mine = [i for i in range(len(files)) if not by_file or i % num_shards == shard_index]
    at_file, at_chunk = part.record["file"], part.record["chunk"]
    if at_chunk:
        print(f"going on behind chunk {at_chunk} of {files[at_file].path}: {part.tokens():,} tokens are done", flush=True)
    work = partial(encode_chunk, tokenizer=part.record["settings"]["tokenizer"], dtype=part.dtype, share=shares(files),
                   text_key=text_key, max_bytes=max_document_mb << 20)
    bar, tokens = None, part.tokens()

    def chunks():
        nonlocal bar
        seen = 0
        for i in mine:
            for number, chunk in enumerate(read_chunks(files[i], text_key, max_document_mb << 20, CHUNK) if i >= at_file else (), 1):
                if stop.signal:
                    return
                if i == at_file and number <= at_chunk or not by_file and (i + number) % num_shards != shard_index:
                    continue
                here = int(seen + files[i].size * chunk.seen)
                if bar is None:  # only now, for what is skipped would pass for speed
                    often = 0.5 if sys.stderr.isatty() else 10
                    bar = tqdm(total=sum(files[i].size for i in mine), initial=here, unit="B", unit_scale=True, mininterval=often)
                size = len(chunk.data) if chunk.kind != "parquet" else sum(len(str(text)) for text in chunk.data)
                yield size, chunk, (here, i, number, files[i].path)
            seen += files[i].size

    def take(encoded, here, *place):
        part.add(*encoded, *place)
        speed = (part.tokens() - tokens) / max(bar.format_dict["elapsed"], 1e-9)
        bar.set_postfix_str(f"{part.tokens():,} tokens, {speed / 1e6:.2f} M tokens/s", refresh=False)
        bar.update(here - bar.n)

    try:
        if run_in_order(work, chunks(), take, part.save, stop, workers, CHUNK):
            part.record["done"] = True
            part.save()
    finally:
        if bar:
            bar.close()

# ------------------------------------------------------------------------------------------------------ tokens to files

class Part:
    """What one process writes: token files, and a record of them and of the place in the input that they reach to.

    The record is the truth, and is replaced whole at every safe point; after a kill the files are cut back to it. A file
    is called .bin.tmp until it is full and the record says so.
    """

    def __init__(self, folder, made_with, dtype, files):
        self.folder, self.dtype, self.inputs = folder, dtype, files
        self.path = os.path.join(folder, f"part_{shard_index:05d}.json")
        self.open, self.saved = {}, time.monotonic()
        for stray in glob.glob(glob.escape(self.path) + ".tmp*"):
            os.unlink(stray)
        self.record = read_json(self.path) if os.path.exists(self.path) else {
            "settings": made_with, "done": False, "file": 0, "chunk": 0, "sizes": 0, "bad_records": {},
            "splits": {split: {"tokens": 0, "documents": 0, "files": []} for split in SPLITS}}
        if self.record["sizes"] != self.sizes():
            raise UserError(f"files of --source={source} that were read already have changed: delete {folder} to begin anew")
        self.name_full_files()
        for split, shard in self.shards():
            path, size = os.path.join(folder, shard["name"]), shard["tokens"] * np.dtype(dtype).itemsize
            path += "" if self.is_full(shard) else ".tmp"
            if self.is_full(shard):
                check_size(path, size, f"delete {folder} to begin anew")
            else:
                self.open[split] = reopen(path, size, self.path)

    def shards(self):
        return [(split, shard) for split in SPLITS for shard in self.record["splits"][split]["files"]]

    def is_full(self, shard):
        return shard["tokens"] >= shard_tokens or self.record["done"]

    def sizes(self):
        """Checksum of the sizes of the input files that are done with."""
        return zlib.crc32(repr([file.size for file in self.inputs[:self.record["file"]]]).encode()) if self.record["file"] else 0

    def tokens(self):
        return sum(split["tokens"] for split in self.record["splits"].values())

    def add(self, encoded, bad, file, chunk, path):
        """Appends what came of chunk number `chunk` of inputs[file]."""
        for split, (documents, ids) in encoded.items():
            mine = self.record["splits"][split]
            if split not in self.open:
                part = f"part{shard_index:03d}_" if num_shards > 1 else ""
                mine["files"].append({"name": f"{split}_{part}{len(mine['files']):05d}.bin", "tokens": 0, "crc32": "00000000"})
                self.open[split] = open(os.path.join(self.folder, mine["files"][-1]["name"] + ".tmp"), "wb")
            with writing(self.open[split].name):
                self.open[split].write(ids)
            shard, tokens = mine["files"][-1], len(ids) // np.dtype(self.dtype).itemsize
            shard["crc32"] = f"{zlib.crc32(ids, int(shard['crc32'], 16)):08x}"
            shard["tokens"] += tokens
            mine["tokens"] += tokens
            mine["documents"] += documents
        for reason, (count, numbers) in bad.items():
            add_bad(self.record["bad_records"], reason, count, [f"{path}:{number}" for number in numbers])
        self.record["file"], self.record["chunk"] = file, chunk
        full = any(self.is_full(self.record["splits"][split]["files"][-1]) for split in self.open)
        if full or time.monotonic() - self.saved >= safe_interval:
            self.save()

    def save(self):
        """A safe point: the files, then the record, then the names of files that are full."""
        for file in self.open.values():
            with writing(file.name):
                file.flush()
                os.fsync(file.fileno())
        self.record["sizes"] = self.sizes()
        save_json(self.path, self.record)
        self.name_full_files()
        self.saved = time.monotonic()

    def name_full_files(self):
        for split, shard in self.shards():
            path = os.path.join(self.folder, shard["name"])
            if self.is_full(shard) and os.path.exists(path + ".tmp"):
                os.replace(path + ".tmp", path)
                if split in self.open:
                    self.open.pop(split).close()


def merge(folder, made_with, about):
    """Writes meta.json if all parts are done; it is the same whoever does it."""
    paths = [os.path.join(folder, f"part_{i:05d}.json") for i in range(num_shards)]
    parts = [read_json(path) if os.path.exists(path) else {"done": False} for path in paths]
    if missing := [str(i) for i, part in enumerate(parts) if not part["done"]]:
        return print(f"part {shard_index} is done; not yet --shard_index={','.join(missing)}. If those run elsewhere, copy their files "
                     f"into {folder} and run any part again")
    meta = {"tokenizer": made_with["tokenizer"], **about, "source": source, "checksum": "crc32", "splits": {}, "bad_records": {},
            "settings": made_with}
    for split in SPLITS:
        mine = [part["splits"][split] for part in parts]
        meta["splits"][split] = {"tokens": sum(m["tokens"] for m in mine), "documents": sum(m["documents"] for m in mine),
                                 "files": [file for m in mine for file in m["files"]]}
    for part in parts:
        for reason, bad in part["bad_records"].items():
            add_bad(meta["bad_records"], reason, bad["count"], bad["first"])
    bad = f"; {bad_line(meta['bad_records'])}" if meta["bad_records"] else ""
    if not any(split["documents"] for split in meta["splits"].values()):
        for path in paths:  # so that another try may have other settings
            os.unlink(path)
        raise UserError(f"no documents in --source={source}{bad}")
    check_files(folder, meta, "copy it again")
    save_json(os.path.join(folder, "meta.json"), meta)
    print(f"{folder} is finished: {totals(meta)}{bad}")
    if empty := [split for split in SPLITS if not meta["splits"][split]["tokens"]]:
        print(f"note: no document fell to {' and '.join(empty)}; --val_fraction, --test_fraction, --val_source, --test_source say which do")


def check_files(folder, meta, fix):
    for split in meta["splits"].values():
        for path, tokens in ((os.path.join(folder, file["name"]), file["tokens"]) for file in split["files"]):
            check_size(path, tokens * np.dtype(meta["dtype"]).itemsize, fix)


def totals(meta):
    return ", ".join(f"{name} {split['tokens']:,} tokens of {split['documents']:,} documents" for name, split in meta["splits"].items())


if __name__ == "__main__":
    configure(globals())
    main()
