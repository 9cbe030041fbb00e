"""
Optimizers that torch lacks.
"""
import torch


class DecoupledSGD(torch.optim.SGD):
    """SGD with AdamW's decay: p *= 1 - lr * weight_decay, instead of an L2 term in the gradient."""

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


class Muon(torch.optim.Muon):
    """torch's Muon; a parameter that stacks several matrices is updated matrix by matrix.

    p.rows: how many rows of p each matrix has. Without such an attribute p is one matrix.
    As one matrix, W_Q and W_K would hardly learn: orthogonalising W_Q, W_K and W_V together keeps the ratios
    of their gradients, and those of W_V are the largest. The momentum is kept in the shape of p.
    """

    def _init_group(self, group, params, grads, momentum_buffers):
        stacked = [], [], []
        has_complex = super()._init_group(group, *stacked)
        for p, grad, momentum_buffer in zip(*stacked):
            rows = getattr(p, "rows", len(p))
            # views: the step changes p and its buffer in place
            params += p.split(rows)
            grads += grad.split(rows)
            momentum_buffers += momentum_buffer.split(rows)
        return has_complex


# ------------------------------------------------------------ a decay of W_Q and W_K of their own

def own_decay(model, attn_wd, qk_wd, qk_decay):
    """Entries of the group attn that leave its decay to decay_by_rows. qk_wd -1: attn_wd.

    None where that and qk_decay "l2" say nothing new.
    """
    if qk_wd < 0 and qk_decay == "l2":
        return {}
    return {
        "weight_decay": 0.0,
        "attn_wd": attn_wd,
        "qk_wd": attn_wd if qk_wd < 0 else qk_wd,
        "qk_decay": qk_decay,
        "head_width": model.args["n_embd"] // model.args["n_head"],
    }


def decay_rates(groups):
    """{name: weight decay} of all groups, and of "qk" or "qk_nuclear" where W_Q and W_K have their own."""
    rates = {}
    for group in groups:
        rates[group["name"]] = group.get("attn_wd", group["weight_decay"])
        if "qk_wd" in group:
            name = "qk_nuclear" if group["qk_decay"] == "nuclear" else "qk"
            rates[name] = group["qk_wd"]
    return rates


@torch.no_grad()
def decay_by_rows(groups, lr, optimizer):
    """Decays W_Q and W_K by qk_wd, W_V and P by attn_wd: call it before the optimizers' step.

    Does nothing to groups without an own_decay. With optimizer "adam" the decay goes into the gradient (L2),
    as torch's does, else W *= 1 - lr * wd. A step that float16's scaler skips is decayed all the same.

    qk_decay "nuclear": see shrink_singular_values.
    """
    for group in groups:
        if "qk_wd" not in group:
            continue
        for p in group["params"]:
            n_qk = sum(getattr(p, "rows", [])[:2])  # rows of W_Q and W_K; P has none
            if group["qk_decay"] == "nuclear":
                heads = p[:n_qk].view(-1, group["head_width"], p.shape[1])
                shrink_singular_values(heads, lr * group["qk_wd"])
            else:
                decay(p, slice(n_qk), group["qk_wd"], lr, optimizer)
            decay(p, slice(n_qk, None), group["attn_wd"], lr, optimizer)


def decay(p, rows, wd, lr, optimizer):
    if optimizer == "adam":
        p.grad[rows] += wd * p[rows]
    else:
        p[rows] *= 1 - lr * wd


def shrink_singular_values(W, size):
    """W (..., r, d), r <= d, in place: every singular value falls by `size`, none below zero.

    W -= size U V^T, with W = U S V^T, is decoupled decay by the nuclear norm: it lowers rank where a norm of
    q and k makes L2 a mere change of scale (arXiv 2606.04405). At zero U V^T jumps, and singular values
    would swing around it. So it is the polar factor of [W, size I] that is taken, its first d columns: a
    singular value s falls by size * s / sqrt(s^2 + size^2), which is size where s is much larger.
    """
    if size == 0 or W.numel() == 0:
        return
    eye = torch.eye(W.shape[-2], dtype=W.dtype, device=W.device)
    stacked = torch.cat([W, size * eye.expand(*W.shape[:-1], -1)], dim=-1)
    W -= size * polar_factor(stacked)[..., :W.shape[-1]]


def polar_factor(W, steps=20):
    """U V^T of W = U S V^T (..., r, d), r <= d, by Newton-Schulz.

    A step maps a singular value x in [0, 1] to (15 x - 10 x^3 + 3 x^5) / 8, which rises to 1 and never
    beyond. Singular values above 1e-4 of the Frobenius norm reach 1; smaller ones grow 1.875-fold a step.
    """
    eye = torch.eye(W.shape[-2], dtype=W.dtype, device=W.device)
    X = W / torch.linalg.matrix_norm(W, keepdim=True)
    for _ in range(steps):
        A = X @ X.mT
        X = (15 * eye - 10 * A + 3 * A @ A) / 8 @ X
    return X
