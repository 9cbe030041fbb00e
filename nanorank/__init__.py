"""
Rank and norms of attention heads, for notebooks and other trainers.

    from nanorank import attention_layers, metrics
"""
from nanorank.families import attention_layers
from nanorank.spectra import metrics

__all__ = ["attention_layers", "metrics"]
