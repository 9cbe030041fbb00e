"""
Counts the heads of an attention module and splits its weights into W_Q, W_K, W_V, P of every head.

    n_head, source = heads_of(module, shapes, configs)    # module: families.Module
    layer = split_heads(module, tensors, n_head)
    layer.W_Q     # (H, r, d), likewise W_K, W_V; layer.P is (H, d, r)

Heads are counted by the model's config, by shapes that depend on their number, or by the caller's word.
They are never guessed. H: heads, r: width of a head, d: width of the model, n: key/value heads.
"""
import re
from typing import NamedTuple

import torch

from nanorank.errors import UserError
from nanorank.layouts import LAYOUTS, UNSTACK


class Rope(NamedTuple):
    """Rotary positions: which two rows of a head turn together in a plane (Su et al. 2021).

    The first `dim` rows of W_Q and of W_K turn, the others do not. The two rows of plane j are 2j and
    2j + 1 where interleaved (GPT-J, Meta's Llama), else j and j + dim/2 (Hugging Face's Llama, NeoX).
    """
    dim: int
    interleaved: bool = False


class AttentionLayer(NamedTuple):
    """One layer's heads; a key/value head shared by several queries is repeated for each of them."""
    stack: str         # encoder, decoder, cross ...; empty where the model has one stack
    layer: int
    W_Q: torch.Tensor  # (H, r, d)
    W_K: torch.Tensor  # (H, r, d)
    W_V: torch.Tensor  # (H, r, d)
    P: torch.Tensor    # (H, d, r)
    n_kv_head: int = 0        # key/value heads; 0: as many as query heads
    rope: Rope | None = None  # None: nothing turns, or not known
    qk_norm: bool = False     # q and k of each head are divided by their size before the scores


# ------------------------------------------------------------ paths

# a number that is a whole part of a path: layers.3, encoder_layer_3; not attn1
NUMBER = r"(?<![^._])\d+(?![^.])"

# parts of a model, and how the words begin that tell them in a path or in a config's key
KINDS = {
    "encoder": ("encoder",),
    "decoder": ("decoder",),
    "text": ("text", "language", "llm"),
    "vision": ("vision", "visual", "image", "vpm"),
    "video": ("video",),
    "audio": ("audio", "speech"),
    "perceiver": ("perceiver", "resampler"),
    "qformer": ("qformer",),
    "predictor": ("predictor",),
    "memory": ("memory",),
}


def kind_of(path):
    """The part of a model that a path's first telling word names, else an empty string.

    vision_tower.encoder.layers.3.self_attn -> vision
    """
    for part in path.split("."):
        for kind, words in KINDS.items():
            if part.startswith(words):
                return kind
    return ""


def join(path, tail):
    return f"{path}.{tail}" if path else tail

# ------------------------------------------------------------ counting heads

HEAD_KEYS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "num_head", "heads",
             "nhead", "encoder_attention_heads")
WIDTH_KEYS = ("true_hidden_size", "hidden_size", "d_model", "n_embd", "emb_dim", "dim")

# timm's config.json names an architecture and no heads: vit_small_patch16_224 -> small.
# TIMM_HEADS is {(size, width): heads} of timm 1.0.31; a width of another model tells nothing
TIMM = r"(?:vit|deit3?|beit(?:v2)?|eva02|flexivit)_(?:s?relpos_)?([a-z0-9]+)_patch(?!.*_gap)"
TIMM_HEADS = {("tiny", 192): 3, ("little", 320): 5, ("small", 384): 6, ("medium", 512): 8, ("base", 768): 12,
              ("large", 1024): 16, ("so400m", 1152): 16, ("huge", 1280): 16, ("giant", 1408): 16,
              ("gigantic", 1664): 16}


def heads_of(module, shapes, configs=(), n_head=0, n_kv_head=0, d_head=0):
    """(heads of a module, where that is from).

    shapes: {name: shape} of all tensors. configs: {source: dict}. n_head, n_kv_head, d_head: the caller's
    word, for what neither configs nor shapes tell. Raises UserError where nothing tells, or where a config
    and the shapes contradict each other.
    """
    by_shape = heads_in_shapes(module, shapes)
    one_tensor_a_head = isinstance(module.names[0], list)
    if module.scheme.layout == "lens" or one_tensor_a_head:
        if n_head not in (0, by_shape):
            raise UserError(f"--n_head={n_head}: {module.path} has {by_shape}")
        return by_shape, "tensor shapes"

    q = module.names[0]
    k = module.names[1]
    o = module.names[-1]
    transposed = module.scheme.layout == "conv" and shapes[q][0] < shapes[q][1]  # GPT-2's Conv1D is in x out
    o_out, o_in = shapes[o][::-1] if transposed else shapes[o]
    q_in = shapes[q][0 if transposed else -1]

    for source, config in dict(configs).items():
        if config.get("pruned_heads"):
            raise UserError(f"{source} has pruned_heads: which heads are left of {q} is not known; "
                            "save the model unpruned")
        by_config = heads_in_config(config, module, widths={o_out, q_in})
        if by_config == 0:
            by_config = heads_of_timm(config, o_out)
        if by_config > 0:
            if by_shape and by_shape != by_config:
                raise UserError(f"{source} says {by_config} heads, the shapes beside {q} say {by_shape}")
            return by_config, source

    if by_shape:
        return by_shape, "tensor shapes"
    if n_head:
        return n_head, "--n_head"
    if d_head:
        if o_in % d_head:
            raise UserError(f"--d_head={d_head} does not divide the {o_in} inputs of {o}")
        return o_in // d_head, "--d_head"
    if n_kv_head and module.scheme.layout == "separate" and shapes[k][0] % n_kv_head == 0:
        r = shapes[k][0] // n_kv_head
        return shapes[q][0] // r, "--n_kv_head"
    stack = f", or --stack_heads={module.stack}:N where stacks differ" if module.stack else ""
    raise UserError(f"nothing says how many heads {q} {tuple(shapes[q])} holds "
                    "(no config of its own, arguments or telling shapes); "
                    f"give --n_head or --d_head{stack}")


def heads_of_timm(config, width):
    """Heads by timm's name of an architecture in a config, a checkpoint or its arguments, else 0."""
    for key in ("architecture", "arch", "model"):
        size = re.match(TIMM, str(config.get(key, "")))
        if size:
            return TIMM_HEADS.get((size[1], width), 0)
    return 0


def heads_in_config(config, module, widths):
    """Heads of a module by a model's config and its sub-configs, 0 or less where these do not say.

    The module's own sub-config (text, vision ...) comes first, then `config` itself, then the sub-configs
    that belong to no other part. A config whose width is not among `widths`, the widths of the module's
    input and output, is another part's.
    """
    kind = kind_of(module.path)
    is_text = kind in ("", "encoder", "decoder")
    own = []
    shared = []
    composite = False
    for key, value in config.items():
        if not isinstance(key, str) or not isinstance(value, dict):
            continue
        composite = composite or "config" in key
        if kind and kind_of(key) == kind:
            own.append(value)
        elif kind_of(key) == "" or (kind_of(key) == "text" and is_text):
            shared.append(value)
    if composite and kind != "text" and not is_text:  # the text's heads are not a vision tower's
        config = {}
        shared = []

    if "num_attention_heads_per_stage" in config:  # SAM 2: its num_attention_heads is the first stage's alone
        return -1
    heads = heads_in_one(config, module, widths)
    for inner in own:
        heads = heads_in_config(inner, module, widths) or heads
    for inner in shared:
        heads = heads or heads_in_config(inner, module, widths)
    return heads


def heads_in_one(config, module, widths):
    """heads_in_config without the sub-configs."""
    keys = HEAD_KEYS
    kind = kind_of(module.path)
    if kind in ("encoder", "decoder") or module.stack == "cross":  # BART's sides may differ
        side = "encoder" if kind == "encoder" and module.stack != "cross" else "decoder"
        keys = (f"{side}_attention_heads", f"{side}_num_attention_heads", f"num_{side}_attention_heads",
                *HEAD_KEYS)
    words = dict.fromkeys(part.split("_")[0] for part in module.path.split("."))
    keys = (*(f"{word}_{key}" for word in words for key in keys), *keys)  # t2u_encoder_attention_heads
    values = [config[key] for key in keys if key in config]
    heads = values[0] if values else 0
    if "text_enhancer_layer" in module.path and type(heads) is int:  # Grounding DINO: half the encoder's
        heads //= 2

    if isinstance(heads, (list, tuple)):  # one a layer, or one a stage
        index = module.numbers[0] if module.numbers else len(heads)
        heads = heads[index] if index < len(heads) else 0
    else:
        width = next((config[key] for key in WIDTH_KEYS if type(config.get(key)) is int), None)
        if width is not None and width not in widths:
            return 0
    return heads if type(heads) is int else 0


def heads_in_shapes(module, shapes):
    """Heads of a module by shapes in it or beside it that depend on their number, 0 where there are none."""
    q = module.names[0]
    if isinstance(q, list):  # a tensor a head
        return len(q)
    if module.scheme.layout == "lens":
        return shapes[q][0]

    for tail in ("relative_position_bias_table", "self.relative_position_bias_table",
                 "relative_position_bias.relative_position_bias_table"):  # Swin, BEiT: (positions, H)
        table = join(module.path, tail)
        if len(shapes.get(table, ())) == 2:
            return shapes[table][1]

    side = re.split(NUMBER, module.path)[0]  # encoder.block.
    for name, shape in shapes.items():       # T5, MPNet: (buckets, H), in the first layer alone
        is_bias = name.startswith(side) and name.endswith("relative_attention_bias.weight")
        if is_bias and len(shape) == 2:
            return shape[1]

    if module.scheme.layout == "mla":
        return heads_of_latents(module, shapes)

    if module.scheme.layout in ("separate", "gated"):
        width = shapes[q][0]
        if module.scheme.layout == "gated":
            width //= 2
        for tail in ("q_norm.weight", "q_layernorm.weight"):  # Qwen 3, Gemma 3: (r,); OLMo 2: (H r,)
            norm = shapes.get(join(module.path, tail), ())
            if len(norm) == 1 and norm[0] not in (0, width):
                return width // norm[0]
    return 0


def heads_of_latents(module, shapes):
    """Heads of multi-head latent attention by its shapes, 0 where these do not tell.

    q has H (r + r_rope) rows, kv H (r + r_v), o H r_v columns; beside them, what makes the latent of keys and
    values makes a rotary key of width r_rope, which all heads share.
    """
    q, kv, o = (shapes[name] for name in module.names)
    for tail in ("kv_a_proj_with_mqa.weight", "wkv_a.weight", "kv_a_proj.weight"):
        latent = shapes.get(join(module.path, tail), ())
        r_rope = latent[0] - kv[1] if len(latent) == 2 else 0
        rows = q[0] - kv[0] + o[1]
        if r_rope > 0 and rows > 0 and rows % r_rope == 0:
            return rows // r_rope
    return 0

# ------------------------------------------------------------ splitting heads

def split_heads(module, tensors, n_head, n_kv_head=0):
    """The AttentionLayer of a module from its tensors, {name: tensor}.

    n_kv_head: key/value heads, where shapes alone do not settle that queries share them.
    Raises UserError where the tensors do not divide into the heads.
    """
    for name in module.tensor_names:
        dtype = tensors[name].dtype
        if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{name} is stored as {str(dtype)[6:]}: dequantise it first")

    layout = module.scheme.layout
    first = module.tensor_names[0]
    shapes = ", ".join(str(tuple(tensors[name].shape)) for name in module.tensor_names[:12])
    try:
        parts = []
        for entry in module.names:
            if isinstance(entry, list):  # a tensor a head
                parts.append(torch.cat([tensors[name] for name in entry]))
            else:
                parts.append(tensors[entry])
        q, k, v, o = UNSTACK[layout](parts, n_head)  # (H r, d), (n r, d), (n r_v, d), (d, H r_v)
        r = q.shape[0] // n_head
        r_v = o.shape[1] // n_head                   # values may be wider or narrower than keys
        n = k.shape[0] // r
        matrices = q.ndim == k.ndim == v.ndim == o.ndim == 2
        whole = q.shape[0] == n_head * r and o.shape[1] == n_head * r_v
        shared = k.shape[0] == n * r and v.shape[0] == n * r_v and n_head % n == 0
        fits = matrices and whole and shared
    except (RuntimeError, IndexError, ZeroDivisionError, ValueError):  # torch: these shapes do not fit
        fits = False
    if not fits:
        raise UserError(f"{first}: shapes {shapes} do not divide into {n_head} heads "
                        f"(as {layout}: {LAYOUTS[layout]})")

    if module.scheme.names.startswith("qkv.weight") and n < n_head and not n_kv_head:
        raise UserError(f"{first}: shapes {shapes} are not three times {o.shape[1]}; "
                        f"if queries share keys, give --n_kv_head={n}")
    if n_kv_head and n != n_kv_head:
        raise UserError(f"{first}: shapes {shapes} have {n} key/value heads of {n_head}, not {n_kv_head}")

    W_Q = q.view(n_head, r, -1)
    W_K = k.reshape(n, r, -1)
    W_V = v.reshape(n, r_v, -1)
    P = o.unflatten(1, (n_head, r_v)).transpose(0, 1)
    if n < n_head:  # grouped queries
        W_K = W_K.repeat_interleave(n_head // n, 0)
        W_V = W_V.repeat_interleave(n_head // n, 0)
    return AttentionLayer(module.stack, module.layer, W_Q, W_K, W_V, P, n)
