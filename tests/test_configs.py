"""Every experiment and every option of every group composes, passes the check, and lists what its class takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from runner.check import HYDRA_KEYS, TRAINER, TRAINER_OWN, check
from runner.signatures import signature
from tests.composing import CONF, composed, experiments, options, plain

# What an option needs around it to be a whole configuration, unless an experiment uses it (`around`).
BASE = ("experiment=recycle",)
NO_DATA = ("data_dir=/no/such/folder",)
# An extra whose absence the check must report, and does (tests/runner/test_check.py).
EXTRAS = {
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow",),
    "many": ("tensorboard", "mlflow"),
    "slurm": ("hydra_plugins.hydra_submitit_launcher",),
}
# Arguments that a node gets from elsewhere: the optimizer and scheduler groups, functools.partial, the runner.
GIVEN = {"model": {"optimizer", "scheduler"}, "optimizer": {"params"}, "scheduler": {"optimizer"}}
KEYWORDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# Options of torch's optimizers and schedulers that no experiment needs; they can be set, `check` knows the signature.
LEFT_OUT = {
    "optimizer": {"amsgrad", "foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"},
    "scheduler": {"last_epoch", "verbose", "threshold_mode", "cooldown", "eps"},
}


@cache
def around(group: str, option: str) -> tuple[str, ...]:
    """The command line of a whole configuration with the option: data and models of one kind do not fit others.

    The experiment is one that chooses the option, else one that chooses another option with the same class.
    """
    chosen = f"{group}={option}"
    if group not in ("data", "model"):
        return *BASE, chosen
    target = classes(group)[option]
    for like in (option, *(name for name, other in classes(group).items() if other == target)):
        line = f"override /{group}: {like}\n"
        for name in experiments():
            if line in text(name):
                whole = f"experiment={name}", *NO_DATA
                return whole if like == option else (*whole, chosen)
    return *BASE, chosen


@cache
def text(name: str) -> str:
    """The file of an experiment."""
    return (CONF / "experiment" / f"{name}.yaml").read_text()


@cache
def classes(group: str) -> dict[str, str | None]:
    """Class of each option of a group, its own or that of the option it builds on; None: it names none."""

    def target(option: str) -> str | None:
        path = CONF / group / f"{option}.yaml"
        if not path.is_file():
            return None
        config = OmegaConf.load(path)
        bases = [base for base in config.get("defaults", []) if isinstance(base, str) and base != "_self_"]
        return config.get("_target_") or next((found for base in bases if (found := target(base))), None)

    return {o: target(o) for g, o in options() if g == group}


def nodes(value: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, node) of everything with a ``_target_``."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield key, value
        for name, child in value.items():
            yield from nodes(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from nodes(child, f"{key}[{i}]")


def _devices_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


@pytest.mark.parametrize("name", experiments())
def test_experiment_passes_the_check(name):
    config = composed(f"experiment={name}", *NO_DATA)
    check(config)
    assert config.name != "run", "name: an experiment names its folder below logs/"
    assert config.name == name.replace("/", "_"), "the folder below logs/ is found by the name of the experiment"


@pytest.mark.parametrize("name", experiments())
def test_experiment_says_what_it_is(name):
    """The package line, then what it is, what it shows, what to expect; a variant says how it differs."""
    first, *rest = text(name).splitlines()
    assert first == "# @package _global_"
    assert sum(1 for line in rest[:6] if line.startswith("# ")) >= (2 if "/" in name else 3)


@pytest.mark.parametrize(("group", "option"), options(), ids=lambda v: str(v))
def test_option_passes_the_check(group, option, monkeypatch):
    for package in EXTRAS.get(option, ()):
        pytest.importorskip(package)
    _devices_of_a_cluster(monkeypatch)
    if (group, option) == ("trainer", "multi_node"):
        monkeypatch.setenv("LOCAL_RANK", "0")  # it is started by torchrun or srun
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    if group in ("hydra", "local"):
        composed(f"{group}={option}")
        return
    check(composed(*around(group, option)))


@pytest.mark.parametrize(("group", "option"), options(), ids=lambda v: str(v))
def test_keys_are_the_arguments(group, option):
    """Every argument stands in the file with its default, so that every override works and is visible."""
    if group in ("hydra", "local", "debug", "hparams_search", "trainer"):
        pytest.skip("no constructor of ours")
    config = OmegaConf.to_container(composed(*around(group, option)), resolve=False)
    root = {"optimizer": "model.optimizer", "scheduler": "model.scheduler"}.get(group, group)
    tree: Any = config
    for part in root.split("."):
        tree = tree.get(part) or {}
    for key, node in nodes(tree, root):
        accepted = signature(node["_target_"])
        present = {str(k) for k in node if k not in HYDRA_KEYS}
        kind = "optimizer" if key.endswith("optimizer") else "scheduler" if key.endswith("scheduler") else key
        given = GIVEN.get(kind, set()) | LEFT_OUT.get(kind, set())
        if not accepted.open:
            assert present <= set(accepted.names), f"{key}: {node['_target_']} takes no {present - set(accepted.names)}"
        missing = set(accepted.names) - present - given
        assert not missing, f"{key}: {node['_target_']} also takes {sorted(missing)}: list them with their defaults"


@pytest.mark.parametrize("name", experiments())
def test_an_experiment_leaves_no_argument_out(name):
    """Nothing that an experiment composes lacks an argument, whichever file it came from."""
    config = OmegaConf.to_container(composed(f"experiment={name}", *NO_DATA), resolve=False)
    for group in ("data", "model", "callbacks", "logger"):
        for key, node in nodes(config[group], group):
            kind = key.split(".")[-1] if key.endswith(("optimizer", "scheduler")) else key
            given = GIVEN.get(kind, set()) | LEFT_OUT.get(kind, set())
            accepted = signature(node["_target_"])
            missing = set(accepted.names) - set(node) - given
            assert not missing, f"{key}: {node['_target_']} also takes {sorted(missing)}"


def test_the_signatures_that_are_read_are_those_of_the_classes():
    """`runner.signatures` reads source files; for every target of conf/ it says what `inspect` says."""
    import torch
    from hydra.utils import get_object

    targets = set()
    for name in experiments():
        targets |= {
            n["_target_"] for _, n in nodes(OmegaConf.to_container(composed(f"experiment={name}", *NO_DATA)), "")
        }
    assert len(targets) > 10
    for target in sorted(targets):
        named = named_parameters(get_object(target))
        read = signature(target)
        if not read.open:
            for name in [p.name for p in named if p.name not in read.names]:  # what a class sets for its base
                with pytest.raises(TypeError, match=f"multiple values for keyword argument '{name}'"):
                    get_object(target)(torch.nn.Linear(1, 1), **{name: None})
            named = [p for p in named if p.name in read.names]
            assert read.names == tuple(p.name for p in named), target
            assert read.required == tuple(p.name for p in named if p.default is p.empty), target


def named_parameters(target):
    """Parameters by `inspect`; those that a class hands on as ``**options`` are read from the class it inherits."""
    named = {}
    for constructor in [c.__init__ for c in target.__mro__ if "__init__" in vars(c)] if inspect.isclass(target) else []:
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
        named |= {p.name: p for p in parameters if p.kind in KEYWORDS and p.name not in named}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return list(named.values())
    return [p for p in inspect.signature(target).parameters.values() if p.kind in KEYWORDS]


def test_trainer_default_lists_lightnings_arguments():
    import lightning.pytorch as pl

    trainer = composed("trainer=default").trainer
    parameters = inspect.signature(pl.Trainer).parameters
    assert set(trainer) == set(parameters) - set(TRAINER_OWN)
    assert signature(TRAINER).names == tuple(parameters)


def test_trainer_default_departs_from_lightning_only_where_meant():
    """A new default of Lightning would silently change every run: this list is what we decided otherwise."""
    import lightning.pytorch as pl

    trainer = composed("trainer=default").trainer
    parameters = inspect.signature(pl.Trainer).parameters
    departs = {k for k in trainer if trainer[k] != parameters[k].default}
    # None means a default that Lightning fills in.
    filled = {"precision", "max_epochs", "log_every_n_steps", "num_sanity_val_steps"}
    filled |= {"enable_checkpointing", "enable_progress_bar", "enable_model_summary", "inference_mode"}
    meant = {"accelerator", "devices", "use_distributed_sampler", "default_root_dir", "enable_autolog_hparams"}
    assert departs <= meant | filled, departs - meant - filled


def test_no_interpolation_but_run_dir_asks_hydra():
    """Then tests, notebooks and resumed runs compose without a Hydra run around them."""
    files = [p for p in CONF.rglob("*.yaml") if p.parent.name != "hydra" and "${hydra:" in p.read_text()]
    assert not files


def test_no_option_needs_a_plus():
    """Every group that an experiment overrides is in the defaults list of config.yaml."""
    defaults = OmegaConf.load(CONF / "config.yaml").defaults
    listed = {str(next(iter(d))).split()[-1] for d in defaults if isinstance(d, DictConfig)}
    assert {p.name for p in CONF.iterdir() if p.is_dir()} == listed


@pytest.mark.parametrize("name", experiments())
def test_model_and_data_instantiate(name):
    """Constructors read no file: a missing data_dir is reported when the data are needed, by name."""
    from runner.job import build

    module, datamodule = build(plain(composed(f"experiment={name}", *NO_DATA)))
    assert set(type(module).batch_keys) <= set(type(datamodule).batch_keys)


@pytest.mark.parametrize("option", [o for g, o in options() if g == "model"])
def test_every_model_instantiates(option):
    from runner.job import instantiate

    config = plain(composed(*around("model", option)))
    instantiate("model", config["model"])


@pytest.mark.parametrize("option", [o for g, o in options() if g == "data"])
def test_every_data_module_instantiates(option):
    from runner.job import instantiate

    instantiate("data", plain(composed(*around("data", option)))["data"])
