"""
Turns raw text into the token files that train_lm.py memory-maps: data/NAME/*.bin, meta.json.

    python prepare_pile.py --source=python                 # Python's own library, as bytes: seconds
    python prepare_pile.py                                 # the Pile, streamed from the hub, GPT-2's BPE
    python prepare_pile.py --source=a.jsonl.zst,folder --dataset=mine --val_source=val.jsonl.zst
    python prepare_pile.py --num_shards=4 --shard_index=0  # the first of four machines

Sources: python (the library of this Python), packages (also the installed packages: .py, .pyi,
.md, .rst, .txt), files and folders separated by commas (.jsonl, .jsonl.zst, .jsonl.gz, .json.gz,
.parquet, .txt; where there are none of those .arrow and .csv), or a Hugging Face dataset of such files
(org/name or org/name/folder). A .txt file is one document; beyond 1 MiB it is cut at line ends. A
byte-order mark at a file's start is dropped.

Splits: val and test have files of their own if --val_source and --test_source name some, or if
the source's file names do (train/00.jsonl.zst, val.jsonl.zst). Otherwise a hash of each
document's text decides, so that equal texts stay together. Fewer than 300 .txt files are too few
documents for that: of each long one the beginning goes to train, what follows to val and then test, cut
behind lines; short ones stay whole. A data set without test (--test_fraction=0) trains too.

Ids: tiktoken's encode_ordinary and end-of-text for each document. Lone surrogates become U+FFFD.

Restart: after a kill, run the same command again. It goes on from the last safe point and ends
in the same bytes as an undisturbed run. meta.json is written last; no trainer reads a folder
without it. On a finished folder the same command verifies all checksums.

Several machines: each runs the same command with its own --shard_index, in one folder or in
folders that are copied together later. Any of them, run once more, then writes meta.json. One
process reads for all its workers: beyond some 30 cores run several parts on one machine.

Memory: 2 chunks of 1 MiB for each worker and some 20 times the longest document, which
--max_document_mb bounds; it does not grow with the input. Measured with 2 workers, all processes
together: 320 MiB for 2 GB of documents of 10 kB, 1.4 GiB for documents of 60 MB.
"""
import os
import zlib
from functools import partial

import numpy as np

from configurator import configure
from nanorank.data_folder import BadRecord, add_bad, check_range, is_finished, split_by_hash
from nanorank.errors import UserError, user_errors
from nanorank.shards import only_process
from nanorank.text_files import CHUNK, read_chunks, records_of, text_of
from nanorank.text_sources import find_texts, leave_out_twins, split_texts
from nanorank.token_files import Part, finish
from nanorank.tokenizer import encode, vocabulary

# -----------------------------------------------------------------------------
# what to read
source = "monology/pile-uncopyrighted"  # python, packages, files, folders (comma-separated), or a dataset id
val_source = ""             # files or folders of the val split; empty: files named so, else by hash
test_source = ""            # files or folders of the test split; empty: files named so, else by hash
val_fraction = 0.02         # share of documents, by hash, if val has no files of its own
test_fraction = 0.02        # share of documents, by hash, if test has no files of its own
text_key = "text"           # key (.jsonl) or column (.parquet) of the text
max_document_mb = 64        # longest line and document, MiB; longer ones are bad records
# what to write
dataset = "auto"            # folder in data_dir; auto: python for --source=python, else pile
data_dir = "data"           # folder of all data sets
tokenizer = "auto"          # byte or a tiktoken encoding; auto: byte for --source=python, else gpt2
shard_tokens = 100_000_000  # tokens in a file, after which the next is begun
# how
num_shards = 1              # parts that the work is split in, one process each, on any machines
shard_index = 0             # the part that this process makes, from 0
workers = 0                 # processes that tokenise; 0: one per core
safe_interval = 10.0        # seconds between safe points: the work that a kill can cost
# -----------------------------------------------------------------------------

FEW = 300  # .txt files: fewer are too few documents to be sure that by hash each split has some

# the settings that the ids depend on
MADE_WITH = ("source", "val_source", "test_source", "val_fraction", "test_fraction", "text_key",
             "max_document_mb", "tokenizer")


def main():
    """Makes this process's part of the data set, and meta.json once all parts are there."""
    made_with = check_settings()
    name = dataset
    if name == "auto":
        name = "python" if source == "python" else "pile"
    folder = os.path.join(data_dir, name)
    if is_finished(folder, made_with):
        return

    vocab_size, eot = vocabulary(made_with["tokenizer"])
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    files = find_all_files()
    names = zlib.crc32(repr([(file.split, file.name) for file in files]).encode())
    made_with["shard_tokens"] = shard_tokens
    made_with["num_shards"] = num_shards
    made_with["input files"] = f"{len(files)} ({names:08x})"

    os.makedirs(folder, exist_ok=True)
    with only_process(os.path.join(folder, f".part_{shard_index:05d}.lock"), f"part {shard_index}"):
        part = Part(folder, made_with, dtype, files, shard_index, safe_interval)
        at_chunk = part.record["chunk"]
        if at_chunk and not part.record["done"]:
            path = files[part.record["file"]].path
            print(f"going on after chunk {at_chunk} of {path}: {part.tokens():,} tokens are done", flush=True)
        work = partial(encode_chunk, tokenizer=made_with["tokenizer"], dtype=dtype, share=shares(files),
                       text_key=text_key, max_bytes=max_document_mb << 20)
        jobs = partial(unread_chunks, part, files)
        total = sum(files[i].size for i in my_files(files))
        part.fill(work, jobs, total, "B", workers, CHUNK)

        own = {file.split for file in files if file.split and not file.start}
        about = {"vocab_size": vocab_size, "eot": eot, "dtype": dtype}
        finish(folder, made_with, own, about, shard_index)


def check_settings():
    """{name: value} of the settings that the ids depend on. Raises UserError for senseless values."""
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise UserError(f"--val_fraction={val_fraction}, --test_fraction={test_fraction}: "
                        "expects shares that leave some to train")
    check_range(globals(), num_shards=1, shard_index=0, shard_tokens=1, max_document_mb=1, workers=0)
    if shard_index >= num_shards:
        raise UserError(f"--shard_index={shard_index}: expects 0 to {num_shards - 1} "
                        f"with --num_shards={num_shards}")
    made_with = {name: globals()[name] for name in MADE_WITH}
    if tokenizer == "auto":
        made_with["tokenizer"] = "byte" if source == "python" else "gpt2"
    return made_with


def find_all_files():
    """Every input file, those of val and test first, in the same order on all machines."""
    files = []
    for split, places in (("val", val_source), ("test", test_source)):
        if places:
            files += [file._replace(split=split) for file in find_texts(places)]
    given = {file.split for file in files}
    paths = {os.path.realpath(file.path) for file in files}

    found = sorted(find_texts(source), key=lambda file: not file.split)
    for file in found:
        if file.split not in given and os.path.realpath(file.path) not in paths:
            files.append(file)
    files = leave_out_twins(files)
    if not files or files[-1].split:
        raise UserError(f"--source={source}: no files are left for the train split")

    by_hash = [file for file in files if not file.split]
    texts = [file for file in by_hash if file.name.endswith(".txt")]
    are_few = len(texts) == len(by_hash) < FEW
    about = [f"{len(files)} files, {sum(file.size for file in files) / 1e6:,.1f} MB"]
    for split, share in shares(files).items():
        n = sum(file.split == split for file in files)
        if n:
            about.append(f"{split}: {n} of the files")
        elif share:
            about.append(f"{split}: {share:.1%} of " + ("the .txt files" if are_few else "documents by hash"))
    print("; ".join(about), flush=True)
    return split_texts(files, shares(files)) if are_few else files


def shares(files):
    """The shares of hashed documents for val and test: none for a split that has files of its own."""
    own = {file.split for file in files}
    share = {"val": val_fraction, "test": test_fraction}
    return {split: 0.0 if split in own else share[split] for split in share}


def my_files(files):
    """Numbers of the files that this part reads. With fewer files than parts, each part reads all of them."""
    if len(files) < num_shards:
        return range(len(files))
    return range(shard_index, len(files), num_shards)


def unread_chunks(part, files, stop):
    """The jobs of Part.fill: the chunks of this part after those recorded. Ends after a signal."""
    by_file = len(files) >= num_shards  # else a part takes every num_shards-th chunk
    at = part.record["file"], part.record["chunk"]
    before = 0  # bytes
    for i in my_files(files):
        chunks = read_chunks(files[i], text_key, max_document_mb << 20, CHUNK) if i >= at[0] else ()
        for number, chunk in enumerate(chunks, 1):
            if stop.signal:
                return
            is_mine = by_file or (i + number) % num_shards == shard_index
            if is_mine and (i, number) > at:
                yield chunk.size(), chunk, (i, number), int(before + files[i].size * chunk.seen)
        before += files[i].size

# -----------------------------------------------------------------------------
# text to ids, in the workers

def encode_chunk(chunk, tokenizer, dtype, share, text_key, max_bytes):
    """{split: (documents, ids as bytes)} and the bad records as add_bad counts them.

    A pure function of its arguments: workers do not see the settings.
    """
    texts = {}  # split: its texts
    bad = {}
    for number, record in records_of(chunk):
        try:
            text, utf8 = text_of(record, chunk.kind, text_key, max_bytes)
        except BadRecord as error:
            add_bad(bad, str(error), [f"{chunk.file.path}:{number}"])
            continue
        split = chunk.file.split or split_by_hash(utf8, share)
        texts.setdefault(split, []).append(text)

    little_endian = np.dtype(dtype).newbyteorder("<")
    encoded = {}
    for split, some in texts.items():
        encoded[split] = len(some), encode(some, tokenizer).astype(little_endian).tobytes()
    return encoded, bad


if __name__ == "__main__":
    with user_errors("prepare_pile.py"):
        configure(globals())
        main()
