"""
The shape of the repository: six scripts in the root, imports that point down, readable lines and files.
"""
import ast
import graphlib
import os
import subprocess
import sys

import pytest
from conftest import REPO, script

SCRIPTS = ["analyze", "configurator", "model", "prepare_pile", "train_lm", "train_vit"]
MOST_LINES = {"train_lm.py": 290, "train_vit.py": 330, "model.py": 300, "analyze.py": 340}
WIDTH = 110

CODE = []  # every .py file; runs and environments of the user apart
for folder in (".", "config", "nanorank", "scripts", "tests", "results"):
    CODE += sorted(REPO.glob("*.py" if folder == "." else f"{folder}/**/*.py"))


def module_name(path):
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


MODULES = {}  # of ours, {"nanorank.run": path}
for path in CODE:
    if path.relative_to(REPO).parts[0] in ("nanorank", "scripts") or path.parent == REPO:
        MODULES[module_name(path)] = path


def imports(path, top_level=False):
    """Our modules that a file imports: all of them, or only those that importing it imports at once."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)  # may be a module
    return found & MODULES.keys()


def test_the_root_holds_six_scripts():
    assert sorted(path.stem for path in REPO.glob("*.py")) == SCRIPTS


def test_no_line_is_wider_than_110_columns():
    wide = {}
    for path in CODE:
        n = sum(len(line) > WIDTH for line in path.read_text().splitlines())
        if n:
            wide[str(path.relative_to(REPO))] = n
    assert not wide, wide


@pytest.mark.parametrize("name, most", MOST_LINES.items())
def test_what_people_fork_is_short(name, most):
    assert len((REPO / name).read_text().splitlines()) <= most


def test_imports_point_down():
    """Scripts -> model -> nanorank -> configurator."""
    for name, path in MODULES.items():
        packages = {module.partition(".")[0] for module in imports(path)}
        allowed = {"nanorank", "configurator", "model"}
        if name == "configurator":
            allowed = set()
        elif name == "model" or name.startswith("nanorank"):
            allowed = {"nanorank", "configurator"}
        elif name.startswith("scripts"):
            allowed |= {"scripts"}
        # bench times every script's parts
        assert packages <= allowed or name.startswith("scripts.bench"), f"{name} imports {packages}"


def test_no_import_cycle():
    graph = {name: imports(path, top_level=True) - {name} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_trainers_import_no_tables_or_figures():
    code = "import sys, train_lm, train_vit; print({'matplotlib', 'pandas'} & set(sys.modules))"
    assert script("-c", code).stdout.strip() == "set()"


WITNESS = """
import importlib, os, sys

class Witness:
    def find_spec(name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            raise SystemExit

sys.meta_path.insert(0, Witness)
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("module", ["train_lm", "train_vit", "analyze", "scripts.bench", "scripts.sample",
                                    "scripts.saturate", "scripts.theory"])
def test_every_script_sets_how_threads_wait_before_torch_is_loaded(module):
    env = {name: x for name, x in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}

    def seen(**extra):
        run = subprocess.run([sys.executable, "-c", WITNESS, module], cwd=REPO, env={**env, **extra},
                             capture_output=True, text=True)
        return run.stdout.strip()

    assert seen() == "1000"
    if module == "train_lm":  # what the user has set stays
        assert seen(OMP_WAIT_POLICY="ACTIVE") == "None"
        assert seen(GOMP_SPINCOUNT="7") == "7"
