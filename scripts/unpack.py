"""
Makes a folder that analyze.py reads of a model file of CTranslate2 or llama2.c.

    python -m scripts.unpack model.bin out/whisper-base         # CTranslate2's model.bin (faster-whisper)
    python -m scripts.unpack stories260K.bin out/stories260K    # llama2.c's .bin

The folder holds model.safetensors and config.json. Weights stay as they are stored, float32 or float16;
quantised ones are refused.
"""
import os
import re
import struct
import sys

import numpy as np
from safetensors.numpy import save

from nanorank.errors import UserError, user_errors
from nanorank.files import make_folder, save_json, write_atomic
from nanorank.foreign_files import CTRANSLATE2

# CTranslate2's numbers of types; bfloat16 has no type in numpy
CT2_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}

# its names of attention's matrices -> Hugging Face's, and how many of them are stacked in one
CT2_NAMES = {
    "self_attention.linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_1": ("self_attn.out_proj",),
    "attention.linear_0": ("encoder_attn.q_proj",),
    "attention.linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention.linear_2": ("encoder_attn.out_proj",),
}


class Reader:
    """Reads a file's bytes in order. Raises UserError where they end too early."""

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.data = file.read()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        self.position = 0

    def take(self, size):
        start = self.position
        self.position += size
        if size < 0 or self.position > len(self.data):
            raise UserError(f"{self.path}: ends at byte {len(self.data)}, in the middle of a tensor: "
                            "is a part of the model missing?")
        return self.data[start:self.position]

    def numbers(self, form):
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def text(self):
        size, = self.numbers("H")
        return self.take(size).rstrip(b"\0").decode("utf-8", "replace")

    def array(self, dtype, shape):
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.take(size), dtype).reshape(shape)


def read_ctranslate2(reader):
    """({name: array}, config) of CTranslate2's model.bin, names as in Hugging Face's Whisper and BART."""
    path = reader.path
    reader.numbers("I")  # the version of the format
    spec = reader.text()
    _, count = reader.numbers("II")  # the specification's revision
    tensors, config, n_kv_head = {}, {"model_type": spec.removesuffix("Spec").lower()}, {}
    for _ in range(count):
        name = reader.text().replace("/", ".")
        rank, = reader.numbers("B")
        shape = reader.numbers(f"{rank}I")
        kind, size = reader.numbers("BI")
        data = reader.take(size)
        is_matrix = name.endswith(".weight") and rank > 1
        if is_matrix and CT2_TYPES.get(kind) not in ("<f4", "<f2"):
            raise UserError(f"{path}: {name} is quantised, or bfloat16: make the model again in float16")
        if kind not in CT2_TYPES:
            continue
        x = np.frombuffer(data, CT2_TYPES[kind]).reshape(shape)
        if name.endswith(".num_heads"):
            stack = name.split(".")[0]
            config[f"{stack}_attention_heads"] = int(x)
        elif name.endswith(".num_heads_kv"):
            n_kv_head[name.split(".")[0]] = int(x)
        elif rank > 0:
            tensors.update(as_hugging_face(name, x))
    for stack, n in n_kv_head.items():
        if n not in (0, config.get(f"{stack}_attention_heads")):
            raise UserError(f"{path}: {n} key/value heads are shared by the queries of the {stack}, which is "
                            "not read")
    return tensors, config


def as_hugging_face(name, x):
    """{name: array} of one tensor of CTranslate2, its stacked q, k, v apart."""
    name = re.sub(r"\.layer_(\d+)\.", r".layers.\1.", name)
    for own, names in CT2_NAMES.items():
        path, found, end = name.partition(f".{own}.")
        if found:
            parts = np.split(x, len(names))
            return {f"{path}.{other}.{end}": part for other, part in zip(names, parts)}
    return {name: x}


def read_llama2_c(reader):
    """({name: array}, config) of llama2.c's .bin in float32, names as in Meta's Llama."""
    path = reader.path
    dim, hidden, n_layers, n_heads, n_kv_heads, vocab, seq_len = reader.numbers("7i")
    if min(dim, hidden, n_layers, n_heads, n_kv_heads, seq_len) < 1 or dim % n_heads:
        raise UserError(f"{path}: neither CTranslate2's model.bin nor a .bin of llama2.c in float32")
    kv_dim = dim // n_heads * n_kv_heads
    shapes = {
        "attention_norm": (dim,),
        "attention.wq": (dim, dim),
        "attention.wk": (kv_dim, dim),
        "attention.wv": (kv_dim, dim),
        "attention.wo": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
    }
    tensors = {"tok_embeddings.weight": reader.array("<f4", (abs(vocab), dim))}
    for name, shape in shapes.items():
        for layer, x in enumerate(reader.array("<f4", (n_layers, *shape))):
            tensors[f"layers.{layer}.{name}.weight"] = x
    tensors["norm.weight"] = reader.array("<f4", (dim,))
    config = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads,
              "vocab_size": abs(vocab), "max_seq_len": seq_len, "norm_eps": 1e-5}  # that of run.c
    return tensors, config


def main(path, folder):
    reader = Reader(path)
    read = read_ctranslate2 if CTRANSLATE2.match(reader.data) else read_llama2_c
    tensors, config = read(reader)
    make_folder(folder)
    data = save({name: np.ascontiguousarray(x) for name, x in tensors.items()})
    write_atomic(os.path.join(folder, "model.safetensors"), lambda file: file.write(data))
    save_json(os.path.join(folder, "config.json"), config)
    print(f"{folder}: {len(tensors)} tensors, {sum(x.size for x in tensors.values()):,} numbers")


if __name__ == "__main__":
    with user_errors("unpack.py"):
        if sys.argv[1:] in (["--help"], ["-h"]):
            print(__doc__.strip())
        elif len(sys.argv) == 3:
            main(*sys.argv[1:])
        else:
            raise UserError("usage: python -m scripts.unpack FILE.bin FOLDER")
