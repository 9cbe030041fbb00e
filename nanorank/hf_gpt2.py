"""
The checkpoint that --init_from=PATH names: ours, nanoGPT's, or GPT-2 in Hugging Face's format.

    path, ckpt = open_init("out/demo-0")                # out/demo-0/ckpt.pt
    path, ckpt = open_init("openai-community/gpt2")     # {"model": ..., "model_args": ...}, nanoGPT's names
"""
import os
import re

import torch

from nanorank.checkpoints import Checkpoint
from nanorank.console import print0
from nanorank.errors import UserError
from nanorank.files import load_pt

TAKES = ("it takes a ckpt.pt, a run folder, or GPT-2 in Hugging Face's format: a folder with config.json, "
         "or a hub id such as openai-community/gpt2")

EXACT_GELU = ("gelu", "gelu_python")  # model.MLP's
TANH_GELU = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh")  # its approximation, OpenAI's

# GPT-2's other switches, and the values that make it the GPT of model.py
AS_OURS = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
# these are Conv1D in transformers: (in, out) where nn.Linear has (out, in)
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")


def open_init(path):
    """(file or model's name, checkpoint dict) of --init_from=PATH. Raises UserError that names the path."""
    own = os.path.join(path, "ckpt.pt")
    if os.path.exists(own):
        return own, load_pt(own)
    is_folder = os.path.isdir(path)
    is_hugging_face = any(os.path.exists(os.path.join(path, name)) for name in ("config.json", "snapshots"))
    if is_folder and not is_hugging_face:
        raise UserError(f"{own}: no such file; --init_from={path}: {TAKES}")
    in_folder = os.path.isdir(os.path.dirname(path))  # out/lm is no hub id where out/ is there
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", path) and not path.endswith(".pt") and not in_folder
    if is_folder or path.endswith((".safetensors", ".bin")) or (on_hub and not os.path.exists(path)):
        return path, load_gpt2(path)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder; --init_from={path}: {TAKES}")
    return path, load_pt(path)


def load_gpt2(path):
    """A checkpoint dict for model.load_gpt from GPT-2 as transformers saves it, in float32.

    path: a folder, its weights' file or a hub id. Raises UserError for any other architecture.
    """
    checkpoint = Checkpoint(path)
    config = checkpoint.configs.get("config.json")
    if config is None:
        raise UserError(f"{path}: there is no config.json beside it")
    check_config(path, config)

    names = [name for name in checkpoint.tensors if not name.endswith(MASKS)]
    state = {}
    for name, x in checkpoint.read(names).items():
        if not name.startswith(("transformer.", "lm_head.")):  # of a bare GPT2Model
            name = f"transformer.{name}"
        if name.endswith(CONV1D):
            x = x.T
        state[name] = x.float().contiguous()

    wte, wpe = state.get("transformer.wte.weight"), state.get("transformer.wpe.weight")
    if wte is None or wpe is None or wte.ndim != 2 or wpe.ndim != 2:
        raise UserError(f"{path}: no embeddings wte and wpe in it")
    head = state.setdefault("lm_head.weight", wte)
    tied = config.get("tie_word_embeddings", True) is True and torch.equal(head, wte)
    return {"model": state, "model_args": {
        "vocab_size": len(wte), "block_size": len(wpe), "n_embd": wte.shape[1],
        "n_layer": config.get("n_layer"), "n_head": config.get("n_head"),
        "bias": True, "tied": tied,
    }}


def check_config(path, config):
    """Refuses what model.GPT would compute otherwise; says where the difference is small."""
    kind = config.get("model_type")
    if kind != "gpt2":
        raise UserError(f"{path}: a {kind} of Hugging Face; --init_from takes GPT-2 alone "
                        "(python analyze.py measures the others)")
    wrong = []
    for name, value in AS_OURS.items():
        if config.get(name, value) != value:
            wrong.append(f"{name}={config[name]} instead of {value}")
    n_inner = config.get("n_inner")
    if n_inner is not None and n_inner != 4 * config.get("n_embd", 0):
        wrong.append(f"n_inner={n_inner} instead of 4 * n_embd")
    activation = config.get("activation_function", "gelu_new")
    if activation not in EXACT_GELU + TANH_GELU:
        wrong.append(f"activation_function={activation} instead of gelu or gelu_new")
    if wrong:
        raise UserError(f"{path}: a GPT-2 that model.GPT is not: {', '.join(wrong)}")
    if activation in TANH_GELU:
        print0(f"note: {path} has {activation}, the tanh formula of gelu; here gelu is exact, as in nanoGPT: "
               "it differs by at most 0.0005")
