"""
The namings of attention that nanorank reads: names of the tensors q, k, v, o, and how heads lie in them.

    SCHEMES[3].names    # q_proj.weight k_proj.weight v_proj.weight o_proj.weight|...
    SCHEMES[3].layout   # separate, a key of layouts.LAYOUTS

tests/test_families.py and tests/trials/architectures.py hold the rows against the models themselves.
"""
import re
from collections.abc import Callable
from typing import NamedTuple


class Scheme(NamedTuple):
    """A naming of q, k, v and the output projection o, and the condition under which it holds."""
    names: str     # of q k v o, of qkv o or of q kv o; alternatives are separated by |
    layout: str    # how the heads lie in these tensors, a key of LAYOUTS
    families: str
    path: str = ""                                        # a pattern that the module's path must match
    when: Callable = lambda config, path, shapes: True    # for names that other models use otherwise


def linear(names, *args, **kwargs):
    """A Scheme whose names are those of Linear layers: "c_attn c_proj" -> "c_attn.weight c_proj.weight"."""
    return Scheme(re.sub(r"[^ |]+", r"\g<0>.weight", names), *args, **kwargs)


def is_codegen(config, path, shapes):
    if "model_type" in config:
        return config["model_type"] == "codegen"
    return f"{path.removesuffix('attn')}mlp.fc_in.weight" in shapes


def is_bigcode_without_multi_query(config, path, shapes):
    return config.get("model_type") == "gpt_bigcode" and not config.get("multi_query", True)


def is_minimax(config, path, shapes):
    """MiniMax's linear attention stands beside a gate of its output."""
    return f"{path}.output_gate.weight" in shapes


def is_gated_qwen(config, path, shapes):
    """Qwen3-Next and 3.5: twice as many rows in q as columns in o, and layers of linear attention."""
    q, k, v, o = (shapes.get(f"{path}.{x}_proj.weight", ()) for x in "qkvo")
    if not gate_beside_query(q, k, v, o):
        return False
    if "model_type" in config:
        return re.match(r"qwen3_(next|5)|qwen4", str(config["model_type"])) is not None
    return any(".linear_attn." in name for name in shapes)


def gate_beside_query(q, k, v, o):
    """Whether these shapes are those of attention whose q holds a gate as well."""
    return len(q) == len(o) == 2 and q[0] == 2 * o[1] and k == v


def shares_key_and_value(config, path, shapes):
    """Gemma 4: full attention takes its keys as values too."""
    return told(config, "attention_k_eq_v") is True and f"{path}.v_proj.weight" not in shapes


def told(config, key):
    """The value of a key in a config or in a config inside it, None where there is none."""
    if key in config:
        return config[key]
    for inner in config.values():
        value = told(inner, key) if isinstance(inner, dict) else None
        if value is not None:
            return value
    return None


def one_linear_per_head():
    """Rows for models with a Linear for each head's q, k and v."""
    rows = []
    for q, k, v in (("query", "key", "value"), ("q", "k", "v"), ("q_proj", "k_proj", "v_proj"),
                    ("W_q", "W_k", "W_v"), ("wq", "wk", "wv"), ("W_query", "W_key", "W_value"),
                    ("to_q", "to_k", "to_v"), ("queries", "keys", "values")):
        for heads in ("heads", "attn_heads", "attention_heads"):
            names = " ".join(f"{heads}.{{head}}.{x}" for x in (q, k, v))
            rows.append(linear(f"{names} proj|out_proj|out|c_proj|o_proj|W_o|wo|to_out", "separate",
                               "one Linear per head"))
    return rows


# The first row whose names are all there takes a module. Rotary embeddings and biases do not matter here.
# A module whose q, k, v are there and whose o has another name: families.find_output.
SCHEMES = [
    linear("q_attn c_attn c_proj", "conv", "GPT-2's cross-attention"),
    linear("c_attn c_proj", "grouped", "GPT-BigCode without multi_query",
           when=is_bigcode_without_multi_query),
    linear("c_attn c_proj", "conv", "ours, nanoGPT, GPT-2 (Conv1D), GPT-BigCode, Qwen 1"),
    linear("q_proj k_proj v_proj o_proj", "gated", "Qwen3-Next, Qwen 3.5", when=is_gated_qwen),
    linear("q_proj k_proj v_proj o_proj|out_proj|dense|proj|c_proj|projection", "separate",
           "Llama, Mistral, Qwen, Gemma, OLMo, Phi, GPT-J, GPT-Neo, OPT, BART, Whisper, CLIP, ..."),
    linear("q_proj k_proj k_proj o_proj", "separate", "Gemma 4, whose keys are values too",
           when=shares_key_and_value),
    linear("q_b_proj kv_b_proj o_proj", "mla", "DeepSeek V2 and V3, MiniCPM 3"),
    linear("q_proj kv_b_proj o_proj", "mla", "DeepSeek V2 Lite, Moonlight"),
    linear("wq_b wkv_b wo", "mla", "DeepSeek as DeepSeek saved it"),
    linear("wq wkv_b wo", "mla", "DeepSeek as DeepSeek saved it, without a latent of queries"),
    linear("c_q c_k c_v c_proj", "separate", "nanochat, modded-nanogpt"),
    linear("qkv_proj out_proj", "codegen", "CodeGen", path=r"(^|\.)h\.\d+\.attn$", when=is_codegen),
    linear("qkv_proj out_proj", "grouped", "MiniMax's linear attention", when=is_minimax),
    linear("qkv_proj o_proj|out_proj|proj", "fused", "Phi-3"),
    linear("query_key_value dense", "fused", "ChatGLM",
           path=r"transformer\.encoder\.layers\.\d+\.self_attention$"),
    linear("query_key_value dense", "grouped", "GPT-NeoX, Pythia, Bloom, Falcon, Persimmon"),
    linear("self.query self.key self.value output.dense", "separate", "BERT, RoBERTa, ELECTRA, Swin"),
    linear("attention.query attention.key attention.value output.dense", "separate",
           "ViT, DeiT, BEiT, DINOv2"),
    linear("self.query_proj self.key_proj self.value_proj output.dense", "separate", "DeBERTa v2"),
    linear("self.in_proj output.dense", "grouped", "DeBERTa"),
    linear("attention.qkv output.dense", "fused", "TimeSformer"),
    linear("query_proj key_proj value_proj out_proj", "separate", "ProphetNet"),
    linear("linear_q linear_k linear_v linear_out", "separate", "Conformers of wav2vec 2, ESPnet"),
    linear("q_lin k_lin v_lin out_lin", "separate", "DistilBERT, XLM"),
    linear("q k v o|proj|out", "separate", "T5, MPNet"),
    linear("query key value dense|proj|out|out_proj|output", "separate", "ALBERT, minGPT"),
    linear("wq wk wv wo", "separate", "Meta's Llama, llama2.c"),
    linear("Wq Wk Wv dense|Wo", "separate", "CTRL"),
    linear("W_query W_key W_value out_proj|proj|W_out", "separate", "Raschka's GPT"),
    linear("W_q W_k W_v W_o", "separate", "models after textbooks"),
    linear("w_q w_k w_v w_o", "separate", "models after textbooks"),
    Scheme("qkv_w c_proj.weight|proj.weight|o_proj.weight", "fused", "modded-nanogpt"),
    linear("qkv proj|projection|out_proj|o_proj|out", "fused", "timm ViT, DINO, MAE, SAM, Swin, BLIP"),
    linear("Wqkv Wo|out_proj", "fused", "MPT, ModernBERT, Nomic BERT"),
    linear("W_pack o_proj", "fused", "Baichuan"),
    linear("att_proj attn_out|out_proj", "fused", "OLMo 1 as AI2 saved it, Bark"),
    linear("to_qkv to_out.0|to_out", "fused", "vit-pytorch"),
    linear("to_q to_kv to_out.0|to_out", "fused", "vit-pytorch's cross-attention"),
    linear("to_q to_k to_v to_out.0|to_out", "separate", "x-transformers, diffusers"),
    Scheme("in_proj_weight out_proj.weight", "fused",
           "torch.nn.MultiheadAttention, OpenAI's CLIP, torchvision's ViT"),
    Scheme("q_proj_weight k_proj_weight v_proj_weight out_proj.weight", "separate",
           "torch.nn.MultiheadAttention with kdim, vdim"),
    Scheme("W_Q W_K W_V W_O", "lens", "TransformerLens"),
    Scheme("W_Q _W_K _W_V W_O", "lens", "TransformerLens with grouped queries"),
    *one_linear_per_head(),
]
