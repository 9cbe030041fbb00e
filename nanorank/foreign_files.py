"""
Says what a file or folder is that cannot be read as a checkpoint of plain tensors, and the next step.

    what_file_is("model.gguf")         # "a GGUF file of llama.cpp: ..."
    what_folder_is(["__0_0.distcp"])   # "a folder of torch.distributed.checkpoint: ..."
    what_pickle_holds(path)            # "a whole pickled model: ..."

Each returns an empty string for what it does not know. Nothing is unpickled.
"""
import contextlib
import os
import pickletools
import re
import zipfile

GGUF = ("a GGUF file of llama.cpp, mostly of quantised weights: give the Hugging Face folder that it was "
        "made from, or let transformers make one: "
        "model = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME); "
        "model.config.save_pretrained(OUT); torch.save(model.state_dict(), OUT + '/pytorch_model.bin')")
# a version, a length, the name of a specification
CTRANSLATE2 = re.compile(rb"[\x01-\x0f]\0\0\0.\0\w+Spec\0", re.S)
NO_TORCH = "give the model as .safetensors or as a state dict of torch"
DCP = ("of torch.distributed.checkpoint (FSDP, DCP), each process's share in a file: "
       "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt makes one of it "
       "(of accelerate: accelerate merge-weights FOLDER OUT)")
DEEPSPEED = ("of DeepSpeed, each process's share in a file: python zero_to_fp32.py . OUT, the script that "
             "DeepSpeed left beside it, makes a model of it")
SHARDS = ("holds one process's shard of the weights (DTensor, ShardedTensor), not the model: gather it, "
          "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True, "
          "or for verl's files python -m verl.model_merger merge")

# {how a file begins: what it is}
BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: git lfs pull fetches that",
    b"GGUF": GGUF,
    b"lmgg": GGUF,
    b"tjgg": GGUF,
    b"\x89HDF\r\n\x1a\n": f"an HDF5 file (Keras, TensorFlow): {NO_TORCH}",
    b"\x93NUMPY": f"a numpy array: {NO_TORCH}",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first (zstd -d)",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
}


def what_file_is(path):
    """Says what a file is by its first bytes, and the next step; "" where it may be a checkpoint."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return ""
    if size == 0:
        return "an empty file: the download or the save was cut short"
    for beginning, words in BEGINNINGS.items():
        if start.startswith(beginning):
            return words
    if CTRANSLATE2.match(start):
        return "a model of CTranslate2: python -m scripts.unpack FILE OUT makes a folder of it"
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not a model: the download went to a login or an error page"
    if os.path.basename(path).endswith(".distcp"):
        return f"one file of a folder {DCP}"
    if path.endswith((".onnx", ".tflite", ".msgpack", ".h5", ".keras")):
        return f"a file of another framework: {NO_TORCH}"
    if start[257:262] == b"ustar" and not zipfile.is_zipfile(path):
        return "a tar archive: unpack it first and give the file in it"
    return what_zip_is(path)


def what_zip_is(path):
    """Says what a zip is that torch.save did not write."""
    if not zipfile.is_zipfile(path):
        return ""
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith("constants.pkl") for name in names) and any("/code/" in name for name in names):
            return ("a TorchScript archive, which holds code: where it was made, "
                    "torch.save(model.state_dict(), 'weights.pt')")
        if any("serialized_" in name or "/models/" in name for name in names) \
                and not any(name.endswith("data.pkl") for name in names):
            return "an archive of torch.export, which holds code: save model.state_dict() where it was made"
        if names and all(name.endswith(".npy") for name in names):
            return f"an archive of numpy arrays: {NO_TORCH}"
        if not any(name.endswith("data.pkl") for name in names):
            return "a zip archive that torch.save did not write: unpack it first"
    return ""


def what_folder_is(names):
    """Says what a folder of these names is that holds no model, or a model in parts."""
    bases = [os.path.basename(name) for name in names]
    if any(name.endswith(".distcp") for name in bases) or ".metadata" in bases:
        return f"a folder {DCP}"
    fsdp = [name for name in bases if re.match(r"pytorch_model_fsdp|optimizer_\d+$|distcp", name)]
    if any(name.startswith("pytorch_model_fsdp") for name in fsdp):
        return f"{fsdp[0]} in it is a folder {DCP}"
    deepspeed = r"zero_pp_rank_\d+|_optim_states\.pt$|mp_rank_\d+_model_states"
    if any(re.search(deepspeed, name) for name in bases):
        return f"a folder {DEEPSPEED}"
    if any(re.match(r"global_step\d+$", name) for name in bases):
        return f"the global_step folder in it is {DEEPSPEED}"
    if any(name.endswith((".gguf", ".ggml")) for name in bases):
        return GGUF
    if any(re.match(r"model_world_size_\d+_rank_\d+", name) for name in bases):
        return f"each file in it {SHARDS}"
    if any(name.endswith((".h5", ".msgpack", ".onnx", ".tflite", "saved_model.pb")) for name in bases):
        return f"a model of another framework: {NO_TORCH}"
    if any(re.match(r"adapter_model\.", name) for name in bases):
        return "an adapter without its model: merge it first (peft: model.merge_and_unload())"
    return ""


def what_pickle_holds(path, most=1 << 22):
    """Says what the pickle of a torch file holds beside plain tensors, and the next step.

    Read by pickletools, which runs nothing, up to `most` bytes.
    """
    classes = []
    strings = set()
    with contextlib.suppress(Exception):
        for name, value in globals_and_strings(pickle_of(path, most)):
            if name:
                classes.append(value)
            else:
                strings.add(value)
    foreign = [name for name in classes if not PLAIN.match(name)]
    if any(name.endswith((".DTensor", ".ShardedTensor", ".DTensorSpec")) for name in classes):
        return SHARDS
    if {"_parameters", "_modules"} <= strings:
        own = [name for name in foreign if not name.startswith("torch.nn")] or foreign
        name = own[0] if own else "unknown"
        return (f"a whole pickled model of class {name}, which only its own code can open: where it was "
                "made, torch.save(model.state_dict(), 'weights.pt') saves what is needed here")
    if "_packed_params" in strings or any("quantized" in name for name in classes):
        return "quantised by torch: dequantise it first, and save the state dict"
    return ""


# what plain tensors are made of
PLAIN = re.compile(r"(torch\._utils\._rebuild|torch\.\w*Storage$|torch\.(Size|device|\w*\d+)$|"
                   r"collections\.OrderedDict|numpy|_codecs|builtins|__builtin__|argparse|pathlib)")


def pickle_of(path, most):
    """The first bytes of the pickle in a torch file: a record of its zip, or the file itself."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.filename.endswith("data.pkl"):
                    with archive.open(record) as file:
                        return file.read(most)
    with open(path, "rb") as file:
        return file.read(most)


def globals_and_strings(data):
    """Yields (True, "module.name") for each global of pickles, (False, text) for each string."""
    start = 0
    for _ in range(8):  # an old torch file is several pickles, one behind the other
        recent = []
        end = start
        for opcode, arg, position in pickletools.genops(data[start:]):
            end = start + position + 1
            if opcode.name == "GLOBAL":
                yield True, str(arg).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL" and len(recent) >= 2:
                yield True, ".".join(recent[-2:])
            elif isinstance(arg, str):
                recent.append(arg)
                yield False, arg
        start = end
