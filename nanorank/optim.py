"""
An optimizer that torch lacks.
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
