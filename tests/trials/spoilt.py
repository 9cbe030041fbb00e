"""
Makes files that are rotten, that lie or that hide code, each from a whole one.
"""
import argparse
import json
import math
import os
import pathlib
import pickle
import struct
import warnings
import zipfile
import zlib

import numpy as np
import torch

from nanorank.images import RECORD


def flipped(data, rng):
    """The same bytes but for one bit."""
    data = bytearray(data)
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(data)

# ------------------------------------------------------------ torch's checkpoints

class Run:
    """Pickles as a call of `function`, which unpickling would make."""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def rebuilt(size, stride, numbers=4):
    """Pickles as a tensor of this size and stride over a storage of a few numbers."""
    storage = torch.zeros(numbers).storage()
    return Run(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, {})


def expanded(size):
    """A tensor of this size whose elements are all one number in memory."""
    return torch.zeros(1).as_strided(size, (0, 0))


def bad_weights(q, canary):
    """{label: a thing to be found in place of the weight q}."""
    return {
        "transposed": q.T,
        "rows missing": q[:-1],
        "flat": q.flatten(),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 32),
        "int8": q.to(torch.int8),
        "int64": q.long(),
        "bool": q > 0,
        "complex64": q.to(torch.complex64),
        "float8": q.to(torch.float8_e4m3fn),
        "nan": q.index_fill(0, torch.tensor([40]), math.nan),
        "inf": q * math.inf,
        "sparse": q.to_sparse(),
        "csr": q.to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(q, 0.1, 0, torch.qint8),
        "meta": q.to("meta"),
        "nested": torch.nested.nested_tensor([q, q[:3]]),
        "no tensor": 3,
        "None": None,
        "a list": q.tolist(),
        "stride 0": expanded(q.shape),
        "1e12 numbers of one": expanded((10**6, 10**6)),
        "1e10 rows of none": expanded((10**10, 32)),
        "beyond its storage": rebuilt((96, 32), (32, 1)),
        "4e11 bytes": rebuilt((10**5, 10**6), (10**6, 1)),
        "negative size": rebuilt((-96, 32), (32, 1)),
        "negative stride": rebuilt((2, 2), (-1, 1)),
        "overflowing size": rebuilt((2**40, 2**40), (0, 0)),
        "a canary": Run(os.system, f"touch {canary}"),
    }


def damaged(raw, canary):
    """{label: content for torch.save}, each from a real checkpoint; code in it makes the file `canary`."""
    touch = Run(os.system, f"touch {canary}")
    model = raw["model"]
    q = "transformer.h.0.attn.c_attn.weight"
    out = {}

    def weight(label, key, x):
        out[label] = {**raw, "model": {**model, key: x}}

    for label, x in bad_weights(model[q], canary).items():
        weight(f"weight: {label}", q, x)
    for key in ("transformer.wte.weight", "transformer.ln_f.weight"):
        weight(f"{key}: nan", key, model[key] * math.nan)
    weight("a name with terminal codes", "\x1b[31m\n\ntransformer.h.0.attn.q_attn.weight", torch.ones(2, 2))
    weight("a name of 1 MB", "x" * 10**6 + ".attn.q_attn.weight", torch.ones(2, 2))
    weight("a name that is a number", 7, torch.ones(2, 2))
    out["20,000 names of no model"] = {f"a{i}.b.c": torch.ones(1) for i in range(20_000)}
    for key in model:
        out[f"without {key}"] = {**raw, "model": {name: x for name, x in model.items() if name != key}}

    # entries beside the weights: gone, or of another type
    deep = {"a": {"b": {"c": torch.ones(1)}}}
    values = {"None": None, "text": "x", "a list": [1], "nan": math.nan, "huge": 10**30, "negative": -5,
              "{}": {}, "deep": deep}
    for key in raw:
        out[f"without {key}"] = {name: x for name, x in raw.items() if name != key}
        for label, x in values.items():
            out[f"{key} = {label}"] = {**raw, key: x}
    for key in raw["model_args"]:
        for x in (0, -1, 10**9, 10**18, 1.5, "12", None, [1], math.nan, True):
            out[f"model_args.{key} = {x!r}"] = {**raw, "model_args": {**raw["model_args"], key: x}}
    for key in ("dataset", "data_dir", "standardize", "n_head", "seed", "attn_wd"):
        for x in (None, 3, [1], "x\0y", torch.ones(3)):
            out[f"config.{key} = {str(x)!r}"] = {**raw, "config": {**raw["config"], key: x}}

    optimizer = raw["optimizer"]
    first = optimizer["state"][0]
    nan = first["exp_avg"] * math.nan
    moments = {"wrong shape": torch.ones(3), "nan": nan, "text": "x", "a canary": touch}
    for label, x in moments.items():
        state = {**optimizer["state"], 0: {**first, "exp_avg": x}}
        out[f"optimizer: {label}"] = {**raw, "optimizer": {**optimizer, "state": state}}
    fewer = {**optimizer, "param_groups": optimizer["param_groups"][:1]}
    out["optimizer: fewer groups"] = {**raw, "optimizer": fewer}

    # containers without end, and code
    cycle = {}
    cycle["n_head"] = cycle["a"] = cycle
    laughs = [1]
    for _ in range(40):
        laughs = {"a": laughs, "b": laughs}
    space = argparse.Namespace(n_head=2)
    space.__dict__["__setstate__"] = touch
    extras = {
        "a cycle": cycle,
        "a billion laughs": laughs,
        "Namespace": argparse.Namespace(n_head=2),
        "Namespace with a call": space,
        "a path": pathlib.PosixPath("/etc/passwd"),
        "eval": Run(eval, f"__import__('os').system('touch {canary}')"),
        "getattr": Run(getattr, raw, "keys"),
        "path.touch": Run(pathlib.Path.touch, pathlib.PosixPath(canary)),
        "open": Run(open, canary, "w"),
        "a class": zipfile.ZipInfo("a"),
    }
    for label, x in extras.items():
        out[label] = {**raw, "args": x}
    out["a module"] = {**raw, "model": torch.nn.Linear(3, 3)}
    return {**out, "a list of it": [raw], "text": "model", "nothing": {}}


def zips(path, folder, bomb=10**9):
    """{label: bytes} of zip files that lie, from a real checkpoint; bomb: bytes that a record unpacks to."""
    whole = zipfile.ZipFile(path)
    made = os.path.join(folder, "made.zip")
    names = whole.namelist()
    big = next(name for name in names if name.endswith("data/0"))

    def pack(change, how=zipfile.ZIP_STORED, more=()):
        with warnings.catch_warnings(), zipfile.ZipFile(made, "w", how) as file:
            warnings.simplefilter("ignore")  # names that are there twice
            for name in names:
                file.writestr(name, change(name, whole.read(name)))
            for name, data in more:
                file.writestr(name, data)
        return pathlib.Path(made).read_bytes()

    def same(name, data):
        return data

    def instead(ending, content):
        return lambda name, data: content if name.endswith(ending) else data

    def short(name, data):
        return data[:-100] if name == big else data

    lying = bytearray(pathlib.Path(path).read_bytes())
    at = lying.index(b"PK\x01\x02")
    lying[at + 24:at + 28] = (2**31).to_bytes(4, "little")  # the first record's size
    return {
        "deflated": pack(same, zipfile.ZIP_DEFLATED),
        "a bomb of zeros, deflated": pack(instead("data/0", bytes(bomb)), zipfile.ZIP_DEFLATED),
        "data cut short": pack(short),
        "data twice": pack(same, more=[(big, b"\0" * 100)]),
        "no data": pack(instead("data/0", b"")),
        "another byte order": pack(instead("byteorder", b"middle")),
        "no pickle": pack(instead("data.pkl", b"")),
        "a path out of it": pack(same, more=[("../../canary", b"x")]),
        "a record of 2 GiB, it says": bytes(lying),
        "a zip of nothing": b"PK\x05\x06" + bytes(18),
        "a zip behind noise": bytes(99) + bytes(lying),
    }


def legacy_bomb():
    """A file as torch before 1.6 wrote them that declares a storage of 1e12 numbers."""
    count = (10**12).to_bytes(6, "little")
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\x80\x02M\xe9\x03."
    storage = (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
               b"\x8a\x06" + count + b"NtQ")
    tensor = (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00\x8a\x06" + count
              + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR")
    model = b"\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00w" + tensor + b"ss."
    return (magic + pickle.dumps({"little_endian": True}, 2) + model + pickle.dumps(["0"], 2)
            + struct.pack("<q", 10**12))

# ------------------------------------------------------------ safetensors

def llama_like():
    """Tensors of two attention layers under Llama's names, {name: tensor}; 4 heads."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i in (0, 1):
        for name in "qkvo":
            x = torch.randn(24, 24, generator=generator)
            tensors[f"model.layers.{i}.self_attn.{name}_proj.weight"] = x
    return tensors


def header_of(data):
    """(header, its size in bytes) of a .safetensors file's bytes."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8:8 + size]), size


def with_header(data, header):
    """The bytes of a .safetensors file with another header, a dict or bytes."""
    _, size = header_of(data)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size:]


def headers(data):
    """{label: bytes} of .safetensors files whose headers lie, from a whole one."""
    header, _ = header_of(data)
    text = json.dumps(header)
    first = min(header)
    own = header[first]
    begin, end = own["data_offsets"]
    rest = {name: x for name, x in header.items() if name != first}

    def entry(**changes):
        return with_header(data, {**header, first: {**own, **changes}})

    def added(entry):  # the first name again
        return with_header(data, (text[:-1] + f', "{first}": {json.dumps(entry)}}}').encode())

    out = {}
    for size in (0, 1, 7, 10**6, 2**31, 2**60, 2**64 - 1):
        out[f"header length {size}"] = size.to_bytes(8, "little") + data[8:]
    for offsets in ([begin, end + 8], [begin, 10**12], [end, begin], [-8, end], [begin], "ab", [0.5, 1.5],
                    [begin, 2**64], None):
        out[f"offsets {offsets}"] = entry(data_offsets=offsets)
    for shape in ([24], [24, 25], [-24, -24], [2**32, 2**32], [0, 24], [1, 24, 24], [24.0, 24], "24", None,
                  [10**30], [576, 1], []):
        out[f"shape {shape}"] = entry(shape=shape)
    for dtype in ("F8", "F128", "", None, 3, "f32", "I32", "U8", "BOOL", "F64", "BF16", "F8_E4M3"):
        out[f"dtype {dtype}"] = entry(dtype=dtype)
    return out | {
        "extra key": entry(more=1),
        "entry a list": with_header(data, {**header, first: []}),
        "metadata of numbers": with_header(data, {**header, "__metadata__": {"a": 1}}),
        "metadata a list": with_header(data, {**header, "__metadata__": [1]}),
        "deep": with_header(data, b"[" * 10**6),
        "deep dicts": with_header(data, b'{"a":' * 10**5),
        "a list": with_header(data, b"[1, 2]"),
        "no JSON": with_header(data, b"\xff" * 99),
        "not UTF-8": with_header(data, text.encode().replace(b"model", b"mod\xffl")),
        "a gap": with_header(data, rest),
        "key twice": added(own),
        "key twice, other offsets": added({**own, "data_offsets": [begin, end + 4]}),
        "bytes behind": data + b"\0" * 8,
        "a line break in a name": with_header(data, {**rest, "a\n\x1b[2Jb": own}),
    }

# ------------------------------------------------------------ nested JSON

LIES = (None, True, -1, 0, 1.5, 2**40, 2**70, math.nan, math.inf, "", "x", "../x", "/etc/passwd", "a\0b",
        "x" * 10**5, [], [1], {}, {"a": []}, [[[]]])
BAD_JSON = {
    "empty": b"",
    "no JSON": b"{",
    "deep": b"[" * 10**6,
    "not UTF-8": b"\xff\xfe",
    "NUL": bytes(100),
    "BOM": b"\xef\xbb\xbf{}",
    "huge int": b'{"vocab_size": ' + b"9" * 10**5 + b"}",
    "a text": b'"splits"',
}
ABSENT = KeyError


def places(value, path=()):
    """Yields the paths of all places in nested JSON."""
    yield path
    inside = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    for key, x in inside:
        yield from places(x, (*path, key))


def put(value, path, x):
    """The same nested JSON with x at a place; without that place where x is ABSENT."""
    if not path:
        return x
    value = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and x is ABSENT:
        del value[path[0]]
    else:
        value[path[0]] = put(value[path[0]], path[1:], x)
    return value


def lies(meta, rng, most):
    """Yields (label, changed meta) for `most` random places and lies."""
    every = [((), x) for x in LIES]
    every += [(path, x) for path in places(meta) if path for x in (*LIES, ABSENT)]
    for i in rng.permutation(len(every))[:most]:
        path, x = every[i]
        yield f"{'/'.join(map(str, path))} = {str(x)[:20]}", put(meta, path, x)

# ------------------------------------------------------------ data sets

def write_images(folder, rng):
    """A folder of some small pictures, as prepare_imagenet.py writes it; its meta."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"kind": "images", "classes": ["a", "b"], "short_side": 16, "mean": [0.5] * 3, "std": [0.25] * 3,
            "source": "test", "splits": {}}
    for split, n in (("train", 12), ("val", 6), ("test", 6)):
        index = np.zeros(n, RECORD)
        for i in range(n):
            index[i] = i * 16 * 20 * 3, 16, 20, i % 2
        files = {f"{split}.bin": rng.bytes(n * 16 * 20 * 3), f"{split}.idx": index.tobytes()}
        listed = []
        for name, content in files.items():
            (folder / name).write_bytes(content)
            listed.append({"name": name, "bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"})
        meta["splits"][split] = {"images": n, "files": listed}
    (folder / "meta.json").write_text(json.dumps(meta))
    return meta


BAD_LINES = {  # {reason in prepare_pile.py's report: lines that are no document}
    "broken JSON": [b"{", b'\xef\xbb\xbf{"text": "bom"}', b"nul\0", b"\0", b"[" * 100_000, b'{"text": "a"',
                    b"NaN2", b"{'text': 'a'}"],
    "not a JSON object": [b"null", b"3", b'"text"', b"[1]", b"true"],
    "no key 'text'": [b"{}", b'{"Text": "a"}'],
    "'text' is not a string": [b'{"text": null}', b'{"text": 3}', b'{"text": ["a"]}', b'{"text": {}}'],
}
ODD_LINES = [  # documents all the same, but for the number where json limits their length
    b'{"text": ' + b"9" * 10**4 + b"}", b'{"text": "lone \\ud800 surrogate"}', b'{"text": "nul \\u0000"}',
    b'{"text": "a", "text": "twice"}', b'{"text": "a", "n": 1e999}']

# ------------------------------------------------------------ config files

CONFIGS = {
    "syntax": "a = = 1",
    "unknown": "bach_size = 3",
    "type": 'batch_size = "x"',
    "nan": "learning_rate = float('nan')",
    "call": "import os",
    "code": "seed = __import__('os').system('true')",
    "deep": "seed = " + "(" * 10_000,
    "deep list": "seed = " + "[" * 500 + "]" * 500,
    "NUL": "seed = 1\0",
    "two": "seed, batch_size = 1, 2",
    "power": "seed = 9 ** 9 ** 9",
    "shift": "seed = 1 << 10**9",
    "division": "seed = 1 / 0",
    "minus": "-" * 5000 + "1",
    "huge int": "seed = " + "9" * 10_000,
    "long": "x" * 10**6,
    "text times": "out_dir = 'a' * 10**9",
    "if": "if 1: seed = 2",
    "set": "seed = {1, 2}",
    "none": "seed = None",
    "bytes": "out_dir = b'x'",
    "sum": "seed = 1" + " + 1" * 5000,
    "line break": 'out_dir = "a\nb"',
}
CONFIGS_EITHER_WAY = {  # refused or read; an infinity is a float, and the trainers refuse it
    "huge float": b"learning_rate = 1e999",
    "not UTF-8": b"seed = 1 # \xff",
    "unknown encoding": b"# -*- coding: latin-99 -*-\nseed = 1",
    "zeros": bytes(1000),
    "UTF-16": "seed = 1".encode("utf-16"),
    "utf-7": b"# -*- coding: utf-7 -*-\nseed = +AAA-",
    "rot13": b"# -*- coding: rot13 -*-\nfrrq = 1",
}
