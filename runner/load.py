"""Rebuild a finished or interrupted run for notebooks, benchmarks and follow-up experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_run(run_dir: str | Path, checkpoint: str = "best") -> tuple[Any, Any, dict[str, Any]]:
    """Load a run from its folder alone.

    Args:
        run_dir: ``logs/<name>/<stamp>``, also when it was moved.
        checkpoint: ``best``, ``last`` or the path of a checkpoint of that run.

    Returns:
        (module with the weights of the checkpoint, in evaluation mode; datamodule, not set up; resolved configuration).

    Raises:
        FileNotFoundError: If there is no such checkpoint.
    """
    import torch

    from runner.job import build

    path = Path(checkpoint)
    if checkpoint in ("best", "last"):
        path = Path(run_dir) / "checkpoints" / f"{checkpoint}.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: the run has not saved one, or run_dir={run_dir} is not a run")
    content = torch.load(path, map_location="cpu", weights_only=True)
    config = content["config"]
    module, datamodule = build(config)
    if layers := content.get("low_rank", {}).get("layers"):
        from networks.low_rank import rebuild

        rebuild(module, layers)  # the network was factorised in training
    module.load_state_dict(content["state_dict"])
    return module.eval(), datamodule, config
