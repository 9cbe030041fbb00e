"""
Finds images in folders, a tar, or .parquet files, here or on the Hugging Face hub, and cuts them into chunks.

    source = find_images("imagenet.tar", keys=("image", "label"))
    for chunk in source.chunks:
        for split, name, label, data in read(chunk, keys):    # data: the image file's bytes

A chunk says where its images lie, so that a worker reads them by itself. Input that cannot be read or told
apart is a UserError that names the file.

These readers are ours, because those of the datasets library cost more and know less: its imagefolder took
54 s until the first of 40,000 images (ours 0.4 s), its parquet reader holds row groups whole (879 MiB for one
of 208 MB, ours 341), and its webdataset gives a tar's images neither class nor split.
"""
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nanorank.data_folder import SPLITS
from nanorank.errors import UserError
from nanorank.inputs import HUB_ID, find_files, first_line, need, open_input, open_parquet, split_in_name

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CHUNK = 64  # images in a chunk
ROWS = 256  # rows in a chunk of a .parquet file, at most; its row groups are read from their beginning
BLOCK = 8 << 20  # bytes fetched from the hub at once
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK")  # first bytes of such files


class Chunk(NamedTuple):
    """Some images that a worker reads by itself."""
    kind: str    # files, rows, digits
    path: str    # the folder, .tar or .parquet file that they are in
    images: int
    # files: a list of (split, name, label, offset, size), offset -1 for a file of its own
    # rows: (split, row group, first row); digits: a list of (split, name, label, pixels)
    where: list | tuple


class Source(NamedTuple):
    classes: list    # names, in the order of the labels
    counts: Counter  # images of each split
    chunks: list
    names: int       # checksum of the images' names and sizes, so that a restart notices another source


def find_images(source, keys):
    """The images of --source, in the same chunks every time.

    keys: columns of image and label (.parquet). Raises UserError if there are no images, or if classes or
    splits are unclear.
    """
    if source == "digits":
        return list_digits()
    if os.path.isdir(source):
        found = list_folder(source)
        if found:
            return arrange(source, found)
    elif os.path.exists(source) and not source.endswith(".parquet"):
        return arrange(source, list_tar(source))
    elif not os.path.exists(source) and not re.fullmatch(HUB_ID, source):
        raise UserError(f"--source={source}: no such file or folder, "
                        "and no Hugging Face id (org/name) either")
    return list_parquet(source, keys)


def list_digits():
    """scikit-learn's digits: 8 x 8 pixels, a byte each, its 0 to 16 scaled to 0 to 255."""
    digits = need("sklearn.datasets", "--source=digits").load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    pictures = []
    for i, label in enumerate(digits.target):
        pictures.append(("train", f"digit {i}", int(label), pixels[i].tobytes()))
    classes = [str(i) for i in range(10)]
    return Source(classes, Counter(train=len(pictures)), cut("digits", "", pictures, ROWS), 0)


def cut(kind, path, pictures, size):
    """Chunks of so many pictures."""
    chunks = []
    for first in range(0, len(pictures), size):
        some = pictures[first:first + size]
        chunks.append(Chunk(kind, path, len(some), some))
    return chunks

# -----------------------------------------------------------------------------
# folders and tars

def list_folder(root):
    """(name, -1, 0) of each image below a folder, sorted. Links are followed, but not in a circle."""
    found = []
    above = {}  # folder: real paths of it and of all folders that lead to it
    with tqdm(desc="listing", unit=" images", delay=10) as bar:
        for folder, folders, names in os.walk(root, followlinks=True):
            above[folder] = {*above.get(os.path.dirname(folder), ()), os.path.realpath(folder)}
            for name in folders:
                path = os.path.join(folder, name)
                if os.path.realpath(path) in above[folder]:
                    raise UserError(f"{path} links back to a folder that it is in")
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            below = os.path.relpath(folder, root).replace(os.sep, "/")
            names = sorted(name for name in names if is_image(name))
            for name in names:
                found.append((name if below == "." else f"{below}/{name}", -1, 0))
            bar.update(len(names))
    return found


def list_tar(path):
    """(name, offset, size) of each image in a tar and in the tars in it, in their order.

    Raises UserError for a file that is not a whole, plain tar.
    """
    size = os.path.getsize(path)
    bar = tqdm(desc="listing", total=size, unit="B", unit_scale=True, delay=10)
    with open(path, "rb") as file, bar:
        try:
            return list(tar_members(file, "", size, bar))
        except (tarfile.TarError, EOFError) as error:
            file.seek(0)
            if file.read(6).startswith(COMPRESSED):
                raise UserError(f"{path}: compressed; unpack it first, "
                                "its images are read at their places in a plain .tar") from None
            raise UserError(f"{path}: no tar, damaged or cut short ({first_line(error)})") from None


def tar_members(file, below, end, bar):
    """Yields (name, offset, size) of the images in the tar from where `file` stands to `end`."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # a kB each
            after = member.offset_data + member.size
            if after > end:
                raise tarfile.ReadError(f"{below}{member.name} reaches beyond its end")
            name = below + member.name.removeprefix("./")
            if member.isreg() and name.lower().endswith(".tar"):
                file.seek(member.offset_data)
                yield from tar_members(file, name[:-4] + "/", after, bar)
            elif member.isreg() and is_image(os.path.basename(name)):
                yield name, member.offset_data, member.size
            bar.update(max(0, member.offset_data - bar.n))


def is_image(name):
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def arrange(source, found):
    """A Source from (name, offset, size) of files below train/CLASS, val/CLASS ... or CLASS.

    Folders that lead to all of these do not matter: some/where/train/CLASS is the same.
    """
    places = places_of({os.path.dirname(name) for name, _, _ in found}, source)
    classes = sorted({its_class for split, its_class in places.values() if split == "train" and its_class})
    label = {its_class: i for i, its_class in enumerate(classes)}
    check_classes(places, label, source)

    pictures = []  # (split, name, label, offset, size)
    left_out = Counter()
    names = 0
    for name, offset, size in found:
        split, its_class = places.get(os.path.dirname(name), ("", ""))
        if its_class in label:
            pictures.append((split, name, label[its_class], offset, size))
            names = zlib.crc32(f"{name}:{size}\n".encode(errors="surrogateescape"), names)
        else:
            left_out["test: no labels" if split == "test" else "in no class folder"] += 1
    for why, count in left_out.items():
        print(f"note: {count:,} images are left out ({why})", flush=True)
    counts = Counter(split for split, *_ in pictures)
    return Source(classes, counts, cut("files", source, pictures, CHUNK), names)


def places_of(folders, source):
    """{folder: (split, class)} of folders such as train/n01440764; the class of train/ itself is empty."""
    parts = {folder: folder.split("/") if folder else [] for folder in folders}

    # cut off what leads to all folders alike, down to the splits or the classes
    splits = {"train": "train", "val": "val", "validation": "val", "test": "test"}
    while True:
        first = {tuple(p[:1]) for p in parts.values()}
        deeper = all(len(p) > 1 and p[0] not in splits for p in parts.values())
        if len(first) != 1 or not deeper:
            break
        parts = {folder: p[1:] for folder, p in parts.items()}

    parts = {folder: p for folder, p in parts.items() if p}
    if any(p[0] == "train" and len(p) > 1 for p in parts.values()):
        places = {}
        for folder, p in parts.items():
            if p[0] in splits:
                places[folder] = splits[p[0]], "".join(p[1:2])
        return places
    names = sorted({p[0] for p in parts.values()})
    if any(re.fullmatch("train(ing)?|val(id|idation)?|test(ing)?|dev", name.lower()) for name in names):
        raise UserError(f"{source}: {', '.join(names[:3])} look like splits, not classes; "
                        "expects train/CLASS, val/CLASS, test/CLASS")
    return {folder: ("train", p[0]) for folder, p in parts.items()}


def check_classes(places, label, source):
    """Raises UserError if val or test has a class that train has not. A test split may be without any."""
    for split in ("val", "test"):
        classes = {folder: its_class for folder, (its, its_class) in places.items() if its == split}
        strange = {folder: its_class for folder, its_class in classes.items() if its_class not in label}
        unlabelled_test = split == "test" and strange == classes
        if strange and not unlabelled_test:
            folder, its_class = min(strange.items())
            which = f"class {its_class!r}, which train has not" if its_class else "no class"
            raise UserError(f"{source}: {folder} holds {split} images of {which}; "
                            "expects a folder per class, named as in train, or --source=TRAIN with "
                            "--val_source=VAL --val_labels=FILE")

# -----------------------------------------------------------------------------
# .parquet files

def list_parquet(source, keys):
    """A Source from .parquet files: the split is in a file's name, the rest in its footer."""
    what = f"images ({', '.join(SUFFIXES)}) in class folders, or files in"
    files = find_files(source, (".parquet",), what=what)
    files = [file._replace(split=split_in_name(file.name) or "train") for file in files]
    paths = [file.path for file in files]
    with ThreadPoolExecutor(16) as pool:  # the hub's ImageNet has 300
        footers = pool.map(partial(footer, image_key=keys[0], label_key=keys[1]), paths)
        footers = list(tqdm(footers, "listing", total=len(files), unit=" files", delay=10))

    highest = dict.fromkeys(SPLITS, -1)  # label
    classes = []
    for file, (groups, names) in zip(files, footers):
        highest[file.split] = max([highest[file.split], *(label for _, label in groups)])
        if file.split == "train" and not classes:
            classes = names
    for split in sorted({file.split for file in files}):
        if highest[split] < 0:
            print(f"note: the source's {split} split has no labels and is left out", flush=True)

    chunks = []
    counts = Counter()
    checksum = 0
    for file, (groups, _) in zip(files, footers):
        checksum = zlib.crc32(repr((file.name, groups)).encode(), checksum)
        if highest[file.split] < 0:
            continue
        for group, (rows, _) in enumerate(groups):
            counts[file.split] += rows
            for first in range(0, rows, ROWS):
                chunks.append(Chunk("rows", file.path, min(ROWS, rows - first), (file.split, group, first)))
    if not classes:
        classes = [str(i) for i in range(max(highest.values()) + 1)]
    return Source(classes, counts, chunks, checksum)


def footer(path, image_key, label_key):
    """[(rows, highest label) of each row group] of a .parquet file, and the names of its classes or []."""
    with open_input(path, BLOCK) as raw:
        file = open_parquet(raw, path, 1 << 20)
        schema = file.schema_arrow
        for key, flag in ((image_key, "--image_key"), (label_key, "--label_key")):
            if key not in schema.names:
                raise UserError(f"{path}: no column {key!r} among {', '.join(schema.names)}; {flag} names it")
        label_type = schema.field(label_key).type
        if not need("pyarrow", path).types.is_integer(label_type):
            raise UserError(f"{path}: {label_key!r} holds {label_type}, not class numbers; "
                            "--label_key names the column")
        columns = [column.path for column in file.schema]
        groups = []
        for i in range(file.num_row_groups):
            group = file.metadata.row_group(i)
            statistics = group.column(columns.index(label_key)).statistics
            if statistics and statistics.has_min_max:
                highest = statistics.max
            else:
                labels = file.read_row_group(i, [label_key], use_threads=False).column(0).to_pylist()
                highest = max((label for label in labels if label is not None), default=-1)
            groups.append((group.num_rows, highest))
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = about.get("info", {}).get("features", {})
    return groups, list(features.get(label_key, {}).get("names") or [])

# -----------------------------------------------------------------------------
# reading, in the workers

def read(chunk, keys):
    """Yields (split, name, label, the image file's bytes or None) of each image of a chunk."""
    if chunk.kind == "digits":
        yield from chunk.where
    elif chunk.kind == "rows":
        yield from read_rows(chunk, *keys)
    elif os.path.isdir(chunk.path):
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


def read_rows(chunk, image_key, label_key):
    split, group, first = chunk.where
    with open_input(chunk.path, BLOCK) as raw:
        file = open_parquet(raw, chunk.path, 1 << 20)
        batches = file.iter_batches(16, row_groups=[group], columns=[image_key, label_key], use_threads=False)
        rows = (row for batch in batches for row in batch.to_pylist())
        for i, row in enumerate(islice(rows, first, first + chunk.images), first):
            image = row[image_key]
            if isinstance(image, dict):  # as the datasets library stores images
                image = image.get("bytes")
            yield split, f"{chunk.path}:{group}:{i}", row[label_key], image
