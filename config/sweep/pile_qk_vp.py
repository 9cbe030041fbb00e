"""
Which half of attention's decay costs perplexity: that of W_Q and W_K, or that of W_V and P? 3 seeds, 12 runs.

    python prepare_pile.py --source=train.jsonl.zst --val_source=val.jsonl.zst --tokenizer=byte \
        --dataset=pile_bytes
    python -m scripts.sweep config/sweep/pile_qk_vp.py --jobs=2

Model, data and steps are those of config/sweep/pile_bytes.py, at its strongest decay, some 5 decay time
constants. attn_wd is that of W_V and P, qk_wd that of W_Q and W_K; -1: as attn_wd. The runs without decay on
attention and with decay on all of it are the same as there. A run takes 9 minutes on one core.
"""
configs = "config/demo.py"
fixed = """
    --dataset=pile_bytes --max_iters=3000 --warmup_iters=100 --mlp_wd=1.5
    --rank_interval=100 --eval_interval=250 --eval_iters=20 --snapshot_steps=""
"""
grid = "seed=1,2,3; attn_wd+qk_wd=0:-1,0:1.5,1.5:0,1.5:-1"
out_dir = "out/pile_qk_vp"
columns = "qk_wd"
against = "attn_wd=0, qk_wd=-1"
