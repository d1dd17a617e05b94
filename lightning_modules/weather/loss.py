"""The training losses: weighted squared error, or relative distance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Kieckhefen et al.: surface channels, factors of the variables on pressure levels, and of the levels above 500 hPa.
_SURFACE = {"msl": 6.0, "u10": 3.08, "v10": 3.08, "t2m": 12.0}
_PRESSURE = {"z": 3.0, "q": 0.6, "t": 1.5, "u": 0.9, "v": 0.9}
_LEVELS = {400.0: 0.9, 300.0: 0.8, 250.0: 0.7, 200.0: 0.6, 150.0: 0.5, 100.0: 0.4, 50.0: 0.3}


def channel_weights(names: Sequence[str], kind: str | Mapping[str, float] | None) -> Tensor:
    """Weights v of channels, (V,), float64.

    Args:
        names: Of the channels.
        kind: None: 1; ``era5``: those of the paper; a mapping: by name, 1 for others.

    Raises:
        ValueError: For an unknown kind, a name that is no channel, or a channel that the paper has no weight for.
    """
    if kind is None:
        return torch.ones(len(names), dtype=torch.float64)
    if isinstance(kind, Mapping):
        if strange := sorted(set(kind) - set(names)):
            raise ValueError(f"model.channel_weights names {strange[0]!r}; the channels are {', '.join(names)}")
        return torch.tensor([float(kind.get(name, 1.0)) for name in names], dtype=torch.float64)
    if kind != "era5":
        raise ValueError(f"model.channel_weights={kind!r} is unknown; choose era5, a mapping name: weight, or null")
    return torch.tensor([_era5(name) for name in names], dtype=torch.float64)


def _era5(name: str) -> float:
    if name in _SURFACE:
        return _SURFACE[name]
    found = re.fullmatch(r"([zqtuv])([\d.]+)", name)
    if found is None:
        raise ValueError(f"model.channel_weights=era5 has no weight for {name}; give a mapping name: weight")
    return _PRESSURE[found[1]] * _LEVELS.get(float(found[2]), 1.0)


def squared_error(
    prediction: Tensor, target: Tensor, latitude: Tensor, channel: Tensor, power: int, count: int
) -> Tensor:
    """This rank's share of the weighted mean squared error, a scalar.

    ``sum (a v)^power (p - t)^2 / count``: power 1 is the usual weight, 2 that of the published code, which multiplies
    prediction and target by ``a v``.

    Args:
        prediction: (B, H, W, V) of this rank, normalised.
        target: The same.
        latitude: a, (H,).
        channel: v of this rank's channels, (V,).
        power: 1 or 2.
        count: Elements of the whole batch: B times all grid points times all channels.
    """
    weight = (latitude[:, None, None] * channel) ** power
    return ((prediction - target).square() * weight.to(prediction)).sum() / count


def relative_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of ||p - t|| / ||t|| over all channels and points, unweighted (FourCastNet), a scalar.

    Args:
        prediction: (B, H, W, V), normalised, whole fields.
        target: The same.
    """
    distance = (prediction - target).flatten(1).norm(dim=1)
    return (distance / target.flatten(1).norm(dim=1)).mean()
