"""
Where a model keeps its attention: names and shapes of its tensors in, W_Q, W_K, W_V, P of every head out. One row of SCHEMES a naming.

    for layer in attention_layers(model.state_dict(), n_head=12):
        layer.W_Q     # (H, r, d), likewise W_K; layer.W_V (H, r, d), layer.P (H, d, r)

A row says how q, k, v and the output projection o are called and how they lie in their tensors. What stands before these names is the
path of the attention module, whatever it is: its numbers tell the layer, its words the stack (encoder, decoder, cross, text, vision).
Heads are counted by the caller's word, the model's config or tensor shapes; never guessed.
"""
import difflib
import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from nanorank.errors import UserError


class AttentionLayer(NamedTuple):
    """One attention layer's heads: W_Q, W_K, W_V (H, r, d), P (H, d, r); `stack` is empty for models that have one stack."""
    stack: str
    layer: int
    W_Q: torch.Tensor
    W_K: torch.Tensor
    W_V: torch.Tensor
    P: torch.Tensor


class Scheme(NamedTuple):
    """One naming: `names` of q k v o, of qkv o or of q kv o, alternatives for o separated by |; `layout`: how heads lie in them (LAYOUTS).

    path, when(config, path, shapes): what must hold where other models use the same names otherwise.
    """
    names: str
    layout: str
    families: str
    path: str = ""
    when: Callable = lambda config, path, shapes: True


def is_codegen(config, path, shapes):
    return config.get("model_type") == "codegen" or "model_type" not in config and f"{path.removesuffix('attn')}mlp.fc_in.weight" in shapes


def is_bigcode_without_multi_query(config, path, shapes):
    return config.get("model_type") == "gpt_bigcode" and not config.get("multi_query", True)


# The first row whose names are all there takes a module. Where the rotary comes or whether there are biases does not matter here.
SCHEMES = [
    Scheme("q_attn.weight c_attn.weight c_proj.weight", "conv", "GPT-2's cross-attention"),
    Scheme("c_attn.weight c_proj.weight", "grouped", "GPT-BigCode without multi_query", when=is_bigcode_without_multi_query),
    Scheme("c_attn.weight c_proj.weight", "conv", "ours, nanoGPT, GPT-2 (Conv1D), GPT-BigCode, Qwen 1"),
    Scheme("q_proj.weight k_proj.weight v_proj.weight o_proj.weight|out_proj.weight|dense.weight|proj.weight|c_proj.weight|projection.weight",
           "separate", "Llama, Mistral, Qwen, Gemma, OLMo, Phi, GPT-J, GPT-Neo, OPT, BART, Whisper, CLIP, ..."),
    Scheme("c_q.weight c_k.weight c_v.weight c_proj.weight", "separate", "nanochat, modded-nanogpt"),
    Scheme("qkv_proj.weight out_proj.weight", "codegen", "CodeGen", path=r"(^|\.)h\.\d+\.attn$", when=is_codegen),
    Scheme("qkv_proj.weight o_proj.weight|out_proj.weight|proj.weight", "fused", "Phi-3"),
    Scheme("query_key_value.weight dense.weight", "fused", "ChatGLM", path=r"transformer\.encoder\.layers\.\d+\.self_attention$"),
    Scheme("query_key_value.weight dense.weight", "grouped", "GPT-NeoX, Pythia, Bloom, Falcon, Persimmon"),
    Scheme("self.query.weight self.key.weight self.value.weight output.dense.weight", "separate", "BERT, RoBERTa, ELECTRA, Swin"),
    Scheme("attention.query.weight attention.key.weight attention.value.weight output.dense.weight", "separate", "ViT, DeiT, BEiT, DINOv2"),
    Scheme("self.query_proj.weight self.key_proj.weight self.value_proj.weight output.dense.weight", "separate", "DeBERTa v2"),
    Scheme("self.in_proj.weight output.dense.weight", "grouped", "DeBERTa"),
    Scheme("attention.qkv.weight output.dense.weight", "fused", "TimeSformer"),
    Scheme("query_proj.weight key_proj.weight value_proj.weight out_proj.weight", "separate", "ProphetNet"),
    Scheme("linear_q.weight linear_k.weight linear_v.weight linear_out.weight", "separate", "Conformers of wav2vec 2, ESPnet"),
    Scheme("q_lin.weight k_lin.weight v_lin.weight out_lin.weight", "separate", "DistilBERT, XLM"),
    Scheme("q.weight k.weight v.weight o.weight|proj.weight|out.weight", "separate", "T5, MPNet"),
    Scheme("query.weight key.weight value.weight dense.weight|proj.weight|out.weight|out_proj.weight|output.weight", "separate", "ALBERT, minGPT"),
    Scheme("wq.weight wk.weight wv.weight wo.weight", "separate", "Meta's Llama, llama2.c"),
    Scheme("Wq.weight Wk.weight Wv.weight dense.weight|Wo.weight", "separate", "CTRL"),
    Scheme("qkv.weight proj.weight|projection.weight|out_proj.weight|o_proj.weight|out.weight", "fused", "timm ViT, DINO, MAE, SAM, Swin, BLIP"),
    Scheme("Wqkv.weight Wo.weight|out_proj.weight", "fused", "MPT, ModernBERT, Nomic BERT"),
    Scheme("W_pack.weight o_proj.weight", "fused", "Baichuan"),
    Scheme("att_proj.weight attn_out.weight|out_proj.weight", "fused", "OLMo 1 as AI2 saved it, Bark"),
    Scheme("to_qkv.weight to_out.0.weight|to_out.weight", "fused", "vit-pytorch"),
    Scheme("to_q.weight to_kv.weight to_out.0.weight|to_out.weight", "fused", "vit-pytorch's cross-attention"),
    Scheme("to_q.weight to_k.weight to_v.weight to_out.0.weight|to_out.weight", "separate", "x-transformers, diffusers"),
    Scheme("in_proj_weight out_proj.weight", "fused", "torch.nn.MultiheadAttention, OpenAI's CLIP, torchvision's ViT"),
    Scheme("q_proj_weight k_proj_weight v_proj_weight out_proj.weight", "separate", "torch.nn.MultiheadAttention with kdim, vdim"),
    Scheme("W_Q W_K W_V W_O", "lens", "TransformerLens"),
    Scheme("W_Q _W_K _W_V W_O", "lens", "TransformerLens with grouped queries"),
    Scheme("heads.{head}.query.weight heads.{head}.key.weight heads.{head}.value.weight proj.weight|out_proj.weight|out.weight|c_proj.weight",
           "separate", "one Linear per head"),
]

LAYOUTS = {
    "separate": "q, k, v, o each a Linear's weight, out x in, heads contiguous (with {head} in a name: one Linear per head)",
    "fused": "q, k and v (or k and v) stacked on top of each other in one weight, out x in, heads contiguous in each",
    "conv": "as fused, or the transpose of it, told by which side is longer (GPT-2's Conv1D is in x out)",
    "grouped": "per key/value head: its queries, its key, its value, then the next; one query head each: interleaved per head",
    "lens": "(head, d_model, d_head) for q, k, v and (head, d_head, d_model) for o, or the older order with the last two exchanged",
    "codegen": "four blocks of queries, values, keys",
}


class Module(NamedTuple):
    """An attention module found by its names; `names` are those of q, k, v, o (or fused), each a list where there is one a head."""
    stack: str
    layer: int
    path: str       # encoder.layer.3.attention
    block: str      # encoder.layer. : what stands before the layer's number
    numbers: tuple  # those in the path that differ between layers
    names: tuple
    scheme: Scheme


def find_attention(shapes, pattern="", layout="separate", config=None):
    """The attention modules among tensors of these names and shapes, {name: shape}, as a list of Module, in order.

    config: the model's config.json, where there is one: some models tell apart by it what their names do not.
    pattern: the ends of the names of q, k, v, o (or qkv, o), separated by commas, for a naming that SCHEMES lacks; with its layout.
    Raises UserError where there is none or one is incomplete, naming what was looked for.
    """
    schemes = SCHEMES
    if pattern:
        schemes = [Scheme(" ".join(pattern.replace(",", " ").split()), layout, "--pattern")]
        if layout not in LAYOUTS:
            raise UserError(f"--layout={layout}: there are {', '.join(LAYOUTS)}")
        if len(schemes[0].names.split()) not in (2, 3, 4):
            raise UserError(f"--pattern={pattern}: expects the ends of the names of q,k,v,o or of qkv,o or of q,kv,o")
    taken, modules, incomplete = set(), {}, {}
    for scheme in schemes:
        first, *rest = [tail.split("|") for tail in scheme.names.split()]
        start = re.compile(r"(?:(.*)\.)?" + re.escape(first[0]).replace(r"\{head\}", "0"))
        for name in shapes:
            match = start.fullmatch(name)
            if not match or name in taken or not re.search(scheme.path, match[1] or "") or not scheme.when(config or {}, match[1] or "", shapes):
                continue
            path, names = match[1] or "", []
            for tails in [first, *rest]:
                found = [x for x in (names_of(path, tail, shapes) for tail in tails) if x]
                if not found:
                    incomplete.setdefault(name, " or ".join(join(path, tail) for tail in tails))
                    break
                names.append(found[0])
            else:
                modules[path] = (scheme, tuple(names))
                taken.update(x for entry in names for x in ([entry] if isinstance(entry, str) else entry))
    found = in_order(modules)
    adapter = next((name for name in shapes if re.search(r"\.(lora_\w+|base_layer|modules_to_save)(\.|$)", name) or re.search(
        r"\.(parametrizations\..*|weight_[gv])$", name) and any(name.startswith(module.path + ".") for module in found)), None)
    if adapter:
        raise UserError(f"{adapter} changes what {adapter.split('.lora_')[0].split('.base_layer')[0]} is: merge the adapter into the weights first")
    broken = [name for name in incomplete if name not in taken]
    templates = {re.sub(NUMBER, "#", module.path) for module in found}
    for name in broken:  # a layer like those found, but for what it lacks; or all there is
        if not found or any(re.sub(NUMBER, "#", name).startswith(template + ".") for template in templates):
            raise UserError(f"attention with {name} lacks {incomplete[name]}")
    for module in found:
        for name in module.names:
            shape = shapes[name if isinstance(name, str) else name[0]]
            if len(shape) != (3 if module.scheme.layout == "lens" else 2) or 0 in shape:
                raise UserError(f"{name} has shape {tuple(shape)}: no weight of attention heads (a placeholder of a sharded checkpoint?)")
        if module.scheme.names.startswith("qkv.weight") and not pattern and (
                f"{module.path}.attention_biases" in shapes or re.search(r"attn_(block|grid)", module.path)):
            raise UserError(f"{module.path}: TinyViT, LeViT and MaxViT order queries, keys and values in qkv each in a way of their own; "
                             "give --pattern=qkv.weight,proj.weight and --layout")
    if not found:
        looked_for = sorted({scheme.names.split()[0].removesuffix(".weight") for scheme in schemes})
        alike = [f"layers.0.attention.{tail}" for tail in (("q_proj.weight", "query.weight", "qkv.weight") if not pattern else looked_for)]
        some = [name[:100] for name in list(shapes)[:2000]]  # a message is not worth minutes
        near = sorted(some, key=lambda name: -max(difflib.SequenceMatcher(None, name, other).ratio() for other in alike))[:10]
        raise UserError(f"no attention found: looked for names that end in {', '.join(looked_for)}; nearest of the {len(shapes)} names there: "
                         f"{', '.join(near) or 'none'}" + (" (--pattern=q,k,v,o takes other names)" if not pattern else ""))
    return found


def left_out(modules, shapes):
    """Remarks on what looks like attention but is in none of the modules, and on layers that are missing in a stack; a list of lines."""
    known = {x for module in modules for entry in module.names for x in ([entry] if isinstance(entry, str) else entry)}
    paths = tuple(f"{module.path}." for module in modules if not is_block(module))
    others = [name for name, shape in shapes.items() if name not in known and len(shape) == 2 and re.search(r"attn|attention", name, re.I)
              and re.search(r"(weight|W_\w)$", name) and not re.search(r"norm|emb|bias_table|relative", name, re.I) and not name.startswith(paths)]
    remarks = [f"left out: {len(others)} tensors that look like attention, such as {others[0]} {tuple(shapes[others[0]])}"] if others else []
    for stack in dict.fromkeys(module.stack for module in modules):
        layers = {module.layer for module in modules if module.stack == stack}
        missing = sorted(set(range(max(layers))) - layers)
        if missing:
            remarks.append(f"{stack} layers {', '.join(map(str, missing[:12]))}{' ...' if len(missing) > 12 else ''}: no attention known".strip())
    return remarks


def is_block(module):
    """Whether the attention's tensors stand in the block itself, beside those of the MLP, not in a module of their own."""
    return re.fullmatch(re.escape(module.block) + r"\d+", module.path) is not None


NUMBER = r"(?<![^._])\d+(?![^.])"  # a number that is a whole part of a path: layers.3, encoder_layer_3; not attn1
WORDS = {"perceiver": "perceiver", "resampler": "perceiver", "qformer": "qformer", "predictor": "predictor", "memory": "memory", "vpm": "vision",
         "video": "video", "encoder": "encoder", "decoder": "decoder", "text": "text", "language": "text", "llm": "text", "vision": "vision",
         "visual": "vision", "image": "vision", "audio": "audio", "speech": "audio"}


def join(path, tail):
    return f"{path}.{tail}" if path else tail


def names_of(path, tail, shapes):
    """The tensor's name where it is there, else None; of a tail with {head} the list of names, head by head."""
    if "{head}" not in tail:
        return join(path, tail) if join(path, tail) in shapes else None
    names = []
    while join(path, tail.format(head=len(names))) in shapes:
        names.append(join(path, tail.format(head=len(names))))
    return names or None


def kind_of(path):
    """encoder, decoder, text, vision, audio ... by the first word in a path that says so, else an empty string."""
    return next((kind for part in path.split(".") for word, kind in WORDS.items() if part.startswith(word)), "")


def in_order(modules):
    """Attention modules {path: (scheme, names)} as a list of Module, stack by stack, layer by layer.

    Paths alike but for their numbers are a stack. The number that differs within it is the layer; where several do (Swin's stages
    and blocks), layers are counted through.
    """
    stacks = {}
    for path in modules:
        stacks.setdefault(re.sub(NUMBER, "#", path), []).append(path)
    labels = {template: "cross" if re.search(r"cross|encoder_attn|EncDec|multihead_attn|attn2\b", template) else kind_of(template)
              for template in stacks}
    if sorted(labels.values()) == ["", "cross"]:  # what attends to something else is a decoder
        labels = {template: label or "decoder" for template, label in labels.items()}
    numbered = [label for template, label in labels.items() if "#" in template]
    labels = {template: label if label and "#" in template and numbered.count(label) == 1 else re.sub(r"[._]?#", "", template).lstrip(".")
              for template, label in labels.items()}
    found = []
    for template, paths in stacks.items():
        numbers = {path: [int(x) for x in re.findall(NUMBER, path)] for path in paths}
        differ = [i for i, column in enumerate(zip(*numbers.values())) if len(set(column)) > 1] or [0][:template.count("#")]
        for count, path in enumerate(sorted(paths, key=numbers.get)):
            chosen = tuple(numbers[path][i] for i in differ)
            layer = chosen[0] if len(chosen) == 1 else count
            block = [m.start() for m in re.finditer(NUMBER, path)][differ[0]] if differ else 0
            scheme, names = modules[path]
            found.append(Module(labels[template] if len(stacks) > 1 else "", layer, path, path[:block], chosen, names, scheme))
    rank = {"encoder": 0, "text": 1, "decoder": 2, "vision": 3, "cross": 4}
    return sorted(found, key=lambda module: (rank.get(module.stack, 5), module.stack, module.layer))

# ------------------------------------------------------------------------------------------------------------------ heads

HEAD_KEYS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "num_head", "heads", "nhead", "encoder_attention_heads")
TIMM = r"(?:vit|deit3?|beit(?:v2)?|eva02|flexivit)_(?:s?relpos_)?([a-z0-9]+)_patch(?!.*_gap)"  # timm's config.json names an architecture alone
TIMM_HEADS = {("tiny", 192): 3, ("small", 384): 6, ("base", 768): 12, ("large", 1024): 16, ("huge", 1280): 16, ("giant", 1408): 16,
              ("gigantic", 1664): 16, ("so400m", 1152): 16, ("medium", 512): 8, ("little", 320): 5}  # (size, width): heads, timm 1.0.31


WIDTH_KEYS = ("true_hidden_size", "hidden_size", "d_model", "n_embd", "emb_dim", "dim")


def heads_in_config(config, module, widths):
    """Heads of a module by a model's config (a dict, its sub-configs included), 0 or less where it does not say.

    Of several sub-configs a module's own is the one of its kind (text, vision ...); and none whose width is not among `widths`,
    those of the module's input and output.
    """
    kind = kind_of(module.path)
    inner = {key: value for key, value in config.items() if isinstance(key, str) and isinstance(value, dict)}
    own = [value for key, value in inner.items() if kind and kind_of(key) == kind]
    rest = [value for key, value in inner.items() if kind_of(key) in ("", *["text"] * (kind in ("", "encoder", "decoder")))]
    if kind not in ("", "text", "encoder", "decoder") and any(re.search("config", key) for key in inner):
        rest, config = [], {}  # a part of a composite: another part's heads are not its heads
    if "num_attention_heads_per_stage" in config:  # SAM 2: its one number is the first stage's
        return -1
    width = next((config[key] for key in WIDTH_KEYS if type(config.get(key)) is int), None)
    two_sided = kind in ("encoder", "decoder") or module.stack == "cross"
    side = "decoder" if kind == "decoder" or module.stack == "cross" else "encoder"
    sided = [f"{side}_attention_heads", f"{side}_num_attention_heads", f"num_{side}_attention_heads"] * two_sided
    value = next((config[key] for key in (*sided, *HEAD_KEYS) if key in config), 0)
    if isinstance(value, (list, tuple)):  # one a layer, or one a stage
        value = value[module.numbers[0]] if module.numbers and module.numbers[0] < len(value) else 0
    elif width not in (None, *widths):
        value = 0
    value = value if type(value) is int else 0
    for source in own:
        value = heads_in_config(source, module, widths) or value
    for source in rest:
        value = value or heads_in_config(source, module, widths)
    return value


def heads_in_shapes(module, shapes):
    """Heads of a module by shapes beside it that depend on their number, 0 where there is none."""
    if module.scheme.layout == "lens":
        return shapes[module.names[0]][0]
    if not isinstance(module.names[0], str):
        return len(module.names[0])
    for tail in ("relative_position_bias_table", "self.relative_position_bias_table", "relative_position_bias.relative_position_bias_table"):
        if join(module.path, tail) in shapes:
            return shapes[join(module.path, tail)][1]
    side = re.split(NUMBER, module.path)[0]
    for name, shape in shapes.items():  # T5, MPNet: (buckets, H), in the first layer alone
        if name.startswith(side) and name.endswith("relative_attention_bias.weight") and len(shape) == 2:
            return shape[1]
    for tail in ("q_norm.weight", "q_layernorm.weight"):  # Qwen 3, Gemma 3: a norm as wide as a head
        width, q = shapes.get(join(module.path, tail), ()), shapes[module.names[0]]
        if module.scheme.layout == "separate" and len(width) == 1 and width[0] != q[0]:
            return q[0] // width[0]
    return 0


def heads_of(module, shapes, configs=(), n_head=0, n_kv_head=0, d_head=0):
    """(heads, where that is from) of a module: by configs, {source: dict}, by shapes, else by the caller's n_head, d_head or n_kv_head.

    Raises UserError where nothing says how many, or config and shapes contradict each other.
    """
    q, k = (module.names + module.names)[:2]
    by_shape = heads_in_shapes(module, shapes)
    if module.scheme.layout == "lens" or not isinstance(q, str):  # heads are an axis, or a tensor each
        if n_head not in (0, by_shape):
            raise UserError(f"--n_head={n_head}: {module.path} has {by_shape}")
        return by_shape, "tensor shapes"
    conv = module.scheme.layout == "conv" and shapes[q][0] < shapes[q][1]
    out = shapes[module.names[-1]][::-1] if conv else shapes[module.names[-1]]  # of o: output, input
    widths = {out[0], shapes[q][0 if conv else 1]}
    for source, config in dict(configs).items():
        if config.get("pruned_heads"):
            raise UserError(f"{source} has pruned_heads: which heads are left of {q} is not known; save the model unpruned")
        size = re.match(TIMM, str(config.get("architecture", "")))
        by_config = heads_in_config(config, module, widths) or TIMM_HEADS.get((size and size[1], out[0]), 0)
        if by_config > 0:
            if by_shape and by_shape != by_config:
                raise UserError(f"{source} says {by_config} heads, the shapes beside {q} say {by_shape}")
            return by_config, source
    if by_shape:
        return by_shape, "tensor shapes"
    if n_head:
        return n_head, "--n_head"
    if d_head:
        if out[1] % d_head:
            raise UserError(f"--d_head={d_head} does not divide the {out[1]} inputs of {module.names[-1]}")
        return out[1] // d_head, "--d_head"
    if n_kv_head and module.scheme.layout == "separate" and shapes[k][0] % n_kv_head == 0:
        return shapes[q][0] // (shapes[k][0] // n_kv_head), "--n_kv_head"
    raise UserError(f"nothing says how many heads {q} {tuple(shapes[q])} holds (no config of its own, arguments or telling shapes); "
                     "give --n_head or --d_head")


def split_heads(module, tensors, n_head, n_kv_head=0):
    """The AttentionLayer of a module from its tensors, {name: tensor}. Raises UserError where they do not divide into the heads."""
    parts = [[tensors[x] for x in ([name] if isinstance(name, str) else name)] for name in module.names]
    for tensor, name in ((x, name) for part, name in zip(parts, module.names) for x in part):
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{name} is stored as {str(tensor.dtype)[6:]}: dequantise it first")
    parts = [part[0] if len(part) == 1 and isinstance(name, str) else torch.cat(part) for part, name in zip(parts, module.names)]
    shapes = ", ".join(str(tuple(part.shape)) for part in parts)
    try:
        q, k, v, o = UNSTACK[module.scheme.layout](parts, n_head)
        fits = q.ndim == k.ndim == v.ndim == o.ndim == 2 and q.shape[0] % n_head == o.shape[1] % n_head == 0
        r, r_v = q.shape[0] // n_head, o.shape[1] // n_head  # keys' and values' heads may differ in width
        n = k.shape[0] // r                                  # key/value heads
        fits = fits and n * r == k.shape[0] and n * r_v == v.shape[0] and n_head % n == 0
    except (RuntimeError, IndexError, ZeroDivisionError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"{module.names[0]}: shapes {shapes} do not divide into {n_head} heads (as {module.scheme.layout}: "
                         f"{LAYOUTS[module.scheme.layout]})")
    if module.scheme.names.startswith("qkv.weight") and n < n_head and not n_kv_head:
        raise UserError(f"{module.names[0]}: shapes {shapes} are not three times {o.shape[1]}; if queries share keys, give --n_kv_head={n}")
    if n_kv_head and n != n_kv_head:
        raise UserError(f"{module.names[0]}: shapes {shapes} have {n} key/value heads of {n_head}, not {n_kv_head}")
    W_Q = q.view(n_head, r, -1)
    W_K, W_V = (x.reshape(n, -1, x.shape[1]).repeat_interleave(n_head // n, 0) if n < n_head else x.reshape(n, -1, x.shape[1]) for x in (k, v))
    return AttentionLayer(module.stack, module.layer, W_Q, W_K, W_V, o.unflatten(1, (n_head, r_v)).transpose(0, 1))


def unstack_fused(parts, n_head):
    """(qkv, o) or (q, kv, o) -> q, k, v, o, each out x in."""
    *q, stacked, o = parts
    if q:
        return (*q, *stacked.chunk(2), o)
    r = o.shape[1] // n_head
    n = (stacked.shape[0] // r - n_head) // 2
    return (*stacked.split([n_head * r, n * r, n * r]), o)


def unstack_conv(parts, n_head):
    stacked = parts[-2]
    return unstack_fused([part.T for part in parts] if stacked.shape[0] < stacked.shape[1] else parts, n_head)


def unstack_grouped(parts, n_head):
    qkv, o = parts
    r = o.shape[1] // n_head
    n = (qkv.shape[0] // r - n_head) // 2
    qkv = qkv.reshape(n, n_head // n + 2, r, -1)
    return qkv[:, :-2].flatten(0, 2), qkv[:, -2].flatten(0, 1), qkv[:, -1].flatten(0, 1), o


def unstack_lens(parts, n_head):
    q, k, v, o = parts
    if q.shape[1] >= q.shape[2]:  # (H, d, r)
        q, k, v, o = q.mT, k.mT, v.mT, o.mT
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), o.transpose(0, 1).flatten(1)


def unstack_codegen(parts, n_head):
    qkv, o = parts
    q, v, k = qkv.reshape(4, 3, qkv.shape[0] // 12, -1).transpose(0, 1).flatten(1, 2)
    return q, k, v, o


UNSTACK = {"separate": lambda parts, n_head: parts, "fused": unstack_fused, "conv": unstack_conv, "grouped": unstack_grouped, "lens": unstack_lens,
           "codegen": unstack_codegen}


def attention_layers(tensors, n_head=0, configs=()):
    """Yields the AttentionLayer of each layer of a {name: tensor} dict (a state dict), in order.

    n_head: heads per layer, where neither configs, {source: dict}, nor the shapes say. Raises UserError where no scheme matches.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for module in find_attention(shapes, config=next(iter(dict(configs).values()), None)):
        yield split_heads(module, tensors, heads_of(module, shapes, configs, n_head)[0])
