"""
A checkpoint, and the attention heads of anything, for a notebook.

    ckpt = open_checkpoint("out/demo-4")       # a run folder: its last checkpoint
    for layer in attention_layers(model):      # or of a state dict, or a path
        print(metrics(layer.P, layer.W_V.mT)["rank95"])
"""
import os

import torch

from nanorank.checkpoints import Checkpoint, expand
from nanorank.errors import UserError
from nanorank.families import attention_layers as of_state_dict
from nanorank.live import LiveModel, without_dashes


def open_checkpoint(path, **options):
    """The Checkpoint at a path: a file, a run folder (its last one), a Hugging Face folder or hub id.

    options: Checkpoint's, such as n_head. Raises UserError where there is none, or none that can be read.
    """
    with without_dashes():
        return Checkpoint(expand([os.fspath(path)])[-1], **options)


def attention_layers(source, n_head=0, **options):
    """Yields the AttentionLayer (W_Q, W_K, W_V (H, r, d), P (H, d, r)) of each layer, in order.

    source: a torch.nn.Module, a state dict {name: tensor}, a path or hub id, or a Checkpoint.
    n_head: heads per layer, where neither a config, attributes of modules nor shapes tell.
    options: pattern and layout for names that schemes.SCHEMES lacks; of a path, all of Checkpoint's.
    Raises UserError where no attention is found, and where nothing tells the number of heads.
    """
    if isinstance(source, torch.nn.Module):
        layers = LiveModel(source, n_head, **options).attention_layers()
    elif isinstance(source, dict):
        if not any(isinstance(value, torch.Tensor) for value in source.values()):
            raise UserError("attention_layers: no tensors in this dict; give its state dict, "
                            f"one of {', '.join(map(str, source))[:200]}")
        layers = of_state_dict(source, n_head, **options)
    elif isinstance(source, Checkpoint):
        layers = source.attention_layers()
    else:
        layers = open_checkpoint(source, n_head=n_head, **options).attention_layers()
    with without_dashes():
        yield from layers
