"""Dynamical low-rank training (DLRT): low rank from the first step on, with bases that follow the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from callbacks.low_rank import Export, LowRankCallback, parse_time
from networks.low_rank import (
    LayerChoice,
    LowRankWeight,
    common_threshold,
    convert,
    decompose,
    dense_size,
    exchange,
    kept_rank,
    update_basis,
)
from networks.low_rank.optimizer_state import SQUARED
from networks.tall_view import to_tall


class DLRT(LowRankCallback):
    """The augmented basis-update-and-Galerkin (BUG) step for the weights of any LightningModule, as a competitor.

    Ceruti, Kusch, Lubich, "A rank-adaptive robust integrator for dynamical low-rank approximation", BIT 2022;
    Schotthöfer et al., "Low-rank lottery tickets", NeurIPS 2022. With the gradient G of ``W2 = U S V^T`` each step

    1. (K, L) augments the bases by the directions of a gradient step: ``orth[U, G V]`` and ``orth[V, G^T U]``, which
       span the same spaces as with ``K = U S - h G V`` for any step length h;
    2. (S) takes the optimizer's step for S in the augmented bases, with the gradient ``U^T G V`` there;
    3. truncates by an SVD of S.

    Any optimizer works: moments are carried into the augmented bases and back. Second moments of new directions begin
    with the square of their gradient, else Adam would take its longest step along them.

    G is that of the dense weight, which is computed in every forward pass: this compares accuracies, it is slower than
    dense training. One process only.

    Args:
        layers: Which weights; None: `networks.low_rank.LayerChoice` with its defaults.
        delay: When dense training ends: optimizer steps or ``"2 epochs"``.
        stored_fraction: After every step ranks follow from one relative threshold for all layers, the lowest that meets
            this share of stored numbers. None: ``tolerance`` decides.
        tolerance: Share of the squared singular values that a truncation may drop.
        svd_dtype: Least precision of decompositions.
        export: Form in which the kept checkpoint is written once more at the end.
        figures: Functions of `callbacks.figures.low_rank` for the end of the fit.
        figures_dir: Their folder; None: no figures.
        metric: Logged metric that figures show; None: the one that checkpoints monitor.
    """

    def __init__(
        self,
        layers: LayerChoice | None = None,
        delay: int | str = 0,
        stored_fraction: float | None = 0.5,
        tolerance: float | None = None,
        svd_dtype: str = "float32",
        export: Export = "dense",
        figures: Sequence[str] = ("ranks", "metric_and_parameters"),
        figures_dir: str | None = None,
        metric: str | None = None,
    ) -> None:
        super().__init__("dlrt", layers, "rotate", svd_dtype, export, figures, figures_dir, metric)
        if (stored_fraction is None) == (tolerance is None):
            raise ValueError(
                f"callbacks.dlrt.stored_fraction={stored_fraction}, tolerance={tolerance}: give one and set the other "
                "to null."
            )
        if tolerance is not None and not 0 <= tolerance < 1:
            raise ValueError(f"callbacks.dlrt.tolerance={tolerance} must lie in [0, 1): it is a share.")
        self.unit, self.threshold = parse_time("callbacks.dlrt.delay", delay)
        self.stored_fraction, self.tolerance = stored_fraction, tolerance
        self._gradients: dict[str, Tensor] = {}
        self._dense = 0  # numbers of the dense network

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            raise ValueError(
                f"callbacks.dlrt: bases change with every step, which {trainer.world_size} processes would have to "
                "exchange; use one (trainer.devices=1)."
            )
        super().on_fit_start(trainer, pl_module)
        self._dense = dense_size(pl_module)  # not later: in augmented bases Sigma need not be square

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._observe()  # a resumed run begins with factors

    @override
    def on_steps(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, epochs: int) -> None:
        factored = [w for w in self.weights if w.converted]
        if factored:
            decompositions = [decompose(w.sigma, self.svd_dtype) for w in factored]
            ranks = self._ranks(factored, [s for _, s, _ in decompositions])
            for weight, decomposition, rank in zip(factored, decompositions, ranks, strict=True):
                update_basis(weight, decomposition, rank, trainer.optimizers)
        elif (step if self.unit == "steps" else epochs) >= self.threshold:
            decompositions = [decompose(w.matrix(), self.svd_dtype) for w in self.weights]
            ranks = self._ranks(self.weights, [s for _, s, _ in decompositions])
            for weight, decomposition, rank in zip(self.weights, decompositions, ranks, strict=True):
                convert(weight, decomposition, trainer.optimizers, rank=rank)
                self.history["spectra"][weight.label] = {"before": decomposition[1].tolist()}
        self._observe()

    def _ranks(self, weights: list[LowRankWeight], spectra: list[Tensor]) -> list[int]:
        if self.stored_fraction is None:
            return [
                kept_rank(s, w.n, self.tolerance, "energy", 1.0, 0.0) for w, s in zip(weights, spectra, strict=True)
            ]
        sizes = [(w.m, w.n) for w in weights]
        try:
            return common_threshold(spectra, sizes, self._dense, self.stored_fraction)
        except ValueError as error:
            raise ValueError(f"callbacks.dlrt.{error}") from None

    def _observe(self) -> None:
        """Collect the gradients of dense weights; micro-batches and several uses of a weight add up."""

        def collector(name: str) -> Any:
            def add(gradient: Tensor) -> None:
                before = self._gradients.get(name)
                self._gradients[name] = gradient if before is None else before + gradient

            return lambda weight: weight.register_hook(add) if weight.requires_grad else None

        for weight in self.weights:
            if weight.converted:
                weight.observe(collector(weight.name))

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for weight in self.weights:
            if weight.converted and (gradient := self._gradients.pop(weight.name, None)) is not None:
                self._augment(weight, to_tall(gradient)[0], optimizer)

    @staticmethod
    def _augment(weight: LowRankWeight, gradient: Tensor, optimizer: Optimizer) -> None:
        """Steps K and L, and everything that step S needs: Sigma, its gradient and moments in the larger bases."""
        u, sigma, v, old = weight.u.detach(), weight.sigma.detach(), weight.v.detach(), weight.trained
        scale = gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)
        larger_u = torch.linalg.qr(torch.cat([u, gradient @ v / scale], dim=1)).Q
        larger_v = torch.linalg.qr(torch.cat([v, gradient.mT @ u / scale], dim=1)).Q
        left, right = u.mT @ larger_u, v.mT @ larger_v  # (r, 2 r): the old bases in the new ones
        weight.assign(larger_u, left.mT @ sigma @ right, larger_v)
        weight.sigma.grad = larger_u.mT @ gradient @ larger_v
        exchange([optimizer], old, weight.sigma, "rotate", left, right, converting=False)
        rank = len(sigma)
        for key, value in optimizer.state.get(weight.sigma, {}).items():
            if key in SQUARED:
                value[rank:] = weight.sigma.grad[rank:].square()
                value[:, rank:] = weight.sigma.grad[:, rank:].square()

    @override
    def _unhook(self, pl_module: pl.LightningModule) -> None:
        super()._unhook(pl_module)
        for weight in self.weights:
            if weight.converted:
                weight.observe(None)
        self._gradients = {}
