"""
L(w) = (w - MINIMUM)^T HESSIAN (w - MINIMUM) / 2 of two parameters, w free or a product a b elementwise.

    dA = gradient(A)                                    # A (1 or 2, ..., 2): w, or a and b
    w = minimum(torch.tensor([[0.3]]), power=1)         # argmin L(w) + 0.3 |w|_1
"""
import torch

# our own choice, to float32's digits, as in results/theory
MINIMUM = torch.tensor([1.0, 0.3], dtype=torch.float32).double()
HESSIAN = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float32).double()


def loss(w):
    """L of w (..., 2) -> (...)."""
    return ((w - MINIMUM) @ HESSIAN * (w - MINIMUM)).sum(-1) / 2


def gradient(A, noise=0.0, generator=None):
    """dL/dA, shaped like A (1 or 2, ..., 2); w is A[0], or A[0] A[1] elementwise.

    noise: standard deviation of Gaussian noise on dL/dw.
    """
    g = (A.prod(0) - MINIMUM) @ HESSIAN
    g = g + noise * torch.randn(g.shape, generator=generator)
    return g * A.flip(0) if len(A) == 2 else g[None]  # dL/da = b dL/dw


def minimum(strength, power):
    """argmin L(w) + strength / power * sum |w_i|^power by proximal gradient, for power 1, 1.5 or 2.

    strength (n, 1) -> (n, 2).
    """
    w = torch.zeros(len(strength), 2)
    c = 0.5 * strength  # 0.5: the step
    for _ in range(2000):
        w = w - 0.5 * (w - MINIMUM) @ HESSIAN
        if power == 1:
            magnitude = (w.abs() - c).clamp(min=0)
        elif power == 1.5:
            magnitude = ((c**2 + 4 * w.abs()).sqrt() - c) ** 2 / 4
        else:
            magnitude = w.abs() / (1 + c)
        w = w.sign() * magnitude
    return w
