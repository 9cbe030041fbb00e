"""
Images in folders, a tar, or .parquet files on disk or the Hugging Face hub -> their classes, and chunks that a worker reads by itself.

    source = find_images("imagenet.tar", keys=("image", "label"), workers=0)
    for chunk in source.chunks:
        for split, name, label, data in read(chunk, keys):    # data: the image file's bytes

What a caller's input is to blame for is a ValueError that names the file.
"""
import functools
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import islice
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nanorank.console import StopSignal
from nanorank.errors import UserError
from nanorank.shards import run_in_order
from nanorank.text_files import InputError, find_files, first_line, need, split_in_name

SPLITS = ("train", "val", "test")
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CHUNK = 64     # images handed to a worker at once
ROWS = 256     # and rows of a .parquet file at most, whose row groups are read from their beginning

class Chunk(NamedTuple):
    """Some images that a worker reads by itself."""
    kind: str    # files, rows, digits
    path: str    # the folder, .tar or .parquet file that they are in
    images: int
    where: list | tuple  # files: (split, name, label, offset, size) each, offset -1 for a file of its own; rows: split, row group, first row


class Source(NamedTuple):
    classes: list    # names, in the order of the labels
    counts: Counter  # images of each split
    chunks: list
    names: int       # checksum of what there is, so that a restart notices another source


def find_images(source, keys, workers):
    """The images of --source, the same chunks every time. Raises UserError where there are none or they cannot be told apart.

    keys: columns of image and label (.parquet); workers: processes that read the footers of .parquet files, 0: one per core.
    """
    if source == "digits":
        n = len(digits().target)
        return Source([str(i) for i in range(10)], Counter(train=n), [Chunk("digits", "", min(ROWS, n - i), (i,)) for i in range(0, n, ROWS)], 0)
    if os.path.isdir(source):
        if found := list_folder(source):
            return arrange(source, found)
    elif os.path.exists(source) and not source.endswith(".parquet"):
        return arrange(source, list_tar(source))
    elif not os.path.exists(source) and not re.fullmatch(r"\w[\w.-]*/\w[\w./-]*", source):
        raise UserError(f"--source={source}: no such file or folder, and no Hugging Face id (org/name) either")
    return list_parquet(source, keys, workers)


def list_folder(root):
    """(name, -1, 0) of each image below a folder, sorted. Links are followed, but not back to a folder that they are in."""
    found, above = [], {}
    with tqdm(desc="listing", unit=" images", delay=10) as bar:
        for folder, folders, names in os.walk(root, followlinks=True):
            above[folder] = {*above.get(os.path.dirname(folder), ()), os.path.realpath(folder)}
            if loops := [name for name in folders if os.path.realpath(os.path.join(folder, name)) in above[folder]]:
                raise UserError(f"{os.path.join(folder, loops[0])} links back to a folder that it is in")
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            below = os.path.relpath(folder, root).replace(os.sep, "/")
            names = sorted(name for name in names if is_image(name))
            found += [(f"{below}/{name}" if below != "." else name, -1, 0) for name in names]
            bar.update(len(names))
    return found


def list_tar(path):
    """(name, offset, size) of each image in a tar and the tars in it, as they lie there. Raises UserError for what is no whole tar."""
    try:
        with open(path, "rb") as file, tqdm(desc="listing", total=os.path.getsize(path), unit="B", unit_scale=True, delay=10) as bar:
            return list(tar_members(file, "", os.path.getsize(path), bar))
    except (tarfile.TarError, EOFError) as error:
        with open(path, "rb") as file:
            head = file.read(6)
        packed = head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK"))
        raise UserError(f"{path}: compressed; unpack it first, its images are read at their places in a plain .tar" if packed else
                         f"{path}: no tar, damaged or cut short ({first_line(error)})") from None


def tar_members(file, below, end, bar):
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # a kB each
            if member.offset_data + member.size > end:
                raise tarfile.ReadError(f"{below}{member.name} reaches beyond its end")
            name = below + member.name.removeprefix("./")
            if member.isreg() and name.lower().endswith(".tar"):
                file.seek(member.offset_data)
                yield from tar_members(file, name[:-4] + "/", member.offset_data + member.size, bar)
            elif member.isreg() and is_image(os.path.basename(name)):
                yield name, member.offset_data, member.size
            bar.update(max(0, member.offset_data - bar.n))


def is_image(name):
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def arrange(source, found):
    """A Source from (name, offset, size) of files below train/CLASS, val/CLASS ... or CLASS, whatever folders lead there."""
    folders = {name.rpartition("/")[0] for name, _, _ in found}
    parts = {folder: folder.split("/") if folder else [] for folder in folders}
    splits = ("train", "val", "validation", "test")
    while len({tuple(p[:1]) for p in parts.values()}) == 1 and all(len(p) > 1 and p[0] not in splits for p in parts.values()):
        parts = {folder: p[1:] for folder, p in parts.items()}
    if any(p[0] == "train" and len(p) > 1 for p in parts.values() if p):
        places = {folder: ("val" if p[0] == "validation" else p[0], p[1] if len(p) > 1 else "")
                  for folder, p in parts.items() if p and p[0] in splits}
    else:
        places = {folder: ("train", p[0]) for folder, p in parts.items() if p}
        names = sorted({name for _, name in places.values()})
        if any(re.fullmatch("train(ing)?|val(id|idation)?|test(ing)?|dev", name.lower()) for name in names):
            raise UserError(f"{source}: {', '.join(names[:3])} look like splits, not classes; expects train/CLASS, val/CLASS, test/CLASS")
    classes = sorted({name for split, name in places.values() if split == "train" and name})
    label = {name: i for i, name in enumerate(classes)}
    for split in ("val", "test"):
        strange = {folder: name for folder, (its, name) in places.items() if its == split and name not in label}
        if split == "test" and all(folder in strange for folder, (its, _) in places.items() if its == split):
            continue  # images without labels
        if strange:
            folder, name = min(strange.items())
            raise UserError(f"{source}: {folder} holds {split} images of " + (f"class {name!r}, which train has not" if name else "no class")
                             + "; expects a folder per class, named as in train")
    pictures, left_out, names = [], Counter(), 0
    for name, offset, size in found:
        split, its_class = places.get(name.rpartition("/")[0], ("", ""))
        if its_class in label:
            pictures.append((split, name, label[its_class], offset, size))
            names = zlib.crc32(f"{name}:{size}\n".encode(errors="surrogateescape"), names)
        else:
            left_out[f"{split}: no labels" if split == "test" else "in no class folder"] += 1
    for why, count in left_out.items():
        print(f"note: {count:,} images are left out ({why})", flush=True)
    chunks = [Chunk("files", source, len(some), some) for i in range(0, len(pictures), CHUNK) if (some := pictures[i:i + CHUNK])]
    return Source(classes, Counter(picture[0] for picture in pictures), chunks, names)

# ------------------------------------------------------------------------------------------------------------ .parquet files

def list_parquet(source, keys, workers):
    """A Source from .parquet files: the split is in a file's name, the rest in its footer."""
    try:
        files = [file for file in find_files(source) if file.name.endswith(".parquet")] if not has_no_parquet(source) else []
    except ValueError as error:
        raise explained(error, source) from None
    if not files:
        raise UserError(f"--source={source}: expects images ({', '.join(SUFFIXES)}) in class folders, or .parquet files")
    files = [file._replace(split=split_in_name(file.name) or "train") for file in files]
    found, classes, stop = [], [], StopSignal()

    def take(result, file):
        found.append((file, result[0]))
        classes.extend(() if classes or file.split != "train" else result[1])
        bar.update()

    work = functools.partial(footer, image_key=keys[0], label_key=keys[1])
    with tqdm(desc="listing", total=len(files), unit=" files", delay=10) as bar:  # by the workers: on the hub there are 300
        if not run_in_order(work, ((0, file.path, (file,)) for file in files), take, lambda: None, stop, workers, 0):
            raise SystemExit(128 + stop.signal)
    highest = {split: max((label for file, groups in found if file.split == split for _, label in groups), default=-1) for split in SPLITS}
    for split in SPLITS:
        if highest[split] < 0 and any(file.split == split for file in files):
            print(f"note: the source's {split} split has no labels and is left out", flush=True)
    chunks, counts, names = [], Counter(), 0
    for file, groups in found:
        names = zlib.crc32(repr((file.name, groups)).encode(), names)
        for group, (rows, _) in enumerate(groups if highest[file.split] >= 0 else []):
            counts[file.split] += rows
            chunks += [Chunk("rows", file.path, min(ROWS, rows - first), (file.split, group, first)) for first in range(0, rows, ROWS)]
    return Source(classes or [str(i) for i in range(max(highest.values()) + 1)], counts, chunks, names)


def has_no_parquet(place):
    return os.path.isdir(place) and not any(name.endswith(".parquet") for _, _, names in os.walk(place) for name in names)


@contextmanager
def parquet(path):
    """A .parquet file, here or on the hub. Errors name it."""
    try:
        with need("huggingface_hub", path).HfFileSystem().open(path, block_size=8 << 20) if path.startswith("hf://") else open(path, "rb") as raw:
            yield need("pyarrow.parquet", path).ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20)
    except InputError:
        raise
    except Exception as error:  # of pyarrow and the hub's clients, a dozen kinds
        raise explained(error, path, f"{path}: damaged or cut short ({first_line(error)}); what is done is kept, "
                        "and the same command goes on once the file is whole") from None


def explained(error, place, message=""):
    """A ValueError with a message, and with what to do where the hub wants an account that has accepted a data set's terms."""
    cause = error
    while cause:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403) or type(cause).__name__ in ("GatedRepoError", "RepositoryNotFoundError"):
            repo = re.match(r"[\w.-]+/[\w.-]+", place.removeprefix("hf://datasets/"))[0]
            return UserError(f"the Hugging Face hub has no {repo}, or not for everyone: accept the terms at https://huggingface.co/datasets/"
                              f"{repo}, then `hf auth login` or HF_TOKEN=...; or give --source=FOLDER_OR_TAR")
        cause = cause.__cause__ or cause.__context__
    return UserError(message or str(error))


def footer(path, image_key, label_key):
    """[(rows, highest label) of each row group] and the names of the classes, [] where it has none, from a .parquet file."""
    with parquet(path) as file:
        schema, meta = file.schema_arrow, file.metadata
        for key, flag in ((image_key, "--image_key"), (label_key, "--label_key")):
            if key not in schema.names:
                raise InputError(f"{path}: no column {key!r} among {', '.join(schema.names)}; {flag} names it")
        if not need("pyarrow", path).types.is_integer(schema.field(label_key).type):
            raise InputError(f"{path}: {label_key!r} holds {schema.field(label_key).type}, not class numbers; --label_key names the column")
        column, groups = [meta.schema.column(i).path for i in range(meta.num_columns)].index(label_key), []
        for i in range(meta.num_row_groups):
            statistics = meta.row_group(i).column(column).statistics
            if statistics and statistics.has_min_max:
                highest = statistics.max
            else:
                highest = max((x for x in file.read_row_group(i, [label_key], use_threads=False).column(0).to_pylist() if x is not None), default=-1)
            groups.append((meta.row_group(i).num_rows, highest))
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return groups, list(features.get(label_key, {}).get("names") or [])


@functools.cache
def digits():
    return need("sklearn.datasets", "--source=digits").load_digits()

# --------------------------------------------------------------------------------------------------------------- reading

def read(chunk, keys):
    """(split, name, label, the image file's bytes or None) of each image of a chunk."""
    if chunk.kind == "digits":
        for i in range(chunk.where[0], chunk.where[0] + chunk.images):
            yield "train", f"digit {i}", int(digits().target[i]), np.rint(digits().images[i] * (255 / 16)).astype(np.uint8).tobytes()
    elif chunk.kind == "rows":
        split, group, first = chunk.where
        with parquet(chunk.path) as file:
            rows = ((row[keys[0]], row[keys[1]]) for batch in file.iter_batches(16, row_groups=[group], columns=list(keys), use_threads=False)
                    for row in batch.to_pylist())
            for i, (image, label) in enumerate(islice(rows, first, first + chunk.images), first):
                yield split, f"{chunk.path}:{group}:{i}", label, image.get("bytes") if isinstance(image, dict) else image
    elif chunk.where[0][3] < 0:
        for split, name, label, _, _ in chunk.where:
            data = None
            with suppress(OSError), open(os.path.join(chunk.path, name), "rb") as file:
                data = file.read()
            yield split, name, label, data
    else:
        with open(chunk.path, "rb") as file:
            for split, name, label, offset, size in chunk.where:
                file.seek(offset)
                yield split, name, label, file.read(size)
