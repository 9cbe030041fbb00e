"""
Decay of attention as it is built today: rotary positions, QK-norm, grouped queries, 3 seeds, 45 runs.

    python prepare_pile.py --source=train.jsonl.zst --val_source=val.jsonl.zst --tokenizer=byte \\
        --dataset=pile_bytes
    python -m scripts.sweep config/sweep/modern_attention.py --jobs=2

The model is that of config/sweep/wd_grid.py, on bytes of Pile text: 4 layers, 2 heads of 32, with
n_kv_head=1 one key/value head for both. The learning rates sum to 2.2, so attn_wd 0.45 and 1.35 make
about 1 and 3 decay time constants. A run takes about 80 s on one core. Reached: QK-norm keeps the rank of QK
(rank95 18.1 to 16.8 of 32 with rotary positions, 14.9 to 8.9 without the norm), rotary planes stay on, and
stacked products lose rank (results/modern_attention/).
"""
configs = "config/demo.py"
fixed = """
    --dataset=pile_bytes --n_head=2 --n_embd=64 --learning_rate=4e-3 --min_lr=4e-4 --warmup_iters=100
    --max_iters=1000 --rank_interval=50 --eval_interval=250 --snapshot_steps="" --mlp_wd=0.45 --embed_wd=0.1
"""
grid = (
    "seed=1,2,3;"
    "rope+qk_norm+n_kv_head=False:False:0,True:False:0,False:True:0,True:True:0,True:False:1;"
    "attn_wd=0,0.45,1.35"
)
out_dir = "out/modern_attention"
columns = "rope"
