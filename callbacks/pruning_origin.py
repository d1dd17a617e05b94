"""Where networks of a pruning study come from: what files say of it, and the dense network of another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import nn

from callbacks.run_record import RunRecord
from networks.pruning.variants import Variant, load_variant

if TYPE_CHECKING:
    from callbacks.pruning import Pruning


def config_of(trainer: pl.Trainer) -> dict[str, Any] | None:
    """The configuration of the run, None outside of one."""
    return next((c.config for c in trainer.callbacks if isinstance(c, RunRecord)), None)


def about(pruning: Pruning, trainer: pl.Trainer) -> dict[str, Any]:
    """What a network's file says of its origin."""
    config = config_of(trainer)
    return {
        "config": config,
        "schedule": pruning.schedule,
        "scope": pruning.scope,
        "rewind": pruning.rewind,
        "epochs": 0,
        "run_dir": None if config is None else config["run"]["dir"],
    }


def find_dense(source: str | None, dirpath: Path, config: Mapping[str, Any] | None, key: str) -> Variant | None:
    """The dense network of another run; None where it is to be trained.

    Args:
        source: A ``dense.pt``, or a run that has one; ``sweep``: a job beside this one whose dense training is the
            same; None: training.
        dirpath: Folder of the networks of this run.
        config: Of this run.
        key: Of the callback, for messages.

    Raises:
        ValueError: There is no such file.
    """
    if source is None:
        return None
    if source != "sweep":
        path = Path(source)
        path = path / "pruned" / "dense.pt" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{key}.dense={source}: there is no {path}; give a run of this experiment")
        return load_variant(path)
    mine = _training(config)
    for path in sorted(dirpath.parent.parent.glob(f"*/{dirpath.name}/dense.pt")):
        variant = load_variant(path)
        if mine is not None and _training(variant.about.get("config")) == mine:
            return variant
    return None


def refuse_other_sizes(variant: Variant, network: nn.Module, source: str, key: str) -> None:
    """Raise ValueError where a network of a run does not fit into that of this one."""
    own = network.state_dict()
    wrong = [name for name, value in variant.state.items() if name not in own or own[name].shape != value.shape]
    wrong += sorted(own.keys() - variant.state.keys())
    if wrong:
        raise ValueError(
            f"{key}.dense={source}: the network has other sizes than the model of this run (first: {wrong[0]}); choose "
            "the model that it was trained as"
        )


def _training(config: Mapping[str, Any] | None) -> Any:
    """What decides the weights of a dense training."""
    if config is None:
        return None
    trainer = {key: config["trainer"][key] for key in ("max_epochs", "limit_train_batches", "precision")}
    stopping = config["callbacks"].get("early_stopping")
    return config["model"], config["data"], config["seed"], trainer, stopping
