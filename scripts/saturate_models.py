"""
Checkpoints as a nanorank.saturation.Net: GPTs and ViTs of ours, nanoGPT's, and Hugging Face's text models.

    net = open_net("out/lm/ckpt.pt", device, torch.float64, seed=1337)
    output = net.run(batch)                                        # (B, T, d), what the head reads
"""
import contextlib
import copy
import math
import os

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, init_weights, load_gpt, load_vit, rotate
from nanorank.errors import UserError
from nanorank.files import load_pt
from nanorank.rng import hash64
from nanorank.saturation import Net


def open_net(path, device, dtype, seed=0, fixed_positions=False):
    """The Net of a checkpoint: a Hugging Face folder, or a file of ours or nanoGPT's.

    seed: of fresh initialisations. fixed_positions: a ViT's sincos2d positions are multiplied too.
    Raises UserError that names the path.
    """
    if os.path.isdir(path):
        return open_hugging_face(path, device, dtype, seed)
    checkpoint = {} if path.endswith(".safetensors") else load_pt(path, mmap=True)
    args = checkpoint.get("model_args") if isinstance(checkpoint, dict) else None
    if not isinstance(args, dict):
        raise UserError(f"{path}: no model_args in it; give a GPT or ViT of ours, nanoGPT's, "
                        "or a Hugging Face folder")
    load_model = load_vit if "patch_size" in args else load_gpt
    config = checkpoint.get("config")
    return our_net(load_model(checkpoint, path=path), config if isinstance(config, dict) else {},
                   device, dtype, seed, fixed_positions)

# ---------------------------------------------------------------------------------- GPTs and ViTs

def our_net(model, config, device, dtype, seed=0, fixed_positions=False):
    """A Net of a GPT or ViT of model.py. config: the settings of its run."""
    model = model.to(device, dtype).eval().requires_grad_(False)
    args = model.args
    blocks = model.transformer.h

    def run(batch, on_attention=None):
        # fused kernels subtract a maximum that was rounded otherwise, which matters for scores of 1e12
        with contextlib.ExitStack() as stack, sdpa_kernel(SDPBackend.MATH):
            if on_attention:
                for layer, block in enumerate(blocks):
                    def hook(module, inputs, qkv, layer=layer, attn=block.attn):
                        on_attention(layer, attention_weights(attn, qkv))
                    stack.callback(block.attn.c_attn.register_forward_hook(hook).remove)
            return model.hidden(batch)

    def fresh():
        new = type(model)(**args)
        init_weights(new, seed)
        return our_net(new, config, device, dtype, seed, fixed_positions)

    parameters = list(model.parameters())
    if fixed_positions and hasattr(model, "sincos2d"):
        parameters.append(model.sincos2d)
    # beyond this the sum of squares in a norm overflows, and the norm returns 0 rather than NaN
    limit = (torch.finfo(dtype).max / args["n_embd"])**0.5
    if isinstance(model, GPT):
        vocab_size, block_size = args["vocab_size"], args["block_size"]
    else:
        vocab_size = 0
        block_size = (args["image_size"] // args["patch_size"])**2 + (args["pool"] == "cls")
    name = f"{type(model).__name__} of ours"
    return Net(model, run, blocks, parameters, limit, fresh, config, vocab_size, block_size, name)


def attention_weights(attention, qkv):
    """Attention weights (B, H, T, T) from the output of an Attention's c_attn, (B, T, its rows)."""
    B, T, _ = qkv.shape
    q, k, _ = qkv.split(attention.rows, dim=2)
    q, k = [z.view(B, T, -1, attention.r).transpose(1, 2) for z in (q, k)]
    if attention.qk_norm:
        q, k = attention.q_norm(q), attention.k_norm(k)
    if attention.rope:
        q, k = rotate(q), rotate(k)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, H, T, r), as q
    scores = q @ k.mT * q.shape[-1]**-0.5
    if attention.causal:
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(-1)


def untrained(net, post_norm, bias, seed):
    """A Net of a fresh GPT of this one's shape. Biases are N(0, 0.02^2): at their usual 0 they do nothing."""
    model = GPT(**{**net.model.args, "post_norm": post_norm, "bias": bias})
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(hash64(seed) >> 1)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(0.0, 0.02, generator=generator)
    p = net.parameters[0]
    return our_net(model, net.config, p.device, p.dtype, seed)

# ----------------------------------------------------------------------------------- Hugging Face

def open_hugging_face(path, device, dtype, seed=0):
    """A Net of a Hugging Face folder. Raises UserError that names the folder."""
    try:
        import transformers
    except ImportError:
        raise UserError(f"{path}: Hugging Face models need transformers: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModel.from_pretrained(
            path, dtype=dtype, attn_implementation="eager", local_files_only=True)
    except Exception as error:  # transformers raises dozens of kinds
        raise UserError(f"{path}: transformers cannot load it: {str(error)[:200]}") from None
    return hugging_face_net(model, path, device, dtype, seed)


def hugging_face_net(whole, path, device, dtype, seed=0):
    """A Net of a transformers model with eager attention; the encoder, where it has a decoder too."""
    config = whole.config
    model = whole.get_encoder() if getattr(config, "is_encoder_decoder", False) else whole
    model = model.to(device, dtype).eval().requires_grad_(False)
    name = type(model).__name__
    n_layer = getattr(config, "num_hidden_layers", -1)
    lists = [x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x) == n_layer]
    if not lists or not isinstance(getattr(config, "vocab_size", None), int):
        raise UserError(f"{path}: {name} has no list of num_hidden_layers blocks over tokens; "
                        "only text models are measured")
    options = {"use_cache": False} if model is whole and getattr(config, "use_cache", False) else {}

    def run(batch, on_attention=None):
        out = model(input_ids=batch, output_attentions=on_attention is not None, **options)
        if on_attention:
            if len(out.attentions or ()) != n_layer:
                raise UserError(f"{name} does not return its attention weights; "
                                "--heads=False measures the rest")
            for layer, weights in enumerate(out.attentions):
                on_attention(layer, weights)
        return out.last_hidden_state

    def fresh():
        from transformers import AutoModel
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            new = AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager")
        return hugging_face_net(new, path, device, dtype, seed)

    block_size = min(256, getattr(config, "max_position_embeddings", None) or 256)
    # RMS norms square in float32 whatever the model's dtype is
    limit = (torch.finfo(torch.float32).max / config.hidden_size)**0.5
    parameters = list(model.parameters())
    return Net(model, run, lists[0], parameters, limit, fresh, {}, config.vocab_size, block_size,
               f"{name} of transformers")
