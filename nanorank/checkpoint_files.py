"""
Finds the files that make a checkpoint, and the checkpoints that make a run.

    locate("Llama-2-7b-hf")        # weight files and config files of one checkpoint
    expand(["out/demo", "a.pt"])   # a run folder's checkpoints in order of step, then the file
    run_of("out/demo/ckpt.pt")     # out/demo
"""
import json
import os
import re
import sys

from nanorank.errors import UserError
from nanorank.foreign_files import what_file_is, what_folder_is

RUN_FILE = r"ckpt\.pt|step_(\d+)\.pt"  # the trainers leave these in a run folder
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
CONFIGS = ("config.json", "params.json")  # Hugging Face and timm; Meta

# other trainers leave these beside a model, under the same suffixes; Megatron's model_optim_rng.pt is a model
NOT_MODELS = (r"training_args|optim(?:izer)?s?(?:[._\d-]|$)|(?:lr_)?sched|rng_|random_states|(?:\w+_)?scaler|"
              r"sampler|dl_state|(?!model)\w*[._-]optim(?:izer)?(?:_states?)?[._-]")

# step1000, checkpoint-500, a_step7.pt; and epoch_3 where no step is told
STEP = r"(?:^|(?<=[._@-]))(?:global_?)?(?:step|checkpoint|ckpt|iter|iteration)[-_=]?(\d+)(?=$|[._-])"
EPOCH = r"epoch[-_=]?(\d+)"
NANOCHAT = r"model_(\d{5,})\.pt"  # its config lies beside it, in meta_*.json

# ------------------------------------------------------------ one checkpoint

def locate(path):
    """(weight files, config files) of one checkpoint.

    path: a file, an index of shards, a folder, a folder of the hub's cache or a hub id, the last two with
    @REVISION where wanted. Raises UserError where there is no model, or a choice of several.
    """
    base, revision = path, ""
    if not os.path.exists(path):
        base, _, revision = path.partition("@")
    in_hub_cache = os.path.isdir(os.path.join(base, "snapshots"))
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not os.path.isdir(os.path.dirname(base))

    if in_hub_cache:
        path = snapshot(base, revision or "main")
    elif is_hub_id and not os.path.exists(path):
        return from_hub(base, revision)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder; a model of the Hugging Face hub is OWNER/NAME, "
                        "such as openai-community/gpt2")

    if os.path.isdir(path):
        folder = path
        names = sorted(os.listdir(path))
    else:
        folder, name = os.path.split(path)
        names = [name]
        refuse_part(folder, name)
    if os.path.isfile(path) and not name_of_index(path):
        weights = [path]  # given by name: whatever its suffix
    else:
        weights = choose(path, names, lambda name: os.path.join(folder, name))
    configs = [os.path.join(folder, name) for name in CONFIGS]
    if len(weights) == 1:
        nanochat = re.fullmatch(NANOCHAT, os.path.basename(weights[0]))
        if nanochat:
            configs.append(os.path.join(folder, f"meta_{nanochat[1]}.json"))
    return weights, [file for file in configs if os.path.isfile(file)]


def snapshot(cache, revision):
    """The folder of a revision in a model's folder of the hub's cache: refs/REVISION holds its name."""
    ref = os.path.join(cache, "refs", *revision.split("/"))
    if not os.path.isfile(ref):
        raise UserError(f"{cache}: no revision {revision} in {os.path.join(cache, 'refs')}")
    with open(ref, encoding="utf-8", errors="replace") as file:
        return os.path.join(cache, "snapshots", file.read().strip())


def refuse_part(folder, name):
    """Raises UserError where a file is one of several that make a model."""
    path = os.path.join(folder, name)
    if re.match(NOT_MODELS, name):
        raise UserError(f"{path}: what a trainer left beside a model (an optimizer's state, a scheduler, "
                        "random numbers), no model; give the model's file or folder")
    if re.search(r"-\d+-of-\d+\.", name):
        raise UserError(f"{path}: one part of a model; give the folder")
    part = r"consolidated\.\d+\.pth"
    if re.fullmatch(part, name):
        parts = [other for other in os.listdir(folder or ".") if re.fullmatch(part, other)]
        if len(parts) > 1:
            raise UserError(f"{path}: one of {len(parts)} model-parallel parts; convert them to one "
                            "(transformers' convert_llama_weights_to_hf.py)")


def from_hub(repo, revision):
    """locate() for a model on the Hugging Face hub: fetches its config and weights into the hub's cache."""
    from huggingface_hub import HfApi, hf_hub_download
    print(f"no {repo} here: asking the Hugging Face hub for it", file=sys.stderr, flush=True)
    revision = revision or None

    def fetch(name):
        return hf_hub_download(repo_id=repo, filename=name, revision=revision)

    try:
        names = HfApi().list_repo_files(repo_id=repo, revision=revision)
        weights = choose(repo, names, fetch)
        configs = [fetch(name) for name in CONFIGS if name in names]
    except UserError:
        raise
    except Exception as error:  # httpx, requests and the hub have dozens of kinds
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{repo}: no such file or folder here, and the Hugging Face hub did not give it: "
                        f"{lines[0][:200]}") from None
    return weights, configs


def choose(path, names, fetch):
    """The weight files among `names` that make one checkpoint; fetch(name) -> its path on disk.

    An index of shards goes first, then .safetensors before torch's files. Raises UserError where it is not
    clear which.
    """
    for index in filter(name_of_index, sorted(names)):  # model.safetensors before pytorch_model.bin
        return shards_of(path, index, names, fetch)

    models = []
    for name in names:
        if name.endswith(SUFFIXES) and not re.match(NOT_MODELS, os.path.basename(name)):
            models.append(name)
    safetensors = [name for name in models if name.endswith(".safetensors")]
    if not safetensors and any(name.endswith(".distcp") for name in names):
        models = []  # the .pt files beside them are no model
    for candidates in (["model.safetensors"], ["pytorch_model.bin"], safetensors, models):
        chosen = [name for name in candidates if name in models]
        if len(chosen) == 1:
            return [fetch(chosen[0])]

    known = what_folder_is(names)
    if known:
        raise UserError(f"{path}: no model in it that can be read: {known}")
    if not models:
        raise UserError(f"{path}: no model in it, looked for model.safetensors, pytorch_model.bin, "
                        f"an index of shards, one file of {' '.join(SUFFIXES)}, "
                        "ckpt.pt, step_*.pt or folders step*, checkpoint-*")
    dots = " ..." if len(models) > 4 else ""
    raise UserError(f"{path}: several weight files and no index ({', '.join(models[:4])}{dots}): give one")


def name_of_index(name):
    return name.endswith((".safetensors.index.json", ".bin.index.json"))


def shards_of(path, index, names, fetch):
    """The weight files that an index names. Raises UserError where one of them is not there."""
    file = fetch(index)
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{path}: {index} has no weight_map of file names")
    if names == [index]:  # an index given by itself
        names = os.listdir(os.path.dirname(file) or ".")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard not in names:
            raise UserError(f"{path}: {index} names {shard}, which is not there")
    return [fetch(shard) for shard in shards]


def read_json(file):
    """The object in a JSON file. Raises UserError naming the file."""
    known = what_file_is(file)
    if known:
        raise UserError(f"{file}: {known}")
    try:
        with open(file, encoding="utf-8") as stream:
            value = json.load(stream)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expects a JSON object")
    return value

# ------------------------------------------------------------ runs

def expand(paths):
    """The checkpoints that command-line arguments stand for, each once, run by run in order of step.

    A run folder stands for its snapshots and ckpt.pt; a folder of step*, checkpoint-* (folders, files, or
    revisions in the hub's cache) for these. A file, a model's folder and a hub id stand for themselves.
    Beside a model, a folder without one (DeepSpeed's global_step500) is no checkpoint.
    """
    runs = {}
    for path in map(os.path.normpath, paths):
        for file in checkpoints_in(path) or [path]:
            runs.setdefault(run_of(file), set()).add(file)

    def order(file):
        return file.endswith("ckpt.pt"), step_in(file), file

    return [file for files in runs.values() for file in sorted(files, key=order)]


def checkpoints_in(path):
    """The checkpoints in a folder of several, in no order; empty for anything else."""
    names = os.listdir(path) if os.path.isdir(path) else []
    run_files = [os.path.join(path, name) for name in names if re.fullmatch(RUN_FILE, name)]
    if run_files:
        return run_files

    is_model = holds_model(names)
    series = []
    for name in names:
        file = os.path.join(path, name)
        if not step_match(name) or re.match(NOT_MODELS, name):
            continue
        is_folder = os.path.isdir(file) and (not is_model or holds_model(os.listdir(file)))
        if name.endswith(SUFFIXES) or is_folder:
            series.append(file)
    if series:
        return series

    refs = os.path.join(path, "refs")  # the hub's cache
    revisions = os.listdir(refs) if os.path.isdir(refs) else []
    return [f"{path}@{name}" for name in revisions if re.search(STEP, name)]


def holds_model(names):
    """Whether one of these files is a model by its name; what DeepSpeed saves of one is not."""
    for name in names:
        is_model = name.endswith(SUFFIXES) and not re.match(NOT_MODELS, name) and not step_match(name)
        if name_of_index(name) or (is_model and "_model_states" not in name):
            return True
    return False


def run_of(path):
    """The run that a checkpoint belongs to: its path without the step and without the text that follows it.

    out/demo/step_0001000.pt, out/demo/ckpt.pt -> out/demo; files/a_step7.pt -> files/a; llama.pt -> llama.pt
    """
    folder, name = os.path.split(path)
    step = step_match(name)
    if not step and not re.fullmatch(RUN_FILE, name):
        return path
    series = re.sub(EPOCH, "", name[:step.start()]).strip("._-@") if step else ""
    if series:
        return os.path.join(folder, series)
    return folder or "."


def step_in(path):
    """The step that a checkpoint's name tells, -1 where it tells none."""
    match = step_match(os.path.basename(path))
    return int(match[1]) if match else -1


def step_match(name):
    return re.fullmatch(NANOCHAT, name) or re.search(STEP, name) or re.search(EPOCH, name)
