"""
Norm growth pushes a transformer towards its saturated limit (Merrill et al. 2021): how near is each layer?

    python -m scripts.saturate out/lm/ckpt.pt         # a GPT or ViT, on the val split of its own data
    python -m scripts.saturate out/demo-0 out/demo-4  # run folders: over training, beside the parameter norm
    python -m scripts.saturate gpt2 --dataset=pile    # a Hugging Face folder (needs transformers)

The saturated model has all its parameters multiplied by a large c. Its attention is an argmax, or a mean
where scores tie. The script writes, and draws figures of,

    OUT_DIR/saturation.csv       each layer's state against the same state of the saturated model
    OUT_DIR/heads_saturated.csv  the positions that each head of the saturated model attends to
    OUT_DIR/scaling.csv          scaling curves, c = 1 ... 10: is the model homogeneous, of which degree?

A layer's state is what its block writes; "output" is what the model's head reads, after the last norm.
With norms, the residual stream has degree 3 in c (5 with gated MLPs) and attention scores have degree 4:
they reach 1e12 at c = 1000, which float32 resolves to 6e4 only, hence float64.
"""
import itertools
import math
import os

import numpy as np
import torch

from configurator import configure
from model import GPT, ViT
from nanorank.augment import resize
from nanorank.checkpoints import open_all, run_of
from nanorank.device import pick_device
from nanorank.errors import UserError, user_errors
from nanorank.files import make_folder
from nanorank.images import ImageSplit, centre_crops
from nanorank.rng import shuffled
from nanorank.saturation import exponent, open_heads, scaling
from nanorank.tables import write_csv
from nanorank.tasks import TASKS, TaskSplit
from nanorank.tokens import TokenSplit
from scripts.saturate_models import open_net, untrained
from scripts.saturate_tables import print_tables

out_dir = "out/saturation"  # folder of the CSV files and the figures
c = 1000.0                  # the saturated model's parameters are multiplied by this; Merrill et al.: 1000
# data
dataset = ""                # data/NAME; empty: the checkpoint's own, random tokens for Hugging Face's
data_dir = ""               # folder of NAME; empty: the checkpoint's own, or data
split = "val"               # train, val or test
samples = 32                # sequences or images, drawn by seed, the same for every checkpoint
batch_size = 4              # sequences or images at a time; states and attention take memory
block_size = 0              # tokens in a sequence; 0: the model's context, 256 at most for Hugging Face's
seed = 1337                 # of samples and of fresh initialisations
# measurements
reinit = True               # measure the freshly initialised model too, once a run
curves = True               # write scaling.csv: each run's last checkpoint, and untrained models
heads = True                # write heads_saturated.csv
tie = 0.5                   # positions with at least this share of the largest weight count as attended
fixed_positions = False     # multiply a ViT's sincos2d positions too, which are no parameters
# system
device = "auto"             # auto, cpu, cuda, mps
dtype = "auto"              # float64, float32 (half the memory, loses near ties); auto: float64, mps float32
figure = True               # draw the figures (needs matplotlib)

CURVE = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)  # c of scaling.csv

# -------------------------------------------------------------------------------------------- data

def open_batches(path, net, device, dtype):
    """The inputs of a model, a list of batches, and a line about them. UserError where data do not fit."""
    name = dataset or net.config.get("dataset")
    T = min(block_size or net.block_size, net.block_size)
    if name and isinstance(name, str):
        folder = data_folder(name, net.config.get("data_dir"))
        if not net.vocab_size:
            return open_images(net, folder, device, dtype)
        tokens, about = read_text(path, net, name, folder, T)
    elif isinstance(net.model, (GPT, ViT)):
        raise UserError(f"{path} does not say what it was trained on: "
                        f"give --dataset=NAME (a folder in --data_dir={data_dir or 'data'})")
    else:
        tokens = np.random.default_rng(seed).integers(net.vocab_size, size=(samples, T))
        about = f"{samples} x {T} random tokens of its {net.vocab_size:,}"
    return torch.from_numpy(tokens).to(device).split(batch_size), about


def data_folder(name, of_checkpoint):
    """The folder of a data set: in --data_dir, or where the checkpoint's run had it, or in data."""
    if not data_dir and isinstance(of_checkpoint, str):
        folder = os.path.join(of_checkpoint, name)
        if os.path.isdir(folder):
            return folder
    return os.path.join(data_dir or "data", name)


def read_text(path, net, name, folder, T):
    """Tokens (samples, T) int64 of a data folder or a synthetic task, and a line about them."""
    text = TaskSplit(name, split, T) if name in TASKS else TokenSplit(folder, split, T)
    vocab_size = text.meta["vocab_size"]
    padded = isinstance(net.model, GPT)  # our embeddings may have more rows than the vocabulary
    if vocab_size > net.vocab_size or (vocab_size < net.vocab_size and not padded):
        raise UserError(f"{path} has a vocabulary of {net.vocab_size:,}, "
                        f"{folder} one of {vocab_size:,} ({text.meta['tokenizer']}): "
                        "give a --dataset of the model's own tokenizer")
    if not text.n_windows:
        raise UserError(f"{folder}: no file of its {split} split holds block_size + 1 = {T + 1} tokens; "
                        "lower --block_size")
    index = shuffled(text.n_windows, seed, 0, min(samples, text.n_windows))
    x = text.rows(index)[0] if name in TASKS else text.windows(index)[:, :-1]
    return np.ascontiguousarray(x), f"{len(index)} x {T} tokens of {folder}, {split}"


def open_images(net, folder, device, dtype):
    """Batches (B, 3, H, W) of images, cropped and scaled as train_vit.py does for evaluation."""
    images = ImageSplit(folder, split)
    side = net.model.args["image_size"]
    short = net.config.get("eval_resize")
    if type(short) is not int or not side <= short < 2**14:
        short = side
    mean, std = 127.5, 127.5
    if net.config.get("standardize"):
        mean = torch.tensor(images.meta["mean"], device=device).view(3, 1, 1) * 255
        std = torch.tensor(images.meta["std"], device=device).view(3, 1, 1) * 255
    index = shuffled(images.n_images, seed, 0, min(samples, images.n_images))
    batches = []
    for start in range(0, len(index), batch_size):
        rows = index[start:start + batch_size]
        boxes, parts = centre_crops(images.heights[rows], images.widths[rows], short, side)
        pixels, sizes = images.read(rows, boxes)
        x = resize(torch.from_numpy(pixels).to(device), sizes, side, boxes=parts.astype(np.float32))
        batches.append(((x - mean) / std).to(dtype))
    return batches, f"{len(index)} images of {folder}, {split}, {net.block_size} tokens each"

# -------------------------------------------------------------------------------------------- rows

def layer_names(net):
    return [*range(len(net.blocks)), "output"]


def saturation_rows(key, net, batches, on_attention=None):
    """The rows of saturation.csv of one model; key: checkpoint, step, init."""
    table = scaling(net, batches, [c], on_attention=on_attention)[c]
    norms = [float(torch.linalg.vector_norm(p)) for p in net.model.parameters() if p.ndim]
    rows = []
    for layer, (cosine, log_ratio, _) in zip(layer_names(net), table):
        rows.append({**key, "layer": layer, "c": c, "cosine": cosine, "norm_ratio": math.exp(log_ratio),
                     "param_norm": math.hypot(*norms)})
    return rows


def scaling_rows(key, net, batches):
    """The rows of scaling.csv of one model; key: checkpoint, step, init."""
    key = {**key, "norm": "", "bias": ""}  # unknown for models that are not ours
    if isinstance(net.model, (GPT, ViT)):
        key["norm"] = "post" if net.model.args.get("post_norm") else "pre"
        key["bias"] = bool(net.model.args["bias"])
    curve = scaling(net, batches, CURVE, reference=c)
    rows = []
    for i, layer in enumerate(layer_names(net)):
        k = exponent(curve, i)
        for factor, table in curve.items():
            cosine, log_ratio, cosine_saturated = table[i]
            rows.append({**key, "layer": layer, "c": factor, "cosine_saturated": cosine_saturated,
                         "cosine": cosine, "norm_ratio": math.exp(log_ratio), "k": k})
    return rows


def measure(tables, key, net, batches, last, with_untrained):
    """Adds the rows of a checkpoint to the tables; key: checkpoint, step.

    last: the checkpoint is the last of its run. with_untrained: fresh GPTs of its shape are measured too.
    """
    found = open_heads(net, batches[0], tie) if heads else None
    trained = {**key, "init": "trained"}
    tables["saturation.csv"] += saturation_rows(trained, net, batches, found and found.add)
    if found:
        tables["heads_saturated.csv"] += found.rows(key)
    if not last:
        return
    random = {**key, "init": "random"}
    if reinit:
        tables["saturation.csv"] += saturation_rows(random, net.fresh(), batches)
    if curves:
        tables["scaling.csv"] += scaling_rows(trained, net, batches)
        if not isinstance(net.model, GPT):
            tables["scaling.csv"] += scaling_rows(random, net.fresh(), batches)
    if with_untrained:
        for post_norm, bias in itertools.product((False, True), repeat=2):
            fresh = untrained(net, post_norm, bias, seed)
            tables["scaling.csv"] += scaling_rows({**key, "init": "untrained"}, fresh, batches)

# -------------------------------------------------------------------------------------------- main

def check_settings(paths):
    if not paths:
        raise UserError("which checkpoint? e.g. python -m scripts.saturate out/lm/ckpt.pt; see --help")
    if min(samples, batch_size) < 1 or min(block_size, seed) < 0:
        raise UserError(f"--samples={samples} --batch_size={batch_size} must be at least 1, "
                        f"--block_size={block_size} --seed={seed} not negative")
    if not 1 < c <= 1e6:
        raise UserError(f"--c={c:g}: expects a factor above 1, 1e6 at most")
    if not 0 < tie <= 1:
        raise UserError(f"--tie={tie:g}: expects a share of the largest weight, above 0, 1 at most")
    if dtype not in ("auto", "float32", "float64"):
        raise UserError(f"--dtype={dtype}: expects auto, float64 or float32 (16 bits are too few)")
    if split not in ("train", "val", "test"):
        raise UserError(f"--split={split}: expects train, val or test")
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")


def main(paths):
    check_settings(paths)
    torch_device = pick_device(device)
    float_dtype = torch.float64
    if dtype == "float32" or (dtype == "auto" and torch_device.type == "mps"):
        float_dtype = torch.float32
    make_folder(out_dir)

    ckpts = [(ckpt.path, ckpt.step) for ckpt in open_all(paths)]
    last_of_run = {run_of(path): path for path, _ in ckpts}
    tables = {"saturation.csv": [], "heads_saturated.csv": [], "scaling.csv": []}
    described = ""
    shapes = []  # (model arguments, data) whose untrained models are measured already
    for path, step in ckpts:
        net = open_net(path, torch_device, float_dtype, seed, fixed_positions)
        batches, about = open_batches(path, net, torch_device, float_dtype)
        description = f"{net.name}, {len(net.blocks)} blocks, on {about}; {float_dtype}, {torch_device}"
        if description != described:
            described = description
            print(f"{path}: {described}", flush=True)
        last = path == last_of_run[run_of(path)]
        with_untrained = False
        if last and curves and isinstance(net.model, GPT):
            with_untrained = (net.model.args, about) not in shapes
            shapes.append((net.model.args, about))
        try:
            measure(tables, {"checkpoint": path, "step": step}, net, batches, last, with_untrained)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    print_tables(tables, c)
    written = [name for name in tables if tables[name]]
    for name in written:
        print(f"wrote {write_csv(os.path.join(out_dir, name), tables[name])} ({len(tables[name]):,} rows)")
    if figure:
        from nanorank.figures import saturation as figures
        print("figures: " + ", ".join(figures.saturated(out_dir, written)))


if __name__ == "__main__":
    paths = configure(globals(), positional="CKPT [CKPT ...]")
    with user_errors("saturate.py"):
        main(paths)
