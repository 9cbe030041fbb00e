"""
Does the effect of decay on attention depend on how long a model is trained? 0.6 to 12 M tokens, 3 seeds.

    python prepare_pile.py --source=train.jsonl.zst --val_source=val.jsonl.zst --tokenizer=byte \
        --dataset=pile_bytes
    python -m scripts.sweep config/sweep/pile_budget.py --jobs=2

The model and the data are those of config/sweep/pile_bytes.py. Each length has a schedule of its own, and a
decay that makes 5 decay time constants of it: a short run is decayed harder. The runs of 3,000 steps are
the same as there. A run of 6,000 steps takes 19 minutes on one core (results/pile_budget/).
"""
configs = "config/demo.py"
fixed = """
    --dataset=pile_bytes --rank_interval=100 --eval_interval=250 --eval_iters=20 --snapshot_steps=""
"""
grid = (
    "max_iters+warmup_iters+mlp_wd+attn_wd="
    "300:50:15:0,300:50:15:15,1000:100:4.5:0,1000:100:4.5:4.5,"
    "3000:100:1.5:0,3000:100:1.5:1.5,6000:100:0.75:0,6000:100:0.75:0.75;"
    "seed=1,2,3"
)
out_dir = "out/pile_budget"
