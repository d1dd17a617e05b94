"""How much the bases of a network's weights turn while it trains: the observation behind OIALR, for any network."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from callbacks.low_rank import LowRankCallback, draw, log_exact
from networks.low_rank import (
    LayerChoice,
    LowRankWeight,
    fractions,
    mixing,
    mixing_similarity,
    polar_factor,
    polar_newton_schulz,
    stability,
)

_POLAR = {"svd": polar_factor, "newton_schulz": polar_newton_schulz}


class BasisStability(pl.Callback):
    """Compares the basis ``P = U V^T`` of every weight with the one some epochs earlier; changes nothing.

    Logged at the end of epochs: ``oialr/stability/<layer>`` (1: the basis has not turned), ``oialr/stability`` (mean
    over layers), ``oialr/r_similarity/<layer>`` and its mean (the same for the mixing R of ``W2 = Q R``); in tests
    ``test/stored_fraction`` and ``test/trainable_fraction``, so that dense networks stand beside low-rank ones in a
    table. The figure ``stability`` shows layers over epochs and the mean.

    The factors of the last ``gap`` epochs are kept in memory and in checkpoints: about ``2 gap / every`` times the
    chosen weights.

    Args:
        layers: Which weights; None: `networks.low_rank.LayerChoice` with its defaults.
        gap: Epochs between the two bases of a comparison; the paper's figures use 5.
        every: Epochs between two comparisons; None: ``gap``. It must divide ``gap``.
        estimator: ``svd``, exact, or ``newton_schulz``, products of matrices alone.
        figures_dir: Folder of the figure at the end of the fit; None: no figure.
    """

    def __init__(
        self,
        layers: LayerChoice | None = None,
        gap: int = 5,
        every: int | None = None,
        estimator: Literal["svd", "newton_schulz"] = "svd",
        figures_dir: str | None = None,
    ) -> None:
        if gap < 1:
            raise ValueError(f"callbacks.stability.gap={gap} must be at least 1: epochs between two bases.")
        every = gap if every is None else every
        if every < 1 or gap % every:
            raise ValueError(f"callbacks.stability.every={every} must divide callbacks.stability.gap={gap}.")
        if estimator not in _POLAR:
            raise ValueError(f"callbacks.stability.estimator={estimator!r} is unknown; choose {' or '.join(_POLAR)}.")
        self.layers, self.gap, self.every, self.estimator = layers or LayerChoice(), gap, every, estimator
        self.figures_dir = figures_dir
        self.weights: list[LowRankWeight] = []
        self.history: list[dict[str, Any]] = []  # {"epoch", "stability": {label: value}, "r_similarity": {...}}
        self._bases: list[dict[str, Any]] = []  # {"epoch", "polar": {name: P}, "mixing": ..., "ranks": ...}
        self._undefined: set[str] = set()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            self.weights = self.layers(pl_module)
        except ValueError as error:
            raise ValueError(f"callbacks.stability.{error}") from None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._bases and trainer.current_epoch == 0:
            self._bases.append(self._now(0))

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._compare(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._compare(trainer, pl_module)  # an epoch without a validation

    @torch.no_grad()
    def _now(self, epoch: int) -> dict[str, Any]:
        polar, mixings, ranks = {}, {}, {}
        for weight in self.weights:
            matrix = weight.matrix()
            polar[weight.name] = self._polar(weight, matrix).cpu()
            mixings[weight.name] = mixing(matrix).cpu()
            ranks[weight.name] = weight.rank
        return {"epoch": epoch, "polar": polar, "mixing": mixings, "ranks": ranks}

    def _polar(self, weight: LowRankWeight, matrix: Tensor) -> Tensor:
        """The basis; of a factored weight within its rank, since its matrix has no unique one."""
        estimate = _POLAR[self.estimator]
        if weight.converted:
            return weight.u @ estimate(weight.sigma).to(weight.u.dtype) @ weight.v.mT
        return estimate(matrix)

    def _compare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % self.every or (self._bases and self._bases[-1]["epoch"] == epoch):
            return
        now = self._now(epoch)
        before = next((entry for entry in self._bases if entry["epoch"] == epoch - self.gap), None)
        self._bases = [entry for entry in self._bases if entry["epoch"] > epoch - self.gap] + [now]
        if before is None:
            return
        turned = {
            w.label: stability(
                before["polar"][w.name], now["polar"][w.name], (before["ranks"][w.name], now["ranks"][w.name])
            )
            for w in self.weights
        }
        mixed = {w.label: mixing_similarity(before["mixing"][w.name], now["mixing"][w.name]) for w in self.weights}
        self._say_undefined(turned)
        for name, values in (("stability", turned), ("r_similarity", mixed)):
            for label, value in values.items():
                log_exact(pl_module, f"oialr/{name}/{label}", value)
            known = [value for value in values.values() if not math.isnan(value)]
            log_exact(pl_module, f"oialr/{name}", sum(known) / len(known) if known else math.nan)
        self.history.append({"epoch": epoch, "stability": turned, "r_similarity": mixed})

    def _say_undefined(self, values: dict[str, float]) -> None:
        for label in sorted(label for label, value in values.items() if math.isnan(value)):
            if label not in self._undefined:
                self._undefined.add(label)
                rank_zero_warn(
                    f"callbacks.stability: the stability of {label} is not defined, its weight is rank-deficient or "
                    "not finite; it is left out of the mean."
                )

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not any(isinstance(callback, LowRankCallback) for callback in trainer.callbacks):  # they log it themselves
            for name, value in zip(("trainable", "stored"), fractions(pl_module), strict=True):
                log_exact(pl_module, f"test/{name}_fraction", value)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and self.figures_dir and not trainer.fast_dev_run:
            from callbacks.figures import low_rank

            plots = {"stability": lambda: low_rank.stability(self.history)}
            draw(trainer, plots, self.figures_dir, "callbacks.stability")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "bases": self._bases}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self._bases = state_dict["history"], state_dict["bases"]
