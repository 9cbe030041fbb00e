"""The trials of hostile.py in small: each hole that they found, by the smallest file that shows it."""
import contextlib
import json
import math
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import torch
from conftest import write_data
from test_prepare import prepare  # noqa: F401  (its fixture)
from trials import harness, hostile, spoilt
from trials.fuzz import FUZZERS

import analyze
import train_lm
from configurator import configure
from model import GPT, init_weights, load_gpt, make_optimizers
from nanorank.checkpoints import Checkpoint, open_all
from nanorank.errors import UserError, one_line, user_errors
from nanorank.families import AttentionLayer
from nanorank.files import load_pt
from nanorank.images import ImageSplit
from nanorank.restore import load_optimizers
from nanorank.tokens import TokenSplit
from nanorank.watch import summary
from scripts import sample

ARGS = {"vocab_size": 64, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32,
        "dropout": 0.0, "bias": False}
Q = "transformer.h.0.attn.c_attn.weight"


def content(**changes):
    model = GPT(**ARGS)
    init_weights(model, 0)
    return {"model": dict(model.state_dict()), "model_args": ARGS, "iter_num": 3, **changes}


@pytest.fixture
def refused(tmp_path):
    """refused(content or bytes, words): loading it, mapped or not, is a UserError of one line that names the
    file, and no canary appears."""
    def check(what, *words):
        path = tmp_path / "x.pt"
        if isinstance(what, bytes):
            path.write_bytes(what)
        else:
            torch.save(what, path)
        for mmap in (False, True):
            with pytest.raises(UserError) as error:
                load_pt(str(path), mmap=mmap)
            message = str(error.value)
            assert "x.pt" in message and "\n" not in message, message
            assert all(word in message for word in words), message
        assert not (tmp_path / "canary").exists()
    return check


@contextlib.contextmanager
def one_line_and_exit(code, capsys, *words):
    """The code inside, as a script's main(), ends with this status and one line that has these words."""
    with pytest.raises(SystemExit) as stop, user_errors("script"):
        yield
    err = capsys.readouterr().err
    assert stop.value.code == code, err
    assert err.count("\n") == 1 and all(word in err for word in words), err

# ------------------------------------------------------------ checkpoints

def test_a_flipped_bit_of_a_weight_is_seen(tmp_path, refused):
    """torch writes checksums and does not read them."""
    torch.save(content(), tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        data[archive.getinfo("a/data/0").header_offset + 3000] ^= 4
    (tmp_path / "b.pt").write_bytes(data)
    assert torch.load(tmp_path / "b.pt", weights_only=True)["iter_num"] == 3
    refused(bytes(data), "CRC-32")


def test_files_without_checksums_load(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_pt(str(tmp_path / "a.pt"), mmap=True)["iter_num"] == 3


def test_zips_that_lie(tmp_path, refused):
    """A bomb is not unpacked; of a record of another size torch with mmap would read on into the next."""
    torch.save(content(), tmp_path / "a.pt")
    lies = spoilt.zips(tmp_path / "a.pt", str(tmp_path), bomb=10**7)
    refused(lies["a bomb of zeros, deflated"], "compressed")
    refused(lies["data cut short"])
    refused(lies["a record of 2 GiB, it says"], "compressed or overlapping")


@pytest.mark.parametrize("x, words", [
    (torch.zeros(1).as_strided((10**6, 10**6), (0, 0)), "(1000000, 1000000)"),
    (torch.eye(4).to_sparse(), "sparse"),
    (torch.ones(3, device="meta"), "without data")], ids=["expanded", "sparse", "meta"])
def test_tensors_that_are_not_plain(refused, x, words):
    refused(content(extra={"a": [x]}), words)
    refused({"model": {Q: x}}, words)


def test_containers_without_end(refused):
    cycle = {}
    cycle["a"] = cycle
    laughs = [1]
    for _ in range(40):
        laughs = {"a": laughs, "b": laughs}
    refused(content(extra=cycle), "nested without end")
    refused(content(extra=laughs), "nested without end")


def test_code_is_refused_wherever_it_hides(tmp_path, refused):
    canary = spoilt.Run(os.system, f"touch {tmp_path}/canary")
    moments = {"state": {0: {"step": canary}}}
    for what in (content(x=canary), content(model={Q: canary}), content(optimizer=moments), [canary],
                 pickle.dumps(canary), pickle.dumps({"model": canary}, 0)):
        refused(what)


def test_model_args_that_lie_are_refused_before_anything_is_made(monkeypatch):
    raw = content()
    monkeypatch.setattr(torch.nn.Embedding, "__init__", lambda *args: pytest.fail("a model was made"))
    for name, x in (("n_layer", 10**9), ("n_embd", 10**6), ("vocab_size", 10**9), ("block_size", 10**9)):
        with pytest.raises(ValueError, match="model_args describe more than"):
            load_gpt({**raw, "model_args": {**ARGS, name: x}})


def test_weights_that_are_not_finite_are_refused_by_name():
    raw = content()
    raw["model"]["transformer.wpe.weight"] = raw["model"]["transformer.wpe.weight"] * math.nan
    with pytest.raises(ValueError, match="transformer.wpe.weight holds NaN or inf"):
        load_gpt(raw)


def test_moments_of_another_shape_are_refused():
    model = GPT(**ARGS)
    group = [{"name": "all", "params": list(model.parameters()), "weight_decay": 0.0}]
    (opt,) = make_optimizers(group, "adamw", 1e-3, 0.9, 0.95, 1e-8, 0.9, "cpu")
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    opt.step()
    state = opt.state_dict()
    load_optimizers([opt], state, "ckpt.pt")
    first = state["state"][0]
    nan = first["exp_avg"] * math.nan
    for moments in ({**first, "exp_avg": torch.ones(3)}, {**first, "exp_avg": nan}, {**first, "exp_avg": "x"},
                    {"step": first["step"]}):
        changed = {**state, "state": {**state["state"], 0: moments}}
        with pytest.raises(ValueError, match="ckpt.pt: its optimizer's state does not fit"):
            load_optimizers([opt], changed, "ckpt.pt")


def test_a_damaged_snapshot_is_left_out_of_a_run_and_named(tmp_path, capsys):
    for step in (1, 2, 3):
        torch.save(content(iter_num=step), tmp_path / f"step_000000{step}.pt")
    data = (tmp_path / "step_0000002.pt").read_bytes()
    (tmp_path / "step_0000002.pt").write_bytes(data[:len(data) // 2])
    assert [x.step for x in open_all([str(tmp_path)])] == [1, 3]
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and note.startswith("note: left out") and "step_0000002.pt" in note
    with pytest.raises(ValueError, match="step_0000002.pt"):
        list(open_all([str(tmp_path / "step_0000002.pt")]))
    whole = tmp_path / "whole"
    whole.mkdir()
    torch.save(content(iter_num=1), whole / "ckpt.pt")
    for step in (1, 3):
        (tmp_path / f"step_000000{step}.pt").write_bytes(b"x")
    for runs in ([str(tmp_path), str(whole)], [str(whole), str(tmp_path)]):  # nothing is left of one
        with pytest.raises(ValueError, match="step_0000003.pt"):
            list(open_all(runs))
    with pytest.raises(ValueError, match="step_0000003.pt"):
        list(open_all([str(tmp_path)]))


def test_names_in_messages_stay_on_one_line():
    assert one_line("a\n\x1b[31mb\x85c") == "a [31mb c" and len(one_line("x" * 10**6)) == 1000


def test_a_head_with_nan_is_named():
    W = torch.randn(4, 3, 8)
    W_K = W.clone()
    W_K[2, 1, 1] = math.nan
    with pytest.raises(ValueError, match=r"layer 5, qk: .* head \[2\]"):
        summary([AttentionLayer("", 5, W, W_K, W, W.mT)])


def test_weights_that_overflow_end_the_run_before_they_are_saved(train, tmp_path, capsys, monkeypatch):
    """A step may make them so with a finite loss and gradient."""
    step = torch.optim.AdamW.step

    def spoilt(self, *args):
        step(self, *args)
        spoilt.n += 1
        if spoilt.n == 12:
            self.param_groups[0]["params"][0].data[0, 0] = math.inf
    spoilt.n = 0
    monkeypatch.setattr(torch.optim.AdamW, "step", spoilt)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "a", eval_interval=4, max_iters=20)
    assert stop.value.code == 1
    assert "c_attn.weight holds NaN or inf at step 12; the last good checkpoint" in capsys.readouterr().err
    assert load_pt(str(tmp_path / "a" / "ckpt.pt"))["iter_num"] == 8


def test_a_resumed_state_that_lacks_or_lies(train, tmp_path, capsys):
    train(tmp_path / "a", max_iters=2)
    raw = load_pt(str(tmp_path / "a" / "ckpt.pt"))
    lies = {"decay": {"deep": 1.0}, "seconds": math.nan, "log_bytes": -5, "optimizer": "x",
            "config": {"seed": torch.ones(3)}, "iter_num": 10**30, "wandb_id": None}
    for name, x in lies.items():
        torch.save({**raw, name: x}, tmp_path / "a" / "ckpt.pt")
        with one_line_and_exit(2, capsys, f"ckpt.pt is damaged, its {name} is"):
            train(tmp_path / "a", max_iters=3, init_from="resume")

# ------------------------------------------------------------ data and configs

def test_ids_beyond_the_vocabulary_in_tails_and_evaluation(train, tmp_path, capsys):
    """Tails of files were not looked at, and evaluation ended in a traceback."""
    rng = np.random.default_rng(0)
    val = rng.integers(0, 256, 40)
    val[-1] = 300
    splits = {"train": [rng.integers(0, 256, 999)], "val": [val], "test": [rng.integers(0, 256, 50)]}
    write_data(tmp_path / "data" / "text", splits)
    with one_line_and_exit(2, capsys, "token id 300 is not in the vocabulary"):
        train(tmp_path / "a", data_dir=str(tmp_path / "data"), max_iters=2)


def test_an_id_met_late_keeps_the_checkpoint(tmp_path):
    outcome = harness.attempt(hostile.late_id(tmp_path), str(tmp_path))
    assert harness.judge(outcome, "late_data") == "refused", outcome
    assert load_pt(str(tmp_path / "late" / "ckpt.pt"))["iter_num"] == 10


def test_a_flipped_bit_of_data_is_seen(tmp_path):
    rng = np.random.default_rng(0)
    folder = write_data(tmp_path / "d", {"train": [rng.integers(0, 256, 100)]})
    path = folder / "train_00000.bin"
    path.write_bytes(spoilt.flipped(path.read_bytes(), rng))
    with pytest.raises(ValueError, match="train_00000.bin is damaged, its checksum"):
        TokenSplit(str(folder), "train", 8)
    meta = spoilt.write_images(tmp_path / "p", rng)
    assert ImageSplit(str(tmp_path / "p"), "train").n_images == meta["splits"]["train"]["images"]
    path = tmp_path / "p" / "train.bin"
    path.write_bytes(spoilt.flipped(path.read_bytes(), rng))
    with pytest.raises(ValueError, match="train.bin is damaged, its checksum"):
        ImageSplit(str(tmp_path / "p"), "train")


@pytest.mark.parametrize("how", ["same bytes", "hard link", "one list"])
def test_splits_that_overlap_are_refused(tmp_path, how):
    files = [np.arange(100), np.arange(50)]
    val = files[1] if how == "same bytes" else files[1] + 1
    folder = write_data(tmp_path / "d", {"train": files, "val": [val]})
    meta = json.loads((folder / "meta.json").read_text())
    if how == "hard link":
        (folder / "val_00000.bin").unlink()
        os.link(folder / "train_00001.bin", folder / "val_00000.bin")
        del meta["splits"]["val"]["files"][0]["crc32"]
    elif how == "one list":
        meta["splits"]["val"] = meta["splits"]["train"]
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"of the val split is train_0000\d.bin of train"):
        TokenSplit(str(folder), "val", 8)


def test_a_source_of_val_under_another_name_is_left_out_of_train(prepare, tmp_path):  # noqa: F811
    (tmp_path / "in").mkdir()
    for name, words in (("a", "one two"), ("b", "three four"), ("c", "three four")):
        (tmp_path / "in" / f"{name}.txt").write_text(words)
    (tmp_path / "v.txt").write_text("three four")
    (tmp_path / "in" / "d.txt").symlink_to(tmp_path / "v.txt")
    settings = {"source": tmp_path / "in", "val_source": tmp_path / "v.txt", "tokenizer": "byte"}
    status, output = prepare(**settings, test_fraction=0.0)
    assert status == 0 and output.count("left out of train") == 2, output
    assert "train 8 tokens of 1 documents, val 11 tokens of 1 documents" in output, output


def test_a_finished_folder_is_verified(prepare, tmp_path):  # noqa: F811
    (tmp_path / "a.txt").write_text("some words " * 100)
    settings = {"source": tmp_path / "a.txt", "tokenizer": "byte", "val_fraction": 0.0, "test_fraction": 0.0}
    assert prepare(**settings)[0] == 0 and "nothing to do" in prepare(**settings)[1]
    path = tmp_path / "data" / "x" / "train_00000.bin"
    path.write_bytes(spoilt.flipped(path.read_bytes(), np.random.default_rng(0)))
    status, output = prepare(**settings)
    assert status == 2 and "train_00000.bin is damaged" in output


def test_a_line_of_one_nul_is_broken_not_too_long(prepare, tmp_path):  # noqa: F811
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\0\n{"text": "b"}\n')
    status, output = prepare(source=tmp_path, tokenizer="byte", val_fraction=0.0, test_fraction=0.0)
    assert status == 0 and "1 broken JSON" in output and "a.jsonl:2" in output, output


def test_files_of_images_have_their_names(tmp_path):
    meta = spoilt.write_images(tmp_path / "p", np.random.default_rng(0))
    for name in ("a\0b", "val.bin", "../p/train.bin", 3, None):
        changed = spoilt.put(meta, ("splits", "train", "files", 0, "name"), name)
        (tmp_path / "p" / "meta.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="meta.json is not what"):
            ImageSplit(str(tmp_path / "p"), "train")


def test_an_evaluation_that_is_not_finite_is_refused(train, tmp_path, capsys):
    """Weights that are finite and overflow: a file without checksums, a bit of an exponent flipped."""
    train(tmp_path / "a", max_iters=0)
    raw = load_pt(str(tmp_path / "a" / "ckpt.pt"))
    raw["model"]["transformer.h.1.mlp.c_fc.weight"][:] = 3e38
    torch.save(raw, tmp_path / "b.pt")
    with one_line_and_exit(2, capsys, "b.pt: its loss is not finite"):
        train(tmp_path / "c", init_from=str(tmp_path / "b.pt"), eval_only=True)
    assert not (tmp_path / "c" / "eval.json").exists()
    work = harness.main_of(sample, str(tmp_path / "b.pt"), device="cpu", tokenizer="byte")
    outcome = harness.attempt(work, str(tmp_path))
    assert harness.judge(outcome, "b.pt") == "refused" and "logits are not finite" in outcome.err, outcome


def test_odd_encodings_of_config_files(tmp_path, capsys):
    (tmp_path / "c.py").write_text("# -*- coding: rot13 -*-\nfrrq = 1")
    with one_line_and_exit(2, capsys):
        configure({**vars(train_lm)}, argv=[str(tmp_path / "c.py")])
    with one_line_and_exit(2, capsys):
        configure({**vars(train_lm)}, argv=["--a\x85b"])

# ------------------------------------------------------------ trials and fuzzing

@pytest.mark.parametrize("name", FUZZERS)
def test_fuzz(name, tmp_path):
    seen = FUZZERS[name](50, str(tmp_path))
    assert seen["refused"] > 5 and seen["valid"] > 2, seen


def test_a_case_that_misbehaves_is_found(tmp_path):
    """The judge itself: a traceback, two lines, a lone NaN, memory, a canary."""
    def says(text, code=2, stream=2):
        def work():
            os.write(stream, text.encode())
            raise SystemExit(code)
        return work

    cases = [
        (says("x.pt: no\n"), "refused"),
        (says("no\n"), "exit 2 with"),
        (says("x.pt\nx.pt\n"), "exit 2 with 2 lines"),
        (says("rank nan\n", 0, 1), "valid, with numbers"),
        (says("rank 3\n", 0, 1), "valid"),
        (says("x.pt", 1), "exit 1"),
        (lambda: 1 / 0, "traceback"),
        (harness.main_of(analyze, []), "exit 2 with 1 lines"),
    ]
    if pathlib.Path("/proc/self/statm").exists():
        cases.append((lambda: bytearray(3 * 10**9), "traceback: MemoryError"))
    for work, verdict in cases:
        assert harness.judge(harness.attempt(work, str(tmp_path)), "x.pt").startswith(verdict)
    (tmp_path / "canary").touch()
    outcome = harness.Outcome(2, "", "x.pt", 0.0, 0.0)
    assert harness.judge(outcome, "x.pt", str(tmp_path / "canary")) == "code in it ran"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "data", "images"])
def test_trials(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(hostile, "cases", 10)
    tally = harness.Tally(kind, tmp_path)
    getattr(hostile, kind)(tally, str(tmp_path))
    row = tally.row()
    assert row["wrong"] == 0 and row["cases"] > 25


def test_a_checkpoint_of_noise_is_no_traceback(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(30):
        (tmp_path / f"{i}.pt").write_bytes(rng.bytes(200))
        with contextlib.suppress(ValueError):
            Checkpoint(str(tmp_path / f"{i}.pt"))
            pytest.fail("noise was taken for a checkpoint")

