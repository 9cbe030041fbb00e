"""
scripts/unpack.py: the heads of CTranslate2's and llama2.c's files are those that were written to them.
"""
import struct

import numpy as np
import pytest
import torch
from conftest import one_line_exit_2, script

from nanorank.checkpoints import Checkpoint
from nanorank.errors import UserError
from nanorank.foreign_files import what_file_is
from scripts import unpack

RNG = np.random.default_rng(0)


def matrix(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def ctranslate2(path, variables, aliases=()):
    """Writes {name: array} as CTranslate2's converters do."""
    def text(s):
        return struct.pack("<H", len(s) + 1) + s.encode() + b"\0"

    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, x in variables.items():
        x = np.asarray(x)
        data += text(name) + struct.pack(f"<B{x.ndim}I", x.ndim, *x.shape)
        data += struct.pack("<BI", kinds[str(x.dtype)], x.nbytes) + x.tobytes()
    data += struct.pack("<I", len(aliases)) + b"".join(text(a) + text(b) for a, b in aliases)
    path.write_bytes(data)
    return path


def whisper(dtype=np.float16, d=12):
    """A layer of an encoder and one of a decoder, 3 heads of 4."""
    variables = {"decoder/embeddings/weight": matrix(20, d, dtype=dtype),
                 "decoder/num_heads": np.int16(3), "encoder/num_heads": np.int16(3)}
    for path in ("encoder/layer_0/self_attention", "decoder/layer_0/self_attention"):
        variables[f"{path}/linear_0/weight"] = matrix(3 * d, d, dtype=dtype)
        variables[f"{path}/linear_0/bias"] = matrix(3 * d, dtype=dtype)
        variables[f"{path}/linear_1/weight"] = matrix(d, d, dtype=dtype)
    path = "decoder/layer_0/attention"
    for i, rows in enumerate((d, 2 * d, d)):
        variables[f"{path}/linear_{i}/weight"] = matrix(rows, d, dtype=dtype)
    return variables


def by_stack(folder):
    return {layer.stack: layer for layer in Checkpoint(str(folder)).attention_layers()}


def same(layer, q, k, v, o):
    """Whether a layer's heads are those of q, k, v, o, each out x in."""
    r = layer.W_Q.shape[1]
    for found, x in ((layer.W_Q, q), (layer.W_K, k), (layer.W_V, v)):
        assert np.array_equal(found.float().flatten(0, 1).numpy(), x.astype(np.float32))
    assert np.array_equal(layer.P.float().transpose(0, 1).flatten(1).numpy(), o.astype(np.float32))
    assert len(layer.W_Q) * r == len(q)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_ctranslate2(tmp_path, dtype):
    wanted = whisper(dtype)
    path = ctranslate2(tmp_path / "model.bin", wanted,
                       [("decoder/projection/weight", "decoder/embeddings/weight")])
    assert "scripts.unpack" in what_file_is(path)
    script("-m", "scripts.unpack", path, tmp_path / "out")

    layers = by_stack(tmp_path / "out")
    assert layers.keys() == {"encoder", "decoder", "cross"}
    for stack in ("encoder", "decoder"):
        start = f"{stack}/layer_0/self_attention/linear_"
        q, k, v = np.split(wanted[f"{start}0/weight"], 3)
        same(layers[stack], q, k, v, wanted[f"{start}1/weight"])
        assert len(layers[stack].W_Q) == 3
    q, kv, o = (wanted[f"decoder/layer_0/attention/linear_{i}/weight"] for i in range(3))
    same(layers["cross"], q, *np.split(kv, 2), o)


def test_llama2_c(tmp_path):
    d, hidden, n_layer, n_head, n_kv_head, vocab = 16, 24, 2, 4, 2, 30
    kv = d // n_head * n_kv_head
    parts = {"embedding": matrix(vocab, d), "attention_norm": matrix(n_layer, d),
             "wq": matrix(n_layer, d, d), "wk": matrix(n_layer, kv, d), "wv": matrix(n_layer, kv, d),
             "wo": matrix(n_layer, d, d), "ffn_norm": matrix(n_layer, d), "w1": matrix(n_layer, hidden, d),
             "w2": matrix(n_layer, d, hidden), "w3": matrix(n_layer, hidden, d), "norm": matrix(d),
             "freq_cis": matrix(64)}
    header = struct.pack("<7i", d, hidden, n_layer, n_head, n_kv_head, vocab, 64)
    (tmp_path / "s.bin").write_bytes(header + b"".join(x.tobytes() for x in parts.values()))
    unpack.main(str(tmp_path / "s.bin"), str(tmp_path / "out"))

    layers = list(Checkpoint(str(tmp_path / "out")).attention_layers())
    assert len(layers) == n_layer
    for layer, q, k, v, o in zip(layers, parts["wq"], parts["wk"], parts["wv"], parts["wo"], strict=True):
        assert layer.n_kv_head == n_kv_head
        assert layer.rope == (d // n_head, True)  # 2j and 2j + 1 turn together
        k, v = (torch.from_numpy(x).view(n_kv_head, -1, d).repeat_interleave(2, 0).flatten(0, 1).numpy()
                for x in (k, v))
        same(layer, q, k, v, o)


def test_what_cannot_be_unpacked_is_refused(tmp_path):
    whole = ctranslate2(tmp_path / "model.bin", whisper()).read_bytes()
    (tmp_path / "part.bin").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)))
    quantised = whisper()
    quantised["encoder/layer_0/self_attention/linear_0/weight"] = np.ones((36, 12), np.int8)
    ctranslate2(tmp_path / "int8.bin", quantised)
    said = {"part.bin": "a part of the model missing", "noise.bin": "neither", "none.bin": "No such",
            "int8.bin": "quantised"}
    for name, words in said.items():
        with pytest.raises(UserError, match=words):
            unpack.main(str(tmp_path / name), str(tmp_path / "out"))
    result = script("-m", "scripts.unpack", tmp_path / "part.bin", tmp_path / "out")
    one_line_exit_2(result, "part.bin")
