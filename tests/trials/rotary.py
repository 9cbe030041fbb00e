"""
Which rows of a head turn together: every architecture that transformers can build small, by itself.

    python tests/trials/rotary.py OUT.jsonl                # all, some minutes on one core
    python tests/trials/rotary.py OUT.jsonl llama gptj     # some
    python tests/trials/rotary.py OUT.jsonl table          # those that nanorank.positions names
    python tests/trials/rotary.py --csv=results/trust/rotary.csv OUT.jsonl

A random small model reads six tokens. In one attention module at a time, the two rows of W_Q of each rotary
plane are multiplied by a complex number, those of W_K by the inverse of its conjugate, and the rows that do
not turn by an invertible matrix and its inverse transpose. The output stays as it was only where the rows
are paired as the model pairs them. Writes a line for each architecture: the pairings under which each module
stays (none, half, interleaved), and what nanorank.positions says of it. The share of rows that turn is that
of nanorank.positions. --csv makes the table of such files: of each kind that ran, the pairings of its modules
in order, what nanorank says, the largest change under that pairing and the least under others.
"""
import contextlib
import csv
import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from trials import architectures

from nanorank import positions
from nanorank.errors import UserError
from nanorank.families import find_attention, heads_of, split_heads
from nanorank.heads import Rope

# four heads of width 16, of which a quarter is an even number of rows
WIDTHS = "hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|hidden_dim|width"
architectures.SIZES[:0] = [(WIDTHS, 64), ("rotary_dim", 4)]

# positions in time, height and width, of so many planes each that heads must be 128 wide
WIDE = 512
VARIANTS = list(architectures.VARIANTS)
THREE_AXES = ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text", "glm4v_moe_text",
              "qwen2_5_omni_text")


def indices(module, shapes, n_head):
    """(W_Q, W_K) (H, r, d) whose entries are their places in the module's tensors laid end to end."""
    places, start = {}, 0
    for name in module.tensor_names:
        size = torch.Size(shapes[name]).numel()
        places[name] = torch.arange(start, start + size, dtype=torch.float64).view(shapes[name])
        start += size
    layer = split_heads(module, places, n_head)
    return layer.W_Q.long(), layer.W_K.long(), layer.n_kv_head


def turned(Q, K, group, rope, generator):
    """W_Q, W_K (H, r, d) changed in a way that leaves the scores as they are, if `rope` is right.

    rope None: nothing turns. group: query heads that share a key.
    """
    H, r, _ = Q.shape
    M = torch.zeros(H // group, r, r, dtype=Q.dtype)
    dim = rope.dim if rope else 0
    for n in range(H // group):
        j = torch.arange(dim // 2)
        first, second = (2 * j, 2 * j + 1) if rope and rope.interleaved else (j, j + dim // 2)
        x, y = 1 + 0.5 * torch.randn(2, dim // 2, generator=generator, dtype=Q.dtype)
        M[n, first, first] = x
        M[n, second, second] = x
        M[n, first, second] = -y
        M[n, second, first] = y
        rest = r - dim
        noise = torch.randn(rest, rest, generator=generator, dtype=Q.dtype)
        M[n, dim:, dim:] = torch.eye(rest, dtype=Q.dtype) + 0.3 * noise / max(1, rest) ** 0.5
    M = M.repeat_interleave(group, 0)
    return M @ Q, torch.linalg.inv(M).mT @ K


def run(model):
    """The model's output for six tokens, or for pictures or sound."""
    names = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, 6), generator=generator)
    inputs = {}
    if "input_ids" in names:
        inputs["input_ids"] = ids
    if "decoder_input_ids" in names and getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.flip(1)
    if not inputs and "pixel_values" in names:
        size = getattr(model.config, "image_size", 32)
        inputs["pixel_values"] = torch.randn(2, 3, size, size, generator=generator).double()
    with torch.no_grad():
        out = model(**inputs)
    return out[0].double()


def stays(model, module, parameters, shapes, n_head, rope):
    """The relative change of the output when a module's heads are changed as under `rope`."""
    Q_at, K_at, n_kv = indices(module, shapes, n_head)
    tensors = [parameters[name] for name in module.tensor_names]
    before = [p.detach().clone() for p in tensors]
    flat = torch.cat([p.detach().flatten() for p in tensors])
    generator = torch.Generator().manual_seed(0)
    Q, K = turned(flat[Q_at], flat[K_at], n_head // n_kv, rope, generator)
    want = run(model)
    flat[Q_at] = Q
    flat[K_at] = K
    with torch.no_grad():
        for p, part in zip(tensors, flat.split([p.numel() for p in tensors])):
            p.copy_(part.view_as(p))
        got = run(model)
        for p, old in zip(tensors, before):
            p.copy_(old)
    return float((got - want).abs().max() / want.abs().max())


def examine(kind):
    """The line of one architecture."""
    try:
        wide = kind in THREE_AXES
        architectures.SIZES[0] = WIDTHS, WIDE if wide else 64
        architectures.VARIANTS[:] = [{"head_dim": 128}] if wide else VARIANTS
        model = architectures.build(kind)
    except RuntimeError as error:
        return {"verdict": "not built", "why": str(error)}
    architectures.make_plain(model)
    has_experts = any("experts" in name for name, _ in model.named_parameters())
    if not has_experts:  # they multiply in single precision alone
        model.double()
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    configs = {"config.json": model.config.to_dict()}
    try:
        modules = find_attention(shapes, config=configs["config.json"])
    except UserError as error:
        return {"verdict": "refused", "why": str(error)[:200]}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    try:
        run(model)
    except Exception as error:  # noqa: BLE001 of any kind
        return {"verdict": "did not run", "why": f"{type(error).__name__}: {error}"[:200]}
    found = {}
    for module in modules:
        n_head, _ = heads_of(module, shapes, configs)
        r = indices(module, shapes, n_head)[0].shape[1]
        share = positions.rows_that_turn(configs["config.json"], module.layer) or 1.0
        dim = share if isinstance(share, int) else int(share * r)
        line = {"says": positions.positions_of(module, shapes, configs)[:2], "r": r, "dim": dim,
                "type": configs["config.json"].get("model_type")}
        for name, rope in (("none", None), ("half", Rope(dim)), ("interleaved", Rope(dim, True))):
            with contextlib.suppress(RuntimeError):
                line[name] = stays(model, module, parameters, shapes, n_head, rope)
        found[module.path] = line
    tolerance = 1e-4 if has_experts else 1e-5
    kept = []
    for line in found.values():
        changes = {name: line[name] for name in ("none", "half", "interleaved") if name in line}
        fits = [name for name, change in changes.items() if change < tolerance]
        least = min([change for name, change in changes.items() if name not in fits], default=0.0)
        kept.append([fits, least, line["says"]])
    same = [fits for fits, _, _ in kept]
    verdict = "/".join(same[0]) if all(fits == same[0] for fits in same) else "mixed"
    return {"verdict": verdict or "no pairing", "modules": found, "kept": kept}


def write_csv(path, sources):
    """The table of a trial's files; of a kind that is in several, the last."""
    lines = architectures.last_lines(sources)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kind", "nanorank", "stays", "modules", "largest_change", "least_change_otherwise"])
        for kind in sorted(lines):
            if "kept" not in lines[kind]:
                continue
            says, fits, most, least = [], [], [], []
            for module, (kept, otherwise, said) in zip(lines[kind]["modules"].values(), lines[kind]["kept"]):
                says.append(said[0] or "unknown")
                fits.append("none" if "none" in kept else "|".join(kept) or "no pairing")
                most.append(module.get(said[0], 0.0))
                least += [otherwise] if fits[-1] != "none" else []
            row = [kind, "/".join(dict.fromkeys(says)), "/".join(dict.fromkeys(fits)), len(says)]
            writer.writerow([*row, f"{max(most):.1e}", f"{min(least):.1e}" if least else ""])


def main(out, kinds):
    if kinds == ["table"]:
        known = positions.HALF | positions.INTERLEAVED | positions.NONE
        kinds = sorted(known & MODEL_MAPPING_NAMES.keys())
    architectures.try_each(out, kinds, examine, lambda line: line.get("why") or line["kept"])


if __name__ == "__main__":
    if sys.argv[1].startswith("--csv="):
        write_csv(sys.argv[1].removeprefix("--csv="), sys.argv[2:])
    else:
        main(sys.argv[1], sys.argv[2:])
