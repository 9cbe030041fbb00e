"""
Every architecture that transformers can build small, against its own attention.

    python tests/trials/architectures.py OUT.jsonl                # all, some minutes on one core
    python tests/trials/architectures.py OUT.jsonl bert minimax   # some
    python tests/trials/architectures.py --csv=results/trust/architectures.csv ALL.jsonl SOME.jsonl

A random small model of each kind is saved to disk and read by nanorank.checkpoints. Each attention module
that was read is then run, by the whole model or by itself. The scores of every head, taken from the model's
softmax, must be those of W_K^T W_Q, and the output those of P W_V with each head weighted by itself. Writes a
line for each architecture: equal, refused (and why), WRONG, unverified (read, but its attention did not run)
or not built. Architectures that OUT.jsonl has already are left out. --csv makes the table of such files;
where two have the same architecture, the later counts.
"""
import contextlib
import csv
import inspect
import json
import os
import re
import signal
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from nanorank.checkpoints import Checkpoint
from nanorank.errors import UserError
from nanorank.families import find_attention, left_out

MOST_PARAMETERS = 130_000_000
BATCH = 12

# what makes a configuration small: patterns of names of whole numbers, the first that fits
SIZES = [
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|num_global_key_value_heads", 2),
    (r"(encoder|decoder|vision|num|n|text|mask)?_?(num_)?(attention_)?(attn_)?heads?", 4),
    (r"(num_)?linear_(num_)?(key|value)_heads|linear_num_(key|value)_heads", 4),
    (r"num_hidden_layers|n_layers?|num_layers|depth|(num_)?(encoder|decoder)_(num_)?(hidden_)?layers"
     r"|num_blocks|num_hidden_groups|encoder_num_layers|decoder_num_layers", 2),
    (r"hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|hidden_dim|width|(encoder|decoder)_hidden_size"
     r"|word_embed_proj_dim|d_embed|entity_emb_size|lstm_hidden_size", 48),
    (r"(.*intermediate_size|.*ffn_dim|ffn_hidden_size|d_ff|dff|d_inner|n_inner|mlp_dim)", 64),
    (r"(.*vocab_size.*|vocab_size)", 99),
    (r"image_size|img_size", 32),
    (r"patch_size", 8),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_moe_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_selected_experts", 2),
    (r"n_group|topk_group|n_groups", 1),
    (r"max_position_embeddings|max_(source|target)_positions|n_positions|n_ctx", 64),
    (r"q_lora_rank|kv_lora_rank", 24),
    (r"qk_rope_head_dim", 8),
    (r"pad_token_id|eos_token_id|bos_token_id|decoder_start_token_id|.*_token_id|.*_token_index", 1),
]
VARIANTS = [{"head_dim": 16}, {"head_dim": 12}, {"head_dim": 12, "head_size": 12, "d_kv": 12}, {},
            {"only": "layer|depth|blocks|vocab|intermediate|ffn|group"}]


def shrunk(config, variant):
    """Arguments that make a configuration small, with those of the configurations inside it."""
    changes = {}
    for key, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            changes[key] = {"model_type": value.model_type, **shrunk(value, variant)}
            continue
        if key == "prediction_length":
            changes[key] = 8
        if not re.search(variant.get("only", ""), key):
            continue
        if type(value) is not int and not (value is None and key in variant):
            continue
        if key in variant:
            changes[key] = variant[key]
            continue
        for pattern, size in SIZES:
            if re.fullmatch(pattern, key) and not (size == 1 and value is None):
                changes[key] = min(size, value) if size > 4 else size
                if key == "num_hidden_layers" and hasattr(config, "layer_types"):
                    changes[key] = 4   # every fourth may be of another kind
                break
    return changes


def build(kind):
    """A small random model of a kind. Raises RuntimeError saying why there is none."""
    config_class = CONFIG_MAPPING[kind]
    reasons = []
    for variant in VARIANTS:
        try:
            config = config_class(**shrunk(config_class(), variant))
            for inner in [config, *vars(config).values()]:
                if isinstance(inner, transformers.PreTrainedConfig):
                    inner._attn_implementation = "eager"
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
            if size > MOST_PARAMETERS:
                reasons.append(f"{size:,} parameters")
                continue
            torch.manual_seed(0)
            return AutoModel.from_config(config, attn_implementation="eager").eval().float()
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001 of any kind, in hundreds of foreign constructors
            reasons.append(f"{type(error).__name__}: {str(error).strip()[:150]}")
    raise RuntimeError(reasons[0])


def make_plain(model):
    """Scores become the products alone: no biases, no norms inside attention, nothing added by distance."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            added = re.search(r"(^|\.|_)rel(ative)?_|rel_emb|\.sinks$|alibi|gate_logits|linear_pos|pos_bias"
                              r"|distance_embedding|layout_|continuous_position_bias|value_embeddings"
                              r"|attention\.self\.conv|dt_proj\.|self_attn\.A$", name)
            if name.endswith("bias") or added:
                p.zero_()
            elif re.search("embed_positions|position_embeddings", name) and p.ndim == 2:
                continue
            elif p.ndim >= 2 and p.numel() and not re.search("emb", name):
                p.copy_(torch.randn_like(p) * (0.7 / p[0].numel() ** 0.5))
            elif p.ndim >= 2:
                p.copy_(torch.randn_like(p))
        for name, p in model.named_parameters():  # the rotary part of latent attention
            if re.search("kv_a_proj_with_mqa.weight", name):
                latent = dict(model.named_parameters())[name.replace("kv_a_proj_with_mqa", "kv_b_proj")]
                p[latent.shape[1]:] = 0
    inside = re.compile(r"attn|attention", re.I)
    for name, module in list(model.named_modules()):
        for child, part in list(module.named_children()):
            is_norm = type(part).__name__.endswith("Norm") and re.search("norm|ln|layernorm", child)
            of_heads = re.match(r"(q|k|v|kv|qk|o|query|key|value|inner_attn|attn_sub|sub)_?", child)
            if is_norm and of_heads and not re.match(r"(post|pre|input)", child) and (
                    inside.search(name) or hasattr(module, "q_proj")):
                setattr(module, child, nn.Identity())
        if hasattr(module, "build_alibi_tensor"):
            own = module.build_alibi_tensor
            module.build_alibi_tensor = lambda *args, own=own, **kwargs: 0 * own(*args, **kwargs)


class Probe:
    """Watches the softmax between a module's q and its output, and weighs each head at random."""

    def __init__(self, model, modules):
        self.current = None
        self.seen = {}  # {index of a module: what was seen}
        parts = dict(model.named_modules())
        for index, module in enumerate(modules):
            names = [name if isinstance(name, str) else None for name in module.names]
            roles = {2: "qo", 3: "qko", 4: "qkvo"}[len(names)]
            for role, name in zip(roles, names):
                part = parts.get(str(name).removesuffix(".weight"))
                if part is not None:
                    part.register_forward_hook(self.hook(index, role))

    def hook(self, index, role):
        def note(part, args, out):
            if "o" in self.seen.get(index, {}):
                self.current = None
            elif role == "q":
                self.current = index
                self.seen.setdefault(index, {})["q"] = args[0].detach()
            elif role != "o":
                self.seen.setdefault(index, {}).setdefault(role, []).append(args[0].detach())
            elif index in self.seen and "weights" in self.seen[index]:
                self.seen[index]["o_in"] = args[0].detach()
                self.seen[index]["o"] = out.detach()
                self.current = None
        return note

    def softmax(self, own):
        def call(scores, *args, **kwargs):
            weights = own(scores, *args, **kwargs)
            seen = self.seen.get(self.current)
            if seen is None or scores.ndim < 3 or "weights" in seen:
                return weights
            factors = torch.rand(weights.shape[:2]).reshape(*weights.shape[:2], *[1] * (weights.ndim - 2))
            if weights.ndim == 3:
                factors = torch.rand(weights.shape[0], 1, 1)
            seen["scores"] = scores.detach()
            seen["weights"] = (weights * factors).detach()
            return (weights * factors).to(weights.dtype)
        return call

    def forget(self):
        """Forgets what was half seen."""
        self.current = None
        for index in [index for index, seen in self.seen.items() if "o" not in seen]:
            del self.seen[index]

    @contextlib.contextmanager
    def watching(self):
        owners = [(torch, "softmax"), (nn.functional, "softmax"), (torch.Tensor, "softmax")]
        saved = [getattr(owner, name) for owner, name in owners]
        try:
            for (owner, name), own in zip(owners, saved):
                setattr(owner, name, self.softmax(own))
            yield
        finally:
            for (owner, name), own in zip(owners, saved):
                setattr(owner, name, own)


def run_whole(model, probe):
    """Runs the model on what it takes: text of one token, pictures, sound."""
    config = model.config
    names = inspect.signature(model.forward).parameters
    ids = torch.randint(3, 90, (BATCH, 1))
    inputs = {}
    if "input_ids" in names:
        inputs["input_ids"] = ids
    if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.flip(0)
    if "pixel_values" in names:
        size = getattr(config, "image_size", None) or getattr(
            getattr(config, "vision_config", None), "image_size", 32)
        size = size if isinstance(size, int) else 32
        channels = getattr(config, "num_channels", 3)
        inputs["pixel_values"] = torch.randn(BATCH, channels if isinstance(channels, int) else 3, size, size)
    if "input_values" in names:
        inputs["input_values"] = torch.randn(BATCH, 2000)
    if "input_features" in names:
        bins = getattr(config, "num_mel_bins", 80)
        inputs["input_features"] = torch.randn(BATCH, bins, 2 * getattr(config, "max_source_positions", 32))
    attempts = [inputs, {k: v for k, v in inputs.items() if "ids" in k}]
    for attempt in attempts:
        with contextlib.suppress(Exception):
            model(**attempt)
        probe.forget()


def run_alone(model, module, heads, probe, index):
    """Runs one attention module by itself: the nearest parent of q that can be called."""
    q = module.names[0] if isinstance(module.names[0], str) else module.names[0][0]
    path = q.removesuffix(".weight")
    parts = dict(model.named_modules())
    weight = parts[path].weight if path in parts else None
    if weight is None:
        return
    fan_in = heads.W_Q.shape[-1]
    other = heads.W_K.shape[-1]
    for _ in range(4):
        path = path.rpartition(".")[0]
        parent = parts.get(path)
        if parent is None or isinstance(parent, nn.ModuleList):
            continue
        for shape in ((BATCH, 1, fan_in), (BATCH, fan_in), (BATCH, 2, 2, fan_in)):
            x = torch.randn(shape)
            arguments = {}
            positional = []
            for name, parameter in inspect.signature(parent.forward).parameters.items():
                value = filled(name, x, other, heads)
                if value is not None:
                    arguments[name] = value
                elif parameter.default is parameter.empty and parameter.kind in (0, 1):
                    arguments[name] = None
            if not any(value is x for value in arguments.values()):
                continue
            probe.seen.pop(index, None)
            with contextlib.suppress(Exception):
                parent(*positional, **arguments)
            if "o" in probe.seen.get(index, {}):
                return


def filled(name, x, other, heads):
    """A value for a parameter of a forward: the input, no rotation, no distances; None for the rest."""
    r = heads.W_Q.shape[1]
    T = x.shape[1] if x.ndim == 3 else x.shape[0]
    if name in ("hidden_states", "x", "input", "hidden_state", "query", "queries", "query_states", "inputs"):
        return x
    if name in ("key_value_states", "encoder_hidden_states", "key", "value", "kv_states", "current_states"):
        return torch.randn(*x.shape[:-1], other) if x.shape[-1] != other else None
    if name in ("position_embeddings", "rotary_pos_emb"):
        lead = (x.shape[0], T) if x.ndim == 3 else (T,)
        return torch.ones(*lead, r), torch.zeros(*lead, r)
    if name == "cu_seqlens":
        return torch.tensor([0, T], dtype=torch.int32)
    if name == "max_seqlen":
        return T
    if name == "position_ids":
        return torch.zeros(x.shape[0], T, dtype=torch.long)
    return True if name == "output_attentions" else None


def joined(inputs, keys, default):
    """The inputs of a Linear that was called once, or once for each part of the keys."""
    if not inputs:
        return default
    if len(inputs) > 1 and sum(x.shape[1] for x in inputs) == keys:
        return torch.cat(inputs, 1)
    return inputs[0]


def misfit(got, want, dims):
    """The largest relative difference of want from scale * got + a constant, which the softmax drops."""
    got = got - got.mean(dims, keepdim=True)
    want = want - want.mean(dims, keepdim=True)
    scale = (got * want).sum(dims) / (got * got).sum(dims)
    return float((scale * got - want).abs().max() / want.abs().max())


def differs(heads, seen):
    """What is unlike between a layer's heads and what was seen of it, else an empty string."""
    H = len(heads.W_Q)
    x = seen["q"]
    y = joined(seen.get("k"), seen["scores"].shape[-1], x)
    z = joined(seen.get("v"), seen["scores"].shape[-1], y)
    scores = seen["scores"]
    weights = seen["weights"]
    if x.ndim == 2:            # packed sequences without a batch
        x, y, z = x[None], y[None], z[None]
    x, y, z = x.flatten(1, -2), y.flatten(1, -2), z.flatten(1, -2)
    if scores.ndim == 3:
        scores, weights = scores.unflatten(0, (-1, H)), weights.unflatten(0, (-1, H))
    if scores.ndim == 5:       # grouped: (B, n, H / n, T, S)
        scores, weights = scores.flatten(1, 2), weights.flatten(1, 2)
    if scores.ndim != 4:
        return f"scores of shape {tuple(scores.shape)}", False
    if scores.shape[1] != H == scores.shape[2] or scores.shape[-1] > y.shape[1] + 1:
        return f"attention in windows or to more than the input's tokens: {tuple(scores.shape)}", False
    if scores.shape[1] != H:
        return f"{H} heads read, scores of shape {tuple(scores.shape)}", True
    if len(scores) != len(x):  # windows, or tokens in front of the batch
        if len(x) == scores.shape[2] and x.shape[1] == len(scores):
            x, y, z = x.transpose(0, 1), y.transpose(0, 1), z.transpose(0, 1)
        else:
            return f"scores of shape {tuple(scores.shape)} for inputs {tuple(seen['q'].shape)}", False
    q = torch.einsum("bd,hrd->bhr", x[:, 0], heads.W_Q)
    k = torch.einsum("be,hre->bhr", y[:, 0], heads.W_K)
    want = scores[:, :, 0, 0]
    if scores.shape[-1] == z.shape[1] + 1:  # a sink
        want = want - scores[:, :, 0, -1]
        weights = weights[..., :-1]
    if not want.isfinite().all() or want.std() < 1e-20:
        return "scores that are all alike, zero or not finite", False
    error = misfit((q * k).sum(-1), want, dims=(0, 1))
    if not error < 1e-3:       # norms of each query and key, a scale for each head
        error = misfit(nn.functional.cosine_similarity(q, k, dim=-1), want, dims=0)
    if not error < 1e-3:
        return f"QK differs by {error:.1e}", True
    A = weights[:, :, 0]       # (B, H, S)
    z = z[:, :A.shape[-1]]
    if z.shape[1] != A.shape[-1]:
        return f"weights of shape {tuple(weights.shape)} for values {tuple(z.shape)}", False
    got = torch.einsum("bhs,bse,hre->bhr", A, z, heads.W_V)
    o_in = seen["o_in"].flatten(1, -2) if seen["o_in"].ndim > 2 else seen["o_in"][None]
    o = seen["o"].flatten(1, -2) if seen["o"].ndim > 2 else seen["o"][None]
    if len(o) != len(x):
        o_in, o = o_in.transpose(0, 1), o.transpose(0, 1)
    mixed, out = o_in[:, 0], o[:, 0]
    written = torch.einsum("bhr,hdr->bd", got, heads.P)
    error = float((written - out).abs().max() / out.abs().max())
    gated = ""
    if not error < 1e-3:       # a gate of each value in front of the output: a positive factor
        ratio = mixed / got.flatten(1)
        is_gate = bool((ratio > 0).all())
        written = torch.einsum("bhr,hdr->bd", mixed.view_as(got), heads.P)
        error_P = float((written - out).abs().max() / out.abs().max())
        if not is_gate or not error_P < 1e-3:
            return f"OV differs by {error:.1e}", True
        gated = "gated"
    return gated, False


def examine(kind):
    """The line of one architecture."""
    try:
        model = build(kind)
    except RuntimeError as error:
        return {"verdict": "not built", "why": str(error)}
    make_plain(model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except Exception as error:  # noqa: BLE001
            return {"verdict": "not built", "why": f"not saved: {error}"[:200]}
        try:
            ckpt = Checkpoint(folder)
            modules = ckpt.modules()
            layers = [ckpt.attention_layer(module) for module in modules]
            remarks = left_out(modules, ckpt.shapes)
        except UserError as error:
            why = str(error).replace(folder, "")
            return {"verdict": "refused", "why": why[:250]}

    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    try:
        inside = find_attention(shapes, config=model.config.to_dict())
        if len(inside) != len(modules):
            raise UserError(f"{len(inside)} modules in the model, {len(modules)} in the file")
    except UserError as error:
        return {"verdict": "unverified", "why": f"saved under other names: {error}"[:250]}
    probe = Probe(model, inside)
    with torch.no_grad(), probe.watching():
        run_whole(model, probe)
        for index, (module, heads) in enumerate(zip(inside, layers)):
            seen = probe.seen.get(index, {})
            faded = "o" in seen and seen["q"].abs().max() < 1e-9  # small weights, layer after layer
            if "o" not in seen or faded:
                probe.current = None
                run_alone(model, module, heads, probe, index)

    equal, gated, wrong, unverified = 0, 0, [], []
    for index, (module, heads) in enumerate(zip(inside, layers)):
        seen = probe.seen.get(index, {})
        if "o" not in seen:
            unverified.append(f"{module.path}: not run ({', '.join(seen) or 'nothing'} seen)")
            continue
        said, is_wrong = differs(heads, seen)
        if is_wrong and len(seen.get("k", [])) == 2:  # the model joins its two parts of keys the other way
            said, is_wrong = differs(heads, {**seen, "k": seen["k"][::-1], "v": seen["v"][::-1]})
        if is_wrong:
            wrong.append(f"{module.path}: {said}")
        elif said and said != "gated":
            unverified.append(f"{module.path}: {said}")
        else:
            equal += 1
            gated += said == "gated"
    verdict = "WRONG" if wrong else "unverified" if unverified else "equal"
    return {"verdict": verdict, "equal": equal, "gated": gated, "wrong": wrong[:6],
            "unverified": unverified[:6], "remarks": remarks[:3]}


# what a model adds to the products that were compared (the trial sets it to zero), or why none were
COSINE = "cosine attention: queries and keys are normalised; a bias by position is added to the scores"
PADDED = "the first token of a shifted window is padding"
NOTES = {
    "doge": "a mask made of the values is added to the scores",
    "longformer": "its scores lie in windows around each token",
    "longt5": "its encoder's scores lie in blocks of tokens",
    "grounding-dino": PADDED,
    "maskformer-swin": PADDED,
    "mimo_v2_flash": "the largest score is subtracted, which leaves zero for one token",
    "mm-grounding-dino": PADDED,
    "nystromformer": "a convolution of the values is added to the heads' output",
    "swin2sr": COSINE,
    "swinv2": COSINE,
}


def reason(line):
    """A few words on the outcome of an architecture."""
    verdict = line["verdict"]
    if "why" in line:
        parts = [" ".join(line["why"].removeprefix(": ").split())]
    elif verdict == "equal":
        parts = [f"{line['equal']} modules"]
    else:
        modules = line["wrong"] if verdict == "WRONG" else line["unverified"]
        parts = [modules[0], f"{line['equal']} other modules equal"]
    if line["kind"] in NOTES:
        parts.append(NOTES[line["kind"]])
    return "; ".join(parts)


def last_lines(sources):
    """{kind: line} of a trial's files; of a kind that is in several, the last."""
    lines = {}
    for source in sources:
        with open(source) as file:
            for text in file:
                line = json.loads(text)
                lines[line["kind"]] = line
    return lines


def write_csv(path, sources):
    """The table of architectures: kind, outcome (WRONG is "differs"), reason."""
    lines = last_lines(sources)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kind", "outcome", "reason"])
        for kind in sorted(lines):
            outcome = lines[kind]["verdict"].replace("WRONG", "differs")
            writer.writerow([kind, outcome, reason(lines[kind])])


def timeout(signum, frame):
    raise TimeoutError


def try_each(out, kinds, examine, said):
    """Writes a line for each kind to a file, a minute each at most. A kind that is there already is left out.

    examine(kind) -> dict with a verdict; said(line): what is printed of it.
    """
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    done = set()
    if os.path.exists(out):
        with open(out) as file:
            done = {json.loads(line)["kind"] for line in file}
    signal.signal(signal.SIGALRM, timeout)
    for kind in kinds or sorted(MODEL_MAPPING_NAMES):
        if kind in done:
            continue
        signal.alarm(60)
        try:
            line = examine(kind)
        except TimeoutError:
            line = {"verdict": "not built", "why": "took over a minute"}
        except Exception as error:  # noqa: BLE001
            line = {"verdict": "failed", "why": f"{type(error).__name__}: {error}"[:250]}
        signal.alarm(0)
        with open(out, "a") as file:
            file.write(json.dumps({"kind": kind, **line}) + "\n")
        print(kind, line["verdict"], said(line), flush=True)


def main(out, kinds):
    try_each(out, kinds, examine, lambda line: line.get("why") or line.get("wrong") or line.get("unverified"))


if __name__ == "__main__":
    if sys.argv[1].startswith("--csv="):
        write_csv(sys.argv[1].removeprefix("--csv="), sys.argv[2:])
    else:
        main(sys.argv[1], sys.argv[2:])
