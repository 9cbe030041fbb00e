"""
A folder of tokens or pixels as the prepare scripts leave it: what is in it, and what was left out.

    is_finished(folder, made_with)                             # True, or False, or a UserError says why not
    write_meta(folder, meta, records=[path])                   # meta.json, the last file
"""
import contextlib
import glob
import json
import os
import zlib

import numpy as np
from tqdm import tqdm

from nanorank.errors import UserError
from nanorank.files import save_json
from nanorank.tokens import check_crc32, check_file_size

SPLITS = ("train", "val", "test")
NAMED = 5  # bad records named, per reason


def files_of(meta):
    """The entries of all files of a record or meta.json."""
    return [file for split in meta["splits"].values() for file in split["files"]]


def n_bytes(file, dtype):
    """The size of a file of pixels or tokens, by its entry."""
    return file["bytes"] if "bytes" in file else file["tokens"] * np.dtype(dtype).itemsize


def totals(meta):
    """train 9 tokens of 1 documents, ..."""
    splits = []
    for name, split in meta["splits"].items():
        counts = [f"{count:,} {what}" for what, count in split.items() if what != "files"]
        splits.append(f"{name} {' of '.join(counts)}")
    classes = f" of {len(meta['classes'])} classes" if "classes" in meta else ""
    return ", ".join(splits) + classes


def write_meta(folder, meta, records):
    """Writes meta.json, the last file of a folder. records: paths of the record of each part.

    If nothing fell to train, the files are removed, so that another try may have other settings, and a
    UserError is raised.
    """
    unit = "images" if "classes" in meta else "documents"
    left_out = bad_line(meta)
    if not meta["splits"]["train"][unit]:
        for path in [*records, *(os.path.join(folder, file["name"]) for file in files_of(meta))]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        held_out = sum(split[unit] for split in meta["splits"].values())
        hint = f", all {held_out:,} fell to val and test; give more, or --val_source" if held_out else ""
        raise UserError(f"no {unit} to train on in --source={meta['source']}{hint}{left_out}")
    check_sizes(folder, meta, "copy it again")
    path = os.path.join(folder, "meta.json")
    if len(records) == 1:  # else another part may be writing it
        remove_strays(path)
    save_json(path, meta)
    print(f"{folder} is finished: {totals(meta)}{left_out}")


def check_sizes(folder, meta, fix):
    for file in files_of(meta):
        check_file_size(os.path.join(folder, file["name"]), n_bytes(file, meta.get("dtype")), fix)


def is_finished(folder, made_with):
    """True for a folder with meta.json. Raises UserError if its settings, sizes or checksums differ."""
    path = os.path.join(folder, "meta.json")
    if not os.path.exists(path):
        return False
    meta = read_json(path)
    refuse_other(folder, meta.get("settings", {}), made_with)
    fix = f"copy it again, or delete {folder} and run this again"
    check_sizes(folder, meta, fix)
    for file in tqdm(files_of(meta), "verifying checksums", disable=None, delay=1):
        check_crc32(folder, file, fix)
    print(f"{folder} is finished, nothing to do: {totals(meta)}")
    return True


def remove_strays(path):
    """Removes what kills left of earlier tries to write a file. No other process may be writing it."""
    for stray in glob.glob(glob.escape(path) + ".tmp*"):
        os.unlink(stray)


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        folder = os.path.dirname(path)
        raise UserError(f"{path} is damaged ({error}): delete {folder} to begin anew") from None

# -----------------------------------------------------------------------------
# checks

def check_range(settings, **least):
    """Raises UserError for a setting below its least value, and for a --dataset that is not a plain name."""
    for name, value in least.items():
        if settings[name] < value:
            raise UserError(f"--{name}={settings[name]}: expects {value} or more")
    dataset = settings["dataset"]
    if dataset != os.path.basename(dataset) or dataset in ("", ".", ".."):
        raise UserError(f"--dataset={dataset}: expects a plain name; --data_dir says where its folder lies")


def refuse_other(folder, theirs, ours):
    """Raises UserError that names the first setting in which a folder begun earlier differs from this run."""
    for name, value in ours.items():
        before = theirs.get(name, "")  # a setting that is newer than the folder
        if before != value:
            flag = name if " " in name else f"--{name}"
            raise UserError(f"{folder} was made with {flag}={before}, not {value}: "
                            "take another --dataset or delete it")

# -----------------------------------------------------------------------------
# records (documents, images)

class BadRecord(ValueError):
    """A document or image that is left out. The message is the reason, under which meta.json counts it."""


def add_bad(bad, reason, first, count=1):
    """Counts bad records in `bad`, {reason: {"count": n, "first": [places of the first few]}}."""
    entry = bad.setdefault(reason, {"count": 0, "first": []})
    entry["count"] += count
    for place in first[:NAMED - len(entry["first"])]:
        entry["first"].append(place.encode("utf-8", "backslashreplace").decode())


def join_bad(bad, more):
    """Adds what another process has counted."""
    for reason, entry in more.items():
        add_bad(bad, reason, entry["first"], entry["count"])


def bad_line(meta):
    """One line on all that was left out, to follow another; empty if nothing was."""
    what = "images" if "classes" in meta else "records"
    reasons = []
    for reason, entry in meta[f"bad_{what}"].items():
        places = list(entry["first"])
        if entry["count"] > len(places):
            places.append("...")
        reasons.append(f"{entry['count']:,} {reason} ({', '.join(places)})")
    if not reasons:
        return ""
    return f"; bad {what}, left out: " + "; ".join(reasons)


def split_by_hash(data, share):
    """The split of a document or image, by the CRC32 of its bytes; share: {"val": 0.02, "test": 0.02}."""
    u = zlib.crc32(data) / 2**32  # in [0, 1)
    if u < share["test"]:
        return "test"
    if u < share["test"] + share["val"]:
        return "val"
    return "train"
