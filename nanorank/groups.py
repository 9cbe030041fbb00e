"""
Which parameters are attention, MLP or embedding, by where they lie in the model.

    place = places(names, modules)    # modules: families.find_attention
    place["transformer.h.3.mlp.c_fc.weight"]    # ("mlp", "layer_3")

norms.csv and decay_groups both group by this.
"""
import re

NORM = r"norm|(^|[._])ln([._\d]|$)"  # names of normalisation layers
ATTENTION = r"attn|attention|EncDec"
MLP = r"\.(mlp|ffn?|fc\d*|feed_?forward|linear\d)\."  # of MLPs that lie inside an attention module


def places(names, modules):
    """{name: (kind, layer)}.

        transformer.h.3.attn.c_attn.weight    attn, layer_3
        transformer.h.3.mlp.c_fc.weight       mlp, layer_3
        transformer.wte.weight                embed, None

    attn: in an attention module, but for an MLP that it contains; mlp: elsewhere in a block; embed: in no
    block. Layers of several stacks are told apart: encoder_layer_3, decoder_layer_3.
    """
    attention = attention_starts(modules)
    blocks, side_lists = block_starts(modules)
    own_modules = not any(module.is_block for module in modules)

    found = {}
    for name in names:
        layer, longest = None, 0
        for start, prefix in {**blocks, **side_lists}.items():
            match = re.match(start, name)
            # net.0.weight in a torch.nn.Sequential: an embedding or a head among the blocks
            is_leaf = match and start not in side_lists and name[len(match[0]):] in ("weight", "bias")
            if match and not is_leaf and len(match[0]) >= longest:
                layer, longest = f"{prefix}layer_{match[1]}", len(match[0])

        kind = "embed" if layer is None else "mlp"
        own = [start for start in attention if name.startswith(start)]
        if own and re.search(MLP, name[len(own[0]) - 1:]):
            kind = "mlp"
        elif own or (own_modules and re.search(ATTENTION, name, re.I)):
            kind = "attn"
        found[name] = kind, layer
    return found


def attention_starts(modules):
    """The beginnings of the names of attention's parameters, as a tuple."""
    starts = []
    for module in modules:
        if module.is_block or not module.path:  # the MLP lies beside it
            starts += [name.removesuffix("weight") for name in module.tensor_names]
        else:
            starts.append(f"{module.path}.")
    return tuple(starts)


def block_starts(modules):
    """Two dicts {beginning of the names in a layer, a regular expression: prefix of the layer's name}.

    The first is of blocks. The second is of lists side by side: attentions.3, ffns.3, layer_norm1.3.
    """
    blocks = {}
    side_lists = {}
    for module in modules:
        prefix = f"{module.stack}_" if module.stack not in ("", "cross") else ""
        if module.block:
            blocks.setdefault(re.escape(module.block) + r"(\d+)\.", prefix)
        elif module.path[:1].isdigit():  # a torch.nn.Sequential
            number = module.path.partition(".")[0]
            blocks.setdefault(rf"({number})\.", prefix)
        if module.is_block and "." in module.path:
            parent = module.block.rstrip(".").rpartition(".")[0]
            side_lists[re.escape(parent) + r"\.?\w+\.(\d+)\."] = prefix
    return blocks, side_lists
