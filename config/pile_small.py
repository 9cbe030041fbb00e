"""
The demo's model on real Pile text in GPT-2's BPE. Any .jsonl.zst of the Pile will do.

    python prepare_pile.py --source=train.jsonl.zst --val_source=val.jsonl.zst --dataset=pile_small
    python train_lm.py config/pile_small.py --attn_wd=0 --out_dir=out/pile-0
    python train_lm.py config/pile_small.py --attn_wd=4 --out_dir=out/pile-4
    python analyze.py out/pile-0 out/pile-4

A run took 8 and 11 minutes on two cores that other jobs shared. Results: results/pile_small.
"""
dataset = "pile_small"
init_from = "auto"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
total_batch_size = 16
attn_wd = 0.0
mlp_wd = 0.1
embed_wd = 0.1
learning_rate = 2e-3
warmup_iters = 50
min_lr = 2e-4
max_iters = 600
eval_interval = 200
eval_iters = 10
rank_interval = 100
snapshot_steps = "every:100"
