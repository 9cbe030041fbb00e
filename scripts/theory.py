"""
L2 on the factors of a linear model is a nuclear norm on their product: the theory where it is exact.

    python -m scripts.theory                    # three losses, five optimizers, depths 2 and 3; half a minute
    python -m scripts.theory --runs=flow:4      # a deeper linear network
    python -m scripts.theory --problem=scalars  # two parameters, free and factorised: Adam with L2, AdamW
    python -m scripts.figures factorised_models out/theory      # draws again; two_parameters likewise

Minimises L(W) + (lam/2) (|A_1|^2 + ... + |A_n|^2) over square factors of W = A_1 ... A_n (Kobayashi et
al. 2024), all losses, lam and seeds in one tensor. L is |W - M|^2 / 2 (recovery), |X W - Y|^2 / (2
samples) with Gaussian inputs and noise (regression), or |W - M|^2 / 2 over the observed entries
(completion).

Gradient flow balances the factors as exp(-2 lam t), and recovery ends at max(s_i - lam, 0), s_i the
singular values of M. Adam and AdamW are not gradient flow: for them the printed tables compare, and
AdamW's expectation is our own (expected() in nanorank/factorised.py).

Writes OUT_DIR/curves.csv, spectra.csv, rates.csv, predictions.csv (recovery's last singular values over
lam, seed 0) and factorised_models.png; for the scalars scalars.csv and two_parameters.png. In curves.csv,
t is the accumulated step size; momentum's effective time is t / (1 - beta).
"""
import math
import os

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from configurator import configure
from nanorank import two_parameters
from nanorank.errors import UserError, user_errors
from nanorank.factorised import LOSSES, expected, gradient, measure, measured_rate, problems, product, update
from nanorank.tables import write_csv

out_dir = "out/theory"          # folder of the CSV files and the figures
problem = "recovery,regression,completion"  # any of these losses, or scalars
runs = "flow:2,flow:3,gd:2,momentum:2,adam_l2:2,adamw:2,adamw:2:1"  # OPTIMIZER:DEPTH[:sd of noise on dL/dW]
lams = "0,0.05,0.1,0.2,0.5,0.8,1.2,1.5"  # strengths of L2; adamw decouples the same numbers
seeds = 2                       # of M, data and factors
points = 60                     # log-spaced steps at which curves are written
figure = True                   # draw at the end (needs matplotlib)
# matrices
size = 10                       # M and all factors are size x size
rank = 6                        # of M, whose singular values are 2, ..., 4 / rank, 2 / rank
samples = 80                    # regression: rows of X
label_noise = 0.1               # regression: standard deviation of the noise in Y
observed = 0.6                  # completion: fraction of entries seen
init = 0.5                      # factors start as N(0, init^2 / size), of spectral norm about 2 init
# optimizers
duration = 100.0                # of flow and gd in t; of momentum in effective time t / (1 - beta)
flow_lr = 0.1                   # step of flow (Runge-Kutta of fourth order)
gd_lr = 0.05                    # step of gd
momentum_lr = 0.001             # step of momentum
beta = 0.9                      # of momentum, and Adam's first moment
adam_duration = 25.0            # of adam_l2 and adamw in t
adam_lr = 0.01                  # first step of adam_l2 and adamw, falling linearly to zero
beta2 = 0.999                   # Adam's second moment
eps = 1e-8                      # Adam's
# scalars
scalar_lams = "0,0.1,0.3,0.6"   # strengths of L2 on the two parameters
scalar_noise = 1.0              # standard deviation of the noise on dL/dw in the noisy runs of adamw

OPTIMIZERS = ("flow", "gd", "momentum", "adam_l2", "adamw")

# --------------------------------------------------------------------------------------- schedules

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
    if name == "momentum":
        return 2 * lam / (1 - beta)
    return 2 * lam

# ---------------------------------------------------------------------------------------- matrices

def make_problems(names):
    """As problems() of nanorank/factorised.py, with the settings."""
    return problems(names, seeds, size, rank, samples, label_noise, observed)


def train(names, name, depth, noise, advance=lambda: None):
    """One run of all problems, lam and seeds. advance() is called after each step.

    Returns t (n), the steps (n), and {name: (n, problem, lam, seed, ...)} of the loss and of measure().
    """
    X, Y, mask, rest, _ = make_problems(names)
    lam = torch.tensor(parse_numbers("lams"))[:, None, None, None]  # over (seed, size, size)
    start = []
    for seed in range(seeds):
        g = torch.Generator().manual_seed(1000 + seed)
        start.append(torch.randn(depth, len(names), 1, size, size, generator=g))
    A = init / math.sqrt(size) * torch.stack(start, 3)
    A = A.expand(-1, -1, len(lam), -1, -1, -1)  # (depth, problem, lam, seed, size, size)

    generator = torch.Generator().manual_seed(0)

    def dL(A):
        return gradient(A, X, Y, mask, noise, generator)

    steps, lr = schedule(name)
    log_steps = sorted({0, *np.geomspace(1, steps, points).round().astype(int).tolist()})
    t, times, log, state = 0.0, [], [], {}
    for step in range(steps + 1):
        if step in log_steps:
            loss = (mask * (X @ product(A) - Y)).square().sum((-2, -1)) / 2 + rest
            if not loss.isfinite().all():
                raise UserError(f"{name} diverged by step {step}: lower its step size or --lams")
            times.append(t)
            log.append({"loss": loss, **measure(A)})
        A = update(name, A, dL, lam, lr(step), state, step, beta, beta2, eps)
        t += lr(step)
        advance()
    log = {key: torch.stack([entry[key] for entry in log]) for key in log[0]}
    return torch.tensor(times), log_steps, log


def matrices(names):
    """All runs of --runs: writes the four CSV files, prints rates and errors."""
    todo = parse_runs()
    target = torch.linalg.svdvals(make_problems(names)[-1])  # (seed, size)
    # a step's time is proportional to its products of matrices
    costs = [depth * (4 if name == "flow" else 1) for name, depth, _ in todo]
    total = sum((schedule(run[0])[0] + 1) * cost for run, cost in zip(todo, costs))

    curves, spectra, rates, predictions = [], [], [], []
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=total, disable=None, bar_format=form) as bar:
        for run, cost in zip(todo, costs):
            name, depth, noise = run
            bar.set_description(f"{name}, depth {depth}")
            t, steps, log = train(names, *run, lambda cost=cost: bar.update(cost))
            discrepancy = log["discrepancy"]
            s = log.pop("s").permute(1, 2, 3, 0, 4)  # (problem, lam, seed, n, size)

            curve = frame(names, run, step=steps)
            curve["t"] = np.resize(t, len(curve))
            for column, x in log.items():
                curve[column] = x.permute(1, 2, 3, 0).flatten()
            curve["grad_noise"] = noise
            curves.append(curve)

            spectrum = frame(names, run, step=steps, i=range(size))
            spectrum["s"] = s.flatten()
            spectrum["s_target"] = target[:, None].expand(s.shape).flatten()
            spectrum["grad_noise"] = noise
            spectra.append(spectrum)

            predictable = name != "adamw" or depth == 2
            errors = []
            rate = frame(names, run)
            for row, s_end in zip(rate.itertuples(), s[..., -1, :].flatten(0, 2)):
                error = ""
                if row.problem == "recovery" and predictable:
                    s_expected = expected(name, target[row.seed], row.lam, depth, noise)
                    error = (s_end - s_expected).abs().max().item()
                errors.append(error)
            rate["grad_noise"] = noise
            rate["rate"] = measured_rate(t, discrepancy).flatten()
            rate["predicted"] = [predicted_rate(name, lam) for lam in rate.lam]
            rate["left"] = (discrepancy[-1] / discrepancy[0]).flatten()
            rate["error"] = errors
            rates.append(rate)
            if predictable:
                predictions += prediction_rows(run, target[0])

    rates = pd.concat(rates)
    save("curves.csv", pd.concat(curves))
    save("spectra.csv", pd.concat(spectra))
    save("rates.csv", rates)
    save("predictions.csv", pd.DataFrame(predictions))

    decayed = rates[rates.lam > 0]
    print_means("rate of the discrepancy / predicted rate", decayed, decayed.rate / decayed.predicted, ".4f")
    recovery = rates[rates.error != ""]
    title = "largest distance of a singular value of recovery from its prediction"
    print_means(title, recovery, recovery.error, ".2g")


def frame(names, run, **more):
    """The first columns of a run's table, with a row for each problem, lam, seed and value of `more`."""
    axes = {"problem": names, "lam": parse_numbers("lams"), "seed": range(seeds), **more}
    table = pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)
    table.insert(1, "optimizer", run[0])
    table.insert(2, "depth", run[1])
    return table


def prediction_rows(run, m):
    """The rows of predictions.csv of one run: expected singular values for 100 lam."""
    name, depth, noise = run
    rows = []
    for lam in np.linspace(0, max(parse_numbers("lams")), 100).tolist():
        for i, s in enumerate(expected(name, m, lam, depth, noise).tolist()):
            rows.append({"optimizer": name, "depth": depth, "grad_noise": noise, "lam": lam, "i": i, "s": s})
    return rows


def print_means(title, table, values, form):
    """Means over seeds, a line for each run and problem, a column for each lam."""
    if table.empty:
        return
    by = [table[name] for name in ("optimizer", "depth", "grad_noise", "problem", "lam")]
    means = values.astype(float).groupby(by, sort=False).mean().unstack()
    print(f"\n{title}, mean over seeds")
    print(means.map(lambda x: format(x, form)).to_string())


def save(name, table):
    """Writes a DataFrame as OUT_DIR/name, floats to six digits."""
    rounded = table.map(lambda x: f"{x:.6g}" if isinstance(x, float) else x)
    write_csv(os.path.join(out_dir, name), rounded)

# ----------------------------------------------------------------------------------------- scalars

def scalars():
    """Two parameters, w free (L2 on w) or w = a b (L2 on a and b): writes scalars.csv, prints where they end.

    L2 on a and b is L1 on w. AdamW with exact gradients feels no decay. Under noise of standard deviation
    sigma, the argument of expected() makes it gradient descent with L2 of strength sigma lam on a free w,
    and with (2/3) sigma lam |w|^(3/2) on a factorised one (our derivation).
    """
    strengths = parse_numbers("scalar_lams")
    lam = torch.tensor(strengths)[:, None]
    start = torch.tensor([0.2, 1.2])
    forms = {
        "free": start[None],
        "factorised": torch.stack([1.5 * start.sqrt(), start.sqrt() / 1.5]),
    }
    rows, ends = [], []
    for form, factors in forms.items():
        for name, noise in (("adam_l2", 0.0), ("adamw", 0.0), ("adamw", scalar_noise)):
            strength = lam * noise if name == "adamw" else lam
            power = 2 if form == "free" else 1
            if form == "factorised" and noise > 0:
                power = 1.5
            best = two_parameters.minimum(strength, power).tolist()

            generator = torch.Generator().manual_seed(0)

            def dL(A, noise=noise, generator=generator):
                return two_parameters.gradient(A, noise, generator)

            steps, lr = schedule(name)
            spaced = steps * np.linspace(0, 1, 5 * points) ** 2  # denser where it moves
            log_steps = {*spaced.round().astype(int).tolist()}
            A = factors[:, None].expand(-1, len(lam), -1)  # (1 or 2, lam, 2)
            t, state = 0.0, {}
            for step in range(steps + 1):
                if step in log_steps:
                    w = A.prod(0)
                    loss = two_parameters.loss(w).tolist()
                    for i, (w1, w2) in enumerate(w.tolist()):
                        rows.append({
                            "form": form, "optimizer": name, "grad_noise": noise, "lam": strengths[i],
                            "step": step, "t": t, "loss": loss[i], "w1": w1, "w2": w2,
                            "w1_expected": best[i][0], "w2_expected": best[i][1],
                        })
                A = update(name, A, dL, lam, lr(step), state, step, beta, beta2, eps)
                t += lr(step)
            ends += rows[-len(lam):]
    save("scalars.csv", pd.DataFrame(rows))
    columns = ["form", "optimizer", "grad_noise", "lam", "w1", "w2", "w1_expected", "w2_expected"]
    print(pd.DataFrame(ends)[columns].to_string(index=False, float_format="{:.4f}".format))

# -------------------------------------------------------------------------------------------- main

def check_settings():
    """Raises UserError that names the setting, its value and what it should be."""
    if problem != "scalars" and not set(problem.split(",")) <= set(LOSSES):
        raise UserError(f"--problem={problem}: expects scalars, or a list of {', '.join(LOSSES)}")
    least = {"seeds": 1, "size": 1, "rank": 1, "points": 2, "samples": size, "scalar_noise": 0}
    for name, bound in least.items():
        if globals()[name] < bound:
            raise UserError(f"--{name}={globals()[name]} must be at least {bound}")
    if rank > size:
        raise UserError(f"--rank={rank} is more than --size={size}")
    for name in ("duration", "flow_lr", "gd_lr", "momentum_lr", "adam_duration", "adam_lr", "eps"):
        if not 0 < globals()[name] < math.inf:
            raise UserError(f"--{name}={globals()[name]} must be positive and finite")
    for name in ("beta", "beta2"):
        if not 0 <= globals()[name] < 1:
            raise UserError(f"--{name}={globals()[name]} is not in [0, 1)")


def parse_numbers(name):
    """The strengths that a setting lists, sorted, none twice."""
    text = globals()[name]
    try:
        numbers = {float(x) for x in text.split(",")}
    except ValueError:
        raise UserError(f'--{name}={text}: expects numbers like "0,0.1,1"') from None
    if not all(0 <= x < math.inf for x in numbers):
        raise UserError(f"--{name}={text}: must be finite and not negative")
    return sorted(numbers)


def parse_runs():
    """[(optimizer, depth, noise)] that --runs lists."""
    out = []
    for text in runs.split(","):
        name, _, rest = text.strip().partition(":")
        depth, _, noise = rest.partition(":")
        try:
            depth, noise = int(depth), float(noise or 0)
        except ValueError:
            depth, noise = 0, 0.0  # refused below
        if name not in OPTIMIZERS or not 2 <= depth <= 16 or not 0 <= noise < math.inf:
            raise UserError(f"--runs: {text.strip()!r} is not OPTIMIZER:DEPTH[:NOISE], a depth of 2 to 16 "
                            f"and one of {', '.join(OPTIMIZERS)}")
        out.append((name, depth, noise))
    return out


def main():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # twice as fast as two threads on matrices this small
    check_settings()
    os.makedirs(out_dir, exist_ok=True)
    if problem == "scalars":
        scalars()
    else:
        matrices(problem.split(","))
    if figure:
        from nanorank.figures import theory as figures
        draw = figures.two_parameters if problem == "scalars" else figures.factorised_models
        print(f"\nfigure: {draw(out_dir)}")


if __name__ == "__main__":
    configure(globals())
    with user_errors("theory.py"):
        main()
