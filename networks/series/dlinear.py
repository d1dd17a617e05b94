"""DLinear: one linear map for the trend of a window and one for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class TimeLinear(nn.Module):
    """Linear map along time, shared by all channels or one for each of them.

    The plain "Linear" of the LTSF-Linear family, and the building block of its relatives.

    Args:
        history_length: steps in.
        horizon: steps out.
        channels: number of channels; read only when `individual`.
        individual: one map per channel instead of one for all.
    """

    def __init__(self, history_length: int, horizon: int, channels: int, individual: bool = False) -> None:
        super().__init__()
        self.individual = individual
        maps = (channels,) if individual else ()
        self.weight = nn.Parameter(torch.empty(*maps, horizon, history_length))
        self.bias = nn.Parameter(torch.empty(*maps, horizon))
        bound = 1 / math.sqrt(history_length)  # the bounds of nn.Linear
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, history: Tensor) -> Tensor:
        """Map `(batch, time, channel)` to `(batch, horizon, channel)`."""
        if self.individual:
            # One matrix product per channel: (channel, batch, time) x (channel, time, horizon).
            mapped = torch.baddbmm(self.bias[:, None], history.permute(2, 0, 1), self.weight.mT)
            return mapped.permute(1, 2, 0)
        return functional.linear(history.mT, self.weight, self.bias).mT


def moving_average(series: Tensor, kernel_size: int) -> Tensor:
    """Centred moving average along time; the ends are continued with the first and the last value.

    Args:
        series: `(batch, time, channel)`.
        kernel_size: odd number of averaged steps.

    Returns:
        `(batch, time, channel)`.
    """
    side = (kernel_size - 1) // 2
    # Running sums: several times faster than avg_pool1d on a CPU. Their differences lose digits where the level is
    # large against the variation, so the level is taken out first.
    level = series.mean(dim=1, keepdim=True)
    sums = functional.pad((series - level).mT, (side + 1, side), mode="replicate").cumsum(dim=-1)
    return ((sums[..., kernel_size:] - sums[..., :-kernel_size]) / kernel_size).mT + level


class DLinear(nn.Module):
    """Decomposition into trend and seasonal part, each mapped linearly to the horizon.

    Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023, section 4.

    Args:
        history_length: steps of the window.
        horizon: steps to forecast.
        channels: number of channels; read only when `individual`.
        kernel_size: steps of the moving average that is the trend (odd; 25 in the paper).
        individual: separate maps for every channel (DLinear-I).
    """

    def __init__(
        self, history_length: int, horizon: int, channels: int, kernel_size: int = 25, individual: bool = False
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd and positive: the moving average is centred")
        self.kernel_size = kernel_size
        self.seasonal = TimeLinear(history_length, horizon, channels, individual)
        self.trend = TimeLinear(history_length, horizon, channels, individual)

    def decompose(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Split `(batch, time, channel)` into seasonal part and trend, which add up to it."""
        trend = moving_average(history, self.kernel_size)
        return history - trend, trend

    def forward(
        self,
        history: Tensor,
        history_marks: Tensor | None = None,
        forecast_marks: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> Tensor:
        """Map `(batch, time, channel)` to `(batch, horizon, channel)`; marks and origin are not used."""
        seasonal, trend = self.decompose(history)
        return self.seasonal(seasonal) + self.trend(trend)


@torch.no_grad()
def least_squares(
    batches: Iterable[Mapping[str, Tensor]],
    history_length: int,
    horizon: int,
    channels: int,
    ridges: Sequence[float] = (1e-6,),
) -> list[DLinear]:
    """The DLinear networks with the least squared error on some windows: no training, and no seed.

    Trend and seasonal part add up to the window, so that the network is one linear map of it, whose best weights solve
    the normal equations; both parts of the network get them. Of windows that are no more than their steps every one
    can be met exactly, which forecasts nothing: then a larger penalty is needed.

    Args:
        batches: ``history`` (batch, time, channel), ``target`` (batch, horizon, channel) and ``valid`` (batch,
            channel).
        history_length: steps of the window.
        horizon: steps to forecast.
        channels: number of channels, which share the map.
        ridges: penalties on the weights, in parts of the mean square of the window.

    Returns:
        A network per penalty.
    """
    gram = torch.zeros(history_length + 1, history_length + 1, dtype=torch.float64)
    moment = torch.zeros(history_length + 1, horizon, dtype=torch.float64)
    for batch in batches:
        valid = batch["valid"].cpu()
        windows = batch["history"].mT[valid].double().cpu()
        targets = batch["target"].mT[valid].double().cpu()
        windows = functional.pad(windows, (0, 1), value=1.0)
        gram += windows.T @ windows
        moment += windows.T @ targets
    weights = torch.ones(history_length + 1, dtype=torch.float64)
    weights[-1] = 0
    found = []
    for ridge in ridges:
        penalty = torch.diag(weights * ridge * gram.diagonal().mean())
        solution = torch.linalg.lstsq(gram + penalty, moment, driver="gelsd").solution
        network = DLinear(history_length, horizon, channels)
        for part in (network.seasonal, network.trend):
            part.weight.copy_(solution[:-1].T)
            part.bias.copy_(solution[-1] / 2)
        found.append(network)
    return found
