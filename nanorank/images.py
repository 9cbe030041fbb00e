"""
`data/NAME/` of images on disk -> checked, memory-mapped, and read as padded batches of rectangles.

The folder, as prepare_imagenet.py writes it: for each split `NAME.bin`, uint8 pixels, image after image, (height, width, 3) row by row,
`NAME.idx`, one RECORD an image, and `meta.json`,

    {"kind": "images", "classes": ["n01440764", ...], "short_side": 256, "mean": [r, g, b], "std": [r, g, b], "source": "...",
     "splits": {"train": {"images": 9, "files": [{"name": "train.bin", "bytes": 9, "crc32": "0a1b2c3d"}, {"name": "train.idx", ...}]}, ...}}
"""
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nanorank.errors import UserError
from nanorank.tokens import CHECKED, check_apart, check_crc32

RECORD = np.dtype([("offset", "<u8"), ("height", "<u2"), ("width", "<u2"), ("label", "<i4")])  # of an image; offset into the .bin in bytes
THREADS = 8  # that copy, and wait for the disk, side by side


class ImageSplit:
    """One split (train, val, test) of a data folder, memory-mapped.

    n_images; heights, widths, labels: int64 arrays (n_images,). Raises UserError naming file and fix where the folder is absent,
    truncated or not what its meta.json says.
    """

    def __init__(self, folder, split):
        self.folder, self.meta = folder, read_meta(folder)
        entry = self.meta["splits"].get(split, {"images": 0, "files": []})
        self.n_images = entry["images"]
        if not self.n_images:
            raise UserError(f"{folder} holds no {split} images; --val_fraction and --test_fraction of prepare_imagenet.py set some of train aside")
        files = {file["name"]: file["bytes"] for file in entry["files"]}
        self.pixels = open_bytes(os.path.join(folder, f"{split}.bin"), files.get(f"{split}.bin", 0))
        index = open_bytes(os.path.join(folder, f"{split}.idx"), self.n_images * RECORD.itemsize).view(RECORD)
        self.offsets, self.heights, self.widths, self.labels = (index[name].astype(np.int64) for name in RECORD.names)
        ends = self.offsets + self.heights * self.widths * 3
        if min(self.heights.min(), self.widths.min()) < 1 or self.offsets.min() < 0 or ends.max() > len(self.pixels) \
                or self.labels.min() < 0 or self.labels.max() >= len(self.meta["classes"]):
            raise UserError(f"{folder}/{split}.idx does not fit {split}.bin and the classes in meta.json: the data is damaged, prepare it again")
        for file in entry["files"]:
            if file["bytes"] <= CHECKED:
                check_crc32(folder, file, "copy it again, or run prepare_imagenet.py for this data set again")
        self.pool = None

    def read(self, index, boxes):
        """Rectangles of images number index (n,): boxes (n, 4) ints (top, left, height, width) -> pixels (n, H, W, 3) uint8, as large as
        the largest, each in the upper left corner and arbitrary beyond; and the sizes (n, 2) int64 of what is valid."""
        sizes = boxes[:, 2:]
        out = np.empty((len(index), *sizes.max(0), 3), dtype=np.uint8)

        def copy(some):
            for j in some:
                i, (top, left, height, width) = index[j], boxes[j]
                row = self.widths[i] * 3
                first = self.offsets[i] + top * row
                rows = self.pixels[first:first + height * row].reshape(height, row)
                out[j, :height, :width] = rows[:, left * 3:(left + width) * 3].reshape(height, width, 3)

        if out.nbytes < 1 << 22:  # sooner copied than shared out
            copy(range(len(index)))
        else:
            self.pool = self.pool or ThreadPoolExecutor(THREADS)
            list(self.pool.map(copy, np.array_split(np.arange(len(index)), 4 * THREADS)))
        return out, sizes

    def fingerprint(self):
        """What tells one prepared data set from another: its classes and the checksum of its files' checksums."""
        files = [(split, file["name"], file["bytes"], file.get("crc32")) for split, entry in sorted(self.meta["splits"].items())
                 for file in entry["files"]]
        return f"{len(self.meta['classes'])} classes {zlib.crc32(json.dumps([files, self.meta['classes']]).encode()):08x}"


def centre_crops(heights, widths, resize, size):
    """The central size x size pixels of images whose short side is resized to `resize`, as torchvision's Resize and CenterCrop take them:
    boxes (n, 4) of ints to read, and (n, 4) floats, the part of each that is to become size x size; both (top, left, height, width).

    The first hold a filter's width more on each side, so that borders look as in the whole image.
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
    return np.concatenate([low, high - low], axis=1), np.concatenate([start - low, length], axis=1)


def read_meta(folder):
    """meta.json of a folder of images, checked. Raises UserError that names the command which makes the folder."""
    path = os.path.join(folder, "meta.json")
    name = os.path.basename(os.path.normpath(folder))
    flags = {"imagenet": "", "digits": " --source=digits"}.get(name, f" --source=YOUR_IMAGES --dataset={name}")
    make = f"make it with: python -m scripts.prepare_imagenet{flags}"
    if not os.path.exists(path):
        raise UserError(f"{folder} is not a prepared set of images ({path} is missing); {make}")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        for name, entry in meta["splits"].items():
            for n in (entry["images"], *(file["bytes"] for file in entry["files"])):
                if type(n) is not int or not 0 <= n < 2**48:
                    raise UserError(f"bad count {str(n)[:80]}")
            if not {file["name"] for file in entry["files"]} <= {f"{name}.bin", f"{name}.idx"}:
                raise UserError(f"the files of {name[:80]} are its .bin and its .idx")
        if meta["kind"] != "images" or type(meta["short_side"]) is not int or not meta["classes"] or not isinstance(meta["classes"], list) \
                or not all(isinstance(c, str) for c in meta["classes"]):
            raise UserError('kind is "images", classes a list of names, short_side a number')
        if not all(isinstance(x, float) and 0 <= x <= 1 for x in (*meta["mean"], *meta["std"])) or len(meta["mean"]) != 3 or len(meta["std"]) != 3:
            raise UserError("mean and std are three numbers from 0 to 1 each")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not what prepare_imagenet.py writes ({type(error).__name__}: {error}); {make}") from None
    check_apart(folder, meta)
    return meta


def open_bytes(path, n_bytes):
    """A file as a read-only memory map of bytes, its size checked against meta.json."""
    size = os.path.getsize(path) if os.path.exists(path) else -1
    if size != n_bytes or not size:
        state = "is missing" if size < 0 else f"holds {size} bytes where meta.json says {n_bytes}"
        raise UserError(f"{path} {state}: copy it again, or run prepare_imagenet.py for this data set again")
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
