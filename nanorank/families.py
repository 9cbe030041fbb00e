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
import re
from typing import NamedTuple

from nanorank.errors import UserError
from nanorank.heads import NUMBER, AttentionLayer, heads_of, join, kind_of, split_heads
from nanorank.layouts import LAYOUTS
from nanorank.positions import with_positions
from nanorank.schemes import SCHEMES, Scheme
from nanorank.unreadable import (
    NO_PROJECTION,
    left_out,
    nothing_found,
    refuse_adapters,
    refuse_incomplete,
    refuse_odd_shapes,
    refuse_unknown_order,
    without_convolutions,
    without_foreign_keys,
)

__all__ = ["LAYOUTS", "SCHEMES", "AttentionLayer", "Module", "attention_layers", "find_attention", "heads_of",
           "left_out", "split_heads"]

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

    @property
    def is_block(self):
        """Whether its tensors lie in the block itself, beside the MLP's, not in a module of their own."""
        return re.fullmatch(re.escape(self.block) + r"\d+", self.path) is not None


def flat(names):
    found = []
    for entry in names:
        if isinstance(entry, list):
            found.extend(entry)
        else:
            found.append(entry)
    return found


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
