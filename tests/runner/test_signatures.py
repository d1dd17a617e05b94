"""What a target accepts, read from source: it must agree with `inspect`, and say what is missing."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from hydra.utils import get_object

from runner.signatures import TargetError, hint, signature
from tests.composing import ROOT

TARGETS = [
    "lightning.pytorch.Trainer",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.loggers.CSVLogger",
    "torch.optim.AdamW",
    "torch.optim.lr_scheduler.CosineAnnealingLR",
    "torch.nn.Linear",
    "callbacks.console.Console",
    "networks.recycle.RecentHistoricProfile",
    "tiny_model.TinyModule",
]


@pytest.mark.parametrize("target", TARGETS)
def test_agrees_with_inspect(target):
    parameters = inspect.signature(get_object(target)).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    read = signature(target)
    assert read.names == tuple(p.name for p in named)
    assert read.required == tuple(p.name for p in named if p.default is p.empty)
    assert read.open == any(p.kind is p.VAR_KEYWORD for p in parameters)


def test_reads_without_importing():
    code = (
        "import sys; from runner.signatures import signature\n"
        f"for target in {[t for t in TARGETS if 'tiny' not in t]}: signature(target)\n"
        "print([m for m in ('torch', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("lightning_modules.recycle.Recycle", "has no 'Recycle'. Did you mean 'ReCycle'?"),
        ("networks.recycle.ReCycleTransformr", "Did you mean 'ReCycleTransformer'?"),
        ("lightning_module.recycle.ReCycle", "no module named 'lightning_module'. Did you mean 'lightning_modules'?"),
        ("callbacks.console", "is a module, not something to call"),
        ("no_such_package_anywhere.Thing", "no module named 'no_such_package_anywhere'"),
    ],
)
def test_says_what_is_missing(target, message):
    with pytest.raises(TargetError, match=None) as error:
        signature(target)
    assert message in str(error.value)


SOURCE = '''
from dataclasses import dataclass
from functools import partial as renamed

class Base:
    keys: tuple = ("a", "b")
    def __init__(self, x, y=1, *, z=2): ...

class Inherits(Base):
    """No constructor of its own."""

class PassesOn(Base):
    keys = ("c",)
    def __init__(self, own, **kwargs):
        super().__init__(y=3, **kwargs)

class Keeps(Base):
    def __init__(self, own, **kwargs):
        super().__init__(1)
        self.kwargs = kwargs

@dataclass
class Data:
    a: int
    b: int = 2

@dataclass
class MoreData(Data):
    c: int = 3

class Factory:
    @classmethod
    def make(cls, a): ...

def function(a, *args, b=1, **kwargs): ...

try:
    from nowhere_to_be_found import Optional
except ImportError:
    def Optional(only): ...

alias = Base
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module outside of the program, unknown to the caches."""
    name = f"written_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize(
    ("attribute", "names", "required", "is_open"),
    [
        ("Base", "x y z", "x", False),
        ("Inherits", "x y z", "x", False),
        ("PassesOn", "own x z", "own", False),  # y is set already
        ("Keeps", "own", "own", True),  # its kwargs go elsewhere
        ("Data", "a b", "a", False),
        ("MoreData", "a b c", "a", False),
        ("Factory.make", "a", "a", False),
        ("function", "a b", "a", True),
        ("alias", "x y z", "x", False),
        ("Optional", "only", "only", False),
    ],
)
def test_kinds_of_definitions(module, attribute, names, required, is_open):
    read = signature(f"{module}.{attribute}")
    assert (" ".join(read.names), " ".join(read.required), read.open) == (names, required, is_open)


def test_choices_are_found_where_they_are_defined(tmp_path, monkeypatch):
    """An alias of another module, and one that a package only passes on; nobody follows a circle."""
    package = tmp_path / f"package_{tmp_path.name}"
    package.mkdir()
    (package / "__init__.py").write_text("from .rules import Rule as Passed\nfrom .user import Circle\n")
    (package / "rules.py").write_text('from typing import Literal\nRule = Literal["a", "b"]\n')
    (package / "user.py").write_text(
        f"from json import Odd\nfrom {package.name} import Passed, Circle\nfrom .rules import Rule\n\n\n"
        "def use(x: Rule, y: Passed | None, z: Circle, odd: Odd): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = signature(f"{package.name}.user.use").annotations
    assert found == {"x": "Literal['a', 'b']", "y": "Literal['a', 'b'] | None", "z": "Circle", "odd": "Odd"}


def test_choices_of_the_strategies_are_known_before_they_are_made():
    daso, ab = signature("strategies.daso.DASO"), signature("strategies.ab_training.ABTrainingStrategy")
    assert daso.annotations["merge_rule"] == "Literal['delta', 'paper']"
    assert daso.annotations["exchange"] == "Literal['rotate', 'sharded']"
    assert ab.annotations["opt_state"] == "Literal['hold', 'reset', 'project']"
    assert signature("callbacks.oialr.OIALR").annotations["criterion"] == "Literal['relative', 'energy']"


def test_class_constants_are_read_with_those_of_the_bases(module):
    assert signature(f"{module}.Inherits").literals["keys"] == ("a", "b")
    assert signature(f"{module}.PassesOn").literals["keys"] == ("c",)


def test_hint():
    assert hint("max_epoch", ["max_epochs", "min_epochs"]) == " Did you mean 'max_epochs'?"
    assert hint("zzz", ["b", "a"]) == " Known: a, b."
    assert hint("zzz", []) == ""
    assert hint("zzz", [f"n{i:02}" for i in range(20)]).endswith("n11, ....")
