"""
The settings block as a command line: types, order, help, and every error.
"""
import math
import pathlib
import re
import sys
import types

import pytest

from configurator import (
    ANSWERS,
    UserError,
    chosen,
    configure,
    convert,
    current,
    read_config,
    script_settings,
    spelled,
)

REPO = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = '''"""What it is for."""
# run
out_dir = "out"      # folder of the run
steps = 100          # how many
lr = 1e-3            # peak
fast = False         # or slow
device = "auto"      # where
# not settings
CONSTANT = 3
_private = 4
computed = len("abc")
'''


@pytest.fixture
def settings(tmp_path, monkeypatch):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    module = types.ModuleType("script")
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "script", module)
    exec(compile(SCRIPT, str(path), "exec"), module.__dict__)
    return module.__dict__


@pytest.mark.parametrize("argv, name, value", [
    (["--steps=5"], "steps", 5),
    (["--steps", "5"], "steps", 5),
    (["--steps=1e5"], "steps", 100_000),
    (["--steps=-1"], "steps", -1),
    (["--steps=600*4"], "steps", 2400),
    (["--steps=1", "--steps=2"], "steps", 2),
    (["--lr=3"], "lr", 3.0),
    (["--lr=1e-3/2"], "lr", 5e-4),
    (["--lr", "-2.5"], "lr", -2.5),
    (["--lr=inf"], "lr", math.inf),
    (["--fast"], "fast", True),
    (["--fast=true"], "fast", True),
    (["--fast", "false"], "fast", False),
    (["--fast=0"], "fast", False),
    (["--fast=No"], "fast", False),
    (["--fast", "OFF"], "fast", False),
    (["--fast=y"], "fast", True),
    (["--out-dir=x y"], "out_dir", "x y"),
    (["--out_dir", "x"], "out_dir", "x"),
    (["--out_dir="], "out_dir", ""),
    (["--out_dir=3"], "out_dir", "3"),
    (["--device"], "device", "true"),
    (["--device", "cuda"], "device", "cuda"),
    (["--device", "False"], "device", "False"),
])
def test_flags(settings, argv, name, value):
    assert configure(settings, argv=argv) == []
    assert settings[name] == value and type(settings[name]) is type(value)


def test_the_settings_are_the_public_literals(settings):
    want = {"out_dir": "out", "steps": 100, "lr": 1e-3, "fast": False, "device": "auto"}
    assert script_settings(settings) == want
    settings["steps"] = 7
    assert current(settings)["steps"] == 7


def test_files_and_flags_apply_left_to_right(settings, tmp_path):
    (tmp_path / "a.py").write_text('"""An experiment."""\nsteps = 2 * 3\nlr = 1\n')
    (tmp_path / "b.py").write_text("steps = 8  # more\n")
    configure(settings, argv=[str(tmp_path / "a.py"), str(tmp_path / "b.py"), "--lr=2"])
    assert (settings["steps"], settings["lr"]) == (8, 2.0)
    configure(settings, argv=["--steps=1", str(tmp_path / "a.py")])
    assert settings["steps"] == 6


@pytest.mark.parametrize("text", ["False", "false", "FALSE", "0", "'no'", "'Off'", "no"])
def test_config_files_spell_switches_as_flags_do(settings, tmp_path, text):
    path = tmp_path / "config.py"
    path.write_text(f"fast = {text}\ndevice = {text}\n")
    settings["fast"] = True
    configure(settings, argv=["--device", str(path)])  # a bare switch does not take the file as its value
    assert settings["fast"] is False and spelled(settings["device"]) is False
    with pytest.raises(UserError, match="a string"):
        convert("out_dir", "out", spelled(text.strip("'")))


def test_other_arguments_are_returned(settings):
    argv = ["a.pt", "--fast", "b.pt", "--", "--c.pt"]
    assert configure(settings, positional="CKPT", argv=argv) == ["a.pt", "b.pt", "--c.pt"]
    assert settings["fast"] is True


def refuses(settings, argv, words, capsys):
    """Asserts that configure ends with one line on stderr that holds these words, and exit status 2."""
    with pytest.raises(SystemExit) as stop:
        configure(settings, argv=argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    assert all(word in lines[0] for word in words), lines


@pytest.mark.parametrize("argv, words", [
    (["--step=5"], ["--step", "did you mean steps"]),
    (["--zzzzzz=1"], ["zzzzzz", "--help"]),
    (["--CONSTANT=1"], ["unknown"]),
    (["--_private=1"], ["unknown"]),
    (["--computed=1"], ["unknown"]),
    (["--="], ["unknown"]),
    (["--steps=abc"], ["--steps", "an int", "'abc'"]),
    (["--steps=1.5"], ["--steps", "an int", "1.5"]),
    (["--steps=True"], ["an int"]),
    (["--steps=2**9"], ["an int"]),
    (["--steps=1//0"], ["an int"]),
    (["--steps=nan"], ["an int"]),
    (["--steps"], ["--steps needs a value"]),
    (["--steps", "--fast"], ["--steps needs a value"]),
    (["--lr=nan"], ["a float"]),
    (["--lr=x"], ["a float", "'x'"]),
    (["--lr=__import__('os')"], ["a float"]),
    (["--lr=" + "9" * 400], ["a float"]),
    (["--lr=" + "(" * 300], ["a float"]),
    (["--fast=maybe"], ["true or false", "'maybe'"]),
    (["stray"], ["unexpected argument 'stray'"]),
    (["no/such.py"], ["no/such.py"]),
])
def test_wrong_input_is_one_line_and_exit_2(settings, argv, words, capsys):
    refuses(settings, argv, words, capsys)


@pytest.mark.parametrize("text, words", [
    ("stesp = 3", ["config.py:1", "did you mean steps"]),
    ("steps = 'x'", ["config.py:1", "an int"]),
    ("steps = None", ["an int"]),
    ("fast = 2", ["true or false"]),
    ("fast = None", ["true or false"]),
    ("fast = maybe", ["config.py:1", "fast = maybe"]),
    ("steps = true", ["an int"]),
    ("device = 2", ["a string"]),
    ("import os", ["config.py:1", "import os"]),
    ("steps = int(3)", ["config.py:1"]),
    ("steps: int = 3", ["config.py:1"]),
    ("steps = 3\nwhile True: pass", ["config.py:2"]),
    ("steps = = 3", ["config.py", "line 1"]),
    ("steps = 3\x00", ["config.py"]),
    ("steps = '\ud800'", ["config.py"]),  # not UTF-8
])
def test_wrong_config_files(settings, text, words, tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    refuses(settings, [str(path)], words, capsys)


def test_help_has_docstring_defaults_comments_and_banners(settings, capsys):
    with pytest.raises(SystemExit) as stop:
        configure(settings, argv=["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for words in ("What it is for.", '--out_dir="out"', "folder of the run", "--lr=0.001", "peak"):
        assert words in text
    assert "CONSTANT" not in text


def trainer(name):
    """The settings of a trainer as configure takes them."""
    path = str(REPO / name)
    return {"__file__": path, **script_settings({"__file__": path})}


@pytest.mark.parametrize("flag, words", [
    ("--weight_decay=0", ["--attn_wd", "--mlp_wd", "--embed_wd"]),
    ("--lr=1", ["--learning_rate"]),
    ("--epochs=3", ["--max_iters"]),
    ("--decay-lr", ["--min_lr", "--max_iters"]),
    ("--lr_decay_iters=9", ["--max_iters"]),
    ("--gradient_accumulation_steps=4", ["--total_batch_size", "--batch_size"]),
    ("--always_save_checkpoint", ["--eval_interval"]),
    ("--wandb_run=x", ["--wandb_run_name"]),
    ("--backend=nccl", ["torchrun"]),
    ("--num_train_epochs=3", ["--max_iters"]),
    ("--per_device_train_batch_size=3", ["--batch_size"]),
    ("--resume_from_checkpoint=x", ["--init_from=resume"]),
    ("--atn_wd=0", ["did you mean attn_wd?"]),
    ("--lrs=0", ["--help lists them all"]),  # no hint is better than a wrong one
    ("--img_size=8", ["--help lists them all"]),  # train_vit's
])
def test_names_of_other_tools_are_answered(flag, words, capsys):
    refuses(trainer("train_lm.py"), [flag], words, capsys)


def test_answers_name_settings_that_are_there():
    """Each name has one answer and is no setting of both trainers; each answer holds for one of them."""
    lm, vit = trainer("train_lm.py").keys(), trainer("train_vit.py").keys()
    names = " ".join(ANSWERS).split()
    assert len(names) == len(set(names)) and not set(names) & lm & vit
    for answer in ANSWERS.values():
        told = set(re.findall(r"--(\w+)", answer))
        assert told <= lm or told <= vit, answer


def test_scripts_that_are_no_trainers_have_no_such_answers(settings, capsys):
    refuses(settings, ["--weight_decay=0"], ["--help lists them all"], capsys)


def test_chosen_are_flags_config_files_and_globals(settings, tmp_path):
    path = settings["__file__"]
    assert chosen(path, current(settings)) == set()
    (tmp_path / "a.py").write_text("steps = 100\n")  # the default, but chosen
    configure(settings, argv=[str(tmp_path / "a.py"), "--fast=False"])
    settings["out_dir"] = "elsewhere"
    assert chosen(path, current(settings)) == {"steps", "fast", "out_dir"}


def script_of(config):
    """The script that a config's launch line names."""
    line = next(line for line in config.read_text().splitlines() if ".py config/" in line)
    return next(word for word in line.split() if word.endswith(".py"))


@pytest.mark.parametrize("config", sorted((REPO / "config").glob("*.py")), ids=lambda path: path.name)
def test_every_config_fits_its_script(config):
    script = REPO / script_of(config)
    settings = {"__file__": str(script), **script_settings({"__file__": str(script)})}
    names = [name for name, _, _ in read_config(str(config))]
    configure(settings, argv=[str(config)])
    assert len(names) == len(set(names)) > 0
    assert not chosen(str(script), script_settings(settings))  # nobody ran it
