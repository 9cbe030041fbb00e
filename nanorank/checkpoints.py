"""
Opens any checkpoint on disk or on the Hugging Face hub: its tensors, read lazily, and its attention heads.

    for ckpt in open_all(["out/demo", "nanogpt.pt", "Llama-2-7b-hf", "EleutherAI/pythia-70m@step1000"]):
        for layer in ckpt.attention_layers():
            layer.W_Q     # (H, r, d) float tensor, likewise W_K, W_V; layer.P is (H, d, r)

A checkpoint is a .pt/.pth/.bin/.ckpt file (opened with weights_only=True, memory-mapped), a .safetensors
file, an index of shards of either, or a folder that holds one of these. Several in order of step make a run.
Tensors are read when they are asked for, and let go again. files.load_pt refuses files that lie.
"""
import argparse
import contextlib
import json
import math
import os
import pathlib
import re
import sys
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from nanorank.checkpoint_files import (
    NOT_MODELS,
    RUN_FILE,
    SUFFIXES,
    expand,
    locate,
    read_json,
    run_of,
    step_in,
)
from nanorank.errors import UserError, one_line
from nanorank.families import find_attention, heads_of, kind_of, split_heads
from nanorank.files import load_pt
from nanorank.foreign_files import what_file_is
from nanorank.positions import refuse_contradiction, with_positions
from nanorank.quantised import refuse_quantised, refuse_stored_quantised

__all__ = ["NOT_MODELS", "RUN_FILE", "SUFFIXES", "Checkpoint", "expand", "open_all", "run_of"]

# keys under which torch files keep the state dict
STATE_DICTS = ("model", "model_state", "state_dict", "model_state_dict", "module", "net", "weights")
STEP_KEYS = ("iter_num", "global_step", "step")

# DDP, torch.compile, FSDP and DeepSpeed put these into names
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module")

# no parameters, though stored
BUFFERS = (r"(^|\.)(tril|\w*mask|IGNORE|inv_freq|rotary_(sin|cos)|(cos|sin)_cached|freqs|freqs_cis|pe|"
           r"position_ids|relative_position_index|masked_bias|running_mean|running_var)$")

# as .safetensors calls them
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# arguments, paths and numpy numbers, which foreign checkpoints hold beside their tensors; they run no code
SCALAR = np._core.multiarray.scalar
HARMLESS = [
    argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, np.dtype,
    SCALAR, (SCALAR, "numpy.core.multiarray.scalar"),  # numpy 2's name and numpy 1's
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
]


class Stored(NamedTuple):
    """Where a tensor lies."""
    file: str
    key: str        # its name in the file
    shape: tuple
    dtype: str
    memory: object  # equal for tensors that share memory in the file (tied weights)
    start: int = -1  # its first byte, in a .safetensors file


class Checkpoint:
    """A checkpoint's tensors, where they lie, and what tells its heads.

    path, step: -1 where neither the name nor the file tells it
    tensors: {name: Stored}; shapes: {name: shape}
    configs: {source: dict}, such as config.json or "its model_args"
    """

    def __init__(self, path, n_head=0, n_kv_head=0, d_head=0, pattern="", layout="separate", state_dict="",
                 heads="", rope=""):
        """n_head, n_kv_head, d_head: heads, where the checkpoint does not say.
        heads: those of each stack, where they differ: encoder:3,decoder:4.
        pattern, layout: names that no scheme knows (families.find_attention).
        state_dict: the key of one state dict of several in a file.
        rope: half, interleaved, none or half:64, where nothing tells whether q and k turn (positions.py).
        Raises UserError where there is no checkpoint, or none that can be read."""
        self.path = path
        self.step = step_in(path)
        self.n_kv_head = n_kv_head
        self.heads = {"n_head": n_head, "n_kv_head": n_kv_head, "d_head": d_head}
        self.stack_heads = parse_heads(heads)
        self.naming = {"pattern": pattern, "layout": layout}
        self.state_dict = state_dict
        self.rope = rope
        self.mapped = {}   # {file: state dict}
        self.tensors = {}
        files, configs = locate(path)
        self.configs = {os.path.basename(file): read_json(file) for file in configs}
        for file in files:
            self.add(file)
        self.shapes = {name: x.shape for name, x in self.tensors.items()}

    def add(self, file):
        """Takes up the tensors and the configs of one file."""
        extra = {}
        if is_safetensors(file):
            stored = open_safetensors(file)
        else:
            state, extra = open_torch(file, self.state_dict)
            stored = stored_in(file, state)
            if os.path.getsize(file) < 2**28:  # to unpickle it for each layer would cost more
                self.mapped[file] = state

        stored = unwrapped(file, stored)
        twice = self.tensors.keys() & stored.keys()
        if twice:
            raise UserError(f"{self.path}: {min(twice)} is there twice")
        self.tensors.update(stored)

        configs = {}
        for key, value in extra.items():
            if isinstance(value, argparse.Namespace):
                value = vars(value)
            if key in ("arch", "architecture", "model_name") and isinstance(value, str):  # timm
                value = {"architecture": value}
            if isinstance(value, dict):
                configs[f"its {key}"] = value
        self.configs = {**configs, **self.configs}
        if self.step < 0:  # the name's step goes first: it puts a run in order
            steps = [extra[key] for key in STEP_KEYS if type(extra.get(key)) is int]
            self.step = steps[0] if steps else -1

    def read(self, names):
        """{name: tensor} of these names: .safetensors in memory, torch's files memory-mapped."""
        tensors = {}
        mapped = dict(self.mapped)  # large files are mapped for this call alone
        for name in names:
            x = self.tensors[name]
            if x.start >= 0:
                tensors[name] = self.read_bytes(name, x)
                continue
            if x.file not in mapped:
                mapped[x.file], _ = open_torch(x.file, self.state_dict, verify=False)
            tensors[name] = mapped[x.file][x.key]
        return tensors

    def read_bytes(self, name, x):
        """A tensor of a .safetensors file, at the disk's speed."""
        if x.dtype not in FLOATS:
            raise UserError(f"{self.path}: {name} is stored as {x.dtype}: dequantise it first")
        dtype = FLOATS[x.dtype]
        data = np.fromfile(x.file, np.uint8, math.prod(x.shape) * dtype.itemsize, offset=x.start)
        return torch.from_numpy(data).view(dtype).reshape(x.shape)

    @contextlib.contextmanager
    def named(self):
        """Adds the checkpoint's path to errors."""
        try:
            yield
        except ValueError as error:  # UserError, and int() of a name with thousands of digits
            raise UserError(f"{self.path}: {error}") from None

    def modules(self):
        """Its attention modules (families.Module), in order. Raises UserError naming the file."""
        with self.named():
            refuse_quantised(self.tensors, self.configs)
            modules = find_attention(self.shapes, **self.naming, config=self.configs.get("config.json"))
            refuse_stored_quantised(modules, self.tensors)
            self.check_stacks(modules)
            refuse_contradiction(modules, self.shapes, self.configs, self.rope)
            return modules

    def check_stacks(self, modules):
        """Raises UserError where --stack_heads names a stack that is not there."""
        stacks = list(dict.fromkeys(module.stack for module in modules))
        for stack in self.stack_heads:
            if not any(is_stack(module, stack, stacks) for module in modules):
                there = ", ".join(stacks) if any(stacks) else "one stack; give --n_head"
                raise UserError(f"--stack_heads: no stack {stack}; there is {there}")

    def heads_of(self, module):
        """(heads, where that is from). Raises UserError naming the file."""
        word = dict(self.heads)
        if self.stack_heads:
            stacks = list(dict.fromkeys(other.stack for other in self.modules()))
            for stack, n_head in self.stack_heads.items():
                if is_stack(module, stack, stacks):
                    word = {"n_head": n_head}
        with self.named():
            return heads_of(module, self.shapes, self.configs, **word)

    def attention_layer(self, module):
        """The AttentionLayer of a module, read from disk. Raises UserError naming the file."""
        n_head, _ = self.heads_of(module)
        tensors = self.read(module.tensor_names)
        with self.named():
            layer = split_heads(module, tensors, n_head, self.n_kv_head)
            return with_positions(layer, module, self.shapes, self.configs, self.rope)

    def attention_layers(self):
        """Yields its AttentionLayers, each read when it is asked for. Raises UserError naming the file."""
        for module in self.modules():
            yield self.attention_layer(module)

    def parameters(self):
        """Names of its parameters: no scalars, integers, buffers; tied weights once, by the first name."""
        names = []
        seen = set()
        for name, x in self.tensors.items():
            is_float = re.match(r"float|bfloat|F\d|BF", x.dtype)
            is_scalar = x.shape == () or 0 in x.shape
            is_causal_mask = name.endswith(("attn.bias", "attention.bias")) and len(x.shape) > 2
            if not is_float or is_scalar or is_causal_mask or re.search(BUFFERS, name):
                continue
            memory = x.file, x.memory
            if memory in seen:
                continue
            seen.add(memory)
            names.append(name)
        return names


def parse_heads(text):
    """{"encoder": 3, "decoder": 4} of encoder:3,decoder:4. Raises UserError for anything else."""
    heads = {}
    for part in text.replace(" ", "").split(",") if text else []:
        match = re.fullmatch(r"([\w.]+)[:=](\d{1,4})", part)
        if not match or int(match[2]) == 0:
            raise UserError(f"--stack_heads={text}: expects stacks and their heads, "
                            "such as encoder:3,decoder:4")
        heads[match[1]] = int(match[2])
    return heads


def is_stack(module, name, stacks):
    """Whether a module is in the stack of this name: its label, how its path begins, or the encoder beside a
    decoder where nothing calls it that."""
    if name in stacks:
        return module.stack == name
    if f"{module.path}.".startswith((f"{name}.", f"{name}_")):
        return True
    unnamed = [stack for stack in stacks if kind_of(stack) == "" and stack != "cross"]
    return name == "encoder" and "decoder" in stacks and unnamed == [module.stack]


def open_all(paths, **options):
    """Yields a Checkpoint for each of expand(paths); options are Checkpoint's.

    A run's ckpt.pt that repeats its last snapshot is left out. A damaged checkpoint of a run is named on
    stderr and left out. Raises UserError for a damaged one given by name, and where none of a run is left.
    """
    given = set(map(os.path.normpath, paths))
    files = expand(paths)
    last = {run_of(file): file for file in files}
    opened = set()  # runs
    previous = None
    for file in files:
        run = run_of(file)
        try:
            checkpoint = Checkpoint(file, **options)
        except UserError as error:
            none_left = file == last[run] and run not in opened
            if file in given or none_left:
                raise
            print(f"note: left out: {one_line(error)}", file=sys.stderr, flush=True)
            continue
        opened.add(run)
        same_run = previous is not None and run_of(previous.path) == run
        repeated = same_run and previous.step == checkpoint.step and os.path.basename(file) == "ckpt.pt"
        if not repeated:
            yield checkpoint
        previous = checkpoint

# ------------------------------------------------------------ one file

def is_safetensors(file):
    """Whether a file is one of .safetensors, by its name or else by its first bytes: a size, then JSON."""
    if file.endswith(".safetensors"):
        return True
    with contextlib.suppress(OSError), open(file, "rb") as stream:
        start = stream.read(9)
        return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= os.path.getsize(file) - 8
    return False


def open_safetensors(file):
    """{name: Stored} of a .safetensors file. Raises UserError where it is damaged."""
    known = what_file_is(file)
    if known:
        raise UserError(f"{file}: {known}")
    try:
        with safe_open(file, "pt") as handle:  # holds the header against the file
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: damaged, or not a .safetensors file "
                        f"({str(error).splitlines()[0][:150]})") from None
    stored = {}
    for key, x in slices.items():
        start = 8 + size + header[key]["data_offsets"][0]
        stored[key] = Stored(file, key, tuple(x.get_shape()), x.get_dtype(), key, start)
    return stored


def open_torch(file, wanted="", verify=True):
    """(state dict, the rest) of a torch file, memory-mapped; wanted: the state dict's key.

    Raises UserError where there is no state dict, or a choice of several.
    """
    with torch.serialization.safe_globals(HARMLESS):
        raw = load_pt(file, mmap=True, verify=verify)
    if not isinstance(raw, dict):
        raise UserError(f"{file}: holds a {type(raw).__name__}, no state dict")

    inside = []
    for key, value in raw.items():
        if isinstance(key, str) and isinstance(value, dict) and has_tensor(value):
            inside.append(key)
    if wanted and wanted not in inside:
        there = ", ".join(inside) or "none under any key"
        raise UserError(f"{file}: no state dict under --state_dict={wanted}; there is {there}")

    known = [key for key in STATE_DICTS if key in inside]
    if wanted:
        chosen = wanted
    elif known:
        chosen = known[0]
    elif has_tensor(raw):
        return raw, {}
    elif len(inside) == 1:
        chosen = inside[0]
    elif inside:
        raise UserError(f"{file}: several state dicts in it: choose by "
                        f"--state_dict={' or --state_dict='.join(inside)}")
    else:
        raise UserError(f"{file}: no state dict in it, neither bare nor under {', '.join(STATE_DICTS)}")
    rest = {key: value for key, value in raw.items() if key != chosen}
    return raw[chosen], rest


def has_tensor(state):
    return any(isinstance(value, torch.Tensor) for value in state.values())


def stored_in(file, state):
    """{name: Stored} of a torch file's state dict."""
    stored = {}
    for name, x in state.items():
        if isinstance(name, str) and isinstance(x, torch.Tensor):
            memory = x.untyped_storage().data_ptr(), x.storage_offset(), x.shape
            stored[name] = Stored(file, name, tuple(x.shape), str(x.dtype)[6:], memory)
    return stored


def unwrapped(file, stored):
    """{name: Stored} without the parts of names that wrappers add. Raises UserError where two become one."""
    short = {}
    for name, x in stored.items():
        clean = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if clean in short:
            raise UserError(f"{file}: holds both {short[clean].key} and {name}")
        short[clean] = x
    return short
