"""
What norm growth does to a transformer's function: saturation of its layers, homogeneity, and what heads become (P2, sections N4 to N6).

    python -m scripts.saturate out/lm/ckpt.pt                         # a GPT or ViT of ours, nanoGPT's too, on the val split it was trained with
    python -m scripts.saturate out/demo-0 out/demo-4                  # run folders: saturation over training beside the parameter norm
    python -m scripts.saturate gpt2 --dataset=pile                    # a Hugging Face folder (needs transformers); without --dataset random tokens
    python -m scripts.saturate out/lm/ckpt.pt --curves=False --c=100

All parameters times c is what a norm grown c-fold amounts to: attention becomes an argmax, or a mean where scores tie, gelu becomes relu. Writes
OUT_DIR/saturation.csv (each block's hidden state against its counterpart under all parameters x c, trained and freshly initialised),
heads_saturated.csv (what each head of the scaled model attends to), scaling.csv (c = 1 ... 10: approximate homogeneity and its exponent) and
figures of them. A layer is what a block writes; "output" is what the head reads, behind the last norm.

What can overflow: with norms the scaled residual stream is of degree 3 in c (values and projection, or both MLP matrices, on a norm's output
of degree 1; 5 with gated MLPs), scores of degree 4 (queries and keys 2 each): 1e15 and 1e12 at c = 1000. float32 holds both, and squares
inside norms up to 1e38, but resolves scores of 1e12 to 6e4 only, and fused attention kernels subtract a maximum that was rounded
otherwise. So: float64, a plain softmax (each score minus the exact largest one), and a check of every state; without norms the degree grows by
some 4 a block, which float64 holds for about 25 blocks at c = 1000, and what it does not hold is refused, never NaN.
"""
import contextlib
import copy
import csv
import io
import itertools
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from configurator import configure
from model import GPT, ViT, init_weights, load_gpt, load_vit
from nanorank.augment import resize
from nanorank.checkpoints import open_all, run_of
from nanorank.device import init_dist
from nanorank.errors import UserError, user_errors
from nanorank.files import load_pt, write_atomic
from nanorank.images import ImageSplit, centre_crops
from nanorank.rng import hash64, shuffled
from nanorank.tasks import TASKS, TaskSplit
from nanorank.tokens import TokenSplit

out_dir = "out/saturation"  # where the CSV files and the figures go
c = 1000.0                  # all parameters times this are the saturated model; P2: 1000
dataset = ""                # data/NAME; empty: what a checkpoint of ours was trained on, random tokens for Hugging Face's
data_dir = "data"           # where NAME is
split = "val"               # train, val or test
samples = 32                # sequences or images, drawn by seed, the same for every checkpoint
batch_size = 4              # of them at a time: the memory that states and attention take
block_size = 0              # tokens in a sequence; 0: the model's context, 256 at most for Hugging Face's
seed = 1337                 # of samples and of fresh initialisations
fixed_positions = False     # True: a ViT's sincos2d positions are multiplied too; they are no parameters, and vanish beside embeddings that are
reinit = True               # the same for the model freshly initialised, once a run
curves = True               # scaling.csv: each run's last checkpoint, and fresh models (of GPTs: pre- and post-norm, without and with biases)
heads = True                # heads_saturated.csv
tie = 0.5                   # attended: weights of at least this share of the largest; at c = 1000 scores that were within 1e-12 before scaling
device = "auto"             # auto, cpu, cuda, mps
dtype = "auto"              # float64, float32 (half the memory, near ties are lost to rounding); auto: float64 but for mps, which has none
figure = True               # draw the figures (needs matplotlib)

CURVE = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)  # c of the scaling curves
FEW, MANY = 0.1, 0.5  # a query attends to few positions: one, or up to this share of those it may; to many: this share at least (and two)
MOST = 0.9  # a head is argmax or mean where this share of its queries attends to few or to many

# ----------------------------------------------------------------------------------------------------------------- models

class Net(NamedTuple):
    """A model to be measured. run(batch, see): its output (B, T, d), what the head reads, calling see(layer, weights (B, H, T, T)) for each
    attention layer where see is given; blocks: the modules whose outputs are the layers; limit: what a hidden state must stay below;
    fresh(): the same, newly initialised; tokens: its vocabulary, 0 for images; T: its longest sequence; about: what it was read as."""
    model: nn.Module
    run: Callable
    blocks: nn.ModuleList
    limit: float
    fresh: Callable
    config: dict
    tokens: int
    T: int
    about: str


def our_net(model, config, device, dtype):
    """A Net of a GPT or ViT; config: its run's settings."""
    model = model.to(device, dtype).eval().requires_grad_(False)
    kind, args = type(model), model.args

    def run(batch, see=None):
        with contextlib.ExitStack() as stack:
            for layer, block in enumerate(model.transformer.h if see else ()):
                hook = block.attn.c_attn.register_forward_hook(lambda _, __, qkv, layer=layer, attn=block.attn: see(layer, weights_of(attn, qkv)))
                stack.callback(hook.remove)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            return model.hidden(batch)

    def fresh():
        new = kind(**args)
        init_weights(new, seed)
        return our_net(new, config, device, dtype)

    limit = (torch.finfo(dtype).max / args["n_embd"])**0.5  # beyond it the squares in a norm overflow, and what it returns is 0, not NaN
    T = args["block_size"] if kind is GPT else (args["image_size"] // args["patch_size"])**2 + (args["pool"] == "cls")
    return Net(model, run, model.transformer.h, limit, fresh, config, args["vocab_size"] if kind is GPT else 0, T, f"{kind.__name__} of ours")


def weights_of(attention, qkv):
    """Attention weights (B, H, T, T) from what an Attention's c_attn returned, (B, T, 3 n_embd)."""
    B, T, _ = qkv.shape
    q, k, _ = qkv.view(B, T, 3, attention.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, r) each
    scores = q @ k.mT * q.shape[-1]**-0.5
    if attention.causal:
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), -math.inf)
    return scores.softmax(-1)  # softmax subtracts the very numbers that it exponentiates: the largest weight is never lost


def hugging_face_net(path, device, dtype):
    """A Net of a Hugging Face folder, of encoder-decoder models the encoder. Raises UserError naming the folder."""
    try:
        import transformers
    except ImportError:
        raise UserError(f"{path}: a Hugging Face model needs transformers: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        whole = transformers.AutoModel.from_pretrained(path, dtype=dtype, attn_implementation="eager", local_files_only=True)
    except Exception as error:  # transformers has dozens of kinds
        raise UserError(f"{path}: transformers cannot load it: {(str(error).splitlines() or [type(error).__name__])[0][:200]}") from None
    return wrap_hugging_face(whole, path, device, dtype)


def wrap_hugging_face(whole, path, device, dtype):
    """A Net of a transformers model with eager attention."""
    from transformers import AutoModel
    settings = whole.config
    model = (whole.get_encoder() if getattr(settings, "is_encoder_decoder", False) else whole).to(device, dtype).eval().requires_grad_(False)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == getattr(settings, "num_hidden_layers", -1)]
    if not lists or not isinstance(getattr(settings, "vocab_size", None), int):
        raise UserError(f"{path}: {type(model).__name__} has no list of num_hidden_layers blocks over tokens; text models are what is measured")

    def run(batch, see=None):
        out = model(input_ids=batch, output_attentions=see is not None, **no_cache)
        attentions = out.attentions if see else ()
        if see and (attentions is None or len(attentions) != len(lists[0])):
            raise UserError(f"{path}: {type(model).__name__} does not return its attention weights; --heads=False measures the rest")
        for layer, weights in enumerate(attentions):
            see(layer, weights)
        return out.last_hidden_state

    def fresh():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            new = AutoModel.from_config(copy.deepcopy(settings), attn_implementation="eager")
        return wrap_hugging_face(new, path, device, dtype)

    no_cache = {"use_cache": False} if model is whole and getattr(settings, "use_cache", False) else {}
    T = min(256, getattr(settings, "max_position_embeddings", None) or 256)
    limit = (torch.finfo(torch.float32).max / settings.hidden_size)**0.5  # RMS norms square in float32 whatever the model is in
    return Net(model, run, lists[0], limit, fresh, {}, settings.vocab_size, T, f"{type(model).__name__} of transformers")


def open_net(path, device, dtype):
    """The Net of a checkpoint: a Hugging Face folder, or a file of ours or nanoGPT's. Raises UserError naming it."""
    if os.path.isdir(path):
        return hugging_face_net(path, device, dtype)
    if path.endswith(".safetensors"):
        raise UserError(f"{path}: the weights alone; give the Hugging Face folder, with its config.json")
    checkpoint = load_pt(path, mmap=True)
    args = checkpoint.get("model_args") if isinstance(checkpoint, dict) else None
    if not isinstance(args, dict):
        raise UserError(f"{path}: no model_args in it; what is measured are GPTs and ViTs of ours, nanoGPT's, and Hugging Face folders")
    try:
        model = (load_vit if "patch_size" in args else load_gpt)(checkpoint)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    config = checkpoint.get("config")
    return our_net(model, config if isinstance(config, dict) else {}, device, dtype)

# ------------------------------------------------------------------------------------------------------------------- data

def open_batches(path, net, device, dtype):
    """(number of batches, read(i) -> batch i on the device, what the data is): a pure function of data, seed and settings.
    Raises UserError where the data does not fit the model."""
    name = dataset or net.config.get("dataset")
    name = name if isinstance(name, str) else ""
    T = min(block_size or net.T, net.T)
    if not name:
        if "transformers" not in net.about:
            raise UserError(f"{path} does not say what it was trained on: --dataset=NAME (a folder in --data_dir={data_dir})")
        numbers = np.random.default_rng(seed).integers(net.tokens, size=(samples, T))
        return batched(samples, lambda some: torch.from_numpy(numbers[some]).to(device), f"{samples} x {T} random tokens of its {net.tokens:,}")
    folder = os.path.join(data_dir, name)
    if not net.tokens:
        images = ImageSplit(folder, split)
        side, short = net.model.args["image_size"], net.config.get("eval_resize")
        short = short if type(short) is int and side <= short < 2**14 else side
        index = shuffled(images.n_images, seed, 0, min(samples, images.n_images))

        def read(some):
            rows = index[some]
            boxes, parts = centre_crops(images.heights[rows], images.widths[rows], short, side)
            pixels, sizes = images.read(rows, boxes)
            x = resize(torch.from_numpy(pixels).to(device), sizes, side, boxes=parts.astype(np.float32))
            mean, std = ((torch.tensor(images.meta[key], device=device).view(3, 1, 1) * 255 for key in ("mean", "std"))
                         if net.config.get("standardize") else (127.5, 127.5))  # as train_vit.py scales them
            return ((x - mean) / std).to(dtype)
        return batched(len(index), read, f"{len(index)} images of {folder}, {split}, {net.T} tokens each")
    text = TaskSplit(name, split, T) if name in TASKS else TokenSplit(folder, split, T)
    vocabulary = text.meta["vocab_size"]
    if vocabulary > net.tokens or ("transformers" in net.about and vocabulary != net.tokens):
        raise UserError(f"{path} has a vocabulary of {net.tokens:,}, {folder} one of {vocabulary:,} ({text.meta['tokenizer']}): "
                         "give a --dataset of the model's own tokenizer" + ", or none for random tokens" * ("transformers" in net.about))
    if not text.n_windows:
        raise UserError(f"{folder}: no file of its {split} split holds block_size + 1 = {T + 1} tokens; lower --block_size")
    index = shuffled(text.n_windows, seed, 0, min(samples, text.n_windows))
    rows = text.rows if name in TASKS else (lambda some: (text.windows(some)[:, :-1],))
    return batched(len(index), lambda some: torch.from_numpy(np.ascontiguousarray(rows(index[some])[0])).to(device),
                   f"{len(index)} x {T} tokens of {folder}, {split}")


def batched(n, read, about):
    return -(-n // batch_size), lambda i: read(slice(i * batch_size, min(n, (i + 1) * batch_size))), about

# ------------------------------------------------------------------------------------------------------------- saturation

@contextlib.contextmanager
def scaled(model, factor):
    """All parameters of the model times `factor` inside: norms and biases too, tied weights once; with --fixed_positions a ViT's too.
    Afterwards they are to the bit what they were."""
    parameters = list(model.parameters())  # what is tied stands in it once
    parameters += [x for name, x in model.named_buffers() if fixed_positions and name == "sincos2d"]
    kept = [p.data for p in parameters]
    try:
        for p in parameters:
            p.data = p.data * factor
        yield model
    finally:
        for p, data in zip(parameters, kept):
            p.data = data


def states(net, batch, factor=1.0, see=None):
    """Hidden states of a batch under all parameters x factor: [(B, T, d) of each block, then the output]. Raises UserError that names the
    layer where one is too large for its norms, or not finite."""
    found = []

    def keep(module, inputs, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as stack:
        for block in net.blocks:
            stack.callback(block.register_forward_hook(keep).remove)
        stack.enter_context(scaled(net.model, factor))
        stack.enter_context(torch.no_grad())
        found.append(net.run(batch, see))
    for layer, x in enumerate(found):
        largest = float(x.abs().max())
        if not largest < net.limit:
            raise UserError(f"{'the output' if layer == len(net.blocks) else f'layer {layer}'} reaches {largest:.3g} under parameters x {factor:g}, "
                             f"its norms hold {net.limit:.3g}: lower --c" + ", or --dtype=float64" * (x.dtype == torch.float32))
    return found


def alike(a, b):
    """How states b (B, T, d) continue a, summed over tokens: (cosine, ln of |b| / |a|, tokens). Of a vanishing state the cosine is 0, of two 1."""
    a, b = (x.flatten(0, -2).double() if x.device.type != "mps" else x.flatten(0, -2) for x in (a, b))
    norm_a, norm_b = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (a, b))
    some = ((norm_a > 0) & (norm_b > 0))[:, 0]
    unit = [x[some] / norm[some] for x, norm in ((a, norm_a), (b, norm_b))]  # divided first: |a| |b| may be beyond what is held
    cosine = (unit[0] * unit[1]).sum() + ((norm_a == 0) & (norm_b == 0)).sum()
    return np.array([float(cosine), float((norm_b[some] / norm_a[some]).log().sum()), len(a)])


def scaling(net, n_batches, read, factors, reference=0.0, see=None, done=lambda part: None):
    """How hidden states change under all parameters x c for each c in factors: {c: array (layers + 1, 3)} of means over tokens: the cosine to the
    states at c = 1; ln of the ratio of norms to these; the cosine to the states at c = `reference`, where given. see: as in Net.run, at the
    last of the factors; done(part of all). Streams: the memory is that of three batches' states."""
    sums = {factor: 0.0 for factor in factors}
    for i in range(n_batches):
        batch = read(i)
        plain = states(net, batch)
        far = states(net, batch, reference) if reference else plain
        for factor in factors:
            now = states(net, batch, factor, see if factor == factors[-1] else None)
            here = np.array([[*alike(a, x), alike(b, x)[0] if reference else 0.0] for a, b, x in zip(plain, far, now)])
            sums[factor] = sums[factor] + here
            done(1 / (n_batches * len(factors)))
    return {factor: total[:, [0, 1, 3]] / total[:, 2:3] for factor, total in sums.items()}


def exponent(curve, layer):
    """k of |f(c theta)| = c^k |f(theta)|, least squares of the ln of the norm ratio on ln c, through (1, 1)."""
    x, y = np.array([(math.log(factor), table[layer, 1]) for factor, table in curve.items()]).T
    return float(x @ y / (x @ x)) if x @ x else 0.0

# ------------------------------------------------------------------------------------------------------------------ heads

class Heads:
    """What the heads of each layer attend to, over batches: `see` takes the attention weights of one layer and batch.

    reach (T, T): where a query (row) may look; places (T, any): where tokens lie, for distances.
    """

    def __init__(self, reach, places):
        self.reach, self.sums = reach, {}
        self.available = reach.sum(-1).double()  # (T,)
        self.distances = torch.cdist(places.double(), places.double())

    def see(self, layer, weights):
        """weights (B, H, T, T). A position is attended where its weight is at least `tie` of the row's largest."""
        weights = weights.detach().cpu().double()
        attended = (weights >= tie * weights.amax(-1, keepdim=True)) & self.reach
        positions = attended.sum(-1).double()  # (B, H, T)
        distance = (attended * self.distances).sum(-1) / positions.clamp(min=1)
        entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)
        choice = self.available > 1  # the first token of a causal model has none
        few = (positions <= torch.clamp(FEW * self.available, min=1)) & choice
        many = (positions >= torch.clamp(MANY * self.available, min=2)) & choice
        B = len(weights)
        per_head = [x.sum((0, 2)) for x in (positions, distance, entropy, few, many)]  # (H,)
        counts = [torch.full_like(per_head[0], B * float(x)) for x in (len(choice), choice.sum(), self.available.sum())]
        self.sums[layer] = self.sums.get(layer, 0) + torch.stack([*per_head, *counts]).double()

    def rows(self, key):
        """Rows of heads_saturated.csv, means over queries: positions attended, distance to them in tokens (of images: in patches), entropy
        of the weights in nats, kind, and how many positions there were."""
        out = []
        for layer, sums in sorted(self.sums.items()):
            for head, (positions, distance, entropy, few, many, n, choices, available) in enumerate(sums.T.tolist()):
                kind = "argmax" if few >= MOST * choices else "mean" if many >= MOST * choices else "mixed"
                out.append({**key, "layer": layer, "head": head, "positions": positions / n, "distance": distance / n, "entropy": entropy / n,
                            "kind": kind, "available": available / n})
        return out


def open_heads(net, batch):
    """A Heads for this model and length: who may look where is what has weight in the unscaled model, anywhere in this batch."""
    reach = []

    def see(layer, weights):
        reach.append((weights > 0).flatten(0, 1).any(0).cpu())

    states(net, batch, see=see)
    reach = torch.stack(reach).any(0)
    T = len(reach)
    places = torch.arange(T)[:, None]
    if not net.tokens:
        side = math.isqrt(T)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        if T > side * side:  # the class token is put in the middle
            places = torch.cat([torch.full((1, 2), (side - 1) / 2), places])
    return Heads(reach, places)

# ------------------------------------------------------------------------------------------------------------------- rows

def saturation_rows(key, net, n_batches, read, see=None, done=lambda part: None):
    """The rows of saturation.csv of one model; key: checkpoint, step, init."""
    table = scaling(net, n_batches, read, [c], see=see, done=done)[c]
    norm = math.hypot(*(float(torch.linalg.vector_norm(p)) for p in net.model.parameters() if p.ndim))
    return [{**key, "layer": layer_name(net, layer), "c": c, "cosine": cosine, "norm_ratio": math.exp(log_ratio), "param_norm": norm}
            for layer, (cosine, log_ratio, _) in enumerate(table)]


def scaling_rows(key, net, n_batches, read, done=lambda part: None):
    """The rows of scaling.csv of one model; key: checkpoint, step, init, norm, bias."""
    curve = scaling(net, n_batches, read, CURVE, reference=c, done=done)
    return [{**key, "layer": layer_name(net, layer), "c": factor, "cosine_saturated": table[layer, 2], "cosine": table[layer, 0],
             "norm_ratio": math.exp(table[layer, 1]), "k": exponent(curve, layer)}
            for layer in range(len(net.blocks) + 1) for factor, table in curve.items()]


def layer_name(net, layer):
    return layer if layer < len(net.blocks) else "output"


def shape_of(net):
    """{norm, bias} of a model of ours, empty for others."""
    if not isinstance(net.model, (GPT, ViT)):
        return {"norm": "", "bias": ""}
    return {"norm": "post" if net.model.args.get("post_norm") else "pre", "bias": bool(net.model.args["bias"])}


def untrained(net):
    """Yields fresh GPTs of this one's shape, pre- and post-norm, without and with biases. Biases are drawn as the matrices are, of normals of
    deviation 0.02: at their usual 0 they would do nothing."""
    for post_norm in (False, True):
        for bias in (False, True):
            model = GPT(**{**net.model.args, "post_norm": post_norm, "bias": bias})
            init_weights(model, seed)
            generator = torch.Generator().manual_seed(hash64(seed) >> 1)
            for name, p in model.named_parameters():
                if name.endswith("bias"):
                    p.data.normal_(0.0, 0.02, generator=generator)
            p = next(net.model.parameters())
            yield our_net(model, net.config, p.device, p.dtype)


def write_csv(name, rows):
    """OUT_DIR/name from rows (dicts of the same keys). Returns its path."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = os.path.join(out_dir, name)
    write_atomic(path, lambda file: file.write(text.getvalue().encode()))
    return path

# ----------------------------------------------------------------------------------------------------------------- tables

def print_saturation(rows):
    """The last checkpoint of each run, trained beside fresh, layer by layer; over training where there are several."""
    runs = {}
    for row in rows:
        runs.setdefault(run_of(row["checkpoint"]), []).append(row)
    for run, own in runs.items():
        last = own[-1]["checkpoint"]
        table = {init: [row for row in own if row["init"] == init and row["checkpoint"] == last] for init in ("trained", "random")}
        print(f"\n{run}: cosine to the state under all parameters x {c:g}, mean over tokens, and the ratio of norms")
        print(f"{'layer':>8}{'trained':>10}{'ratio':>11}" + f"{'random':>10}{'ratio':>11}" * bool(table["random"]))
        for i, row in enumerate(table["trained"]):
            print(f"{row['layer']:>8}" + "".join(f"{x[i]['cosine']:10.4f}{x[i]['norm_ratio']:11.3g}" for x in table.values() if x))
        steps = {}
        for row in own:
            if row["init"] == "trained":
                steps.setdefault(row["step"], []).append(row)
        if len(steps) > 1:
            print(f"over training\n{'step':>8}{'norm':>10}{'blocks':>10}{'output':>10}   (cosines: mean over blocks, and of the output)")
            for step, at in steps.items():
                blocks = [row["cosine"] for row in at[:-1]]
                print(f"{step:8}{at[0]['param_norm']:10.2f}{sum(blocks) / len(blocks):10.4f}{at[-1]['cosine']:10.4f}")


def print_heads(rows):
    """Kinds of heads, layer by layer, of each run's last checkpoint."""
    last = {run_of(row["checkpoint"]): row["checkpoint"] for row in rows}
    for run, path in last.items():
        own = [row for row in rows if row["checkpoint"] == path]
        print(f"\n{run}: heads under all parameters x {c:g}; positions of {own[0]['available']:.1f} (means over queries)")
        print(f"{'layer':>8}{'argmax':>8}{'mean':>8}{'mixed':>8}{'positions':>11}{'distance':>10}{'entropy':>9}")
        for layer in dict.fromkeys(row["layer"] for row in own):
            here = [row for row in own if row["layer"] == layer]
            counts = [sum(row["kind"] == kind for row in here) for kind in ("argmax", "mean", "mixed")]
            means = [sum(row[name] for row in here) / len(here) for name in ("positions", "distance", "entropy")]
            print(f"{layer:>8}" + "".join(f"{x:8}" for x in counts) + "{:11.2f}{:10.2f}{:9.3f}".format(*means))


def print_scaling(rows):
    """Each model's output: k, and how near f(c theta) is to f(theta) and to the saturated one."""
    shown = [x for x in CURVE if x in (1.25, 2.0, 5.0, 10.0)]
    print(f"\noutput under all parameters x c: cosine to f(theta), then to f({c:g} theta); k: |f(c theta)| = c^k |f(theta)| of the last block")
    width = max(30, *(len(label_of(row)) + 1 for row in rows))
    print(f"{'':{width}}{'k':>6}" + "".join(f"{f'c={x:g}':>8}" for x in shown) * 2)
    for label in dict.fromkeys(map(label_of, rows)):
        own = [row for row in rows if label_of(row) == label]
        at = {row["c"]: row for row in own if row["layer"] == "output"}
        block = next(row for row in reversed(own) if row["layer"] != "output")  # the output's own is 1 behind a norm
        cells = [at[x][name] for name in ("cosine", "cosine_saturated") for x in shown]
        print(f"{label:{width}}{block['k']:6.2f}" + "".join(f"{x:8.4f}" for x in cells))


def label_of(row):
    shape = f", {row['norm']}-norm{' with biases' if row['bias'] else ''}" if row["norm"] else ""
    return f"{row['init'] if row['init'] == 'untrained' else row['checkpoint'][-30:] + ' ' + row['init']}{shape}"

# ------------------------------------------------------------------------------------------------------------------- main

def check_settings(paths):
    """Raises UserError naming the setting, its value and the fix."""
    if not paths:
        raise UserError("which checkpoint? python -m scripts.saturate out/lm/ckpt.pt; --help lists the settings")
    for name in ("samples", "batch_size"):
        if globals()[name] < 1:
            raise UserError(f"--{name}={globals()[name]} must be at least 1")
    if not 0 <= block_size < 2**31 or samples >= 2**31:
        raise UserError(f"--block_size={block_size}, --samples={samples}: expects counts")
    if not 1 < c <= 1e6:
        raise UserError(f"--c={c:g}: expects a factor above 1, 1e6 at most")
    if not 0 < tie <= 1:
        raise UserError(f"--tie={tie:g}: expects a share of the largest weight, above 0, 1 at most")
    if dtype not in ("auto", "float32", "float64"):
        raise UserError(f"--dtype={dtype}: expects auto, float64 or float32 (16 bits do not hold what is scaled)")
    if split not in ("train", "val", "test"):
        raise UserError(f"--split={split}: expects train, val or test")
    if seed < 0 or seed >= 2**63:
        raise UserError(f"--seed={seed} must not be negative")
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")


def main(paths):
    """Returns {file name: rows}."""
    with user_errors("saturate.py"):
        check_settings(paths)
        place = init_dist(device).device
        kind = {"auto": torch.float32 if place.type == "mps" else torch.float64}.get(dtype) or getattr(torch, dtype)
        os.makedirs(out_dir, exist_ok=True)
        files = [(file.path, file.step) for file in open_all(paths)]
        last = {run_of(path): path for path, _ in files}
        saturation, scalings, head_rows, told, seen = [], [], [], set(), []
        bar = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with tqdm(total=len(files), disable=None, smoothing=0, bar_format=bar) as progress:
            for path, step in files:
                key, final = {"checkpoint": path, "step": step}, last[run_of(path)] == path
                progress.set_description(os.path.basename(path))
                net = open_net(path, place, kind)
                n_batches, read, about = open_batches(path, net, place, kind)
                if (net.about, about) not in told:
                    told.add((net.about, about))
                    print(f"{path}: {net.about}, {len(net.blocks)} blocks, on {about}; {kind}, {place}", flush=True)
                ours = isinstance(net.model, GPT)
                new = ours and curves and (net.model.args, about) not in seen  # untrained GPTs: once for each shape
                parts = 1 + final * (reinit + curves * (1 + (not ours) + 4 * new))

                def done(part, parts=parts):
                    progress.update(part / parts)

                try:
                    watched = open_heads(net, read(0)) if heads else None
                    saturation += saturation_rows({**key, "init": "trained"}, net, n_batches, read, watched and watched.see, done)
                    head_rows += watched.rows(key) if watched else []
                    fresh = net.fresh() if final and (reinit or curves) else None
                    if final and reinit:
                        saturation += saturation_rows({**key, "init": "random"}, fresh, n_batches, read, done=done)
                    if final and curves:
                        models = [("trained", net), *([] if ours else [("random", fresh)])]
                        if new:
                            seen.append((net.model.args, about))
                            models = itertools.chain(models, (("untrained", model) for model in untrained(net)))
                        for init, model in models:
                            scalings += scaling_rows({**key, "init": init, **shape_of(model)}, model, n_batches, read, done)
                except ValueError as error:
                    raise UserError(f"{path}: {error}") from None
        tables = {"saturation.csv": saturation, "heads_saturated.csv": head_rows, "scaling.csv": scalings}
        print_saturation(saturation)
        if head_rows:
            print_heads(head_rows)
        if scalings:
            print_scaling(scalings)
        print("\nwrote " + ", ".join(f"{write_csv(name, rows)} ({len(rows):,} rows)" for name, rows in tables.items() if rows))
        if figure:
            from nanorank.figures import saturation as figures
            print(f"figures: {', '.join(figures.saturated(out_dir, [name for name, rows in tables.items() if rows]))}")
    return tables


if __name__ == "__main__":
    main(configure(globals(), positional="CKPT [CKPT ...]"))
