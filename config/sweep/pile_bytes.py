"""
Decay on attention or not, at three strengths, on real Pile text read as bytes: 30 runs of 6.1 M tokens.

    python prepare_pile.py --source=train.jsonl.zst --val_source=val.jsonl.zst --tokenizer=byte \
        --dataset=pile_bytes
    python -m scripts.sweep config/sweep/pile_bytes.py --jobs=2

The model is the demo's. Each strength is trained twice from the same initialisation, on the same data:
without decay on attention, and with the decay of the MLPs. The strengths are some 0.5, 1.5 and 5 decay time
constants. A run takes 9 minutes on one core.
"""
configs = "config/demo.py"
fixed = """
    --dataset=pile_bytes --max_iters=3000 --warmup_iters=100
    --rank_interval=100 --eval_interval=250 --eval_iters=20 --snapshot_steps=""
"""
grid = "seed=1,2,3,4,5; attn_wd+mlp_wd=0:0.15,0.15:0.15,0:0.45,0.45:0.45,0:1.5,1.5:1.5"
out_dir = "out/pile_bytes"
