"""
N3: does the norm of the parameters grow or shrink? Learning rate x decay of everything, AdamW and SGD, 24 runs of a byte-level GPT.

    python -m scripts.sweep config/sweep/norm_growth.py --jobs=2
"""
configs = "config/demo.py"
fixed = """
    --n_layer=2 --n_head=2 --n_embd=64 --max_iters=150 --warmup_iters=15 --rank_interval=15 --eval_interval=150 --snapshot_steps=""
"""
grid = """
    optimizer+learning_rate+min_lr=adamw:1e-3:1e-4,adamw:3e-3:3e-4,adamw:1e-2:1e-3,sgd:0.03:0.003,sgd:0.1:0.01,sgd:0.3:0.03
    attn_wd+mlp_wd+embed_wd=0,0.03,0.3,3
"""
out_dir = "out/sweep_n3"
rows = "learning_rate"
columns = "attn_wd"
metric = "norm_growth"
