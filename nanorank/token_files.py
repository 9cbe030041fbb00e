"""
Writes the token files and meta.json of prepare_pile.py; a kill costs what follows the last safe point.

    part = Part(folder, made_with, dtype, inputs, shard_index=0, safe_interval=10.0)
    part.add(encoded, bad, file_number, chunk_number)     # for each chunk, in order
    finish(folder, made_with, own, about, shard_index=0)  # meta.json, once all parts are there
"""
import os
import zlib

import numpy as np
from tqdm import tqdm

from nanorank import shards
from nanorank.errors import UserError
from nanorank.files import save_json
from nanorank.tokens import check_crc32, read_meta


class Part(shards.RecordedFiles):
    """The token files of one process, and how far in the input they reach.

    made_with: settings by name; inputs: the files that are read; dtype: uint16 or uint32, of the ids.
    """

    def __init__(self, folder, made_with, dtype, inputs, shard_index, safe_interval):
        self.dtype = dtype
        self.inputs = inputs
        self.shard_tokens = made_with["shard_tokens"]
        self.prefix = f"part{shard_index:03d}_" if made_with["num_shards"] > 1 else ""
        splits = {split: {"tokens": 0, "documents": 0, "files": []} for split in shards.SPLITS}
        record = {"settings": made_with, "done": False, "file": 0, "chunk": 0, "sizes": 0, "bad_records": {},
                  "splits": splits}
        super().__init__(os.path.join(folder, f"part_{shard_index:05d}.json"), record, safe_interval)
        if self.record["sizes"] != self.sizes():
            raise UserError(f"files of --source={made_with['source']} that were read already have changed: "
                            f"delete {folder} to begin anew")

    def n_bytes(self, file):
        return file["tokens"] * np.dtype(self.dtype).itemsize

    def is_full(self, file):
        return file["tokens"] >= self.shard_tokens or self.record["done"]

    def tokens(self):
        return sum(split["tokens"] for split in self.record["splits"].values())

    def sizes(self):
        """Checksum of the sizes of the input files that are done with."""
        sizes = [file.size for file in self.inputs[:self.record["file"]]]
        return zlib.crc32(repr(sizes).encode()) if sizes else 0

    def add(self, encoded, bad, file_number, chunk_number):
        """Appends the results of a chunk."""
        full = False
        for split, (documents, ids) in encoded.items():
            entry = self.record["splits"][split]
            files = entry["files"]
            if not files or self.is_full(files[-1]):
                name = f"{split}_{self.prefix}{len(files):05d}.bin"
                files.append({"name": name, "tokens": 0, "crc32": "00000000"})
                self.begin(files[-1])
            self.append(files[-1], ids)
            tokens = len(ids) // np.dtype(self.dtype).itemsize
            files[-1]["tokens"] += tokens
            entry["tokens"] += tokens
            entry["documents"] += documents
            full = full or self.is_full(files[-1])
        path = self.inputs[file_number].path
        for reason, (count, numbers) in bad.items():
            places = [f"{path}:{number}" for number in numbers]
            shards.add_bad(self.record["bad_records"], reason, count, places)
        self.record["file"] = file_number
        self.record["chunk"] = chunk_number
        if full or self.is_due():
            self.save()

    def save(self):
        self.record["sizes"] = self.sizes()
        super().save()


def finish(folder, made_with, own, about, shard_index):
    """Writes meta.json if all parts are done; it is the same whichever part does it.

    own: splits that have files of their own; about: what else meta.json says of the vocabulary.
    """
    source = made_with["source"]
    paths = [os.path.join(folder, f"part_{i:05d}.json") for i in range(made_with["num_shards"])]
    parts = [shards.read_json(path) if os.path.exists(path) else {"done": False} for path in paths]
    missing = [str(i) for i, part in enumerate(parts) if not part["done"]]
    if missing:
        print(f"part {shard_index} is done; not yet --shard_index={','.join(missing)}. "
              f"If those run elsewhere, copy their files into {folder} and run any part again")
        return

    meta = {"tokenizer": made_with["tokenizer"], **about, "source": source, "checksum": "crc32",
            "splits": {}, "bad_records": {}, "settings": made_with}
    for split in shards.SPLITS:
        entry = {"tokens": 0, "documents": 0, "files": []}
        for part in parts:
            for name in entry:
                entry[name] += part["splits"][split][name]
        meta["splits"][split] = entry
    for part in parts:
        for reason, bad in part["bad_records"].items():
            shards.add_bad(meta["bad_records"], reason, bad["count"], bad["first"])

    bad = shards.bad_line(meta["bad_records"])
    n_documents = sum(split["documents"] for split in meta["splits"].values())
    if not meta["splits"]["train"]["documents"]:
        for split in meta["splits"].values():  # so that another try may have other settings
            paths += [os.path.join(folder, file["name"]) for file in split["files"]]
        for path in paths:
            if os.path.exists(path):
                os.unlink(path)
        if n_documents:
            raise UserError(f"none of the {n_documents:,} documents in --source={source} fell to train: "
                            "give more text, or val and test files of their own (--val_source, "
                            f"--test_source){bad}")
        raise UserError(f"no documents in --source={source}{bad}")
    check_sizes(folder, meta, "copy it again")
    path = os.path.join(folder, "meta.json")
    if len(parts) == 1:  # else another part may be writing it
        shards.remove_strays(path)
    save_json(path, meta)
    print(f"{folder} is finished: {totals(meta)}{bad}")
    note_shares(meta, own)


def note_shares(meta, own):
    """Says which splits are empty or far from their share of the tokens. own: those with own files."""
    tokens = {split: entry["tokens"] for split, entry in meta["splits"].items()}
    for split in ("val", "test"):
        asked = meta["settings"][f"{split}_fraction"]
        share = tokens[split] / sum(tokens.values())
        if not share and (asked or split == "val"):
            print(f"note: no document fell to {split}; --{split}_fraction or --{split}_source says which do")
        elif split not in own and share and not asked / 2 <= share <= 2 * asked:
            print(f"note: {split} holds {share:.1%} of the tokens, asked was --{split}_fraction={asked}; "
                  f"more and shorter documents come closer, --{split}_source gives it files of its own")


def check_sizes(folder, meta, fix):
    itemsize = np.dtype(meta["dtype"]).itemsize
    for split in meta["splits"].values():
        for file in split["files"]:
            shards.check_size(os.path.join(folder, file["name"]), file["tokens"] * itemsize, fix)


def totals(meta):
    return ", ".join(f"{name} {split['tokens']:,} tokens of {split['documents']:,} documents"
                     for name, split in meta["splits"].items())


def verify(folder, made_with):
    """Checks a finished folder: its settings, sizes and checksums. Raises UserError if one differs."""
    meta = read_meta(folder)
    shards.refuse_other(folder, meta.get("settings", {}), made_with)
    fix = f"copy it again, or delete {folder} and run this again"
    check_sizes(folder, meta, fix)
    files = [file for split in meta["splits"].values() for file in split["files"]]
    for file in tqdm(files, "verifying checksums", disable=None):
        check_crc32(folder, file, fix)
    print(f"{folder} is finished, nothing to do: {totals(meta)}")
