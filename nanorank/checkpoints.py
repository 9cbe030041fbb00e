"""
Any checkpoint on disk, or on the Hugging Face hub -> its tensors, read lazily, and the heads of its attention layers.

    for ckpt in open_all(["out/demo", "nanogpt.pt", "Llama-2-7b-hf", "EleutherAI/pythia-70m@step1000"]):
        for layer in ckpt.attention_layers():
            layer.W_Q     # (H, r, d) float tensor, likewise W_K, W_V; layer.P is (H, d, r)

A checkpoint is a .pt/.pth/.bin/.ckpt file (opened with weights_only=True, memory-mapped), a .safetensors file, an index of shards of either, or a
folder that holds one of these; several in order of step make a run. Only what is asked for is read, and let go again.
"""
import argparse
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

from configurator import one_line
from nanorank.errors import UserError
from nanorank.families import find_attention, heads_of, split_heads
from nanorank.files import load_pt

RUN_FILE = r"ckpt\.pt|step_(\d+)\.pt"  # what train_lm.py leaves in a run folder
STEP = r"(?:^|(?<=[._@-]))(?:global_?)?(?:step|checkpoint|ckpt|iter|iteration)[-_=]?(\d+)(?=$|[._-])"  # step1000, checkpoint-500, a_step7.pt
EPOCH = r"epoch[-_=]?(\d+)"  # where no step is told
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
NOT_MODELS = r"training_args|optimizer|scheduler|rng_state|random_states|scaler"  # what else trainers leave under these suffixes
STATE_DICTS = ("model", "model_state", "state_dict", "model_state_dict", "module", "net", "weights")  # where files keep the state dict
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module")  # what DDP, torch.compile, FSDP, DeepSpeed put into names
BUFFERS = (r"(^|\.)(tril|\w*mask|IGNORE|inv_freq|rotary_(sin|cos)|(cos|sin)_cached|freqs|freqs_cis|pe|position_ids|relative_position_index|"
           r"masked_bias|running_mean|running_var)$")  # no parameters, though stored
HARMLESS = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, np.dtype, np._core.multiarray.scalar,
            (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"), *{type(np.dtype(c)) for c in "?bhilqBHILQefd"}]


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as .safetensors calls them


class Stored(NamedTuple):
    """Where a tensor lies: its file, its name there, its shape, its dtype, what memory it shares (tied weights) there, and at which byte."""
    file: str
    key: str
    shape: tuple
    dtype: str
    memory: object
    start: int = -1


class Checkpoint:
    """A checkpoint: `path`, `step` (-1 where unknown), `tensors` {name: Stored}, `shapes` {name: shape}, `configs` {source: dict}."""

    def __init__(self, path, n_head=0, n_kv_head=0, d_head=0, pattern="", layout="separate", state_dict=""):
        """n_head, n_kv_head, d_head: heads where the checkpoint does not say; pattern, layout: names that no scheme knows (families.py);
        state_dict: which of several in a file. Raises UserError for what is not a readable checkpoint."""
        self.path, self.step, self.state_dict, self.opened, self.tensors = path, step_in(path), state_dict, {}, {}
        self.heads, self.names = {"n_head": n_head, "n_kv_head": n_kv_head, "d_head": d_head}, {"pattern": pattern, "layout": layout}
        files, configs = locate(path)
        self.configs = {os.path.basename(file): read_json(file) for file in configs}
        for file in files:
            get, stored, extra = self.open_file(file)
            if not file.endswith(".safetensors") and os.path.getsize(file) < 2**28:
                self.opened[file] = get  # unpickling it again for each layer would cost more than keeping it mapped
            twice = self.tensors.keys() & stored.keys()
            if twice:
                raise UserError(f"{path}: {min(twice)} is there twice")
            self.tensors.update(stored)
            extra = {key: vars(x) if isinstance(x, argparse.Namespace) else x for key, x in extra.items()}
            self.configs = {**{f"its {key}": x for key, x in extra.items() if isinstance(x, dict)}, **self.configs}
            inside = next((extra[key] for key in ("iter_num", "global_step", "step") if type(extra.get(key)) is int), -1)
            self.step = inside if self.step < 0 else self.step  # the name's, by which a run is put in order
        self.shapes = {name: x.shape for name, x in self.tensors.items()}

    def open_file(self, file, verify=True):
        """(get(key) -> tensor, {name: Stored}, what else is in it) of one file; get is None for .safetensors, read from their bytes."""
        if file.endswith(".safetensors"):
            try:
                with safe_open(file, "pt") as handle:  # checks the header against the file
                    slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
                with open(file, "rb") as stream:
                    size = int.from_bytes(stream.read(8), "little")
                    places = json.loads(stream.read(size))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: damaged, or not a .safetensors file ({str(error).splitlines()[0][:150]})") from None
            return None, cleaned(file, {key: Stored(file, key, tuple(x.get_shape()), x.get_dtype(), key, 8 + size + places[key]["data_offsets"][0])
                                        for key, x in slices.items()}), {}
        with torch.serialization.safe_globals(HARMLESS):
            raw = load_pt(file, mmap=True, verify=verify)
        key, state = find_state_dict(file, raw, self.state_dict)
        stored = cleaned(file, {name: Stored(file, name, tuple(x.shape), str(x.dtype)[6:],
                                             (x.untyped_storage().data_ptr(), x.storage_offset(), x.shape))
                                for name, x in state.items() if isinstance(name, str) and isinstance(x, torch.Tensor)})
        return state.__getitem__, stored, {name: x for name, x in raw.items() if name != key} if key else {}

    def read(self, names):
        """{name: tensor} of these names, in memory (.safetensors, at the disk's speed) or memory-mapped (torch's files)."""
        opened, tensors = dict(self.opened), {}
        for name in names:
            x = self.tensors[name]
            if x.dtype in FLOATS:
                data = np.fromfile(x.file, np.uint8, math.prod(x.shape) * FLOATS[x.dtype].itemsize, offset=x.start)
                tensors[name] = torch.from_numpy(data).view(FLOATS[x.dtype]).reshape(x.shape)
            elif x.start >= 0:
                raise UserError(f"{self.path}: {name} is stored as {x.dtype}: dequantise it first")
            else:
                if x.file not in opened:
                    opened[x.file] = self.open_file(x.file, verify=False)[0]
                tensors[name] = opened[x.file](x.key)
        return tensors

    def modules(self):
        """Its attention modules (families.Module), in order. Raises UserError naming the file."""
        try:
            return find_attention(self.shapes, **self.names, config=self.configs.get("config.json"))
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None

    def heads_of(self, module):
        """(heads, where that is from). Raises UserError naming the file."""
        try:
            return heads_of(module, self.shapes, self.configs, **self.heads)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None

    def attention_layer(self, module):
        """The AttentionLayer of a module, read from disk. Raises UserError naming the file."""
        n_head, _ = self.heads_of(module)
        tensors = self.read([x for entry in module.names for x in ([entry] if isinstance(entry, str) else entry)])
        try:
            return split_heads(module, tensors, n_head, self.heads["n_kv_head"])
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None

    def attention_layers(self):
        """Yields its AttentionLayers, each read when it is asked for. Raises UserError naming the file."""
        for module in self.modules():
            yield self.attention_layer(module)

    def parameters(self):
        """The names of its parameters: without scalars, integers and known buffers; what is tied counts once, under its first name."""
        seen = set()
        return [name for name, x in self.tensors.items() if x.shape and 0 not in x.shape and re.match(r"float|bfloat|F\d|BF", x.dtype)
                and not re.search(BUFFERS, name) and not (name.endswith(("attn.bias", "attention.bias")) and len(x.shape) > 2)  # causal masks
                and not ((x.file, x.memory) in seen or seen.add((x.file, x.memory)))]


def cleaned(file, stored):
    """{name: Stored} under names without what wrappers put into them. Raises UserError where two become the same."""
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in stored}
    first = {}
    for name, short in names.items():
        if first.setdefault(short, name) != name:
            raise UserError(f"{file}: holds both {first[short]} and {name}")
    return {names[name]: x for name, x in stored.items()}


def find_state_dict(file, raw, wanted=""):
    """(key, state dict) in what a torch file holds; the key is empty for a bare one. Raises UserError where there is none, or a choice."""
    if not isinstance(raw, dict):
        raise UserError(f"{file}: holds a {type(raw).__name__}, no state dict")
    inside = [key for key, x in raw.items() if isinstance(key, str) and isinstance(x, dict) and any(isinstance(p, torch.Tensor) for p in x.values())]
    if wanted and wanted not in inside:
        raise UserError(f"{file}: no state dict under --state_dict={wanted}; there is {', '.join(inside) or 'none under any key'}")
    known = [wanted] if wanted else [key for key in STATE_DICTS if key in inside]
    if known:
        return known[0], raw[known[0]]
    if any(isinstance(p, torch.Tensor) for p in raw.values()):
        return "", raw
    if len(inside) != 1:
        raise UserError(f"{file}: no state dict in it, neither bare nor under {', '.join(STATE_DICTS)}" if not inside else
                         f"{file}: several state dicts in it: choose by --state_dict={' or --state_dict='.join(inside)}")
    return inside[0], raw[inside[0]]

# ------------------------------------------------------------------------------------------------------- files and folders

def read_json(file):
    """The object in a JSON file. Raises UserError naming the file."""
    try:
        with open(file, encoding="utf-8") as stream:
            value = json.load(stream)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expects a JSON object")
    return value


def locate(path):
    """(weight files, config files) of one checkpoint: a file, an index of shards, a folder, a folder of the hub's cache or a hub id, the last
    two with @REVISION where wanted. Raises UserError for what is not there."""
    base, _, revision = path.partition("@") if not os.path.exists(path) else (path, "", "")
    if os.path.isdir(os.path.join(base, "snapshots")):  # the hub's cache: refs/REVISION holds the name of a folder in snapshots
        ref = os.path.join(base, "refs", *(revision or "main").split("/"))
        if not os.path.isfile(ref):
            raise UserError(f"{path}: no revision {revision or 'main'} in {os.path.join(base, 'refs')}")
        with open(ref, encoding="utf-8") as file:
            path = os.path.join(base, "snapshots", file.read().strip())
    elif not os.path.exists(path) and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not os.path.isdir(os.path.dirname(base)):
        return from_hub(base, revision)
    folder, name = os.path.split(path)
    if os.path.isdir(path):
        folder, names = path, sorted(os.listdir(path))
    elif not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder")
    elif re.search(r"-\d+-of-\d+\.", name) or re.fullmatch(r"consolidated\.\d+\.pth", name) and len(parts := re.findall(
            r"consolidated\.\d+\.pth", " ".join(os.listdir(folder or ".")))) > 1:
        raise UserError(f"{path}: one part of a model; give the folder" if "-of-" in name else
                         f"{path}: one of {len(parts)} model-parallel parts; convert them to one (transformers' convert_llama_weights_to_hf.py)")
    else:
        names = [name]
    weights = choose(path, names, lambda name: os.path.join(folder, name))
    beside = [os.path.join(folder, name) for name in ("config.json", "params.json")]  # Hugging Face, timm; Meta
    return weights, [file for file in beside if os.path.isfile(file)]


def from_hub(repo, revision):
    """locate for a model on the Hugging Face hub: fetches its config and weights into the hub's cache, nothing else."""
    from huggingface_hub import HfApi, hf_hub_download
    print(f"no {repo} here: asking the Hugging Face hub for it", file=sys.stderr, flush=True)
    at = {"repo_id": repo, "revision": revision or None}
    try:
        names = HfApi().list_repo_files(**at)
        def fetch(name): return hf_hub_download(filename=name, **at)
        return choose(repo, names, fetch), [fetch(name) for name in ("config.json", "params.json") if name in names]
    except Exception as error:  # httpx, requests and the hub have dozens of kinds
        if isinstance(error, UserError):
            raise
        raise UserError(f"{repo}: no such file or folder here, and the Hugging Face hub did not give it: "
                         f"{(str(error).splitlines() or [type(error).__name__])[0][:200]}") from None


def choose(path, names, fetch):
    """The weight files among `names`, those of one checkpoint; fetch(name) -> its path on disk. Raises UserError where it is not clear which."""
    for index in [name for end in (".safetensors.index.json", ".bin.index.json") for name in names if name.endswith(end)][:1]:
        shards = read_json(fetch(index)).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise UserError(f"{path}: {index} has no weight_map of file names")
        folder = os.path.dirname(fetch(index))
        shards = sorted(set(shards.values()))
        missing = [shard for shard in shards if shard not in names and not (len(names) == 1 and os.path.basename(shard) == shard
                                                                            and os.path.isfile(os.path.join(folder, shard)))]
        if missing:
            raise UserError(f"{path}: {index} names {missing[0]}, which is not there")
        return [fetch(shard) for shard in shards]
    found = [name for name in names if name.endswith(SUFFIXES) and not re.match(NOT_MODELS, os.path.basename(name))]
    for best in (["model.safetensors"], ["pytorch_model.bin"], [name for name in found if name.endswith(".safetensors")], found):
        chosen = [name for name in best if name in found]
        if len(chosen) == 1:
            return [fetch(chosen[0])]
    raise UserError(f"{path}: no model in it, looked for model.safetensors, pytorch_model.bin, an index of shards, one file of "
                     f"{' '.join(SUFFIXES)}, ckpt.pt, step_*.pt or folders step*, checkpoint-*" if not found else
                     f"{path}: several weight files and no index ({', '.join(found[:4])}{' ...' if len(found) > 4 else ''}): give one")

# -------------------------------------------------------------------------------------------------------------------- runs

def step_in(path):
    """The step that a checkpoint's name tells, -1 where it tells none."""
    match = step_of(os.path.basename(path))
    return int(match[1]) if match else -1


def step_of(name):
    return re.search(STEP, name) or re.search(EPOCH, name)


def run_of(path):
    """The run that a checkpoint belongs to: its path without what tells the step and what follows that."""
    folder, name = os.path.split(path)
    step = step_of(name)
    if re.fullmatch(RUN_FILE, name) or step:
        series = re.sub(EPOCH, "", name[:step.start()]).strip("._-@") if step else ""
        return os.path.join(folder, series) if series else folder or "."
    return path


def expand(paths):
    """The checkpoints that command-line arguments stand for, each once, run by run in order of step: a file, a model's folder or a hub id is
    itself; of a run folder its snapshots and ckpt.pt; of a folder of step*, checkpoint-* (folders, files, or revisions in the hub's cache) these."""
    runs = {}
    for path in map(os.path.normpath, paths):
        names = os.listdir(path) if os.path.isdir(path) else []
        found = [os.path.join(path, name) for name in names if re.fullmatch(RUN_FILE, name)]
        found = found or [os.path.join(path, name) for name in names if step_of(name)
                          and (name.endswith(SUFFIXES) or os.path.isdir(os.path.join(path, name)))]
        refs = os.path.join(path, "refs")
        found = found or [f"{path}@{name}" for name in (os.listdir(refs) if os.path.isdir(refs) else []) if re.search(STEP, name)]
        for file in found or [path]:
            runs.setdefault(run_of(file), set()).add(file)
    return [file for files in runs.values() for file in sorted(files, key=lambda file: (file.endswith("ckpt.pt"), step_in(file), file))]


def open_all(paths, **options):
    """Yields a Checkpoint for each of expand(paths), options as Checkpoint has them; a run's ckpt.pt that is its last snapshot is left out.

    One of several of a run that is damaged is named on stderr and left out. Raises UserError for one given by name, and where none of a run is left.
    """
    previous, opened, given, files = None, set(), set(map(os.path.normpath, paths)), expand(paths)
    last = {run_of(file): file for file in files}
    for file in files:
        try:
            checkpoint = Checkpoint(file, **options)
            opened.add(run_of(file))
        except ValueError as error:
            if file in given or run_of(file) not in opened and file == last[run_of(file)]:
                raise
            print(f"note: left out: {one_line(error)}", file=sys.stderr, flush=True)
            continue
        again = previous and os.path.basename(file) == "ckpt.pt" and run_of(previous.path) == run_of(file) and previous.step == checkpoint.step
        if not again:
            yield checkpoint
        previous = checkpoint
