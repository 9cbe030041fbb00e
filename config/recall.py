"""
Associative recall: two layers of attention alone, one head of width 64 each, 8 pairs and 8 queries; no data.

    for wd in 0 0.1 0.3 0.6 1 1.5 2; do
        python train_lm.py config/recall.py --attn_wd=$wd --embed_wd=$wd --out_dir=out/recall/$wd
    done
    python -m scripts.figures recall out/recall

A run takes 59 s on one core. sum(lr) is 1.65, so decay 1 acts over 1.65 time constants. Reached, one seed:
accuracy 100 % for decay up to 1, where rank95 of QK falls from 15.5 to 4.5 and of OV from 23.5 to 10.5. From
decay 1.5 on it is 26 %: the look-up is never found (results/recall). In trials of 1000 to 2600 steps larger
learning rates, more heads of less width, and MLPs in the blocks did not find it either.
"""
dataset = "recall"
init_from = "auto"
n_layer = 2
n_head = 1
n_embd = 64
mlp = False
block_size = 32
batch_size = 64
total_batch_size = 64
attn_wd = 0.0
mlp_wd = 0.0
embed_wd = 0.0
learning_rate = 1e-3
warmup_iters = 100
min_lr = 1e-4
max_iters = 3000
log_interval = 100
eval_interval = 250
eval_iters = 8
rank_interval = 100
