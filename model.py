"""
The models people hack: a GPT-2 under nanoGPT's parameter names and a plain ViT of the same blocks,
their initialisation, decay groups and optimizers.

    model = GPT(vocab_size=50304, block_size=756, n_layer=12, n_head=12, n_embd=768)
    _, loss = model(idx, targets)    # mean cross-entropy in nats over targets that are not -1
    model = load_gpt(ckpt)           # our ckpt.pt or nanoGPT's: {"model_args": ..., "model": ...}
    model = ViT(n_classes=1000, image_size=224, **vit_size("S/16"))
    logits = model(images)           # images (B, 3, 224, 224) float -> (B, n_classes)
"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from nanorank.errors import UserError
from nanorank.loss import head_loss
from nanorank.optim import DecoupledSGD, Muon, own_decay
from nanorank.restore import check_model_args, restore_model

# ------------------------------------------------------------------ transformer

class Attention(nn.Module):
    """Multi-head self-attention: (B, T, n_embd) -> (B, T, n_embd).

    Head h of width r = n_embd / n_head owns rows h*r:(h+1)*r of W_Q, W_K and W_V, which
    c_attn.weight stacks, and columns h*r:(h+1)*r of c_proj.weight (P).
    rope: see rotate. n_kv_head: heads of W_K and W_V, each for n_head / n_kv_head heads
    of W_Q in a row; 0: n_head. qk_norm: RMS norm of q and k in each head, as in Qwen 3.
    """

    def __init__(self, n_embd, n_head, bias, dropout, causal, rope=False, n_kv_head=0, qk_norm=False):
        super().__init__()
        self.n_head, self.dropout, self.causal = n_head, dropout, causal
        self.rope, self.qk_norm, self.r = rope, qk_norm, n_embd // n_head
        kv_rows = (n_kv_head or n_head) * self.r
        self.rows = [n_embd, kv_rows, kv_rows]  # of W_Q, W_K, W_V
        self.c_attn = nn.Linear(n_embd, sum(self.rows), bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        if qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(self.r, 1e-6), nn.RMSNorm(self.r, 1e-6)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(self.rows, dim=2)
        q, k, v = [z.view(B, T, -1, self.r).transpose(1, 2) for z in (q, k, v)]  # (B, heads, T, r)
        if self.qk_norm:  # in float32 under autocast
            q = self.q_norm(q.type_as(self.q_norm.weight))
            k = self.k_norm(k.type_as(self.k_norm.weight))
        if self.rope:
            q, k = rotate(q), rotate(k)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v, is_causal=self.causal,
                                           dropout_p=dropout, enable_gqa=q.shape[1] > k.shape[1])
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))

def rotate(x):
    """Rotary positions (Su et al. 2021), as Hugging Face's Llama: x (B, H, T, r) -> (B, H, T, r).

    At position t entries j and j + r/2 turn together, by an angle of t * 10000^(-2j/r).
    """
    T, r = x.shape[-2:]
    frequency = 10_000.0 ** (-torch.arange(0, r, 2, device=x.device) / r)
    angle = torch.arange(T, device=x.device)[:, None] * frequency  # (T, r/2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

class MLP(nn.Module):
    """(B, T, n_embd) -> (B, T, n_embd), four times as wide inside."""

    def __init__(self, n_embd, bias, dropout):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))

class Block(nn.Module):
    """(B, T, n_embd) -> (B, T, n_embd).

    mlp: False for attention alone. post_norm: x = ln(x + f(x)), as in the first
    transformers, instead of x = x + f(ln(x)). drop_path: the share of samples
    that skip a branch in training (stochastic depth, Huang et al. 2016).
    """

    def __init__(self, n_embd, n_head, bias, dropout, causal, mlp=True, drop_path=0.0, post_norm=False,
                 **attention):
        super().__init__()
        self.drop_path, self.post_norm = drop_path, post_norm
        self.ln_1 = nn.LayerNorm(n_embd, bias=bias)
        self.attn = Attention(n_embd, n_head, bias, dropout, causal, **attention)
        if mlp:
            self.ln_2 = nn.LayerNorm(n_embd, bias=bias)
        self.mlp = MLP(n_embd, bias, dropout) if mlp else None

    def forward(self, x):
        if self.post_norm:
            x = self.ln_1(x + self.maybe_drop(self.attn(x)))
            if self.mlp is not None:
                x = self.ln_2(x + self.maybe_drop(self.mlp(x)))
            return x
        x = x + self.maybe_drop(self.attn(self.ln_1(x)))
        if self.mlp is not None:
            x = x + self.maybe_drop(self.mlp(self.ln_2(x)))
        return x

    def maybe_drop(self, x):
        if not self.training or self.drop_path == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1 - self.drop_path)  # scaled up so that the mean stays

class GPT(nn.Module):
    """A causal language model. Its arguments are kept as `self.args`.

    tied: head and embedding share weights. mlp, post_norm: see Block. The rest: see Attention.
    """

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, dropout=0.0, bias=True, tied=True,
                 mlp=True, post_norm=False, rope=False, n_kv_head=0, qk_norm=False):
        super().__init__()
        block = dict(mlp=mlp, post_norm=post_norm, rope=rope, n_kv_head=n_kv_head, qk_norm=qk_norm)
        self.args = dict(vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=n_head,
                         n_embd=n_embd, dropout=dropout, bias=bias, tied=tied, **block)
        check_model_args(self.args)
        blocks = [Block(n_embd, n_head, bias, dropout, causal=True, **block) for _ in range(n_layer)]
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(vocab_size, n_embd),
            wpe=nn.Identity() if rope else nn.Embedding(block_size, n_embd),
            drop=nn.Dropout(dropout),
            h=nn.ModuleList(blocks),
            # with post_norm the last block ends in a norm already
            ln_f=nn.Identity() if post_norm else nn.LayerNorm(n_embd, bias=bias),
        ))
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        if tied:
            self.transformer.wte.weight = self.lm_head.weight

    def hidden(self, idx):
        """The head's input: idx (B, T) int64 -> (B, T, n_embd)."""
        T = idx.shape[1]
        assert T <= self.args["block_size"], f"{T} tokens, block_size is {self.args['block_size']}"
        t = self.transformer
        positions = 0 if self.args["rope"] else t.wpe(torch.arange(T, device=idx.device))
        x = t.drop(t.wte(idx) + positions)
        for block in t.h:
            x = block(x)
        return t.ln_f(x)

    def forward(self, idx, targets=None):
        """(logits (B, T, vocab_size), None), or with targets (None, mean loss over targets >= 0)."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        # F.cross_entropy(logits, targets, ignore_index=-1), in chunks where the logits are large
        return None, head_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

def load_gpt(ckpt, dropout=0.0, path=""):
    """The GPT of a checkpoint dict, ours or nanoGPT's. UserError (naming path) where it does not fit."""
    return restore_model(GPT, ckpt, "not a GPT checkpoint of ours or nanoGPT's", path, dropout=dropout)

# ----------------------------------------------------------- Vision Transformer

# n_layer, n_head, n_embd (Dosovitskiy et al. 2021, Touvron et al. 2021)
VIT_SIZES = {"Ti": (12, 3, 192), "S": (12, 6, 384), "B": (12, 12, 768), "L": (24, 16, 1024)}

def vit_size(variant):
    """The arguments of ViT that a name such as "S/16" stands for."""
    size, _, patch = variant.partition("/")
    if size not in VIT_SIZES or not patch.isdecimal() or int(patch) == 0:
        raise UserError(f"ViT {variant!r}: expects a size ({', '.join(VIT_SIZES)}) / a patch side, as S/16")
    n_layer, n_head, n_embd = VIT_SIZES[size]
    return dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, patch_size=int(patch))

class ViT(nn.Module):
    """A plain Vision Transformer on square images, of GPT's blocks without the causal mask.

    pool: "gap", the mean over tokens, or "cls", a class token. positions: "sincos2d" (fixed) or "learned";
    the class token has none, as in Beyer et al. 2022. drop_path: of the last block, rising linearly from 0.
    """

    def __init__(self, n_classes, image_size=224, patch_size=16, n_layer=12, n_head=6, n_embd=384,
                 dropout=0.0, drop_path=0.0, bias=True, pool="gap", positions="sincos2d"):
        super().__init__()
        self.args = dict(n_classes=n_classes, image_size=image_size, patch_size=patch_size, n_layer=n_layer,
                         n_head=n_head, n_embd=n_embd, dropout=dropout, drop_path=drop_path, bias=bias,
                         pool=pool, positions=positions)
        check_model_args(self.args)
        rates = [drop_path * i / max(1, n_layer - 1) for i in range(n_layer)]
        blocks = [Block(n_embd, n_head, bias, dropout, causal=False, drop_path=rate) for rate in rates]
        self.transformer = nn.ModuleDict(dict(
            patch=nn.Conv2d(3, n_embd, patch_size, stride=patch_size),
            drop=nn.Dropout(dropout),
            h=nn.ModuleList(blocks),
            ln_f=nn.LayerNorm(n_embd, bias=bias),
        ))
        side = image_size // patch_size
        if positions == "learned":
            self.transformer.wpe = nn.Embedding(side * side, n_embd)
        else:
            self.register_buffer("sincos2d", sincos2d(side, n_embd), persistent=False)
        if pool == "cls":
            self.cls = nn.Parameter(torch.zeros(n_embd))
        self.head = nn.Linear(n_embd, n_classes)

    def hidden(self, images):
        """Before pooling: images (B, 3, S, S) -> (B, T, n_embd), the class token first."""
        t = self.transformer
        size = self.args["image_size"]
        assert images.shape[1:] == (3, size, size), f"images are {images.shape[1:]}, image_size is {size}"
        x = t.patch(images).flatten(2).transpose(1, 2)  # (B, side * side, n_embd)
        x = x + (t.wpe.weight if self.args["positions"] == "learned" else self.sincos2d)
        if self.args["pool"] == "cls":
            cls = self.cls.expand(len(x), 1, -1).to(x.dtype)
            x = torch.cat([cls, x], dim=1)
        x = t.drop(x)
        for block in t.h:
            x = block(x)
        return t.ln_f(x)

    def forward(self, images):
        """images (B, 3, image_size, image_size) -> logits (B, n_classes)."""
        x = self.hidden(images)
        pooled = x[:, 0] if self.args["pool"] == "cls" else x.mean(1)
        return self.head(pooled)

def sincos2d(side, n_embd):
    """Fixed positions (side * side, n_embd) of a square grid, row by row (Chen et al. 2021, MoCo v3).

    A quarter each of sin x, cos x, sin y, cos y at wavelengths from 2 pi to 10,000 times that.
    """
    frequency = 10_000.0 ** -torch.linspace(0, 1, n_embd // 4, dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    x = x.flatten()[:, None] * frequency
    y = y.flatten()[:, None] * frequency
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()

def load_vit(ckpt, image_size=0, dropout=0.0, drop_path=0.0, path=""):
    """The ViT of a checkpoint dict; image_size: of other images, which only fixed positions allow."""
    changes = dict(dropout=dropout, drop_path=drop_path)
    if image_size:
        changes["image_size"] = image_size
    return restore_model(ViT, ckpt, "not a ViT checkpoint of ours, or one of another shape", path, **changes)

# --------------------------------------------------------------- initialisation

def init_weights(model, seed):
    """Initialises in place, the same on any device: biases and class token 0, norms 1, matrices normal."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim < 2:
            p.data.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            values = torch.empty(p.shape).normal_(0.0, init_std(model, name, p), generator=generator)
            p.data.copy_(values)

def init_std(model, name, p):
    """Standard deviation of a matrix's initial entries: GPT-2's, or big_vision's for ViT."""
    if isinstance(model, GPT):
        if name.endswith("c_proj.weight"):  # writes to the residual stream
            return 0.02 / math.sqrt(2 * model.args["n_layer"])
        return 0.02
    fan_in = p[0].numel()
    if name == "head.weight":
        return 0.0
    if name.endswith("wpe.weight"):  # learned positions
        return p.shape[1] ** -0.5
    if name.endswith("patch.weight"):  # LeCun
        return fan_in**-0.5
    fan_out = fan_in if name.endswith("c_attn.weight") else len(p)  # c_attn is three matrices
    return math.sqrt(2 / (fan_in + fan_out))  # Xavier

# -------------------------------------------------- weight decay and optimizers

GROUP_OF = {  # the ends of parameter names
    "attn": (".attn.c_attn.weight", ".attn.c_proj.weight"),
    "mlp": (".mlp.c_fc.weight", ".mlp.c_proj.weight"),
    "embed": ("wte.weight", "wpe.weight", "patch.weight", "head.weight"),
}

def decay_groups(model, attn_wd, mlp_wd, embed_wd, qk_wd=-1, qk_decay="l2"):
    """The parameters as [{"name", "params", "weight_decay"}]: groups attn, mlp, embed, none, if not empty.

    Norms and biases are in none. Every parameter is in exactly one group; tied weights count once.
    qk_wd, qk_decay: see optim.decay_by_rows, which decays attn where W_Q and W_K have a decay of their own.
    Raises UserError for a matrix that GROUP_OF does not place.
    """
    groups = {"attn": [], "mlp": [], "embed": [], "none": []}
    for name, p in model.named_parameters():
        found = [group for group, ends in GROUP_OF.items() if name.endswith(ends)]
        if p.ndim < 2:
            found = ["none"]
        if len(found) != 1:
            raise UserError(f"parameter {name} belongs to {len(found)} weight-decay groups: "
                            "give it one in model.GROUP_OF")
        groups[found[0]].append(p)
        if name.endswith(".c_attn.weight"):  # Muon takes W_Q, W_K and W_V each for itself
            p.rows = model.get_submodule(name.removesuffix(".c_attn.weight")).rows
    placed = [id(p) for params in groups.values() for p in params]
    assert sorted(placed) == sorted({id(p) for p in model.parameters()}), "not a partition"

    wd = {"attn": attn_wd, "mlp": mlp_wd, "embed": embed_wd, "none": 0.0}
    result = [{"name": k, "params": params, "weight_decay": wd[k]} for k, params in groups.items() if params]
    result[0].update(own_decay(model, attn_wd, qk_wd, qk_decay))
    return result

def make_optimizers(groups, name, lr, beta1, beta2, eps, momentum, device_type):
    """A list of torch optimizers over decay groups. name: adamw, adam (L2 in the gradient), sgd or muon.

    muon: the blocks' matrices by Muon, scaled to AdamW's RMS so that lr means the same; the rest by adamw.
    """
    adam = dict(lr=lr, betas=(beta1, beta2), eps=eps, fused=device_type in ("cuda", "cpu") or None)
    if name == "adamw":
        return [torch.optim.AdamW(groups, **adam)]
    if name == "adam":
        return [torch.optim.Adam(groups, **adam)]
    if name == "sgd":
        return [DecoupledSGD(groups, lr=lr, momentum=momentum)]
    if name == "muon":
        matrices = [group for group in groups if group["name"] in ("attn", "mlp")]
        rest = [group for group in groups if group["name"] not in ("attn", "mlp")]
        muon = Muon(matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(rest, **adam)]
    raise UserError(f"--optimizer={name}: expects adamw, adam, sgd or muon")
