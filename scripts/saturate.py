"""
Norm growth pushes a transformer towards its saturated limit (Merrill et al. 2021): how near is each layer?

    python -m scripts.saturate out/lm/ckpt.pt         # a GPT or ViT, on the val split of its own data
    python -m scripts.saturate out/demo-0 out/demo-4  # run folders: over training, beside the parameter norm
    python -m scripts.saturate gpt2 --dataset=pile    # a Hugging Face folder (needs transformers)
    python -m scripts.saturate out/lm/ckpt.pt --curves=False --c=100

The saturated model has all its parameters multiplied by a large c. Its attention is an argmax, or a
mean where scores tie, and its gelu is a relu. The script writes, and draws figures of,

    OUT_DIR/saturation.csv       each layer's state against the same state of the saturated model
    OUT_DIR/heads_saturated.csv  the positions that each head of the saturated model attends to
    OUT_DIR/scaling.csv          scaling curves, c = 1 ... 10: is the model homogeneous, of which degree?

A layer's state is what its block writes; "output" is what the model's head reads, after the last norm.

Numbers grow fast. With norms, the residual stream has degree 3 in c (5 with gated MLPs) and the
attention scores have degree 4: they reach 1e12 at c = 1000. float32 resolves these to 6e4 only, hence
float64. Without norms the degree grows by about 4 a block, and float64 holds 25 blocks at c = 1000.
States that are too large are refused.
"""
import functools
import itertools
import math
import os

import numpy as np
import torch
from tqdm import tqdm

from configurator import configure
from model import GPT, ViT
from nanorank.augment import resize
from nanorank.checkpoints import open_all, run_of
from nanorank.device import pick_device
from nanorank.errors import UserError, user_errors
from nanorank.images import ImageSplit, centre_crops
from nanorank.rng import shuffled
from nanorank.saturation import exponent, open_heads, scaling
from nanorank.tables import write_csv
from nanorank.tasks import TASKS, TaskSplit
from nanorank.tokens import TokenSplit
from scripts.saturate_models import open_net, untrained
from scripts.saturate_tables import print_heads, print_saturation, print_scaling

out_dir = "out/saturation"  # folder of the CSV files and the figures
c = 1000.0                  # the saturated model's parameters are multiplied by this; Merrill et al.: 1000
# data
dataset = ""                # data/NAME; empty: the checkpoint's own, random tokens for Hugging Face's
data_dir = "data"           # folder of NAME
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

class Batches:
    """A sequence of batches, read when it is indexed. read(rows): the inputs (len(rows), ...) of these."""

    def __init__(self, n, read, about):
        self.n = n
        self.read = read
        self.about = about  # for messages

    def __len__(self):
        return math.ceil(self.n / batch_size)

    def __getitem__(self, i):
        start = i * batch_size
        return self.read(np.arange(start, min(self.n, start + batch_size)))


def open_batches(path, net, device, dtype):
    """The Batches of a model, a function of data and settings. Raises UserError where they do not fit."""
    name = dataset or net.config.get("dataset")
    if isinstance(name, str) and name:
        folder = os.path.join(data_dir, name)
        if net.vocab_size:
            return open_text(path, net, name, folder, device)
        return open_images(net, folder, device, dtype)
    if isinstance(net.model, (GPT, ViT)):
        raise UserError(f"{path} does not say what it was trained on: "
                        f"give --dataset=NAME (a folder in --data_dir={data_dir})")

    T = min(block_size or net.block_size, net.block_size)
    tokens = np.random.default_rng(seed).integers(net.vocab_size, size=(samples, T))
    about = f"{samples} x {T} random tokens of its {net.vocab_size:,}"
    return Batches(samples, lambda rows: torch.from_numpy(tokens[rows]).to(device), about)


def open_text(path, net, name, folder, device):
    """Batches of tokens (B, T) int64, from a data folder or a synthetic task."""
    T = min(block_size or net.block_size, net.block_size)
    text = TaskSplit(name, split, T) if name in TASKS else TokenSplit(folder, split, T)
    vocab_size = text.meta["vocab_size"]
    padded = isinstance(net.model, GPT)  # our embeddings may have more rows than the vocabulary
    if vocab_size > net.vocab_size or (vocab_size < net.vocab_size and not padded):
        fix = "give a --dataset of the model's own tokenizer"
        if not padded:
            fix += ", or none for random tokens"
        raise UserError(f"{path} has a vocabulary of {net.vocab_size:,}, "
                        f"{folder} one of {vocab_size:,} ({text.meta['tokenizer']}): {fix}")
    if not text.n_windows:
        raise UserError(f"{folder}: no file of its {split} split holds block_size + 1 = {T + 1} tokens; "
                        "lower --block_size")
    index = shuffled(text.n_windows, seed, 0, min(samples, text.n_windows))

    def read(rows):
        if name in TASKS:
            x, _ = text.rows(index[rows])
        else:
            x = text.windows(index[rows])[:, :-1]
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    return Batches(len(index), read, f"{len(index)} x {T} tokens of {folder}, {split}")


def open_images(net, folder, device, dtype):
    """Batches of images (B, 3, H, W), cropped and scaled as train_vit.py does for evaluation."""
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

    def read(rows):
        numbers = index[rows]
        boxes, parts = centre_crops(images.heights[numbers], images.widths[numbers], short, side)
        pixels, sizes = images.read(numbers, boxes)
        x = resize(torch.from_numpy(pixels).to(device), sizes, side, boxes=parts.astype(np.float32))
        return ((x - mean) / std).to(dtype)

    about = f"{len(index)} images of {folder}, {split}, {net.block_size} tokens each"
    return Batches(len(index), read, about)

# -------------------------------------------------------------------------------------------- rows

def saturation_rows(key, net, batches, on_attention=None, advance=lambda share: None):
    """The rows of saturation.csv of one model; key: checkpoint, step, init."""
    table = scaling(net, batches, [c], on_attention=on_attention, advance=advance)[c]
    norms = [float(torch.linalg.vector_norm(p)) for p in net.model.parameters() if p.ndim]
    param_norm = math.hypot(*norms)
    rows = []
    for layer, (cosine, log_ratio, _) in enumerate(table):
        rows.append({
            **key,
            "layer": layer_name(net, layer),
            "c": c,
            "cosine": cosine,
            "norm_ratio": math.exp(log_ratio),
            "param_norm": param_norm,
        })
    return rows


def scaling_rows(key, net, batches, advance=lambda share: None):
    """The rows of scaling.csv of one model; key: checkpoint, step, init."""
    norm, bias = "", ""  # unknown for models that are not ours
    if isinstance(net.model, (GPT, ViT)):
        norm = "post" if net.model.args.get("post_norm") else "pre"
        bias = bool(net.model.args["bias"])
    curve = scaling(net, batches, CURVE, reference=c, advance=advance)
    rows = []
    for layer in range(len(net.blocks) + 1):
        k = exponent(curve, layer)
        for factor, table in curve.items():
            cosine, log_ratio, cosine_saturated = table[layer]
            rows.append({
                **key,
                "norm": norm,
                "bias": bias,
                "layer": layer_name(net, layer),
                "c": factor,
                "cosine_saturated": cosine_saturated,
                "cosine": cosine,
                "norm_ratio": math.exp(log_ratio),
                "k": k,
            })
    return rows


def layer_name(net, layer):
    return layer if layer < len(net.blocks) else "output"

# -------------------------------------------------------------------------------------------- main

def check_settings(paths):
    """Raises UserError that names the setting, its value and the fix."""
    if not paths:
        raise UserError("which checkpoint? e.g. python -m scripts.saturate out/lm/ckpt.pt; see --help")
    for name in ("samples", "batch_size"):
        if globals()[name] < 1:
            raise UserError(f"--{name}={globals()[name]} must be at least 1")
    for name in ("block_size", "seed"):
        if globals()[name] < 0:
            raise UserError(f"--{name}={globals()[name]} must not be negative")
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


def measurements(net, last, with_untrained):
    """The measurements of a checkpoint: a list of (CSV file, init, function that returns the Net).

    last: the checkpoint is the last of its run. with_untrained: fresh GPTs of its shape are measured too.
    """
    fresh = functools.cache(net.fresh)
    todo = [("saturation.csv", "trained", lambda: net)]
    if last and reinit:
        todo.append(("saturation.csv", "random", fresh))
    if last and curves:
        todo.append(("scaling.csv", "trained", lambda: net))
        if not isinstance(net.model, GPT):
            todo.append(("scaling.csv", "random", fresh))
    if with_untrained:
        for post_norm, bias in itertools.product((False, True), repeat=2):
            make = functools.partial(untrained, net, post_norm, bias, seed)
            todo.append(("scaling.csv", "untrained", make))
    return todo


def main(paths):
    """Returns {file name: rows}."""
    check_settings(paths)
    torch_device = pick_device(device)
    float_dtype = torch.float64
    if dtype == "float32" or (dtype == "auto" and torch_device.type == "mps"):
        float_dtype = torch.float32
    os.makedirs(out_dir, exist_ok=True)

    ckpts = [(ckpt.path, ckpt.step) for ckpt in open_all(paths)]
    last_of_run = {run_of(path): path for path, _ in ckpts}
    tables = {"saturation.csv": [], "heads_saturated.csv": [], "scaling.csv": []}
    described = set()
    shapes = []  # (model arguments, data) whose untrained models are measured already
    bar = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=len(ckpts), disable=None, smoothing=0, bar_format=bar) as progress:
        for path, step in ckpts:
            progress.set_description(os.path.basename(path))
            net = open_net(path, torch_device, float_dtype, seed, fixed_positions)
            batches = open_batches(path, net, torch_device, float_dtype)
            if (net.name, batches.about) not in described:
                described.add((net.name, batches.about))
                print(f"{path}: {net.name}, {len(net.blocks)} blocks, "
                      f"on {batches.about}; {float_dtype}, {torch_device}", flush=True)

            last = path == last_of_run[run_of(path)]
            with_untrained = False
            if last and curves and isinstance(net.model, GPT):
                shape = (net.model.args, batches.about)
                with_untrained = shape not in shapes
                shapes.append(shape)
            todo = measurements(net, last, with_untrained)

            n_parts = len(todo)

            def advance(share, n_parts=n_parts):
                progress.update(share / n_parts)

            try:
                found = open_heads(net, batches[0], tie) if heads else None
                for name, init, make in todo:
                    key = {"checkpoint": path, "step": step, "init": init}
                    if name == "scaling.csv":
                        tables[name] += scaling_rows(key, make(), batches, advance)
                        continue
                    watch = found.add if found and init == "trained" else None
                    tables[name] += saturation_rows(key, make(), batches, watch, advance)
                if found:
                    tables["heads_saturated.csv"] += found.rows({"checkpoint": path, "step": step})
            except UserError as error:
                raise UserError(f"{path}: {error}") from None

    tables = {name: rows for name, rows in tables.items() if rows}
    print_saturation(tables["saturation.csv"], c)
    if "heads_saturated.csv" in tables:
        print_heads(tables["heads_saturated.csv"], c)
    if "scaling.csv" in tables:
        print_scaling(tables["scaling.csv"], c)
    written = []
    for name, rows in tables.items():
        csv_path = write_csv(os.path.join(out_dir, name), rows)
        written.append(f"{csv_path} ({len(rows):,} rows)")
    print("\nwrote " + ", ".join(written))
    if figure:
        from nanorank.figures import saturation as figures
        print("figures: " + ", ".join(figures.saturated(out_dir, list(tables))))
    return tables


if __name__ == "__main__":
    paths = configure(globals(), positional="CKPT [CKPT ...]")
    with user_errors("saturate.py"):
        main(paths)
