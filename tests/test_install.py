"""What an installation brings along, read from the metadata of the installed packages."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from tests.composing import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# torchvision and timm break torchmetrics beside a CPU build of torch; pynvml shadows nvidia-ml-py.
BANNED = {"torchvision", "timm", "pynvml"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: list[str]) -> set[str]:
    """All packages that installing ``requirements`` pulls in, as far as they are installed here."""
    found: set[str] = set()
    queue = [(Requirement(r), "") for r in requirements]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = normal(requirement.name)
        if name == "wattlight":
            continue
        extras = requirement.extras or {""}
        if name in found and extras == {""}:
            continue
        found.add(name)
        try:
            below = requires(requirement.name) or []
        except PackageNotFoundError:
            continue
        queue += [(Requirement(b), e) for b in below for e in extras]
    return found


def test_no_dependency_pulls_in_what_breaks_torch():
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras["dev"] + extras["tensorboard"] + extras["sweeps"]
    found = closure(wanted)
    assert {"torch", "lightning", "pandas"} <= found
    assert not found & BANNED


def test_constraints_are_the_versions_of_this_environment():
    """The suite speaks for constraints.txt only if it runs with it."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    for name in ("torch", "lightning", "hydra-core", "omegaconf", "torchmetrics", "wandb", "numpy", "pandas"):
        assert version(name).split("+")[0] == pinned[name]


def test_every_requirement_is_pinned():
    pinned = {normal(n) for n in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)}
    direct = {normal(Requirement(r).name) for r in PROJECT["dependencies"]}
    assert direct <= pinned
