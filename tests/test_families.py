"""
Every family against its own model: a random small Hugging Face model saved to disk; from what checkpoints.py reads of it, the scores before
the softmax and the outputs of every head are rebuilt and compared with the attention that the model itself computed.
"""
import inspect

import pytest
import torch

from nanorank.checkpoints import Checkpoint
from nanorank.families import find_attention

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 16}
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
N = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 99}
SEQ2SEQ = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 6,
           "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
           "decoder_start_token_id": 1}
T5 = {"d_model": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64, "vocab_size": 99}
CLIP = {"text_config": SMALL, "vision_config": {**IMAGE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}}

MODELS = {  # name: (config class, settings, shape of one head's W_Q, stacks)
    "GPT-2": ("GPT2", N, (12, 48)),
    "GPT-2 with cross-attention": ("GPT2", {**N, "add_cross_attention": True}, (12, 48), "decoder cross"),
    "GPT-BigCode": ("GPTBigCode", N, (12, 48)), "GPT-BigCode, a key a head": ("GPTBigCode", {**N, "multi_query": False}, (12, 48)),
    "OpenAI GPT": ("OpenAIGPT", N, (12, 48)),
    "CodeGen": ("CodeGen", {**N, "rotary_dim": 4}, (12, 48)),
    "GPT-J": ("GPTJ", {**N, "rotary_dim": 4}, (12, 48)), "GPT-NeoX": ("GPTNeoX", SMALL, (12, 48)),
    "GPT-Neo": ("GPTNeo", {**SMALL, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, (12, 48)),
    "OPT": ("OPT", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 48}, (12, 48)), "BioGPT": ("BioGpt", SMALL, (12, 48)),
    "Bloom": ("Bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": 99}, (12, 48)),
    "Falcon RW": ("Falcon", {**SMALL, "multi_query": False, "new_decoder_architecture": False, "alibi": False}, (12, 48)),
    "Falcon 7B": ("Falcon", {**SMALL, "multi_query": True, "new_decoder_architecture": False}, (12, 48)),
    "Falcon 40B": ("Falcon", {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}, (12, 48)),
    "MPT": ("Mpt", {"d_model": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 99}, (12, 48)),
    "Llama": ("Llama", SMALL, (12, 48)), "Llama, grouped queries": ("Llama", GROUPED, (12, 48)), "Mistral": ("Mistral", GROUPED, (12, 48)),
    "Mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 2}, (12, 48)), "Qwen 2": ("Qwen2", GROUPED, (12, 48)),
    "Qwen 3": ("Qwen3", {**GROUPED, "head_dim": 16}, (16, 48)), "Gemma": ("Gemma", {**GROUPED, "head_dim": 16}, (16, 48)),
    "Gemma 2": ("Gemma2", {**GROUPED, "head_dim": 16, "attn_logit_softcapping": None}, (16, 48)),
    "Gemma 3": ("Gemma3Text", {**GROUPED, "head_dim": 16}, (16, 48)),
    "OLMo": ("Olmo", GROUPED, (12, 48)), "OLMo 2": ("Olmo2", GROUPED, (12, 48)),
    "StableLM": ("StableLm", {**GROUPED, "partial_rotary_factor": 0.5}, (12, 48)),
    "StarCoder 2": ("Starcoder2", GROUPED, (12, 48)), "Phi": ("Phi", SMALL, (12, 48)),
    "Phi-3": ("Phi3", GROUPED, (12, 48)), "Persimmon": ("Persimmon", SMALL, (12, 48)),
    "BERT": ("Bert", SMALL, (12, 48)), "RoBERTa": ("Roberta", SMALL, (12, 48)), "ELECTRA": ("Electra", {**SMALL, "embedding_size": 16}, (12, 48)),
    "ALBERT": ("Albert", {**SMALL, "embedding_size": 16}, (12, 48)), "ModernBERT": ("ModernBert", {**SMALL, "pad_token_id": 0}, (12, 48)),
    "DistilBERT": ("DistilBert", {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99}, (12, 48)),
    "MPNet": ("MPNet", SMALL, (12, 48)), "DeBERTa": ("Deberta", SMALL, (12, 48)), "DeBERTa v2": ("DebertaV2", SMALL, (12, 48)),
    "XLM": ("XLM", {"emb_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 99}, (12, 48)),
    "CTRL": ("CTRL", {**N, "dff": 64}, (12, 48)),
    "T5": ("T5", T5, (8, 48), "encoder decoder cross"), "mT5": ("MT5", T5, (8, 48), "encoder decoder cross"),
    "UMT5": ("UMT5", T5, (8, 48), "encoder decoder cross"),
    "BART": ("Bart", SEQ2SEQ, (12, 48), "encoder decoder cross"), "mBART": ("MBart", SEQ2SEQ, (12, 48), "encoder decoder cross"),
    "Whisper": ("Whisper", {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10}, (12, 48), "encoder decoder cross"),
    "ViT": ("ViT", IMAGE, (12, 48)), "DeiT": ("DeiT", IMAGE, (12, 48)), "BEiT": ("Beit", IMAGE, (12, 48)), "DINOv2": ("Dinov2", IMAGE, (12, 48)),
    "CLIP": ("CLIP", CLIP, (12, 48), "text vision"),
    "SigLIP": ("Siglip", {**CLIP, "vision_config": IMAGE}, (12, 48), "text vision vision_model.head.attention"),
    "wav2vec 2": ("Wav2Vec2", {**SMALL, "conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_conv_pos_embeddings": 4,
                               "num_conv_pos_embedding_groups": 2}, (12, 48)),
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
    kind, settings = MODELS[name][:2]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if parameter_name.endswith("bias") or "relative" in parameter_name or "rel_emb" in parameter_name:
                p.zero_()  # what is added to the scores comes after the product too
            elif p.ndim == 2 and "emb" not in parameter_name:
                p.mul_(0.15 / p.std())
    for module in model.modules():  # norms of q and k and ALiBi come after the product
        for norm in ("q_norm", "k_norm", "q_layernorm", "k_layernorm"):
            if hasattr(module, norm):
                setattr(module, norm, torch.nn.Identity())
        if hasattr(module, "build_mpt_alibi_tensor"):
            module.build_mpt_alibi_tensor = lambda *args, own=module.build_mpt_alibi_tensor, **kwargs: 0 * own(*args, **kwargs)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_the_models_own(name, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.models.bloom.modeling_bloom._get_alibi_slopes", lambda n, device: torch.zeros(n))
    model = build(name)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    layers = list(checkpoint.attention_layers())
    stacks = (*MODELS[name], "")[3].split() or [""]
    assert list(dict.fromkeys(layer.stack for layer in layers)) == stacks
    assert tuple(layers[0].W_Q.shape[1:]) == MODELS[name][2]

    shapes = {key: tuple(p.shape) for key, p in model.state_dict().items()}
    inside = find_attention(shapes, config=model.config.to_dict())  # names in memory, as they may differ from those saved
    tensors = {}
    parts = dict(model.named_modules())
    for module in inside:
        linear = [parts.get(entry.removesuffix(".weight")) for entry in module.names]
        for role, part in zip(("q", "k", "v", "o") if len(linear) == 4 else ("q", "k", "o") if len(linear) == 3 else ("q", "o"), linear):
            if part is not None:
                def note(part, args, out, key=(module, role)):
                    tensors.setdefault(key, (args[0], out))
                part.register_forward_hook(note)
    with torch.no_grad():
        out = model(**inputs_of(model, name), output_attentions=True)
    if name in ("CLIP", "SigLIP"):
        own = [(stack, out[f"{stack}_model_output"].attentions) for stack in ("text", "vision")]
    elif model.config.is_encoder_decoder:
        own = [("encoder", out.encoder_attentions), ("decoder", out.decoder_attentions), ("cross", out.cross_attentions)]
    else:
        own = [(stacks[0], out.attentions)] + ([("cross", out.cross_attentions)] if "cross" in stacks else [])
    compared = 0
    for stack, attentions in own:
        of_stack = [(layer, module) for layer, module in zip(layers, inside, strict=True) if layer.stack == stack]
        assert len(of_stack) == (1 if name == "ALBERT" else len(attentions)) and None not in attentions
        for (layer, module), weights in zip(of_stack, attentions):
            (x, _), (y, _) = tensors[module, "q"], tensors.get((module, "k"), tensors[module, "q"])
            written = tensors[module, "o"][1].reshape(-1, layer.P.shape[1])
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])  # queries' and keys' inputs, (T, d)
            scores = torch.einsum("td,hrd,hre,se->hts", x, layer.W_Q, layer.W_K, y)
            weights = weights[0]                                           # (H, T, S), what the model's softmax gave
            assert weights.shape == scores.shape
            got, want = scores[:, -1], weights[:, -1].log()                # the last query sees every key in causal models too
            got, want = got - got.mean(-1, keepdim=True), want - want.mean(-1, keepdim=True)
            scale = (got * want).sum() / (got * got).sum()                 # 1 / sqrt(r) or what the model has for it
            assert got.std() * scale > 1e-4, "no scores to compare"
            assert torch.allclose(scale * got, want, rtol=1e-3, atol=2e-4 * float(want.abs().max())), (stack, layer.layer)
            outputs = torch.einsum("hts,se,hre,hdr->td", weights, y, layer.W_V, layer.P)
            assert torch.allclose(outputs, written, rtol=1e-3, atol=1e-4 * float(written.abs().max())), (stack, layer.layer)
            compared += 1
    assert compared >= 1
