"""
Attention that families.py must not read, refused by a line that says why, and remarks on what it leaves.

    refuse_adapters(modules, shapes)    # raises UserError; a list of families.Module, {name: shape}
    left_out(modules, shapes)           # ["left out: 2 tensors that look like attention, such as ..."]
"""
import difflib
import itertools
import re

from nanorank.errors import UserError
from nanorank.heads import NUMBER, kind_of
from nanorank.schemes import gate_beside_query, told

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

# ------------------------------------------------------------ messages and remarks

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
        if not module.is_block:
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
