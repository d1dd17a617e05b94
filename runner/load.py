"""Rebuild a finished or interrupted run for notebooks, benchmarks and follow-up experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_run(run_dir: str | Path, checkpoint: str = "best", **model: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Load a run from its folder alone, or a lottery ticket from its file alone.

    Args:
        run_dir: ``logs/<name>/<stamp>``, also when it was moved; or a ticket, ``<run>/tickets/level_09.pt``, which
            holds the configuration of its run.
        checkpoint: ``best``, ``last`` or the path of a checkpoint of that run. Of a ticket: ``best`` (in validation),
            ``trained`` (at the end of its level; also where no best is known) or ``initial``.
        **model: Values of the model's configuration to change, e.g. ``execution="compact"``.

    Returns:
        (module with the weights of the checkpoint, in evaluation mode; datamodule, not set up; resolved configuration).

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If a ticket does not hold what is asked for.
    """
    if Path(run_dir).is_file():
        return _load_ticket(Path(run_dir), checkpoint, model)
    import torch

    path = Path(checkpoint)
    if checkpoint in ("best", "last"):
        path = Path(run_dir) / "checkpoints" / f"{checkpoint}.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: the run has not saved one, or run_dir={run_dir} is not a run")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if "shards" in content:
        from strategies.jigsaw import read_whole

        content = read_whole(path)  # the model was cut over ranks
    module, datamodule, config = _built(content["config"], model)
    if layers := content.get("low_rank", {}).get("layers"):
        from networks.low_rank import rebuild

        rebuild(module, layers)  # the network was factorised in training
    if "pruning" in content:
        from networks.pruning.variants import rebuild as rebuild_pruned

        rebuild_pruned(module, content["pruning"], content["state_dict"])  # channels were removed in training
    _set_masks(module, content["state_dict"])
    module.load_state_dict(content["state_dict"])
    return module.eval(), datamodule, config


def _built(config: dict[str, Any], model: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from runner.job import build

    config = config | {"model": config["model"] | model}
    return *build(config), config


def _set_masks(module: Any, state: dict[str, Any]) -> None:
    """Masks that a callback has given to layers of a module that knows of none."""
    from networks.masks import MASK, set_masks

    own = module.state_dict()
    found = {k.removesuffix("_mask"): v for k, v in state.items() if k.rpartition(".")[2] == MASK and k not in own}
    set_masks(module, found)


def _load_ticket(path: Path, which: str, model: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from networks.lottery.tickets import apply_ticket, load_ticket
    from networks.masks import set_masks

    ticket = load_ticket(path)
    if ticket.about.get("config") is None:
        raise ValueError(f"{path} was written outside of a run and holds no configuration: build the module yourself")
    module, datamodule, config = _built(ticket.about["config"], model)
    set_masks(module.net, ticket.masks)
    apply_ticket(module.net, ticket, "trained" if which == "best" and ticket.best is None else which)
    return module.eval(), datamodule, config
