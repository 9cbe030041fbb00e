"""
data/NAME/ on disk -> checked, memory-mapped images, read as batches of rectangles.

prepare_imagenet writes the folder: for each split NAME.bin, uint8 pixels, image after image, (height,
width, 3) row by row; NAME.idx, one RECORD an image; and meta.json,

    {"kind": "images", "classes": ["n01440764", ...], "short_side": 256, "mean": [r, g, b], "std": [r, g, b],
     "source": "...",
     "splits": {"train": {"images": 9, "files": [{"name": "train.bin", "bytes": 9, "crc32": "0a1b2c3d"},
                                                 {"name": "train.idx", ...}]}, ...}}
"""
import functools
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from nanorank.errors import UserError
from nanorank.tokens import CHECKED, check_apart, check_crc32, check_file_size, load_meta

# of an image; offset into the .bin in bytes
RECORD = np.dtype([("offset", "<u8"), ("height", "<u2"), ("width", "<u2"), ("label", "<i4")])
THREADS = 8  # that copy, and wait for the disk, side by side
AGAIN = "copy it again, or run prepare_imagenet for this data set again"


class ImageSplit:
    """One split (train, val, test) of a data folder, memory-mapped.

    n_images; heights, widths, labels: int64 arrays (n_images,). Raises UserError that names file and fix
    where the folder is absent, truncated or not what its meta.json says.
    """

    def __init__(self, folder, split):
        self.folder = folder
        self.meta = read_meta(folder)
        entry = self.meta["splits"].get(split, {"images": 0, "files": []})
        self.n_images = entry["images"]
        if self.n_images == 0:
            raise UserError(f"{folder} holds no {split} images; --val_fraction and --test_fraction of "
                            "prepare_imagenet set some of train aside")

        sizes = {file["name"]: file["bytes"] for file in entry["files"]}
        self.pixels = open_bytes(os.path.join(folder, f"{split}.bin"), sizes.get(f"{split}.bin", 0))
        index = open_bytes(os.path.join(folder, f"{split}.idx"), self.n_images * RECORD.itemsize).view(RECORD)
        self.offsets = index["offset"].astype(np.int64)
        self.heights = index["height"].astype(np.int64)
        self.widths = index["width"].astype(np.int64)
        self.labels = index["label"].astype(np.int64)

        ends = self.offsets + self.heights * self.widths * 3
        inside = self.offsets.min() >= 0 and ends.max() <= len(self.pixels)
        known = self.labels.min() >= 0 and self.labels.max() < len(self.meta["classes"])
        if not inside or not known or min(self.heights.min(), self.widths.min()) < 1:
            raise UserError(f"{folder}/{split}.idx does not fit {split}.bin and the classes in meta.json: "
                            "the data is damaged, prepare it again")
        for file in entry["files"]:
            if file["bytes"] <= CHECKED:
                check_crc32(folder, file, AGAIN)
        self.pool = None

    def read(self, index, boxes, pin=False):
        """Rectangles of images number index (n,). boxes: (n, 4) ints, top, left, height, width.

        pin: into page-locked memory, from which a GPU copies while the host goes on. Returns pixels
        (n, H, W, 3) uint8, as large as the largest, each rectangle in the upper left corner and arbitrary
        beyond; and sizes (n, 2) int64, height and width of what is valid.
        """
        sizes = boxes[:, 2:]
        shape = (len(index), *sizes.max(0).tolist(), 3)
        out = torch.empty(shape, dtype=torch.uint8, pin_memory=pin).numpy()

        def copy(numbers):
            for j in numbers:
                i = index[j]
                top, left, height, width = boxes[j]
                row = self.widths[i] * 3  # bytes
                first = self.offsets[i] + top * row
                rows = self.pixels[first:first + height * row].reshape(height, row)
                out[j, :height, :width] = rows[:, left * 3:(left + width) * 3].reshape(height, width, 3)

        numbers = np.arange(len(index))
        if out.nbytes < 1 << 22:  # a thread would cost more than it saves
            copy(numbers)
        else:
            if self.pool is None:
                self.pool = ThreadPoolExecutor(THREADS)
            list(self.pool.map(copy, np.array_split(numbers, 4 * THREADS)))
        return out, sizes

    def fingerprint(self):
        """A string that tells one prepared data set from another: the classes and a checksum of checksums."""
        files = [(split, file["name"], file["bytes"], file.get("crc32"))
                 for split, entry in sorted(self.meta["splits"].items()) for file in entry["files"]]
        classes = self.meta["classes"]
        return f"{len(classes)} classes {zlib.crc32(json.dumps([files, classes]).encode()):08x}"


def centre_crops(heights, widths, resize, size):
    """The central size x size pixels of images whose short side is resized to `resize`.

    As torchvision's Resize and CenterCrop take them. Returns boxes (n, 4) of ints to read, and parts (n, 4)
    of floats, what of each box becomes size x size; both are top, left, height, width. Boxes hold a filter's
    width more on each side, so that borders look as in the whole image.
    """
    shape = np.stack([heights, widths], axis=1)
    scale = shape.min(1, keepdims=True) / resize  # image pixels a resized pixel
    resized = (shape / scale + 1e-9).astype(np.int64)
    scale = shape / resized
    start = np.round((resized - size) / 2) * scale
    length = np.minimum(size * scale, shape)
    start = np.clip(start, 0, shape - length)  # of an image that is smaller than the crop, all
    margin = np.ceil(np.maximum(scale, 1)) + 1
    low = np.maximum(np.floor(start - margin), 0).astype(np.int64)
    high = np.minimum(np.ceil(start + length + margin), shape).astype(np.int64)
    boxes = np.concatenate([low, high - low], axis=1)
    parts = np.concatenate([start - low, length], axis=1)
    return boxes, parts


@functools.cache  # made once: a copy to the GPU makes the host wait
def mean_and_std(mean, std, device):
    """Channel means and deviations (3, 1, 1) of uint8 pixels, from those of meta.json, tuples in [0, 1]."""
    return (torch.tensor(mean, device=device).view(3, 1, 1) * 255,
            torch.tensor(std, device=device).view(3, 1, 1) * 255)


def read_meta(folder):
    """meta.json of a folder of images, checked. A UserError names the command that makes the folder."""
    name = os.path.basename(os.path.normpath(folder))
    flags = {"imagenet": "", "digits": " --source=digits"}
    flags = flags.get(name, f" --source=YOUR_IMAGES --dataset={name}")
    meta = load_meta(folder, check_image_meta, f"python -m scripts.prepare_imagenet{flags}")
    check_apart(folder, meta)
    return meta


def check_image_meta(meta):
    """Raises ValueError, KeyError or the like where meta is not what prepare_imagenet writes."""
    for name, entry in meta["splits"].items():
        for n in (entry["images"], *(file["bytes"] for file in entry["files"])):
            if type(n) is not int or not 0 <= n < 2**48:
                raise ValueError(f"bad count {str(n)[:80]}")
        if not {file["name"] for file in entry["files"]} <= {f"{name}.bin", f"{name}.idx"}:
            raise ValueError(f"the files of {name[:80]} are its .bin and its .idx")
    classes = meta["classes"]
    named = isinstance(classes, list) and classes and all(isinstance(c, str) for c in classes)
    if meta["kind"] != "images" or type(meta["short_side"]) is not int or not named:
        raise ValueError('kind is "images", classes a list of names, short_side a number')
    for moments in (meta["mean"], meta["std"]):
        if len(moments) != 3 or not all(isinstance(x, float) and 0 <= x <= 1 for x in moments):
            raise ValueError("mean and std are three numbers from 0 to 1 each")


def open_bytes(path, n_bytes):
    """A file as a read-only memory map of bytes, its size checked."""
    check_file_size(path, n_bytes, AGAIN)
    if n_bytes == 0:
        raise UserError(f"{path} is empty: {AGAIN}")
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
