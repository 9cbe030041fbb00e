"""
T1, F3a: decay of attention x decay of the MLPs x 5 seeds, 60 runs of a byte-level GPT of 0.2 M parameters on Python's standard library.

    python -m scripts.sweep config/sweep/wd_grid.py --jobs=2
"""
configs = "config/demo.py"
fixed = """
    --n_head=2 --n_embd=64 --learning_rate=4e-3 --min_lr=4e-4 --warmup_iters=40 --max_iters=400
    --rank_interval=40 --eval_interval=100 --snapshot_steps="" --embed_wd=0.1
"""
grid = "attn_wd=0,0.4,1.2,4; mlp_wd=0.4,1.2,4; seed=1,2,3,4,5"
out_dir = "out/sweep_t1"
