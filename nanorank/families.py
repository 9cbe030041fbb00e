"""
Finds the attention of a model by names and shapes of its tensors, and gives every head's W_Q, W_K, W_V, P.

    from nanorank import attention_layers
    for layer in attention_layers(model.state_dict(), n_head=12):
        layer.W_Q     # (H, r, d), likewise W_K, W_V; layer.P is (H, d, r)

schemes.SCHEMES has a row for each naming: the names of q, k, v and the output projection o, and how the
heads lie in them. The text before these names is the path of the attention module. Its numbers tell the
layer, its words tell the stack (encoder, decoder, cross, text, vision):

    transformer.h.3.attn.c_attn.weight -> path transformer.h.3.attn, layer 3
"""
import difflib
import itertools
import re
from typing import NamedTuple

from nanorank.errors import UserError
from nanorank.heads import NUMBER, AttentionLayer, heads_of, join, kind_of, split_heads
from nanorank.layouts import LAYOUTS
from nanorank.positions import with_positions
from nanorank.schemes import SCHEMES, Scheme, gate_beside_query, told

__all__ = ["LAYOUTS", "SCHEMES", "AttentionLayer", "Module", "attention_layers", "find_attention", "heads_of",
           "is_block", "left_out", "split_heads"]

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
    note: str = ""  # what the reader should know of how its tensors were found

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


def attention_layers(tensors, n_head=0, configs=(), pattern="", layout="separate", rope=""):
    """Yields the AttentionLayer of each layer of a state dict, {name: tensor}, in order.

    n_head: heads per layer, where neither configs, {source: dict}, nor the shapes tell.
    pattern, layout: as in find_attention.
    rope: half, interleaved, none or half:64, where nothing tells whether q and k turn (positions.py).
    Raises UserError where no attention is found, and where nothing tells the number of heads.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = next(iter(dict(configs).values()), None)
    for module in find_attention(shapes, pattern, layout, config):
        heads, _ = heads_of(module, shapes, configs, n_head)
        yield with_positions(split_heads(module, tensors, heads), module, shapes, configs, rope)


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
    modules = without_foreign_keys(in_order(matches), config or {})
    if not pattern:
        modules = without_convolutions(modules, shapes)

    refuse_adapters(modules, shapes)
    refuse_incomplete(modules, incomplete, shapes)
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
    """({path: (scheme, names, note)} of modules, {first tensor: the missing one} of incomplete modules)."""
    taken = set()
    matches = {}
    incomplete = {}
    without_output = {}  # {path: (scheme, names of all but o, the tensor that named it)}
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
                    if alternatives is tails[-1] and scheme.families != "--pattern":
                        without_output.setdefault(path, (scheme, names, name))
                    break
                names.append(found)
            if len(names) == len(tails):
                matches[path] = scheme, tuple(names), ""
                taken.update(flat(names))

    of_all_heads = sorted(without_output.items(), key=lambda entry: isinstance(entry[1][1][0], str))
    for path, (scheme, names, first_name) in of_all_heads:
        output = "" if first_name in taken else find_output(path, scheme, names, shapes)
        if output:
            note = f"{output} was taken for the output projection: no other beside its q, k, v has that shape"
            matches[path] = scheme, (*names, output), note
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


def find_output(path, scheme, names, shapes):
    """The one matrix beside q, k, v that has the shape of their output projection, else an empty string.

    Beside: in the module `path`, or else in the module around it, unless that is a whole block.
    """
    wanted = output_shapes(scheme, names, shapes)
    around = path.rpartition(".")[0]
    places = [path] if not around or re.fullmatch(r"(.*\.)?\d+", around) else [path, around]
    for place in places:
        found = []
        for name in shapes:
            is_other = name in flat(names) or re.search(NO_PROJECTION, name, re.I)
            if name.startswith(join(place, "")) and tuple(shapes[name]) in wanted and not is_other:
                found.append(name)
        if found:
            return found[0] if len(found) == 1 else ""
    return ""


def output_shapes(scheme, names, shapes):
    """The shapes that the output projection of these q, k, v may have."""
    first = names[0][0] if isinstance(names[0], list) else names[0]
    rows, d = shapes[first][0], shapes[first][-1]
    if scheme.layout == "lens":
        H, a, b = (*shapes[first], 0, 0)[:3]
        return {(H, a, b), (H, b, a), (b, H * a)} - {shapes[first]} | {shapes[first]}
    if isinstance(names[0], list):
        values = names[-1]
        return {(d, sum(shapes[name][0] for name in values))}
    if scheme.layout == "conv" and rows < d:
        return {(rows, rows)}
    if len(names) == 1:  # qkv; keys that queries share leave its share open
        return {(d, rows // 3)} if len(shapes[first]) == 2 and rows % 3 == 0 else {(d, shapes[first][-2])}
    return {(d, rows)}

# ------------------------------------------------------------ stacks and layers

# what attends to something else
CROSS = r"cross|encoder_attn|EncDec|multihead_attn|attn2\b"
STACK_ORDER = ("encoder", "text", "decoder", "vision", "cross")


def in_order(matches):
    """Attention modules {path: (scheme, names, note)} as a list of Module, stack by stack, layer by layer.

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
            scheme, names, note = matches[path]
            chosen = tuple(numbers[path][i] for i in varying)
            layer = chosen[0] if len(chosen) == 1 else count
            block = ""
            if varying:
                starts = [match.start() for match in re.finditer(NUMBER, path)]
                block = path[:starts[varying[0]]]
            stack = labels[template] if len(stacks) > 1 else ""
            modules.append(Module(stack, layer, path, block, chosen, names, scheme, note))

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

# matrices in an attention module that project nothing
NO_PROJECTION = r"norm|emb|bias_table|relative|rel_pos|tril|mask|lora|(^|[._])(ln|bias)([._]|$)"

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


def without_foreign_keys(modules, config):
    """The modules without those whose keys and values another layer makes, whatever is stored for them.

    Gemma 3n and 4: the last num_kv_shared_layers of the text's layers.
    """
    shared, layers = told(config, "num_kv_shared_layers"), told(config, "num_hidden_layers")
    text = config.get("text_config")
    if isinstance(text, dict):
        layers = text.get("num_hidden_layers", layers)
    if type(shared) is not int or type(layers) is not int or shared < 1:
        return modules

    def own(module):
        is_text = kind_of(module.path) in ("", "text", "decoder")
        return not is_text or module.layer < layers - shared

    return [module for module in modules if own(module)]


def without_convolutions(modules, shapes):
    """The modules without those that mix neighbouring keys by a convolution: their scores are not x W_QK x.

    Linear attention (Kimi, OLMo hybrid) and Inkling. Raises UserError where no others are left.
    """
    convolved = set()
    for name in shapes:
        match = re.search(r"(^|\.)([qkv]_s?conv(1d)?|conv1d)\.(conv1d\.)?weight$", name)
        if match:
            convolved.add(name[:match.start()])

    plain = [module for module in modules if module.path not in convolved]
    if modules and not plain:
        raise UserError(f"{modules[0].path}: a convolution over tokens follows the projections of keys, so "
                        "the scores are not those of W_K^T W_Q; --pattern reads the projections alone")
    return plain


def refuse_incomplete(modules, incomplete, shapes):
    """Raises UserError for an incomplete module named like the complete ones, or where none is complete.

    A layer with neither keys nor values of its own shares those of another layer: it is left out.
    """
    templates = tuple(re.sub(NUMBER, "#", module.path) + "." for module in modules)
    for name, lacks in incomplete.items():
        if modules and has_no_keys(name, shapes):
            continue
        if not modules or re.sub(NUMBER, "#", name).startswith(templates):
            raise UserError(f"attention with {name} lacks {lacks}")


def has_no_keys(q, shapes):
    """Whether a q_proj stands beside an o_proj alone."""
    path = q.removesuffix("q_proj.weight")
    beside = {name.removeprefix(path) for name in shapes if name.startswith(path)}
    keys = {"k_proj.weight", "v_proj.weight"}
    return q.endswith("q_proj.weight") and "o_proj.weight" in beside and not keys & beside


def refuse_odd_shapes(module, shapes):
    """Raises UserError for a tensor that is no weight."""
    layout = module.scheme.layout
    if layout == "lens":
        refuse_odd_output(module, shapes)
    for name in module.tensor_names:
        shape = tuple(shapes[name])
        allowed = (3,) if layout == "lens" else (2,)
        if layout == "lens" and name == module.names[-1]:
            allowed = (2, 3)
        if layout == "fused" and len(shape) == 3 and shape[0] == 3:  # q, k, v one behind the other
            allowed = (3,)
        if len(shape) not in allowed or 0 in shape:
            raise UserError(f"{name} has shape {shape}: no weight of attention heads "
                            "(a placeholder of a sharded checkpoint?)")


def refuse_odd_output(module, shapes):
    """Raises UserError for a W_O of two dimensions that does not fit, or that fits both ways."""
    q, o = (tuple(shapes[name]) for name in (module.names[0], module.names[-1]))
    if len(q) != 3 or len(o) != 2:
        return
    H, r, d = q if q[1] < q[2] else (q[0], q[2], q[1])
    out_by_in = q[1] < q[2]
    if not out_by_in and d == H * r:
        raise UserError(f"{module.names[-1]} {o} beside {module.names[0]} {q}: which of its sides are the "
                        "heads is not told; store it as (head, d_head, d_model)")
    if o != ((d, H * r) if out_by_in else (H * r, d)):
        raise UserError(f"{module.names[-1]} {o} does not fit {module.names[0]} {q}")


def refuse_unknown_order(module, shapes):
    """Raises UserError for models that share names with others and stack q, k, v otherwise."""
    if module.scheme.layout == "separate" and len(module.names) == 4 and isinstance(module.names[0], str):
        q, k, v, o = (tuple(shapes[name]) for name in module.names)
        if gate_beside_query(q, k, v, o):
            raise UserError(f"{module.names[0]} {q} has twice the rows that {module.names[-1]} {o} takes: "
                            "queries and a gate, in an order that names do not tell; where each head's query "
                            "is followed by its gate, give --pattern and --layout=gated")
    beside = {name.removeprefix(f"{module.path}.") for name in shapes if name.startswith(f"{module.path}.")}
    if any(re.match(r"(self\.)?lambda_[qk]\d?", name) for name in beside):
        raise UserError(f"{module.path}: differential attention, whose heads share values two by two: "
                        "there is no P W_V of a single head")
    if "exclusive_self_attention.alpha" in beside:
        raise UserError(f"{module.path}: exclusive attention (NeoMME), which takes each token's own value "
                        "out of the heads' output: there is no P W_V; --pattern reads the projections alone")
    if re.search(r"channel_(attn|block)", module.path) or "temperature" in beside:
        raise UserError(f"{module.path}: attention between channels (DaViT, Florence-2, XCiT), not between "
                        "tokens: it has no W_K^T W_Q of heads; --pattern chooses other layers")
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
        is_attention = re.search(r"attn|attention", name, re.I) or name.startswith(paths)
        is_other = name in known or re.search(NO_PROJECTION, name, re.I)
        if is_weight and is_attention and not is_other:
            others.append(name)

    remarks = list(dict.fromkeys(module.note for module in modules if module.note))
    if len(remarks) > 1:
        remarks = [f"{remarks[0]}; so for {len(remarks) - 1} other modules"]
    if any(module.scheme.layout == "mla" for module in modules):
        remarks.append("latent attention: QK is W_UK^T W_UQ of each head, between the latents of keys and "
                       "queries; the rotary part of the heads is left out")
    if others:
        remarks.append(f"left out: {len(others)} tensors that look like attention, "
                       f"such as {others[0]} {tuple(shapes[others[0]])}")
    for stack in dict.fromkeys(module.stack for module in modules):
        own = [module for module in modules if module.stack == stack]
        layers = {module.layer for module in own}
        last = max(layers | blocks_of(own[0], shapes))
        missing = (layer for layer in range(last + 1) if layer not in layers)
        missing = list(itertools.islice(missing, 13))  # a name may tell layer 10**12
        if missing:
            listed = ", ".join(map(str, missing[:12]))
            dots = " ..." if len(missing) > 12 else ""
            remarks.append(f"{stack} layers {listed}{dots}: no attention known".strip())
    return remarks


def blocks_of(module, shapes):
    """The numbers of the blocks beside a module's own, whether or not they hold attention."""
    if not module.block or len(module.numbers) != 1:
        return set()
    start = re.compile(re.escape(module.block) + r"(\d{1,6})\.")
    matches = map(start.match, shapes)
    return {int(match[1]) for match in matches if match}
