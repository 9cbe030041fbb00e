"""
decay_groups and RankLogger on other people's models: one AdamW step with zero gradients multiplies each
matrix by exactly 1 - lr * its decay and changes nothing else.
"""
import re

import pytest
import torch
from conftest import refused, torchrun
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import model as models
from nanorank import RankLogger, attention_layers, decay_groups, metrics, open_checkpoint
from nanorank.families import attention_layers as of_state_dict
from nanorank.watch import attention_ranks

LR, WD = 0.1, {"attn": 0.5, "mlp": 0.25, "embed": 0.125, "lora": 0.0625, "none": 0.0}

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "vocab_size": 40}
GROUPED = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "pad_token_id": 0}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
SEQ2SEQ = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 40,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

# class, config, settings, patterns of the names of attention's, the MLPs' and the embeddings' matrices
HUGGING_FACE = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 40},
              r"attn\.c_\w+\.weight", r"mlp\.c_\w+\.weight", r"wte|wpe"),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED,
              r"self_attn\.[qkvo]_proj", r"mlp\.\w+_proj", r"embed_tokens|lm_head"),
    "Qwen 3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED,
               r"self_attn\.[qkvo]_proj", r"mlp\.\w+_proj", r"embed_tokens|lm_head"),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED,
              r"self_attn\.[qkvo]_proj", r"mlp\.\w+_proj", r"embed_tokens"),
    "T5": ("T5ForConditionalGeneration", "T5Config",
           {"d_model": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32, "vocab_size": 40},
           r"(Self|EncDec)Attention\.[qkvo]\.weight", r"DenseReluDense\.w[io]", r"shared|lm_head"),
    "BERT": ("BertForMaskedLM", "BertConfig", SMALL,
             r"attention\.(self\.(query|key|value)|output\.dense)\.weight",
             r"layer\.\d\.(intermediate|output)\.dense\.weight",
             r"embeddings\.\w+_embeddings|predictions\.transform\.dense\.weight|decoder\.weight"),
    "ViT": ("ViTForImageClassification", "ViTConfig", IMAGE,
            r"attention\.(attention\.(query|key|value)|output\.dense)\.weight|attention\.\w+_proj\.weight",
            r"(layer|layers)\.\d\.(intermediate\.dense|output\.dense|mlp\.fc\d)\.weight",
            r"projection\.weight|position_embeddings|classifier\.weight"),
    "CLIP": ("CLIPModel", "CLIPConfig", {"text_config": SMALL, "vision_config": IMAGE},
             r"self_attn\.(q|k|v|out)_proj\.weight", r"mlp\.fc\d\.weight",
             r"(token|position|patch)_embedding|(visual|text)_projection"),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig",
                {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10},
                r"(self|encoder)_attn\.(q|k|v|out)_proj\.weight", r"layers\.\d\.fc\d\.weight",
                r"conv\d\.weight|embed_tokens|decoder\.embed_positions|proj_out"),
}


class TimmAttention(nn.Module):
    """Under timm's names: qkv and proj."""
    def __init__(self, d, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)


class TimmViT(nn.Module):
    """The parameters of timm's vit_*_patch*, under their names and in their shapes."""
    def __init__(self, d=24, depth=2, heads=2):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, d))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, d))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, d, 8, 8)})
        blocks = []
        for _ in range(depth):
            mlp = nn.ModuleDict({"fc1": nn.Linear(d, 4 * d), "fc2": nn.Linear(4 * d, d)})
            blocks.append(nn.ModuleDict({"norm1": nn.LayerNorm(d), "attn": TimmAttention(d, heads),
                                         "norm2": nn.LayerNorm(d), "mlp": mlp}))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, 7)


class Torch(nn.Module):
    """torch.nn's own transformer between an embedding and a head."""
    def __init__(self, d=24):
        super().__init__()
        self.embedding = nn.Embedding(40, d)
        layer = nn.TransformerEncoderLayer(d, 2, 32, dropout=0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(d, 40)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x)))


TORCH = r"in_proj_weight|out_proj\.weight", r"linear\d\.weight", r"embedding\.weight|head\.weight"
TIMM = r"attn\.(qkv|proj)\.weight", r"mlp\.fc\d\.weight", r"pos_embed|patch_embed\.proj\.weight|head\.weight"


def build(name):
    """(a small random model, {group: pattern of its names})."""
    if name in HUGGING_FACE:
        transformers = pytest.importorskip("transformers")
        kind, config, settings, *patterns = HUGGING_FACE[name]
        net = getattr(transformers, kind)(getattr(transformers, config)(**settings))
    else:
        net, patterns = (TimmViT(), TIMM) if name == "timm ViT" else (Torch(), TORCH)
    with torch.no_grad():
        for p in net.parameters():
            p += torch.randn(p.shape)  # zeros would hide a decay
    return net, dict(zip(("attn", "mlp", "embed"), patterns))


def groups_of(net, **options):
    options = {"lora_wd": WD["lora"], **options}
    return decay_groups(net, WD["attn"], WD["mlp"], WD["embed"], **options)


def decay_once(groups):
    """One step of AdamW with zero gradients."""
    optimizer = torch.optim.AdamW(groups, lr=LR)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()


def placed(net, groups):
    """{a parameter's name: its group}."""
    names = {id(p): name for name, p in net.named_parameters()}
    found = [(names[id(p)], group["name"]) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.mark.parametrize("name", [*HUGGING_FACE, "timm ViT", "torch.nn.TransformerEncoder"])
def test_a_step_decays_exactly_the_matrices(name):
    net, patterns = build(name)
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    groups = groups_of(net)
    decay_once(groups)

    decayed = dict.fromkeys(patterns, 0)
    for key, p in net.named_parameters():
        found = [group for group, pattern in patterns.items() if re.search(pattern, key) and p.requires_grad]
        if key.endswith("bias") or "norm" in key.lower():
            found = []
        assert len(found) < 2, key
        factor = 1 - LR * WD[found[0]] if found else 1
        assert torch.equal(p, before[key] * factor), key
        for group in found:
            decayed[group] += 1
    counts = {group["name"]: (group["n_tensors"], group["n_params"]) for group in groups}
    assert min(decayed.values()) > 0
    for group, n in decayed.items():
        params = next(x["params"] for x in groups if x["name"] == group)
        assert counts[group] == (n, sum(p.numel() for p in params))
    trained = {key for key, p in net.named_parameters() if p.requires_grad}
    assert placed(net, groups).keys() == trained


@pytest.mark.parametrize("name", [*HUGGING_FACE, "timm ViT", "torch.nn.TransformerEncoder"])
def test_ranks_of_a_live_model_are_those_of_its_heads(name):
    """Heads are counted by configs and attributes of modules; the means are over all heads."""
    net, _ = build(name)
    layers = list(attention_layers(net))
    heads = {"CLIP": {2}, "Whisper": {2, 4}, "Llama": {4}, "Qwen 3": {4}, "Gemma": {4}}.get(name, {2})
    assert {len(layer.W_Q) for layer in layers} == heads
    ranks = []
    for layer in layers:
        ranks += metrics(layer.W_K.mT, layer.W_Q.mT)["rank95"]
    rank = RankLogger(net, every=10)
    assert rank(7) == {} and rank(10)["attn_rank95_qk"] == pytest.approx(sum(ranks) / len(ranks))
    by_layer = [key for key in rank(0) if "layer" in key and key.endswith("qk")]
    assert len(by_layer) == len(layers)
    assert RankLogger(net, every=0)(0) == {}


GPT = {"vocab_size": 50, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}
VIT = {"n_classes": 5, "image_size": 16, "patch_size": 4, "n_layer": 2, "n_head": 2, "n_embd": 16}


@pytest.mark.parametrize("net", [
    models.GPT(**GPT), models.GPT(**GPT, tied=False, bias=False), models.GPT(**GPT, mlp=False),
    models.GPT(**GPT, post_norm=True), models.ViT(**VIT), models.ViT(**VIT, pool="cls", positions="learned"),
], ids=["GPT", "untied", "no MLP", "post_norm", "ViT", "ViT cls"])
def test_our_models_get_the_groups_and_ranks_of_their_trainers(net):
    assert placed(net, groups_of(net)) == placed(net, models.decay_groups(net, 1, 2, 3))
    assert RankLogger(net)(0) == attention_ranks(net)


class Lora(nn.Module):
    """A Linear with an adapter, under peft's names."""
    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})


def test_adapters_are_a_group_of_their_own():
    net, _ = build("Llama")
    for layer in net.model.layers:
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
    net.lm_head = nn.ModuleDict({
        "original_module": net.lm_head.requires_grad_(False),
        "modules_to_save": nn.ModuleDict({"default": nn.Linear(24, 40, bias=False)}),
    })
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    found = placed(net, groups_of(net))
    lora = {key for key in before if "lora" in key}
    assert {key for key, group in found.items() if group == "lora"} == lora
    assert found["lm_head.modules_to_save.default.weight"] == "embed"
    assert found["model.layers.0.self_attn.k_proj.weight"] == "attn"
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" not in found  # needs no gradient
    decay_once(groups_of(net))
    for key, p in net.named_parameters():
        assert torch.equal(p, before[key] * (1 - LR * WD[found.get(key, "none")])), key
    with refused("merge the adapter"):
        RankLogger(net)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrappers_do_not_matter(one_process):
    net, _ = build("torch.nn.TransformerEncoder")
    want, ranks = placed(net, groups_of(net)), RankLogger(net)(0)
    for wrapped in (DistributedDataParallel(net), torch.compile(net, backend="eager"),
                    torch.compile(DistributedDataParallel(net), backend="eager")):
        assert placed(net, groups_of(wrapped)) == want
        assert RankLogger(wrapped)(0) == ranks
    net.encoder.layers[0] = torch.compile(net.encoder.layers[0], backend="eager")
    assert RankLogger(net)(0) == ranks


SHARDED = """
import json, sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, fully_shard
from test_decay import Torch, decay_once, groups_of, refused
from nanorank import RankLogger

dist.init_process_group("gloo")
torch.manual_seed(0)
plain = Torch()
state = {name: p.clone() for name, p in plain.state_dict().items()}
ranks = RankLogger(plain)(0)
decay_once(groups_of(plain))

def again():
    net = Torch()
    net.load_state_dict(state)
    return net

def wrap(part, flat=False):
    return FSDP(part, use_orig_params=not flat, device_id=torch.device("cpu"))

one = again()
for i, layer in enumerate(one.encoder.layers):
    one.encoder.layers[i] = wrap(layer)
one = wrap(one)
two = again()
for layer in two.encoder.layers:
    fully_shard(layer)
fully_shard(two)

x = torch.randint(40, (2, 5))
for net in (one, two):
    counts = [(g["name"], g["n_tensors"], g["n_params"]) for g in groups_of(net)]
    assert counts == [(g["name"], g["n_tensors"], g["n_params"]) for g in groups_of(plain)], counts
    rank = RankLogger(net)
    assert rank(0) == ranks
    net(x).sum().backward()
    decay_once(groups_of(net))
    assert rank(0) != ranks

with FSDP.summon_full_params(one, writeback=False):
    for p, (name, q) in zip(one.parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(p, q), name
for (name, p), q in zip(two.named_parameters(), plain.parameters(), strict=True):
    assert torch.equal(p.full_tensor(), q), name

with refused("use_orig_params=True"):
    groups_of(wrap(again(), flat=True))
print("all equal")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_parameters(tmp_path):
    """FSDP with use_orig_params and fully_shard on two processes: the decay and ranks of the whole model."""
    import subprocess

    from conftest import REPO, environment
    (tmp_path / "sharded.py").write_text(SHARDED)
    path = f"{REPO}:{REPO / 'tests'}"
    result = subprocess.run([*torchrun(2), str(tmp_path / "sharded.py")], env=environment(PYTHONPATH=path),
                            capture_output=True, text=True, timeout=300)
    assert result.stdout.count("all equal") == 2, result.stderr[-3000:]


class Strange(nn.Module):
    """Attention under names that no naming knows, beside some that one knows."""
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(9, 8)
        names = ("asks", "answers", "tells", "mixes")
        self.layers = nn.ModuleList()
        for _ in range(2):
            attention = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in names})
            self.layers.append(nn.ModuleDict({"attention": attention, "up": nn.Linear(8, 16)}))


PATTERN = "asks.weight,answers.weight,tells.weight,mixes.weight"


def test_unknown_names_are_refused_and_a_pattern_places_them():
    net = Strange()
    with refused("no attention found", "asks.weight", "(pattern="):
        groups_of(net)
    found = placed(net, groups_of(net, pattern=PATTERN))
    assert [found[f"layers.1.{x}.weight"] for x in ("attention.asks", "attention.mixes", "up")] \
        == ["attn", "attn", "mlp"]
    assert found["tokens.weight"] == "embed"

    with refused("nothing says how many heads", "give n_head or d_head"):
        RankLogger(net, pattern=PATTERN)
    assert RankLogger(net, pattern=PATTERN, n_head=2)(0)["attn_rank95_qk"] <= 4
    layers = attention_layers(net.state_dict(), n_head=2, pattern=PATTERN)
    assert [len(layer.W_Q) for layer in layers] == [2, 2]

    both = nn.ModuleDict({"a": net, "b": TimmViT()})
    with refused("a.layers.0.attention.asks.weight (8, 8) looks like attention", "pattern="):
        groups_of(both)
    found = placed(both, groups_of(both, pattern=PATTERN))
    assert found["a.layers.0.attention.asks.weight"] == found["b.blocks.0.attn.qkv.weight"] == "attn"


def test_a_tie_between_groups_is_refused():
    net = TimmViT()
    net.blocks[0].mlp.extra = nn.Linear(24, 24)
    net.blocks[0].mlp.extra.weight = net.blocks[0].attn.proj.weight
    with refused("blocks.0.mlp.extra.weight (mlp)", "blocks.0.attn.proj.weight (attn)"):
        groups_of(net)


def test_an_mlp_inside_or_beside_attention_is_no_attention():
    """timm's attention pool holds an MLP, MaxViT's attn_block stands around attention and MLP."""
    net = TimmViT()
    net.blocks[0].attn.mlp = nn.ModuleDict({"fc1": nn.Linear(24, 24)})
    assert placed(net, groups_of(net))["blocks.0.attn.mlp.fc1.weight"] == "mlp"
    blocks = [nn.ModuleDict({"attn_block": block}) for block in net.blocks]
    around = nn.ModuleDict({"stages": nn.ModuleList(blocks)})
    with refused("MaxViT", "give pattern=qkv.weight,proj.weight"):
        groups_of(around)
    found = placed(around, groups_of(around, pattern="qkv.weight,proj.weight", layout="fused"))
    assert found["stages.1.attn_block.mlp.fc1.weight"] == "mlp"
    assert found["stages.1.attn_block.attn.qkv.weight"] == "attn"


@pytest.mark.parametrize("prefix", ["", "net."])
def test_embedding_and_head_in_a_list_with_the_blocks(prefix):
    """torch.nn.Sequential(Embedding, block, block, Linear)."""
    blocks = list(build("torch.nn.TransformerEncoder")[0].encoder.layers)
    net = nn.Sequential(nn.Embedding(9, 24), *blocks, nn.Linear(24, 9))
    net = nn.ModuleDict({"net": net}) if prefix else net
    found = placed(net, groups_of(net))
    assert found[f"{prefix}0.weight"] == found[f"{prefix}3.weight"] == "embed"
    assert found[f"{prefix}2.linear1.weight"] == "mlp"
    assert found[f"{prefix}1.self_attn.in_proj_weight"] == "attn"


def test_attention_of_a_model_a_state_dict_and_a_path(tmp_path):
    net, _ = build("Llama")
    net.save_pretrained(tmp_path / "llama")
    ckpt = open_checkpoint(tmp_path / "llama")
    want = list(of_state_dict(net.state_dict(), n_head=4))
    for source in (net, net.state_dict(), tmp_path / "llama", ckpt):
        options = {"n_head": 4} if isinstance(source, dict) else {}
        for x, y in zip(attention_layers(source, **options), want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(x[2:6], y[2:6]))
    with refused("give its state dict", "model"):
        next(attention_layers({"model": net.state_dict()}))

    gpt = models.GPT(**GPT)
    for step in (1, 2):
        ckpt = {"model": gpt.state_dict(), "model_args": gpt.args, "iter_num": step}
        torch.save(ckpt, tmp_path / f"step_{step:07d}.pt")
    assert open_checkpoint(tmp_path).step == 2  # a run folder: its last
    with refused("no such file"):
        open_checkpoint(tmp_path / "nothing")
