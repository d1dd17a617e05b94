"""Weeks of load to forecast the next week from, whatever their source: parts, scaling, samples (energy study, 2.2)."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from datamodules.gaps import fill_gaps
from datamodules.loading import WholeBatches, make_loader, whole_batch
from datamodules.readers.time_axis import RegularSeries

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Part = Literal["train", "val", "test"]
PredictPart = Literal["train", "val", "test", "next"]


class LoadWindows(WholeBatches):
    """Windows of all series, one after the other; the batch dictionary is that of `LoadWeeks`.

    Args:
        values: ``(series, time)`` float64, the data's units, NaN where missing.
        series: ``(window,)`` int64, series of each window.
        origins: ``(window,)`` int64, first forecast step of each window.
        length: Steps of the history, and of the forecast.
        location: ``(series,)`` float64, data's units = scaled * scale + location.
        scale: ``(series,)`` float64.
        seasonal_mean: ``(series, length)`` float64 in the data's units, by the step modulo ``length``; None leaves it
            out of the batch.
        with_target: False for origins whose future is not known.
        repeat: How often the windows are gone through.
    """

    def __init__(
        self,
        values: Tensor,
        series: Tensor,
        origins: Tensor,
        length: int,
        location: Tensor,
        scale: Tensor,
        seasonal_mean: Tensor | None = None,
        *,
        with_target: bool = True,
        repeat: int = 1,
    ) -> None:
        self.values, self.series, self.origins, self.length = values.contiguous(), series, origins, length
        self.location, self.scale, self.seasonal_mean = location, scale, seasonal_mean
        self.with_target, self.repeat = with_target, repeat

    def __len__(self) -> int:
        return len(self.origins) * self.repeat

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Gather a whole batch."""
        index = torch.as_tensor(indices)
        window = index % len(self.origins)
        series, origin = self.series[window], self.origins[window]
        location, scale = self.location[series], self.scale[series]
        steps = (2 if self.with_target else 1) * self.length
        start = series * self.values.shape[1] + origin - self.length
        runs = self.values.as_strided((self.values.numel() - steps + 1, steps), (1, 1)).index_select(0, start)
        scaled = ((runs - location[:, None]) / scale[:, None]).float().unsqueeze(2)
        batch = {
            "history": scaled[:, : self.length],
            "location": location.float(),
            "scale": scale.float(),
            "series": series,
            "origin": origin,
            "index": index,
        }
        if self.with_target:
            batch["target"] = scaled[:, self.length :]
        if self.seasonal_mean is not None:
            phase = (origin[:, None] + torch.arange(self.length)) % self.length
            mean = (self.seasonal_mean[series[:, None], phase] - location[:, None]) / scale[:, None]
            batch["seasonal_mean"] = mean.float().unsqueeze(2)
        return batch


class LoadWeeks(LightningDataModule):
    """Everything behind the source of the loads: parts, scaling, windows, loaders, tables.

    Subclasses say where the loads come from (`read`, `name`). A sample is two weeks of one series, the second of which
    is to be forecast; samples begin at every step (``origin_stride``) and lie wholly in their part. A batch is a
    dictionary; L = ``window_length``:

    ===================== ================== ====================================================================
    key                   shape              meaning
    ===================== ================== ====================================================================
    history               (B, L, 1)          float32, the week before the origin; 0 and 1 are the smallest and the
                                             largest value of the series in the training part
    target                (B, L, 1)          the week from the origin on, scaled alike (not beyond the data)
    location              (B,)               float32, unit of the data: value = scaled * scale + location
    scale                 (B,)               float32, unit of the data
    series                (B,) int64         number of the series in `channel_names`
    origin                (B,) int64         index of the first forecast step on `timestamps`
    index                 (B,) int64         number of the sample in its part; repetitions count on
    seasonal_mean         (B, L, 1)          validation and test: mean of the training part at the same step of the week
    ===================== ================== ====================================================================

    The scaling is part of the checkpoint: a run on other data with the same series keeps that of the training.

    The arguments are those of `datamodules.electric_load.ElectricLoadDataModule`.

    Attributes:
        timestamps: Time of every step.
        report: What was read, filled and left out.
    """

    batch_keys: ClassVar[tuple[str, ...]] = (
        "history",
        "target",
        "location",
        "scale",
        "series",
        "origin",
        "index",
        "seasonal_mean",
    )

    def __init__(
        self,
        *,
        window_length: int,
        origin_stride: int,
        splits: Sequence[float],
        max_gap: int | None,
        max_steps: int | None,
        legacy: bool,
        predict_part: PredictPart,
        repeat: int,
        unit: str,
        batch_size: int,
        eval_batch_size: int,
        drop_last: bool,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        # One window per series may be less than one per process.
        self.allow_zero_length_dataloader_with_multiple_devices = predict_part == "next"
        self.window_length, self.origin_stride, self.splits = window_length, origin_stride, list(splits)
        self.max_gap, self.max_steps, self.legacy = max_gap, max_steps, legacy
        self.predict_part, self.repeat, self.unit = predict_part, repeat, unit
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.num_workers, self.seed = num_workers, seed
        self.report: dict[str, Any] = {}
        self._values: Tensor | None = None
        self._stored: dict[str, Any] | None = None  # the scaling of a checkpoint
        self._check_arguments()

    @property
    @abstractmethod
    def name(self) -> str:
        """What error messages call the source."""

    @abstractmethod
    def read(self) -> tuple[RegularSeries, list[str]]:
        """Return the series, ``(time, series)``, and their names."""

    def _check_arguments(self) -> None:
        for key in ("window_length", "origin_stride", "repeat", "batch_size", "eval_batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key}={getattr(self, key)}: must be at least 1")
        for key in ("max_gap", "max_steps", "num_workers"):
            if (value := getattr(self, key)) is not None and value < 0:
                raise ValueError(f"data.{key}={value}: must not be negative")
        if self.predict_part not in get_args(PredictPart):
            known = ", ".join(get_args(PredictPart))
            raise ValueError(f"data.predict_part={self.predict_part!r} is unknown; use one of {known}")
        if len(self.splits) != 3 or min(self.splits) < 0 or self.splits[0] <= 0:
            raise ValueError(f"data.splits={self.splits} must be three numbers: training, validation, test")
        if max(self.splits) <= 1 and sum(self.splits) > 1 + 1e-9:
            raise ValueError(f"data.splits={self.splits} add up to more than 1: use fractions such as 0.6, 0.2, 0.2")
        if max(self.splits) > 1 and any(part != int(part) for part in self.splits):
            raise ValueError(f"data.splits={self.splits} must be fractions up to 1 or whole numbers of steps")

    # -------------------------------------------------------------------------------------------------- preparation

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read and prepare once; later calls (test after fit) return at once."""
        if self._values is not None:
            return
        series, self._names = self.read()
        import pandas as pd

        if series.step * self.window_length != pd.Timedelta(days=7):
            fitting = pd.Timedelta(days=7) / series.step
            remedy = f"data.window_length={fitting:.0f}, or " if fitting == int(fitting) else ""
            raise ValueError(
                f"{self.name}: the steps are {series.step} apart, so data.window_length={self.window_length} steps "
                f"are {series.step * self.window_length} instead of one week; set {remedy}data.resample to "
                f"{pd.Timedelta(days=7) / self.window_length}"
            )
        values = series.values[: self.max_steps].copy()
        self.timestamps, self.step = series.timestamps[: len(values)], series.step
        self.report = {"source": self.name, **series.counts, "missing": int(np.isnan(values).sum())}
        self.report["filled"] = int(fill_gaps(values, self.max_gap or 0, 1).sum())
        self._values = torch.from_numpy(np.ascontiguousarray(values.T))
        self._bounds = self._part_bounds(len(values))
        self._ranges = {part: self._range(*bounds) for part, bounds in self._bounds.items()}
        self._location, self._scale = self._ranges["train"]
        self._seasonal_mean, self._mase_scale = self._weekly_statistics()
        self._windows = {part: self._find_windows(*self._bounds[part]) for part in get_args(Part)}
        self.report["windows"] = {part: len(origins) for part, (_, origins) in self._windows.items()}
        if not self.report["windows"]["train"]:
            raise ValueError(f"{self.name}: every training window touches a gap; raise data.max_gap or fill the gaps")
        if self._stored is not None:
            self._adopt(self._stored)
        log.info(
            "%s: %d series, %d steps from %s to %s; windows %s",
            self.name, len(self._names), len(values), self.timestamps[0], self.timestamps[-1], self.report["windows"],
        )  # fmt: skip
        if missing := self.report["missing"]:
            log.info("%s: %d values are missing, %d of them were filled", self.name, missing, self.report["filled"])

    def _part_bounds(self, num_steps: int) -> dict[str, tuple[int, int]]:
        """Return the steps [start, stop) of each part."""
        sums = [0, self.splits[0], sum(self.splits[:2]), sum(self.splits)]
        cuts = [int(part * num_steps + 1e-9) if max(self.splits) <= 1 else int(part) for part in sums]
        needed = 2 * self.window_length
        short = [
            part
            for part, split, (start, stop) in zip(get_args(Part), self.splits, pairwise(cuts), strict=True)
            if split and stop - start < needed
        ]
        if cuts[-1] > num_steps or short:
            what = f"the {short[0]} part is shorter than two weeks" if short else f"they need {cuts[-1]} steps"
            raise ValueError(
                f"{self.name}: data.splits={self.splits} do not fit the {num_steps} steps of the data: {what} "
                f"({needed} steps); give longer files or change data.splits"
            )
        return dict(zip(get_args(Part), pairwise(cuts), strict=True))

    def _range(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Smallest value and extent of each series in [start, stop), ``(series,)`` float64 each."""
        part = self._values[:, start:stop]
        if part.shape[1] == 0:
            return torch.zeros(len(part), dtype=torch.float64), torch.ones(len(part), dtype=torch.float64)
        missing = part.isnan()
        if (empty := missing.all(1)).any():
            name = self._names[int(empty.int().argmax())]
            raise ValueError(
                f"{self.name}, series {name!r}: no value from {self.timestamps[start]} to {self.timestamps[stop - 1]}; "
                "leave the series out (data.targets) or change data.splits"
            )
        low = part.masked_fill(missing, torch.inf).amin(1)
        extent = part.masked_fill(missing, -torch.inf).amax(1) - low
        return low, torch.where(extent > 1e-10 * low.abs(), extent, torch.ones_like(extent))

    def _weekly_statistics(self) -> tuple[Tensor, Tensor]:
        """Of the training part: mean by step of the week ``(series, L)``, mean change within a week ``(series,)``."""
        stop, length = self._bounds["train"][1], self.window_length
        weeks = torch.full((len(self._values), -(-stop // length) * length), torch.nan, dtype=torch.float64)
        weeks[:, :stop] = self._values[:, :stop]
        mean = weeks.view(len(weeks), -1, length).nanmean(1)
        overall = self._values[:, :stop].nanmean(1, keepdim=True)
        change = (self._values[:, length:stop] - self._values[:, : stop - length]).abs().nanmean(1)
        return torch.where(mean.isnan(), overall, mean), change

    def _find_windows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """List (series, origin) of the complete windows of a part, series by series."""
        length = self.window_length
        last = stop - length - (1 if self.legacy else 0)  # the published code leaves out the last window
        origins = torch.arange(start + length, max(last + 1, start + length), self.origin_stride)
        missing = torch.zeros(len(self._values), self._values.shape[1] + 1, dtype=torch.int64)
        missing[:, 1:] = self._values.isnan().cumsum(1)
        complete = missing[:, origins + length] == missing[:, origins - length]
        series, position = complete.nonzero(as_tuple=True)
        return series, origins[position]

    # ------------------------------------------------------------------------------------------- scaling, checkpoint

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._values is None:
            return {}
        return {"series": self._names, "location": self._location, "scale": self._scale}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stored = state_dict
        if self._values is not None:
            self._adopt(state_dict)

    def _adopt(self, stored: dict[str, Any]) -> None:
        """Scale like the run that wrote the checkpoint did."""
        if list(stored["series"]) == self._names:
            self._location, self._scale = stored["location"], stored["scale"]
        else:
            rank_zero_warn(
                "data: the checkpoint was trained on other series; these are scaled by their own training part"
            )

    def _constants(self, part: Part) -> tuple[Tensor, Tensor]:
        return self._ranges[part] if self.legacy else (self._location, self._scale)

    # ------------------------------------------------------------------------------------------------------ loaders

    def _loader(self, data: LoadWindows, batch_size: int, **options: Any) -> DataLoader:
        return make_loader(
            data,
            batch_size,
            seed=self.seed,
            layout=None if self.trainer is None else self.trainer.distributed_sampler_kwargs,
            num_workers=self.num_workers,
            collate_fn=whole_batch,
            **options,
        )

    def windows(self, part: PredictPart, *, with_seasonal_mean: bool = False, repeat: int = 1) -> LoadWindows:
        """The samples of a part; ``next``: of every series the week after the last step."""
        assert self._values is not None, "setup() comes first"
        if part == "next":
            end = self._values.shape[1]
            complete = ~self._values[:, end - self.window_length :].isnan().any(1)
            series = complete.nonzero()[:, 0]
            found = series, torch.full_like(series, end)
        else:
            found = self._windows[part]
        if len(found[0]) == 0:
            raise ValueError(f"{self.name}: the {part} part has no complete window; change data.splits or data.max_gap")
        return LoadWindows(
            self._values,
            *found,
            self.window_length,
            *self._constants("test" if part == "next" else part),
            self._seasonal_mean if with_seasonal_mean else None,
            with_target=part != "next",
            repeat=repeat,
        )

    @override
    def train_dataloader(self) -> DataLoader:
        return self._loader(self.windows("train"), self.batch_size, shuffle=True, drop_last=self.drop_last)

    @override
    def val_dataloader(self) -> DataLoader:
        return self._loader(self.windows("val", with_seasonal_mean=True), self.eval_batch_size)

    @override
    def test_dataloader(self) -> DataLoader:
        return self._loader(self.windows("test", with_seasonal_mean=True), self.eval_batch_size)

    @override
    def predict_dataloader(self) -> DataLoader:
        """Give the samples of ``predict_part``, ``repeat`` times."""
        return self._loader(self.windows(self.predict_part, repeat=self.repeat), self.eval_batch_size)

    # ------------------------------------------------------------------------------------------- what modules know

    @property
    def channel_names(self) -> list[str]:
        """Names of the series."""
        return list(self._names)

    @property
    def input_shape(self) -> tuple[int, int]:
        """Time, channel."""
        return self.window_length, 1

    @property
    def target_scale(self) -> tuple[Tensor, Tensor]:
        """Location and scale ``(series,)`` each: physical = scaled * scale + location."""
        return self._location.float(), self._scale.float()

    @property
    def mase_scale(self) -> Tensor:
        """``(series,)`` mean absolute error of repeating the last week in the training part, data's units."""
        return self._mase_scale.float()

    def prediction_table(self, outputs: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        """Tabulate predict outputs, one row per forecast; repetitions of a sample are left out.

        Args:
            outputs: Outputs of a predict step in the data's units, or a list of them: ``prediction`` (batch, time, 1),
                ``series`` (batch,), ``origin`` (batch,), ``index`` (batch,).

        Returns:
            Columns series, origin (time of the first forecast step) and step_1 to step_L.
        """
        import pandas as pd

        frames = [self._table_of_batch(batch) for batch in ([outputs] if isinstance(outputs, Mapping) else outputs)]
        return pd.concat(frames, ignore_index=True)

    def _table_of_batch(self, outputs: Mapping[str, Any]) -> pd.DataFrame:
        import pandas as pd

        first = outputs["index"].cpu() < len(self.windows(self.predict_part))
        steps = [f"step_{i}" for i in range(1, self.window_length + 1)]
        table = pd.DataFrame(outputs["prediction"].detach().cpu()[first].squeeze(2).float().numpy(), columns=steps)
        origin = outputs["origin"].cpu()[first].numpy()
        table.insert(0, "origin", self.timestamps[0] + self.step * origin)
        table.insert(0, "series", [self._names[i] for i in outputs["series"].cpu()[first].tolist()])
        return table
