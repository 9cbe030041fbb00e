"""
Decay on attention alone for a Vision Transformer on 20 classes of Tiny ImageNet, three seeds: 6 runs.

    python -m scripts.prepare_imagenet --source=tiny_imagenet_20.tar --short_side=64 \
        --dataset=tiny_imagenet_20
    python -m scripts.sweep config/sweep/vit_tiny.py --jobs=2

A run takes 13 minutes on one core.
"""
trainer = "train_vit.py"
configs = "config/vit_tiny_imagenet.py"
fixed = '--dataset=tiny_imagenet_20 --snapshot_steps=""'
grid = "seed=1,2,3; attn_wd=0,6"
out_dir = "out/vit_tiny"
against = "attn_wd=6"
