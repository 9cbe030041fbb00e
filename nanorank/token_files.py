"""
Writes the token files and meta.json of prepare_pile.py; a kill costs what follows the last safe point.

    part = Part(folder, made_with, dtype, inputs, shard_index=0, safe_interval=10.0)
    part.fill(work, jobs, total, "B", workers, most_bytes)     # nanorank/shards.py
    finish(folder, made_with, own, about, shard_index=0)       # meta.json, once all parts are there
"""
import glob
import os
import zlib

import numpy as np

from nanorank.data_folder import SPLITS, join_bad, read_json, refuse_other, write_meta
from nanorank.errors import UserError
from nanorank.shards import RecordedFiles


class Part(RecordedFiles):
    """The token files of one process, and how far in the input they reach.

    made_with: settings by name; inputs: the files that are read; dtype: uint16 or uint32, of the ids.
    """

    def __init__(self, folder, made_with, dtype, inputs, shard_index, safe_interval):
        for path in glob.glob(os.path.join(glob.escape(folder), "part_*.json")):
            refuse_other(folder, read_json(path)["settings"], made_with)
        self.inputs = inputs
        self.shard_tokens = made_with["shard_tokens"]
        self.prefix = f"part{shard_index:03d}_" if made_with["num_shards"] > 1 else ""
        splits = {split: {"tokens": 0, "documents": 0, "files": []} for split in SPLITS}
        record = {"settings": made_with, "done": False, "file": 0, "chunk": 0, "sizes": 0, "bad_records": {},
                  "splits": splits}
        super().__init__(os.path.join(folder, f"part_{shard_index:05d}.json"), record, safe_interval, dtype)
        self.tokens_before = self.tokens()
        if self.record["sizes"] != self.sizes():
            raise UserError(f"files of --source={made_with['source']} that were read already have changed: "
                            f"delete {folder} to begin anew")

    def is_full(self, file):
        return file["tokens"] >= self.shard_tokens or self.record["done"]

    def tokens(self):
        return sum(split["tokens"] for split in self.record["splits"].values())

    def progress(self, seconds):
        speed = (self.tokens() - self.tokens_before) / max(seconds, 1e-9)
        return f"{self.tokens():,} tokens, {speed / 1e6:.2f} M tokens/s"

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
        join_bad(self.record["bad_records"], bad)
        self.record["file"] = file_number
        self.record["chunk"] = chunk_number
        if full:
            self.save()

    def save(self):
        self.record["sizes"] = self.sizes()
        super().save()


def finish(folder, made_with, own, about, shard_index):
    """Writes meta.json if all parts are done; it is the same whichever part does it.

    own: splits that have files of their own; about: vocab_size, eot and dtype, for meta.json.
    """
    paths = [os.path.join(folder, f"part_{i:05d}.json") for i in range(made_with["num_shards"])]
    parts = [read_json(path) if os.path.exists(path) else {"done": False} for path in paths]
    missing = [str(i) for i, part in enumerate(parts) if not part["done"]]
    if missing:
        print(f"part {shard_index} is done; not yet --shard_index={','.join(missing)}. "
              f"If those run elsewhere, copy their files into {folder} and run any part again")
        return

    splits = {split: {"tokens": 0, "documents": 0, "files": []} for split in SPLITS}
    meta = {"tokenizer": made_with["tokenizer"], **about, "source": made_with["source"], "checksum": "crc32",
            "splits": splits, "bad_records": {}, "settings": made_with}
    for part in parts:
        for split, entry in splits.items():
            for name in entry:
                entry[name] += part["splits"][split][name]
        join_bad(meta["bad_records"], part["bad_records"])
    write_meta(folder, meta, paths)

    # say which splits are empty or far from their share of the tokens
    n_tokens = sum(entry["tokens"] for entry in splits.values())
    for split in ("val", "test"):
        asked = made_with[f"{split}_fraction"]
        share = splits[split]["tokens"] / n_tokens
        if not share and (asked or split == "val"):
            print(f"note: no document fell to {split}; --{split}_fraction or --{split}_source says which do")
        elif split not in own and share and not asked / 2 <= share <= 2 * asked:
            print(f"note: {split} holds {share:.1%} of the tokens, asked was --{split}_fraction={asked}; "
                  f"more and shorter documents come closer, --{split}_source gives it files of its own")
