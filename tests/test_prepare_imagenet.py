"""prepare_imagenet.py: sources, splits, kills, bad input. The reference is Pillow's decoding and resizing."""
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import one_line_exit_2
from hub_server import hub
from PIL import Image
from test_prepare import (
    contents,
    held_by_another,
    main_in_child,
    one_line,
    runner,
    wait_for_chunks,
    wait_for_end,
)

from nanorank import image_files
from nanorank.data_folder import SPLITS
from nanorank.images import RECORD, ImageSplit
from nanorank.tokens import crc32, open_splits
from scripts import prepare_imagenet

REPO = pathlib.Path(__file__).resolve().parent.parent
X = "data/x"  # the folder that `prepare` writes, in tmp_path
sklearn_datasets = pytest.importorskip("sklearn.datasets")
PHOTO = Image.fromarray(sklearn_datasets.load_sample_image("china.jpg"))  # 640 x 427


@pytest.fixture
def prepare(tmp_path, monkeypatch, capfd):
    """Runs prepare_imagenet.main() with these settings; returns (exit status, output). Chunks are small."""
    monkeypatch.setattr(image_files, "CHUNK", 4)  # so that there are many
    monkeypatch.setattr(image_files, "ROWS", 4)
    defaults = {"data_dir": tmp_path / "data", "dataset": "x", "workers": 2, "short_side": 24}
    yield from runner(prepare_imagenet, defaults, monkeypatch, capfd)


def photo(seed, size=None):
    """A piece of the photo: (60, 40) and the like, so that short_side = 24 decodes it whole."""
    rng = random.Random(seed)
    size = size or (rng.randint(30, 70), rng.randint(30, 70))
    x, y = rng.randint(0, 640 - size[0]), rng.randint(0, 427 - size[1])
    return PHOTO.crop((x, y, x + size[0], y + size[1]))


def encoded(image, kind="JPEG", **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def some_files(*splits, classes=("apple", "pear", "quince"), n=8):
    """{name below the source: bytes}, n images a class and split."""
    return {f"{split}/{name}/{name}_{i}.JPEG": encoded(photo(f"{split}{name}{i}"))
            for split in splits for name in classes for i in range(n)}


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def by_pillow(data, short=24):
    """What is to be stored of an image file."""
    image = Image.open(io.BytesIO(data))
    least = min(image.size)
    size = image.size if least <= short else tuple(round(side * short / least) for side in image.size)
    image = image.convert("RGB")
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image)


def stored(folder, split):
    """[(pixels (height, width, 3), label)] of a split, read as the format says; its checksums are checked."""
    meta = json.loads((folder / "meta.json").read_text())
    entry = meta["splits"][split]
    assert [file["name"] for file in entry["files"]] == [f"{split}.bin", f"{split}.idx"]
    for file in entry["files"]:
        path = folder / file["name"]
        assert path.stat().st_size == file["bytes"] and crc32(path) == file["crc32"]
    pixels = np.fromfile(folder / f"{split}.bin", dtype=np.uint8)
    record = [("offset", "<u8"), ("height", "<u2"), ("width", "<u2"), ("label", "<i4")]
    index = np.fromfile(folder / f"{split}.idx", dtype=record)
    assert len(index) == entry["images"] and index.dtype.itemsize == 16 and index.dtype == RECORD
    sizes = 3 * index["height"].astype(int) * index["width"]
    assert index["offset"].tolist() == [0, *np.cumsum(sizes).tolist()][:len(index)]
    assert sizes.sum() == len(pixels)
    return [(pixels[start:start + size].reshape(h, w, 3), label)
            for (start, h, w, label), size in zip(index.tolist(), sizes)]


def assert_stored(folder, split, expected, short=24):
    """expected: [(bytes of the image file, label)], in any order."""
    def key(pair):
        return pair[1], pair[0].shape, pair[0].tobytes()

    found = sorted(stored(folder, split), key=key)
    wanted = sorted(((by_pillow(data, short), label) for data, label in expected), key=key)
    assert [key(pair) for pair in found] == [key(pair) for pair in wanted]


LABEL = {"apple": 0, "pear": 1, "quince": 2}
NO_SPLIT = {"val_fraction": 1e-9, "test_fraction": 0.0}  # 0 would be the default


def labelled(files, split):
    return [(data, LABEL[name.split("/")[-2]]) for name, data in files.items() if name.startswith(split)]

# ---------------------------------------------------------------------- sources

@pytest.mark.parametrize("kind", ["folder", "nested folder", "tar", "tar below folders", "tar of tars"])
def test_folders_and_tars(prepare, tmp_path, kind):
    files = some_files("train", "val", "test")
    if kind == "folder":
        (tmp_path / "in" / "train" / "notes").mkdir(parents=True)
        (tmp_path / "in" / "train" / "notes" / "a.txt").write_text("no image, so no class")
        source = write_folder(tmp_path / "in", files)
    elif kind == "nested folder":  # Tiny ImageNet's CLASS/images/*, and the suffix in another case
        nested = {}
        for name, data in files.items():
            split, its_class, name = name.split("/")
            nested[f"{split}/{its_class}/images/{name.lower()}"] = data
        source = write_folder(tmp_path / "in", nested)
    elif kind == "tar of tars":
        inner = {}
        for name, data in files.items():
            inner.setdefault(name.rpartition("/")[0] + ".tar", {})[os.path.basename(name)] = data
        tars = {name: write_tar(tmp_path / "inner.tar", some).read_bytes() for name, some in inner.items()}
        source = write_tar(tmp_path / "a.tar", tars)
    else:
        below = "" if kind == "tar" else "./some/where/"
        members = {below + name: data for name, data in (files | {"README": b"text"}).items()}
        source = write_tar(tmp_path / "a.tar", members)
    assert prepare(source=source)[0] == 0
    folder = tmp_path / X
    for split in ("train", "val", "test"):
        assert_stored(folder, split, labelled(files, split))
    meta = json.loads((folder / "meta.json").read_text())
    about = {"kind": "images", "classes": ["apple", "pear", "quince"], "short_side": 24,
             "source": str(source), "checksum": "crc32", "bad_images": {}}
    assert about.items() <= meta.items() and meta["settings"]["short_side"] == 24
    train = np.concatenate([pixels.reshape(-1, 3) for pixels, _ in stored(folder, "train")]) / 255.0
    np.testing.assert_allclose(meta["mean"], train.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(meta["std"], train.std(axis=0), rtol=1e-12)


def test_classes_alone_as_ilsvrc_train_comes(prepare, tmp_path):
    """A tar of wnid.tar with nothing around them."""
    files = {name.removeprefix("train/"): data for name, data in some_files("train").items()}
    tars = {}
    for name in LABEL:
        some = {os.path.basename(path): data for path, data in files.items() if path.startswith(name)}
        tars[f"{name}.tar"] = write_tar(tmp_path / "inner.tar", some).read_bytes()
    assert prepare(source=write_tar(tmp_path / "a.tar", tars))[0] == 0
    assert prepare(source=write_folder(tmp_path / "in", files), dataset="y")[0] == 0
    for name in ("train.bin", "train.idx", "val.bin", "test.bin"):
        assert (tmp_path / X / name).read_bytes() == (tmp_path / "data" / "y" / name).read_bytes()


def write_parquet(path, rows, names=None, keys=("image", "label"), **how):
    """rows: (bytes, label)."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = pa.array([{"bytes": data, "path": "x.jpg"} for data, _ in rows],
                     pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.table({keys[0]: files, keys[1]: pa.array([label for _, label in rows], pa.int64())})
    if names:
        features = {"info": {"features": {keys[1]: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **how)


@pytest.mark.parametrize("how", [{"row_group_size": 7}, {"row_group_size": 3, "write_statistics": False}, {}])
def test_parquet(prepare, tmp_path, how):
    """Row groups of more than ROWS are cut; an unlabelled test split is left out; bad rows are named."""
    files = some_files("train", "validation")
    train, val = labelled(files, "train"), labelled(files, "validation")
    more = train[13:] + [(None, 1), (train[0][0], None)]
    for name, rows in (("train-00000-of-00002", train[:13]), ("train-00001-of-00002", more),
                       ("validation-00000-of-00001", val)):
        write_parquet(tmp_path / "in" / f"{name}.parquet", rows, ["apple", "pear", "plum"], **how)
    write_parquet(tmp_path / "in" / "test-00000-of-00001.parquet", [(data, -1) for data, _ in val], **how)
    status, output = prepare(source=tmp_path / "in", val_fraction=0.3)
    assert status == 0 and "test split has no labels and is left out" in output
    assert "test: 24 of the source's val; val: 30%" in output
    folder = tmp_path / X
    assert_stored(folder, "test", val)
    for split, here in (("val", True), ("train", False)):
        some = [(data, label) for data, label in train if (zlib.crc32(data) / 2**32 < 0.3) == here]
        assert_stored(folder, split, some)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["classes"] == ["apple", "pear", "plum"]
    assert {reason: bad["count"] for reason, bad in meta["bad_images"].items()} == {
        "that cannot be read": 1, "with a label that is none of the 3 classes": 1}


def test_parquet_with_other_columns(prepare, tmp_path):
    rows = labelled(some_files("train"), "train")
    write_parquet(tmp_path / "in" / "a.parquet", rows, keys=("picture", "class"))
    one_line(prepare(source=tmp_path / "in"), "no column 'image' among picture, class; --image_key names it")
    one_line(prepare(source=tmp_path / "in", image_key="picture", label_key="picture"), "not class numbers")
    assert prepare(source=tmp_path / "in" / "a.parquet", image_key="picture", label_key="class")[0] == 0
    assert json.loads((tmp_path / X / "meta.json").read_text())["classes"] == ["0", "1", "2"]
    path = tmp_path / "in" / "a.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    one_line(prepare(source=path, dataset="y"), f"{path}: damaged or cut short")


READ_BY_DATASETS = """
import zlib, datasets
images = datasets.load_dataset("org/images", streaming=True)["train"]
for row in images.cast_column("image", datasets.Image(decode=False)):
    print(zlib.crc32(row["image"]["bytes"]), row["label"])
"""


def test_hub(tmp_path):
    """ImageNet's layout, read by huggingface_hub itself; a hub that refuses it; one out of reach."""
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("datasets")
    files = some_files("train", "validation")
    for repo in ("images", "gated"):
        for split in ("train", "validation"):
            path = tmp_path / "org" / repo / "data" / f"{split}-00000-of-00001.parquet"
            write_parquet(path, labelled(files, split), list(LABEL), row_group_size=5)
    command = ("-m", "scripts.prepare_imagenet", f"--data_dir={tmp_path / 'data'}", "--short_side=24")
    with hub(tmp_path) as server:
        server.gated.add("org/gated")
        result = server.run(*command, "--source=org/images", "--dataset=x", "--val_fraction=1e-9")
        assert result.returncode == 0, result.stderr
        for repo in ("org/gated", "org/absent"):
            terms = f"accept the terms at https://huggingface.co/datasets/{repo}, then `hf auth login`"
            refused = server.run(*command, f"--source={repo}", "--dataset=y")
            one_line_exit_2(refused, terms, "HF_TOKEN", "--source=FOLDER")
        away = server.run(*command, "--source=org/images", "--dataset=y", url="http://127.0.0.1:9")
        one_line_exit_2(away, "hub did not give it: [Errno")
        by_datasets = server.run("-c", READ_BY_DATASETS)
    assert_stored(tmp_path / X, "train", labelled(files, "train"))
    assert_stored(tmp_path / X, "test", labelled(files, "validation"))
    train = [f"{zlib.crc32(data)} {label}" for data, label in labelled(files, "train")]
    assert by_datasets.stdout.splitlines() == train, by_datasets.stderr
    assert [label for _, label in stored(tmp_path / X, "train")] == [int(line.split()[1]) for line in train]
    assert not (tmp_path / "data" / "y").exists()


def test_digits(prepare, tmp_path):
    assert prepare(source="digits", dataset="auto", short_side=256)[0] == 0
    folder = tmp_path / "data" / "digits"
    digits = sklearn_datasets.load_digits()
    pixels = np.round(digits.images * 255 / 16).astype(np.uint8)
    u = np.array([zlib.crc32(image.tobytes()) / 2**32 for image in pixels])
    for split, here in (("test", u < 0.2), ("val", (u >= 0.2) & (u < 0.3)), ("train", u >= 0.3)):
        found = stored(folder, split)
        assert [label for _, label in found] == digits.target[here].tolist()
        images = np.stack([image for image, _ in found])
        assert np.array_equal(images, np.repeat(pixels[here][..., None], 3, axis=3))
    assert json.loads((folder / "meta.json").read_text())["classes"] == [str(i) for i in range(10)]

# ----------------------------------------------------------------------- splits

def test_train_alone_is_split_by_hash(prepare, tmp_path):
    files = some_files("train", n=60)
    assert prepare(source=write_folder(tmp_path / "in", files), val_fraction=0.25, test_fraction=0.35)[0] == 0
    u = {name: zlib.crc32(data) / 2**32 for name, data in files.items()}
    for split, low, high in (("test", 0, 0.35), ("val", 0.35, 0.6), ("train", 0.6, 1)):
        some = {name: data for name, data in files.items() if low <= u[name] < high}
        assert_stored(tmp_path / X, split, labelled(some, "train"))

    # in another order, by another number of workers
    write_tar(tmp_path / "a.tar", dict(sorted(files.items(), key=lambda item: u[item[0]])))
    prepare(source=tmp_path / "a.tar", dataset="y", workers=1)
    for split in SPLITS:
        assert len(stored(tmp_path / "data" / "y", split)) == len(stored(tmp_path / X, split))


@pytest.mark.parametrize("counts, roles, share", [
    ((10, 0, 0), {"train": "train"}, {"val": 0.1, "test": 0.2}),
    ((100_000, 0, 0), {"train": "train"}, {"val": 0.01, "test": 0.2}),
    ((1_281_167, 50_000, 0), {"train": "train", "val": "test"}, {"val": 0.01, "test": 0.0}),
    ((10, 0, 5), {"train": "train", "test": "test"}, {"val": 0.1, "test": 0.0}),
    ((10, 5, 5), {"train": "train", "val": "val", "test": "test"}, {"val": 0.0, "test": 0.0})])
def test_what_becomes_of_the_sources_splits(counts, roles, share):
    assert prepare_imagenet.divide(Counter(dict(zip(("train", "val", "test"), counts)))) == (roles, share)


def devkit(folder, wnids):
    """A devkit whose class numbers are in another order than the names, as ImageNet's are."""
    io_ = pytest.importorskip("scipy.io")
    (folder / "data").mkdir(parents=True)
    order = wnids[::-1] + ["n00001740"]  # and a class above the others, as in the real one
    synsets = np.zeros(len(order), dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
    for i, wnid in enumerate(order):
        synsets[i] = (float(i + 1), wnid)
    io_.savemat(folder / "data" / "meta.mat", {"synsets": synsets[:, None]})
    return {wnid: i + 1 for i, wnid in enumerate(order)}


@pytest.mark.parametrize("how", ["csv", "devkit", "class folders"])
def test_imagenets_validation_set_as_users_have_it(prepare, tmp_path, how):
    """A bare training tar and a flat tar or folder with labels become train and test."""
    wnids = ["n01440764", "n01443537", "n02119789"]
    train = {f"{wnid}/{wnid}_{i}.JPEG": encoded(photo(f"{wnid}{i}")) for wnid in wnids for i in range(8)}
    tar = write_tar(tmp_path / "train.tar", train)
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 10)]
    label = {name: int(zlib.crc32(name.encode()) % 3) for name in names}
    val = {f"{name}.JPEG": encoded(photo(name)) for name in names}
    labels = tmp_path / "labels.csv"
    if how == "csv":
        rows = [f"{name},{wnids[label[name]]} 1 2 3 4 {wnids[0]} 1 2 3 4 " for name in reversed(names)]
        labels.write_text("ImageId,PredictionString\n" + "\n".join(rows) + "\n")
        place = write_tar(tmp_path / "val.tar", val)
    elif how == "devkit":
        labels = tmp_path / "kit"
        number = devkit(labels, wnids)
        truth = "".join(f"{number[wnids[label[name]]]}\n" for name in names)
        (labels / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
        place = write_folder(tmp_path / "val", val)
    else:
        labels = ""
        place = write_folder(tmp_path / "val", {
            f"{wnids[label[name[:-5]]]}/{name}": data for name, data in val.items()} | {"n09/1.JPEG": b"x"})
    status, output = prepare(source=tar, val_source=place, val_labels=labels, val_fraction=1e-9)
    assert status == 0 and "test: 9 of the source's val" in output, output
    assert ("1 images of --val_source are left out (of classes that train has not)" in output) == (not labels)
    assert_stored(tmp_path / X, "test", [(val[f"{name}.JPEG"], label[name]) for name in names])
    every_train = [(data, wnids.index(name.split("/")[0])) for name, data in train.items()]
    assert_stored(tmp_path / X, "train", every_train)
    one_line(prepare(source=tar, val_source="", val_labels=""), "was made with --val_source=")
    one_line(prepare(source=tar, dataset="y", val_labels="a.csv", val_source=""), "needs --val_source")
    flat = write_folder(tmp_path / "flat", val)
    one_line(prepare(source=tar, dataset="y", val_source=flat, val_labels=""), "LOC_val_solution.csv")


def test_a_part_of_imagenets_training_images_is_no_test(prepare, tmp_path):
    files = {f"{wnid}/{i}.JPEG": encoded(photo(f"{wnid}{i}")) for wnid in ("n01", "n02") for i in range(30)}
    files = {name.replace("n0", "n0000000"): data for name, data in files.items()}
    tar = write_tar(tmp_path / "train.tar", files)
    status, output = prepare(source=tar, val_fraction=0.3)
    assert status == 0 and "no test, which for ImageNet is its validation set: --val_source" in output
    assert not stored(tmp_path / X, "test") and len(stored(tmp_path / X, "val")) > 5
    data = open_splits(lambda split: ImageSplit(str(tmp_path / X), split))
    assert sorted(data) == ["train", "val"]
    assert prepare(source=tar, dataset="y", test_fraction=0.3)[0] == 0  # asked for
    assert stored(tmp_path / "data" / "y", "test")


def test_pillows_warnings_do_not_leak(prepare, tmp_path, monkeypatch):
    open_image = prepare_imagenet.open_image

    def warn(*args):
        warnings.warn("Corrupt EXIF data", stacklevel=1)
        return open_image(*args)

    monkeypatch.setattr(prepare_imagenet, "open_image", warn)
    source = write_folder(tmp_path / "in", some_files("train"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Corrupt EXIF")
        assert prepare(source=source)[0] == 0


def test_strange_folders(prepare, tmp_path):
    files = some_files("train", "val")
    (data, *_) = files.values()
    source = write_folder(tmp_path / "a", files | {"val/kiwi/1.jpg": data})
    one_line(prepare(source=source), "val/kiwi holds val images of class 'kiwi', which train has not")
    source = write_folder(tmp_path / "b", some_files("train") | {"val/1.jpg": data})
    one_line(prepare(source=source), "holds val images of no class")
    status, output = prepare(source=source / "val")
    assert status == 2 and "no images to train on" in output
    assert "1 images are left out (in no class folder)" in output
    strange = dict.fromkeys(("test/images/1.jpg", "test/images/2.jpg", "train/1.jpg", "extra/1.jpg"), data)
    status, output = prepare(source=write_folder(tmp_path / "c", files | strange))
    assert status == 0 and "2 images are left out (test: no labels)" in output
    assert "2 images are left out (in no class folder)" in output
    assert_stored(tmp_path / X, "test", labelled(files, "val"))


@pytest.mark.parametrize("names", [("Train", "Val"), ("training", "testing"), ("val",)])
def test_splits_are_not_taken_for_classes(prepare, tmp_path, names):
    (data, *_) = some_files("train").values()
    source = write_folder(tmp_path / "a", {f"{split}/{name}/1.jpg": data for split in names for name in "ab"})
    one_line(prepare(source=source), "look like splits")


def test_links_in_a_circle_are_refused_and_odd_names_printed(prepare, tmp_path):
    (data, *_) = some_files("train").values()
    files = {f"a/{i}.jpg": data + b"%d" % i for i in range(20)}
    source = write_folder(tmp_path / "a", files | {"a/bad.jpg": b"no image"})
    os.rename(source / "a" / "bad.jpg", os.fsencode(source / "a") + b"/bad\xfe.jpg")
    status, output = prepare(source=source)
    assert status == 0 and "bad\\udcfe.jpg" in output
    os.symlink("..", source / "a" / "up")
    one_line(prepare(source=source, dataset="y"), "up links back to a folder that it is in")

# ----------------------------------------------------------------------- images

def test_every_kind_of_image_becomes_rgb(prepare, tmp_path):
    image = photo(0, (60, 40))
    alpha = image.copy()
    alpha.putalpha(100)
    kinds = {"a.jpg": encoded(image), "b.JPEG": encoded(image.convert("L")),
             "c.jpg": encoded(image.convert("CMYK")), "d.png": encoded(image, "PNG"),
             "e.png": encoded(alpha, "PNG"), "f.png": encoded(image.convert("P"), "PNG"),
             "g.gif": encoded(image.convert("P"), "GIF"), "h.webp": encoded(image, "WEBP"),
             "i.bmp": encoded(image, "BMP"), "j.tif": encoded(image, "TIFF"),
             "k.PNG": encoded(image.convert("1"), "PNG"), "l.png": encoded(image.convert("LA"), "PNG"),
             "m.jpg": encoded(image, "PNG"), "n.jpg": encoded(photo(1, (640, 20)))}
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees: stored as the file has it
    kinds["o.jpg"] = encoded(image, exif=turned)
    files = {f"{split}/{name[0]}/{name}": data for split in ("train", "test") for name, data in kinds.items()}
    assert prepare(source=write_folder(tmp_path / "in", files), val_fraction=1e-9)[0] == 0
    folder = tmp_path / X
    assert not json.loads((folder / "meta.json").read_text())["bad_images"]
    assert_stored(folder, "train", [(data, "abcdefghijklmno".index(name[0])) for name, data in kinds.items()])
    images = [pixels for pixels, _ in stored(folder, "train")]
    assert images[14].shape == (24, 36, 3) and images[13].shape == (20, 640, 3)


def test_sixteen_bits_a_channel_are_scaled_and_thirty_two_refused(prepare, tmp_path):
    grey = np.asarray(photo(0, (60, 40)).convert("L"))
    files = {"train/a/a.png": encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
             "train/a/b.tif": encoded(Image.fromarray(grey / np.float32(255)), "TIFF")}
    source = write_folder(tmp_path / "in", files)
    assert prepare(source=source, short_side=40, **NO_SPLIT)[0] == 0
    (image, _), = stored(tmp_path / X, "train")
    assert np.array_equal(image, np.repeat(grey[..., None], 3, axis=2))
    bad = json.loads((tmp_path / X / "meta.json").read_text())["bad_images"]
    assert bad == {"of 32 bits a channel": {"count": 1, "first": ["train/a/b.tif"]}}


def test_large_jpegs_are_decoded_at_a_fraction(prepare, tmp_path):
    """At 1/8, and still what decoding the whole would give, all but rounding."""
    data = encoded(PHOTO, quality=95)
    assert prepare(source=write_folder(tmp_path / "in", {"a/1.jpg": data}), **NO_SPLIT)[0] == 0
    (image, _), = stored(tmp_path / X, "train")
    decoder = Image.open(io.BytesIO(data))
    _, box = decoder.draft("RGB", (48, 48))
    assert decoder.size == (80, 54) and box == (0, 0, 80, 53.375)
    assert np.array_equal(image, np.asarray(decoder.resize((36, 24), Image.Resampling.BICUBIC, box)))
    assert np.abs(image - by_pillow(data).astype(int)).mean() < 2

# --------------------------------------------------------------- kills, restart

def run_in_child(source, **settings):
    return main_in_child(prepare_imagenet, source=str(source), data_dir=str(source.parent / "data"),
                         dataset="killed", workers=2, short_side=24, safe_interval=0.0, **settings)


@pytest.fixture
def many(tmp_path):
    """A source of 90 chunks, two of its images corrupt."""
    files = some_files("train", n=120)
    for i, name in enumerate(sorted(files)[7:300:200]):
        files[name] = files[name][:300] if i else b""
    return write_tar(tmp_path / "many.tar", files)


def test_killed_at_random_moments(prepare, tmp_path, many):
    """At least 5 times kill -9, then the same bytes as undisturbed; a file under its final name is final."""
    assert prepare(source=many, dataset="killed", data_dir=tmp_path / "whole")[0] == 0
    whole, folder = contents(tmp_path / "whole" / "killed"), tmp_path / "data" / "killed"
    assert len(whole) == 7 and len(json.loads(whole["meta.json"])["bad_images"]) == 2
    rng, killed = random.Random(time.time_ns()), 0
    while not (folder / "meta.json").exists():
        process = run_in_child(many)
        wait_for_chunks(process, folder / "part.json", rng.randint(1, 12))
        time.sleep(rng.random() * 0.01)
        process.kill()
        status = wait_for_end(process)
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        for name, data in contents(folder).items():
            assert data == whole[name], f"{name} is not what it is in the end"
    assert killed >= 5
    assert contents(folder) == whole and not list(folder.glob("*.tmp*"))


def test_sigterm_saves_and_the_next_run_goes_on(prepare, tmp_path, many):
    process = run_in_child(many)
    wait_for_chunks(process, tmp_path / "data" / "killed" / "part.json", 3)
    os.kill(process.pid, signal.SIGTERM)
    assert wait_for_end(process) == 128 + signal.SIGTERM
    assert not (tmp_path / "data" / "killed" / "meta.json").exists()
    status, output = prepare(source=many, dataset="killed")
    assert status == 0 and "going on after image" in output
    prepare(source=many, dataset="killed", data_dir=tmp_path / "whole")
    assert contents(tmp_path / "data" / "killed") == contents(tmp_path / "whole" / "killed")


def test_disk_full_costs_nothing_that_was_safe(prepare, tmp_path, many, monkeypatch):
    """An error in the middle of appending a chunk: the next run ends in the same bytes."""
    prepare(source=many, data_dir=tmp_path / "whole")
    add, calls = prepare_imagenet.Part.add, []

    def full(self, made, bad, chunk):
        calls.append(chunk)
        if len(calls) == 50:
            self.open["train.bin"].write(b"half")
            raise OSError(28, "No space left on device")
        add(self, made, bad, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_imagenet.Part, "add", full)
        status, output = prepare(source=many, safe_interval=0.05)
    assert status == 1 and "No space left on device" in output and calls == list(range(1, 51))
    assert prepare(source=many)[0] == 0
    assert contents(tmp_path / X) == contents(tmp_path / "whole" / "x")


def test_finished_is_left_alone_and_other_settings_are_refused(prepare, tmp_path, many):
    process = run_in_child(many)
    wait_for_chunks(process, tmp_path / "data" / "killed" / "part.json", 3)
    process.kill()
    wait_for_end(process)
    status, output = prepare(source=many, dataset="killed", short_side=20)
    assert status == 2 and "was made with --short_side=24, not 20" in output
    renamed = many.read_bytes().replace(b"apple_1.JPEG", b"apple_x.JPEG")
    header = renamed.index(b"apple_x.JPEG") // 512 * 512
    block = bytearray(renamed[header:header + 512])
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    good = many.read_bytes()
    many.write_bytes(renamed[:header] + bytes(block) + renamed[header + 512:])
    status, output = prepare(source=many, dataset="killed", short_side=24)
    assert status == 2 and "was made with input images=360" in output
    many.write_bytes(good)
    assert prepare(source=many, dataset="killed")[0] == 0
    many.unlink()
    status, output = prepare(source=many, dataset="killed")
    assert status == 0 and "is finished, nothing to do" in output
    one_line(prepare(source=many, dataset="killed", test_fraction=0.1), "--test_fraction=0.2, not 0.1")
    pixels = tmp_path / "data" / "killed" / "train.bin"
    pixels.write_bytes(bytes([pixels.read_bytes()[0] ^ 1]) + pixels.read_bytes()[1:])
    one_line(prepare(source=many, dataset="killed", test_fraction=0.2), "train.bin is damaged, its checksum")
    os.truncate(pixels, 10)
    missing = "train.bin holds 10 bytes, not the"
    one_line(prepare(source=many, dataset="killed", test_fraction=0.2), missing)


def test_second_process_is_refused(prepare, tmp_path):
    """As when two trainers make the digits at once."""
    with held_by_another(tmp_path / X / ".lock"):
        status, output = prepare(source="digits")
        assert status == 2 and "another process is at work on this data set" in output
    assert prepare(source="digits")[0] == 0

# -------------------------------------------------------------------- bad input

def test_bad_images_are_counted_and_named(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    good = some_files("train")
    data, png = next(iter(good.values())), encoded(photo(3), "PNG")
    bad = {"0.jpg": b"", "1.jpg": b"text", "2.jpg": data[:len(data) // 2], "3.png": png[:len(png) // 2],
           "4.jpg": data[:30], "5.jpg": b"%!PS-Adobe", "6.png": png[:60] + b"garbage" * 5 + png[95:],
           "7.png": encoded(Image.new("L", (40_000, 2)), "PNG"),
           "8.png": encoded(Image.new("L", (100, 301)), "PNG"),
           "9.png": encoded(Image.new("L", (2000, 2)), "PNG")}
    source = write_folder(tmp_path / "in", good | {f"train/apple/{name}": data for name, data in bad.items()})
    (source / "train" / "apple" / "gone.jpg").symlink_to("nowhere")
    monkeypatch.setattr(prepare_imagenet, "LONGEST", 1000)
    status, output = prepare(source=source, **NO_SPLIT)
    assert status == 0
    assert_stored(tmp_path / X, "train", labelled(good, "train"))
    found = json.loads((tmp_path / X / "meta.json").read_text())["bad_images"]
    reasons = {"empty": ["0.jpg"], "no image": ["1.jpg", "5.jpg"], "truncated": ["2.jpg", "3.png"],
               "damaged": ["4.jpg", "6.png"], "of more than 20,000 pixels": ["7.png", "8.png"],
               "longer than 1,000 pixels": ["9.png"], "that cannot be read": ["gone.jpg"]}
    assert found == {reason: {"count": len(names), "first": [f"train/apple/{name}" for name in names]}
                     for reason, names in reasons.items()}
    assert "bad images, left out: 1 empty (train/apple/0.jpg); " in output


def test_no_readable_image(prepare, tmp_path):
    source = write_folder(tmp_path / "in", {"a/1.jpg": b"", "a/2.jpg": b"x"})
    status, output = prepare(source=source)
    assert status == 2
    assert f"no images to train on in --source={source}; bad images, left out: 1 empty (a/1.jpg)" in output
    write_folder(source, {f"a/{i}.jpg": encoded(photo(i)) for i in range(9)})
    assert prepare(source=source, short_side=20)[0] == 0  # the wrong try is not in the way


def test_disk_too_small(prepare, tmp_path, monkeypatch):
    source = write_folder(tmp_path / "in", some_files("train", n=1000, classes=("apple",)))
    monkeypatch.setattr(prepare_imagenet.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_234_567))
    status, output = prepare(source=source)
    assert status == 2
    assert "GB are needed, 0.0 GB are free; another --data_dir, or a smaller --short_side" in output
    assert prepare(source=source, short_side=4)[0] == 0


@pytest.mark.parametrize("damage, words", [
    ("gz", "compressed; unpack it first"), ("xz", "compressed; unpack it first"),
    ("cut", "damaged or cut short"), ("text", "no tar"), ("empty", "no tar")])
def test_bad_tars(prepare, tmp_path, damage, words):
    path = tmp_path / "a.tar"
    if damage in ("gz", "xz"):
        write_tar(path, some_files("train"), f"w:{damage}")
    else:
        cut = write_tar(path, some_files("train")).read_bytes()[:30_000]
        path.write_bytes({"cut": cut, "text": b"text" * 999, "empty": b""}[damage])
    one_line(prepare(source=path), str(path), words)


@pytest.mark.parametrize("settings, line", [
    ({"source": "nowhere.tar"}, "no such file or folder"), ({"source": "nothing"}, "expects images (.jpeg"),
    ({"val_fraction": 0.8, "test_fraction": 0.2}, "leave some to train"),
    ({"val_fraction": -0.1}, "leave some"), ({"short_side": 0}, "expects 1 or more"),
    ({"short_side": 70_000}, "65535 at most"), ({"workers": -1}, "expects 0 or more"),
    ({"dataset": "a/b"}, "plain name")])
def test_wrong_settings(prepare, tmp_path, monkeypatch, settings, line):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "in", {"apple/1.jpg": encoded(photo(0))})
    (tmp_path / "nothing").mkdir()
    one_line(prepare(**({"source": "in"} | settings)), line)
    assert not (tmp_path / "data").exists()


def test_command_line(tmp_path):
    """As the trainer starts it."""
    command = ["-m", "scripts.prepare_imagenet", "--source=digits", "--dataset=d", f"--data_dir={tmp_path}"]
    done = subprocess.run([sys.executable, *command], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done
    assert "is finished: train 1,240 images, val 207 images, test 350 images of 10 classes" in done.stdout
