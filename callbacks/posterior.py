"""What a training has made of the posterior of Bayesian layers, as figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from callbacks.figures import posterior
from callbacks.low_rank import draw
from networks.bayes import bayesian_layers


class Posterior(pl.Callback):
    """Draws deviations and signal-to-noise ratios of the weights of every Bayesian layer when a fit ends.

    The weights are those of the last step. A network without Bayesian layers has no such figure.

    Args:
        figures: Functions of `callbacks.figures.posterior`.
        figures_dir: Their folder; None draws nothing.

    Raises:
        ValueError: For an unknown figure.
    """

    def __init__(self, figures: Sequence[str] = posterior.FIGURES, figures_dir: str | None = None) -> None:
        if unknown := [name for name in figures if name not in posterior.FIGURES]:
            raise ValueError(
                f"callbacks.posterior.figures: {unknown[0]!r} is unknown; choose from {', '.join(posterior.FIGURES)}"
            )
        self.figures, self.figures_dir = tuple(figures), figures_dir
        self._initial: dict[str, float] = {}  # median deviation of every layer when the training began

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._initial:  # otherwise they come from a checkpoint
            self._initial = {
                name: float(layer.weight_log_sigma.detach().double().exp().median())
                for name, layer in bayesian_layers(pl_module)
            }

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run or not self.figures_dir:
            return
        layers = read_layers(pl_module, self._initial)
        plots = {name: lambda name=name: getattr(posterior, name)(layers) for name in self.figures}
        draw(trainer, plots, self.figures_dir, "callbacks.posterior.figures")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"initial": self._initial}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._initial = state_dict["initial"]


def read_layers(module: Any, initial: dict[str, float]) -> dict[str, posterior.LayerWeights]:
    """Weights alive of every Bayesian layer, by name.

    Args:
        module: Holds the layers.
        initial: Median deviation of a layer before, by name.
    """
    found = {}
    for name, layer in bayesian_layers(module):
        weight = next(layer.random_tensors())
        mu, log_sigma = weight.mu.detach(), weight.log_sigma.detach()
        if weight.mask is not None:
            mu, log_sigma = mu[weight.mask], log_sigma[weight.mask]
        values = [x.double().flatten().cpu().numpy() for x in (mu, log_sigma.double().exp())]
        found[name.removeprefix("net.")] = posterior.LayerWeights(*values, initial.get(name))
    return found
