"""
Sampling from a GPT.
"""
import math

import torch
from torch.nn import functional as F

from nanorank.errors import UserError


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, n_tokens=None, generator=None):
    """Continues idx (B, T) by sampled tokens -> (B, T + max_new_tokens).

    temperature 0 takes the likeliest token; top_k > 0 samples among that many; ids from n_tokens on
    (padding of the vocabulary) are barred. Raises UserError for logits that are not finite.
    """
    for _ in range(max_new_tokens):
        x = model.hidden(idx[:, -model.args["block_size"]:])
        logits = model.lm_head(x[:, -1])[:, :n_tokens].float()  # (B, n_tokens)
        if not logits.isfinite().all():
            raise UserError("its logits are not finite: weights that are damaged, or overflow")
        if temperature == 0:
            next_token = logits.argmax(-1, keepdim=True)
        else:
            if top_k:
                top = logits.topk(min(top_k, logits.shape[-1])).values
                logits = logits.masked_fill(logits < top[:, -1:], -math.inf)
            probs = F.softmax(logits / temperature, dim=-1)
            next_token = torch.multinomial(probs, 1, generator=generator)
        idx = torch.cat([idx, next_token], dim=1)
    return idx
