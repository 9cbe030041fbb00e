"""
A ViT of 0.3 M parameters on scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: nothing to download.

    python train_vit.py config/vit_demo.py --attn_wd=0 --out_dir=out/vit-demo-0
    python train_vit.py config/vit_demo.py --attn_wd=4 --out_dir=out/vit-demo-4
    python analyze.py out/vit-demo-0 out/vit-demo-4

A run takes 75 s of CPU time. Reached, one seed, without and with decay on attention: test accuracy 95.4 % and
98.0 % on one thread, 97.4 % and 97.7 % on two (350 images); mean rank95 of QK 18.0 and 6.1 of 20, of OV 18.0
and 7.3.
"""
dataset = "digits"
init_from = "auto"
image_size = 8
eval_resize = 8
variant = "Ti/2"
n_layer = 4
n_head = 4
n_embd = 80
total_batch_size = 64
batch_size = 64
crop_area = 0.6
flip = 0.0              # a mirrored 5 is no digit
randaug_layers = 0
mixup = 0.0
attn_wd = 0.0
mlp_wd = 0.1
embed_wd = 0.1
learning_rate = 2e-3
warmup_iters = 50
max_iters = 800
log_interval = 50
eval_interval = 200
eval_iters = 10
rank_interval = 50
snapshot_steps = "every:200"
