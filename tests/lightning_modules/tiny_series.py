"""A small series of known numbers behind the contract of `SeriesDataModule`, and small networks for it."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from datamodules.loading import RankSampler, make_loader

DAY, WEEK = 4, 28  # one step = six hours


class Windows(Dataset):
    """One window per origin."""

    def __init__(self, data: TinySeries, origins: range, with_target: bool = True) -> None:
        self.data, self.origins, self.with_target = data, origins, with_target

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.data.window(self.origins[index], self.with_target)


class TinySeries(pl.LightningDataModule):
    """Daily and weekly cycle plus noise in two channels of different size, 30 % of the test windows with a gap.

    Args:
        num_days: Days of the series.
        horizon: T; 10 is two days and a half.
        batch_size: Windows per batch.
        gaps: Whether some windows of channel 1 are invalid.
        seed: Of the noise and of the order of the training windows.
    """

    batch_keys = ("history", "target", "valid", "forecast_profile", "target_day_type", "target_holiday", "origin")

    def __init__(
        self, num_days: int = 60, horizon: int = 10, batch_size: int = 4, gaps: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        self.num_days, self.horizon, self.batch_size, self.gaps, self.seed = num_days, horizon, batch_size, gaps, seed
        self.history_length = WEEK
        self.cycle_length, self.season_length = DAY, WEEK
        self.channel_names = ["north", "south"]
        self.unit = "MW"
        self.allow_zero_length_dataloader_with_multiple_devices = True  # one window to predict, two ranks

    def setup(self, stage: str | None = None) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        num_steps = self.num_days * DAY
        step = torch.arange(num_steps, dtype=torch.float64)
        # The first day is a Monday; day 44 is a holiday.
        self.timestamps = pd.date_range("2024-01-01", periods=num_steps, freq="6h")
        self.step = pd.Timedelta("6h")
        day = torch.arange(self.num_days + 14)
        self.holiday = day == 44
        self.day_type = torch.where(self.holiday | (day % 7 == 6), 2, (day % 7 == 5).long())
        level = torch.tensor([1.0, 0.8, 0.5], dtype=torch.float64)[self.day_type[: self.num_days]]
        shape = 1 - 0.4 * torch.cos(2 * torch.pi * (step % DAY) / DAY)
        clean = (level.repeat_interleave(DAY) * shape).unsqueeze(1)
        noise = 0.05 * torch.randn(num_steps, 2, generator=generator, dtype=torch.float64)
        self.values = (clean + noise) * torch.tensor([100.0, 5.0]) + torch.tensor([20.0, 1.0])
        train = self.values[: int(0.6 * self.num_days) * DAY]
        self.target_scale = (train.mean(0).float(), train.std(0).float())
        self.mase_scale = (train[WEEK:] - train[:-WEEK]).abs().mean(0).float()
        self.scaled = ((self.values - train.mean(0)) / train.std(0)).float()

    @property
    def num_channels(self) -> int:
        return 2

    def window(self, origin: int, with_target: bool) -> dict[str, Tensor]:
        ahead = torch.arange(origin, origin + self.horizon)
        past = torch.arange(origin - WEEK, origin)
        history = self.scaled[past]
        # Mean of the values of the last week with the same day type and step of the day.
        same = (self.day_type[past // DAY] == self.day_type[ahead // DAY, None]) & (past % DAY == ahead[:, None] % DAY)
        profile = same.float() @ history / same.sum(1, keepdim=True).clamp(min=1)
        out = {
            "history": history,
            "valid": torch.tensor([True, not (self.gaps and (origin // DAY) % 3 == 0)]),
            "forecast_profile": profile,
            "target_day_type": self.day_type[ahead // DAY].unsqueeze(1).expand(-1, 2),
            "target_holiday": self.holiday[ahead // DAY].unsqueeze(1).expand(-1, 2),
            "origin": torch.tensor(origin),
        }
        if with_target:
            out["target"] = self.scaled[origin : origin + self.horizon]
        return out

    def origins(self, part: str) -> range:
        bounds = {"train": (7, 35), "val": (36, 44), "test": (44, self.num_days - math.ceil(self.horizon / DAY) + 1)}
        first, last = bounds[part]
        return range(first * DAY, last * DAY, DAY)

    def _loader(self, part: str, **kwargs: Any) -> Any:
        layout = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return make_loader(Windows(self, self.origins(part)), self.batch_size, seed=self.seed, layout=layout, **kwargs)

    def train_dataloader(self) -> Any:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> Any:
        return self._loader("val")

    def test_dataloader(self) -> Any:
        return self._loader("test")

    def calibration_dataloader(self) -> Any:
        origins = [*self.origins("val"), *self.origins("test")]
        return DataLoader(Windows(self, origins), batch_size=self.batch_size)

    def predict_dataloader(self) -> Any:
        last = self.num_days * DAY
        data = Windows(self, range(last - DAY, last + 1, DAY), with_target=False)
        layout = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        return DataLoader(data, batch_size=self.batch_size, sampler=RankSampler(data, shuffle=False, **layout))

    def time_of(self, origin: int, num_steps: int) -> pd.DatetimeIndex:
        return pd.date_range(self.timestamps[0] + origin * self.step, periods=num_steps, freq=self.step)

    def prediction_table(self, outputs: dict[str, Tensor]) -> pd.DataFrame:
        point = outputs["prediction"]
        frames = []
        for i, origin in enumerate(outputs["origin"].tolist()):
            for c, name in enumerate(self.channel_names):
                columns = {
                    "series": name,
                    "origin": self.time_of(origin, 1)[0],
                    "timestamp": self.time_of(origin, self.horizon),
                    "forecast": point[i, :, c].numpy(),
                    "rhp": outputs["profile"][i, :, c].numpy(),
                }
                frames.append(pd.DataFrame(columns))
        return pd.concat(frames)


class LinearNet(nn.Module):
    """The profile plus a linear map of the history of each channel; quantiles as a spread around it."""

    def __init__(self, horizon: int = 10, quantiles: int = 0, zero: bool = False) -> None:
        super().__init__()
        self.map = nn.Linear(WEEK, horizon * max(quantiles, 1))
        self.quantiles = quantiles
        if zero:
            nn.init.zeros_(self.map.weight)
            nn.init.zeros_(self.map.bias)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        out = self.map(batch["history"].mT)
        profile = batch["forecast_profile"]
        if not self.quantiles:
            return profile + out.mT
        return profile.unsqueeze(-1) + out.unflatten(-1, (-1, self.quantiles)).transpose(1, 2)


class ProfileNet(nn.Module):
    """The profile, nothing to learn."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["forecast_profile"]


class ConstantNet(nn.Module):
    """The profile plus one value everywhere, which may be NaN."""

    def __init__(self, value: float, windows_from: int = 0) -> None:
        super().__init__()
        self.value, self.windows_from = value, windows_from
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        off = torch.where(batch["origin"] >= self.windows_from, self.value, 0.0)
        return batch["forecast_profile"] + off[:, None, None] + 0 * self.unused


def quiet_trainer(**kwargs: Any) -> pl.Trainer:
    """A trainer that leaves nothing behind, on one thread: tiny tensors on several wait more than they compute."""
    torch.set_num_threads(1)
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**(settings | kwargs))
