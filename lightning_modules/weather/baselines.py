"""What every forecast is measured against: persistence, climatology, damped persistence, a linear inverse model.

They are fitted to the training part by sums over blocks of the fields, so that ranks that share a field get what one
would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Sum = Callable[[Tensor], Tensor]
BASELINES = ("persistence", "climatology", "damped_persistence", "linear")


@dataclass
class DampedPersistence:
    """The anomaly of the origin times a factor for each lead and channel.

    Attributes:
        factor: (L, V), regression coefficient of the anomaly at the lead on that at the origin.
    """

    factor: Tensor

    @classmethod
    def fit(cls, pairs: Iterable[tuple[Tensor, Tensor]], weight: Tensor, sum_over_tokens: Sum) -> DampedPersistence:
        """Least squares over pairs and grid points.

        Args:
            pairs: Anomalies at an origin, (H, W, V), and at the leads, (L, H, W, V), as often as there are.
            weight: ``a(phi)``, (H,).
            sum_over_tokens: Adds over the bands of longitudes.
        """
        cross = square = None
        for first, later in pairs:
            weighted = first.double() * weight.to(first.device)[:, None, None]
            with_later = torch.einsum("hwv,lhwv->lv", weighted, later.double())
            with_itself = (weighted * first).sum((0, 1))
            cross, square = (with_later, with_itself) if cross is None else (cross + with_later, square + with_itself)
        return cls(sum_over_tokens(cross) / sum_over_tokens(square).clamp(min=1e-300))

    def __call__(self, anomaly: Tensor) -> Tensor:
        """Anomalies at the leads, (B, L, H, W, V), from (B, H, W, V)."""
        return anomaly[:, None] * self.factor.to(anomaly)[None, :, None, None, :]


@dataclass
class LinearInverseModel:
    """Ridge regression of the leading principal components at each lead on those at the origin.

    What the leading components do not explain persists, damped.

    Attributes:
        patterns: Empirical orthogonal functions, this rank's part, (H, W, V, K); orthonormal over the whole field with
            the area weight.
        operators: (L, K, K): components at the lead are components at the origin times these.
        rest: Of what the patterns leave over.
        weight: ``a(phi)``, (H,).
    """

    patterns: Tensor
    operators: Tensor
    rest: DampedPersistence
    weight: Tensor

    @classmethod
    def fit(
        cls, first: Tensor, later: Tensor, weight: Tensor, number: int, ridge: float, over_field: Sum, over_tokens: Sum
    ) -> LinearInverseModel:
        """Fit to pairs.

        Args:
            first: Anomalies at the origins, (N, H, W, V).
            later: Anomalies at the leads, (N, L, H, W, V).
            weight: ``a(phi)``, (H,).
            number: K, at most a quarter of N: more would be learnt by heart.
            ridge: Added to the variances of the components, relative to their mean.
            over_field: Adds over all blocks of a field.
            over_tokens: Adds over its bands of longitudes.
        """
        root = weight.to(first).sqrt()[:, None, None]
        scaled = (first.double() * root).flatten(1)
        values, vectors = torch.linalg.eigh(over_field(scaled @ scaled.mT))
        number = min(number, max(1, len(first) // 4), int((values > 1e-6 * values[-1]).sum()))
        values, vectors = values[-number:].flip(0), vectors[:, -number:].flip(1)
        patterns = (scaled.mT @ (vectors / values.sqrt())).to(first).unflatten(0, first.shape[1:])
        start = vectors * values.sqrt()
        ends = _components(later, patterns, root, over_field).double()
        square = start.mT @ start
        square = square + ridge * square.diagonal().mean() * torch.eye(number, dtype=square.dtype, device=square.device)
        operators = torch.stack([torch.linalg.solve(square, start.mT @ end) for end in ends.unbind(1)])
        left = first - _fields(start.to(first), patterns, root)
        later_left = later - _fields(ends.to(later), patterns, root)
        rest = DampedPersistence.fit(zip(left, later_left, strict=True), weight, over_tokens)
        return cls(patterns, operators, rest, weight)

    def __call__(self, anomaly: Tensor, over_field: Sum) -> Tensor:
        """Anomalies at the leads, (B, L, H, W, V), from (B, H, W, V)."""
        root = self.weight.to(anomaly).sqrt()[:, None, None]
        start = _components(anomaly, self.patterns, root, over_field)
        ends = torch.einsum("bk,lkj->blj", start.double(), self.operators).to(anomaly)
        left = anomaly - _fields(start.to(anomaly), self.patterns, root)
        return _fields(ends, self.patterns, root) + self.rest(left)


def _components(fields: Tensor, patterns: Tensor, root: Tensor, over_field: Sum) -> Tensor:
    """Principal components (..., K) of fields (..., H, W, V)."""
    return over_field(((fields * root).flatten(-3) @ patterns.flatten(0, 2)).double()).to(fields)


def _fields(components: Tensor, patterns: Tensor, root: Tensor) -> Tensor:
    """Fields (..., H, W, V) of principal components (..., K)."""
    flat = components @ patterns.flatten(0, 2).mT
    return flat.unflatten(-1, patterns.shape[:-1]) / root.clamp(min=1e-6)


@dataclass
class FittedBaselines:
    """Those that are fitted to the training part.

    Attributes:
        damped: Damped persistence.
        linear: The linear inverse model; None: it is left out.
    """

    damped: DampedPersistence
    linear: LinearInverseModel | None

    @classmethod
    def fit(
        cls,
        anomalies: Iterable[Tensor],
        weight: Tensor,
        patterns: int,
        ridge: float,
        sum_over_instance: Sum,
        sum_over_tokens: Sum,
    ) -> FittedBaselines:
        """Fit both to the same samples.

        Args:
            anomalies: At an origin and at the leads, (1 + L, H, W, V), of every sample.
            weight: ``a(phi)``, (H,).
            patterns: Of the linear model; 0: leave it out.
            ridge: Of the linear model.
            sum_over_instance: Adds over all ranks of an instance.
            sum_over_tokens: Adds over the bands of longitudes.
        """
        if patterns:  # it needs all of them at once
            anomalies = list(anomalies)
        damped, linear = DampedPersistence.fit(((a[0], a[1:]) for a in anomalies), weight, sum_over_tokens), None
        if patterns:
            whole = torch.stack(anomalies)
            first, later = whole[:, 0], whole[:, 1:]
            linear = LinearInverseModel.fit(first, later, weight, patterns, ridge, sum_over_instance, sum_over_tokens)
        return cls(damped, linear)

    def anomalies(self, anomaly: Tensor, sum_over_instance: Sum) -> dict[str, Tensor]:
        """Forecast anomalies at the leads by name, (B, L, H, W, V) each, from (B, H, W, V)."""
        found = {"damped_persistence": self.damped(anomaly)}
        if self.linear is not None:
            found["linear"] = self.linear(anomaly, sum_over_instance)
        return found
