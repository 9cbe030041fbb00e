"""
Every format on disk gives the same heads; files that are damaged, foreign, hostile or unclear are refused in
one line. Namings without a Hugging Face model are held against their own attention (test_families.py has the
others).
"""
import argparse
import json
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model import GPT, init_weights
from nanorank.checkpoints import Checkpoint, expand, open_all, run_of
from nanorank.families import attention_layers, find_attention, left_out

ARGS = {"vocab_size": 64, "block_size": 16, "n_layer": 3, "n_head": 2, "n_embd": 16,
        "dropout": 0.0, "bias": True}


def gpt(seed=0):
    model = GPT(**ARGS)
    init_weights(model, seed)
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def llama(H=4, n=2, r=6, d=24, layers=2):
    torch.manual_seed(0)
    shapes = {"q_proj": (H * r, d), "k_proj": (n * r, d), "v_proj": (n * r, d), "o_proj": (d, H * r)}
    state = {}
    for i in range(layers):
        for name, shape in shapes.items():
            state[f"model.layers.{i}.self_attn.{name}.weight"] = torch.randn(shape)
    return state


def renamed(state, *pairs):
    """The same tensors under names in which each (old, new) is replaced."""
    out = {}
    for name, p in state.items():
        for old, new in pairs:
            name = name.replace(old, new)
        out[name] = p
    return out


def heads(path, **options):
    return list(Checkpoint(str(path), **options).attention_layers())


def assert_same(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        assert (x.stack, x.layer) == (y.stack, y.layer)
        assert all(torch.equal(p.float(), q.float()) for p, q in zip(x[2:6], y[2:6]))


def refused(path, *words, **options):
    with pytest.raises(ValueError) as error:
        heads(path, **options)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message

# ------------------------------------------------------------ formats

def test_torch_files_of_many_makes(tmp_path):
    state, want = gpt(), list(attention_layers(gpt(), 2))
    wrapped = {f"module._orig_mod.{name}": p for name, p in state.items()}
    inside = {f"model._orig_mod.{name}": p for name, p in state.items()}
    namespace = argparse.Namespace(num_heads=2, path="x")
    files = {
        "bare.pt": state,
        "bare.bin": wrapped,
        "inside.pth": inside,
        "ours.pt": {"model": state, "model_args": ARGS},
        "lightning.ckpt": {"state_dict": inside, "hyper_parameters": {"n_head": 2}, "global_step": 7},
        "a.pt": {"model_state": wrapped},
        "b.pt": {"model_state_dict": state, "epoch": 3},
        "c.pt": {"teacher": state},
        "mae.pth": {"model": state, "args": namespace, "best": np.float64(3.5)},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        n_head = 0 if name in ("ours.pt", "lightning.ckpt", "mae.pth") else 2
        assert_same(heads(tmp_path / name, n_head=n_head), want)
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=False)  # as torch before 1.6 did
        assert_same(heads(tmp_path / name, n_head=n_head), want)
    assert Checkpoint(str(tmp_path / "lightning.ckpt")).step == 7
    torch.save({"student": state, "teacher": gpt(1)}, tmp_path / "dino.pth")
    refused(tmp_path / "dino.pth", "--state_dict=student", "--state_dict=teacher", n_head=2)
    assert_same(heads(tmp_path / "dino.pth", n_head=2, state_dict="student"), want)
    refused(tmp_path / "dino.pth", "--state_dict=ema", "student, teacher", state_dict="ema")


def test_safetensors_shards_and_folders(tmp_path):
    state = llama()
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "one").mkdir()
    save_file(state, tmp_path / "one" / "model.safetensors")
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    torch.save({"optimizer": 1}, tmp_path / "one" / "training_args.bin")
    want = list(attention_layers(state, 4))
    assert_same(heads(tmp_path / "one"), want)
    assert_same(heads(tmp_path / "one" / "model.safetensors"), want)
    for kind, end in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        names, where = list(state), {}
        for i in (0, 1):  # a layer's tensors lie in both shards
            shard = f"{end.split('.')[0]}-0000{i + 1}-of-00002.{kind}"
            part = {name: state[name] for name in names[i::2]}
            save_file(part, folder / shard) if kind == "safetensors" else torch.save(part, folder / shard)
            where.update(dict.fromkeys(part, shard))
        (folder / f"{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        assert_same(heads(folder), want)
        assert_same(heads(folder / f"{end}.index.json"), want)
        refused(folder / shard, "one part of a model; give the folder")
        os.remove(folder / shard)
        refused(folder, shard, "not there")
    (tmp_path / "two").mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save(state, tmp_path / "two" / name)
    refused(tmp_path / "two", "several weight files", "a.pt, b.pt", n_head=4)
    for i in (0, 1):
        torch.save(state, tmp_path / "two" / f"consolidated.0{i}.pth")
    refused(tmp_path / "two" / "consolidated.00.pth", "model-parallel", n_head=4)


def test_half_precision_and_meta_params(tmp_path):
    half = {name: p.bfloat16() for name, p in llama().items()}
    state = renamed(half, ("model.", ""), ("self_attn", "attention"), ("q_proj", "wq"), ("k_proj", "wk"),
                    ("v_proj", "wv"), ("o_proj", "wo"))
    torch.save(state, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text('{"dim": 24, "n_heads": 4, "n_kv_heads": 2}')
    assert_same(heads(tmp_path), list(attention_layers(state, 4)))


def test_only_attention_is_read(tmp_path, monkeypatch):
    """One layer at a time, and no other tensor."""
    save_file({**llama(layers=3), "lm_head.weight": torch.ones(50, 24)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(str(tmp_path), n_head=4)
    read = []
    own = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, names: read.append(list(names)) or own(self, names))
    for i, _ in enumerate(checkpoint.attention_layers()):
        assert len(read) == i + 1 and len(read[i]) == 4
        assert all(f"layers.{i}.self_attn" in name for name in read[i])


def test_what_is_refused(tmp_path):
    class Canary:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'canary'}",)

    save_file(llama(), tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(data[:len(data) // 2])
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"state_dict": Canary()}))
    torch.save({"state_dict": llama(), "extra": Canary()}, tmp_path / "evil.pt")
    torch.save([llama()], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "nothing.pt")
    quantised = {name: p.to(torch.int8) for name, p in llama().items()}
    save_file(quantised, tmp_path / "int8.safetensors")
    torch.save(quantised, tmp_path / "int8.pt")
    for name in ("nan", "zero"):
        (tmp_path / name).mkdir()
        save_file(llama(), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("NaN" if name == "nan" else '{"num_attention_heads": 0}')
    (tmp_path / "empty").mkdir()
    said = {
        "short.safetensors": ["damaged"],
        "noise.safetensors": ["damaged"],
        "evil.bin": ["plain tensors"],
        "evil.pt": ["plain tensors", "system"],
        "list.pt": ["holds a list"],
        "nothing.pt": ["no state dict"],
        "int8.safetensors": ["stored as I8", "dequantise"],
        "int8.pt": ["stored as int8", "dequantise"],
        "nan": ["config.json", "JSON object"],
        "zero": ["nothing says how many heads", "--n_head"],
        "empty": ["no model in it", "model.safetensors"],
        "absent.pt": ["no such file"],
    }
    for name, words in said.items():
        refused(tmp_path / name, name, *words, n_head=0 if name in ("zero", "nan") else 4)
    assert not (tmp_path / "canary").exists()

# ------------------------------------------------------------ heads

def test_heads_come_from_somewhere_and_are_never_guessed(tmp_path):
    save_file(llama(), tmp_path / "model.safetensors")
    refused(tmp_path, "nothing says how many heads", "(24, 24)", "--n_head")
    want = list(attention_layers(llama(), 4))
    for options in ({"n_head": 4}, {"d_head": 6}, {"n_kv_head": 2}, {"n_head": 4, "n_kv_head": 2}):
        assert_same(heads(tmp_path, **options), want)
    refused(tmp_path, "do not divide into 5 heads", n_head=5)
    refused(tmp_path, "do not divide into 3 heads", n_head=3)  # k's 12 rows are no whole number of heads of 8
    refused(tmp_path, "2 key/value heads of 4, not 4", n_head=4, n_kv_head=4)
    refused(tmp_path, "--d_head=7 does not divide", d_head=7)
    config = {"text_config": {"num_attention_heads": 4}, "vision_config": {"num_attention_heads": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(heads(tmp_path), want)
    for n_head in (0, 2):  # a flag fills gaps
        checkpoint = Checkpoint(str(tmp_path), n_head=n_head)
        assert checkpoint.heads_of(checkpoint.modules()[0]) == (4, "config.json")
    norms = {f"model.layers.{i}.self_attn.q_norm.weight": torch.ones(6) for i in (0, 1)}
    state = {**llama(), **norms}
    assert_same(list(attention_layers(state)), want)              # a norm of each head tells its width
    with pytest.raises(ValueError, match="config says 2 heads, the shapes beside .* say 4"):
        list(attention_layers(state, configs={"config": {"num_attention_heads": 2}}))


def test_another_parts_heads_are_not_taken(tmp_path):
    """Composite models: a part whose own config is missing, silent, or of another width is refused."""
    vision = renamed(llama(H=2, n=2, r=6, d=12), ("model.", "vision_tower.vision_model.encoder."))
    text = renamed(llama(), ("model.", "language_model.model."))
    save_file({**text, **vision}, tmp_path / "model.safetensors")
    tower = {"num_attention_heads": 2, "hidden_size": 12}
    for config, words in (({"text_config": {"num_attention_heads": 4}}, "vision_tower"),
                          ({"num_attention_heads": 4, "hidden_size": 24}, "vision_tower"),
                          ({"text_config": {"hidden_size": 24}, "vision_config": tower}, "language_model")):
        (tmp_path / "config.json").write_text(json.dumps(config))
        refused(tmp_path, "nothing says how many heads", words)
    got = heads(tmp_path, n_head=4)  # LLaVA 1.5 says the vision tower's alone
    assert {(x.stack, len(x.W_Q)) for x in got} == {("text", 4), ("vision", 2)}
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "pruned_heads": {"1": [0]}}')
    refused(tmp_path, "pruned_heads")


def test_names_that_two_models_share_are_told_apart_or_refused():
    """qkv_proj and out_proj in h.N.attn: in CodeGen's order only where it is CodeGen. timm's qkv in another
    order than its ViT's is refused."""
    torch.manual_seed(0)
    x, qkv, out = torch.randn(5, 16), torch.randn(48, 16), torch.randn(16, 16)
    hand = {"h.0.attn.qkv_proj.weight": qkv, "h.0.attn.out_proj.weight": out}
    (layer,) = attention_layers(hand, 4)
    scores, values = reference(x, *(x @ qkv.T).chunk(3, -1), 4)
    assert_heads(layer, x, scores, values, lambda values: merge(values) @ out.T)
    (codegen,) = attention_layers({**hand, "h.0.mlp.fc_in.weight": torch.ones(64, 16)}, 4)
    assert not torch.equal(codegen.W_Q, layer.W_Q)
    timm = {"blocks.0.attn.qkv.weight": qkv, "blocks.0.attn.proj.weight": out}
    for state, words in (({**timm, "blocks.0.attn.attention_biases": torch.ones(4, 9)}, "TinyViT"),
                         (renamed(timm, ("attn.", "attn_grid.attn.")), "MaxViT"),
                         ({**timm, "blocks.0.attn.qkv.weight": qkv[:32]}, "--n_kv_head=2")):
        with pytest.raises(ValueError, match=words):
            list(attention_layers(state, 4))


def test_what_would_be_measured_wrongly_is_refused():
    state = llama()
    for name, x, words in (("0.self_attn.q_proj.lora_A", torch.ones(2, 24), "merge the adapter"),
                           ("2.self_attn.q_proj.base_layer", torch.ones(24, 24), "merge the adapter"),
                           ("1.self_attn.q_proj", torch.ones(0), "placeholder")):
        with pytest.raises(ValueError, match=words):
            list(attention_layers({**state, f"model.layers.{name}.weight": x}, 4))


def test_other_attention_and_missing_layers_are_told():
    state = {name: p for name, p in llama(layers=3).items() if "layers.1.self_attn" not in name}
    state["model.layers.1.mla_attn.kv_b.weight"] = torch.ones(8, 8)
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    remarks = left_out(find_attention(shapes), shapes)
    assert len(remarks) == 2
    assert "model.layers.1.mla_attn.kv_b.weight (8, 8)" in remarks[0]
    assert "layers 1: no attention" in remarks[1]


def test_names_and_shapes_that_lie():
    """A bias table of one dimension, a norm without numbers, a layer 10**12, heads of different widths."""
    path = "model.layers.0.self_attn"
    odd = {f"{path}.relative_position_bias_table": torch.ones(5), f"{path}.q_norm.weight": torch.ones(0)}
    assert len(next(attention_layers({**llama(), **odd}, 4)).W_Q) == 4
    state = renamed(llama(), ("layers.1.", f"layers.{10**12}."))
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    assert left_out(find_attention(shapes), shapes)[0].endswith("11, 12 ...: no attention known")
    state = {"b.0.proj.weight": torch.ones(12, 8)}
    for name in ("key", "query", "value"):
        state[f"b.0.heads.0.{name}.weight"] = torch.ones(4, 12)
        state[f"b.0.heads.1.{name}.weight"] = torch.ones(4, 11)
    with pytest.raises(ValueError, match="do not divide into 2 heads"):
        list(attention_layers(state))


def test_two_names_for_one_tensor_are_refused(tmp_path):
    twice = {**llama(), **renamed(llama(), ("model.", "module.model."))}
    torch.save(twice, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "holds both model.layers", "module.model.layers", n_head=4)


def test_buffers_are_no_parameters(tmp_path):
    buffers = {"model.layers.0.attn_mask": torch.ones(4, 9, 9), "model.rotary_sin": torch.ones(9, 4),
               "model.scalar": torch.ones(()), "model.layers.0.self_attn.inv_freq": torch.ones(3)}
    torch.save({**llama(), **buffers}, tmp_path / "a.pt")
    assert set(Checkpoint(str(tmp_path / "a.pt"), n_head=4).parameters()) == set(llama())


def test_heads_of_t5_and_swin_stand_in_their_shapes():
    t5 = {}
    for layer in ("encoder.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.0.SelfAttention",
                  "decoder.block.{}.layer.1.EncDecAttention"):
        for i in (0, 1):
            for x in "qkvo":
                t5[f"{layer.format(i)}.{x}.weight"] = torch.randn((24, 16) if x != "o" else (16, 24))
    for side, H in (("encoder", 3), ("decoder", 6)):
        t5[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = torch.ones(32, H)
    got = list(attention_layers(t5))
    assert [(x.stack, x.layer, len(x.W_Q)) for x in got] == [
        ("encoder", 0, 3), ("encoder", 1, 3), ("decoder", 0, 6), ("decoder", 1, 6),
        ("cross", 0, 6), ("cross", 1, 6)]
    swin = {}
    for stage, blocks, d, H in ((0, 1, 8, 2), (1, 2, 16, 4)):
        for i in range(blocks):
            path = f"layers.{stage}.blocks.{i}.attn"
            swin |= {f"{path}.qkv.weight": torch.randn(3 * d, d), f"{path}.proj.weight": torch.randn(d, d),
                     f"{path}.relative_position_bias_table": torch.ones(49, H)}
    got = [(x.stack, x.layer, tuple(x.W_Q.shape)) for x in attention_layers(swin)]
    assert got == [("", 0, (2, 4, 8)), ("", 1, (4, 4, 16)), ("", 2, (4, 4, 16))]


def test_pattern_for_names_that_no_scheme_knows(tmp_path):
    state = renamed(llama(), ("self_attn.", "mixer."), ("_proj", "_matrix"))
    save_file({**state, "model.embed.weight": torch.ones(5, 24)}, tmp_path / "model.safetensors")
    refused(tmp_path, "no attention found", "q_proj", "layers.0.mixer.q_matrix.weight", "--pattern", n_head=4)
    want = [x[2:6] for x in attention_layers(llama(), 4)]
    options = {"pattern": "q_matrix.weight,k_matrix.weight,v_matrix.weight,o_matrix.weight", "n_head": 4}
    assert_same(heads(tmp_path, **options), list(attention_layers(llama(), 4)))
    refused(tmp_path, "--layout=x", **{**options, "layout": "x"})
    refused(tmp_path, "expects the ends", pattern="q", n_head=4)
    pattern = "q_matrix.weight,k_matrix.weight,v_matrix.weight,z.weight"
    refused(tmp_path, "lacks", "z.weight", pattern=pattern, n_head=4)
    fused = {}
    for i in (0, 1):
        q, k, v, o = (state[f"model.layers.{i}.mixer.{x}_matrix.weight"] for x in "qkvo")
        fused |= {f"b.{i}.m.all": torch.cat([q, k, v]), f"b.{i}.m.end": o}
    torch.save(fused, tmp_path / "fused.pt")
    got = heads(tmp_path / "fused.pt", pattern="all,end", layout="fused", n_head=4)
    assert all(torch.equal(p, q) for x, y in zip(got, want) for p, q in zip(x[2:6], y))


def test_a_layer_that_lacks_a_tensor_is_named():
    state = llama()
    del state["model.layers.1.self_attn.v_proj.weight"]
    lacks = r"layers\.1\.self_attn\.q_proj\.weight lacks model\.layers\.1\.self_attn\.v_proj\.weight"
    with pytest.raises(ValueError, match=lacks):
        find_attention({name: tuple(p.shape) for name, p in state.items()})

# ------------------------------------------------------------ namings without a Hugging Face model

def reference(x, q, k, v, H):
    """Scores (H, T, T) and per-head values (H, T, r) of heads contiguous in q, k, v (T, H r)."""
    q, k, v = (y.unflatten(-1, (H, -1)).transpose(0, 1) for y in (q, k, v))
    return q @ k.mT, v


def assert_heads(layer, x, scores, values, project):
    """layer's products give these scores, and project(values with but one head left) its outputs."""
    got = torch.einsum("td,hrd,hre,se->hts", x, layer.W_Q, layer.W_K, x)
    assert torch.allclose(got, scores, rtol=1e-4, atol=1e-4)
    for h in range(len(layer.P)):
        alone = torch.zeros_like(values)
        alone[h] = values[h]
        assert torch.allclose(x @ (layer.P[h] @ layer.W_V[h]).T, project(alone), rtol=1e-4, atol=1e-4)


def merge(values):
    return values.transpose(0, 1).flatten(1)  # (H, T, r) -> (T, H r)


def test_torch_multihead_attention():
    """torch's own module, self-attention and with kdim, vdim of their own; its weights are the truth."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerDecoderLayer(16, 4, bias=False, batch_first=True).eval()  # no dropout
    state = {f"decoder.layers.{i}.{name}": p for i in (0, 1) for name, p in layer.state_dict().items()}
    got = list(attention_layers(state, 4))
    assert [(x.stack, x.layer) for x in got] == [("decoder", 0), ("decoder", 1), ("cross", 0), ("cross", 1)]
    other = torch.nn.MultiheadAttention(16, 4, bias=False, kdim=10, vdim=12, batch_first=True)
    x, y, z = torch.randn(1, 5, 16), torch.randn(1, 7, 10), torch.randn(1, 7, 12)
    for heads_, module, k, v in ((got[0], layer.self_attn, x, x), (got[2], layer.multihead_attn, x, x),
                                 (next(attention_layers(other.state_dict(), 4)), other, y, z)):
        out, weights = module(x, k, v, average_attn_weights=False)
        scores = torch.einsum("td,hrd,hre,se->hts", x[0], heads_.W_Q, heads_.W_K, k[0])
        assert torch.allclose(F.softmax(scores / 2, -1), weights[0], atol=1e-6)  # sqrt(r) = 2
        got = torch.einsum("hts,se,hre,hdr->td", weights[0], v[0], heads_.W_V, heads_.P)
        assert torch.allclose(got, out[0], atol=1e-5)


def test_timm_and_vit_pytorch():
    """qkv.reshape(B, N, 3, H, r) in timm; chunk(3) and heads of any width in vit-pytorch."""
    torch.manual_seed(0)
    x = torch.randn(5, 12)
    qkv, proj = torch.randn(36, 12), torch.randn(12, 12)
    q, k, v = F.linear(x, qkv).reshape(5, 3, 3, 4).permute(1, 2, 0, 3)
    (layer,) = attention_layers({"blocks.0.attn.qkv.weight": qkv, "blocks.0.attn.proj.weight": proj}, 3)
    assert_heads(layer, x, q @ k.mT, v, lambda values: merge(values) @ proj.T)
    state = {"blocks.0.attn.qkv.weight": torch.randn(576, 192),
             "blocks.0.attn.proj.weight": torch.randn(192, 192)}
    # of the hub's config.json
    for architecture in ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_base_patch16_224"):
        configs = {"config.json": {"architecture": architecture, "num_features": 192}}
        if "vit_tiny" in architecture:
            assert len(next(attention_layers(state, configs=configs)).W_Q) == 3
        else:  # a name or a width that is not timm's tells nothing
            with pytest.raises(ValueError, match="nothing says"):
                next(attention_layers(state, configs=configs))
    qkv, out = torch.randn(3 * 2 * 8, 12), torch.randn(12, 16)
    for names in (("0.to_qkv", "0.to_out.0"), ("0.fn.to_qkv", "0.fn.to_out.0"), ("0.to_qkv", "0.to_out")):
        state = {}
        for i in (0, 1):
            state[f"transformer.layers.{i}.{names[0]}.weight"] = qkv
            state[f"transformer.layers.{i}.{names[1]}.weight"] = out
        layers = list(attention_layers({**state, "transformer.layers.0.1.net.0.weight": torch.ones(12)}, 2))
        assert [layer.layer for layer in layers] == [0, 1]
        scores, values = reference(x, *(x @ qkv.T).chunk(3, -1), 2)
        assert_heads(layers[1], x, scores, values, lambda values: merge(values) @ out.T)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_transformer_lens(older, n_kv_head):
    """einsum("pos d_model, head d_model d_head"), or ("head d_head d_model") before; grouped under _W_K."""
    torch.manual_seed(0)
    x, H, d, r = torch.randn(5, 12), 4, 12, 3
    W_Q = torch.randn(H, d, r)
    W_K = torch.randn(n_kv_head, d, r)
    W_V = torch.randn(n_kv_head, d, r)
    W_O = torch.randn(H, r, d)
    q, k, v = (torch.einsum("td,hdr->htr", x, W) for W in (W_Q, W_K, W_V))
    k, v = (y.repeat_interleave(H // n_kv_head, 0) for y in (k, v))
    under = "_" if n_kv_head < H else ""
    state = {"W_Q": W_Q, f"{under}W_K": W_K, f"{under}W_V": W_V, "W_O": W_O}
    state = {f"blocks.0.attn.{name}": W.mT if older else W for name, W in state.items()}
    others = {"blocks.0.attn.b_O": torch.ones(d), "blocks.0.attn.mask": torch.ones(5, 5)}
    (layer,) = attention_layers({**state, **others})
    assert_heads(layer, x, q @ k.mT, v, lambda values: torch.einsum("htr,hrd->td", values, W_O))
    with pytest.raises(ValueError, match="has 4"):
        list(attention_layers(state, 3))


def test_one_linear_per_head():
    torch.manual_seed(0)
    x = torch.randn(5, 12)
    state = {"blocks.0.sa.heads.0.tril": torch.ones(8, 8)}
    for i in (0, 1):
        state[f"blocks.{i}.sa.proj.weight"] = torch.randn(12, 12)
        for h in range(3):
            for name in ("key", "query", "value"):
                state[f"blocks.{i}.sa.heads.{h}.{name}.weight"] = torch.randn(4, 12)
    layers = list(attention_layers(state))
    assert [layer.layer for layer in layers] == [0, 1]
    q, k, v = (torch.stack([x @ state[f"blocks.1.sa.heads.{h}.{name}.weight"].T for h in range(3)])
               for name in ("query", "key", "value"))
    assert_heads(layers[1], x, q @ k.mT, v, lambda values: merge(values) @ state["blocks.1.sa.proj.weight"].T)


def test_heads_of_their_own_width_and_values_of_another():
    shapes = {"q": (4 * 5, 12), "k": (2 * 5, 12), "v": (2 * 3, 12), "o": (12, 4 * 3)}
    state = {f"layers.0.attn.{x}_proj.weight": torch.randn(shape) for x, shape in shapes.items()}
    (layer,) = attention_layers(state, 4)
    assert layer.W_Q.shape == layer.W_K.shape == (4, 5, 12)
    assert layer.W_V.shape == (4, 3, 12) and layer.P.shape == (4, 12, 3)
    assert torch.equal(layer.W_K[0], layer.W_K[1]) and not torch.equal(layer.W_K[1], layer.W_K[2])

# ------------------------------------------------------------ runs

def test_folders_of_steps_are_runs_in_order(tmp_path):
    for name in ("checkpoint-1000", "checkpoint-500"):
        (tmp_path / "trainer" / name).mkdir(parents=True)
        save_file(llama(), tmp_path / "trainer" / name / "model.safetensors")
        (tmp_path / "trainer" / name / "config.json").write_text('{"num_attention_heads": 4}')
    (tmp_path / "trainer" / "runs").mkdir()
    found = list(open_all([str(tmp_path / "trainer")]))
    assert [x.step for x in found] == [500, 1000]
    assert {run_of(x.path) for x in found} == {str(tmp_path / "trainer")}
    for name in ("step0", "step16", "step2-tokens0B"):
        (tmp_path / "pythia" / name).mkdir(parents=True)
        save_file(llama(), tmp_path / "pythia" / name / "model.safetensors")
    assert [x.step for x in open_all([str(tmp_path / "pythia")])] == [0, 2, 16]
    (tmp_path / "epochs").mkdir()
    for epoch in (1, 2, 10):  # in order of the name, whatever stands inside
        torch.save({"model": llama(), "step": 100 - epoch}, tmp_path / "epochs" / f"epoch_{epoch}.pt")
    assert [x.step for x in open_all([str(tmp_path / "epochs")])] == [1, 2, 10]
    (tmp_path / "files").mkdir()
    for name in ("a_step7.pt", "a_step70.pt", "b-step=8.ckpt", "global_step3.bin"):
        torch.save(llama(), tmp_path / "files" / name)
    found = list(open_all([str(tmp_path / "files")]))
    files = str(tmp_path / "files")
    assert {(run_of(x.path), x.step) for x in found} == {
        (f"{files}/a", 7), (f"{files}/a", 70), (f"{files}/b", 8), (files, 3)}


def test_revisions_in_the_hubs_cache(tmp_path):
    cache = tmp_path / "models--org--pythia"
    (cache / "refs").mkdir(parents=True)
    for revision, commit in (("step0", "aaa"), ("step512", "bbb"), ("main", "bbb")):
        (cache / "refs" / revision).write_text(commit)
        (cache / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        save_file(llama(), cache / "snapshots" / commit / "model.safetensors")
    found = list(open_all([str(cache)]))
    assert [(x.step, run_of(x.path)) for x in found] == [(0, str(cache)), (512, str(cache))]
    for revision in ("step512", "main"):
        assert len(Checkpoint(f"{cache}@{revision}", n_head=4).tensors) == 8
    refused(f"{cache}@step9", "no revision step9")


def test_a_hub_id_fetches_only_what_is_needed(tmp_path, monkeypatch):
    """A hub that is a folder here; and one that cannot be reached."""
    hub = pytest.importorskip("huggingface_hub")
    save_file(llama(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    fetched = []

    def download(repo_id, filename, revision):
        fetched.append((repo_id, filename, revision))
        return str(tmp_path / filename)

    there = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5"]
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda self, repo_id, revision: there)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert_same(heads("org/model@step5"), list(attention_layers(llama(), 4)))
    assert {name for _, name, _ in fetched} == {"config.json", "model.safetensors"}
    assert fetched[0][::2] == ("org/model", "step5")
    assert expand(["org/model@step5", "org/model@step1"]) == ["org/model@step1", "org/model@step5"]

    class OfItsOwnKind(Exception):
        pass

    def unreachable(self, **at):
        raise OfItsOwnKind("Name or service not known")

    monkeypatch.setattr(hub.HfApi, "list_repo_files", unreachable)
    refused("org/model", "no such file or folder here", "Name or service not known")

# ------------------------------------------------------------ what other programs leave

def test_a_folder_with_a_model_of_its_own_is_that_model(tmp_path):
    """DeepSpeed's state inside a checkpoint of the HF Trainer, alone and in a run of them."""
    for step in (500, 1000):
        folder = tmp_path / f"checkpoint-{step}"
        inside = folder / f"global_step{step}"
        inside.mkdir(parents=True)
        save_file(llama(), folder / "model.safetensors")
        torch.save({"x": 1}, inside / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
        torch.save({"module": {}}, inside / "mp_rank_00_model_states.pt")
        torch.save({"state": {}}, folder / "optimizer.pt")
    assert expand([str(folder)]) == [str(folder)]
    assert_same(heads(folder, n_head=4), list(attention_layers(llama(), 4)))
    assert [x.step for x in open_all([str(tmp_path)])] == [500, 1000]
    refused(folder / "optimizer.pt", "an optimizer's state", "no model")


def test_timms_checkpoints_are_opened_by_name(tmp_path):
    state = {"blocks.0.attn.qkv.weight": torch.randn(576, 192),
             "blocks.0.attn.proj.weight": torch.randn(192, 192)}
    saved = {"epoch": 3, "arch": "vit_tiny_patch16_224", "state_dict": state, "metric": 71.5}
    for name in ("model_best.pth.tar", "model.best", "last"):
        torch.save(saved, tmp_path / name)
        assert len(heads(tmp_path / name)[0].W_Q) == 3
    arguments = argparse.Namespace(model="vit_tiny_patch16_224")
    torch.save({"state_dict": state, "args": arguments}, tmp_path / "x.tar")
    assert len(heads(tmp_path / "x.tar")[0].W_Q) == 3
    save_file(state, tmp_path / "model.safetensors.bak")
    assert len(heads(tmp_path / "model.safetensors.bak", n_head=3)) == 1


@pytest.mark.parametrize("names", ["query key value", "W_q W_k W_v", "q_proj k_proj v_proj"])
def test_an_output_of_another_name_is_taken_and_said(names):
    """One Linear per head; the one matrix of the output's shape is taken, of two neither."""
    state = {}
    for h in range(3):
        for name in names.split():
            state[f"blocks.0.mha.heads.{h}.{name}.weight"] = torch.randn(4, 12)
    state["blocks.0.mha.projection.weight"] = torch.randn(12, 12)
    (layer,) = attention_layers(state)
    W = state["blocks.0.mha.projection.weight"]
    assert torch.equal(layer.P, W.unflatten(1, (3, 4)).transpose(0, 1))
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    assert "projection.weight was taken for the output" in left_out(find_attention(shapes), shapes)[0]
    with pytest.raises(ValueError, match="lacks"):
        list(attention_layers({**state, "blocks.0.mha.gate.weight": torch.ones(12, 12)}))
    one = renamed(llama(n=4), ("o_proj", "fc_out"))
    assert_same(list(attention_layers(one, 4)), list(attention_layers(llama(n=4), 4)))


def test_early_interpretability_code(tmp_path):
    """W_Q, W_K, W_V (head, d_head, d_model) and W_O (d_model, head * d_head)."""
    torch.manual_seed(0)
    for d in (12, 16):
        W = {x: torch.randn(4, 3, d) for x in ("W_Q", "W_K", "W_V")}
        W_O = torch.randn(d, 12)
        state = {f"blocks.0.attn.{name}": x for name, x in {**W, "W_O": W_O}.items()}
        (layer,) = attention_layers(state)
        x = torch.randn(5, d)
        q, k, v = (torch.einsum("td,hrd->htr", x, w) for w in W.values())
        assert_heads(layer, x, q @ k.mT, v, lambda values, W_O=W_O: merge(values) @ W_O.T)
    with pytest.raises(ValueError, match="which of its sides"):
        state = {name: p.mT if p.ndim == 3 else torch.ones(12, 12) for name, p in state.items()}
        list(attention_layers({name: p[:, :12] if p.ndim == 3 else p for name, p in state.items()}))


def test_nanochat_and_modded_nanogpt(tmp_path):
    state = renamed(llama(n=2), ("model.layers", "transformer.h"), ("self_attn", "attn"), ("q_proj", "c_q"),
                    ("k_proj", "c_k"), ("v_proj", "c_v"), ("o_proj", "c_proj"))
    for step in (1000, 0):
        torch.save(state, tmp_path / f"model_{step:06d}.pt")
        torch.save({"state": {}}, tmp_path / f"optim_{step:06d}_rank0.pt")
        meta = {"step": step, "model_config": {"n_head": 4, "n_kv_head": 2, "n_embd": 24}}
        (tmp_path / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    found = list(open_all([str(tmp_path)]))
    assert [x.step for x in found] == [0, 1000] and {run_of(x.path) for x in found} == {str(tmp_path)}
    assert_same(list(found[1].attention_layers()), list(attention_layers(llama(n=2), 4)))
    x, qkv, out = torch.randn(5, 16), torch.randn(3, 16, 16), torch.randn(16, 16)
    for stored in (qkv, qkv.flatten(0, 1)):
        (layer,) = attention_layers({"blocks.0.attn.qkv_w": stored, "blocks.0.attn.c_proj.weight": out}, 4)
        scores, values = reference(x, *(x @ qkv.flatten(0, 1).T).chunk(3, -1), 4)
        assert_heads(layer, x, scores, values, lambda values: merge(values) @ out.T)


def test_stacks_have_heads_of_their_own(tmp_path):
    state = {}
    for path, d in (("blocks", 192), ("decoder_blocks", 128)):
        state[f"{path}.0.attn.qkv.weight"] = torch.randn(3 * d, d)
        state[f"{path}.0.attn.proj.weight"] = torch.randn(d, d)
    torch.save({"model": state}, tmp_path / "mae.pth")
    refused(tmp_path / "mae.pth", "nothing says", "--stack_heads=")
    for word in ("encoder:3,decoder:4", "blocks:3,decoder_blocks:4"):
        assert sorted(len(x.W_Q) for x in heads(tmp_path / "mae.pth", heads=word)) == [3, 4]
    refused(tmp_path / "mae.pth", "no stack text", heads="text:3")
    refused(tmp_path / "mae.pth", "expects stacks", heads="encoder")


def test_quantised_weights_are_called_so_before_heads_are_asked_for(tmp_path):
    path, int32, uint8 = "model.layers.0.self_attn.q_proj", torch.int32, torch.uint8
    kinds = {
        "gptq": {f"{path}.qweight": torch.ones(3, 24, dtype=int32), f"{path}.scales": torch.ones(1, 24)},
        "4bit": {f"{path}.weight": torch.ones(288, 1, dtype=uint8), f"{path}.weight.absmax": torch.ones(9)},
        "8bit": {f"{path}.weight": torch.ones(24, 24, dtype=torch.int8), f"{path}.SCB": torch.ones(24)},
        "fp8": {f"{path}.weight": torch.ones(24, 24).to(torch.float8_e4m3fn),
                f"{path}.weight_scale_inv": torch.ones(1, 1)},
    }
    for name, tensors in kinds.items():
        others = {k: v for k, v in llama().items() if path not in k}
        save_file({**others, **tensors}, tmp_path / f"{name}.safetensors")
        refused(tmp_path / f"{name}.safetensors", "quantised", "dequantise")


def test_what_a_foreign_file_is_and_the_next_step(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("model.safetensors", "pytorch_model.bin", "config.json"):
        (tmp_path / "lfs" / name).mkdir(parents=True)
        (tmp_path / "lfs" / name / name).write_text(pointer)
    save_file(llama(), tmp_path / "lfs" / "config.json" / "model.safetensors")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "page.bin").write_text("<!DOCTYPE html><html>sign in</html>")
    (tmp_path / "none.pt").write_bytes(b"")
    for folder, names in (("dcp", ("__0_0.distcp", ".metadata", "train_state.pt")), ("gguf", ("a.gguf",)),
                          ("zero3", ("zero_pp_rank_0_mp_rank_00_model_states.pt",
                                     "zero_pp_rank_1_mp_rank_00_model_states.pt"))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(b"x")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    said = {
        "whole.pt": ["whole pickled model", "state_dict()"],
        "old.pt": ["whole pickled model", "state_dict()"],
        "lfs/model.safetensors": ["git lfs pull"], "lfs/pytorch_model.bin": ["git lfs pull"],
        "lfs/config.json": ["git lfs pull"], "a.gguf": ["GGUF", "gguf_file"], "gguf": ["GGUF", "gguf_file"],
        "page.bin": ["web page"], "none.pt": ["empty file"], "dcp": ["dcp_to_torch"],
        "dcp/__0_0.distcp": ["dcp_to_torch"], "zero3": ["zero_to_fp32.py"], "script.pt": ["TorchScript"],
    }
    for name, words in said.items():
        refused(tmp_path / name, *words)
        with pytest.raises(ValueError) as error:
            heads(tmp_path / name)
        assert not any(word in str(error.value) for word in ("weights_only", "trust"))


def test_a_shard_of_a_distributed_tensor(tmp_path):
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
    started = not torch.distributed.is_initialized()
    if started:
        store = f"file://{tmp_path / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        state = {"layers.0.attn.q": DTensor.from_local(torch.ones(4, 4), mesh, [Replicate()])}
        torch.save(state, tmp_path / "model_world_size_2_rank_0.pt")
    finally:
        if started:
            torch.distributed.destroy_process_group()
    refused(tmp_path / "model_world_size_2_rank_0.pt", "shard", "get_model_state_dict")
