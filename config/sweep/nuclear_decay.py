"""
L2 against nuclear decay of W_Q and W_K under QK-norm, 3 seeds: 18 runs.

    python -m scripts.sweep config/sweep/nuclear_decay.py --jobs=2

Model, data and steps are those of config/sweep/modern_attention.py, V and P always have 1 decay time
constant. Under QK-norm a change of the norms of W_Q and W_K changes nothing but the effective learning
rate, so L2 is not expected to lower the rank of QK; nuclear decay is. The learning rates sum to 2.2: L2
makes 0, 1 and 3 time constants, nuclear decay takes 0.11, 0.33 and 1 off each singular value, whose median
without decay is some 0.2. A run takes about 80 s on one core. Reached: rank95 of QK 13.2, 10.3, 9.5 of 32
under L2 and 8.7, 6.2, 4.3 under nuclear decay (results/nuclear_decay/).
"""
configs = "config/demo.py"
fixed = """
    --dataset=pile_bytes --n_head=2 --n_embd=64 --learning_rate=4e-3 --min_lr=4e-4 --warmup_iters=100
    --max_iters=1000 --rank_interval=50 --eval_interval=250 --snapshot_steps="" --mlp_wd=0.45 --embed_wd=0.1
    --qk_norm --attn_wd=0.45
"""
grid = (
    "seed=1,2,3;"
    "qk_decay+qk_wd=l2:0,l2:0.45,l2:1.35,nuclear:0.05,nuclear:0.15,nuclear:0.45"
)
out_dir = "out/nuclear_decay"
rows = "qk_wd"
columns = "qk_decay"
