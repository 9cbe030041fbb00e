"""
A GPT checkpoint with the products of every head cut to their threshold rank.

    raw = truncatable(ckpt)                              # the file's dict
    save_truncated("small.pt", ckpt, raw, threshold=0.95)
    python train_lm.py --init_from=small.pt --eval_only --block_size=128    # the checkpoint's
"""
import os

import torch

from nanorank.errors import UserError
from nanorank.files import load_pt, save_pt
from nanorank.spectra import ov_factors, qk_factors, ranks, svd


def truncated(state, n_head, threshold):
    """(state dict, mean k of W_K^T W_Q, mean k of P W_V): every head cut to its threshold rank k.

    With W_K^T W_Q = U S V^T, the new W_K is S^(1/2) U^T and the new W_Q is S^(1/2) V^T, with zeros in
    the rows beyond k; P and W_V likewise. At threshold 1.0 the model computes the same function.
    The biases keep their effect. The value's moves into the output's. The key's adds the same number
    to all scores of a query, which the softmax cancels. The query's: see move_query_bias.
    """
    state = dict(state)
    kept_qk, kept_ov = [], []
    for name in [name for name in state if name.endswith("attn.c_attn.weight")]:
        path = name.removesuffix("c_attn.weight")
        dtype = state[name].dtype
        d = state[name].shape[1]
        r = d // n_head
        W_Q, W_K, W_V = state[name].double().view(3, n_head, r, d)
        P = state[path + "c_proj.weight"].double().view(d, n_head, r).transpose(0, 1)  # (H, d, r)
        U, root, V, k = cut(*qk_factors(W_Q, W_K), threshold)
        new_K, new_Q = U * root, V * root
        kept_qk += k.tolist()

        bias = state.get(path + "c_attn.bias")
        if bias is not None:
            b_q, _, b_v = bias.double().view(3, n_head, r, 1)
            b_q = move_query_bias(new_K, U, root, k, g=W_K.mT @ b_q)
            state[path + "c_attn.bias"] = torch.cat([b_q.reshape(d), torch.zeros(2 * d)]).to(bias.dtype)
            b_o = state[path + "c_proj.bias"].double() + (P @ b_v).sum(0)[:, 0]
            state[path + "c_proj.bias"] = b_o.to(bias.dtype)

        U, root, V, k = cut(*ov_factors(W_V, P), threshold)
        new_P, new_V = U * root, V * root
        kept_ov += k.tolist()
        new = torch.cat([W.mT.reshape(d, d) for W in (new_Q, new_K, new_V)])
        state[name] = new.to(dtype)
        state[path + "c_proj.weight"] = new_P.transpose(0, 1).reshape(d, d).to(dtype)
    return state, sum(kept_qk) / len(kept_qk), sum(kept_ov) / len(kept_ov)


def cut(A, B, threshold):
    """(U, root, V, k) of A B^T = U S V^T: root (H, 1, r), S^(1/2), is 0 beyond the threshold rank k (H,)."""
    U, s, V = svd(A, B)
    k = ranks(s, threshold)
    stays = torch.arange(s.shape[-1]) < k[:, None]
    return U, torch.where(stays, s, 0).sqrt()[:, None], V, k


def move_query_bias(new_K, U, root, k, g):
    """The query's new bias (H, r, 1): new_K @ bias is to be g = W_K^T b_q (H, d, 1), as before.

    If k < r, the free column k of new_K (H, d, r) takes g. Else b_q is written in the new basis.
    """
    H, _, r = new_K.shape
    b_q = new_K.new_zeros(H, r, 1)
    for h in range(H):
        if k[h] < r:
            size = g[h].norm().sqrt()
            b_q[h, k[h]] = size
            new_K[h, :, k[h]] = g[h, :, 0] / size.clamp(min=1e-300)
        else:
            b_q[h] = (U[h].mT @ g[h]) / root[h].mT
    return b_q


def truncatable(checkpoint):
    """The dict in a checkpoint's file. Raises UserError if it is not a GPT of train_lm.py or nanoGPT."""
    path = checkpoint.path
    raw = load_pt(path) if os.path.isfile(path) and not path.endswith(".safetensors") else {}
    modules = checkpoint.modules()
    biases = [name for name in checkpoint.tensors if name.endswith(("attn.c_attn.bias", "attn.c_proj.bias"))]
    has_args = isinstance(raw.get("model_args"), dict) and isinstance(raw.get("config") or {}, dict)
    is_gpt = modules[0].scheme.layout == "conv" and len(biases) in (0, 2 * len(modules))
    if not has_args or not is_gpt:
        raise UserError(f"{path}: --truncate takes a GPT checkpoint of train_lm.py or nanoGPT (model_args)")
    args = raw["model_args"]
    grouped = args.get("n_kv_head", 0) not in (0, args.get("n_head"))
    if args.get("rope") or args.get("qk_norm") or grouped:
        raise UserError(f"{path}: --truncate cuts W_K^T W_Q and P W_V of each head as free products; in a "
                        "model with rope, qk_norm or n_kv_head they are none")
    return raw


def save_truncated(path, checkpoint, raw, threshold):
    """Writes the truncated checkpoint and prints how to evaluate it. raw: from truncatable."""
    n_head, _ = checkpoint.heads_of(checkpoint.modules()[0])
    state, qk, ov = truncated(checkpoint.read(checkpoint.tensors), n_head, threshold)
    keep = {key: raw[key] for key in ("model_args", "iter_num", "best_val_loss", "config") if key in raw}
    save_pt(path, {"model": state, **keep, "truncated": threshold})

    dataset = raw.get("config", {}).get("dataset", "DATASET")
    width = raw["model_args"]["n_embd"] // n_head
    print(f"\nwrote {path}: of {width} directions a head {qk:.2f} stay in QK, {ov:.2f} in OV (means)")
    print(f"evaluate it:\n    python train_lm.py --init_from={path} --eval_only --dataset={dataset} "
          f"--block_size={raw['model_args']['block_size']}")
