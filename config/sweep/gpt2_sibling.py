"""
T1's question for a smaller sibling of GPT-2 small (6 layers, 6 heads of 64), 3 seeds, 12 runs, on one large GPU; the data set is
config/gpt2_small.py's. Not run yet: no GPU has been at hand.

    python -m scripts.sweep config/sweep/gpt2_sibling.py
"""
configs = "config/gpt2_small.py"
fixed = """
    --n_layer=6 --n_head=6 --n_embd=384 --learning_rate=2e-3 --min_lr=2e-4 --warmup_iters=60 --max_iters=600
    --snapshot_steps="" --eval_interval=200
"""
grid = "attn_wd+mlp_wd=0:1.2,1.2:1.2,0:4,4:4; seed=1,2,3"
out_dir = "out/sweep_gpt2_sibling"
