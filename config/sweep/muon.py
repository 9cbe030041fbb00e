"""
Decay of attention under Muon, 3 seeds: 9 runs with the model and steps of config/sweep/wd_grid.py.

    python -m scripts.sweep config/sweep/muon.py --jobs=2

Muon updates the matrices of the blocks, W_Q, W_K and W_V each for itself, AdamW the rest. Reached: test
perplexity 7.65, 8.30 and 9.24 at attn_wd 0, 1.2 and 4 (results/muon/).
"""
configs = "config/demo.py"
fixed = """
    --n_head=2 --n_embd=64 --learning_rate=4e-3 --min_lr=4e-4 --warmup_iters=40 --max_iters=400
    --rank_interval=40 --eval_interval=100 --snapshot_steps="" --embed_wd=0.1 --optimizer=muon
"""
grid = "attn_wd=0,1.2,4; mlp_wd=1.2; seed=1,2,3"
out_dir = "out/muon"
