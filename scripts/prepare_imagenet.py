"""
Turns images into the pixel files that train_vit.py memory-maps: data/NAME/*.bin, *.idx, meta.json.

    python -m scripts.prepare_imagenet --source=digits  # scikit-learn's 1,797 digits: seconds, no download
    python -m scripts.prepare_imagenet                  # ImageNet-1k from the hub; accept its terms first
    python -m scripts.prepare_imagenet --source=ILSVRC2012_img_train.tar \\
        --val_source=ILSVRC2012_img_val.tar --val_labels=ILSVRC2012_devkit_t12
    python -m scripts.prepare_imagenet --source=folder_or.tar --dataset=mine --short_side=64

Sources: digits; a folder of train/CLASS/*, with val/ (validation/) and test/ beside train/ if there
are any, or of CLASS/* alone; a .tar of such a folder; .parquet files (a folder of them or a Hugging
Face dataset id) with columns image and label, named by split. Images: .jpeg .jpg .png .webp .bmp .gif
.tif. Classes are sorted by name; .parquet files bring their own labels.

Splits: test is the split that the literature reports on, for ImageNet its official validation images.
    source has train, val, test    they stay as they are
    source has train and val       its val becomes test; val is --val_fraction of train
    source has train alone         val and test are --val_fraction and --test_fraction of train; for
                                   classes named as ImageNet's (n01440764) there is no test
ImageNet's validation images lie flat in a tar or folder. --val_source names it, and --val_labels their
classes: Kaggle's LOC_val_solution.csv, or the folder of the devkit. They become test.
Shares of train go by a hash of the image file's bytes. A test split without labels, as ImageNet's, is
left out.

Images: the whole of each, resized until the short side is --short_side (bicubic, antialiased), never
enlarged. All become RGB. Transparency is dropped. EXIF orientation is not applied, as is ImageNet's
convention. JPEGs are decoded at a fraction of their size if that is still twice --short_side.
Unreadable images are left out, counted and named.

Disk for the 1,331,167 images of ImageNet-1k, at their mean aspect ratio of 1.37, and at the sizes of a
sample of 100, some of which are smaller than 256:
    --short_side       64     128    160    224    256    320    384
    GB, none smaller   22     90     140    274    358    560    806
    GB, as those 100   22     89     139    266    343    520    647
256 is the least for the published evaluation: short side to 256, then a crop of 224.

Restart: after a kill, run the same command again. It goes on from the last safe point and ends in the
same bytes as an undisturbed run. meta.json is written last; no trainer reads a folder without it. On a
finished folder the same command verifies all checksums.

Memory: 2 chunks of 64 images for each worker, 17 MB each at 256, and the list of images. Measured, all
processes together: 310 MiB with 2 workers at 256, and 0.4 GiB more for 1.28 million files in a folder
or tar. One process writes for all workers (1.2 ms an image at 256, where decoding takes 5.7), so more
than some 5 cores do not help.
"""
import io
import math
import os
import re
import shutil
import warnings
from contextlib import suppress
from functools import partial
from itertools import islice

import numpy as np
from PIL import Image, UnidentifiedImageError

from configurator import configure
from nanorank.data_folder import (
    SPLITS,
    BadRecord,
    add_bad,
    check_range,
    is_finished,
    join_bad,
    split_by_hash,
    write_meta,
)
from nanorank.errors import UserError, user_errors
from nanorank.image_files import find_images, read
from nanorank.image_labels import add_validation
from nanorank.images import RECORD
from nanorank.shards import RecordedFiles, only_process

# -----------------------------------------------------------------------------
# what to read
source = "ILSVRC/imagenet-1k"  # digits, a folder, a .tar, or a Hugging Face dataset id
val_fraction = 0.0             # share of train, by hash; 0: 1 % of 100,000 images and more, else 10 %
test_fraction = 0.2            # share of train, by hash, if the source has neither val nor test
val_source = ""                # folder or .tar of validation images, which become test; empty: in source
val_labels = ""                # their classes: Kaggle's .csv or the devkit's folder; empty: in class folders
image_key = "image"            # column of the image files (.parquet)
label_key = "label"            # column of the class numbers (.parquet)
# what to write
dataset = "auto"               # folder in data_dir; auto: digits for --source=digits, else imagenet
data_dir = "data"              # folder of all data sets
short_side = 256               # pixels of the shorter side as stored; smaller images are stored as they are
# how
workers = 0                    # processes that decode; 0: one per core
safe_interval = 10.0           # seconds between safe points: the work that a kill can cost
# -----------------------------------------------------------------------------

# the settings that the pixels depend on
MADE_WITH = ("source", "val_fraction", "test_fraction", "image_key", "label_key", "short_side", "val_source",
             "val_labels")
DEFAULT_TEST_FRACTION = test_fraction
WNID = r"n\d{8}"  # how ImageNet names its classes
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # no others: Pillow would start Ghostscript for some
LONGEST = 65535  # pixels, what the index can hold


def main():
    """Makes the data set, or says that it is there."""
    made_with = check_settings()
    name = dataset
    if name == "auto":
        name = "digits" if source == "digits" else "imagenet"
    folder = os.path.join(data_dir, name)
    if is_finished(folder, made_with):
        return

    data = find_images(source, (image_key, label_key))
    if val_source:
        data = add_validation(data, val_source, val_labels)
    roles, share = divide(data.counts, data.classes)
    made_with["input images"] = f"{sum(data.counts.values())} ({data.names:08x})"
    if test_fraction and not share["test"] and "test" not in roles.values():
        made_with["input images"] += " without test"
    os.makedirs(folder, exist_ok=True)
    with only_process(os.path.join(folder, ".lock")):
        part = Part(folder, made_with)
        if not part.record["done"]:
            decode_all(part, data, roles, share)
        finish(part, data.classes)


def check_settings():
    """{name: value} of the settings that the pixels depend on. Raises UserError for senseless values."""
    if min(val_fraction, test_fraction) < 0 or (val_fraction or 0.1) + test_fraction >= 1:
        raise UserError(f"--val_fraction={val_fraction}, --test_fraction={test_fraction}: "
                        "expects shares that leave some to train")
    if short_side > LONGEST:
        raise UserError(f"--short_side={short_side}: expects {LONGEST} at most")
    check_range(globals(), short_side=1, workers=0, safe_interval=0)
    if val_labels and not val_source:
        raise UserError(f"--val_labels={val_labels} needs --val_source=FOLDER_OR_TAR of those images")
    return {name: globals()[name] for name in MADE_WITH}


def divide(counts, classes=()):
    """Our split for each of the source's, {its: ours}, and the shares of its train that go to val and test.

    counts: images of each of the source's splits; classes: their names. A part of ImageNet's training images
    is no test unless --test_fraction asks for one: test means the official validation set.
    """
    own = [split for split in SPLITS if counts[split]]
    if "train" not in own:
        raise UserError(f"--source={source}: no images to train on; "
                        "expects train/CLASS/*, CLASS/*, or train*.parquet")
    roles = {split: split for split in own}
    if own == ["train", "val"]:
        roles["val"] = "test"

    share = {"val": val_fraction, "test": 0.0}
    if not val_fraction:
        share["val"] = 0.01 if counts["train"] >= 100_000 else 0.1
    if len(own) == 3:
        share["val"] = 0.0
    is_imagenet = classes and all(re.fullmatch(WNID, name) for name in classes)
    if len(own) == 1 and not (is_imagenet and test_fraction == DEFAULT_TEST_FRACTION):
        share["test"] = test_fraction

    about = []
    for its, ours in roles.items():
        if its != "train":
            about.append(f"{ours}: {counts[its]:,} of the source's {its}")
    for split, part in share.items():
        if part:
            about.append(f"{split}: {part:.0%} of its train by hash")
    if len(own) == 1 and is_imagenet and not share["test"]:
        about.append("no test, which for ImageNet is its validation set: --val_source, --val_labels")
    print(f"{sum(counts.values()):,} images. {'; '.join(about)}", flush=True)
    return roles, share


def decode_all(part, data, roles, share):
    """Hands chunks out and appends their pixels in order, until all is done. A signal ends the process."""
    keys = (image_key, label_key)
    total = sum(data.counts.values())
    image_bytes = check_space(part, data, total, keys)
    at = part.record["chunk"]
    seen = sum(chunk.images for chunk in data.chunks[:at])
    if at:
        print(f"going on after image {seen:,} of {total:,}", flush=True)
    jobs = []
    for number, chunk in enumerate(data.chunks[at:], at + 1):
        seen += chunk.images
        jobs.append((int(image_bytes * chunk.images), chunk, (number,), seen))
    work = partial(decode_chunk, short_side=short_side, roles=roles, share=share, n_classes=len(data.classes),
                   keys=keys)
    part.fill(work, lambda stop: jobs, total, " images", workers, 32 << 20)


def check_space(part, data, total, keys):
    """Mean bytes of an image as stored, of some 64 from all over the source.

    Raises UserError if the disk is too small for all images.
    """
    sizes = []
    every = math.ceil(len(data.chunks) / 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on images that it can read
        for chunk in data.chunks[::every]:
            for _, _, _, image in islice(read(chunk, keys), 8):
                with suppress(BadRecord):
                    width, height = stored_size(open_image(image, chunk.kind), short_side)
                    sizes.append(3 * width * height)
    mean = sum(sizes) / max(len(sizes), 1)
    need = mean * total - part.total_bytes()
    free = shutil.disk_usage(part.folder).free
    if need > free:
        raise UserError(f"{part.folder}: {need / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free; "
                        "another --data_dir, or a smaller --short_side")
    return mean

# -----------------------------------------------------------------------------
# images to pixels, in the workers

def decode_chunk(chunk, short_side, roles, share, n_classes, keys):
    """{split: (records, pixels as bytes, histogram (3, 256))} and the bad images as add_bad counts them.

    A pure function of its arguments and of the files they name: workers do not see the settings.
    """
    made = {}  # split: (records, pixels, histograms), an entry of each for an image
    bad = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on images that it can read
        for split, name, label, data in read(chunk, keys):
            try:
                if label is None or not 0 <= label < n_classes:
                    raise BadRecord(f"with a label that is none of the {n_classes} classes")
                image = shrink(open_image(data, chunk.kind), short_side)
            except BadRecord as error:
                add_bad(bad, str(error), [name])
                continue
            split = split_by_hash(data, share) if split == "train" else roles[split]
            records, pixels, histograms = made.setdefault(split, ([], [], []))
            records.append((0, image.height, image.width, label))
            pixels.append(image.tobytes())
            histograms.append(image.histogram())
    return {split: pack(*images) for split, images in made.items()}, bad


def pack(records, pixels, histograms):
    """One array of records, whose offsets count from the first image, one bytes, and one histogram."""
    records = np.array(records, dtype=RECORD)
    records["offset"][1:] = np.cumsum([len(image) for image in pixels[:-1]])
    return records, b"".join(pixels), np.sum(histograms, axis=0).reshape(3, 256)


def open_image(data, kind="files"):
    """A Pillow image, not yet decoded. Raises BadRecord with the reason why not."""
    if data is None:
        raise BadRecord("that cannot be read")
    if not data:
        raise BadRecord("empty")
    if kind == "digits":
        return Image.frombytes("L", (8, 8), data)
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadRecord(f"of more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise BadRecord("no image") from None
    except Exception:  # Pillow raises a dozen kinds for damaged headers
        raise BadRecord("damaged") from None


def stored_size(image, short_side):
    """(width, height) that an image is stored at."""
    short = min(image.size)
    if short <= short_side:
        return image.size
    width, height = image.size
    return round(width * short_side / short), round(height * short_side / short)


def shrink(image, short_side):
    """The RGB image to store. Raises BadRecord with the reason if it cannot be decoded or stored."""
    size = stored_size(image, short_side)
    if max(size) > LONGEST:
        raise BadRecord(f"longer than {LONGEST:,} pixels")
    box = None
    try:
        if image.size != size:
            drafted = image.draft("RGB", (2 * short_side, 2 * short_side))  # None unless a JPEG
            if drafted:
                box = drafted[1]
        if image.mode.startswith("I;16"):  # Pillow would clip it at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise BadRecord("of 32 bits a channel")
        image = image.convert("RGB")
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC, box)
        return image
    except BadRecord:
        raise
    except Exception as error:  # of Pillow's many decoders
        raise BadRecord("truncated" if "truncated" in str(error) else "damaged") from None

# -----------------------------------------------------------------------------
# pixels to files

class Part(RecordedFiles):
    """The pixels ({split}.bin) and the index ({split}.idx) of each split, and how many chunks they hold."""

    def __init__(self, folder, made_with):
        splits = {}
        for split in SPLITS:
            names = (f"{split}.bin", f"{split}.idx")
            files = [{"name": name, "bytes": 0, "crc32": "00000000"} for name in names]
            splits[split] = {"images": 0, "files": files}
        record = {"settings": made_with, "done": False, "chunk": 0, "bad_images": {},
                  "sums": [0] * 3, "squares": [0] * 3,  # over train's pixels, by channel
                  "splits": splits}
        super().__init__(os.path.join(folder, "part.json"), record, safe_interval)

    def total_bytes(self):
        return sum(file["bytes"] for file in self.files())

    def progress(self, seconds):
        return f"{self.total_bytes() / 1e9:.2f} GB"

    def add(self, made, bad, chunk):
        """Appends the results of chunk number `chunk`, from 1."""
        for split, (records, pixels, histogram) in made.items():
            entry = self.record["splits"][split]
            records["offset"] += entry["files"][0]["bytes"]
            for file, data in zip(entry["files"], (pixels, records.tobytes())):
                self.append(file, data)
                file["bytes"] += len(data)
            entry["images"] += len(records)
            if split == "train":
                values = np.arange(256)
                for channel in range(3):
                    self.record["sums"][channel] += int(histogram[channel] @ values)
                    self.record["squares"][channel] += int(histogram[channel] @ values**2)
        join_bad(self.record["bad_images"], bad)
        self.record["chunk"] = chunk


def finish(part, classes):
    """Writes meta.json."""
    record = part.record
    # mean and standard deviation of train's pixels, scaled to [0, 1]
    n = max(1, record["splits"]["train"]["files"][0]["bytes"] // 3)
    mean = []
    std = []
    for s, q in zip(record["sums"], record["squares"]):
        mean.append(s / (255 * n))
        std.append(math.sqrt((n * q - s * s) / (255 * n)**2))
    meta = {"kind": "images", "classes": classes, "short_side": short_side, "mean": mean, "std": std,
            "source": source, "checksum": "crc32"}
    for name in ("splits", "bad_images", "settings"):
        meta[name] = record[name]
    write_meta(part.folder, meta, [part.path])
    for split, flags in (("val", "--val_fraction says"), ("test", "--test_fraction or --val_source says")):
        if not meta["splits"][split]["images"]:
            print(f"note: no image fell to {split}; {flags} which do")


if __name__ == "__main__":
    with user_errors("prepare_imagenet.py"):
        configure(globals())
        main()
