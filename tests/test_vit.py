"""The ViT against Hugging Face's and formulas; images read from disk; runs of train_vit.py against each other."""
import json
import math
import pathlib
import signal
import subprocess
import zlib

import numpy as np
import pytest
import torch
from conftest import (
    REPO,
    assert_same_weights,
    environment,
    flags,
    load,
    one_line_exit_2,
    script,
    signalled_in_step,
    torchrun,
)
from torch.nn import functional as F

import train_vit
from model import VIT_SIZES, Block, ViT, decay_groups, init_weights, load_vit, sincos2d, vit_size
from nanorank.images import RECORD, ImageSplit, centre_crops

SHAPE = {"n_classes": 5, "image_size": 32, "patch_size": 8, "n_layer": 3, "n_head": 4, "n_embd": 32}


def vit(**changes):
    model = ViT(**{**SHAPE, **changes})
    init_weights(model, 0)
    with torch.no_grad():  # biases, norms, class token and head off their initial values, so that a mix-up shows
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def images(n=3, side=32):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def hugging_face(model):
    """Hugging Face's ViTForImageClassification with our weights: its q, k, v are apart, its class token has a position."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    a = model.args
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=a["n_embd"], num_hidden_layers=a["n_layer"], num_attention_heads=a["n_head"], intermediate_size=4 * a["n_embd"],
        image_size=a["image_size"], patch_size=a["patch_size"], num_labels=a["n_classes"], layer_norm_eps=1e-5, hidden_act="gelu",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).eval()
    ours = model.state_dict()
    positions = ours.get("transformer.wpe.weight", getattr(model, "sincos2d", None))
    state = {"vit.embeddings.cls_token": ours.get("cls", torch.zeros(a["n_embd"])).view(1, 1, -1),
             "vit.embeddings.position_embeddings": F.pad(positions, (0, 0, 1, 0))[None]}
    for name in ("weight", "bias"):
        state |= {f"vit.embeddings.patch_embeddings.projection.{name}": ours[f"transformer.patch.{name}"],
                  f"vit.layernorm.{name}": ours[f"transformer.ln_f.{name}"], f"classifier.{name}": ours[f"head.{name}"]}
        for i in range(a["n_layer"]):
            mine, his = f"transformer.h.{i}", f"vit.layers.{i}"
            for part, third in zip("qkv", ours[f"{mine}.attn.c_attn.{name}"].chunk(3)):
                state[f"{his}.attention.{part}_proj.{name}"] = third
            for one, other in (("attn.c_proj", "attention.o_proj"), ("ln_1", "layernorm_before"), ("ln_2", "layernorm_after"),
                               ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                state[f"{his}.{other}.{name}"] = ours[f"{mine}.{one}.{name}"]
    theirs.load_state_dict(state)
    return theirs

# ----------------------------------------------------------------------------------------------------------------- model

@pytest.mark.parametrize("positions", ["sincos2d", "learned"])
@pytest.mark.parametrize("size, patch", [(32, 8), (28, 14), (48, 16)])
def test_class_token_logits_and_gradients_are_those_of_hugging_face(positions, size, patch):
    model = vit(pool="cls", positions=positions, image_size=size, patch_size=patch)
    theirs, x, y = hugging_face(model), images(side=size), torch.tensor([0, 3, 4])
    got, want = model(x), theirs(x).logits
    assert torch.allclose(got, want, atol=1e-5)
    F.cross_entropy(got, y).backward()
    F.cross_entropy(want, y).backward()
    his = dict(theirs.named_parameters())
    assert torch.allclose(model.transformer.patch.weight.grad, his["vit.embeddings.patch_embeddings.projection.weight"].grad, atol=1e-5)
    assert torch.allclose(model.transformer.h[1].attn.c_attn.weight.grad,
                          torch.cat([his[f"vit.layers.1.attention.{part}_proj.weight"].grad for part in "qkv"]), atol=1e-5)
    assert torch.allclose(model.cls.grad, his["vit.embeddings.cls_token"].grad.flatten(), atol=1e-5)


def test_pooled_tokens_are_those_of_hugging_face_without_its_class_token():
    """Hugging Face has no model without a class token: its layers on our tokens, then the mean."""
    model = vit()
    theirs, x = hugging_face(model), images()
    tokens = theirs.vit.embeddings(x)[:, 1:]
    for layer in theirs.vit.layers:
        tokens = layer(tokens)
    want = theirs.classifier(theirs.vit.layernorm(tokens).mean(1))
    assert torch.allclose(model(x), want, atol=1e-5)


def test_sincos_positions_are_the_formula():
    table = sincos2d(5, 16)
    for y in range(5):
        for x in range(5):
            for k in range(4):
                w = 10_000.0 ** -(k / 3)
                want = [math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)]
                assert table[5 * y + x, k::4].tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("name, parameters", [("Ti/16", 5.7e6), ("S/16", 22.0e6), ("B/32", 88.2e6), ("L/14", 304e6), ("S/32", 22.9e6)])
def test_sizes_have_their_published_numbers_of_parameters(name, parameters):
    with torch.device("meta"):
        model = ViT(1000, 224, **vit_size(name), positions="learned")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    for pool in ("gap", "cls"):
        model = vit(pool=pool)
        with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(images(2)).sum().backward()
        unused = 2 * 2 * 16 * model.transformer.patch.weight.numel()  # the gradient of the pixels, which we count and torch leaves out
        assert counter.get_total_flops() + unused == pytest.approx(2 * model.flops_per_image(), rel=1e-6)


def test_decay_groups_place_every_parameter():
    model = vit(pool="cls", positions="learned")
    groups = {g["name"]: g for g in decay_groups(model, 1.0, 2.0, 3.0)}
    assert {name: g["weight_decay"] for name, g in groups.items()} == {"attn": 1.0, "mlp": 2.0, "embed": 3.0, "none": 0.0}
    assert {id(p) for p in groups["embed"]["params"]} == {id(model.transformer.patch.weight), id(model.transformer.wpe.weight), id(model.head.weight)}
    assert any(p is model.cls for p in groups["none"]["params"]) and len(groups["attn"]["params"]) == len(groups["mlp"]["params"]) == 6


def test_initialisation():
    model = ViT(10, 224, **vit_size("S/16"), pool="cls", positions="learned")
    init_weights(model, 3)
    t = model.transformer
    assert not model.head.weight.any() and not model.cls.any() and not t.h[0].attn.c_attn.bias.any() and t.ln_f.weight.eq(1).all()
    for p, std in ((t.h[5].attn.c_attn.weight, (2 / 768)**0.5), (t.h[5].mlp.c_fc.weight, (2 / (384 * 5))**0.5),
                   (t.h[5].mlp.c_proj.weight, (2 / (384 * 5))**0.5), (t.patch.weight, 768**-0.5), (t.wpe.weight, 384**-0.5)):
        assert p.std().item() == pytest.approx(std, rel=0.02)


def test_drop_path_leaves_whole_branches_out_and_keeps_the_mean():
    torch.manual_seed(0)
    block = Block(8, 2, True, 0.0, causal=False, drop_path=0.25)
    x = torch.randn(1, 3, 8, dtype=torch.float64).expand(4000, 3, 8)
    block.double()
    attention = block.attn(block.ln_1(x[:1]))
    share = (block.branch(block.attn(block.ln_1(x))) / attention)[:, 0, 0]
    assert set(share.detach().round(decimals=6).tolist()) == {0.0, round(4 / 3, 6)} and share.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.allclose(block.eval()(x)[0], block(x[:1])[0], atol=1e-12)
    rates = [b.drop_path for b in ViT(**SHAPE, drop_path=0.2).transformer.h]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.slow
def test_compiled_is_eager():
    model, x = vit().eval(), images()
    try:
        compiled = torch.compile(model)(x)
    except Exception as error:  # no compiler on this machine
        pytest.skip(str(error).splitlines()[0])
    assert torch.allclose(compiled, model(x), atol=1e-5)


def test_checkpoints_load_and_another_size_where_positions_are_fixed():
    model = vit(positions="learned")
    checkpoint = {"model_args": model.args, "model": {f"_orig_mod.{name}": p for name, p in model.state_dict().items()}}
    assert torch.equal(load_vit(checkpoint)(images()), model(images()))
    with pytest.raises(ValueError, match="another shape"):
        load_vit(checkpoint, image_size=64)
    fixed = vit()
    larger = load_vit({"model_args": fixed.args, "model": fixed.state_dict()}, image_size=64)
    assert larger(images(side=64)).shape == (3, 5) and larger.args["image_size"] == 64
    with pytest.raises(ValueError, match="not a ViT"):
        load_vit({"model_args": {"vocab_size": 3}, "model": {}})


@pytest.mark.parametrize("changes, word", [
    ({"image_size": 30}, "multiple of patch_size=8"), ({"n_head": 5}, "n_head=5"), ({"pool": "max"}, "pool=max"),
    ({"positions": "none"}, "positions=none"), ({"n_embd": 4}, "sincos2d"), ({"n_classes": 0}, "n_classes=0")])
def test_shapes_that_cannot_be(changes, word):
    with pytest.raises(ValueError, match=word):
        ViT(**{**SHAPE, **changes})
    with pytest.raises(ValueError, match="S, B, L"):
        vit_size("XL/16")
    assert vit_size("B/14") == {"n_layer": 12, "n_head": 12, "n_embd": 768, "patch_size": 14} and set(VIT_SIZES) == {"Ti", "S", "B", "L"}
    with pytest.raises(ValueError, match="images of shape"):
        vit()(images(side=40))

# ------------------------------------------------------------------------------------------------------- images on disk

def test_rectangles_are_those_of_the_arrays(image_dir):
    folder = image_dir / "pictures"
    split = ImageSplit(str(folder), "train")
    raw, index = (folder / "train.bin").read_bytes(), np.frombuffer((folder / "train.idx").read_bytes(), dtype=RECORD)
    rng = np.random.default_rng(0)
    some = rng.integers(split.n_images, size=40)
    heights, widths = split.heights[some], split.widths[some]
    top, left = rng.integers(heights), rng.integers(widths)
    boxes = np.stack([top, left, rng.integers(1, heights - top + 1), rng.integers(1, widths - left + 1)], axis=1)
    for repeat in (1, 400):  # in this thread, and on several
        pixels, sizes = split.read(np.tile(some, repeat), np.tile(boxes, (repeat, 1)))
        assert (pixels.nbytes > 1 << 22) == (repeat > 1)
        for j in rng.permutation(40 * repeat)[:40]:
            i, (top, left, h, w) = some[j % 40], boxes[j % 40]
            shape = int(index["height"][i]), int(index["width"][i]), 3
            image = np.frombuffer(raw, np.uint8, math.prod(shape), int(index["offset"][i])).reshape(shape)
            assert np.array_equal(pixels[j, :h, :w], image[top:top + h, left:left + w]) and tuple(sizes[j]) == (h, w)


@pytest.mark.parametrize("height, width, resize, size", [
    (256, 341, 256, 224), (375, 500, 256, 224), (40, 33, 32, 32), (12, 90, 16, 14), (64, 64, 64, 64)])
def test_centre_crops_are_pillows(height, width, resize, size):
    """The whole image resized, then cut, as torchvision does it, against the piece that is read and resized alone."""
    from nanorank.augment import resize as batched
    Image = pytest.importorskip("PIL.Image")
    array = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)
    short = min(height, width)
    new = (resize, int(resize * width / height)) if height == short else (int(resize * height / width), resize)
    whole = np.asarray(image.resize(new[::-1], Image.Resampling.BILINEAR))
    top, left = (round((n - size) / 2) for n in new)
    boxes, parts = centre_crops(np.array([height]), np.array([width]), resize, size)
    y, x, h, w = boxes[0]
    assert 0 <= y and 0 <= x and y + h <= height and x + w <= width
    piece = torch.from_numpy(np.asarray(image)[y:y + h, x:x + w].copy())[None]
    got = batched(piece, torch.tensor([[h, w]]), size, boxes=torch.from_numpy(parts).float())[0].permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - whole[top:top + size, left:left + size]).max() <= 1


def test_splits_of_the_same_shapes_and_labels_are_apart(tmp_path):
    """Their indices are equal to the byte; the same pixels are refused."""
    rng, entries = np.random.default_rng(0), {}
    index = np.zeros(4, dtype=RECORD)
    index["offset"], index["height"], index["width"] = np.arange(4) * 3 * 64, 8, 8
    for split in ("train", "val"):
        files = {f"{split}.bin": rng.integers(0, 256, 4 * 3 * 64, dtype=np.uint8).tobytes(), f"{split}.idx": index.tobytes()}
        entries[split] = {"images": 4, "files": [{"name": name, "bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
                                                 for name, data in files.items()]}
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
    meta = {"kind": "images", "classes": ["a"], "short_side": 8, "mean": [0.5] * 3, "std": [0.2] * 3, "splits": entries}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert ImageSplit(str(tmp_path), "val").n_images == 4
    entries["val"]["files"][0]["crc32"] = entries["train"]["files"][0]["crc32"]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="val.bin of the val split is train.bin of train"):
        ImageSplit(str(tmp_path), "val")


def test_damaged_folders_are_refused(image_dir, tmp_path):
    import shutil
    for name, change, word in (
            ("train.bin", lambda b: b[:-1], "train.bin holds"), ("train.idx", lambda b: b[:-16], "train.idx holds"),
            ("train.idx", lambda b: b"\xff" * 16 + b[16:], "does not fit"), ("meta.json", lambda b: b[:50], "is not what prepare_imagenet.py writes"),
            ("meta.json", lambda b: b.replace(b'"images"', b'"texts"', 1), "is not what"),
            ("meta.json", lambda b: b.replace(b'"c0", ', b""), "does not fit"),
            ("meta.json", lambda b: b.replace(b'"short_side"', b'"side"'), "is not what"),
            ("meta.json", lambda b: b.replace(b'"name"', b'"n"'), "is not what"),
            ("meta.json", lambda b: b"[" * 100_000, "is not what"), ("train.bin", lambda b: None, "is missing")):
        folder = tmp_path / "pictures"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(image_dir / "pictures", folder)
        changed = change((folder / name).read_bytes())
        (folder / name).unlink() if changed is None else (folder / name).write_bytes(changed)
        with pytest.raises(ValueError, match=word):
            ImageSplit(str(folder), "train")
    with pytest.raises(ValueError, match="scripts.prepare_imagenet --source=digits"):
        ImageSplit(str(tmp_path / "digits"), "train")
    with pytest.raises(ValueError, match="no extra images"):
        ImageSplit(str(image_dir / "pictures"), "extra")

# --------------------------------------------------------------------------------------------------------------- training

TINY = {"dataset": "pictures", "image_size": 16, "eval_resize": 16, "patch_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 32, "batch_size": 4,
        "total_batch_size": 4, "max_iters": 20, "warmup_iters": 5, "eval_interval": 10, "eval_iters": 2, "rank_interval": 10, "log_interval": 5,
        "device": "cpu", "attn_wd": 1.0, "learning_rate": 3e-3, "cutmix": 1.0}


@pytest.fixture
def train(monkeypatch, image_dir):
    """train(out_dir=..., ...): train_vit.main() in this process with these settings; returns result.json or None."""
    def run(out_dir, **settings):
        with monkeypatch.context() as patch:
            for name, value in {**TINY, "data_dir": str(image_dir), "out_dir": str(out_dir), **settings}.items():
                assert hasattr(train_vit, name), name
                patch.setattr(train_vit, name, value)
            train_vit.main()
        result = pathlib.Path(out_dir) / "result.json"
        return json.loads(result.read_text()) if result.exists() else None
    return run


def lines(folder):
    return [{k: v for k, v in json.loads(line).items() if k not in ("images_per_s", "mfu")}
            for line in (folder / "log.jsonl").read_text().splitlines()]


def test_twenty_steps_are_ten_and_ten(train, tmp_path):
    """Bitwise, with drop path, dropout, accumulation and every augmentation: weights, optimizer state, log and result."""
    same = {"optimizer": "muon", "dropout": 0.1, "drop_path": 0.2, "total_batch_size": 8}
    straight = train(tmp_path / "straight", **same)
    with signalled_in_step(10), pytest.raises(SystemExit) as stop:
        train(tmp_path / "resumed", **same)
    assert stop.value.code == 128 + signal.SIGTERM and load(tmp_path / "resumed" / "ckpt.pt")["iter_num"] == 10
    resumed = train(tmp_path / "resumed", **same, init_from="resume")
    assert_same_weights(tmp_path / "straight" / "ckpt.pt", tmp_path / "resumed" / "ckpt.pt")
    a, b = (load(tmp_path / name / "ckpt.pt") for name in ("straight", "resumed"))
    assert str(a["optimizer"]) == str(b["optimizer"]) and lines(tmp_path / "straight") == lines(tmp_path / "resumed")
    for key in ("val_loss", "test_loss", "test_acc", "best_val_loss", "decay_time_constants"):
        assert straight[key] == resumed[key]


def test_two_processes_are_one(train, tmp_path, image_dir):
    """Batches, augmentation and gradients split over two gloo processes; evaluation's counts exact, though its last batch is partial:
    the val split holds 23 images, the test split 31, neither a multiple of 2 * 4."""
    settings = {"total_batch_size": 16, "learning_rate": 1e-3, "eps": 1e-5}  # gradients near 0 are rounding errors: Adam would blow them up
    one = train(tmp_path / "one", **settings, batch_size=8)
    command = [*torchrun(2), "train_vit.py", *flags(**{**TINY, **settings, "batch_size": 4, "data_dir": image_dir, "out_dir": tmp_path / "two"})]
    run = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "4 images * 2 processes * 2 micro-steps = 16" in run.stdout
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert_same_weights(tmp_path / "one" / "ckpt.pt", tmp_path / "two" / "ckpt.pt", tolerance=1e-5)
    for key in ("test_acc", "test_top5", "val_acc", "val_top5"):
        n = 31 if key.startswith("test") else 23
        assert one[key] == two[key] and (one[key] * n) % 1 == pytest.approx(0, abs=1e-9)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-4)


def test_evaluation_is_what_the_saved_model_says_image_by_image(train, tmp_path, image_dir):
    result = train(tmp_path, max_iters=3, batch_size=4, image_size=16, eval_resize=18)
    from nanorank.augment import resize
    split, model = ImageSplit(str(image_dir / "pictures"), "test"), load_vit(load(tmp_path / "ckpt.pt")).eval()
    loss, hits = 0.0, np.zeros(2)
    for i in range(split.n_images):
        boxes, parts = centre_crops(split.heights[[i]], split.widths[[i]], 18, 16)
        pixels, sizes = split.read(np.array([i]), boxes)
        x = resize(torch.from_numpy(pixels), torch.from_numpy(sizes), 16, boxes=torch.from_numpy(parts).float())
        logits, label = model(x / 127.5 - 1)[0].detach(), int(split.labels[i])
        loss += F.cross_entropy(logits, torch.tensor(label)).item()
        rank = int((logits > logits[label]).sum())
        hits += rank < 1, rank < 5
    assert result["test_loss"] == pytest.approx(loss / split.n_images, rel=1e-5)
    assert (result["test_acc"], result["test_top5"]) == tuple(hits / split.n_images)


def test_the_first_loss_is_that_of_the_augmented_batch(train, tmp_path, image_dir):
    """The zero head makes every class equally likely: ln of their number, whatever the augmentation; targets are distributions."""
    train(tmp_path, max_iters=1, log_interval=1)
    assert next(line["train_loss"] for line in lines(tmp_path) if "train_loss" in line) == pytest.approx(math.log(7), rel=1e-5)


def test_an_epoch_shows_every_image_once(train, tmp_path, image_dir, monkeypatch):
    shown, read = [], ImageSplit.read

    def noted(self, index, boxes):
        if self.n_images == 100:
            shown.extend(index.tolist())
        return read(self, index, boxes)
    monkeypatch.setattr(ImageSplit, "read", noted)
    result = train(tmp_path, max_iters=0, epochs=2.0, mixup=0.0)
    assert result["steps"] == 50 and result["images"] == 200
    assert sorted(shown[:100]) == sorted(shown[100:]) == list(range(100)) and shown[:100] != shown[100:]


def test_the_checkpoint_and_the_log(train, tmp_path):
    train(tmp_path, snapshot_steps="every:10", standardize=True)
    keys = {key for line in lines(tmp_path) for key in line}
    assert {"train_loss", "lr", "grad_norm", "val_loss", "val_acc", "val_top5", "attn_rank95_qk", "attn_rank95_ov", "norm_attn", "test_acc"} <= keys
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"} <= load(tmp_path / "ckpt.pt").keys()
    table = script("analyze.py", tmp_path, f"--out_dir={tmp_path / 'a'}", "--figure=False")
    rows = (tmp_path / "a" / "heads.csv").read_text().splitlines()
    assert table.returncode == 0 and len(rows) == 1 + 3 * 2 * 2 * 2, table.stderr  # snapshots, layers, heads, products


def test_decay_of_attention_lowers_its_rank(train, tmp_path):
    """The paper's effect, small: same data, augmentation and init, attn_wd 0 against 30."""
    ranks = {}
    for wd in (0.0, 30.0):
        result = train(tmp_path / str(wd), max_iters=60, attn_wd=wd, learning_rate=5e-3)
        ranks[wd] = [line["attn_rank95_ov"] for line in lines(tmp_path / str(wd)) if "attn_rank95_ov" in line]
    assert result["decay_time_constants"] > 3 and ranks[0.0][0] == ranks[30.0][0] and ranks[30.0][-1] < 0.8 * ranks[0.0][-1]


def test_defaults_are_the_recipes():
    """Beyer et al. 2022 as big_vision's vit_s16_i1k.py has it; its decay of 1e-4 is not multiplied by its learning rate of 1e-3, ours is."""
    published = {"total_batch_size": 1024, "epochs": 90.0, "learning_rate": 1e-3, "warmup_iters": 10_000, "min_lr": 0.0, "beta1": 0.9, "beta2": 0.999,
                 "grad_clip": 1.0, "mixup": 0.2, "cutmix": 0.0, "randaug_layers": 2, "randaug_magnitude": 10.0, "variant": "S/16", "pool": "gap",
                 "positions": "sincos2d", "image_size": 224, "eval_resize": 256, "flip": 0.5, "crop_area": 0.05, "label_smoothing": 0.0}
    assert {name: getattr(train_vit, name) for name in published} == published
    assert train_vit.attn_wd * train_vit.learning_rate == train_vit.mlp_wd * train_vit.learning_rate == pytest.approx(1e-4)
    lr = train_vit.get_lr
    assert lr(0, 111_000) == 0 and lr(10_000, 111_000) == 1e-3 and lr(111_000, 111_000) == 0 and lr(60_500, 111_000) == pytest.approx(5e-4)


@pytest.mark.parametrize("settings, words", [
    ({"dataset": "nowhere"}, ["scripts.prepare_imagenet --source=YOUR_IMAGES --dataset=nowhere"]), ({"batch_size": 3}, ["--total_batch_size=4", "3 * 1"]),
    ({"batch_size": 1}, ["--batch_size=1 must be even"]), ({"eval_resize": 8}, ["--eval_resize=8"]), ({"variant": "H/14"}, ["'H/14'"]),
    ({"patch_size": 5}, ["patch_size=5"]), ({"crop_area": 2.0}, ["--crop_area=2.0"]), ({"drop_path": 1.0}, ["--drop_path=1.0"]),
    ({"pool": "max"}, ["pool=max"]), ({"init_from": "resume"}, ["ckpt.pt"]), ({"label_smoothing": 1.0}, ["--label_smoothing=1.0"]),
    ({"max_iters": 0, "epochs": math.inf}, ["--epochs=inf"]), ({"crop_ratio": 1e200}, ["--crop_ratio=1e+200"]),
    ({"image_size": 0}, ["--image_size=0"]), ({"mixup": -1.0}, ["--mixup=-1.0"]), ({"optimizer": "lion"}, ["--optimizer=lion"]),
])
def test_wrong_settings_are_one_line_and_exit_2(train, tmp_path, capsys, settings, words):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "a", **settings)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and all(word in lines[0] for word in words), lines


def test_a_model_of_other_classes_or_kind_is_refused(train, tmp_path, capsys):
    train(tmp_path / "a", max_iters=1)
    torch.save({"model_args": {"vocab_size": 3}, "model": {}}, tmp_path / "gpt.pt")
    model = ViT(**SHAPE)
    torch.save({"model_args": model.args, "model": model.state_dict()}, tmp_path / "five.pt")
    for settings, word in (({"init_from": str(tmp_path / "gpt.pt")}, "not a ViT checkpoint"), ({"init_from": str(tmp_path / "five.pt")}, "5 classes"),
                           ({"init_from": "resume", "out_dir": tmp_path / "a", "image_size": 24}, "image_size was 16, is 24")):
        with pytest.raises(SystemExit) as stop:
            train(**{"out_dir": tmp_path / "b", "max_iters": 1, "eval_resize": 32, **settings})
        assert stop.value.code == 2 and word in capsys.readouterr().err
    train(tmp_path / "c", max_iters=0, epochs=0.05, init_from=str(tmp_path / "a"), image_size=24, eval_resize=24)  # fixed positions: another size
    assert load(tmp_path / "c" / "ckpt.pt")["model_args"]["image_size"] == 24


def test_eval_only_changes_nothing(train, tmp_path, capsys):
    result = train(tmp_path / "a", max_iters=2)
    before = (tmp_path / "a" / "ckpt.pt").read_bytes()
    train(tmp_path / "a", eval_only=True)
    assert json.loads((tmp_path / "a" / "eval.json").read_text())["test_acc"] == result["test_acc"]
    assert (tmp_path / "a" / "ckpt.pt").read_bytes() == before
    with pytest.raises(SystemExit) as stop:  # other pixels than it was trained on would give a wrong accuracy
        train(tmp_path / "a", eval_only=True, standardize=True)
    assert stop.value.code == 2 and "--standardize=False" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_config_reaches_what_it_says(tmp_path):
    """Made from scikit-learn's digits on first use; 95 % is the issue's bar."""
    run = script("train_vit.py", "config/vit_demo.py", f"--out_dir={tmp_path / 'out'}", f"--data_dir={tmp_path}")
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "out" / "result.json").read_text())["test_acc"] >= 0.95


def test_the_command_line_itself(tmp_path):
    one_line_exit_2(script("train_vit.py", "--dataset=nowhere", f"--out_dir={tmp_path}"), "scripts.prepare_imagenet --source=YOUR_IMAGES")
    one_line_exit_2(script("train_vit.py", "--atn_wd=0"), "did you mean attn_wd")
