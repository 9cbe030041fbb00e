"""
Growth of the parameter norm over learning rate x decay of everything, under AdamW and SGD: 24 runs.

    python -m scripts.sweep config/sweep/norm_growth.py --jobs=2

A byte-level GPT of two layers; the question is that of Merrill et al. 2021. Reached: without decay the
norm grows in every run, by 4 to 79 % in 150 steps (results/norm_growth/).
"""
configs = "config/demo.py"
fixed = """
    --n_layer=2 --n_head=2 --n_embd=64 --max_iters=150 --warmup_iters=15
    --rank_interval=15 --eval_interval=150 --snapshot_steps=""
"""
grid = (
    "optimizer+learning_rate+min_lr=adamw:1e-3:1e-4,adamw:3e-3:3e-4,adamw:1e-2:1e-3,"
    "sgd:0.03:0.003,sgd:0.1:0.01,sgd:0.3:0.03;"
    "attn_wd+mlp_wd+embed_wd=0,0.03,0.3,3"
)
out_dir = "out/norm_growth"
rows = "learning_rate"
columns = "attn_wd"
metric = "norm_growth"
