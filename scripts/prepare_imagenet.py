"""
Images in, uint8 pixels that trainers memory-map out: `data/NAME/`, as images.py reads it.

    python -m scripts.prepare_imagenet --source=digits                       # scikit-learn's 1,797 handwritten digits; seconds, no download
    python -m scripts.prepare_imagenet                                       # ImageNet-1k from the Hugging Face hub (accept its terms there first)
    python -m scripts.prepare_imagenet --source=ILSVRC2012_img_train.tar     # a tar of a tar per class, as ImageNet hands it out
    python -m scripts.prepare_imagenet --source=folder_or.tar --dataset=mine --short_side=64

Sources: `digits`; a folder train/CLASS/*, with val/ (validation/) and test/ beside train/ where there are any, or CLASS/* alone; a
.tar of such a folder; .parquet files (a folder of them or a Hugging Face dataset id) with columns image and label, named by
split. Images: .jpeg .jpg .png .webp .bmp .gif .tif. Labels: classes sorted by name, or as the .parquet files have them.

Splits: `test` is what the literature reports on, for ImageNet its official validation images.
    train, val and test, labelled    as they are
    train and val                    the source's val becomes test; val is --val_fraction of train, by hash of the image file's bytes
    train alone                      val and test by hash, --val_fraction and --test_fraction of train
A test split without labels, as ImageNet's, is left out.

Images: the whole of each, resized (bicubic, antialiased: it keeps more for the crops that resample it again, and is done once)
until the short side is --short_side, never enlarged. RGB whatever it was; transparency is dropped; EXIF orientation is not
applied, which is ImageNet's convention. JPEGs are decoded at a fraction of their size where that is still twice --short_side.

Disk for ImageNet-1k: 1,281,167 + 50,000 images, at the mean aspect ratio of 1.37 and at the bytes an image that 100 of them have
(some are smaller than 256):
    --short_side       64     128    160    224    256    320    384
    GB, none smaller   22     90     140    274    358    560    806
    GB, as those 100   22     89     139    266    343    520    647
256 is the least at which evaluation as published, short side to 256 and crop of 224, is exact and a crop of the whole is not
enlarged to 224; 384 would be twice the bytes, mostly for crops that are then reduced again.

Killed at any instant and run again, it goes on from its last safe point and ends in the same bytes as an undisturbed run.
meta.json, without which no trainer reads the folder, comes last; {split}.bin holds pixels (height, width, 3), image after image,
{split}.idx their RECORDs. Unreadable images are left out, counted and named.

Memory does not grow with the images but for their list: 2 chunks of 64 in flight per worker, 17 MB each at 256. Measured, all
processes together: 310 MiB with 2 workers at 256; 0.4 GiB more for a list of 1.28 million files of a folder or tar. One process writes for
all workers, 1.2 ms an image at 256 where decoding took 5.7 (measured): beyond some 5 cores it is what limits.
"""
import functools
import io
import math
import os
import shutil
import sys
import time
import warnings
import zlib
from contextlib import suppress
from itertools import islice

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from configurator import configure
from nanorank.console import StopSignal
from nanorank.errors import UserError, user_errors
from nanorank.files import save_json, writing
from nanorank.image_files import SPLITS, find_images, read
from nanorank.images import RECORD
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

# ------------------------------------------------------------------------------------------------------------ settings
# what to read
source = "ILSVRC/imagenet-1k"  # digits, a folder, a .tar, or a Hugging Face dataset id
val_fraction = 0.0             # share of train, by hash, where the source has no third split; 0: 1 % of 100,000 images and more, else 10 %
test_fraction = 0.2            # share of train, by hash, where the source has neither val nor test
image_key = "image"            # column of the image files (.parquet)
label_key = "label"            # column of the class numbers (.parquet)
# what to write
dataset = "auto"               # name of the folder in data_dir; auto: digits for --source=digits, else imagenet
data_dir = "data"              # folder of all data sets
short_side = 256               # pixels of the shorter side as stored; images smaller than that are stored as they are
# how
workers = 0                    # processes that decode; 0: one per core
safe_interval = 10.0           # seconds between safe points: the work that a kill can cost
# ---------------------------------------------------------------------------------------------------------------------

MADE_WITH = ("source", "val_fraction", "test_fraction", "image_key", "label_key", "short_side")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # no others: Pillow would start Ghostscript for some
LONGEST = 65535


def main():
    """Makes the data set, or says that it is there."""
    with user_errors("prepare_imagenet.py"):
        made_with = check_settings()
        folder = os.path.join(data_dir, dataset if dataset != "auto" else "digits" if source == "digits" else "imagenet")
        path = os.path.join(folder, "meta.json")
        if os.path.exists(path):
            meta = read_json(path)
            refuse_other(folder, meta.get("settings", {}), made_with)
            check_files(folder, meta)
            return print(f"{folder} is finished, nothing to do: {totals(meta)}")
        data = find_images(source, (image_key, label_key), workers)
        roles, share = divide(data.counts)
        made_with["input images"] = f"{sum(data.counts.values())} ({data.names:08x})"
        os.makedirs(folder, exist_ok=True)
        with only_process(os.path.join(folder, ".lock")):
            part = Part(folder, made_with)
            stop = StopSignal()
            if not part.record["done"]:
                decode_all(part, data, roles, share, stop)
            if part.record["done"]:
                finish(part, data.classes)
    if not part.record["done"]:
        print(f"stopped by signal {stop.signal}; the same command goes on from here", flush=True)
        raise SystemExit(128 + stop.signal)


def check_settings():
    """The settings that the pixels depend on. Raises UserError for values that make no sense."""
    if min(val_fraction, test_fraction) < 0 or (val_fraction or 0.1) + test_fraction >= 1:
        raise UserError(f"--val_fraction={val_fraction}, --test_fraction={test_fraction}: expects shares that leave some to train")
    if short_side > LONGEST:
        raise UserError(f"--short_side={short_side}: expects {LONGEST} at most")
    check_range(globals(), short_side=1, workers=0, safe_interval=0)
    return {name: globals()[name] for name in MADE_WITH}


def divide(counts):
    """What becomes of the source's splits, {its: ours}, and which share of its train goes to val and test by hash. Says so."""
    own = [split for split in SPLITS if counts[split]]
    if "train" not in own:
        raise UserError(f"--source={source}: no images to train on; expects train/CLASS/*, CLASS/*, or train*.parquet")
    val = val_fraction or (0.01 if counts["train"] >= 100_000 else 0.1)
    roles, share = {split: split for split in own}, {"val": 0.0 if len(own) == 3 else val, "test": test_fraction if len(own) == 1 else 0.0}
    if own == ["train", "val"]:
        roles["val"] = "test"
    print(f"{sum(counts.values()):,} images. " + "; ".join(
        [f"{ours}: {counts[its]:,} of the source's {its}" for its, ours in roles.items() if its != "train"] +
        [f"{split}: {part:.0%} of its train by hash" for split, part in share.items() if part]), flush=True)
    return roles, share

# ------------------------------------------------------------------------------------------------------ images to pixels

def decode_chunk(chunk, short_side, roles, share, n_classes, keys):
    """What a worker does: {split: (records with offsets from 0, pixels as bytes, histogram (3, 256))}, {reason: (bad images, first names)}.

    A pure function of its arguments and what they point to: workers know nothing of the settings.
    """
    made, bad = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on what it can read nevertheless
        for split, name, label, data in read(chunk, keys):
            try:
                if label is None or not 0 <= label < n_classes:
                    raise UserError(f"with a label that is none of the {n_classes} classes")
                image = shrink(open_image(data, chunk.kind), short_side)
            except ValueError as error:
                bad.setdefault(str(error), []).append(name)
                continue
            u = zlib.crc32(data) / 2**32
            split = roles[split] if split != "train" else "test" if u < share["test"] else "val" if u < share["test"] + share["val"] else "train"
            records, pixels, histograms = made.setdefault(split, ([], [], []))
            records.append((0, image.height, image.width, label))
            pixels.append(image.tobytes())
            histograms.append(image.histogram())
    return ({split: pack(*images) for split, images in made.items()},
            {reason: (len(names), names[:NAMED]) for reason, names in bad.items()})


def pack(records, pixels, histograms):
    records = np.array(records, dtype=RECORD)
    records["offset"][1:] = np.cumsum([len(image) for image in pixels[:-1]])
    return records, b"".join(pixels), np.sum(histograms, axis=0).reshape(3, 256)


def open_image(data, kind="files"):
    """A Pillow image, not yet decoded. Raises UserError with the reason why not."""
    if data is None:
        raise UserError("that cannot be read")
    if not data:
        raise UserError("empty")
    if kind == "digits":
        return Image.frombytes("L", (8, 8), data)
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise UserError(f"of more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise UserError("no image") from None
    except Exception:  # Pillow raises a dozen kinds for damaged headers
        raise UserError("damaged") from None


def stored_size(image, short_side):
    """(width, height) that an image is stored at."""
    short = min(image.size)
    return tuple(side if short <= short_side else round(side * short_side / short) for side in image.size)


def shrink(image, short_side):
    """The RGB image to store. Raises UserError with the reason where it cannot be decoded or stored."""
    size, box = stored_size(image, short_side), None
    if max(size) > LONGEST:
        raise UserError(f"longer than {LONGEST:,} pixels")
    try:
        if image.size != size and (drafted := image.draft("RGB", (2 * short_side, 2 * short_side))):  # JPEG alone
            box = drafted[1]
        if image.mode.startswith("I;16"):  # which Pillow would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise UserError("of 32 bits a channel")
        image = image.convert("RGB")
        return image.resize(size, Image.Resampling.BICUBIC, box) if image.size != size else image
    except Exception as error:  # of Pillow's many decoders
        reason = str(error)
        raise UserError(reason if reason == "of 32 bits a channel" else "truncated" if "truncated" in reason else "damaged") from None

# --------------------------------------------------------------------------------------------------------------- the work

def decode_all(part, data, roles, share, stop):
    """Hands chunks out, appends in order, until all is done or a signal came. What is done is safe however it ends."""
    total, at, keys = sum(data.counts.values()), part.record["chunk"], (image_key, label_key)
    mean = check_space(part, data, total, keys)
    before = sum(chunk.images for chunk in data.chunks[:at])
    if at:
        print(f"going on behind image {before:,} of {total:,}", flush=True)
    work = functools.partial(decode_chunk, short_side=short_side, roles=roles, share=share, n_classes=len(data.classes), keys=keys)

    def take(result, number, images):
        part.add(*result, number)
        bar.set_postfix_str(f"{part.bytes() / 1e9:.2f} GB", refresh=False)
        bar.update(images)

    jobs = ((int(mean * chunk.images), chunk, (number, chunk.images)) for number, chunk in enumerate(data.chunks[at:], at + 1))
    with tqdm(total=total, initial=before, unit=" images", mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
        if run_in_order(work, jobs, take, part.save, stop, workers, 32 << 20):
            part.record["done"] = True
            part.save()


def check_space(part, data, total, keys):
    """Mean bytes of an image as stored, of some 64 from all over the source. Raises UserError where the disk is too small for them all."""
    sizes = []
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is twice as large is refused
    for chunk in data.chunks[::-(-len(data.chunks) // 8)]:
        for _, _, _, image in islice(read(chunk, keys), 8):
            with suppress(ValueError):
                sizes.append(3 * math.prod(stored_size(open_image(image, chunk.kind), short_side)))
    mean = sum(sizes) / max(len(sizes), 1)
    need, free = mean * total - part.bytes(), shutil.disk_usage(part.folder).free
    if need > free:
        raise UserError(f"{part.folder}: {need / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free; "
                         "another --data_dir, or a smaller --short_side")
    return mean


class Part:
    """What is written: pixel and index files, and a record of them and of the number of chunks that they hold.

    The record is the truth, and is replaced whole at every safe point; after a kill the files are cut back to it. They are
    called .tmp until the record says that all is done.
    """

    def __init__(self, folder, made_with):
        self.folder, self.path = folder, os.path.join(folder, "part.json")
        self.saved, self.open = time.monotonic(), {}
        for stray in (name for name in os.listdir(folder) if name.startswith("part.json.tmp")):
            os.unlink(os.path.join(folder, stray))
        begun = os.path.exists(self.path)
        self.record = read_json(self.path) if begun else {
            "settings": made_with, "done": False, "chunk": 0, "bad_images": {}, "sums": [0] * 3, "squares": [0] * 3,  # of train's pixels
            "splits": {split: {"images": 0, "files": [{"name": f"{split}.{kind}", "bytes": 0, "crc32": "00000000"} for kind in ("bin", "idx")]}
                       for split in SPLITS}}
        refuse_other(folder, self.record["settings"], made_with)
        if self.record["done"]:
            return self.name_files()
        for file in self.files():
            path = os.path.join(folder, file["name"]) + ".tmp"
            if not begun:
                open(path, "wb").close()
            self.open[file["name"]] = reopen(path, file["bytes"], self.path)

    def files(self):
        return [file for split in self.record["splits"].values() for file in split["files"]]

    def bytes(self):
        return sum(file["bytes"] for file in self.files())

    def add(self, made, bad, chunk):
        """Appends what came of chunk number `chunk`, from 1."""
        for split, (records, pixels, histogram) in made.items():
            entry = self.record["splits"][split]
            records["offset"] += entry["files"][0]["bytes"]
            for file, data in zip(entry["files"], (pixels, records.tobytes())):
                with writing(self.open[file["name"]].name):
                    self.open[file["name"]].write(data)
                file["crc32"] = f"{zlib.crc32(data, int(file['crc32'], 16)):08x}"
                file["bytes"] += len(data)
            entry["images"] += len(records)
            if split == "train":
                for name, power in (("sums", 1), ("squares", 2)):
                    more = histogram @ np.arange(256)**power
                    self.record[name] = [a + int(b) for a, b in zip(self.record[name], more)]
        for reason, (count, names) in bad.items():
            add_bad(self.record["bad_images"], reason, count, names)
        self.record["chunk"] = chunk
        if time.monotonic() - self.saved >= safe_interval:
            self.save()

    def save(self):
        """A safe point: the files, then the record, then their names if all is done."""
        for file in self.open.values():
            with writing(file.name):
                file.flush()
                os.fsync(file.fileno())
        save_json(self.path, self.record)
        if self.record["done"]:
            self.name_files()
        self.saved = time.monotonic()

    def name_files(self):
        for file in self.files():
            path = os.path.join(self.folder, file["name"])
            if os.path.exists(path + ".tmp"):
                os.replace(path + ".tmp", path)
            if file["name"] in self.open:
                self.open.pop(file["name"]).close()


def finish(part, classes):
    """Writes meta.json."""
    record, folder = part.record, part.folder
    bad = f"; {bad_line(record['bad_images'], 'images')}" if record["bad_images"] else ""
    if not record["splits"]["train"]["images"]:
        for path in (part.path, *(os.path.join(folder, file["name"]) for file in part.files())):  # so that another try may have other settings
            os.unlink(path)
        raise UserError(f"no images to train on in --source={source}{bad}")
    n = record["splits"]["train"]["files"][0]["bytes"] // 3
    moments = list(zip(record["sums"], record["squares"]))
    meta = {"kind": "images", "classes": classes, "short_side": short_side, "mean": [s / (255 * n) for s, _ in moments],
            "std": [math.sqrt((n * q - s * s) / (255 * n)**2) for s, q in moments], "source": source, "checksum": "crc32",
            **{name: record[name] for name in ("splits", "bad_images", "settings")}}
    check_files(folder, meta)
    save_json(os.path.join(folder, "meta.json"), meta)
    print(f"{folder} is finished: {totals(meta)}{bad}")
    if empty := [split for split in SPLITS if not meta["splits"][split]["images"]]:
        print(f"note: no image fell to {' and '.join(empty)}; --val_fraction, --test_fraction say which do")


def check_files(folder, meta):
    for file in (file for split in meta["splits"].values() for file in split["files"]):
        check_size(os.path.join(folder, file["name"]), file["bytes"], f"copy it again, or delete {folder} and run this again")


def totals(meta):
    return ", ".join(f"{name} {split['images']:,} images" for name, split in meta["splits"].items()) + f" of {len(meta['classes'])} classes"


if __name__ == "__main__":
    configure(globals())
    main()
