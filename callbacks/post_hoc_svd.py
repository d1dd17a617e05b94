"""Post-hoc SVD: train dense, cut every weight to a rank once, fine-tune the factors. The simplest way to low rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from callbacks.low_rank import Export, LowRankCallback, parse_time
from networks.low_rank import LayerChoice, StateMode, common_threshold, convert, dense_size
from networks.low_rank.optimizer_state import scale_moments


class PostHocSVD(LowRankCallback):
    """Truncates the weights of a network at one moment of its training and trains all three factors from there.

    The competitor that needs no method. Ranks follow from one relative threshold for all layers, the lowest that meets
    ``stored_fraction``, so that it can be compared with others at equal stored parameters.

    Args:
        layers: Which weights; None: `networks.low_rank.LayerChoice` with its defaults.
        at: When: optimizer steps, or ``"30 epochs"``.
        stored_fraction: Stored numbers of the whole network afterwards as a share of the dense one.
        opt_state: Moments of the optimizer for Sigma (`networks.low_rank.optimizer_state`); those of U and V are new.
        svd_dtype: Least precision of decompositions.
        export: Form in which the kept checkpoint is written once more at the end.
        figures: Functions of `callbacks.figures.low_rank` for the end of the fit.
        figures_dir: Their folder; None: no figures.
        metric: Logged metric that figures show; None: the one that checkpoints monitor.
    """

    def __init__(
        self,
        layers: LayerChoice | None = None,
        at: int | str = 1000,
        stored_fraction: float = 0.5,
        opt_state: StateMode = "rotate",
        svd_dtype: str = "float32",
        export: Export = "dense",
        figures: Sequence[str] = ("metric_and_parameters",),
        figures_dir: str | None = None,
        metric: str | None = None,
    ) -> None:
        super().__init__("post_hoc_svd", layers, opt_state, svd_dtype, export, figures, figures_dir, metric)
        if not stored_fraction > 0:
            raise ValueError(f"callbacks.post_hoc_svd.stored_fraction={stored_fraction} must be positive.")
        self.unit, self.threshold = parse_time("callbacks.post_hoc_svd.at", at)
        self.stored_fraction = stored_fraction
        self._done = False

    @override
    def on_steps(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, epochs: int) -> None:
        if self._done or (step if self.unit == "steps" else epochs) < self.threshold:
            return
        self._done = True
        self._synchronize(trainer)
        decompositions = self._decomposed([w.matrix() for w in self.weights])
        spectra, sizes = [s.cpu() for _, s, _ in decompositions], [(w.m, w.n) for w in self.weights]
        try:
            ranks = common_threshold(spectra, sizes, dense_size(pl_module), self.stored_fraction)
        except ValueError as error:
            raise ValueError(f"callbacks.post_hoc_svd.{error}") from None
        for weight, (u, s, v), rank in zip(self.weights, decompositions, ranks, strict=True):
            convert(weight, (u, s, v), trainer.optimizers, self.opt_state, rank, train_bases=True)
            self.history["spectra"][weight.label] = {"before": s.tolist(), "after": s[:rank].tolist()}
            # Balanced factors: steps of one length suit all three.
            root = s[:rank].sqrt()
            weight.assign(u[:, :rank] * root, torch.eye(rank), v[:, :rank] * root, train_bases=True)
            factor = (root[:, None] * root).to(weight.trained)
            scale_moments(trainer.optimizers, weight.trained, factor)
        self._rewrap(trainer)
        self._tell(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"done": self._done}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._done = state_dict["done"]
