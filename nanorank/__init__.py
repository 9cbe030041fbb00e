"""
Rank of attention heads and weight decay by role, for notebooks and other trainers.

    from nanorank import attention_layers, metrics, open_checkpoint    # docs/tour.ipynb
    from nanorank import RankLogger, decay_groups                      # docs/your-own-loop.md
"""
from nanorank.decay import decay_groups
from nanorank.notebook import attention_layers, open_checkpoint
from nanorank.spectra import metrics
from nanorank.watch import RankLogger

__all__ = ["RankLogger", "attention_layers", "decay_groups", "metrics", "open_checkpoint"]
