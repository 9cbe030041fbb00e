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

    p.n_matrices: how many matrices of the same shape the rows of p hold, 1 where there is no such attribute.
    As one matrix, W_Q and W_K would hardly learn: orthogonalising W_Q, W_K and W_V together keeps the ratios
    of their gradients, and those of W_V are the largest. The momentum is kept in the shape of p.
    """

    def _init_group(self, group, params, grads, momentum_buffers):
        stacked = [], [], []
        has_complex = super()._init_group(group, *stacked)
        for p, grad, momentum_buffer in zip(*stacked):
            n = getattr(p, "n_matrices", 1)
            if len(p) % n:
                raise ValueError(f"a parameter {tuple(p.shape)} does not stack {n} matrices of one shape")
            # views: the step changes p and its buffer in place
            params += p.chunk(n)
            grads += grad.chunk(n)
            momentum_buffers += momentum_buffer.chunk(n)
        return has_complex
