"""
Model FLOPs of training, forward and backward: 6 N + 12 n_layer n_embd T a token, as PaLM's appendix B and
nanoGPT count them.

N: entries of all matrices that a token meets (embedding look-ups and norms are left out). The second term is
q k^T and its product with v, the causal half counted too.
"""


def matrix_entries(module):
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def flops_per_token(gpt, T):
    """FLOPs of one training token of a GPT, in sequences of T tokens."""
    N = matrix_entries(gpt.transformer.h) + gpt.lm_head.weight.numel()
    return 6 * N + 12 * gpt.args["n_layer"] * gpt.args["n_embd"] * T


def flops_per_image(vit):
    """FLOPs of one training image of a ViT. Its head reads one vector, not each token."""
    args = vit.args
    n_patches = (args["image_size"] // args["patch_size"]) ** 2
    T = n_patches + (args["pool"] == "cls")
    N = matrix_entries(vit.transformer.h)
    ends = vit.transformer.patch.weight.numel() * n_patches + vit.head.weight.numel()
    return 6 * (N * T + ends) + 12 * args["n_layer"] * args["n_embd"] * T * T
