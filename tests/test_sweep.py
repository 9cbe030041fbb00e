"""Grids of tiny runs of train_lm.py in subprocesses: skipped, resumed, failed, refused, tabulated; intervals and tables against other witnesses."""
import contextlib
import csv
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

import pytest
from conftest import REPO, TINY, environment, flags, load, one_line_exit_2, script

from scripts import sweep

SMALL = {**TINY, "n_layer": 1, "n_embd": 16, "max_iters": 4, "warmup_iters": 1, "rank_interval": 2, "eval_interval": 2}
SMALL.pop("attn_wd")


GRID = "attn_wd=0,1; mlp_wd=1; seed=1,2"


def settings_of(out_dir, data_dir, grid=GRID, **trainer):
    """sweep.py's settings for a grid of tiny runs."""
    fixed = shlex.join(flags(**{**SMALL, "data_dir": data_dir, **trainer}))
    return {"configs": "", "fixed": fixed, "grid": grid, "out_dir": str(out_dir), "figure": False, "threads": 1}


def run(**settings):
    """sweep.main() in this process, its trainers in theirs: (exit status, stdout, stderr)."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(REPO)
        for name, value in settings.items():
            assert hasattr(sweep, name), name
            patch.setattr(sweep, name, value)
        try:
            sweep.main()
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def swept(tmp_path_factory, data_dir):
    """A sweep of two decays (of attention and MLPs together, and apart) and two seeds, all done: (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("swept") / "out"
    code, printed, errors = run(**settings_of(out, data_dir), jobs=2)
    assert code == 0, errors
    return out, printed


def test_every_cell_is_a_run_of_its_own_settings(swept):
    out, printed = swept
    rows = read_csv(out / "sweep.csv")
    assert [row["cell"] for row in rows] == [f"attn_wd={wd},mlp_wd=1,seed={seed}" for wd in (0, 1) for seed in (1, 2)]
    for row in rows:
        result = json.loads((out / row["cell"] / "result.json").read_text())
        log = [json.loads(line) for line in (out / row["cell"] / "log.jsonl").read_text().splitlines()]
        ranked = [line for line in log if "norm_all" in line]
        assert (result["attn_wd"], result["seed"]) == (float(row["attn_wd"]), int(row["seed"])) and row["status"] == "done"
        assert float(row["test_ppl"]) == result["test_ppl"] and float(row["attn_rank95_qk"]) == ranked[-1]["attn_rank95_qk"]
        assert float(row["norm_growth"]) == ranked[-1]["norm_all"] / ranked[0]["norm_all"]
        curve = [line for line in read_csv(out / "curves.csv") if line["cell"] == row["cell"]]
        assert [int(line["step"]) for line in curve] == [0, 2, 4]
        assert float(curve[-1]["val_loss"]) == pytest.approx(log[-2]["val_loss"] if "val_loss" in log[-2] else result["best_val_loss"], rel=1e-5)
        assert (out / row["cell"] / "output.log").read_text().count("whole splits") == 1
    assert "4 cells: 0 finished, 0 to resume, 4 to start" in printed and "[4/4]" in printed and "left" in printed


def test_seeds_start_alike_whatever_the_decay(swept):
    """Same initialisation and data order: the first loss is the same in the cells of a seed, another in those of the other."""
    def first(wd, seed):
        return next(json.loads(line) for line in (swept[0] / f"attn_wd={wd},mlp_wd=1,seed={seed}" / "log.jsonl").read_text().splitlines())["norm_all"]
    assert first(0, 1) == first(1, 1) != first(0, 2) == first(1, 2)


def test_table_and_pairs_of_real_runs(swept):
    out, printed = swept
    ppl = {cell["cell"]: float(cell["test_ppl"]) for cell in read_csv(out / "sweep.csv")}
    a, b = ([ppl[f"attn_wd={wd},mlp_wd=1,seed={seed}"] for seed in (1, 2)] for wd in (0, 1))
    text = (out / "table.md").read_text()
    assert f"{statistics.mean(a):.4g} ± {statistics.stdev(a):.2g}" in text and f"{statistics.mean(b):.4g} ± {statistics.stdev(b):.2g}" in text
    assert text in printed and text.count("**") == 2
    row, = read_csv(out / "paired.csv")
    differences = [x - y for x, y in zip(a, b)]
    half = 12.7062047364 * statistics.stdev(differences) / math.sqrt(2)  # t table, one degree of freedom
    assert float(row["difference"]) == pytest.approx(statistics.mean(differences)) and row["seeds"] == "2"
    assert float(row["low"]) == pytest.approx(statistics.mean(differences) - half)
    assert float(row["high"]) == pytest.approx(statistics.mean(differences) + half)


@pytest.mark.slow
def test_skipped_resumed_failed(swept, tmp_path, data_dir):
    """One finished cell stays as it is, one killed before its end goes on, one killed before its first checkpoint starts, and one fails
    (its ckpt.pt is damaged) without stopping the others; then it is named."""
    out = tmp_path / "out"
    shutil.copytree(swept[0], out)
    whole, broken, begun, failing = (out / row["cell"] for row in read_csv(out / "sweep.csv"))
    before = {name: os.stat(whole / name).st_mtime_ns for name in os.listdir(whole)}
    for cell in (broken, begun, failing):
        (cell / "result.json").unlink()
    os.unlink(begun / "ckpt.pt")
    (failing / "ckpt.pt").write_bytes(b"no checkpoint")
    code, printed, errors = run(**settings_of(out, data_dir), jobs=3)
    assert code == 1 and f"  {failing.name}: exit 2: train_lm.py: " in errors and "damaged" in errors and broken.name not in errors, errors
    assert "4 cells: 1 finished, 2 to resume, 1 to start" in printed
    assert before == {name: os.stat(whole / name).st_mtime_ns for name in os.listdir(whole)}
    for cell in (broken, begun):
        old, new = (json.loads((folder / cell.name / "result.json").read_text()) for folder in (swept[0], out))
        assert old["test_loss"] == new["test_loss"]
    assert "step 0:" not in (broken / "output.log").read_text().split("whole splits")[1]
    rows = read_csv(out / "sweep.csv")
    assert [row["status"] for row in rows] == ["done", "done", "done", "failed"] and rows[3]["test_ppl"] == ""
    assert "(1 of 2)" in (out / "table.md").read_text() and "3 of 4 runs done" in printed
    pair, = read_csv(out / "paired.csv")
    assert (pair["seeds"], pair["seeds_in_grid"], pair["low"]) == ("1", "2", "nan")


def test_collect_marks_what_is_missing(swept, tmp_path, data_dir):
    out = tmp_path / "out"
    shutil.copytree(swept[0], out)
    code, printed, errors = run(**settings_of(out, data_dir, "attn_wd=0,1,2; mlp_wd=1; seed=1,2"), collect_only=True)
    assert code == 0, errors
    rows = read_csv(out / "sweep.csv")
    assert [row["status"] for row in rows] == ["done"] * 4 + ["missing"] * 2 and not (out / "attn_wd=2,mlp_wd=1,seed=1").exists()
    assert "| missing" in printed and "4 of 6 runs done" in printed


def test_folder_of_other_settings_is_refused(swept, data_dir):
    """As a user runs it: one line, exit 2, nothing on stdout."""
    result = script("-m", "scripts.sweep", *flags(**settings_of(swept[0], data_dir, max_iters=5)), "--dry_run")
    one_line_exit_2(result, "attn_wd=0,mlp_wd=1,seed=1", "result.json", "max_iters was 4, is 5")
    assert result.stdout == ""


@pytest.mark.slow
def test_stopped_saves_and_goes_on(tmp_path, data_dir):
    """SIGTERM reaches the trainer, which saves; exit 143, the waiting cell is not begun; the same command goes on where it was."""
    settings = settings_of(tmp_path, data_dir, "attn_wd=0,1", max_iters=1000, rank_interval=0, eval_interval=1000, eval_iters=1)
    process = subprocess.Popen([sys.executable, "-m", "scripts.sweep", *flags(**settings)], cwd=REPO, env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    log = tmp_path / "attn_wd=0" / "log.jsonl"
    for _ in range(600):
        if log.exists() and "train_loss" in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in printed and not errors, errors
    step = load(tmp_path / "attn_wd=0" / "ckpt.pt")["iter_num"]
    assert 0 < step < 1000 and not (tmp_path / "attn_wd=1").exists()
    code, printed, errors = run(**{**settings, "grid": "attn_wd=0"})
    assert code == 0 and "1 to resume" in printed, errors
    second = (tmp_path / "attn_wd=0" / "output.log").read_text().split("stopped by signal 15")[1]
    assert f"step {step + 4 - step % 5}:" in second and "step 4:" not in second


def test_two_sweeps_do_not_share_a_folder(tmp_path, data_dir):
    (tmp_path / "attn_wd=0").mkdir()
    with open(tmp_path / "attn_wd=0" / "output.log", "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        code, _, errors = run(**settings_of(tmp_path, data_dir, "attn_wd=0"))
    assert code == 1 and "attn_wd=0: another sweep's trainer is at work in its folder" in errors


def test_dry_run(tmp_path):
    """One command a line and nothing else; torchrun where a run has several processes; values as the trainer reads them."""
    code, printed, errors = run(configs="config/demo.py", fixed="--snapshot_steps=every:10", dry_run=True, nproc=2, out_dir=str(tmp_path),
                                grid="learning_rate+min_lr=1e-3:1e-4,0.00003:3e-6; tied=true,no\nattn_wd+mlp_wd=0,1")
    lines = printed.splitlines()
    assert code == 0 and len(lines) == 8 and not errors
    assert lines[-1] == ("torchrun --standalone --nproc_per_node=2 train_lm.py config/demo.py --snapshot_steps=every:10 --learning_rate=3e-05 "
                         "--min_lr=3e-06 --tied=false --attn_wd=1 --mlp_wd=1 "
                         f"--out_dir={tmp_path}/learning_rate=3e-05,min_lr=3e-06,tied=false,attn_wd=1,mlp_wd=1 --init_from=auto --overwrite")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("grid, words", [
    ("attn_dw=0,1", ["attn_dw", "attn_wd?"]),
    ("attn_wd=0,x", ["attn_wd", "a float", "'x'"]),
    ("seed=0.5", ["seed", "an int", "0.5"]),
    ("attn_wd=", ["'attn_wd='", "lacks a value"]),
    ("attn_wd=1,,2", ["'attn_wd=1,,2'", "lacks a value"]),
    ("attn_wd", ["'attn_wd'", "lacks a value"]),
    (" ; ", ["is empty"]),
    ("attn_wd=0,0.0", ["attn_wd=0.0", "twice"]),
    ("attn_wd=0; attn_wd=1", ["attn_wd", "twice"]),
    ("attn_wd+mlp_wd+embed_wd=0:1", ["'0:1'", "one each"]),
    ("out_dir=a,b", ["out_dir", "cannot vary"]),
])
def test_bad_grids(grid, words):
    from configurator import script_settings
    with pytest.raises(ValueError) as error:
        sweep.read_grid(grid, script_settings({"__file__": str(REPO / "train_lm.py")}))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("flag, words", [
    ("--trainer=sweep.py", ["--trainer=sweep.py"]), ("--trainer=no.py", ["--trainer=no.py"]), ("--fixed=--n_layers=2", ["n_layers", "n_layer?"]),
    ("--fixed='", ["--fixed="]), ("--configs=no.py", ["no.py"]), ("--rows=attn_dw", ["attn_wd?"]), ("--nproc=0", ["--nproc=0"]),
    ("--jobs=-1", ["--jobs=-1"]),
])
def test_bad_settings(flag, words):
    name, _, value = flag[2:].partition("=")
    code, printed, errors = run(dry_run=True, **{name: int(value) if value.lstrip("-").isdigit() else value})
    assert code == 2 and len(errors.splitlines()) == 1 and all(word in errors for word in words) and printed == "", errors


@pytest.mark.parametrize("df, t", [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (10, 2.22814),
                                   (30, 2.04227), (100, 1.98397)])
def test_t_quantile_is_the_printed_table(df, t):
    assert sweep.t_quantile(df) == pytest.approx(t, rel=2e-6)


def test_interval():
    """Five numbers by hand: mean 3, sd sqrt(2.5), half-width 2.776445 sqrt(0.5)."""
    assert sweep.interval([1, 2, 3, 4, 5]) == pytest.approx((3, 2.5**0.5, 3 - 2.776445 * 0.5**0.5, 3 + 2.776445 * 0.5**0.5))
    mean, sd, *_ = sweep.interval([7.0])
    assert mean == 7 and math.isnan(sd)


def test_joined_settings_do_not_hide_runs(monkeypatch):
    """What varies together with the row stays apart in the tables unless the row settles it."""
    for second, titles in (("sgd:0.01:1", ["optimizer=adamw", "optimizer=sgd"]), ("sgd:0.03:1", [""])):
        axes = sweep.read_grid(f"optimizer+learning_rate+warmup_iters=adamw:0.01:1,{second}; seed=1,2",
                               {"optimizer": "adamw", "learning_rate": 0.1, "warmup_iters": 0, "seed": 0})
        values = [{**a, **b} for a in axes[0] for b in axes[1]]
        cells = [sweep.Cell(v, str(i), {"attn_wd": 0.0, **v}) for i, v in enumerate(values)]
        monkeypatch.setattr(sweep, "rows", "learning_rate")
        monkeypatch.setattr(sweep, "columns", "attn_wd")
        tables = sweep.by_seed(axes, [{"status": "done", "test_ppl": float(i)} for i in range(4)], cells, "test_ppl")
        assert list(tables) == titles
        assert sorted(x for table in tables.values() for seeds in table.values() for x in seeds.values()) == [0, 1, 2, 3]


def test_runs_from_a_checkpoint_have_its_shape(tmp_path):
    """result.json states the shape that ran, which is the checkpoint's; elsewhere another shape is another run."""
    (tmp_path / "result.json").write_text(json.dumps({"n_layer": 1, "init_from": "a.pt", "bias": True, "seed": 1}))
    settings = {"n_layer": 4, "init_from": "a.pt", "bias": False, "seed": 1}
    assert sweep.finished(sweep.Cell({}, str(tmp_path), settings), ["init_from"])
    for change in ({"init_from": "auto"}, {"seed": 2}, {"init_from": "auto", "n_layer": 0}):
        with pytest.raises(ValueError, match="another run"):
            sweep.finished(sweep.Cell({}, str(tmp_path), {**settings, **change}), ["init_from"])


def test_table_lines():
    """Bold where best; the number of seeds where some are missing; one that is not finite is no mean."""
    table = {(0.0, 0.1): {1: 2.0, 2: 4.0}, (0.0, 1.0): {1: 2.5, 2: None}, (4.0, 0.1): {1: None, 2: None}, (4.0, 1.0): {1: math.nan, 2: 1.0}}
    head, rule, first, second = ([text.strip() for text in line.strip("|").split("|")] for line in sweep.table_lines(table, "test_ppl", min))
    assert head == ["test_ppl: attn_wd \\ mlp_wd", "0.1", "1"] and set("".join(rule)) == {"-"}
    assert first == ["0", "3 ± 1.4", "**2.5 (1 of 2)**"] and second == ["4", "missing", "nan ± nan"]
    assert "**3 ± 1.4**" in "".join(sweep.table_lines(table, "test_acc", max))


@pytest.mark.slow
def test_failed_cell_shows_in_figures_not_as_a_number(swept, tmp_path):
    """All figures of a sweep with missing runs; and a CSV without a finished one is none."""
    from nanorank.figures import sweep as figures
    from scripts.figures import everything
    for name in ("sweep.csv", "curves.csv"):
        shutil.copy(swept[0] / name, tmp_path)
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    names = lines[0].split(",")
    missing = ["attn_wd=1,mlp_wd=3,seed=1", "missing", "1.0", "3.0", "1"]
    assert names[:5] == ["cell", "status", "attn_wd", "mlp_wd", "seed"]
    (tmp_path / "sweep.csv").write_text("\n".join([*lines, f'"{missing[0]}",' + ",".join(missing[1:]) + "," * (len(names) - 5)]) + "\n")
    assert [os.path.basename(path) for path in figures.sweep(str(tmp_path))] == ["wd_grid.png", "rank_by_layer.png", "mean_rank.png", "over_training.png"]
    for path in ("wd_grid.png", "rank_by_layer.png", "mean_rank.png", "over_training.png", "wd_grid.pdf"):
        assert (tmp_path / path).stat().st_size > 5000
    (tmp_path / "sweep.csv").write_text("\n".join([lines[0], f'"{missing[0]}",' + ",".join(missing[1:]) + "," * (len(names) - 5)]) + "\n")
    assert figures.sweep(str(tmp_path)) == []
    drawn, left = everything(str(tmp_path.parent / tmp_path.name))
    assert any("rank_by_layer.png stays as it is" in line for line in left)
