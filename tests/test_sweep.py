"""Grids of tiny runs of train_lm.py in subprocesses: skipped, resumed, failed, refused and tabulated."""
import contextlib
import fcntl
import io
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import REPO, TINY, environment, flags, load, log_lines, one_line_exit_2, script

from configurator import script_settings
from nanorank import sweep_tables
from nanorank.errors import UserError, user_errors
from nanorank.figures import sweep as sweep_figures
from nanorank.tables import read_csv
from scripts import figures, sweep

SMALL = {**TINY, "n_layer": 1, "n_embd": 16, "max_iters": 4, "warmup_iters": 1, "rank_interval": 2,
         "eval_interval": 2}
SMALL.pop("attn_wd")
GRID = "attn_wd=0,1; mlp_wd=1; seed=1,2"


def settings_of(out_dir, data_dir, grid=GRID, **trainer):
    """sweep.py's settings for a grid of tiny runs."""
    fixed = shlex.join(flags(**{**SMALL, "data_dir": data_dir, **trainer}))
    return dict(configs="", fixed=fixed, grid=grid, out_dir=str(out_dir), figure=False, threads=1)


def run(**settings):
    """sweep.main() in this process, its trainers in theirs: (exit status, stdout, stderr)."""
    code = 0
    out, err = io.StringIO(), io.StringIO()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        patch.chdir(REPO)
        for name, value in settings.items():
            assert hasattr(sweep, name), name
            patch.setattr(sweep, name, value)
        try:
            with user_errors("sweep.py"):
                sweep.main()
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def swept(tmp_path_factory, data_dir):
    """A sweep of two decays of attention and two seeds, all done: (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("swept") / "out"
    code, printed, errors = run(**settings_of(out, data_dir), jobs=2)
    assert code == 0, errors
    return out, printed


def test_every_cell_is_a_run_of_its_own_settings(swept):
    out, printed = swept
    runs = read_csv(out / "sweep.csv")
    curves = read_csv(out / "curves.csv")
    assert list(runs["cell"]) == [f"attn_wd={wd},mlp_wd=1,seed={seed}" for wd in (0, 1) for seed in (1, 2)]
    assert set(runs["status"]) == {"done"}
    for _, row in runs.iterrows():
        folder = out / row["cell"]
        result = read_json(folder / "result.json")
        log = log_lines(folder)
        ranked = [line for line in log if "norm_all" in line]
        assert (result["attn_wd"], result["seed"]) == (row["attn_wd"], row["seed"])
        assert row["test_ppl"] == result["test_ppl"]
        assert row["attn_rank95_qk"] == ranked[-1]["attn_rank95_qk"]
        assert row["norm_growth"] == ranked[-1]["norm_all"] / ranked[0]["norm_all"]
        curve = curves[curves["cell"] == row["cell"]]
        assert list(curve["step"]) == [0, 2, 4]
        val_loss = log[-2]["val_loss"] if "val_loss" in log[-2] else result["best_val_loss"]
        assert curve["val_loss"].iloc[-1] == pytest.approx(val_loss, rel=1e-5)
        assert (folder / "output.log").read_text().count("whole splits") == 1
    assert "4 cells: 0 finished, 0 to resume, 4 to start" in printed
    assert "[4/4]" in printed and "left" in printed
    # seeds start alike, whatever the decay
    a, b, c, d = runs["norm_all_first"]
    assert a == c != b == d


def test_table_and_pairs_of_real_runs(swept):
    out, printed = swept
    ppl = read_csv(out / "sweep.csv").set_index("cell")["test_ppl"]
    a, b = ([ppl[f"attn_wd={wd},mlp_wd=1,seed={seed}"] for seed in (1, 2)] for wd in (0, 1))
    text = (out / "table.md").read_text()
    for values in (a, b):
        assert f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}" in text
    assert text in printed and text.count("**") == 2

    pairs = read_csv(out / "paired.csv")
    assert len(pairs) == 1
    row = pairs.iloc[0]
    differences = [x - y for x, y in zip(a, b)]
    mean = statistics.mean(differences)
    half = 12.7062047364 * statistics.stdev(differences) / math.sqrt(2)  # t table, one degree of freedom
    assert row["difference"] == pytest.approx(mean) and row["seeds"] == 2
    assert row["low"] == pytest.approx(mean - half)
    assert row["high"] == pytest.approx(mean + half)


def test_pairs_with_a_chosen_cell(swept, tmp_path, data_dir):
    """--against names the cell that the others are compared with, in whole or by one of its settings."""
    out = tmp_path / "out"
    shutil.copytree(swept[0], out)
    settings = settings_of(out, data_dir)
    coupled = read_csv(out / "paired.csv").iloc[0]
    for against in ("attn_wd=0", "attn_wd=0, mlp_wd=1"):
        code, printed, errors = run(**settings, collect_only=True, against=against)
        assert code == 0 and f"Difference in test_ppl to {against}, paired over seeds" in printed, errors
        pairs = read_csv(out / "paired.csv")
        assert len(pairs) == 1
        row = pairs.iloc[0]
        assert row["attn_wd"] == 1 and row["against"] == against and row["seeds"] == 2
        mirrored = [-coupled[name] for name in ("difference", "high", "low")]
        assert row[["difference", "low", "high"]].tolist() == mirrored
    refused = {"attn_wd=3": "no cell", "seed=1": "neither --rows=attn_wd nor --columns=mlp_wd"}
    for against, message in refused.items():
        code, _, errors = run(**settings, collect_only=True, against=against)
        assert code == 2 and message in errors and errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.xdist_group("swept")  # CI makes the runs once
def test_skipped_resumed_failed(swept, tmp_path, data_dir):
    """Four cells: finished, killed before its end, killed before its first checkpoint, damaged.

    The first stays as it is, the second goes on, the third starts. The fourth fails, does not stop the
    others, and is named.
    """
    out = tmp_path / "out"
    shutil.copytree(swept[0], out)
    whole, broken, begun, failing = (out / name for name in read_csv(out / "sweep.csv")["cell"])

    def times():
        return {name: os.stat(whole / name).st_mtime_ns for name in os.listdir(whole)}
    before = times()
    for cell in (broken, begun, failing):
        (cell / "result.json").unlink()
    os.unlink(begun / "ckpt.pt")
    (failing / "ckpt.pt").write_bytes(b"no checkpoint")

    code, printed, errors = run(**settings_of(out, data_dir), jobs=3)
    assert code == 1 and f"  {failing.name}: exit 2: train_lm.py: " in errors, errors
    assert "damaged" in errors and broken.name not in errors, errors
    assert "4 cells: 1 finished, 2 to resume, 1 to start" in printed
    assert before == times()
    for cell in (broken, begun):
        old = read_json(swept[0] / cell.name / "result.json")
        new = read_json(out / cell.name / "result.json")
        assert old["test_loss"] == new["test_loss"]
    assert "step 0:" not in (broken / "output.log").read_text().split("whole splits")[1]

    runs = read_csv(out / "sweep.csv")
    assert list(runs["status"]) == ["done", "done", "done", "failed"] and math.isnan(runs["test_ppl"].iloc[3])
    assert "(1 of 2)" in (out / "table.md").read_text() and "3 of 4 runs done" in printed
    pairs = read_csv(out / "paired.csv")
    assert pairs[["seeds", "seeds_in_grid"]].values.tolist() == [[1, 2]]
    assert (out / "paired.csv").read_text().endswith(",nan,nan,nan,1,2\n")


def test_collect_marks_what_is_missing(swept, tmp_path, data_dir):
    out = tmp_path / "out"
    shutil.copytree(swept[0], out)
    settings = settings_of(out, data_dir, "attn_wd=0,1,2; mlp_wd=1; seed=1,2")
    code, printed, errors = run(**settings, collect_only=True)
    assert code == 0, errors
    assert list(read_csv(out / "sweep.csv")["status"]) == ["done"] * 4 + ["missing"] * 2
    assert not (out / "attn_wd=2,mlp_wd=1,seed=1").exists()
    assert "| missing" in printed and "4 of 6 runs done" in printed


def test_folder_of_other_settings_is_refused(swept, data_dir):
    """As a user runs it: one line, exit 2, nothing on stdout."""
    settings = settings_of(swept[0], data_dir, max_iters=5)
    done = script("-m", "scripts.sweep", *flags(**settings), "--dry_run")
    one_line_exit_2(done, "attn_wd=0,mlp_wd=1,seed=1", "result.json", "max_iters was 4, is 5")
    assert done.stdout == ""


@pytest.mark.slow
def test_stopped_saves_and_goes_on(tmp_path, data_dir):
    """SIGTERM reaches the trainer, which saves; exit 143, and the waiting cell is not begun.

    The same command goes on where it was.
    """
    long = {"max_iters": 1000, "rank_interval": 0, "eval_interval": 1000, "eval_iters": 1}
    settings = settings_of(tmp_path, data_dir, "attn_wd=0,1", **long)
    cell = tmp_path / "attn_wd=0"
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.sweep", *flags(**settings)], cwd=REPO, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    log = cell / "log.jsonl"
    for _ in range(600):
        if log.exists() and "train_loss" in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and not errors, errors
    assert "the same command goes on" in printed
    step = load(cell / "ckpt.pt")["iter_num"]
    assert 0 < step < 1000 and not (tmp_path / "attn_wd=1").exists()

    code, printed, errors = run(**{**settings, "grid": "attn_wd=0"})
    assert code == 0 and "1 to resume" in printed, errors
    second = (cell / "output.log").read_text().split("stopped by signal 15")[1]
    assert f"step {step + 4 - step % 5}:" in second and "step 4:" not in second


def test_two_sweeps_do_not_share_a_folder(tmp_path, data_dir):
    (tmp_path / "attn_wd=0").mkdir()
    with open(tmp_path / "attn_wd=0" / "output.log", "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        code, _, errors = run(**settings_of(tmp_path, data_dir, "attn_wd=0"))
    assert code == 1 and "attn_wd=0: another sweep's trainer is at work in its folder" in errors


def test_dry_run(tmp_path):
    """One command a line and nothing else; torchrun where a run has several processes."""
    code, printed, errors = run(
        configs="config/demo.py", fixed="--snapshot_steps=every:10",
        dry_run=True, nproc=2, out_dir=str(tmp_path),
        grid="learning_rate+min_lr=1e-3:1e-4,0.00003:3e-6; tied=true,no\nattn_wd+mlp_wd=0,1",
    )
    lines = printed.splitlines()
    assert code == 0 and len(lines) == 8 and not errors
    assert lines[-1] == (
        "torchrun --standalone --nproc_per_node=2 train_lm.py config/demo.py --snapshot_steps=every:10 "
        "--learning_rate=3e-05 --min_lr=3e-06 --tied=false --attn_wd=1 --mlp_wd=1 "
        f"--out_dir={tmp_path}/learning_rate=3e-05,min_lr=3e-06,tied=false,attn_wd=1,mlp_wd=1 "
        "--init_from=auto --overwrite"
    )
    assert os.listdir(tmp_path) == []


def test_dry_run_into_head_is_silent():
    grid = "seed=" + ",".join(map(str, range(2000)))  # more than a pipe holds
    line = f"{shlex.quote(sys.executable)} -m scripts.sweep '--grid={grid}' --dry_run | head -1"
    done = subprocess.run(["bash", "-c", line], cwd=REPO, env=environment(), capture_output=True, text=True)
    assert done.stdout.startswith("python train_lm.py") and done.stderr == ""


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setattr(sweep, "gpus", "0,1,2,5,7")
    monkeypatch.setattr(sweep, "nproc", 2)
    assert sweep.gpu_groups() == ["0,1", "2,5"]


@pytest.mark.parametrize("grid, words", [
    ("attn_dw=0,1", "attn_dw.*attn_wd[?]"),
    ("attn_wd=0,x", "attn_wd.*a float.*'x'"),
    ("seed=0.5", "seed.*an int.*0.5"),
    ("attn_wd=", "'attn_wd=' lacks a value"),
    ("attn_wd=1,,2", "'attn_wd=1,,2' lacks a value"),
    ("attn_wd", "'attn_wd' lacks a value"),
    (" ; ", "is empty"),
    ("attn_wd=0,0.0", "attn_wd=0.0 .*twice"),
    ("attn_wd=0; attn_wd=1", "attn_wd .*twice"),
    ("attn_wd+mlp_wd+embed_wd=0:1", "'0:1'.*one each"),
    ("out_dir=a,b", "out_dir.*cannot vary"),
])
def test_bad_grids(grid, words):
    with pytest.raises(UserError, match=words) as error:
        sweep.read_grid(grid, script_settings({"__file__": str(REPO / "train_lm.py")}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, value, word", [
    ("trainer", "sweep.py", "--trainer=sweep.py"),
    ("trainer", "no.py", "--trainer=no.py"),
    ("fixed", "--n_layers=2", "--n_layers; it is --n_layer"),
    ("fixed", "'", "--fixed="),
    ("configs", "no.py", "no.py"),
    ("rows", "attn_dw", "attn_wd?"),
    ("nproc", 0, "--nproc=0"),
    ("jobs", -1, "--jobs=-1"),
])
def test_bad_settings(name, value, word):
    code, printed, errors = run(dry_run=True, **{name: value})
    assert code == 2 and len(errors.splitlines()) == 1 and printed == "" and word in errors, errors


def test_interval():
    """Against the printed t quantiles; 1 to n have the mean (n + 1) / 2 and the variance n (n + 1) / 12."""
    t = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 10: 2.22814, 30: 2.04227,
         100: 1.98397}
    for df, quantile in t.items():
        n = df + 1
        sd = math.sqrt(n * (n + 1) / 12)
        half = quantile * sd / math.sqrt(n)
        expected = ((n + 1) / 2, sd, (n + 1) / 2 - half, (n + 1) / 2 + half)
        assert sweep_tables.interval(range(1, n + 1)) == pytest.approx(expected, rel=2e-5)
    mean, sd, *_ = sweep_tables.interval([7.0])
    assert mean == 7 and math.isnan(sd)


@pytest.mark.parametrize("second, titles", [
    ("sgd:0.01:1", ["optimizer=adamw", "optimizer=sgd"]),
    ("sgd:0.03:1", [""]),
])
def test_joined_settings_do_not_hide_runs(second, titles):
    """A setting that varies together with the row stays apart in the tables unless the row settles it."""
    axes = sweep.read_grid(
        f"optimizer+learning_rate+warmup_iters=adamw:0.01:1,{second}; seed=1,2",
        {"optimizer": "adamw", "learning_rate": 0.1, "warmup_iters": 0, "seed": 0},
    )
    values = [{**a, **b} for a in axes[0] for b in axes[1]]
    cells = [sweep.Cell(v, Path(str(i)), {"attn_wd": 0.0, **v}) for i, v in enumerate(values)]
    summary = [{"status": "done", "test_ppl": float(i)} for i in range(4)]
    table = sweep_tables.tabulate(cells, summary, "learning_rate", "attn_wd", "test_ppl")
    assert list(table["title"].unique()) == titles
    assert sorted(table["value"]) == [0, 1, 2, 3]
    assert not table.duplicated(["title", "row", "column", "seed"]).any()


@pytest.mark.parametrize("names, metric", [
    ({"val_acc", "test_acc", "test_ppl"}, "test_acc"), ({"val_ppl", "test_ppl"}, "test_ppl"),
    ({"val_ppl", "val_loss"}, "val_ppl"), (set(), None)])
def test_tables_show_val_where_the_data_has_no_test(names, metric):
    assert sweep_tables.main_metric(names) == metric


def test_runs_from_a_checkpoint_have_its_shape(tmp_path):
    """result.json states the checkpoint's shape; where there is none, another shape is another run."""
    result = {"n_layer": 1, "init_from": "a.pt", "bias": True, "seed": 1, "min_lr": 1e-4}
    (tmp_path / "result.json").write_text(json.dumps(result))
    settings = {"n_layer": 4, "init_from": "a.pt", "bias": False, "seed": 1, "min_lr": -1.0}  # -1: a tenth
    assert sweep.finished(sweep.Cell({}, tmp_path, settings))
    for change in ({"init_from": "auto"}, {"seed": 2}, {"init_from": "auto", "n_layer": 0}):
        with pytest.raises(ValueError, match="another run"):
            sweep.finished(sweep.Cell({}, tmp_path, {**settings, **change}))


def test_a_run_of_an_older_version_is_finished(tmp_path):
    """A setting that came later than result.json stands there as older versions trained."""
    (tmp_path / "result.json").write_text(json.dumps({"init_from": "auto", "seed": 1}))
    later = {"rope": False, "qk_norm": False, "qk_wd": -1.0, "qk_decay": "l2"}
    settings = {"init_from": "auto", "seed": 1, **later}
    assert sweep.finished(sweep.Cell({}, tmp_path, settings))
    with pytest.raises(ValueError, match="rope was False, is True"):
        sweep.finished(sweep.Cell({}, tmp_path, {**settings, "rope": True}))


def test_table_in_markdown():
    """Bold where best; the number of seeds where some are missing; one that is not finite is no mean."""
    values = {
        (0.0, 0.1): [2.0, 4.0],
        (0.0, 1.0): [2.5, None],
        (4.0, 0.1): [None, None],
        (4.0, 1.0): [math.nan, 1.0],
    }
    table = pd.DataFrame([
        {"row": row, "column": column, "done": value is not None, "value": value}
        for (row, column), seeds in values.items() for value in seeds
    ])
    text = sweep_tables.markdown(table, "test_ppl: attn_wd \\ mlp_wd", min)
    head, rule, first, second = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    )
    assert head == ["test_ppl: attn_wd \\ mlp_wd", "0.1", "1"] and set("".join(rule)) <= set(":-")
    assert first == ["0", "3 ± 1.4", "**2.5 (1 of 2)**"] and second == ["4", "missing", "nan ± nan"]
    assert "**3 ± 1.4**" in sweep_tables.markdown(table, "test_acc", max)


@pytest.mark.slow
@pytest.mark.xdist_group("swept")  # CI makes the runs once
def test_failed_cell_shows_in_figures_not_as_a_number(swept, tmp_path):
    """All figures of a sweep with missing runs; and a CSV without a finished one is none."""
    for name in ("sweep.csv", "curves.csv"):
        shutil.copy(swept[0] / name, tmp_path)
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    names = lines[0].split(",")
    assert names[:5] == ["cell", "status", "attn_wd", "mlp_wd", "seed"]
    missing = '"attn_wd=1,mlp_wd=3,seed=1",missing,1.0,3.0,1' + "," * (len(names) - 5)

    (tmp_path / "sweep.csv").write_text("\n".join([*lines, missing]) + "\n")
    expected = ["wd_grid.png", "rank_by_layer.png", "mean_rank.png", "over_training.png",
                "difference_over_training.png"]
    assert [os.path.basename(path) for path in sweep_figures.sweep(str(tmp_path))] == expected
    for path in (*expected, "wd_grid.pdf"):
        assert (tmp_path / path).stat().st_size > 5000

    # where all runs without decay failed there is nothing to compare, and the others are drawn
    for name in ("sweep.csv", "curves.csv"):
        whole = (swept[0] / name).read_text().splitlines()
        others = [line for line in whole if "attn_wd=0" not in line]
        (tmp_path / name).write_text("\n".join(others) + "\n")
    failed = '"attn_wd=0,mlp_wd=1,seed=1",failed,0.0,1.0,1' + "," * (len(names) - 5)
    with open(tmp_path / "sweep.csv", "a") as file:
        file.write(failed + "\n")
    drawn = [os.path.basename(path) for path in sweep_figures.sweep(str(tmp_path))]
    assert "over_training.png" in drawn and "difference_over_training.png" not in drawn

    (tmp_path / "sweep.csv").write_text("\n".join([lines[0], missing]) + "\n")
    assert sweep_figures.sweep(str(tmp_path)) == []
    drawn, left = figures.everything(str(tmp_path))
    assert any("rank_by_layer.png stays as it is" in line for line in left)


def test_differences_of_loss_are_paired_over_seeds(tmp_path):
    """Of the same seed at the same step; seed 2 has no partner, the first step tells nothing."""
    lines = ["cell,step,attn_rank95_qk,attn_rank95_ov,val_loss"]
    for cell, loss in (("attn_wd=0,seed=1", 2), ("attn_wd=4,seed=1", 3), ("attn_wd=4,seed=2", 9)):
        lines += [f'"{cell}",0,1,1,5', f'"{cell}",10,1,1,', f'"{cell}",20,1,1,{loss}']
    (tmp_path / "curves.csv").write_text("\n".join(lines) + "\n")
    differences = sweep_figures.loss_differences(str(tmp_path))
    assert differences.to_dict() == {(4.0,): {("", "1", 20): -1.0}}

    (tmp_path / "curves.csv").write_text("\n".join(line for line in lines if "attn_wd=0" not in line) + "\n")
    with pytest.raises(UserError, match="lack attn_wd=0"):
        sweep_figures.loss_differences(str(tmp_path))
    others = [line for line in lines if "attn_wd=4,seed=1" not in line]  # no seed is in both
    (tmp_path / "curves.csv").write_text("\n".join(others) + "\n")
    with pytest.raises(UserError, match="or another to compare it with"):
        sweep_figures.loss_differences(str(tmp_path))


def test_differences_of_loss_where_qk_wd_varies(tmp_path):
    """All are compared with the run whose attention has no decay, where there is one; -1 is attn_wd's."""
    def differences(*runs):
        lines = ["cell,step,attn_rank95_qk,attn_rank95_ov,val_loss"]
        for cell, loss in runs:
            lines.append(f'"seed=1,attn_wd={cell}",20,1,1,{loss}')
        (tmp_path / "curves.csv").write_text("\n".join(lines) + "\n")
        table = sweep_figures.loss_differences(str(tmp_path))
        return {(rest, decay): x for decay in table for (rest, _, _), x in table[decay].dropna().items()}

    halves = [("0,qk_wd=1.5", 3), ("1.5,qk_wd=0", 4), ("1.5,qk_wd=-1", 6)]
    for none in ("0,qk_wd=-1", "0,qk_wd=0"):
        found = differences((none, 2), *halves)
        assert found == {("", (0, 1.5)): -1, ("", (1.5, 0)): -2, ("", (1.5, 1.5)): -4}
    found = differences(("0,qk_wd=1", 1), ("4,qk_wd=1", 2), ("0,qk_wd=2", 5), ("4,qk_wd=2", 7))
    assert found == {("qk_wd=1", (4,)): -1, ("qk_wd=2", (4,)): -2}


def test_a_figure_that_does_not_exist(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["figures.py", "no_figure", "x.csv"])
    with pytest.raises(UserError, match="usage: .*wd_grid"):
        figures.main()
