"""Who may import whom (docs/architecture.md, section 4), read from the source files with `ast`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KINDS = {"callbacks", "datamodules", "lightning_modules", "strategies"}
# What the files of a package may import of our own packages.
LAYERS = {
    "run": {"runner"},
    "runner": {"runner", *KINDS, "networks", "physics", "parallel"},
    **{kind: {kind, "networks", "physics", "parallel"} for kind in KINDS},
    "networks": {"networks", "physics", "parallel"},
    "physics": {"physics", "parallel"},
    "parallel": {"parallel"},
}
OURS = {*LAYERS, "benchmarks", "tests"}
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics"}
# Packages that only some files may import, anywhere in them.
QUARANTINE = {
    **{package: {"run.py", "runner/"} for package in ("hydra", "omegaconf")},
    **{
        package: {*(f"{kind}/" for kind in KINDS), "runner/job.py", "runner/load.py", "runner/fork_server.py"}
        for package in LIGHTNING
    },
    "wandb": {"runner/job.py", "callbacks/energy/", "callbacks/figures/"},
    "codecarbon": {"callbacks/energy/"},
    "matplotlib": {"callbacks/figures/"},
}
# Below the adapters only the numerical packages may be imported (with the standard library).
CORE = {"networks", "physics", "parallel"}
HEAVY = {"pandas", "matplotlib", "wandb", "torchvision", "timm", "sklearn", *LIGHTNING}
DRAWERS = {"utils", "util", "common", "helpers", "misc", "core"}

FILES = sorted(
    path.relative_to(ROOT)
    for path in [ROOT / "run.py", *(p for name in OURS - {"run"} for p in (ROOT / name).rglob("*.py"))]
    if "__pycache__" not in path.parts
)
PROGRAM = [path for path in FILES if path.parts[0] not in ("benchmarks", "tests")]


@cache
def imported(path: Path) -> tuple[tuple[str, int, bool], ...]:
    """(imported module, line, whether at the top level of the file)."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[tuple[str, int, bool]]:
    tree = ast.parse((ROOT / path).read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    inside |= {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for n in ast.walk(block)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole path"
            names = [node.module or ""]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [str(node.args[0].value)]
        for name in names:
            yield name, node.lineno, id(node) not in inside


def test_the_files_are_found():
    assert Path("run.py") in PROGRAM and Path("runner/job.py") in PROGRAM and len(PROGRAM) > 30


@pytest.mark.parametrize("path", PROGRAM, ids=str)
def test_layers(path):
    package = path.stem if len(path.parts) == 1 else path.parts[0]
    wrong = [
        f"{path}:{line} imports {name}"
        for name, line, _ in imported(path)
        if (top := name.split(".")[0]) in OURS and top not in LAYERS[package]
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("path", PROGRAM, ids=str)
def test_quarantine(path):
    wrong = [
        f"{path}:{line} imports {name}"
        for name, line, _ in imported(path)
        if (places := QUARANTINE.get(name.split(".")[0])) and not any(str(path).startswith(place) for place in places)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("path", [p for p in PROGRAM if p.parts[0] in CORE], ids=str)
def test_the_core_is_plain_torch(path):
    wrong = [f"{path}:{line} imports {name}" for name, line, _ in imported(path) if name.split(".")[0] in HEAVY]
    assert not wrong, wrong


def test_start_up_imports_nothing_heavy():
    """What run.py and the modules that it reaches import at their top level: neither torch nor Lightning."""
    seen, queue = set(), [Path("run.py")]
    while queue:
        path = queue.pop()
        for name, line, top_level in imported(path):
            first = name.split(".")[0]
            assert not (top_level and first in LIGHTNING | {"torch", "numpy", "pandas", "wandb"}), (
                f"{path}:{line} {name}"
            )
            if top_level and first == "runner":
                following = [Path(*name.split(".")).with_suffix(".py")] if "." in name else []
                following = following or [p for p in PROGRAM if p.parts[0] == "runner" and p.stem in _names(path)]
                queue += [p for p in following if p not in seen]
                seen |= set(following)
    assert {Path("runner/check.py"), Path("runner/supervise.py")} <= seen


def _names(path: Path) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "runner" for a in n.names}


def test_optional_packages_stay_inside_functions():
    wrong = [
        f"{path}:{line} imports {name}"
        for path in PROGRAM
        for name, line, top_level in imported(path)
        if top_level and name.split(".")[0] in {"wandb", "codecarbon", "matplotlib", "tensorboard", "mlflow"}
    ]
    assert not wrong, wrong


def test_no_drawers():
    assert not [str(p) for p in FILES if {p.stem, *p.parts[:-1]} & DRAWERS]


def test_configurations_hold_no_code():
    assert not list((ROOT / "conf").rglob("*.py"))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: str(p.relative_to(ROOT)))
def test_documents_name_files_that_exist(page):
    """Paths in backticks that begin with one of our folders (`networks/recycle/`, `conf/model/recycle.yaml`)."""
    if page.name == "architecture.md":
        pytest.skip("describes the whole plan, files of later papers included")
    places = "|".join([*sorted(OURS - {"run"}), "conf", "docs"])
    found = re.findall(rf"`((?:{places})/[\w./-]*)`", page.read_text())
    # `networks/x.py` and `tests/...` stand for something of the reader's own, `conf/local/default.yaml` is theirs.
    theirs = re.compile(r"/x\.\w+$|\.\.\.$|^conf/local/default\.yaml$")
    missing = [name for name in found if not theirs.search(name) and not (ROOT / name).exists()]
    assert not missing, f"{page.name} names {missing}"
