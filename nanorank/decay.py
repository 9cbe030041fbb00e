"""
Weight decay by role for anyone's model: attention, MLPs and embeddings apart.

    groups = decay_groups(model, attn_wd=0.0, mlp_wd=0.1, embed_wd=0.1)
    optimizer = torch.optim.AdamW(groups, lr=3e-4)

Decay is in the units of torch's AdamW: a step multiplies a weight by 1 - lr * weight_decay.
"""
import math
import re

from nanorank.errors import UserError
from nanorank.families import find_attention
from nanorank.groups import ATTENTION, NORM, attention_starts, places
from nanorank.live import clean_name, model_config, whole_shapes, without_dashes

LORA = r"(^|\.)lora_\w+(\.|$)"                # as peft names its adapters: q_proj.lora_A.default.weight
BIAS = r"(^|[._])bias(es)?([._]|$)|\.b_\w+$"  # T5's relative_attention_bias; TransformerLens's b_Q


def decay_groups(model, attn_wd, mlp_wd, embed_wd, pattern="", layout="separate", lora_wd=0.0):
    """The parameters that are trained, as param_groups for torch.optim: attn, mlp, embed, lora and none.

    [{"name", "params", "weight_decay", "n_tensors", "n_params"}], without groups that are empty. attn:
    matrices in attention modules; mlp: matrices elsewhere in a block; embed: in no block (embeddings, patch
    projections, learned positions, heads, poolers); lora: adapters. Norms, biases, scalars and vectors, a
    class token (1, 1, d) among them, are in none and never decayed. Tied weights count once.

    model: any torch.nn.Module whose attention schemes.SCHEMES names; it may be wrapped (nanorank/live.py).
    Under FSDP all processes must call this together. Parameters that need no gradient are left out.
    pattern, layout: attention under other names, as the ends of the names of q,k,v,o (or qkv,o or q,kv,o);
    with {head} in a name, one Linear per head. Known names are still found.
    Raises UserError where there is no attention, and for a parameter that is in no group or in two.
    """
    shapes = whole_shapes(model)
    without_adapters = {name: shape for name, shape in shapes.items() if not re.search(LORA, name)}
    modules = find_modules(without_adapters, pattern, layout, model_config(model))
    place = places(shapes, modules)

    groups = {"attn": [], "mlp": [], "embed": [], "lora": [], "none": []}
    sizes = dict.fromkeys(groups, 0)
    seen = {}  # {id of a parameter: its first name and group}
    for full_name, p in model.named_parameters(remove_duplicate=False):
        if not p.requires_grad:
            continue
        name = clean_name(full_name)
        group = group_of(name, shapes[name], *place[name], modules)
        if id(p) not in seen:
            seen[id(p)] = name, group
            groups[group].append(p)
            sizes[group] += math.prod(shapes[name])
        first, before = seen[id(p)]
        if group != before:
            raise UserError(f"{name} ({group}) and {first} ({before}) are one tied parameter: "
                            "which decay it gets is not clear")

    wd = {"attn": attn_wd, "mlp": mlp_wd, "embed": embed_wd, "lora": lora_wd, "none": 0.0}
    found = []
    for group, params in groups.items():
        if params:
            found.append({"name": group, "params": params, "weight_decay": wd[group],
                          "n_tensors": len(params), "n_params": sizes[group]})
    return found


def find_modules(shapes, pattern, layout, config):
    """The attention modules that SCHEMES or the pattern knows. Raises UserError where there are none."""
    with without_dashes():
        if not pattern:
            return find_attention(shapes, config=config)
        modules = find_attention(shapes, pattern, layout, config)
    try:
        return modules + find_attention(shapes, config=config)
    except UserError:  # none beside the pattern's
        return modules


def group_of(name, shape, kind, layer, modules):
    """The group of one parameter, from its place. Raises UserError where its name alone says attention."""
    if re.search(LORA, name):
        return "lora"
    owner, _, last = name.rpartition(".")
    is_matrix = len(shape) > 1
    if last != "weight":  # a class token (1, 1, d)
        is_matrix = sum(n > 1 for n in shape) > 1
    is_norm = re.search(NORM, owner.rpartition(".")[2], re.I)
    if not is_matrix or is_norm or re.search(BIAS, name):
        return "none"

    if kind == "attn" and not name.startswith(attention_starts(modules)):
        if not in_container(name, modules):
            raise UserError(f"{name} {tuple(shape)} looks like attention under names that are not known: "
                            "give pattern=, the ends of the names of its q,k,v,o or qkv,o")
        return "embed" if layer is None else "mlp"
    return kind


def in_container(name, modules):
    """Whether the part of a name that says attention only contains a known attention module.

    attn_block.mlp.fc1.weight beside attn_block.attn
    """
    parts = name.split(".")[:-1]
    for i, part in enumerate(parts):
        start = ".".join(parts[:i + 1]) + "."
        if re.search(ATTENTION, part, re.I) and not any(x.path.startswith(start) for x in modules):
            return False
    return True
