"""What the command line says of a swept key replaces what the configuration says (``hydra.sweeper.params``)."""

from __future__ import annotations

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict


class CommandLineWins(Callback):
    """Hydra callback that strikes off the parameters of a sweep that the command line gives.

    Hydra adds the command line to the parameters of the configuration and takes the last of equal keys. Values of the
    groups arrive with ``++`` in front (`runner.overrides`), which are other keys to it: a key in both would multiply
    the jobs, each of them with the value of the command line.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Change the composed configuration before the sweeper is built from it."""
        params = config.hydra.sweeper.get("params")
        if not params:
            return
        typed = {override.partition("=")[0].lstrip("+~") for override in config.hydra.overrides.task}
        with open_dict(params):
            for key in [key for key in params if str(key).lstrip("+~") in typed]:
                del params[key]
