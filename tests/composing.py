"""Configurations for tests: composed as run.py composes them, without a Hydra run around them."""

from __future__ import annotations

import copy
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from runner import schema

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
USER = ROOT / "tests" / "user"
# Data sets that do not ship with the program: where WATTLIGHT_DATA says (their folder or the one above), else beside
# the checkout, if anywhere.
_DATA = Path(os.environ.get("WATTLIGHT_DATA") or ROOT.parent / "shared" / "data")
SERIES = _DATA / "series" if (_DATA / "series").is_dir() else _DATA

if str(USER) not in sys.path:  # what PYTHONPATH does for a user's own experiment
    sys.path.append(str(USER))


def experiments() -> list[str]:
    """Names of all experiments of the program, variants included."""
    return _options(CONF / "experiment")


def options() -> list[tuple[str, str]]:
    """(group, option) of everything else in conf/."""
    groups = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name != "experiment")
    return [(group, option) for group in groups for option in _options(CONF / group)]


def _options(folder: Path) -> list[str]:
    """Without what lies in ``base/``: parts that options have in common and nobody chooses."""
    names = (str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("base/"))


def composed(*overrides: str, run_dir: Path | str = "/nowhere", user: bool = False) -> DictConfig:
    """The configuration that the command line ``overrides`` would give; ``user`` adds the options of tests/user."""
    config = copy.deepcopy(_composed(overrides, user))
    config.run.dir = str(run_dir)
    return config


@cache  # a composition takes a third of a second
def _composed(overrides: tuple[str, ...], user: bool) -> DictConfig:
    schema.register()
    search = [f"hydra.searchpath=[file://{USER / 'conf'}]"] if user else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [*search, *overrides])


def plain(config: DictConfig) -> dict[str, Any]:
    """Resolve a configuration to plain data, as run.py does."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)


def tiny(run_dir: Path | str, *overrides: str) -> dict[str, Any]:
    """The experiment of tests/user, resolved: it trains three epochs of six steps in a blink."""
    return plain(composed("experiment=tiny", *overrides, run_dir=run_dir, user=True))
