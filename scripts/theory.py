"""
P1's theory where it is exact: L2 on the factors of a linear model is a nuclear norm on their product.

    python -m scripts.theory                          # F1: three losses, five optimizers, depths 2 and 3; half a minute on two cores
    python -m scripts.theory --runs=flow:4            # a deeper linear network; any OPTIMIZER:DEPTH[:NOISE] of the list below
    python -m scripts.theory --problem=scalars        # F5: two parameters, free and factorised, Adam with L2 against AdamW
    python -m scripts.figures factorised_models out/factored                 # draws F1 again; f5 likewise

Minimises L(W) + (lam/2) (|A_1|^2 + ... + |A_n|^2) over square factors of W = A_1 ... A_n, all problems, lam and seeds in one tensor;
n = 2 is A B^T with A = A_1, B = A_2^T. L is |W - M|^2 / 2 (recovery), |X W - Y|^2 / (2 samples) with Gaussian inputs and noise
(regression), or |W - M|^2 / 2 over the observed entries (completion). Known in advance (PAPER section 2):
  gradient flow shrinks D = A^T A - B^T B as exp(-2 lam t) whatever L is;
  the bound |A|^2 + |B|^2 >= 2 |A B^T|_* becomes an equality, so recovery ends at max(s_i(M) - lam, 0), s_i its singular values;
  n factors: sum |A_l|^2 >= n sum_i s_i^(2/n) at balance (Schatten-2/n), one scalar problem for each singular value.
Adam and AdamW are not gradient flow: for them the table at the end compares, and nothing is predicted.

Writes OUT_DIR/curves.csv, spectra.csv, rates.csv, predictions.csv (recovery's last singular values over lam, seed 0) and factorised_models.png;
scalars.csv and two_parameters.png for the scalars. In curves.csv t is the accumulated step size (momentum's effective time is t / (1 - beta)),
sum_sq the sum of |A_l|^2, two_nuclear n * sum s^(2/n) (2 |A B^T|_* for n = 2), discrepancy the norm of all A_l^T A_l - A_(l+1) A_(l+1)^T.
"""
import csv
import io
import math
import os
import time

import numpy as np
import torch

from configurator import configure
from nanorank.console import time_left
from nanorank.errors import UserError, user_errors
from nanorank.files import write_atomic
from nanorank.spectra import ranks

# --------------------------------------------------------------------------------------------------------------- settings
out_dir = "out/factored"        # where CSV files and figures go
problem = "recovery,regression,completion"  # any of these (F1), or scalars (F5)
runs = "flow:2,flow:3,gd:2,momentum:2,adam_l2:2,adamw:2,adamw:2:1"  # optimizer:depth of F1; a third number: sd of noise added to dL/dW
lams = "0,0.05,0.1,0.2,0.5,0.8,1.2,1.5"  # strengths of L2; adamw multiplies the same numbers by its step and decouples them
seeds = 2                       # of M, data and factors
size = 10                       # M and all factors are size x size
rank = 6                        # of M, whose singular values are 2, ..., 4 / rank, 2 / rank
samples = 80                    # regression: rows of X
label_noise = 0.1               # regression: standard deviation of the noise in Y
observed = 0.6                  # completion: fraction of entries seen
init = 0.5                      # factors start as N(0, init^2 / size), so that their spectral norm is about 2 * init
duration = 100.0                # of flow and gd in t; of momentum in effective time t / (1 - beta)
flow_lr = 0.1                   # step of flow (Runge-Kutta of fourth order)
gd_lr = 0.05                    # step of gd
momentum_lr = 0.001             # step of momentum
beta = 0.9                      # of momentum, and Adam's first moment
adam_duration = 25.0            # of adam_l2 and adamw in t
adam_lr = 0.01                  # first step of adam_l2 and adamw, falling linearly to zero
beta2 = 0.999                   # Adam's second moment
eps = 1e-8                      # Adam's
scalar_lams = "0,0.1,0.3,0.6"   # strengths of F5
scalar_noise = 1.0              # F5: standard deviation of the noise on dL/dw in the third column
points = 60                     # log-spaced steps at which curves are written
figure = True                   # draw at the end (needs matplotlib)

LOSSES = ("recovery", "regression", "completion")
OPTIMIZERS = ("flow", "gd", "momentum", "adam_l2", "adamw")

# ---------------------------------------------------------------------------------------------------------------- problems

def make_problems(names):
    """X, Y, mask (problem, 1, seed, size, size) and rest (problem, 1, seed): L(W) = |mask * (X W - Y)|^2 / 2 + rest; M (seed, size, size)."""
    rows, targets = [], []
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        U, V = torch.linalg.qr(torch.randn(2, size, size, generator=g)).Q
        s = 2 * torch.arange(rank, rank - size, -1).clamp(min=0) / rank
        M, one, eye = U * s @ V, torch.ones(size, size), torch.eye(size)
        X = torch.randn(samples, size, generator=g) / math.sqrt(samples)
        Y = X @ M + label_noise * torch.randn(samples, size, generator=g) / math.sqrt(samples)
        Q, R = torch.linalg.qr(X)  # |X W - Y|^2 = |R W - Q^T Y|^2 + |Y - Q Q^T Y|^2
        seen = (torch.rand(size, size, generator=g) < observed).double()
        zero = torch.zeros(())
        table = {"recovery": (eye, M, one, zero), "regression": (R, Q.T @ Y, one, (Y - Q @ (Q.T @ Y)).square().sum() / 2),
                 "completion": (eye, M, seen, zero)}
        rows.append([table[name] for name in names])
        targets.append(M)
    X, Y, mask, rest = (torch.stack([torch.stack([row[p][part] for row in rows]) for p in range(len(names))])[:, None] for part in range(4))
    return X, Y, mask, rest, torch.stack(targets)


def product(A):
    """W = A_1 ... A_n from factors A (n, ..., size, size)."""
    W = A[0]
    for factor in A[1:]:
        W = W @ factor
    return W


def gradient(A, X, Y, mask, noise, generator):
    """dL/dA_l for all factors, shaped like A (n, ..., size, size): (A_1 ... A_(l-1))^T G (A_(l+1) ... A_n)^T with G = dL/dW."""
    left = [A[0]]
    for factor in A[1:]:
        left.append(left[-1] @ factor)  # A_1, A_1 A_2, ..., W
    G = X.mT @ (mask * (X @ left[-1] - Y))
    if noise:
        G = G + noise * torch.randn(G.shape, generator=generator)
    out = []
    for before, factor in zip(left[-2::-1], A.flip(0)):
        out.append(before.mT @ G)
        G = G @ factor.mT
    return torch.stack([G, *out[::-1]])

# -------------------------------------------------------------------------------------------------------------- optimizers

def update(name, A, dL, lam, lr, state, step):
    """The parameters A after one step. dL: A -> dL/dA; lam: the strengths, broadcast against A; state: momentum and moments, kept here."""
    if name == "flow":  # dA/dt = -dL/dA - lam A by Runge-Kutta: error O(lr^4)
        k1 = -dL(A) - lam * A
        k2 = -dL(A + lr / 2 * k1) - lam * (A + lr / 2 * k1)
        k3 = -dL(A + lr / 2 * k2) - lam * (A + lr / 2 * k2)
        k4 = -dL(A + lr * k3) - lam * (A + lr * k3)
        return A + lr / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    if name == "gd":
        return A - lr * (dL(A) + lam * A)
    if name == "momentum":
        state["v"] = beta * state.get("v", 0) + dL(A) + lam * A
        return A - lr * state["v"]
    if name == "adam_l2":
        g = dL(A) + lam * A
    else:  # adamw: the decay bypasses the moments
        g = dL(A)
        A = A * (1 - lr * lam)
    state["m"] = beta * state.get("m", 0) + (1 - beta) * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g**2
    return A - lr * (state["m"] / (1 - beta**(step + 1))) / ((state["v"] / (1 - beta2**(step + 1))).sqrt() + eps)


def plan(name):
    """(number of steps, step size at a step) of an optimizer."""
    if name in ("adam_l2", "adamw"):
        steps = round(2 * adam_duration / adam_lr)
        return steps, lambda step: adam_lr * (1 - step / steps)
    lr, effective = {"flow": (flow_lr, 1), "gd": (gd_lr, 1), "momentum": (momentum_lr, 1 - beta)}[name]
    return round(duration * effective / lr), lambda step: lr


def predicted_rate(name, lam):
    """Of the discrepancy in t: exact for flow, to first order in the step for gd and momentum, flow's for comparison with the Adams."""
    if name == "gd":
        return -2 * math.log(1 - gd_lr * lam) / gd_lr
    return 2 * lam / (1 - beta) if name == "momentum" else 2 * lam

# ----------------------------------------------------------------------------------------------------------- measurements

def measure(A):
    """{name: (problem, lam, seed)} of what curves.csv holds, and the singular values "s" (problem, lam, seed, size)."""
    n, s = len(A), torch.linalg.svdvals(product(A))
    D = A[:-1].mT @ A[:-1] - A[1:] @ A[1:].mT
    return {"sum_sq": A.square().sum((0, -2, -1)), "two_nuclear": n * (s**(2 / n)).sum(-1),
            "discrepancy": D.square().sum((0, -2, -1)).sqrt(), "rank95": ranks(s, 0.95), "s": s}


def measured_rate(t, discrepancy):
    """-d log(discrepancy) / dt by least squares, down to 1e-3 of its start. t (n), discrepancy (n, ...) -> (...)."""
    keep = (discrepancy > 1e-3 * discrepancy[0]).cumprod(0).double()
    t = t.reshape(-1, *[1] * (discrepancy.ndim - 1))
    t = t - (keep * t).sum(0) / keep.sum(0)
    return -(keep * t * discrepancy.clamp(min=1e-300).log()).sum(0) / (keep * t**2).sum(0)


def closed_form(m, lam, depth):
    """argmin over s of (s - m)^2 / 2 + lam * depth / 2 * s^(2 / depth) for each of m (n): soft thresholding, on a fine grid for depth > 2."""
    if depth == 2:
        return (m - lam).clamp(min=0)
    s = torch.linspace(0, 1, 20_001)[:, None] * m
    return s.gather(0, ((s - m) ** 2 / 2 + lam * depth / 2 * s ** (2 / depth)).argmin(0)[None])[0]


def expected(name, m, lam, depth, noise):
    """Where recovery should end from M's singular values m (n).

    AdamW divides the gradient by its size. Exact gradients vanish at the minimum of L, and no decay is felt. Under noise of sd sigma on
    dL/dW an entry of dL/dA in column j has the sd sigma |b_j|: once that is all of the size and the columns are alike, |b_j|^2 =
    |W|_* / size, AdamW is gradient descent with L2 of strength lam sigma sqrt(|W|_* / size) (our derivation, for depth 2; not P1's).
    """
    if name != "adamw":
        return closed_form(m, lam, depth)
    s = m
    for _ in range(100 if noise else 0):
        s = (s + closed_form(m, lam * noise * (s.sum() / size).sqrt(), depth)) / 2
    return s


def log_spaced(steps):
    return sorted({0, *np.geomspace(1, steps, points).round().astype(int).tolist()})


def write_csv(name, rows):
    """OUT_DIR/name from rows, dicts with the same keys; floats to six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)
    write_atomic(os.path.join(out_dir, name), lambda file: file.write(text.getvalue().encode()))

# --------------------------------------------------------------------------------------------------------------------- F1

def check_settings():
    """Raises UserError naming the setting, its value and what it should be."""
    if problem != "scalars" and not set(problem.split(",")) <= set(LOSSES):
        raise UserError(f"--problem={problem}: expects scalars, or a list of {', '.join(LOSSES)}")
    bounds = {"seeds": 1, "size": 1, "rank": 1, "points": 2, "samples": size, "init": 0, "label_noise": 0, "scalar_noise": 0}
    for name, least in bounds.items():
        if globals()[name] < least:
            raise UserError(f"--{name}={globals()[name]} must be at least {least}")
    if rank > size:
        raise UserError(f"--rank={rank} is more than --size={size}")
    for name in ("duration", "flow_lr", "gd_lr", "momentum_lr", "adam_duration", "adam_lr", "eps"):
        if not 0 < globals()[name] < math.inf:
            raise UserError(f"--{name}={globals()[name]} must be positive and finite")
    for name in ("beta", "beta2"):
        if not 0 <= globals()[name] < 1:
            raise UserError(f"--{name}={globals()[name]} is not in [0, 1)")


def parse_numbers(name):
    """A list of strengths, sorted, none twice."""
    try:
        numbers = [float(x) for x in globals()[name].split(",")]
    except ValueError:
        raise UserError(f'--{name}={globals()[name]}: expects numbers like "0,0.1,1"') from None
    if not all(0 <= x < math.inf for x in numbers):
        raise UserError(f"--{name}={globals()[name]}: must be finite and not negative")
    return sorted(set(numbers))


def parse_runs():
    """[(optimizer, depth, noise)] that --runs lists."""
    out = []
    for text in runs.split(","):
        name, _, rest = text.strip().partition(":")
        depth, _, noise = rest.partition(":")
        try:
            out.append((name, int(depth), float(noise or 0)))
        except ValueError:
            out.append((name, 0, 0.0))
        if name not in OPTIMIZERS or not 2 <= out[-1][1] <= 16 or not 0 <= out[-1][2] < math.inf:
            raise UserError(f"--runs: {text.strip()!r} is not OPTIMIZER:DEPTH[:NOISE], an optimizer of {', '.join(OPTIMIZERS)}, a depth of 2 to 16")
    return out


def train(names, name, depth, noise, said=lambda done: None):
    """One run of all problems, lam and seeds: t (n), the steps (n), and what measure() gives at each, stacked (n, problem, lam, seed ...)."""
    X, Y, mask, rest, _ = make_problems(names)
    lam = torch.tensor(parse_numbers("lams"))[:, None, None, None]  # over (seed, size, size)
    start = [torch.randn(depth, len(names), 1, size, size, generator=torch.Generator().manual_seed(1000 + seed)) for seed in range(seeds)]
    A = (init / math.sqrt(size) * torch.stack(start, 3)).expand(-1, -1, len(lam), -1, -1, -1)  # (depth, problem, lam, seed, size, size)
    generator = torch.Generator().manual_seed(0)
    steps, lr = plan(name)
    t, state, times, log, wanted = 0.0, {}, [], [], log_spaced(steps)
    for step in range(steps + 1):
        if step in wanted:
            loss = (mask * (X @ product(A) - Y)).square().sum((-2, -1)) / 2 + rest
            times.append(t)
            log.append({"loss": loss, **measure(A)})
            if not loss.isfinite().all():
                raise UserError(f"{name} diverged by step {step}: lower its step size or --lams")
            said(step)
        A = update(name, A, lambda A: gradient(A, X, Y, mask, noise, generator), lam, lr(step), state, step)
        t += lr(step)
    return torch.tensor(times), wanted, {key: torch.stack([row[key] for row in log]) for key in log[0]}


def matrices(names):
    """All runs of F1: curves.csv, spectra.csv, rates.csv and the tables of rates and errors."""
    todo, strengths = parse_runs(), parse_numbers("lams")
    target = torch.linalg.svdvals(make_problems(names)[-1])  # (seed, size)
    work = [plan(name)[0] * (4 if name == "flow" else 1) * depth for name, depth, _ in todo]
    began = spoke = time.monotonic()
    curves, spectra, rates = [], [], []
    for i, (name, depth, noise) in enumerate(todo):
        def said(step, i=i, name=name, depth=depth):
            nonlocal spoke
            done = sum(work[:i]) + work[i] * step / plan(name)[0]
            if time.monotonic() - spoke > 5:
                spoke = time.monotonic()
                print(f"  {name}, depth {depth}: step {step}, {time_left((spoke - began) * (sum(work) / done - 1))} left", flush=True)
        t, steps, log = train(names, name, depth, noise, said)
        rate = measured_rate(t, log["discrepancy"])
        values = {key: x.tolist() for key, x in log.items()}  # [step][problem][lam][seed]
        for p, k, seed in np.ndindex(*rate.shape):
            what = {"problem": names[p], "optimizer": name, "depth": depth, "lam": strengths[k], "seed": seed}
            for n, step in enumerate(steps):
                at = {key: x[n][p][k][seed] for key, x in values.items()}
                spectra += [{**what, "step": step, "i": j, "s": s, "s_target": m, "grad_noise": noise}
                            for j, (s, m) in enumerate(zip(at.pop("s"), target[seed].tolist()))]
                curves.append({**what, "step": step, "t": t[n].item(), **at, "grad_noise": noise})
            first, last = log["discrepancy"][0, p, k, seed].item(), log["discrepancy"][-1, p, k, seed].item()
            error = (log["s"][-1, p, k, seed] - expected(name, target[seed], strengths[k], depth, noise)).abs().max().item()
            rates.append({**what, "grad_noise": noise, "rate": rate[p, k, seed].item(), "predicted": predicted_rate(name, strengths[k]),
                          "left": last / first, "error": error if names[p] == "recovery" and (name != "adamw" or depth == 2) else ""})
    write_csv("curves.csv", curves)
    write_csv("spectra.csv", spectra)
    write_csv("rates.csv", rates)
    write_csv("predictions.csv", [{"optimizer": name, "depth": depth, "grad_noise": noise, "lam": lam, "i": i, "s": s}
                                  for name, depth, noise in todo if name != "adamw" or depth == 2
                                  for lam in np.linspace(0, max(strengths), 100).tolist()
                                  for i, s in enumerate(expected(name, target[0], lam, depth, noise).tolist())])
    for title, form, value, rows in (
            ("rate of the discrepancy / predicted rate", ".4f", lambda row: row["rate"] / row["predicted"], [row for row in rates if row["lam"]]),
            ("largest distance of a singular value of recovery from its prediction", ".2g", lambda row: row["error"],
             [row for row in rates if row["error"] != ""])):
        columns = sorted({row["lam"] for row in rows})
        print(f"\n{title}, mean over seeds" + f"\n{'':34}lam " + "".join(f"{lam:<10g}" for lam in columns))
        for run in dict.fromkeys((row["optimizer"], row["depth"], row["grad_noise"], row["problem"]) for row in rows):
            cells = [[value(row) for row in rows if (row["optimizer"], row["depth"], row["grad_noise"], row["problem"], row["lam"]) == (*run, lam)]
                     for lam in columns]
            label = f"{run[0]}, depth {run[1]}{', noisy' if run[2] else ''}"
            print(f"{label:25}{run[3]:13}" + "".join(f"{sum(cell) / len(cell):<10{form}}" for cell in cells))

# --------------------------------------------------------------------------------------------------------------------- F5

HESSIAN, MINIMUM = torch.tensor([[1.0, 0.6], [0.6, 1.0]]).double(), torch.tensor([1.0, 0.3]).double()  # of L(w); ours
POWER = {("free", 0): 2, ("free", 1): 2, ("factorised", 0): 1, ("factorised", 1): 1.5}  # p of the penalty, without and with noise


def scalars():
    """scalars.csv: L(w) = (w - MINIMUM)^T HESSIAN (w - MINIMUM) / 2, w free (L2 on w) or w = a b (L2 on a and b), and where it should end.

    L2 on a and b is L1 on w. AdamW with exact gradients feels no decay; under noise of sd sigma the argument of expected() makes it
    gradient descent with L2 on a free w, and with (2/3) |w|^(3/2) on a factorised one, strength sigma lam (our derivation).
    """
    strengths, rows, began, done = parse_numbers("scalar_lams"), [], time.monotonic(), 0
    lam, start = torch.tensor(strengths)[:, None], torch.tensor([0.2, 1.2])
    for form, factors in (("free", start[None]), ("factorised", torch.stack([1.5 * start.sqrt(), start.sqrt() / 1.5]))):
        for name, noise in (("adam_l2", 0.0), ("adamw", 0.0), ("adamw", scalar_noise)):
            best = minimum(lam * (noise if name == "adamw" else 1), POWER[form, int(noise > 0)])
            generator = torch.Generator().manual_seed(0)

            def dL(A, noise=noise, generator=generator):
                g = (A.prod(0) - MINIMUM) @ HESSIAN
                g = g + noise * torch.randn(g.shape, generator=generator)
                return g * (A.flip(0) if len(A) == 2 else 1)  # dL/da = b dL/dw

            A, t, state = factors[:, None].expand(-1, len(lam), -1), 0.0, {}  # (1 or 2, lam, 2)
            steps, lr = plan(name)
            wanted = {*(steps * np.linspace(0, 1, 5 * points) ** 2).round().astype(int).tolist()}  # denser where it moves
            for step in range(steps + 1):
                if step in wanted:
                    w = A.prod(0)
                    loss = ((w - MINIMUM) @ HESSIAN * (w - MINIMUM)).sum(-1) / 2
                    rows += [{"form": form, "optimizer": name, "grad_noise": noise, "lam": strengths[i], "step": step, "t": t, "loss": loss[i].item(),
                              "w1": w[i, 0].item(), "w2": w[i, 1].item(), "w1_expected": best[i, 0].item(), "w2_expected": best[i, 1].item()}
                             for i in range(len(lam))]
                A = update(name, A, dL, lam, lr(step), state, step)
                t += lr(step)
            for row in rows[-len(lam):]:
                print(f"{form:11}{name:8}noise {noise:<4g}lam {row['lam']:<4g}: ends at ({row['w1']:7.4f}, {row['w2']:7.4f}), "
                      f"expected ({row['w1_expected']:7.4f}, {row['w2_expected']:7.4f})")
            done += 1
            print(f"  {time_left((time.monotonic() - began) * (6 / done - 1))} left", flush=True)
    write_csv("scalars.csv", rows)


def minimum(strength, power):
    """argmin L(w) + strength / power * sum |w_i|^power, by proximal gradient, for power 1, 1.5 or 2. strength (n, 1) -> (n, 2)."""
    w, c = torch.zeros(len(strength), 2), 0.5 * strength
    for _ in range(2000):
        w = w - 0.5 * (w - MINIMUM) @ HESSIAN
        size = {1: (w.abs() - c).clamp(min=0), 1.5: ((c**2 + 4 * w.abs()).sqrt() - c) ** 2 / 4, 2: w.abs() / (1 + c)}[power]
        w = w.sign() * size
    return w

# ------------------------------------------------------------------------------------------------------------------- main

def main():
    with user_errors("scripts/theory.py"):
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
            print(f"\nfigure: {(figures.two_parameters if problem == 'scalars' else figures.factorised_models)(out_dir)}")


if __name__ == "__main__":
    configure(globals())
    main()
