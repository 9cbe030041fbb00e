"""
ImageNet's validation images as they are handed out: a flat folder or tar, and their classes in a file.

    source = add_validation(source, "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12")
"""
import csv
import os
import zlib
from collections import Counter

from nanorank.errors import UserError
from nanorank.image_files import CHUNK, cut, list_folder, list_tar
from nanorank.inputs import need

TRUTH = "ILSVRC2012_validation_ground_truth.txt"
HOW = ("--val_labels=LOC_val_solution.csv (Kaggle's), or the devkit's folder "
       f"(with data/{TRUTH} and data/meta.mat)")


def add_validation(source, place, labels):
    """A Source with the images of a folder or .tar as its split val.

    labels: a file or folder for read_labels; empty: the images lie in folders named as the classes.
    Images of classes that train has not are left out and counted. Raises UserError if none is left.
    """
    if source.counts["val"]:
        raise UserError(f"--val_source={place}: the source has val images of its own already")
    if not os.path.exists(place):
        raise UserError(f"--val_source={place}: no such folder or .tar")
    found = list_folder(place) if os.path.isdir(place) else list_tar(place)
    number = {its_class: i for i, its_class in enumerate(source.classes)}
    class_of = read_labels(labels) if labels else {}

    pictures = []  # (split, name, label, offset, size)
    left_out = Counter()
    names = source.names
    for name, offset, size in sorted(found):
        if labels:
            its_class = class_of.get(os.path.splitext(os.path.basename(name))[0])
        else:
            its_class = os.path.basename(os.path.dirname(name))
        if its_class not in number:
            left_out["of classes that train has not" if its_class else "without a label"] += 1
            continue
        pictures.append(("val", name, number[its_class], offset, size))
        names = zlib.crc32(f"{name}:{size}:{its_class}\n".encode(errors="surrogateescape"), names)
    if not pictures:
        raise UserError(f"--val_source={place}: none of its {len(found):,} images has a class of train; "
                        f"give {HOW}, or class folders named as in train")
    for why, count in left_out.items():
        print(f"note: {count:,} images of --val_source are left out ({why})", flush=True)

    chunks = source.chunks + cut("files", place, pictures, CHUNK)
    return source._replace(counts=source.counts + Counter(val=len(pictures)), chunks=chunks, names=names)


def read_labels(path):
    """{name of an image without its suffix: class (wnid)} from Kaggle's .csv, or the devkit's folder or file.

    Raises UserError for another file.
    """
    if not os.path.exists(path):
        raise UserError(f"--val_labels={path}: no such file or folder")
    try:
        if path.endswith(".csv"):
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
            # a row: ILSVRC2012_val_00048981, "n03995372 85 1 499 272"
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
        return read_devkit(path)
    except UserError:
        raise
    except Exception as error:  # of csv, scipy and missing columns, a dozen kinds
        raise UserError(f"--val_labels={path}: {type(error).__name__}: {error}; expects {HOW}") from None


def read_devkit(path):
    """The same from the devkit: line i has the number of image i's class, meta.mat that class's wnid."""
    if os.path.isdir(path):
        folders = [folder for folder, _, names in os.walk(path) if TRUTH in names]
        if not folders:
            raise UserError(f"--val_labels={path}: no {TRUTH} in it; expects {HOW}")
        path = os.path.join(folders[0], TRUTH)
    meta = os.path.join(os.path.dirname(path), "meta.mat")
    if not os.path.exists(meta):
        raise UserError(f"{path}: its numbers mean classes in the devkit's meta.mat, which is not beside it")
    synsets = need("scipy.io", f"--val_labels={path}").loadmat(meta, squeeze_me=True)["synsets"]
    wnids = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist()))
    with open(path, encoding="utf-8") as file:
        numbers = file.read().split()
    return {f"ILSVRC2012_val_{i:08d}": wnids[int(number)] for i, number in enumerate(numbers, 1)}
