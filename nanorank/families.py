"""
Finds the attention of a model by names and shapes of its tensors, and gives every head's W_Q, W_K, W_V, P.

    from nanorank import attention_layers
    for layer in attention_layers(model.state_dict(), n_head=12):
        layer.W_Q     # (H, r, d), likewise W_K, W_V; layer.P is (H, d, r)

SCHEMES has a row for each naming: the names of q, k, v and the output projection o, and how the heads lie in
them. The text before these names is the path of the attention module. Its numbers tell the layer, its words
tell the stack (encoder, decoder, cross, text, vision):

    transformer.h.3.attn.c_attn.weight -> path transformer.h.3.attn, layer 3
"""
import difflib
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

from nanorank.errors import UserError
from nanorank.heads import LAYOUTS, NUMBER, AttentionLayer, heads_of, join, kind_of, split_heads

__all__ = ["LAYOUTS", "SCHEMES", "AttentionLayer", "Module", "attention_layers", "find_attention", "heads_of",
           "is_block", "left_out", "split_heads"]

# ------------------------------------------------------------ the table of names

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


# The first row whose names are all there takes a module. Rotary embeddings and biases do not matter here.
SCHEMES = [
    linear("q_attn c_attn c_proj", "conv", "GPT-2's cross-attention"),
    linear("c_attn c_proj", "grouped", "GPT-BigCode without multi_query",
           when=is_bigcode_without_multi_query),
    linear("c_attn c_proj", "conv", "ours, nanoGPT, GPT-2 (Conv1D), GPT-BigCode, Qwen 1"),
    linear("q_proj k_proj v_proj o_proj|out_proj|dense|proj|c_proj|projection", "separate",
           "Llama, Mistral, Qwen, Gemma, OLMo, Phi, GPT-J, GPT-Neo, OPT, BART, Whisper, CLIP, ..."),
    linear("c_q c_k c_v c_proj", "separate", "nanochat, modded-nanogpt"),
    linear("qkv_proj out_proj", "codegen", "CodeGen", path=r"(^|\.)h\.\d+\.attn$", when=is_codegen),
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
    linear("heads.{head}.query heads.{head}.key heads.{head}.value proj|out_proj|out|c_proj", "separate",
           "one Linear per head"),
]

# ------------------------------------------------------------ modules

class Module(NamedTuple):
    """An attention module found by its names."""
    stack: str      # encoder, decoder, cross ...; empty where the model has one stack
    layer: int
    path: str       # encoder.layer.3.attention
    block: str      # encoder.layer. : the path before the layer's number
    numbers: tuple  # the numbers in the path that differ between layers: (3,)
    names: tuple    # of q, k, v, o (or qkv, o); where each head has a tensor of its own, lists of names
    scheme: Scheme

    @property
    def tensor_names(self):
        """`names` as one flat list."""
        return flat(self.names)


def flat(names):
    found = []
    for entry in names:
        if isinstance(entry, list):
            found.extend(entry)
        else:
            found.append(entry)
    return found


def is_block(module):
    """Whether attention tensors lie in the block itself, beside the MLP's, not in a module of their own."""
    return re.fullmatch(re.escape(module.block) + r"\d+", module.path) is not None


def attention_layers(tensors, n_head=0, configs=(), pattern="", layout="separate"):
    """Yields the AttentionLayer of each layer of a state dict, {name: tensor}, in order.

    n_head: heads per layer, where neither configs, {source: dict}, nor the shapes tell.
    pattern, layout: as in find_attention.
    Raises UserError where no attention is found, and where nothing tells the number of heads.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = next(iter(dict(configs).values()), None)
    for module in find_attention(shapes, pattern, layout, config):
        heads, _ = heads_of(module, shapes, configs, n_head)
        yield split_heads(module, tensors, heads)


def find_attention(shapes, pattern="", layout="separate", config=None):
    """The attention modules among tensors of these names and shapes, as a list of Module, in order.

    shapes: {name: shape}.
    config: the model's config.json, where there is one; it tells some models apart that share names.
    pattern, layout: a naming that SCHEMES lacks, as the ends of the names of q,k,v,o (or qkv,o or q,kv,o).
    Raises UserError where there is no attention, and where a module is incomplete, changed by an adapter or
    in an order that names do not tell.
    """
    schemes = [scheme_of_pattern(pattern, layout)] if pattern else SCHEMES
    matches, incomplete = match_schemes(schemes, shapes, config or {})
    modules = in_order(matches)

    refuse_adapters(modules, shapes)
    refuse_incomplete(modules, incomplete)
    for module in modules:
        refuse_odd_shapes(module, shapes)
        if not pattern:
            refuse_unknown_order(module, shapes)
    if not modules:
        raise UserError(nothing_found(schemes, shapes, pattern))
    return modules


def scheme_of_pattern(pattern, layout):
    """The Scheme of --pattern and --layout. Raises UserError where they make none."""
    names = pattern.replace(",", " ").split()
    if layout not in LAYOUTS:
        raise UserError(f"--layout={layout}: there are {', '.join(LAYOUTS)}")
    if len(names) not in (2, 3, 4):
        raise UserError(f"--pattern={pattern}: expects the ends of the names of q,k,v,o "
                        "or of qkv,o or of q,kv,o")
    return Scheme(" ".join(names), layout, "--pattern")


def match_schemes(schemes, shapes, config):
    """({path: (scheme, names)} of modules, {first tensor: the missing one} of incomplete modules)."""
    taken = set()
    matches = {}
    incomplete = {}
    for scheme in schemes:
        tails = [entry.split("|") for entry in scheme.names.split()]
        first = re.escape(tails[0][0]).replace(r"\{head\}", "0")
        first = re.compile(r"(?:(.*)\.)?" + first)
        for name in shapes:
            match = first.fullmatch(name)
            if match is None or name in taken:
                continue
            path = match[1] or ""
            if not re.search(scheme.path, path) or not scheme.when(config, path, shapes):
                continue

            names = []
            for alternatives in tails:
                found = first_there(path, alternatives, shapes)
                if not found:
                    incomplete.setdefault(name, " or ".join(join(path, tail) for tail in alternatives))
                    break
                names.append(found)
            if len(names) == len(tails):
                matches[path] = scheme, tuple(names)
                taken.update(flat(names))

    # a row further down may have taken what is incomplete by a row above
    incomplete = {name: lacks for name, lacks in incomplete.items() if name not in taken}
    return matches, incomplete


def first_there(path, alternatives, shapes):
    """The first alternative that is there: a tensor's name, or with {head} a list of names; else None."""
    for tail in alternatives:
        name = join(path, tail)
        if "{head}" in tail:
            names = []
            while join(path, tail.format(head=len(names))) in shapes:
                names.append(join(path, tail.format(head=len(names))))
            if names:
                return names
        elif name in shapes:
            return name
    return None

# ------------------------------------------------------------ stacks and layers

# what attends to something else
CROSS = r"cross|encoder_attn|EncDec|multihead_attn|attn2\b"
STACK_ORDER = ("encoder", "text", "decoder", "vision", "cross")


def in_order(matches):
    """Attention modules {path: (scheme, names)} as a list of Module, stack by stack, layer by layer.

    Paths that differ only in their numbers are a stack. The number that varies within it is the layer. Where
    several vary (Swin's stages and blocks), layers are counted through:

        layers.0.blocks.0.attn, layers.1.blocks.0.attn, layers.1.blocks.1.attn -> layers 0, 1, 2
    """
    stacks = {}  # {path with # for each number: paths}
    for path in matches:
        stacks.setdefault(re.sub(NUMBER, "#", path), []).append(path)
    labels = stack_labels(stacks)

    modules = []
    for template, paths in stacks.items():
        numbers = {path: [int(x) for x in re.findall(NUMBER, path)] for path in paths}
        columns = list(zip(*numbers.values()))
        varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
        if not varying and columns:  # one layer: its first number
            varying = [0]
        for count, path in enumerate(sorted(paths, key=numbers.get)):
            scheme, names = matches[path]
            chosen = tuple(numbers[path][i] for i in varying)
            layer = chosen[0] if len(chosen) == 1 else count
            block = ""
            if varying:
                starts = [match.start() for match in re.finditer(NUMBER, path)]
                block = path[:starts[varying[0]]]
            stack = labels[template] if len(stacks) > 1 else ""
            modules.append(Module(stack, layer, path, block, chosen, names, scheme))

    def place(module):
        known = module.stack in STACK_ORDER
        rank = STACK_ORDER.index(module.stack) if known else len(STACK_ORDER)
        return rank, module.stack, module.layer

    return sorted(modules, key=place)


def stack_labels(templates):
    """{path with # for each number: its stack's name}.

        encoder.block.#.layer.#.SelfAttention   -> encoder
        decoder.block.#.layer.#.EncDecAttention -> cross
        vision_model.head.attention             -> vision_model.head.attention
    """
    words = {}
    for template in templates:
        words[template] = "cross" if re.search(CROSS, template) else kind_of(template)
    if sorted(words.values()) == ["", "cross"]:  # beside cross-attention stands a decoder's own
        words = {template: word or "decoder" for template, word in words.items()}

    # a word that two stacks share names neither: their paths do
    numbered = [word for template, word in words.items() if "#" in template]
    labels = {}
    for template, word in words.items():
        unique = "#" in template and numbered.count(word) == 1
        if word and unique:
            labels[template] = word
        else:
            labels[template] = re.sub(r"[._]?#", "", template).lstrip(".")
    return labels

# ------------------------------------------------------------ refusals and remarks

ADAPTER = r"\.(lora_\w+|base_layer|modules_to_save)(\.|$)"
REPARAMETRISED = r"\.(parametrizations\..*|weight_[gv])$"  # torch.nn.utils.parametrize, weight_norm


def refuse_adapters(modules, shapes):
    """Raises UserError where other tensors change what an attention weight is."""
    paths = tuple(f"{module.path}." for module in modules)
    for name in shapes:
        reparametrised = re.search(REPARAMETRISED, name) and name.startswith(paths)
        if re.search(ADAPTER, name) or reparametrised:
            weight = re.split(r"\.lora_|\.base_layer", name)[0]
            raise UserError(f"{name} changes what {weight} is: merge the adapter into the weights first")


def refuse_incomplete(modules, incomplete):
    """Raises UserError for an incomplete module named like the complete ones, or where none is complete."""
    templates = tuple(re.sub(NUMBER, "#", module.path) + "." for module in modules)
    for name, lacks in incomplete.items():
        if not modules or re.sub(NUMBER, "#", name).startswith(templates):
            raise UserError(f"attention with {name} lacks {lacks}")


def refuse_odd_shapes(module, shapes):
    """Raises UserError for a tensor that is no weight."""
    dims = 3 if module.scheme.layout == "lens" else 2
    for name in module.tensor_names:
        if len(shapes[name]) != dims or 0 in shapes[name]:
            raise UserError(f"{name} has shape {tuple(shapes[name])}: no weight of attention heads "
                            "(a placeholder of a sharded checkpoint?)")


def refuse_unknown_order(module, shapes):
    """Raises UserError for models of timm that share the ViT's names and stack q, k, v otherwise."""
    is_tinyvit = f"{module.path}.attention_biases" in shapes
    is_maxvit = re.search(r"attn_(block|grid)", module.path)
    if module.scheme.names.startswith("qkv.weight") and (is_tinyvit or is_maxvit):
        raise UserError(f"{module.path}: TinyViT, LeViT and MaxViT order queries, keys and values in qkv "
                        "each in a way of their own; give --pattern=qkv.weight,proj.weight and --layout")


def nothing_found(schemes, shapes, pattern):
    """The error message: what was looked for, and the names that come nearest."""
    looked_for = sorted({scheme.names.split()[0].removesuffix(".weight") for scheme in schemes})
    likely = looked_for if pattern else ["q_proj.weight", "query.weight", "qkv.weight"]
    likely = [f"layers.0.attention.{tail}" for tail in likely]

    def likeness(name):
        return max(difflib.SequenceMatcher(None, name, other).ratio() for other in likely)

    some = [name[:100] for name in list(shapes)[:2000]]  # more would take minutes
    nearest = sorted(some, key=likeness, reverse=True)[:10]
    advice = "" if pattern else " (--pattern=q,k,v,o takes other names)"
    return (f"no attention found: looked for names that end in {', '.join(looked_for)}; "
            f"nearest of the {len(shapes)} names there: {', '.join(nearest) or 'none'}{advice}")


def left_out(modules, shapes):
    """Remarks on tensors that look like attention but are in no module, and on layers missing in a stack."""
    known = set()
    paths = []
    for module in modules:
        known.update(module.tensor_names)
        if not is_block(module):
            paths.append(f"{module.path}.")
    paths = tuple(paths)

    others = []
    for name, shape in shapes.items():
        is_weight = len(shape) == 2 and re.search(r"(weight|W_\w)$", name)
        is_attention = re.search(r"attn|attention", name, re.I)
        is_other = re.search(r"norm|emb|bias_table|relative", name, re.I)
        in_module = name in known or name.startswith(paths)
        if is_weight and is_attention and not is_other and not in_module:
            others.append(name)

    remarks = []
    if others:
        remarks.append(f"left out: {len(others)} tensors that look like attention, "
                       f"such as {others[0]} {tuple(shapes[others[0]])}")
    for stack in dict.fromkeys(module.stack for module in modules):
        layers = {module.layer for module in modules if module.stack == stack}
        missing = (layer for layer in range(max(layers)) if layer not in layers)
        missing = list(itertools.islice(missing, 13))  # a name may tell layer 10**12
        if missing:
            listed = ", ".join(map(str, missing[:12]))
            dots = " ..." if len(missing) > 12 else ""
            remarks.append(f"{stack} layers {listed}{dots}: no attention known".strip())
    return remarks
