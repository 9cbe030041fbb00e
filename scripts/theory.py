"""
L2 on the factors of a linear model is a nuclear norm on their product: the theory where it is exact.

    python -m scripts.theory                    # three losses, five optimizers, depths 2 and 3; half a minute
    python -m scripts.theory --runs=flow:4      # a deeper linear network
    python -m scripts.theory --problem=scalars  # two parameters, free and factorised: Adam with L2, AdamW
    python -m scripts.theory --problem=attention  # a transformer on associative recall; a few minutes
    python -m scripts.figures factorised_models out/theory      # draws again; two_parameters likewise

Minimises L(W) + (lam/2) (|A_1|^2 + ... + |A_n|^2) over square factors of W = A_1 ... A_n (Kobayashi et
al. 2024). L is |W - M|^2 / 2 (recovery), |X W - Y|^2 / (2 samples) with Gaussian inputs and noise
(regression), or |W - M|^2 / 2 over the observed entries (completion). Gradient flow balances the factors
as exp(-2 lam t), and recovery ends at max(s_i - lam, 0), s_i the singular values of M.

Writes OUT_DIR/curves.csv (t: accumulated step size), spectra.csv, rates.csv, predictions.csv (recovery's
last singular values over lam, seed 0) and factorised_models.png; for the scalars scalars.csv and
two_parameters.png; for attention attention.csv and attention_balance.png (scripts/theory_attention.py).
"""
import math
import os
import re

import numpy as np
import pandas as pd
import torch
from tqdm import trange

from configurator import configure
from nanorank.errors import UserError, user_errors
from nanorank.factorised import LOSSES, expected, gradient, measure, measured_rate, problems, product, update
from nanorank.files import make_folder
from nanorank.tables import write_csv
from scripts import theory_attention

out_dir = "out/theory"          # folder of the CSV files and the figures
problem = "recovery,regression,completion"  # any of these losses, or scalars, or attention
runs = "flow:2,flow:3,gd:2,momentum:2,adam_l2:2,adamw:2,adamw:2:1"  # OPTIMIZER:DEPTH[:sd of noise on dL/dW]
lams = "0,0.05,0.1,0.2,0.5,0.8,1.2,1.5"  # strengths of L2; adamw decouples the same numbers
scalar_lams = "0,0.1,0.3,0.6"   # the same for the scalars
attention_lams = "0,0.003,0.006,0.012"  # of L2 on attention; AdamW's are 300 times as large
attention_steps = 1000          # of each of the 16 runs on associative recall
seeds = 2                       # of M, data and factors; attention has one
points = 60                     # log-spaced steps at which curves are written
figure = True                   # draw at the end (needs matplotlib)
# matrices
size = 10                       # M and all factors are size x size
rank = 6                        # of M, whose singular values are 2, ..., 4 / rank, 2 / rank
samples = 80                    # regression: rows of X
# optimizers
duration = 100.0                # of flow and gd in t; of momentum in effective time t / (1 - beta)
flow_lr = 0.1                   # step of flow (Runge-Kutta of fourth order)
gd_lr = 0.05                    # step of gd
momentum_lr = 0.001             # step of momentum
beta = 0.9                      # of momentum, and Adam's first moment
adam_duration = 25.0            # of adam_l2 and adamw in t
adam_lr = 0.01                  # first step of adam_l2 and adamw, falling linearly to zero

OPTIMIZERS = ("flow", "gd", "momentum", "adam_l2", "adamw")

# ---------------------------------------------------------------------------------------- training

def schedule(name):
    """(number of steps, function step -> learning rate) of an optimizer."""
    if name in ("adam_l2", "adamw"):
        steps = round(2 * adam_duration / adam_lr)
        return steps, lambda step: adam_lr * (1 - step / steps)
    if name == "momentum":
        return round(duration * (1 - beta) / momentum_lr), lambda step: momentum_lr
    lr = flow_lr if name == "flow" else gd_lr
    return round(duration / lr), lambda step: lr


def predicted_rate(name, lam):
    """Rate of the discrepancy in t.

    Exact for flow, to first order in lr for gd and momentum; the Adams have flow's, for comparison.
    """
    if name == "gd":
        return -2 * math.log(1 - gd_lr * lam) / gd_lr
    return 2 * lam / (1 - beta) if name == "momentum" else 2 * lam


def descend(name, A, dL, lam, log_steps, look):
    """Optimizes A from dL(A). Returns t (n) at log_steps (n), and look(A)'s tensors stacked: (n, ...)."""
    steps, lr = schedule(name)
    t, times, log, state = 0.0, [], [], {}
    for step in trange(steps + 1, desc=name, disable=None, leave=False):
        if step in log_steps:
            times.append(t)
            log.append(look(A))
            if not log[-1]["loss"].isfinite().all():
                raise UserError(f"{name} diverged by step {step}: lower its step size or --lams")
        A = update(name, A, dL, lam, lr(step), state, step, beta)
        t += lr(step)
    return torch.tensor(times), {key: torch.stack([entry[key] for entry in log]) for key in log[0]}

# ---------------------------------------------------------------------------------------- matrices

def make_problems(names):
    return problems(names, seeds, size, rank, samples)


def train(names, name, depth, noise):
    """One run of all problems, lam and seeds.

    Returns t (n), the steps (n), and {name: (n, problem, lam, seed, ...)} of the loss and of measure().
    """
    X, Y, mask, rest, _ = make_problems(names)
    lam = torch.tensor(parse_numbers("lams"))[:, None, None, None]  # over (seed, size, size)
    start = []
    for seed in range(seeds):
        g = torch.Generator().manual_seed(1000 + seed)
        start.append(torch.randn(depth, len(names), 1, size, size, generator=g))
    A = 0.5 / math.sqrt(size) * torch.stack(start, 3)  # of spectral norm about 1
    A = A.expand(-1, -1, len(lam), -1, -1, -1)  # (depth, problem, lam, seed, size, size)
    generator = torch.Generator().manual_seed(0)

    def look(A):
        loss = (mask * (X @ product(A) - Y)).square().sum((-2, -1)) / 2 + rest
        return {"loss": loss, **measure(A)}

    log_steps = sorted({0, *np.geomspace(1, schedule(name)[0], points).round().astype(int).tolist()})
    t, log = descend(name, A, lambda A: gradient(A, X, Y, mask, noise, generator), lam, log_steps, look)
    return t, log_steps, log


def matrices(names):
    """All runs of --runs: writes the four CSV files, prints rates and errors."""
    target = torch.linalg.svdvals(make_problems(names)[-1])  # (seed, size)
    lam_grid = np.linspace(0, max(parse_numbers("lams")), 100).tolist()
    curves, spectra, rates, predictions = [], [], [], []
    for run in parse_runs():
        name, depth, noise = run
        t, steps, log = train(names, *run)
        discrepancy = log["discrepancy"]
        s = log.pop("s").permute(1, 2, 3, 0, 4)  # (problem, lam, seed, n, size)

        curve = frame(names, run, step=steps)
        curve["t"] = np.resize(t, len(curve))
        for column, x in log.items():
            curve[column] = x.permute(1, 2, 3, 0).flatten()
        curves.append(curve.assign(grad_noise=noise))

        spectrum = frame(names, run, step=steps, i=range(size))
        spectrum["s"] = s.flatten()
        spectrum["s_target"] = target[:, None].expand(s.shape).flatten()
        spectra.append(spectrum.assign(grad_noise=noise))

        rate = frame(names, run).assign(grad_noise=noise)
        rate["rate"] = measured_rate(t, discrepancy).flatten()
        rate["predicted"] = [predicted_rate(name, lam) for lam in rate.lam]
        rate["left"] = (discrepancy[-1] / discrepancy[0]).flatten()
        rate["error"] = pd.Series("", rate.index, dtype=object)
        rates.append(rate)
        if name == "adamw" and depth > 2:
            continue  # no prediction
        for row in rate[rate.problem == "recovery"].itertuples():
            s_end = s[..., -1, :].flatten(0, 2)[row.Index]
            s_expected = expected(name, target[row.seed], row.lam, depth, noise)
            rate.loc[row.Index, "error"] = (s_end - s_expected).abs().max().item()
        for lam in lam_grid:
            for i, x in enumerate(expected(name, target[0], lam, depth, noise).tolist()):
                predictions.append([name, depth, noise, lam, i, x])

    rates = pd.concat(rates)  # error: largest distance of a singular value of recovery from its prediction
    save("curves.csv", pd.concat(curves))
    save("spectra.csv", pd.concat(spectra))
    save("rates.csv", rates)
    save("predictions.csv", pd.DataFrame(
        predictions, columns=["optimizer", "depth", "grad_noise", "lam", "i", "s"]))

    rates["rate / predicted"] = rates.rate / rates.predicted
    print_means("rate / predicted", rates[rates.lam > 0], ".4f")
    print_means("error", rates[rates.error != ""], ".2g")


def frame(names, run, **more):
    """The first columns of a run's table, with a row for each problem, lam, seed and value of `more`."""
    axes = {"problem": names, "lam": parse_numbers("lams"), "seed": range(seeds), **more}
    table = pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)
    table.insert(1, "optimizer", run[0])
    table.insert(2, "depth", run[1])
    return table


def print_means(name, table, form):
    """Means of a column over seeds, a line for each run and problem, a column for each lam."""
    if not table.empty:
        by = ["optimizer", "depth", "grad_noise", "problem", "lam"]
        means = table.astype({name: float}).groupby(by, sort=False)[name].mean().unstack()
        print(f"\n{name}, mean over seeds\n{means.map(lambda x: format(x, form)).to_string()}")


def save(name, table):
    """Writes a DataFrame as OUT_DIR/name, floats to six digits."""
    rounded = table.map(lambda x: f"{x:.6g}" if isinstance(x, float) else x)
    write_csv(os.path.join(out_dir, name), rounded)

# ----------------------------------------------------------------------------------------- scalars

# our own choice, to float32's digits, as in results/theory
MINIMUM = torch.tensor([1.0, 0.3], dtype=torch.float32).double()
HESSIAN = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float32).double()


def scalars():
    """Two parameters, w free (L2 on w) or w = a b (L2 on a and b): writes scalars.csv, prints where they end.

    The loss is (w - MINIMUM)^T HESSIAN (w - MINIMUM) / 2. L2 on a and b is L1 on w. AdamW with exact
    gradients feels no decay. Under noise of sd 1 on dL/dw, the argument of expected() makes it gradient
    descent with L2 of strength lam on a free w, with (2/3) lam |w|^(3/2) on a product (our derivation).
    """
    lam = torch.tensor(parse_numbers("scalar_lams"))[:, None]
    start = torch.tensor([0.2, 1.2])
    forms = {"free": start[None], "factorised": torch.stack([1.5 * start.sqrt(), start.sqrt() / 1.5])}
    tables = []
    for form, factors in forms.items():
        for name, noise in (("adam_l2", 0.0), ("adamw", 0.0), ("adamw", 1.0)):
            power = 2 if form == "free" else 1 + noise / 2
            best = penalised_minimum(lam * noise if name == "adamw" else lam, power)
            generator = torch.Generator().manual_seed(0)

            def dL(A, noise=noise, generator=generator):
                g = (A.prod(0) - MINIMUM) @ HESSIAN
                g = g + noise * torch.randn(g.shape, generator=generator)
                return g * A.flip(0) if len(A) == 2 else g[None]  # dL/da = b dL/dw

            def look(A):
                d = A.prod(0) - MINIMUM
                return {"w": A.prod(0), "loss": (d @ HESSIAN * d).sum(-1) / 2}

            spaced = schedule(name)[0] * np.linspace(0, 1, 5 * points) ** 2  # denser where it moves
            log_steps = np.unique(spaced.round().astype(int))
            A = factors[:, None].expand(-1, len(lam), -1)  # (1 or 2, lam, 2)
            t, log = descend(name, A, dL, lam, set(log_steps), look)
            w1, w2 = log["w"].flatten(0, 1).T
            w1_expected, w2_expected = best.repeat(len(t), 1).T
            tables.append(pd.DataFrame({
                "form": form, "optimizer": name, "grad_noise": noise, "lam": lam[:, 0].repeat(len(t)),
                "step": log_steps.repeat(len(lam)), "t": t.repeat_interleave(len(lam)),
                "loss": log["loss"].flatten(), "w1": w1, "w2": w2,
                "w1_expected": w1_expected, "w2_expected": w2_expected,
            }))
    save("scalars.csv", pd.concat(tables))
    ends = pd.concat([table.tail(len(lam)) for table in tables]).drop(columns=["step", "t", "loss"])
    print(ends.to_string(index=False, float_format="{:.4f}".format))


def penalised_minimum(strength, power):
    """argmin L(w) + strength / power * sum |w_i|^power by proximal gradient, (n, 1) -> (n, 2).

    power: 1, 1.5 or 2.
    """
    w = torch.zeros(len(strength), 2)
    c = 0.5 * strength  # 0.5: the step
    for _ in range(2000):
        w = w - 0.5 * (w - MINIMUM) @ HESSIAN
        shrunk = {
            1: (w.abs() - c).clamp(min=0),
            1.5: ((c**2 + 4 * w.abs()).sqrt() - c) ** 2 / 4,
            2: w.abs() / (1 + c),
        }
        w = w.sign() * shrunk[power]
    return w

# --------------------------------------------------------------------------------------- attention

def attention():
    """A transformer under four optimizers: writes attention.csv, prints how fast it is balanced."""
    table = theory_attention.balance(parse_numbers("attention_lams"), attention_steps, 1, points)
    save("attention.csv", table)
    decayed = table[table.lam > 0]
    rates = []
    for key, run in decayed.groupby(["optimizer", "lam", "product", "layer"], sort=False):
        rate = measured_rate(torch.tensor(run["t"].to_numpy()), torch.tensor(run["discrepancy"].to_numpy()))
        rates.append([*key, rate.item() / (2 * key[1])])
    columns = ["optimizer", "lam", "product", "layer", "rate"]
    rates = pd.DataFrame(rates, columns=columns).pivot_table("rate", columns[:2], columns[2:4], sort=False)
    print(f"\nrate of the discrepancy over 2 lam\n{rates.to_string(float_format='{:.4f}'.format)}")

# -------------------------------------------------------------------------------------------- main

def check_settings():
    if problem not in ("scalars", "attention") and not set(problem.split(",")) <= set(LOSSES):
        raise UserError(f"--problem={problem}: expects scalars, attention, or a list of {', '.join(LOSSES)}")
    if min(seeds, rank, attention_steps) < 1 or points < 2:
        raise UserError(f"--seeds={seeds} --rank={rank} --attention_steps={attention_steps} must be at least "
                        f"1, --points={points} at least 2")
    if not rank <= size <= samples:
        raise UserError(f"expects --rank={rank} <= --size={size} <= --samples={samples}")
    for name in ("duration", "flow_lr", "gd_lr", "momentum_lr", "adam_duration", "adam_lr"):
        if not 0 < globals()[name] < math.inf:
            raise UserError(f"--{name}={globals()[name]} must be positive and finite")
    if not 0 <= beta < 1:
        raise UserError(f"--beta={beta} is not in [0, 1)")


def parse_numbers(name):
    """The strengths that a setting lists, sorted, none twice."""
    text = globals()[name]
    try:
        numbers = {float(x) for x in text.split(",")}
    except ValueError:
        numbers = {math.nan}
    if not all(0 <= x < math.inf for x in numbers):
        raise UserError(f'--{name}={text}: expects numbers like "0,0.1,1", none negative')
    return sorted(numbers)


def parse_runs():
    """[(optimizer, depth, noise)] that --runs lists."""
    out = []
    for text in runs.split(","):
        match = re.fullmatch(r"(\w+):(\d+)(?::(\d+(?:\.\d+)?))?", text.strip())
        if not match or match[1] not in OPTIMIZERS or not 2 <= int(match[2]) <= 16:
            raise UserError(f"--runs: {text.strip()!r} is not OPTIMIZER:DEPTH[:NOISE], a depth of 2 to 16 "
                            f"and one of {', '.join(OPTIMIZERS)}")
        out.append((match[1], int(match[2]), float(match[3] or 0)))
    return out


def main():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # twice as fast as two threads on matrices this small
    check_settings()
    make_folder(out_dir)
    if problem == "scalars":
        scalars()
    elif problem == "attention":
        attention()
    else:
        matrices(problem.split(","))
    if figure:
        from nanorank.figures import theory as figures
        own = {"scalars": figures.two_parameters, "attention": figures.attention_balance}
        draw = own.get(problem, figures.factorised_models)
        print(f"\nfigure: {draw(out_dir)}")


if __name__ == "__main__":
    configure(globals())
    with user_errors("theory.py"):
        main()
