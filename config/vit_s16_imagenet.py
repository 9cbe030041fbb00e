"""
ViT-S/16 on ImageNet-1k by the plain baseline of Beyer, Zhai, Kolesnikov 2022 (arXiv 2205.01580; big_vision's
configs/vit_s16_i1k.py).

    python -m scripts.prepare_imagenet                                     # once; ILSVRC/imagenet-1k is gated
    torchrun --nproc_per_node=8 train_vit.py config/vit_s16_imagenet.py    # decay on attention, as published
    torchrun --nproc_per_node=8 train_vit.py config/vit_s16_imagenet.py --attn_wd=0 --out_dir=out/vit-s16-0

90 epochs, 111,500 steps of 1024 images. Published: 76 to 77 % top-1 on the official validation set, 6 to 7
hours on a TPU v3-8. Not yet run here: no GPU was at hand. Their decay, 1e-4, is multiplied by the schedule
alone, torch's by the learning rate too: with a peak of 1e-3 theirs is 0.1 here. sum(lr) is about 56, so 0.1
acts over 5.6 decay time constants.

Differences from their code:
- GELU is exact, theirs the tanh formula. Norms divide by sqrt(var + 1e-5), theirs 1e-6.
- Blocks start from a normal Xavier, theirs a uniform one.
- Their head has a tanh layer before it, which their paper finds unneeded.
- Adam's first moment is float32, theirs bfloat16.
- mixup takes pairs with a lambda each, theirs one lambda a batch.
- Crops are taken from images whose short side is stored at 256.
"""
dataset = "imagenet"
init_from = "auto"
variant = "S/16"
image_size = 224
eval_resize = 256
total_batch_size = 1024
batch_size = 128
epochs = 90
learning_rate = 1e-3
warmup_iters = 10_000
attn_wd = 0.1
mlp_wd = 0.1
embed_wd = 0.1
randaug_layers = 2
randaug_magnitude = 10
mixup = 0.2
eval_interval = 2500
rank_interval = 1000
snapshot_steps = "every:10000"
out_dir = "out/vit-s16"
