"""
Whether the rows of W_Q and W_K turn with the position of a token, which two of them turn together, and
whether q and k are normed: by a model's config and its tensors' names. Nothing is guessed.

    found = positions_of(module, shapes, configs)    # Positions("half", 1.0, "config.json: model_type llama")
    layer = with_positions(layer, module, shapes, configs)
    layer.rope, layer.qk_norm

tests/trials/rotary.py holds HALF, INTERLEAVED and NONE against transformers' own models, but for seven of
NONE that it could not run, whose code has no rotary positions.
"""
import math
import re
from typing import NamedTuple

from nanorank.errors import UserError
from nanorank.heads import Rope, join, kind_of

# model_types of Hugging Face whose attention has rotary positions, by which rows of a head turn together:
# j and j + dim/2, or 2j and 2j + 1; and those that have none
HALF = frozenset("""
    llama mistral ministral ministral3 mixtral qwen2 qwen2_moe qwen2_vl_text qwen2_5_vl_text qwen3
    qwen3_moe qwen3_next qwen3_5_text qwen3_5_moe_text qwen3_vl_text qwen3_vl_moe_text gemma gemma2
    gemma3_text vaultgemma embedding_gemma2_text recurrent_gemma olmo olmo2 olmo3 olmoe olmo_hybrid
    flex_olmo stablelm starcoder2 phi phi3 phimoe persimmon gpt_neox gpt_neox_japanese falcon granite
    granitemoe granitemoeshared granite_swa smollm3 exaone4 exaone_moe afmoe modernbert modernbert-decoder
    nanochat apertus arcee bitnet cwm seed_oss hunyuan_v1_dense hunyuan_v1_moe hy_v3 jais2 lfm2 doge
    minimax_m2 glm4_moe glm4v_moe_text gpt_oss gte laguna molmo2_text hyperclovax higgs_audio_v2
    jina_embeddings_v3 nomic_bert eurobert dinov3_vit mlcd_vision_model pixtral
""".split())
INTERLEAVED = frozenset("""
    gptj codegen cohere cohere2 cohere2_moe glm glm4 helium ernie4_5 ernie4_5_moe llama4_text roformer
""".split())
NONE = frozenset("""
    gpt2 gpt_bigcode gpt_neo openai-gpt opt xglm biogpt bloom mpt bert roberta xlm-roberta camembert
    data2vec-text ernie megatron-bert rembert xmod electra albert distilbert mpnet deberta deberta-v2 xlm
    flaubert ctrl layoutlm nystromformer dpr t5 mt5 umt5 longt5 bart mbart mvp pegasus bigbird_pegasus
    marian blenderbot blenderbot-small fsmt led whisper wav2vec2 hubert clip_text_model clip_vision_model
    siglip_text_model siglip_vision_model vit deit beit dinov2
""".split())

# model_types whose layers of full attention do not turn, those with a window do
WINDOWS_TURN = ("cohere2", "cohere2_moe", "exaone4", "exaone_moe", "afmoe")

# the share of each head's rows that turns, where a config of such a model_type does not say
SHARES = {"gpt_neox": 0.25, "stablelm": 0.25, "phi": 0.5, "persimmon": 0.5, "glm": 0.5, "glm4": 0.5,
          "glm4_moe": 0.5, "glm4v_moe_text": 0.5, "recurrent_gemma": 0.5, "qwen3_next": 0.25,
          "qwen3_5_text": 0.25, "qwen3_5_moe_text": 0.25}


class Positions(NamedTuple):
    """How a module's q and k depend on the position."""
    pairing: str       # half, interleaved, none; empty where it is not known
    rows: float = 0.0  # how many rows of each head turn, the first ones: an int, or a float for a share
    source: str = ""   # where that is from


UNKNOWN = Positions("")


def parse_rope(text):
    """The Positions of --rope=half, none, interleaved, or half:64 where only 64 rows of each head turn."""
    match = re.fullmatch(r"(none|half|interleaved)(?::(\d{1,6}))?", text)
    if not match or (match[1] == "none" and match[2]):
        raise UserError(f"--rope={text}: expects none, half or interleaved, or half:64 where 64 rows of "
                        "each head turn")
    return Positions(match[1], int(match[2]) if match[2] else 1.0, "--rope")


def rope_of(positions, r):
    """The Rope of heads of width r, None where nothing turns or it is not known."""
    if positions.pairing in ("", "none"):
        return None
    dim = positions.rows
    if isinstance(dim, float):
        dim = 2 * math.ceil(int(dim * r) / 2)  # as transformers rounds
    if not 0 < dim <= r or dim % 2:
        raise UserError(f"{positions.source}: {dim} of {r} rows of each head cannot turn in pairs")
    return Rope(dim, positions.pairing == "interleaved")


def with_positions(layer, module, shapes, configs, word=""):
    """An AttentionLayer with rope and qk_norm filled in. word: of --rope, for what nothing else tells."""
    positions = positions_of(module, shapes, configs, word)
    rope = rope_of(positions, layer.W_Q.shape[1])
    asked = parse_rope(word) if word else UNKNOWN
    other_rows = isinstance(asked.rows, int) and rope and asked.rows != rope.dim
    if other_rows and asked.pairing == positions.pairing:
        raise UserError(f"--rope={word}: {positions.source} says that {rope.dim} rows of each head turn")
    return layer._replace(rope=rope, qk_norm=bool(norm_of(module, shapes, configs)))


def positions_of(module, shapes, configs, word=""):
    """The Positions of a module (families.Module).

    shapes: {name: shape} of all tensors. configs: {source: dict}. word: of --rope, where these do not tell.
    """
    asked = parse_rope(word) if word else UNKNOWN
    found = positions_by_names(module, shapes)
    for source, config in dict(configs).items():
        if not found.pairing:
            found = positions_by_arguments(module, config, source)
        if not found.pairing:
            found = positions_by_model_type(module, config, source)
    return found if found.pairing else asked


def positions_by_names(module, shapes):
    """The Positions that a naming or tensors beside it settle."""
    names = module.scheme.names
    if module.scheme.layout == "mla":
        return Positions("none", source="latent attention, whose rotary part is left out")
    if names.startswith(("in_proj_weight", "q_proj_weight")):
        return Positions("none", source="torch.nn.MultiheadAttention")
    if module.stack == "cross" and names.startswith("q_attn"):
        return Positions("none", source="GPT-2's cross-attention")
    learned = {"c_attn.weight c_proj.weight": "wpe.weight", "W_Q": "pos_embed.W_pos"}
    for start, table in learned.items():
        if names.startswith(start) and any(f".{name}".endswith(f".{table}") for name in shapes):
            return Positions("none", source=table)
    return UNKNOWN


def positions_by_arguments(module, config, source):
    """The Positions by the arguments of model.py, Meta's Llama, llama2.c, nanochat."""
    names = module.scheme.names
    if names.startswith("c_attn.weight") and "n_embd" in config and config.get("rope") is True:
        return Positions("half", 1.0, f"{source}: rope")
    if names.startswith("c_attn.weight") and {"n_embd", "patch_size", "positions"} <= config.keys():
        return Positions("none", source=f"{source}: positions")
    of_llama = {"dim", "n_layers", "n_heads", "norm_eps"} <= config.keys()
    if names.startswith("wq.weight wk.weight") and of_llama:
        return Positions("interleaved", 1.0, f"{source} of Meta's kind")
    if is_nanochat(module, config):
        return Positions("half", 1.0, f"{source} of nanochat")
    inner = config.get("model_config")
    return positions_by_arguments(module, inner, source) if isinstance(inner, dict) else UNKNOWN


def is_nanochat(module, config):
    return module.scheme.names.startswith("c_q.weight") and {"sequence_len", "n_kv_head"} <= config.keys()


def positions_by_model_type(module, config, source):
    """The Positions by the model_type in a config of Hugging Face, or in its part for this module."""
    for part in parts_of(module, config):
        model_type = part.get("model_type")
        found = f"{source}: model_type {model_type}"
        if model_type in NONE or (model_type == "falcon" and part.get("alibi")):
            return Positions("none", source=found)
        if model_type in HALF or model_type in INTERLEAVED:
            turns = layer_turns(part, module.layer)
            if module.stack == "cross" or turns is False:
                return Positions("none", source=found)
            rows = rows_that_turn(part, module.layer)
            if turns is None or rows == 0:
                return UNKNOWN
            return Positions("half" if model_type in HALF else "interleaved", rows, found)
    return UNKNOWN


def parts_of(module, config):
    """The configs inside a config that may be a module's, the nearest first, then the config itself."""
    kind = kind_of(module.path)
    is_text = kind in ("", "encoder", "decoder", "text")
    own, shared = [], []
    for key, value in config.items():
        if not isinstance(key, str) or not isinstance(value, dict) or "model_type" not in value:
            continue
        if kind and kind_of(key) == kind:
            own += parts_of(module, value)
        elif kind_of(key) in ("", "text") and is_text:
            shared += parts_of(module, value)
    composite = any(isinstance(value, dict) and "model_type" in value for value in config.values())
    if composite and not is_text:  # the text's positions are not a vision tower's
        return own
    return [*own, *shared, config]


def layer_turns(config, layer):
    """Whether a layer turns, in models that leave some without positions; None where it is not told."""
    model_type = config["model_type"]
    if model_type in ("smollm3", "llama4_text"):
        flags = config.get("no_rope_layers")  # 1: it turns
        return bool(flags[layer]) if isinstance(flags, list) and layer < len(flags) else None
    if model_type in WINDOWS_TURN:
        kinds = config.get("layer_types")
        if not isinstance(kinds, list) or layer >= len(kinds):
            return None
        without_windows = model_type.startswith("exaone") and not config.get("sliding_window")
        return without_windows or kinds[layer] != "full_attention"
    return True


def rows_that_turn(config, layer):
    """How many rows of each head turn: an int, or a float for a share; 0 where the rule is not known."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = config.get("layer_types")
    if isinstance(rope, dict) and isinstance(kinds, list) and layer < len(kinds):
        rope = rope.get(kinds[layer], rope)
    rope = rope if isinstance(rope, dict) else {}
    if rope.get("rope_type") == "proportional":  # Gemma 4: some planes stand still
        return 0
    for place in (rope, config):
        for key in ("partial_rotary_factor", "rotary_pct"):
            if isinstance(place.get(key), (int, float)):
                return float(place[key])
    if type(config.get("rotary_dim")) is int:
        return config["rotary_dim"]
    if config.get("model_type") in ("gptj", "codegen"):
        return 64 if "rotary_dim" not in config else 1.0
    return SHARES.get(config.get("model_type"), 1.0)


# the norms of q and k as models call them
NORM = (r"(?:self\.|attention\.)?(q|k|query|key)_?(?:norms?|ln|layer_?norm)"
        r"(?:\.norms\.\d+)?(?:\.(?:weight|scale|gamma))?")


def norm_of(module, shapes, configs):
    """The tensor that norms the queries of a module, or the model that does without one; else empty."""
    beside = {}
    start = join(module.path, "")
    for name in shapes:
        match = re.fullmatch(NORM, name.removeprefix(start)) if name.startswith(start) else None
        if match:
            beside.setdefault(match[1][0], name)
    if beside.keys() == {"q", "k"}:
        return beside["q"]
    for source, config in dict(configs).items():
        if is_nanochat(module, config.get("model_config") or config):
            return f"{source} of nanochat"
        for part in parts_of(module, config):
            model_type = part.get("model_type")
            is_llama4 = model_type == "llama4_text" and part.get("use_qk_norm")
            if model_type == "nanochat" or (is_llama4 and layer_turns(part, module.layer)):
                return f"{source}: model_type {model_type}"
    return ""


def refuse_contradiction(modules, shapes, configs, word):
    """Raises UserError where --rope says other than what the model itself does."""
    if not word:
        return
    asked = parse_rope(word).pairing
    found = [positions_of(module, shapes, configs) for module in modules]
    if found and all(x.pairing not in ("", asked) for x in found):
        raise UserError(f"--rope={word}: {found[0].source} says {found[0].pairing}")


def remarks_on(modules, shapes, configs, word=""):
    """Remarks on how q and k turn and are normed, and which flag says so where nothing tells."""
    remarks = []
    found = {module.path: positions_of(module, shapes, configs, word) for module in modules}
    for x in dict.fromkeys(found.values()):
        if x.pairing in ("half", "interleaved"):
            rows = f"{x.rows} rows" if isinstance(x.rows, int) else f"{100 * x.rows:g} % of the rows"
            together = "2j and 2j + 1" if x.pairing == "interleaved" else "j and j + half"
            remarks.append(f"rotary positions ({x.source}): {rows} of each head turn, {together} together")
    unknown = [path for path, x in found.items() if not x.pairing]
    if unknown:
        where = "" if len(unknown) == len(modules) else f"{unknown[0]}: "
        remarks.append(f"{where}whether q and k turn with the position is not known, so gap is that of the "
                       "plain product; --rope=half (rows j and j + half of each head turn together), "
                       "--rope=interleaved (2j and 2j + 1) or --rope=none says so")
    norms = [norm_of(module, shapes, configs) for module in modules]
    norm = next(filter(None, norms), "")
    if norm:
        remarks.append(f"q and k are normed ({norm}): decay shrinks W_Q and W_K, and the scores stay")
    return remarks
