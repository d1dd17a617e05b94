"""Every mistake of a composed configuration, found before torch, data or process groups are touched."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from parallel.sample_layout import check_num_samples, check_sample_parallel_size
from runner.annotations import mismatch
from runner.launch import num_processes
from runner.signatures import TargetError, hint, signature

HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
# Keys that the runner gives to the Trainer itself.
TRAINER_OWN = ("strategy", "logger", "callbacks")
TRAINER = "lightning.pytorch.Trainer"
# Loggers whose package is an optional extra of pyproject.toml.
EXTRAS = {
    "lightning.pytorch.loggers.TensorBoardLogger": ("tensorboard", "tensorboard"),
    "lightning.pytorch.loggers.MLFlowLogger": ("mlflow", "mlflow"),
}


class ConfigMistakes(Exception):
    """The message lists all mistakes of a configuration."""

    def __init__(self, found: list[str]) -> None:
        noun = "1 mistake" if len(found) == 1 else f"{len(found)} mistakes"
        super().__init__("\n".join([f"the configuration has {noun}:", *(f"  {line}" for line in found)]))
        self.found = found


def check(
    config: DictConfig, more: list[str] | None = None, typed: list[str] | None = None, files: bool = False
) -> None:
    """Raise `ConfigMistakes` with everything that is wrong, or return.

    Args:
        config: The composed configuration.
        more: Mistakes that were found on the command line.
        typed: The overrides of the command line.
        files: Look for the data files too.

    Looked at: targets that do not exist, arguments they do not take or that are missing, mandatory values ``???``,
    broken interpolations, batch keys that the module needs and the data lack, devices that this machine lacks,
    a batch that does not divide by the devices, samples of the weights that do not, missing optional packages.
    """
    found = [*(more or []), *_walk(config), *_strangers(config, typed or [])]
    found += _unknown_arguments(config.get("trainer") or {}, "trainer", TRAINER, given=TRAINER_OWN)
    if not found:  # the following read values, which must resolve
        found += [*_groups(config), *_batch_keys(config), *_devices(config)]
        found += _missing_files(config.data) if files else []
    if found:
        raise ConfigMistakes(found)


def _walk(node: Any, key: str = "") -> Iterator[str]:
    if isinstance(node, DictConfig):
        if "_target_" in node and not OmegaConf.is_missing(node, "_target_"):
            yield from _target(node, key)
        for name in node:
            full = f"{key}.{name}" if key else str(name)
            if OmegaConf.is_missing(node, name):
                yield f"{full}: needs a value (it is '???')"
                continue
            try:
                child = node[name]
            except OmegaConfBaseException as error:  # a broken interpolation
                yield f"{full}: {str(error).splitlines()[0]}"
                continue
            yield from _walk(child, full)
    elif isinstance(node, ListConfig):
        for i in range(len(node)):
            try:
                child = node[i]
            except OmegaConfBaseException as error:
                yield f"{key}[{i}]: {str(error).splitlines()[0]}"
                continue
            yield from _walk(child, f"{key}[{i}]")


def _target(node: DictConfig, key: str) -> Iterator[str]:
    try:
        target = node["_target_"]
    except OmegaConfBaseException:
        return  # reported by the walk over the keys
    if target in EXTRAS and importlib.util.find_spec(EXTRAS[target][0]) is None:
        package, extra = EXTRAS[target]
        yield f"{key}: needs the package {package}: .venv/bin/pip install -c constraints.txt -e '.[{extra}]'"
    yield from _unknown_arguments(node, key, target)


def _unknown_arguments(node: Any, key: str, target: str, given: tuple[str, ...] = ()) -> Iterator[str]:
    try:
        accepted = signature(target)
    except TargetError as error:
        yield f"{key}._target_: {error}"
        return
    present = [str(name) for name in node if name not in HYDRA_KEYS]
    if not accepted.open:
        for name in present:
            if name not in accepted.names or name in given:
                known = [n for n in accepted.names if n not in given]
                yield f"{key}.{name}: {target} takes no '{name}'.{hint(name, known)}"
    for name in present:
        if name not in accepted.annotations or OmegaConf.is_missing(node, name):
            continue
        if OmegaConf.is_interpolation(node, name):  # judged where the value stands, if that is an argument
            continue
        if expected := mismatch(accepted.annotations[name], node[name]):
            yield f"{key}.{name}={node[name]}: {target} expects {expected}"
    if not node.get("_partial_") and "_args_" not in node:
        for name in accepted.required:
            if name not in present and name not in given:
                yield f"{key}.{name}: {target} needs it"


def _strangers(config: DictConfig, typed: list[str]) -> Iterator[str]:
    """Values for callbacks and loggers that are not part of the chosen option.

    An experiment may set a value of a callback that another choice of the group leaves out (``callbacks=none``): the
    job ignores it. What was typed, or looks like a typing error, is a mistake.
    """
    keys = [override.lstrip("+~").split("=")[0] for override in typed]
    for group in ("callbacks", "logger"):
        members = config.get(group) or {}
        known = [str(n) for n in members if isinstance(members.get(n), DictConfig) and "_target_" in members[n]]
        for name in members:
            if not isinstance(members.get(name), DictConfig) or "_target_" in members[name]:
                continue
            advice = hint(str(name), known)
            if "Did you mean" in advice or any(key.startswith(f"{group}.{name}.") for key in keys):
                yield (
                    f"{group}.{name}: not part of the chosen {group} option.{advice} "
                    f"Choose an option that has it: {group}=..."
                )


def _groups(config: DictConfig) -> Iterator[str]:
    for group in ("data", "model"):
        if "_target_" not in (config.get(group) or {}):
            yield (
                f"{group}: nothing is chosen; take an experiment (experiment=recycle) or an option of the group "
                f"({group}=...); `python run.py --help` lists them"
            )


def _missing_files(data: DictConfig) -> Iterator[str]:
    """Files below ``data.data_dir`` that a DataModule names in the arguments that its ``input_files`` lists."""
    folder = data.get("data_dir")
    if folder is None or "_target_" not in data:
        return
    try:
        arguments = signature(data._target_).literals.get("input_files", ())
    except TargetError:
        return
    for key in arguments:
        given = data.get(key)
        for file in [given] if isinstance(given, str) else given or []:
            path = Path(str(folder)).expanduser() / file
            # Readers of the original image files take a compressed one for a plain one and the other way round.
            other = path.with_suffix("") if path.suffix == ".gz" else path.with_name(f"{path.name}.gz")
            if not path.exists() and not other.exists():
                source = f" It can be obtained from: {data.source}" if data.get("source") else ""
                yield (
                    f"data.{key}={file}: no such file in data.data_dir={folder}; "
                    f"set data_dir to the folder that holds it.{source}"
                )


def _batch_keys(config: DictConfig) -> Iterator[str]:
    try:
        needs = signature(config.model._target_).literals.get("batch_keys")
        gives = signature(config.data._target_).literals.get("batch_keys")
    except (TargetError, OmegaConfBaseException, AttributeError):
        return
    if needs and gives and (missing := [key for key in needs if key not in gives]):
        yield (
            f"model: {config.model._target_} needs the batch keys {missing}, "
            f"which {config.data._target_} does not give (it gives {list(gives)})"
        )


def _devices(config: DictConfig) -> Iterator[str]:
    trainer = config.trainer
    if str(trainer.get("accelerator")) in {"gpu", "cuda"}:
        import torch  # only a run that asks for a GPU pays for this import here

        available = torch.cuda.device_count()
        wanted = trainer.get("devices")
        if available == 0:
            build = (
                ""
                if torch.version.cuda
                else " (the installed torch is the CPU build: on a GPU machine remove .venv and run ./quickstart)"
            )
            yield (
                f"trainer.accelerator={trainer.accelerator}: no CUDA device found{build}; "
                "the same run on CPU processes: trainer=multi_cpu (one process: trainer=cpu)"
            )
            return
        if isinstance(wanted, int) and wanted > available:
            yield f"trainer.devices={wanted}: this machine has {available} CUDA device(s)"
            return
    try:
        processes = num_processes(config)
    except ValueError as error:
        yield str(error)
        return
    if mistakes := list(_cluster(config, processes)):
        yield from mistakes
        return
    size = _same_items(config, processes)
    try:
        check_sample_parallel_size(size, processes)
    except ValueError as error:
        yield str(error)
        return
    if size > 1:
        yield from _samples(config, size)
    batch, shares = config.data.get("batch_size"), processes // size
    if _strategy_says(config, "data_parallel", True) and isinstance(batch, int) and batch % shares:
        over = f"trainer.devices x trainer.num_nodes = {processes} processes"
        if size > 1:
            over = f"{shares} shares of the data ({over}, {size} to a share)"
        yield (
            f"data.batch_size={batch}: cannot be split over {over} (it counts the samples of one step over all of "
            f"them): use a multiple of {shares}"
        )


def _strategy_says(config: DictConfig, name: str, otherwise: Any) -> Any:
    """A class-level constant of the strategy.

    ``data_parallel = False``: the ranks do not share the items of a step. ``same_items_size``: the name of the argument
    that counts ranks which get the same items and share something else.
    """
    try:
        return signature(config.strategy._target_).literals.get(name, otherwise)
    except (TargetError, OmegaConfBaseException, AttributeError):
        return otherwise


def _same_items(config: DictConfig, processes: int) -> int:
    """Ranks that get the same items; ``auto``: those of a node."""
    argument = _strategy_says(config, "same_items_size", None)
    size = 1 if argument is None else config.strategy.get(argument, "auto")
    if size != "auto":
        return size
    return config.strategy.get("local_size") or processes // int(config.trainer.get("num_nodes") or 1)


def _samples(config: DictConfig, size: int) -> Iterator[str]:
    """Samples of the weights that ``size`` ranks share."""
    for key in ("num_samples", "num_eval_samples"):
        number = config.model.get(key)
        if isinstance(number, int):
            try:
                check_num_samples(number, size, f"model.{key}", key == "num_samples" and config.model.get("antithetic"))
            except ValueError as error:
                yield str(error)


def _cluster(config: DictConfig, processes: int) -> Iterator[str]:
    """Sizes of simulated nodes."""
    cluster = config.get("cluster") or {}
    size = cluster.get("local_size")
    if size is not None and (size < 1 or processes % size):
        yield (
            f"cluster.local_size={size}: does not divide trainer.devices x trainer.num_nodes = {processes} processes; "
            f"use one of {', '.join(str(n) for n in range(1, processes + 1) if processes % n == 0)}"
        )
    emulated = [key for key in ("rate_mbit", "latency_ms", "compute_ms") if cluster.get(key)]
    if emulated and processes == 1 and "_target_" not in config.strategy:
        yield (
            f"cluster.{emulated[0]}={cluster[emulated[0]]}: one process has no network to emulate; "
            "choose trainer=cluster_2x2 or trainer=multi_cpu trainer.devices=4"
        )
