"""
Attention without decay against coupled decay for a smaller sibling of GPT-2 small: 3 seeds, 12 runs.

    python -m scripts.sweep config/sweep/gpt2_sibling.py --jobs=2

6 layers, 6 heads of 64; the data set is that of config/gpt2_small.py. Meant for one large GPU and not run
yet: leave --jobs=2 out where two runs do not fit on it.
"""
configs = "config/gpt2_small.py"
fixed = """
    --n_layer=6 --n_head=6 --n_embd=384 --learning_rate=2e-3 --min_lr=2e-4 --warmup_iters=60 --max_iters=600
    --snapshot_steps="" --eval_interval=200
"""
grid = "attn_wd+mlp_wd=0:1.2,1.2:1.2,0:4,4:4; seed=1,2,3"
out_dir = "out/gpt2_sibling"
