"""
The models people hack: a pre-LN GPT-2 under nanoGPT's parameter names, a plain ViT of the same blocks, their initialisation, and their
weight-decay groups.

    model = GPT(vocab_size=50304, block_size=756, n_layer=12, n_head=12, n_embd=768)
    init_weights(model, seed=1337)
    logits, _ = model(idx)           # idx (B, T) int64 -> (B, T, vocab_size)
    _, loss = model(idx, targets)    # mean cross-entropy in nats over targets that are not -1
    model = load_gpt(checkpoint)     # our ckpt.pt or nanoGPT's: {"model_args": ..., "model": ...}

    model = ViT(n_classes=1000, image_size=224, **vit_size("S/16"))
    logits = model(images)           # images (B, 3, 224, 224) float -> (B, n_classes)
    model = load_vit(checkpoint)
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from nanorank.errors import UserError

# ------------------------------------------------------------------------------------------------------- transformer

class Attention(nn.Module):
    """Multi-head self-attention: (B, T, n_embd) -> (B, T, n_embd).

    Head h of width r = n_embd / n_head owns rows h*r:(h+1)*r of each third of c_attn.weight (W_Q, W_K, W_V)
    and columns h*r:(h+1)*r of c_proj.weight (P).
    """

    def __init__(self, n_embd, n_head, bias, dropout, causal):
        super().__init__()
        self.n_head, self.dropout, self.causal = n_head, dropout, causal
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2))  # (B, H, T, r)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


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
    """(B, T, n_embd) -> (B, T, n_embd). mlp: False for attention alone; drop_path: share of samples that a branch leaves out in training,
    the others scaled up so that its mean stays (stochastic depth, Huang et al. 2016); post_norm: x = ln(x + f(x)), as in the first
    transformers, instead of x = x + f(ln(x))."""

    def __init__(self, n_embd, n_head, bias, dropout, causal, mlp=True, drop_path=0.0, post_norm=False):
        super().__init__()
        self.drop_path, self.post_norm = drop_path, post_norm
        self.ln_1 = nn.LayerNorm(n_embd, bias=bias)
        self.attn = Attention(n_embd, n_head, bias, dropout, causal)
        if mlp:
            self.ln_2 = nn.LayerNorm(n_embd, bias=bias)
        self.mlp = MLP(n_embd, bias, dropout) if mlp else None

    def forward(self, x):
        if self.post_norm:
            x = self.ln_1(x + self.branch(self.attn(x)))
            return self.ln_2(x + self.branch(self.mlp(x))) if self.mlp is not None else x
        x = x + self.branch(self.attn(self.ln_1(x)))
        return x + self.branch(self.mlp(self.ln_2(x))) if self.mlp is not None else x

    def branch(self, x):
        if not (self.drop_path and self.training):
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1 - self.drop_path)


class GPT(nn.Module):
    """A causal language model; the arguments are nanoGPT's model_args, kept as `self.args`. tied: head and embedding share weights;
    mlp: False for blocks of attention alone; post_norm: norms behind each sum instead of before each branch."""

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, dropout=0.0, bias=True, tied=True, mlp=True, post_norm=False):
        super().__init__()
        if min(vocab_size, block_size, n_layer, n_head, n_embd) < 1 or n_embd % n_head:
            raise UserError(f"n_embd={n_embd} must be a positive multiple of n_head={n_head}, and vocab_size={vocab_size}, "
                             f"block_size={block_size}, n_layer={n_layer} at least 1")
        self.args = dict(vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                         dropout=dropout, bias=bias)
        known = {"tied": True, "mlp": True, "post_norm": False}  # what nanoGPT does not know is stored only where it is not nanoGPT's way
        self.args.update({name: x for name, x in (("tied", tied), ("mlp", mlp), ("post_norm", post_norm)) if x != known[name]})
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(vocab_size, n_embd),
            wpe=nn.Embedding(block_size, n_embd),
            drop=nn.Dropout(dropout),
            h=nn.ModuleList([Block(n_embd, n_head, bias, dropout, causal=True, mlp=mlp, post_norm=post_norm) for _ in range(n_layer)]),
            ln_f=nn.Identity() if post_norm else nn.LayerNorm(n_embd, bias=bias),  # post_norm: the last block ends in a norm already
        ))
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        if tied:
            self.transformer.wte.weight = self.lm_head.weight

    def hidden(self, idx):
        """What the head reads: idx (B, T) int64 -> (B, T, n_embd)."""
        if idx.shape[1] > self.args["block_size"]:
            raise UserError(f"sequence of {idx.shape[1]} tokens, block_size is {self.args['block_size']}")
        t = self.transformer
        x = t.drop(t.wte(idx) + t.wpe(torch.arange(idx.shape[1], device=idx.device)))
        for block in t.h:
            x = block(x)
        return t.ln_f(x)

    def forward(self, idx, targets=None):
        """(logits (B, T, vocab_size), None) without targets; (None, mean loss over targets >= 0) with them."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        return None, head_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def flops_per_token(self, T):
        """Model FLOPs of one training token, forward and backward, in sequences of T tokens: 6 N + 12 n_layer n_embd T.

        N: parameters of the matrices it is multiplied with (blocks and head; embedding look-ups and the norms' few are left out).
        The second term is q k^T and its product with v, the causal half counted too (as PaLM's appendix B and nanoGPT do).
        """
        a = self.args
        N = sum(p.numel() for p in self.transformer.h.parameters() if p.ndim == 2) + self.lm_head.weight.numel()
        return 6 * N + 12 * a["n_layer"] * a["n_embd"] * T

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, n_tokens=None, generator=None):
        """Continues idx (B, T) by max_new_tokens sampled tokens -> (B, T + max_new_tokens).

        temperature 0 takes the likeliest; top_k > 0 samples among that many; n_tokens: ids from there on (vocabulary padding) are barred.
        Raises UserError for logits that are not finite.
        """
        for _ in range(max_new_tokens):
            x = self.hidden(idx[:, -self.args["block_size"]:])
            logits = self.lm_head(x[:, -1])[:, :n_tokens].float()  # (B, n_tokens)
            if not logits.isfinite().all():
                raise UserError("its logits are not finite: weights that are damaged, or overflow")
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                if top_k:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
            idx = torch.cat([idx, token], dim=1)
        return idx


def head_loss(x, weight, targets, rows=1024):
    """Mean cross-entropy of the logits x weight^T, (N, d) x (V, d), against targets (N,), those of -1 left out.

    Eagerly in float32, where the logits are large, `rows` tokens at a time through torch's linear_cross_entropy (torch >= 2.13):
    the (N, V) logits never exist at once, a tenth of the memory, and it is no slower (RESULTS.md, "Head and loss"; torch's own choice of
    chunk is far slower on a CPU). In bfloat16 it would sum the loss in bfloat16, and a compiled model would break its graph there: those
    take the plain way.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or not hasattr(F, "linear_cross_entropy") \
            or len(x) * len(weight) < 2**24:  # 64 MB of logits
        return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=min(rows, len(x)))
    return F.linear_cross_entropy(x, weight, targets, ignore_index=-1, options=options)


def load_gpt(checkpoint, dropout=0.0):
    """The GPT of a checkpoint dict, ours or nanoGPT's. Raises UserError where parts are missing or shapes do not fit."""
    return load_as(GPT, checkpoint, "not a GPT checkpoint of ours or nanoGPT's", dropout=dropout)

# ------------------------------------------------------------------------------------------------ Vision Transformer

VIT_SIZES = {"Ti": (12, 3, 192), "S": (12, 6, 384), "B": (12, 12, 768), "L": (24, 16, 1024)}  # layers, heads, width (Dosovitskiy 2021, Touvron 2021)


def vit_size(name):
    """The arguments of ViT that a name such as "S/16" stands for. Raises UserError for one that it does not know."""
    size, _, patch = name.partition("/")
    if size not in VIT_SIZES or not patch.isdecimal() or not int(patch):
        raise UserError(f"ViT {name!r}: expects a size and a patch side in pixels, as S/16; sizes: {', '.join(VIT_SIZES)}")
    return dict(zip(("n_layer", "n_head", "n_embd"), VIT_SIZES[size]), patch_size=int(patch))


class ViT(nn.Module):
    """A plain Vision Transformer on square images, made of GPT's blocks without the causal mask; arguments are kept as `self.args`.

    pool: "gap", the mean over tokens, or "cls", a class token. positions: "sincos2d", fixed, or "learned"; the class token has none
    (Beyer et al. 2022; where others give it one, it is part of `cls`). drop_path: of the last block, rising linearly from 0 at the first.
    """

    def __init__(self, n_classes, image_size=224, patch_size=16, n_layer=12, n_head=6, n_embd=384, dropout=0.0, drop_path=0.0, bias=True,
                 pool="gap", positions="sincos2d"):
        super().__init__()
        if min(n_classes, image_size, patch_size, n_layer, n_head, n_embd) < 1 or n_embd % n_head:
            raise UserError(f"n_embd={n_embd} must be a positive multiple of n_head={n_head}, and n_classes={n_classes}, "
                             f"image_size={image_size}, patch_size={patch_size}, n_layer={n_layer} at least 1")
        if image_size % patch_size:
            raise UserError(f"image_size={image_size} must be a multiple of patch_size={patch_size}")
        if pool not in ("gap", "cls") or positions not in ("sincos2d", "learned"):
            raise UserError(f"pool={pool}, positions={positions}: expects gap or cls, sincos2d or learned")
        self.args = dict(n_classes=n_classes, image_size=image_size, patch_size=patch_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                         dropout=dropout, drop_path=drop_path, bias=bias, pool=pool, positions=positions)
        side = image_size // patch_size
        self.transformer = nn.ModuleDict(dict(
            patch=nn.Conv2d(3, n_embd, patch_size, stride=patch_size),
            drop=nn.Dropout(dropout),
            h=nn.ModuleList([Block(n_embd, n_head, bias, dropout, causal=False, drop_path=drop_path * i / max(1, n_layer - 1))
                             for i in range(n_layer)]),
            ln_f=nn.LayerNorm(n_embd, bias=bias),
        ))
        if positions == "learned":
            self.transformer.wpe = nn.Embedding(side * side, n_embd)
        else:
            self.register_buffer("sincos2d", sincos2d(side, n_embd), persistent=False)
        if pool == "cls":
            self.cls = nn.Parameter(torch.zeros(n_embd))
        self.head = nn.Linear(n_embd, n_classes)

    def hidden(self, images):
        """What is pooled for the head: images (B, 3, image_size, image_size) -> (B, T, n_embd), the class token first where there is one."""
        a, t = self.args, self.transformer
        if images.shape[1:] != (3, a["image_size"], a["image_size"]):
            raise UserError(f"images of shape {tuple(images.shape[1:])}, the model's are (3, {a['image_size']}, {a['image_size']})")
        x = t.patch(images).flatten(2).transpose(1, 2)
        x = x + (t.wpe.weight if a["positions"] == "learned" else self.sincos2d)
        if a["pool"] == "cls":
            x = torch.cat([self.cls.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
        x = t.drop(x)
        for block in t.h:
            x = block(x)
        return t.ln_f(x)

    def forward(self, images):
        """images (B, 3, image_size, image_size) -> logits (B, n_classes)."""
        x = self.hidden(images)
        return self.head(x[:, 0] if self.args["pool"] == "cls" else x.mean(1))

    def flops_per_image(self):
        """Model FLOPs of one training image, forward and backward, counted as GPT.flops_per_token does; one vector goes through the head."""
        a = self.args
        patches = (a["image_size"] // a["patch_size"])**2
        T = patches + (a["pool"] == "cls")
        N = sum(p.numel() for p in self.transformer.h.parameters() if p.ndim == 2)
        return 6 * (N * T + self.transformer.patch.weight.numel() * patches + self.head.weight.numel()) + 12 * a["n_layer"] * a["n_embd"] * T * T


def sincos2d(side, n_embd):
    """Fixed positions (side * side, n_embd) of a square grid, row by row: a quarter each of sin x, cos x, sin y, cos y at wavelengths
    from 2 pi to 10,000 times that (Chen et al. 2021, MoCo v3)."""
    if n_embd % 4 or n_embd < 8:
        raise UserError(f"n_embd={n_embd} must be a multiple of 4, at least 8, for sincos2d positions")
    frequency = 10_000.0 ** -torch.linspace(0, 1, n_embd // 4, dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    x, y = (z.flatten()[:, None] * frequency for z in (x, y))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


def load_vit(checkpoint, image_size=0, dropout=0.0, drop_path=0.0):
    """The ViT of a checkpoint dict of ours, for images of another size where one is given (fixed positions alone allow it).
    Raises UserError where parts are missing or shapes do not fit."""
    size = {"image_size": image_size} if image_size else {}
    return load_as(ViT, checkpoint, "not a ViT checkpoint of ours, or one of another shape", dropout=dropout, drop_path=drop_path, **size)

# ------------------------------------------------------------------------------------------- initialisation, loading

def init_weights(model, seed):
    """The initialisation of a GPT or ViT, in place, the same on any device. Biases and class token 0, norms 1, matrices normal:

    GPT (GPT-2's): standard deviation 0.02, of those that write to the residual stream 0.02 / sqrt(2 n_layer).
    ViT (big_vision's): Xavier in the blocks, LeCun in the patch projection, learned positions 1 / sqrt(n_embd), the head 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim < 2:
            p.data.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            p.data.copy_(torch.empty(p.shape).normal_(0.0, init_std(model, name, p), generator=generator))


def init_std(model, name, p):
    """Standard deviation of a matrix's initial entries."""
    if isinstance(model, GPT):
        return 0.02 / math.sqrt(2 * model.args["n_layer"]) if name.endswith("c_proj.weight") else 0.02
    if name == "head.weight":
        return 0.0
    if name.endswith("wpe.weight"):
        return p.shape[1]**-0.5
    fan_in = p[0].numel()
    if name.endswith("patch.weight"):
        return fan_in**-0.5
    fan_out = fan_in if name.endswith("c_attn.weight") else len(p)  # c_attn is three matrices
    return math.sqrt(2 / (fan_in + fan_out))


def load_as(kind, checkpoint, refusal, **changes):
    """A model of class `kind` from a checkpoint dict, some of its arguments changed. Raises UserError(refusal and reason)."""
    args = checkpoint.get("model_args") if isinstance(checkpoint, dict) else None
    if isinstance(args, dict) and ("vocab_size" in args) != (kind is GPT) and {"vocab_size", "n_classes"} & set(args):
        raise UserError(f"{refusal} (it is a {'GPT' if 'vocab_size' in args else 'ViT'})")
    if isinstance(checkpoint, dict) and not isinstance(checkpoint.get("config") or {}, dict):
        raise UserError(f"{refusal} (its config is no dict of settings)")
    try:
        state = {name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("_orig_mod."): p
                 for name, p in checkpoint["model"].items() if not name.endswith(".attn.bias")}  # old nanoGPT's mask
        args = {**checkpoint["model_args"], **changes}
        check_size(args, state)
        model = kind(**args)
        model.load_state_dict(state)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{refusal} ({type(error).__name__}: {reason})") from None
    bad = next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)
    if bad:
        raise UserError(f"{bad} holds NaN or inf")
    return model


def check_size(args, state):
    """Raises UserError where a checkpoint's model_args are no counts, or describe a model of more parameters than its state dict holds:
    otherwise a few bytes could ask for any amount of memory."""
    counts = {name: args[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "n_classes", "image_size", "patch_size")
              if name in args}
    held, get = sum(p.numel() for p in state.values()), counts.get
    if all(type(x) is int for x in counts.values()):
        rows = get("vocab_size", 0) + get("block_size", 0) + get("n_classes", 0) + 3 * get("patch_size", 0)**2
        least = get("n_layer") * get("n_embd")**2 + rows * get("n_embd")
        if get("n_layer") <= len(state) and least <= max(held, 2**24) and get("image_size", 0) <= 2**14:
            return
    raise UserError(f"model_args describe more than the {len(state)} tensors of {held:,} numbers that it holds, or are no counts: "
                     + ", ".join(f"{name}={str(x)[:20]}" for name, x in counts.items()))

# ------------------------------------------------------------------------------------------- weight decay and optimizers

GROUP_OF = {"attn": (".attn.c_attn.weight", ".attn.c_proj.weight"),
            "mlp": (".mlp.c_fc.weight", ".mlp.c_proj.weight"),
            "embed": ("wte.weight", "wpe.weight", "patch.weight", "head.weight")}


def decay_groups(model, attn_wd, mlp_wd, embed_wd):
    """The parameters in four groups, [{"name", "params", "weight_decay"}]: attn, mlp, embed, and none for norms and biases.

    Every parameter is in exactly one; tied weights count once. Raises UserError for a matrix that GROUP_OF does not place.
    """
    groups = {"attn": [], "mlp": [], "embed": [], "none": []}
    for name, p in model.named_parameters():
        homes = ["none"] if p.ndim < 2 else [group for group, ends in GROUP_OF.items() if name.endswith(ends)]
        if len(homes) != 1:
            raise UserError(f"parameter {name} belongs to {len(homes)} weight-decay groups: give it one in model.GROUP_OF")
        groups[homes[0]].append(p)
    placed = [id(p) for params in groups.values() for p in params]
    assert sorted(placed) == sorted({id(p) for p in model.parameters()}), "weight-decay groups must partition the parameters"
    wd = {"attn": attn_wd, "mlp": mlp_wd, "embed": embed_wd, "none": 0.0}
    return [{"name": name, "params": params, "weight_decay": wd[name]} for name, params in groups.items() if params]


class DecoupledSGD(torch.optim.SGD):
    """SGD with AdamW's decay: p *= 1 - lr * weight_decay before the step, instead of an L2 term in the gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        decay = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            group["weight_decay"] = 0.0
        try:
            return super().step(closure)
        finally:
            for group, wd in zip(self.param_groups, decay):
                group["weight_decay"] = wd


def make_optimizers(groups, name, lr, beta1, beta2, eps, momentum, device_type):
    """[torch optimizers] over decay groups. name: adamw, adam (L2 in the gradient, as P1 compares), sgd, or muon
    (the blocks' matrices, the update scaled to AdamW's RMS so that lr means the same; adamw for the rest)."""
    adam = dict(lr=lr, betas=(beta1, beta2), eps=eps, fused=device_type in ("cuda", "cpu") or None)
    if name == "adamw":
        return [torch.optim.AdamW(groups, **adam)]
    if name == "adam":
        return [torch.optim.Adam(groups, **adam)]
    if name == "sgd":
        return [DecoupledSGD(groups, lr=lr, momentum=momentum)]
    if name == "muon":
        matrices, rest = [g for g in groups if g["name"] in ("attn", "mlp")], [g for g in groups if g["name"] in ("embed", "none")]
        return [torch.optim.Muon(matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(rest, **adam)]
    raise UserError(f"--optimizer={name}: expects adamw, adam, sgd or muon")


def load_optimizers(optimizers, saved, path):
    """Takes up the saved state dicts (a list, or the one of a single optimizer) under this command line's hyperparameters;
    lr is the step's. Raises UserError naming `path` where they are not of these optimizers and parameters, or not finite."""
    try:
        for opt, state in zip(optimizers, saved if len(optimizers) > 1 else [saved], strict=True):
            for old, new in zip(state["param_groups"], opt.param_groups):
                old.update({name: value for name, value in new.items() if name not in ("params", "lr")})
            opt.load_state_dict(state)
            if len({frozenset(moments) for moments in opt.state.values()}) > 1 or len(opt.state) not in (
                    0, sum(len(group["params"]) for group in opt.param_groups)):  # 0: saved before its first step
                raise UserError("not all parameters have the same moments")
            for p, moments in opt.state.items():
                for name, x in moments.items():
                    shape = tuple(x.shape) if isinstance(x, torch.Tensor) else () if x is None or type(x) in (int, float) else str(x)[:50]
                    if shape not in ((), tuple(p.shape)) or isinstance(x, torch.Tensor) and not x.isfinite().all():
                        raise UserError(f"{name} of a parameter {tuple(p.shape)} is {shape}, or not finite")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: its optimizer's state does not fit the model ({type(error).__name__}: {str(error)[:200]})") from None
