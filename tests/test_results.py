"""What RESULTS.md and README.md state is what the files in results/ say."""
import csv
import json
import re
import statistics

import pytest
from conftest import REPO

RESULTS, README = ((REPO / name).read_text(encoding="utf-8") for name in ("RESULTS.md", "README.md"))


def rows(path):
    with open(REPO / "results" / path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def section(title):
    """The text of RESULTS.md under a heading, up to the next of its level."""
    return RESULTS.partition(f"\n## {title}")[2].partition("\n## ")[0]


def numbers(text):
    return [float(x.replace("−", "-")) for x in re.findall(r"[-−+]?\d+(?:\.\d+)?", text.replace("**", ""))]


@pytest.mark.parametrize("text", [README, RESULTS], ids=["README", "RESULTS"])
def test_what_is_linked_is_there(text):
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", text) if not x.startswith("http")] + re.findall(r"`((?:results|config)/[\w./-]+)`", text)
    assert links and not [x for x in links if not (REPO / x).exists()]


def sweep_means(name, metric="test_ppl"):
    """{(attn_wd, mlp_wd): (mean, standard deviation)} over the seeds of results/NAME/sweep.csv, all runs done."""
    cells = {}
    for row in rows(f"{name}/sweep.csv"):
        assert row["status"] == "done", row["cell"]
        cells.setdefault((float(row["attn_wd"]), float(row["mlp_wd"])), []).append(float(row[metric]))
    return {at: (statistics.mean(x), statistics.stdev(x)) for at, x in cells.items()}


def test_t1():
    """Every cell of the table, and the differences to coupled decay with their intervals."""
    text, means = section("T1"), sweep_means("wd_grid")
    table = {}
    for line in re.findall(r"^\| (?:0|0\.4|1\.2|4) \| [\d.]+ \|.*$", text, re.M):
        attn, _, *cells = numbers(line)
        table.update({(attn, wd): (mean, sd) for wd, mean, sd in zip((0.4, 1.2, 4.0), cells[::2], cells[1::2], strict=True)})
    assert table.keys() == means.keys()
    for at, (mean, sd) in table.items():
        assert (mean, sd) == (round(means[at][0], 3), round(means[at][1], 2)), at
    paired = {float(row["mlp_wd"]): row for row in rows("wd_grid/paired.csv") if float(row["attn_wd"]) == 0}
    stated = [numbers(line) for line in re.findall(r"^\| [\d.]+ \| \*?\*?[−+][\d.]+\*?\*? \| [^|]+to[^|]+\|$", text, re.M)]
    assert stated == [[wd, *(round(float(row[name]), 2) for name in ("difference", "low", "high"))] for wd, row in paired.items()]


def test_muon():
    stated = {numbers(line)[0]: numbers(line)[1:3] for line in re.findall(r"^\| [\d.]+ \| \*?\*?[\d.]+ ± .*$", section("T1"), re.M)}
    assert stated == {attn: [round(x, 3) for x in found] for (attn, _), found in sweep_means("muon").items()}


def test_pile():
    """Means over seeds, differences to coupled decay, ranks and gaps at both learning rates."""
    stated = {}
    for line in re.findall(r"^\| 0\.00[24] \| [04] \|.*$", section("Pile text"), re.M):
        lr, wd, constants, ppl, sd, *rest = numbers(line)
        stated[lr, wd] = [constants, ppl, sd, *rest[-4:]]
        if wd == 0:
            row = next(row for row in rows("pile/paired.csv") if row["table"].startswith(f"learning_rate={lr:g},"))
            assert rest[:3] == [round(float(row[name]), 1) for name in ("difference", "low", "high")]
    runs = {}
    for row in rows("pile/sweep.csv"):
        assert row["status"] == "done"
        runs.setdefault((float(row["learning_rate"]), float(row["attn_wd"])), []).append(row)
    for at, found in runs.items():
        mean = {name: statistics.mean(float(row[name]) for row in found) for name in found[0] if name.startswith(("attn_", "test_", "decay_"))}
        assert len(found) == 5 and stated[at] == [
            round(mean["decay_time_constants"], 2), round(mean["test_ppl"], 1), round(statistics.stdev(float(row["test_ppl"]) for row in found)),
            *(round(mean[f"attn_rank95_{product}"] + 1e-9, 1) for product in ("qk", "ov")),
            *(round(mean[f"attn_gap_{product}"], 3) for product in ("qk", "ov"))], at


def test_n3():
    growth = {(row["optimizer"], float(row["learning_rate"]), float(row["attn_wd"])): float(row["norm_growth"]) for row in rows("norm_growth/sweep.csv")}
    stated = {}
    for name, line in re.findall(r"^\| (AdamW|SGD) ([^\n]+)$", section("N3"), re.M):
        lr, *cells = line.strip("| ").split(" | ")
        stated.update({(name.lower(), float(lr), wd): float(x) for wd, x in zip((0, 0.03, 0.3, 3), cells, strict=True)})
    assert stated == {at: round(x, 2) for at, x in growth.items()}


@pytest.mark.parametrize("title, folder, runs, column, digits, scale", [
    ("Demo", "demo", (0, 4), "test_ppl", 3, 1), ("Vision Transformer", "vit_tiny", (0, 2, 6, 20), "test_acc", 1, 100)])
def test_runs(title, folder, runs, column, digits, scale):
    """What a run reached, and the mean rank of its heads at the end."""
    text = section(title)
    for wd in runs:
        result = json.loads((REPO / "results" / folder / f"result-{wd}.json").read_text())
        line = next(line for line in text.splitlines() if line.startswith(f"| {wd} | "))
        assert f"{scale * result[column]:.{digits}f}" in line and f"{result['decay_time_constants']:.2f}" in line
        last = [row for row in rows(f"{folder}/heads.csv") if re.search(rf"[-/]{wd}(/|$)", row["checkpoint"])]
        last = [row for row in last if int(row["step"]) == max(int(row["step"]) for row in last)]
        for product in ("qk", "ov"):
            mean = statistics.mean(float(row["rank95"]) for row in last if row["product"] == product)
            assert f"{mean:.2f}" in line or f"{mean:.1f}" in line, (wd, product, mean)
