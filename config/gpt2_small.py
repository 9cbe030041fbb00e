"""
GPT-2 small's shape on one large GPU and whatever text that machine has: Python's library and the installed packages, in GPT-2's BPE.
Not run yet: no GPU has been at hand. Coupled against decoupled decay, some 3 decay time constants; the third line is the sweep over both.

    python prepare_pile.py --source=packages --dataset=packages
    python train_lm.py config/gpt2_small.py --attn_wd=0 --mlp_wd=3.5 --out_dir=out/gpt2_small-0
    python -m scripts.sweep --configs=config/gpt2_small.py --grid="attn_wd+mlp_wd=0:3.5,3.5:3.5" --out_dir=out/gpt2_small
    python analyze.py out/gpt2_small/*/ckpt.pt --out_dir=out/gpt2_small/heads
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
