"""
Every family against its own model: a random small Hugging Face model saved to disk. From the tensors that
checkpoints.py reads of it, the scores before the softmax and the outputs of every head are rebuilt, and
compared with the attention that the model itself computed.
"""
import inspect

import pytest
import torch

from nanorank.checkpoints import Checkpoint
from nanorank.errors import UserError
from nanorank.families import attention_layers, find_attention, left_out

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "vocab_size": 99}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 16}
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
WIDE = {**GROUPED, "head_dim": 16}
N = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 99}
MPT = {"d_model": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 99}
SEQ2SEQ = {
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
T5 = {"d_model": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64, "vocab_size": 99}
VISION = {**IMAGE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
CLIP = {"text_config": SMALL, "vision_config": VISION}
FALCON = {**SMALL, "new_decoder_architecture": False}
CONVOLUTIONS = {"conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3],
                "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
DISTILBERT = {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99}
BOTH_SIDES = "encoder decoder cross"

MODELS = {  # name: (config class, settings, shape of one head's W_Q, stacks)
    "GPT-2": ("GPT2", N, (12, 48)),
    "GPT-2 with cross-attention": ("GPT2", {**N, "add_cross_attention": True}, (12, 48), "decoder cross"),
    "GPT-BigCode": ("GPTBigCode", N, (12, 48)),
    "GPT-BigCode, a key a head": ("GPTBigCode", {**N, "multi_query": False}, (12, 48)),
    "OpenAI GPT": ("OpenAIGPT", N, (12, 48)),
    "CodeGen": ("CodeGen", {**N, "rotary_dim": 4}, (12, 48)),
    "GPT-J": ("GPTJ", {**N, "rotary_dim": 4}, (12, 48)),
    "GPT-NeoX": ("GPTNeoX", SMALL, (12, 48)),
    "GPT-Neo": ("GPTNeo", {**SMALL, "num_layers": 2, "num_heads": 4,
                           "attention_types": [[["global", "local"], 1]]}, (12, 48)),
    "OPT": ("OPT", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 48}, (12, 48)),
    "BioGPT": ("BioGpt", SMALL, (12, 48)),
    "Bloom": ("Bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": 99}, (12, 48)),
    "Falcon RW": ("Falcon", {**FALCON, "multi_query": False, "alibi": False}, (12, 48)),
    "Falcon 7B": ("Falcon", {**FALCON, "multi_query": True}, (12, 48)),
    "Falcon 40B": ("Falcon", {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}, (12, 48)),
    "MPT": ("Mpt", MPT, (12, 48)),
    "Llama": ("Llama", SMALL, (12, 48)),
    "Llama, grouped queries": ("Llama", GROUPED, (12, 48)),
    "Mistral": ("Mistral", GROUPED, (12, 48)),
    "Mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 2}, (12, 48)),
    "Qwen 2": ("Qwen2", GROUPED, (12, 48)),
    "Qwen 3": ("Qwen3", WIDE, (16, 48)),
    "Gemma": ("Gemma", WIDE, (16, 48)),
    "Gemma 2": ("Gemma2", {**WIDE, "attn_logit_softcapping": None}, (16, 48)),
    "Gemma 3": ("Gemma3Text", WIDE, (16, 48)),
    "OLMo": ("Olmo", GROUPED, (12, 48)),
    "OLMo 2": ("Olmo2", GROUPED, (12, 48)),
    "StableLM": ("StableLm", {**GROUPED, "partial_rotary_factor": 0.5}, (12, 48)),
    "StarCoder 2": ("Starcoder2", GROUPED, (12, 48)),
    "Phi": ("Phi", SMALL, (12, 48)),
    "Phi-3": ("Phi3", GROUPED, (12, 48)),
    "Persimmon": ("Persimmon", SMALL, (12, 48)),
    "BERT": ("Bert", SMALL, (12, 48)),
    "RoBERTa": ("Roberta", SMALL, (12, 48)),
    "ELECTRA": ("Electra", {**SMALL, "embedding_size": 16}, (12, 48)),
    "ALBERT": ("Albert", {**SMALL, "embedding_size": 16}, (12, 48)),
    "ModernBERT": ("ModernBert", {**SMALL, "pad_token_id": 0}, (12, 48)),
    "DistilBERT": ("DistilBert", DISTILBERT, (12, 48)),
    "MPNet": ("MPNet", SMALL, (12, 48)),
    "DeBERTa": ("Deberta", SMALL, (12, 48)),
    "DeBERTa v2": ("DebertaV2", SMALL, (12, 48)),
    "XLM": ("XLM", {"emb_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 99}, (12, 48)),
    "CTRL": ("CTRL", {**N, "dff": 64}, (12, 48)),
    "T5": ("T5", T5, (8, 48), BOTH_SIDES),
    "mT5": ("MT5", T5, (8, 48), BOTH_SIDES),
    "UMT5": ("UMT5", T5, (8, 48), BOTH_SIDES),
    "BART": ("Bart", SEQ2SEQ, (12, 48), BOTH_SIDES),
    "mBART": ("MBart", SEQ2SEQ, (12, 48), BOTH_SIDES),
    "Whisper": ("Whisper", {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10}, (12, 48), BOTH_SIDES),
    "ViT": ("ViT", IMAGE, (12, 48)),
    "DeiT": ("DeiT", IMAGE, (12, 48)),
    "BEiT": ("Beit", IMAGE, (12, 48)),
    "DINOv2": ("Dinov2", IMAGE, (12, 48)),
    "CLIP": ("CLIP", CLIP, (12, 48), "text vision"),
    "SigLIP": ("Siglip", {**CLIP, "vision_config": IMAGE}, (12, 48),
               "text vision vision_model.head.attention"),
    "wav2vec 2": ("Wav2Vec2", {**SMALL, **CONVOLUTIONS}, (12, 48)),
}


def inputs_of(model, name):
    """A batch of one that the model takes; position 0 throughout, where rotary embeddings turn nothing."""
    ids, config = torch.tensor([[5, 17, 33, 60, 8, 72]]), model.config
    if name in ("CLIP", "SigLIP"):
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}
    if name in ("ViT", "DeiT", "BEiT", "DINOv2"):
        return {"pixel_values": torch.randn(1, 3, 32, 32)}
    if name == "wav2vec 2":
        return {"input_values": torch.randn(1, 40)}
    if name == "Whisper":
        return {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": ids}
    more = {"decoder_input_ids": ids.flip(1)} if config.is_encoder_decoder else {}
    if name == "GPT-2 with cross-attention":
        more["encoder_hidden_states"] = torch.randn(1, 4, 48)
    if "position_ids" in inspect.signature(model.forward).parameters and name not in ("BERT", "RoBERTa"):
        more["position_ids"] = torch.zeros_like(ids)
    return {"input_ids": ids, **more}


def build(name):
    """A model whose scores are the products alone: without biases, norms of q and k, and distances."""
    kind, settings = MODELS[name][:2]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            added = "relative" in parameter_name or "rel_emb" in parameter_name  # to the scores
            if parameter_name.endswith("bias") or added:
                p.zero_()
            elif p.ndim == 2 and "emb" not in parameter_name:
                p.mul_(0.15 / p.std())
    for module in model.modules():
        for norm in ("q_norm", "k_norm", "q_layernorm", "k_layernorm"):
            if hasattr(module, norm):
                setattr(module, norm, torch.nn.Identity())
        if hasattr(module, "build_mpt_alibi_tensor"):
            own = module.build_mpt_alibi_tensor
            module.build_mpt_alibi_tensor = lambda *args, own=own, **kwargs: 0 * own(*args, **kwargs)
    return model


def watch(model, modules):
    """{(module's path, role): (input, output)} of the layers of q, k, o, filled when the model runs."""
    roles = {2: "qo", 3: "qko", 4: "qkvo"}
    parts = dict(model.named_modules())
    seen = {}
    for module in modules:
        for role, name in zip(roles[len(module.names)], module.names):
            part = parts.get(name.removesuffix(".weight"))
            if part is not None:
                def note(part, args, out, key=(module.path, role)):
                    seen.setdefault(key, (args[0], out))
                part.register_forward_hook(note)
    return seen


def own_attention(name, model, out):
    """[(stack, attention weights of each of its layers)] as the model gives them."""
    if name in ("CLIP", "SigLIP"):
        return [(stack, out[f"{stack}_model_output"].attentions) for stack in ("text", "vision")]
    if model.config.is_encoder_decoder:
        return [("encoder", out.encoder_attentions), ("decoder", out.decoder_attentions),
                ("cross", out.cross_attentions)]
    if name == "GPT-2 with cross-attention":
        return [("decoder", out.attentions), ("cross", out.cross_attentions)]
    return [("", out.attentions)]


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_the_models_own(name, tmp_path, monkeypatch):
    alibi = "transformers.models.bloom.modeling_bloom._get_alibi_slopes"
    monkeypatch.setattr(alibi, lambda n, device: torch.zeros(n))
    model = build(name)
    model.save_pretrained(tmp_path)
    layers = list(Checkpoint(str(tmp_path)).attention_layers())
    stacks = MODELS[name][3].split() if len(MODELS[name]) > 3 else [""]
    assert list(dict.fromkeys(layer.stack for layer in layers)) == stacks
    assert tuple(layers[0].W_Q.shape[1:]) == MODELS[name][2]

    shapes = {key: tuple(p.shape) for key, p in model.state_dict().items()}
    inside = find_attention(shapes, config=model.config.to_dict())  # saved names may differ from these
    seen = watch(model, inside)
    with torch.no_grad():
        out = model(**inputs_of(model, name), output_attentions=True)

    compared = 0
    for stack, attentions in own_attention(name, model, out):
        pairs = zip(layers, inside, strict=True)
        of_stack = [(layer, module.path) for layer, module in pairs if layer.stack == stack]
        assert len(of_stack) == (1 if name == "ALBERT" else len(attentions)) and None not in attentions
        for (layer, path), weights in zip(of_stack, attentions):
            x = seen[path, "q"][0]
            y = seen.get((path, "k"), seen[path, "q"])[0]
            written = seen[path, "o"][1]
            compare(layer, x.flatten(0, -2), y.flatten(0, -2), weights[0], written.flatten(0, -2))
            compared += 1
    assert compared >= 1


def compare(layer, x, y, weights, written):
    """A layer's heads against the model's. x (T, d), y (S, d): inputs of queries and keys;
    weights (H, T, S): after the softmax; written (T, d): the output."""
    scores = torch.einsum("td,hrd,hre,se->hts", x, layer.W_Q, layer.W_K, y)
    assert weights.shape == scores.shape
    got = scores[:, -1]            # the last query sees every key in causal models too
    want = weights[:, -1].log()
    got = got - got.mean(-1, keepdim=True)
    want = want - want.mean(-1, keepdim=True)
    scale = (got * want).sum() / (got * got).sum()  # 1 / sqrt(r) or what the model has for it
    assert got.std() * scale > 1e-4, "no scores to compare"
    assert torch.allclose(scale * got, want, rtol=1e-3, atol=2e-4 * float(want.abs().max())), layer[:2]
    outputs = torch.einsum("hts,se,hre,hdr->td", weights, y, layer.W_V, layer.P)
    assert torch.allclose(outputs, written, rtol=1e-3, atol=1e-4 * float(written.abs().max())), layer[:2]

# ------------------------------------------------------------ heads against the model's own projections

LATENT = {**SMALL, "num_key_value_heads": 4, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
          "kv_lora_rank": 20, "q_lora_rank": 24, "n_routed_experts": 4, "num_experts_per_tok": 2,
          "n_group": 1,
          "topk_group": 1, "first_k_dense_replace": 2, "head_dim": 8, "pad_token_id": 0}
FOUR = {**WIDE, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2}
SHARED = {**WIDE, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
          "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8}
OWN_PROJECTIONS = {  # name: (config class, settings, layers that can be read)
    "Qwen3-Next": ("Qwen3Next", FOUR, [3]),
    "Qwen 3.5": ("Qwen3_5Text", FOUR, [3]),
    "Gemma 3n, shared keys": ("Gemma3nText", {**SHARED, "intermediate_size": [64] * 4,
                                              "activation_sparsity_pattern": [0.0] * 4}, [0, 1]),
    "Gemma 4, shared keys": ("Gemma4Text", SHARED, [0, 1]),
    "Gemma 4, keys for values": (
        "Gemma4Text", {**SHARED, "num_kv_shared_layers": 0, "attention_k_eq_v": True}, [0, 1, 2, 3]),
    "DeepSeek V3": ("DeepseekV3", LATENT, [0, 1]),
    "DeepSeek V2 Lite": ("DeepseekV2", {**LATENT, "q_lora_rank": None}, [0, 1]),
}


@pytest.mark.parametrize("name", OWN_PROJECTIONS)
def test_queries_keys_and_values_are_the_models_own(name, tmp_path):
    """Each head's q, k, v as they reach the model's attention, for one token at position 0."""
    kind, settings, layer_numbers = OWN_PROJECTIONS[name]
    calls = {}

    def attention(module, query, key, value, *args, **kwargs):
        calls[module.layer_idx] = query[:, :, 0], key[:, :, 0], value[:, :, 0]
        return query.new_zeros(len(query), 1, query.shape[1], value.shape[-1]), None

    transformers.AttentionInterface.register("seen", attention)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(getattr(transformers, f"{kind}Config")(**settings))
    model.eval().set_attn_implementation("seen")
    for module in model.modules():
        for norm in ("q_norm", "k_norm", "v_norm"):
            if hasattr(module, norm):
                setattr(module, norm, torch.nn.Identity())
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    assert [module.layer for module in checkpoint.modules()] == layer_numbers

    inputs = watch(model, checkpoint.modules())
    with torch.no_grad():
        model(input_ids=torch.randint(3, 99, (5, 1)))
    for module, layer in zip(checkpoint.modules(), checkpoint.attention_layers()):
        q, k, v = calls[module.layer]
        x = inputs[module.path, "q"][0].reshape(5, -1)
        y = inputs[module.path, "k"][0].reshape(5, -1)
        for own, weight, z in ((q, layer.W_Q, x), (k, layer.W_K, y), (v, layer.W_V, y)):
            own = own.repeat_interleave(len(weight) // own.shape[1], 1)[..., :weight.shape[1]]
            assert torch.allclose(torch.einsum("bd,hrd->bhr", z, weight), own, atol=1e-5), name


def test_linear_attention_of_minimax(tmp_path):
    """Its qkv is (head, [q, k, v], r), as in MiniMaxLightningAttention.forward."""
    config = transformers.MiniMaxConfig(**WIDE, num_local_experts=2)
    model = transformers.AutoModel.from_config(config)
    model.save_pretrained(tmp_path)
    linear = next(layer.self_attn for layer in model.layers if hasattr(layer.self_attn, "qkv_proj"))
    read = {layer.layer: layer for layer in Checkpoint(str(tmp_path)).attention_layers()}
    layer = read[linear.layer_idx]
    x = torch.randn(5, 48)
    q, k, v = torch.split(linear.qkv_proj(x).reshape(5, 4, 48), 16, dim=-1)
    for own, weight in ((q, layer.W_Q), (k, layer.W_K), (v, layer.W_V)):
        assert torch.allclose(torch.einsum("bd,hrd->bhr", x, weight), own, atol=1e-6)


def test_what_longformer_leaves_out_is_named(tmp_path):
    model = transformers.AutoModel.from_config(transformers.LongformerConfig(**SMALL, attention_window=4))
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    (remark,) = left_out(checkpoint.modules(), checkpoint.shapes)
    assert "6 tensors" in remark and "_global" in remark


def test_a_gate_in_an_unknown_order_is_refused():
    shapes = {"q": (2 * 24, 24), "k": (12, 24), "v": (12, 24), "o": (24, 24)}
    state = {f"layers.0.self_attn.{x}_proj.weight": torch.randn(shape) for x, shape in shapes.items()}
    with pytest.raises(ValueError, match="queries and a gate.*--layout=gated"):
        list(attention_layers(state, 4))


def separate_layers(n, path="layers.{}.self_attn", d=24):
    """The tensors of n layers of q_proj, k_proj, v_proj, o_proj."""
    names = [f"{path.format(layer)}.{x}_proj.weight" for layer in range(n) for x in "qkvo"]
    return {name: torch.randn(d, d) for name in names}


@pytest.mark.parametrize("name", ["k_sconv.conv1d", "k_conv1d", "conv1d"])  # Inkling, Kimi, OLMo hybrid
def test_keys_after_a_convolution_are_left_out_or_refused(name):
    state = separate_layers(2)
    state[f"layers.0.self_attn.{name}.weight"] = torch.randn(24, 1, 4)
    assert [layer.layer for layer in attention_layers(state, 4)] == [1]
    state[f"layers.1.self_attn.{name}.weight"] = torch.randn(24, 1, 4)
    with pytest.raises(UserError, match="layers.0.self_attn: a convolution over tokens"):
        list(attention_layers(state, 4))
    own = "q_proj.weight,k_proj.weight,v_proj.weight,o_proj.weight"
    assert len(list(attention_layers(state, 4, pattern=own))) == 2


def test_exclusive_attention_is_refused():
    """NeoMME, whose heads' output is no sum of P W_V."""
    state = {**separate_layers(1), "layers.0.self_attn.exclusive_self_attention.alpha": torch.zeros(4)}
    with pytest.raises(UserError, match="layers.0.self_attn: exclusive attention"):
        list(attention_layers(state, 4))


def test_text_enhancer_of_grounding_dino_has_half_the_heads():
    """GroundingDinoTextEnhancerLayer: encoder_attention_heads // 2."""
    enhancer = separate_layers(2, "encoder.layers.{}.text_enhancer_layer.self_attn")
    decoder = separate_layers(2, "decoder.layers.{}.self_attn")
    config = {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "d_model": 24}
    layers = attention_layers({**enhancer, **decoder}, configs={"config.json": config})
    assert [len(layer.W_Q) for layer in layers] == [4, 4, 8, 8]
