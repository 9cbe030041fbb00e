"""
Attention without decay against coupled decay on Pile text: 2 learning rates x 5 seeds, 20 runs.

    python prepare_pile.py --source=train.jsonl.zst --val_source=val.jsonl.zst --dataset=pile_small
    python -m scripts.sweep config/sweep/pile.py --jobs=2

The model is that of config/sweep/wd_grid.py in GPT-2's BPE: 3.4 M parameters, 3.2 M of them the
embedding. A run takes some 5 minutes on one of two cores. Reached, test perplexity without and with decay
of attention: 169 and 145 at learning rate 4e-3, 249 and 219 at 2e-3 (results/pile/). After 300 steps
decay of attention helps.
"""
configs = "config/pile_small.py"
fixed = """
    --n_head=2 --n_embd=64 --warmup_iters=40 --max_iters=300
    --rank_interval=50 --eval_interval=100 --snapshot_steps="" --embed_wd=0.1
"""
grid = "learning_rate+min_lr=4e-3:4e-4,2e-3:2e-4; seed=1,2,3,4,5; attn_wd+mlp_wd=0:4,4:4"
out_dir = "out/pile"
