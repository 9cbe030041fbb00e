"""
Any checkpoint on disk -> per attention layer (stack, layer, W_Q, W_K, W_V, P), read lazily; a model family is one row of FAMILIES.

    for ckpt in open_all(["out/demo", "nanogpt.pt"]):
        for layer in ckpt.attention_layers():
            layer.W_Q     # (H, r, d) float tensor, likewise W_K, W_V; layer.P is (H, d, r)
"""
import difflib
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from common import load

RUN_FILE = r"ckpt\.pt|step_(\d+)\.pt"  # what train_lm.py leaves in a run folder

class AttentionLayer(NamedTuple):
    """One attention layer's heads: W_Q, W_K, W_V (H, r, d), P (H, d, r); `stack` is empty for models that have one stack."""
    stack: str
    layer: int
    W_Q: torch.Tensor
    W_K: torch.Tensor
    W_V: torch.Tensor
    P: torch.Tensor


class Family(NamedTuple):
    """How one family names and stores attention.

    layer: regex of the part of a name that precedes the tensors below, with a group `layer` (and `stack` where there are several)
    tensors: what follows it, one name a tensor; heads(tensors, n_head) -> W_Q, W_K, W_V, P as AttentionLayer has them
    """
    layer: str
    tensors: tuple
    heads: Callable


def fused_rows(tensors, n_head):
    """c_attn.weight (3d, d) with q, k, v stacked and heads contiguous in each; c_proj.weight (d, d)."""
    qkv, out = tensors
    d = qkv.shape[-1]
    if qkv.shape != (3 * d, d) or out.shape != (d, d) or d % n_head:
        raise ValueError(f"shapes {tuple(qkv.shape)}, {tuple(out.shape)} do not divide into {n_head} heads of (3d, d), (d, d)")
    W_Q, W_K, W_V = qkv.view(3, n_head, d // n_head, d)
    return W_Q, W_K, W_V, out.view(d, n_head, d // n_head).transpose(0, 1)


FAMILIES = {
    "GPT (ours, nanoGPT)": Family(r"(?:^|.*\.)h\.(?P<layer>\d+)\.attn\.", ("c_attn.weight", "c_proj.weight"), fused_rows),
}


def attention_layers(tensors, n_head):
    """Yields an AttentionLayer per layer of a {name: tensor} dict (a state dict), in order.

    n_head: heads per layer. Raises ValueError where no family matches, naming what was looked for and the nearest names there are.
    """
    for family in FAMILIES.values():
        found = {}
        for name in tensors:
            match = re.fullmatch(f"({family.layer}){re.escape(family.tensors[0])}", name)
            if match:
                found[match.groupdict().get("stack") or "", int(match["layer"])] = match[1]
        if not found:
            continue
        for (stack, layer), prefix in sorted(found.items()):
            names = [prefix + tail for tail in family.tensors]
            missing = [name for name in names if name not in tensors]
            if missing:
                raise ValueError(f"attention of layer {layer} lacks {missing[0]}")
            try:
                heads = family.heads([tensors[name] for name in names], n_head)
            except ValueError as error:
                raise ValueError(f"{names[0]}: {error}") from None
            yield AttentionLayer(stack, layer, *heads)
        return
    looked_for = sorted({f"...h.0.attn.{tail}" if "h\\." in f.layer else tail for f in FAMILIES.values() for tail in f.tensors})
    near = sorted(tensors, key=lambda name: -difflib.SequenceMatcher(None, name, "transformer.h.0.attn.c_attn.weight").ratio())[:10]
    raise ValueError(f"no attention found: looked for {', '.join(looked_for)}; nearest of the {len(tensors)} names there: "
                     f"{', '.join(near) or 'none'}")


class Checkpoint:
    """A checkpoint on disk: `path`, `step` (-1 where unknown), `tensors` {name: tensor}, `n_head`; tensors are memory-mapped."""

    def __init__(self, path, n_head=0):
        """n_head: heads per layer where the checkpoint does not say. Raises ValueError for what is not a readable checkpoint."""
        raw = load(path, mmap=True)
        state = raw.get("model", raw) if isinstance(raw, dict) else None
        if not isinstance(state, dict) or not any(isinstance(p, torch.Tensor) for p in state.values()):
            raise ValueError(f"{path}: no state dict in it, neither bare nor under 'model'")
        self.path = path
        self.tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): p for name, p in state.items()
                        if isinstance(name, str) and isinstance(p, torch.Tensor)
                        and not (name.endswith(".attn.bias") and p.ndim == 4)}  # the causal mask that nanoGPT once stored
        args = raw.get("model_args") or {}
        self.n_head = n_head or (args.get("n_head", 0) if isinstance(args, dict) else 0)
        in_name = re.fullmatch(RUN_FILE, os.path.basename(path))
        step = raw.get("iter_num", in_name and in_name[1])
        self.step = int(step) if isinstance(step, (int, str)) else -1

    def attention_layers(self):
        """See attention_layers. Raises ValueError naming the file."""
        if type(self.n_head) is not int or self.n_head < 1:
            raise ValueError(f"{self.path}: it does not say how many heads a layer has (model_args.n_head); give --n_head")
        try:
            yield from attention_layers(self.tensors, self.n_head)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None


def run_of(path):
    """The run that a checkpoint file belongs to: its folder where it has a name that runs have, else the file itself."""
    return os.path.dirname(path) or "." if re.fullmatch(RUN_FILE, os.path.basename(path)) else path


def expand(paths):
    """The checkpoint files that command-line arguments stand for, each once, run by run in order of step: a file itself; of a
    run folder its snapshots and ckpt.pt. Raises ValueError for a folder that has neither."""
    runs = {}
    for path in map(os.path.normpath, paths):
        files = [path]
        if os.path.isdir(path):
            files = [os.path.join(path, name) for name in os.listdir(path) if re.fullmatch(RUN_FILE, name)]
            if not files:
                raise ValueError(f"{path}: a folder without ckpt.pt or step_*.pt")
        runs.setdefault(run_of(files[0]), set()).update(files)
    return [file for files in runs.values() for file in sorted(files, key=lambda file: (file.endswith("ckpt.pt"), file))]


def open_all(paths, n_head=0):
    """Yields a Checkpoint for every file of expand(paths); a run's ckpt.pt is left out where it is the last snapshot once more."""
    previous = None
    for file in expand(paths):
        checkpoint = Checkpoint(file, n_head)
        again = previous and os.path.basename(file) == "ckpt.pt" and run_of(previous.path) == run_of(file) and previous.step == checkpoint.step
        if not again:
            yield checkpoint
        previous = checkpoint
