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

import conftest
import numpy as np
import torch

from nanorank.images import RECORD

ABSENT = KeyError  # in place of a value: it is left out


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


def rebuilt(size, stride):
    """Pickles as a tensor of this size and stride over a storage of four numbers."""
    storage = torch.zeros(4).storage()
    return Run(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, {})


def expanded(size):
    """A tensor of this size whose elements are all one number in memory."""
    return torch.zeros(1).as_strided(size, (0, 0))


def bad_weights(q):
    """{label: a thing to be found in place of the weight q}."""
    types = {str(dtype): q.to(dtype) for dtype in
             (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)}
    nan = q.index_fill(0, torch.tensor([40]), math.nan)
    return types | {
        "transposed": q.T, "rows missing": q[:-1], "flat": q.flatten(), "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 32), "nan": nan, "inf": q * math.inf, "meta": q.to("meta"),
        "sparse": q.to_sparse(), "csr": q.to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(q, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([q, q[:3]]),
        "no tensor": 3, "None": None, "a list": q.tolist(),
        "stride 0": expanded(q.shape),
        "1e12 numbers of one": expanded((10**6, 10**6)),
        "1e10 rows of none": expanded((10**10, 32)),
        "beyond its storage": rebuilt((96, 32), (32, 1)),
        "4e11 bytes": rebuilt((10**5, 10**6), (10**6, 1)),
        "negative size": rebuilt((-96, 32), (32, 1)),
        "negative stride": rebuilt((2, 2), (-1, 1)),
        "overflowing size": rebuilt((2**40, 2**40), (0, 0)),
    }


def damaged(raw, canary):
    """{label: content for torch.save}, each from a real checkpoint; code in it makes the file `canary`."""
    touch = Run(os.system, f"touch {canary}")
    out = {}

    def change(label, part, key, x):
        """x in place of an entry of a part of the checkpoint; no entry where x is ABSENT."""
        changed = {name: value for name, value in raw[part].items() if name != key}
        out[label] = {**raw, part: changed if x is ABSENT else {**changed, key: x}}

    model = raw["model"]
    q = "transformer.h.0.attn.c_attn.weight"
    for label, x in {**bad_weights(model[q]), "a canary": touch}.items():
        change(f"weight: {label}", "model", q, x)
    for key in ("transformer.wte.weight", "transformer.ln_f.weight"):
        change(f"{key}: nan", "model", key, model[key] * math.nan)
    for label, name in {"with terminal codes": "\x1b[31m\n\ntransformer.h.0.attn.q_attn.weight",
                        "of 1 MB": "x" * 10**6 + ".attn.q_attn.weight", "that is a number": 7}.items():
        change(f"a name {label}", "model", name, torch.ones(2, 2))
    out["20,000 names of no model"] = {f"a{i}.b.c": torch.ones(1) for i in range(20_000)}
    for key in model:
        change(f"without {key}", "model", key, ABSENT)

    # entries beside the weights: gone, or of another type
    for key in raw:
        out[f"without {key}"] = {name: x for name, x in raw.items() if name != key}
        for x in (None, "x", [1], math.nan, 10**30, -5, {}, {"a": {"b": {"c": torch.ones(1)}}}):
            out[f"{key} = {x}"] = {**raw, key: x}
    for key in raw["model_args"]:
        for x in (0, -1, 10**9, 10**18, 1.5, "12", None, [1], math.nan, True):
            change(f"model_args.{key} = {x!r}", "model_args", key, x)
    for key in ("dataset", "data_dir", "standardize", "n_head", "seed", "attn_wd"):
        for x in (None, 3, [1], "x\0y", torch.ones(3)):
            change(f"config.{key} = {str(x)!r}", "config", key, x)
    states, groups = raw["optimizer"]["state"], raw["optimizer"]["param_groups"]
    for x in (torch.ones(3), states[0]["exp_avg"] * math.nan, "x", touch):
        state = {**states, 0: {**states[0], "exp_avg": x}}
        change(f"optimizer: exp_avg {str(x)[:20]}", "optimizer", "state", state)
    change("optimizer: fewer groups", "optimizer", "param_groups", groups[:1])

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
    big = next(name for name in whole.namelist() if name.endswith("data/0"))

    def pack(ending="", content=b"", how=zipfile.ZIP_STORED, more=()):
        """The same records, another content in the one whose name has this ending; more: behind them."""
        with warnings.catch_warnings(), zipfile.ZipFile(made, "w", how) as file:
            warnings.simplefilter("ignore")  # names that are there twice
            for name in whole.namelist():
                changed = ending and name.endswith(ending)
                file.writestr(name, content if changed else whole.read(name))
            for name, data in more:
                file.writestr(name, data)
        return pathlib.Path(made).read_bytes()

    lying = bytearray(pathlib.Path(path).read_bytes())
    at = lying.index(b"PK\x01\x02")
    lying[at + 24:at + 28] = (2**31).to_bytes(4, "little")  # the first record's size
    return {
        "deflated": pack(how=zipfile.ZIP_DEFLATED),
        "a bomb of zeros, deflated": pack("data/0", bytes(bomb), zipfile.ZIP_DEFLATED),
        "data cut short": pack("data/0", whole.read(big)[:-100]),
        "data twice": pack(more=[(big, b"\0" * 100)]),
        "no data": pack("data/0"),
        "another byte order": pack("byteorder", b"middle"),
        "no pickle": pack("data.pkl"),
        "a path out of it": pack(more=[("../../canary", b"x")]),
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
    lies = {
        "data_offsets": ([begin, end + 8], [begin, 10**12], [end, begin], [-8, end], [begin], "ab",
                         [0.5, 1.5], [begin, 2**64], None),
        "shape": ([24], [24, 25], [-24, -24], [2**32, 2**32], [0, 24], [1, 24, 24], [24.0, 24], "24", None,
                  [10**30], [576, 1], []),
        "dtype": ("F8", "F128", "", None, 3, "f32", "I32", "U8", "BOOL", "F64", "BF16", "F8_E4M3"),
        "more": (1,),
    }
    out = {}
    for field, values in lies.items():
        for x in values:
            out[f"{field} {x}"] = with_header(data, {**header, first: {**own, field: x}})
    for size in (0, 1, 7, 10**6, 2**31, 2**60, 2**64 - 1):
        out[f"header length {size}"] = size.to_bytes(8, "little") + data[8:]
    for label, offsets in {"key twice": [begin, end], "key twice, other offsets": [begin, end + 4]}.items():
        again = json.dumps({**own, "data_offsets": offsets})
        out[label] = with_header(data, f'{text[:-1]}, "{first}": {again}}}'.encode())
    changed = {
        "entry a list": {**header, first: []},
        "metadata of numbers": {**header, "__metadata__": {"a": 1}},
        "metadata a list": {**header, "__metadata__": [1]},
        "deep": b"[" * 10**6,
        "deep dicts": b'{"a":' * 10**5,
        "a list": b"[1, 2]",
        "no JSON": b"\xff" * 99,
        "not UTF-8": text.encode().replace(b"model", b"mod\xffl"),
        "a gap": rest,
        "a line break in a name": {**rest, "a\n\x1b[2Jb": own},
    }
    out.update({label: with_header(data, x) for label, x in changed.items()})
    return {**out, "bytes behind": data + b"\0" * 8}

# ------------------------------------------------------------ nested JSON

LIES = (None, True, -1, 0, 1.5, 2**40, 2**70, math.nan, math.inf, "", "x", "../x", "/etc/passwd", "a\0b",
        "x" * 10**5, [], [1], {}, {"a": []}, [[[]]])
BAD_JSON = {
    "empty": b"", "no JSON": b"{", "deep": b"[" * 10**6, "not UTF-8": b"\xff\xfe", "NUL": bytes(100),
    "BOM": b"\xef\xbb\xbf{}", "huge int": b'{"vocab_size": ' + b"9" * 10**5 + b"}", "a text": b'"splits"',
}
def places(value, path=()):
    """Yields the paths of all places in nested JSON."""
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, x in value.items():
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
        index = np.array([(i * 16 * 20 * 3, 16, 20, i % 2) for i in range(n)], RECORD)
        files = {f"{split}.bin": rng.bytes(n * 16 * 20 * 3), f"{split}.idx": index.tobytes()}
        meta["splits"][split] = {"images": n, "files": conftest.write_images(folder, files)}
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
    "syntax": "a = = 1", "unknown": "bach_size = 3", "type": 'batch_size = "x"', "call": "import os",
    "nan": "learning_rate = float('nan')", "code": "seed = __import__('os').system('true')",
    "deep": "seed = " + "(" * 10_000, "deep list": "seed = " + "[" * 500 + "]" * 500, "NUL": "seed = 1\0",
    "two": "seed, batch_size = 1, 2", "power": "seed = 9 ** 9 ** 9", "shift": "seed = 1 << 10**9",
    "division": "seed = 1 / 0", "minus": "-" * 5000 + "1", "huge int": "seed = " + "9" * 10_000,
    "long": "x" * 10**6, "text times": "out_dir = 'a' * 10**9", "if": "if 1: seed = 2",
    "set": "seed = {1, 2}", "none": "seed = None", "bytes": "out_dir = b'x'",
    "sum": "seed = 1" + " + 1" * 5000, "line break": 'out_dir = "a\nb"',
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
