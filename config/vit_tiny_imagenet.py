"""
A ViT of 1.2 M parameters on Tiny ImageNet's 64 x 64 pictures in patches of 8, over decay on attention alone.

    python -m scripts.prepare_imagenet --source=tiny_imagenet.tar --short_side=64 --dataset=tiny_imagenet
    for wd in 0 2 6 20; do
        python train_vit.py config/vit_tiny_imagenet.py --attn_wd=$wd --out_dir=out/vit-tiny/$wd
    done
    python analyze.py out/vit-tiny/*

Run on 20 of the 200 classes (8,992 training images, 702 steps, sum(lr) 0.35), 25 to 35 minutes a run on one
core beside other jobs: test accuracy 37.6, 38.1, 37.2, 35.4 %; rank95 of QK 29.0, 28.8, 25.4, 1.5 of 32,
of OV 29.0, 29.0, 27.1, 1.9 (results/vit_tiny).
"""
dataset = "tiny_imagenet"
init_from = "auto"
image_size = 64
eval_resize = 64
variant = "Ti/8"
n_layer = 6
n_head = 4
n_embd = 128
total_batch_size = 128
batch_size = 128
crop_area = 0.25
randaug_layers = 0
mixup = 0.2
attn_wd = 0.0
mlp_wd = 0.1
embed_wd = 0.1
learning_rate = 1e-3
warmup_iters = 80
epochs = 10
log_interval = 20
eval_interval = 80
eval_iters = 4
rank_interval = 40
snapshot_steps = "log:8"
