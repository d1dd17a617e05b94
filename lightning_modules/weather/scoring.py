"""How good the forecasts of a stage are: what is kept from batch to batch, what is logged, the table of skill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.metrics.weather import WeatherScores, ZonalSpectrum, anomaly_correlation
from lightning_modules.weather.blocks import Blocks

# RMSE of the network over that of a baseline, as it is logged.
_RATIOS = {
    "persistence": "persistence_ratio",
    "climatology": "climatology_ratio",
    "damped_persistence": "damped_ratio",
    "linear": "linear_ratio",
}


class OfBatch(NamedTuple):
    """What is known of the samples of a batch, for figures.

    Attributes:
        squared: Mean square error, (forecast, B, L, own channels), normalised, of whole fields.
        correlations: Anomaly correlation, (forecast, B, L, own channels).
    """

    squared: Tensor
    correlations: Tensor


class Found(NamedTuple):
    """Scores of all forecasts of a stage, ``rmse`` and ``acc`` (L, V), and the power of small scales (L, V)."""

    scores: dict[str, dict[str, Tensor]]
    small_scales: Tensor


class Scoring:
    """Errors, correlations and spectra of one stage, exact over all ranks.

    Args:
        forecasts: Their names, ``model`` first.
        leads: Number of leads.
        blocks: Which block this rank has.
        device: Where the sums are kept.
    """

    def __init__(self, forecasts: Sequence[str], leads: int, blocks: Blocks, device: torch.device) -> None:
        channels = blocks.num_outputs
        self.blocks = blocks
        self.scores = {name: WeatherScores(leads, channels).to(device) for name in forecasts}
        self.spectra = ZonalSpectrum(leads, channels, blocks.width // 2 + 1).to(device)

    def update(self, sums: Tensor, power: Tensor) -> OfBatch:
        """Count a batch in.

        Args:
            sums: Of `lightning_modules.metrics.weather.products` over this rank's block, (forecast, 4, B, L, own).
            power: Zonal power of forecast and truth, (B, 2, L, own, M).
        """
        blocks, grid = self.blocks, self.blocks.grid
        whole = grid.sum_over_tokens(sums)
        correlations = torch.stack([anomaly_correlation(part) for part in whole])
        for scores, part, correlation in zip(self.scores.values(), sums, correlations, strict=True):
            scores.update(part[0], correlation, blocks.own, grid.token == 0, blocks.first_of_instance)
        self.spectra.update(power[:, 0], power[:, 1], blocks.own, grid.token == 0)
        return OfBatch(whole[:, 0], correlations)

    def compute(self) -> Found:
        """Scores of everything that was counted in, of all ranks, which come here together."""
        return Found({name: scores.compute() for name, scores in self.scores.items()}, self.spectra.compute())


def logged(
    found: Found, scale: Tensor, channels: Sequence[str], leads: Sequence[str], wanted: Sequence[str] | None
) -> dict[str, Tensor]:
    """What is logged of a stage, ``<score>/<channel>@<lead>``.

    Args:
        found: Of the stage.
        scale: Units of a normalised channel, (V,).
        channels: Their names.
        leads: Their names.
        wanted: Channels that are logged; None: all.
    """
    values: dict[str, Tensor] = {}
    model = found.scores["model"]
    for i, lead in enumerate(leads):
        for j, channel in enumerate(channels):
            if wanted is not None and channel not in wanted:
                continue
            at = f"{channel}@{lead}"
            values[f"rmse/{at}"] = model["rmse"][i, j] * scale[j]
            values[f"acc/{at}"] = model["acc"][i, j]
            values[f"small_scales/{at}"] = found.small_scales[i, j]
            for name, ratio in _RATIOS.items():
                if name in found.scores:
                    values[f"{ratio}/{at}"] = model["rmse"][i, j] / found.scores[name]["rmse"][i, j]
    return values


def skill(found: Found, scale: Tensor, channels: Sequence[str], leads: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of forecast, channel, lead, rmse and acc, of all forecasts and channels; arguments as in `logged`."""
    return [
        {
            "forecast": name, "channel": channel, "lead": lead,
            "rmse": float(scores["rmse"][i, j] * scale[j]), "acc": float(scores["acc"][i, j]),
        }
        for name, scores in found.scores.items()
        for j, channel in enumerate(channels)
        for i, lead in enumerate(leads)
    ]  # fmt: skip
