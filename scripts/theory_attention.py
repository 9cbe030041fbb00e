"""
Does |P^T P - W_V W_V^T| of a transformer fall as exp(-2 lam t)? Under gradient descent it must, for any loss.

    python -m scripts.theory --problem=attention

The transformer of Kobayashi et al. 2024: two layers of attention alone on associative recall, here with the
shapes of config/recall.py. Decay is on W_Q, W_K, W_V and P alone. Each step sees new rows, so the gradient
is noisy. t is the sum of step sizes; momentum's are divided by 1 - beta, the mean life of its steps.
"""
import itertools
import math

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import GPT, decay_groups, init_weights
from nanorank.errors import UserError
from nanorank.notebook import attention_layers
from nanorank.spectra import factors_of, metrics
from nanorank.tasks import TASKS, TaskSplit

BLOCK_SIZE = 32   # 8 pairs and 8 queries
N_EMBD = 64       # a head a layer
BATCH_SIZE = 32
VAL_ROWS = 256
BETA = 0.9        # of momentum; the Adams have torch's own
LR = {"gd": 0.3, "momentum": 0.03, "adam_l2": 1e-3, "adamw": 1e-3}


def step_size(name):
    """By how much t grows in a step."""
    return LR[name] / (1 - BETA) if name == "momentum" else LR[name]


def strength(name, lam):
    """The decay that an optimizer gets for L2 of strength lam.

    Adam with L2 minimises the same loss as gd. AdamW's decay is decoupled; it gets gd's decay of a step.
    """
    return lam * LR["gd"] / LR["adamw"] if name == "adamw" else lam


def start(seed):
    """The GPT at step 0; from GPT-2's smaller initialisation gradient descent stays on a plateau."""
    model = GPT(vocab_size=TASKS["recall"][0], block_size=BLOCK_SIZE, n_layer=2, n_head=1, n_embd=N_EMBD,
                bias=False, tied=False, mlp=False)  # biases would be columns of the factors without decay
    init_weights(model, seed)
    for name, p in model.named_parameters():
        if ".attn." in name:
            p.data *= N_EMBD**-0.5 / p.std()
        elif "wte" in name or "wpe" in name:
            p.data *= 0.3 / p.std()
    return model.float()


def make_optimizer(name, model, lam):
    groups = decay_groups(model, attn_wd=lam, mlp_wd=0.0, embed_wd=0.0)
    if name in ("gd", "momentum"):  # torch's weight_decay is L2 in the loss for SGD and Adam
        return torch.optim.SGD(groups, LR[name], momentum=BETA if name == "momentum" else 0.0)
    optimizer = torch.optim.Adam if name == "adam_l2" else torch.optim.AdamW
    return optimizer(groups, LR[name])


def look(model, x, y):
    """[{column: value}] of a model, a row for each layer and product; x, y: rows of val."""
    with torch.no_grad():
        logits = model(x)[0][y >= 0]
    y = y[y >= 0]
    accuracy = (logits.argmax(-1) == y).double().mean().item()
    scores = {"loss": F.cross_entropy(logits, y).item(), "accuracy": accuracy}
    rows = []
    for layer in attention_layers(model):
        for product, (A, B) in factors_of(layer).items():
            table = metrics(A, B)
            A, B = A.double(), B.double()
            D = A.mT @ A - B.mT @ B  # OV: P^T P - W_V W_V^T; QK: W_K W_K^T - W_Q W_Q^T
            row = {"layer": layer.layer, "product": product, **scores, "discrepancy": D.norm().item()}
            for column in ("half_sq_norm", "nuclear", "rank95"):
                row[column] = table[column][0]
            rows.append(row)
    return rows


def train(name, lam, seed, steps, log_steps, bar):
    """One run. Returns its rows at log_steps."""
    model = start(seed)
    optimizer = make_optimizer(name, model, lam)
    data = TaskSplit("recall", "train", BLOCK_SIZE)
    val = [torch.from_numpy(z) for z in TaskSplit("recall", "val", BLOCK_SIZE).rows(np.arange(VAL_ROWS))]
    rows = []
    for step in range(steps + 1):
        if step in log_steps:
            found = look(model, *val)
            if not math.isfinite(found[0]["loss"]):
                raise UserError(f"{name} diverged by step {step}: lower --attention_lams")
            key = {"optimizer": name, "lam": lam, "seed": seed, "step": step, "t": step * step_size(name)}
            rows += [{**key, **row} for row in found]
        x, y = [torch.from_numpy(z) for z in data.sample(seed, step * BATCH_SIZE, BATCH_SIZE)]
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()
    return rows


def balance(lams, steps, seeds, points):
    """All runs: a DataFrame with a row for each optimizer, lam, seed, step, layer and product."""
    log_steps = set(np.linspace(0, steps, points).round().astype(int).tolist())
    runs = itertools.product(LR, lams, range(seeds))
    rows = []
    with tqdm(total=len(LR) * len(lams) * seeds * (steps + 1), unit=" steps", disable=None) as bar:
        for name, lam, seed in runs:
            lam = strength(name, lam)
            bar.set_description(f"{name}, lam {lam:g}")
            rows += train(name, lam, seed, steps, log_steps, bar)
    table = pd.DataFrame(rows)
    first = table.groupby(["optimizer", "lam", "seed", "layer", "product"], sort=False)
    at_start = first["discrepancy"].transform("first")
    table["predicted"] = at_start * np.exp(-2 * table["lam"] * table["t"])
    return table
