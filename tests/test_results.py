"""The documents say what the files in results/ say, link to what is there, and stay short and plain."""
import csv
import json
import re
import statistics

import pandas as pd
import pytest
import torch
from conftest import REPO

from nanorank.factorised import measured_rate
from nanorank.sweep_tables import interval

FOLDERS = sorted(path.parent.name for path in REPO.glob("results/*/README.md"))
DOCUMENTS = [REPO / "README.md", REPO / "RESULTS.md", *sorted(REPO.glob("docs/*.md"))]
DOCUMENTS += [REPO / "results" / folder / "README.md" for folder in FOLDERS]
PRIVATE_LABELS = r"\b(?:F[1-5][ab]?|T1|N[1-6]|P[12]|PAPER|DESIGN)\b"


def read(*path):
    return REPO.joinpath(*path).read_text(encoding="utf-8")


def rows(path):
    with open(REPO / "results" / path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(text):
    return [float(x.replace("−", "-")) for x in re.findall(r"[-−+]?\d+(?:\.\d+)?", text.replace("**", ""))]


def check_line(line, expected):
    """The numbers in a line of a table against [(value, digits after the point)]."""
    for x, (value, digits) in zip(numbers(line), expected, strict=True):
        assert abs(x - value) <= 0.5001 * 10**-digits, (line, x, value)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_what_is_linked_is_there(path):
    text = path.read_text(encoding="utf-8")
    links = [path.parent / x for x in re.findall(r"\]\(([^)#]+)\)", text) if not x.startswith("http")]
    links += [REPO / x for x in re.findall(r"`((?:results|config)/[\w./-]+)`", text)]
    assert links or path.parent != REPO
    assert not [x for x in links if not x.exists()]


def test_every_results_folder_has_its_readme():
    assert FOLDERS == sorted(path.name for path in (REPO / "results").iterdir() if path.is_dir())
    assert not [folder for folder in FOLDERS if f"results/{folder}/README.md" not in read("RESULTS.md")]


@pytest.mark.parametrize("name, most", [("README.md", 160), ("RESULTS.md", 150)])
def test_length(name, most):
    assert len(read(name).splitlines()) <= most


def test_no_private_labels():
    found = []
    for folder in (".", "config", "config/sweep", "docs", "nanorank", "nanorank/figures", "scripts", "tests",
                   "tests/trials", "results/*"):
        for path in [*REPO.glob(f"{folder}/*.md"), *REPO.glob(f"{folder}/*.py")]:
            if path.name != "test_results.py":
                labels = set(re.findall(PRIVATE_LABELS, path.read_text(encoding="utf-8")))
                found += [f"{path.relative_to(REPO)}: {', '.join(sorted(labels))}"] if labels else []
    assert not found


def test_summaries_repeat_the_tables():
    """Each decimal of RESULTS.md and of README's headlines stands in the README of a results folder."""
    def decimals(text):
        return set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", text))

    tables = set().union(*(decimals(read("results", folder, "README.md")) for folder in FOLDERS))
    headlines = read("README.md").partition("## Headline results")[2].partition("\n## ")[0]
    assert len(decimals(headlines)) > 5
    assert not (decimals(read("RESULTS.md")) | decimals(headlines)) - tables


def sweep_means(name, metric="test_ppl"):
    """{(attn_wd, mlp_wd): (mean, standard deviation)} over the seeds of results/NAME/sweep.csv."""
    cells = {}
    for row in rows(f"{name}/sweep.csv"):
        assert row["status"] == "done", row["cell"]
        cells.setdefault((float(row["attn_wd"]), float(row["mlp_wd"])), []).append(float(row[metric]))
    return {at: (statistics.mean(x), statistics.stdev(x)) for at, x in cells.items()}


def test_wd_grid():
    """Every cell of the table, and the differences to coupled decay with their intervals."""
    text = read("results/wd_grid/README.md")
    means = sweep_means("wd_grid")
    table = {}
    for line in re.findall(r"^\| (?:0|0\.4|1\.2|4) \| [\d.]+ \|.*±.*$", text, re.M):
        attn, _, *cells = numbers(line)
        for wd, mean, sd in zip((0.4, 1.2, 4.0), cells[::2], cells[1::2], strict=True):
            table[attn, wd] = (mean, sd)
    assert table.keys() == means.keys()
    for at, (mean, sd) in table.items():
        assert (mean, sd) == (round(means[at][0], 3), round(means[at][1], 2)), at

    paired = {float(row["mlp_wd"]): row for row in rows("wd_grid/paired.csv") if float(row["attn_wd"]) == 0}
    lines = re.findall(r"^\| [\d.]+ \| \*?\*?[−+][\d.]+\*?\*? \| [^|]+to[^|]+\|$", text, re.M)
    expected = [[wd, *(round(float(row[name]), 2) for name in ("difference", "low", "high"))]
                for wd, row in paired.items()]
    assert [numbers(line) for line in lines] == expected


def test_muon():
    lines = re.findall(r"^\| [\d.]+ \| \*?\*?[\d.]+ ± .*$", read("results/muon/README.md"), re.M)
    stated = {numbers(line)[0]: numbers(line)[1:3] for line in lines}
    assert stated == {attn: [round(x, 3) for x in found] for (attn, _), found in sweep_means("muon").items()}


def test_pile():
    """Means over seeds, differences to coupled decay, ranks and gaps at both learning rates."""
    paired = rows("pile/paired.csv")
    stated = {}
    for line in re.findall(r"^\| 0\.00[24] \| [04] \|.*$", read("results/pile/README.md"), re.M):
        lr, wd, constants, ppl, sd, *rest = numbers(line)
        stated[lr, wd] = [constants, ppl, sd, *rest[-4:]]
        if wd == 0:
            row = next(row for row in paired if row["table"].startswith(f"learning_rate={lr:g},"))
            assert rest[:3] == [round(float(row[name]), 1) for name in ("difference", "low", "high")]

    runs = {}
    for row in rows("pile/sweep.csv"):
        assert row["status"] == "done"
        runs.setdefault((float(row["learning_rate"]), float(row["attn_wd"])), []).append(row)
    for at, found in runs.items():
        def mean(name, found=found):
            return statistics.mean(float(row[name]) for row in found)

        assert len(found) == 5
        assert stated[at] == [
            round(mean("decay_time_constants"), 2),
            round(mean("test_ppl"), 1),
            round(statistics.stdev(float(row["test_ppl"]) for row in found)),
            *(round(mean(f"attn_rank95_{product}") + 1e-9, 1) for product in ("qk", "ov")),
            *(round(mean(f"attn_gap_{product}"), 3) for product in ("qk", "ov")),
        ], at


def test_norm_growth():
    growth = {}
    for row in rows("norm_growth/sweep.csv"):
        at = (row["optimizer"], float(row["learning_rate"]), float(row["attn_wd"]))
        growth[at] = round(float(row["norm_growth"]), 2)
    stated = {}
    for name, line in re.findall(r"^\| (AdamW|SGD) ([^\n]+)$", read("results/norm_growth/README.md"), re.M):
        lr, *cells = line.strip("| ").split(" | ")
        for wd, x in zip((0, 0.03, 0.3, 3), cells, strict=True):
            stated[name.lower(), float(lr), wd] = float(x)
    assert stated == growth


@pytest.mark.parametrize("folder, runs, column, digits, scale", [
    ("demo", (0, 4), "test_ppl", 3, 1),
    ("pile_small", (0, 4), "test_ppl", 2, 1),
    ("vit_demo", (0, 4), "test_acc", 1, 100),
    ("vit_tiny", (0, 2, 6, 20), "test_acc", 1, 100),
])
def test_runs(folder, runs, column, digits, scale):
    """The result of a run, and the mean rank of its heads at the end."""
    text = read("results", folder, "README.md")
    heads = rows(f"{folder}/heads.csv")
    for wd in runs:
        result = json.loads(read("results", folder, f"result-{wd}.json"))
        line = next(line for line in text.splitlines() if line.startswith(f"| {wd} | "))
        assert f"{scale * result[column]:.{digits}f}" in line
        assert f"{result['decay_time_constants']:.2f}" in line

        of_run = [row for row in heads if re.search(rf"[-/]{wd}(/|$)", row["checkpoint"])]
        last_step = max(int(row["step"]) for row in of_run)
        for product in ("qk", "ov"):
            mean = statistics.mean(float(row["rank95"]) for row in of_run
                                   if int(row["step"]) == last_step and row["product"] == product)
            assert f"{mean:.2f}" in line or f"{mean:.1f}" in line, (wd, product, mean)


def test_pile_bytes():
    """Means over seeds of perplexity, mean ranks, gaps and saturation; differences with their intervals."""
    runs = pd.read_csv(REPO / "results/pile_bytes/sweep.csv").set_index("cell")
    heads = pd.read_csv(REPO / "results/pile_bytes/heads.csv")
    states = pd.read_csv(REPO / "results/pile_bytes/saturation.csv")
    for table in (heads, states):
        table["cell"] = table["checkpoint"].str.split("/").str[-2]
    means = heads.groupby(["cell", "product"])[["rank95", "gap", "gap_gaussian"]].mean().unstack()
    states = states[(states["layer"] != "output") & (states["init"] == "trained")]
    cosines = states.groupby("cell")["cosine"].mean()
    pairs = {float(row["mlp_wd"]): row for row in rows("pile_bytes/paired.csv")}

    lines = re.findall(r"^\| (?:0\.15|0\.45|1\.5) \|.*$", read("results/pile_bytes/README.md"), re.M)
    cells = list(runs.groupby(["mlp_wd", "attn_wd"]))
    assert len(lines) == len(cells)
    for line, ((mlp, attn), own) in zip(lines, cells, strict=True):
        ppl = own["test_ppl"]
        expected = [(mlp, 9), (attn, 9), (own["decay_time_constants"].mean(), 2)]
        expected += [(ppl.mean(), 3), (ppl.std(), 3)]
        if attn == 0:
            expected += [(float(pairs[mlp][name]), 3) for name in ("difference", "low", "high")]
        here = means.loc[own.index].mean()
        expected += [(here["rank95", product], 1) for product in ("qk", "ov")]
        expected += [(here[name, product], 3) for product in ("qk", "ov") for name in ("gap", "gap_gaussian")]
        expected.append((cosines[own.index].mean(), 2))
        check_line(line, expected)


def test_pile_budget():
    """A line a length: means over seeds without and with decay on attention, the paired difference, ranks."""
    runs = pd.read_csv(REPO / "results/pile_budget/sweep.csv")
    pairs = {float(row["mlp_wd"]): row for row in rows("pile_budget/paired.csv")}
    lines = re.findall(r"^\| \d+ \|.*$", read("results/pile_budget/README.md"), re.M)
    cells = list(runs.groupby("max_iters"))
    assert len(lines) == len(cells) == 4
    for line, (steps, own) in zip(lines, cells, strict=True):
        wd = own["mlp_wd"].iloc[0]
        without, coupled = own[own["attn_wd"] == 0], own[own["attn_wd"] == wd]
        expected = [(steps, 9), (own["tokens"].iloc[0] / 1e6, 1), (wd, 9)]
        expected.append((coupled["decay_time_constants"].mean(), 2))
        for x in (without["test_ppl"], coupled["test_ppl"]):
            assert len(x) == 3
            expected += [(x.mean(), 3), (x.std(), 3)]
        expected += [(float(pairs[wd][name]), 3) for name in ("difference", "low", "high")]
        for name in ("attn_rank95_qk", "attn_rank95_ov"):
            expected += [(without[name].mean(), 1), (coupled[name].mean(), 1)]
        check_line(line, expected)


def test_pile_qk_vp():
    """A line a half: means over seeds of perplexity, ranks and gaps, and the difference to no decay."""
    runs = pd.read_csv(REPO / "results/pile_qk_vp/sweep.csv")
    pairs = {(float(row["attn_wd"]), float(row["qk_wd"])): row for row in rows("pile_qk_vp/paired.csv")}
    lines = re.findall(r"^\| (?:0|1\.5) \| (?:0|1\.5) \|.*$", read("results/pile_qk_vp/README.md"), re.M)
    halves = [(0, -1), (0, 1.5), (1.5, 0), (1.5, -1)]
    assert len(lines) == len(halves)
    for line, (attn, qk) in zip(lines, halves, strict=True):
        own = runs[(runs["attn_wd"] == attn) & (runs["qk_wd"] == qk)]
        ppl = own["test_ppl"]
        assert len(ppl) == 3
        expected = [(attn if qk == -1 else qk, 9), (attn, 9), (ppl.mean(), 3), (ppl.std(), 3)]
        if (attn, qk) in pairs:
            expected += [(float(pairs[attn, qk][name]), 3) for name in ("difference", "low", "high")]
        for name, digits in (("rank95", 1), ("gap", 3)):
            expected += [(own[f"attn_{name}_{product}"].mean(), digits) for product in ("qk", "ov")]
        check_line(line, expected)

    text = read("results/pile_qk_vp/README.md").replace("\n", " ")
    to_qk = {(float(row["attn_wd"]), float(row["qk_wd"])): row for row in rows("pile_qk_vp/paired_qk.csv")}
    mean, low, high = (float(to_qk[1.5, 0][name]) for name in ("difference", "low", "high"))
    assert f"by {mean:.3f} ({low:.3f} to {high:.3f})".replace("-", "−") in text
    none, qk, vp, both = (runs.pivot(index="seed", columns=["attn_wd", "qk_wd"], values="test_ppl")[at]
                          for at in halves)
    mean, _, low, high = interval(qk + vp - both - none)
    assert f"by {mean:.3f} ({low:.3f} to {high:.3f}" in text


def test_vit_tiny_seeds():
    """A line a decay: means over seeds of accuracy, ranks and gaps, and the paired difference."""
    runs = pd.read_csv(REPO / "results/vit_tiny/seeds/sweep.csv")
    [pair] = rows("vit_tiny/seeds/paired.csv")
    lines = re.findall(r"^\| [06] \|.*±.*$", read("results/vit_tiny/README.md"), re.M)
    cells = list(runs.groupby("attn_wd"))
    assert len(lines) == len(cells) == 2
    for line, (wd, own) in zip(lines, cells, strict=True):
        accuracy = 100 * own["test_acc"]
        assert len(accuracy) == 3
        expected = [(wd, 9), (own["decay_time_constants"].mean(), 2)]
        expected += [(accuracy.mean(), 1), (accuracy.std(), 1)]
        if wd == 0:
            expected += [(100 * float(pair[name]), 1) for name in ("difference", "low", "high")]
        for name, digits in (("rank95", 1), ("stable_rank", 1), ("gap", 3)):
            expected += [(own[f"attn_{name}_{product}"].mean(), digits) for product in ("qk", "ov")]
        check_line(line, expected)


def test_modern_attention():
    """Every number of the table: means over seeds, and differences with their intervals."""
    measures = {(row["kind"], float(row["attn_wd"]), row["measure"]): row
                for row in rows("modern_attention/kinds.csv")}
    lines = re.findall(r"^\| ([\w +-]+) \| (0|0\.45|1\.35) \| (.*)\|$",
                       read("results/modern_attention/README.md"), re.M)
    assert len(lines) == 15
    for kind, wd, line in lines:
        def value(name, column="mean", kind=kind, wd=wd):
            return float(measures[kind, float(wd), name][column])

        ppl = "test_ppl"
        expected = [(value(ppl), 2), (value(ppl, "sd"), 2)]
        if wd != "0":
            expected += [(value(ppl, column), 2) for column in ("zero_minus_this", "low", "high")]
        expected += [(value("rank95_qk"), 1), (value("rank95_ov"), 1)]
        qk = "qk_stacked" if "grouped" in kind else "qk"
        gap = "gap"
        if "rotary" in kind:
            expected += [(value(f"planes95_{qk}"), 1), (value("rank_in_plane"), 2)]
            gap = "gap_planes"
        if "QK-norm" not in kind:
            expected += [(value(f"{gap}_{qk}"), 3), (value(f"{gap}_gaussian_{qk}"), 3)]
        expected.append((value("gap_ov_stacked" if "grouped" in kind else "gap_ov"), 3))
        check_line(line, expected)


def test_balance_of_a_transformer():
    """Rates of the discrepancy over 2 lam, ranks and accuracy at the end."""
    table = pd.read_csv(REPO / "results/theory/attention.csv").query("lam > 0")
    stated = re.findall(r"^\| (gd|momentum|adam_l2|adamw) \| ([\d.]+) \| (.*)\|$",
                        read("results/theory/README.md"), re.M)
    assert len(stated) == len(table[["optimizer", "lam"]].drop_duplicates())
    for optimizer, lam, line in stated:
        run = table[(table["optimizer"] == optimizer) & (table["lam"] == float(lam))]
        ranks, found = [], []
        for product in ("ov", "qk"):
            for layer in (0, 1):
                one = run[(run["product"] == product) & (run["layer"] == layer)]
                t, D = (torch.tensor(one[name].to_numpy()) for name in ("t", "discrepancy"))
                rate = measured_rate(t, D).item() / (2 * float(lam))
                found.append(round(rate, 0 if rate > 10 else 3))
                ranks.append(one["rank95"].iloc[-1])
        accuracy = round(100 * run["accuracy"].iloc[-1])
        assert numbers(line) == [*found, *ranks, accuracy], (optimizer, lam)


def test_excess_of_norms_falls():
    """|A|^2 + |B|^2 - 2 |A B^T|_* under flow, depth 2: its rate over 2 lambda, the range over lambda."""
    curves = pd.read_csv(REPO / "results/theory/curves.csv")
    curves = curves[(curves["optimizer"] == "flow") & (curves["depth"] == 2) & (curves["lam"] > 0)]
    text = read("results/theory/README.md").replace("\n", " ")
    for problem, runs in curves.groupby("problem"):
        rates = []
        for lam, run in runs.groupby("lam"):
            t, squares, nuclear = (torch.tensor(run[x].to_numpy()) for x in ("t", "sum_sq", "two_nuclear"))
            rates.append(measured_rate(t, squares - nuclear).item() / (2 * lam))
        assert f"{min(rates):.2f} to {max(rates):.2f} in {problem}" in text, (problem, rates)


def test_architectures_are_counted():
    outcomes = [row["outcome"] for row in rows("trust/architectures.csv")]
    text = read("results", "trust", "README.md")
    for outcome in ("equal", "refused", "unverified", "differs", "not built"):
        assert f"| {outcome} | {outcomes.count(outcome)} |" in text
    assert f"`architectures.csv`, {len(outcomes)} kinds" in text


def test_pretrained():
    """Every cell of the two tables; the means are those of the heads."""
    text = read("results", "pretrained", "README.md").splitlines()
    models = {row["model"]: row for row in rows("pretrained/models.csv")}
    for row in models.values():
        assert f"| {' | '.join(row.values())} |" in text

    heads = {}
    for row in rows("pretrained/heads.csv"):
        heads.setdefault((row["model"], row["stack"], row["product"]), []).append(row)
    summary = {(row["model"], row["stack"], row["product"]): row for row in rows("pretrained/summary.csv")}
    assert heads.keys() == summary.keys()
    assert {model for model, _, _ in heads} == models.keys()
    for at, row in summary.items():
        assert int(row["heads"]) == len(heads[at])
        for column in ("rank95", "right_gap", "right_gap_gaussian", "right_imbalance", "norm_A"):
            values = [float(head[column]) for head in heads[at] if head[column]]
            assert len(values) in (0, len(heads[at]))
            assert not values or statistics.mean(values) == pytest.approx(float(row[column]), rel=1e-4)

    for model, stack in dict.fromkeys(at[:2] for at in summary):
        own = {product: summary[model, stack, product] for product in ("qk", "ov")}
        right = {product: summary.get((model, stack, f"{product}_stacked"), own[product]) for product in own}
        cells = [f"{model} {stack}".strip(), models[model]["weight_decay"], own["qk"]["d_head"]]
        columns = (own, "rank95", 1), (right, "right_gap", 3), (right, "right_imbalance", 3)
        for table, column, digits in columns:
            for row in table.values():
                x, gaussian = row[column], row[f"{column}_gaussian"]
                cells.append(f"{float(x):.{digits}f} ({float(gaussian):.{digits}f})" if x else "-")
        assert f"| {' | '.join(cells)} |" in text
