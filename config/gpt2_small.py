"""
GPT-2 small's shape on one large GPU, on Python's library and the installed packages, in GPT-2's BPE.

    python prepare_pile.py --source=packages --dataset=packages
    python train_lm.py config/gpt2_small.py --attn_wd=0 --mlp_wd=3.5 --out_dir=out/gpt2_small-0
    python -m scripts.sweep --configs=config/gpt2_small.py --grid="attn_wd+mlp_wd=0:3.5,3.5:3.5" \\
        --out_dir=out/gpt2_small
    python analyze.py out/gpt2_small/*/ckpt.pt --out_dir=out/gpt2_small/heads

The sweep compares decay on attention (3.5, about 3 decay time constants) with none. Not run yet: no GPU
was at hand.
"""
dataset = "packages"
init_from = "auto"
batch_size = 32
warmup_iters = 150
max_iters = 1500
eval_interval = 250
eval_iters = 4
rank_interval = 50
snapshot_steps = "every:250"
