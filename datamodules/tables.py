"""Rows of numbers with values to predict: text files, or run times of a GPU kernel from a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from datamodules.loading import WholeBatches, make_loader, whole_batch
from datamodules.readers.number_table import read_number_table
from datamodules.synthetic_gemm import synthetic_gemm

Part = Literal["train", "val", "test"]
Reader = Literal["csv", "gemm"]


class Tables(LightningDataModule):
    """Rows of numbers, features and targets standardised with the mean and standard deviation of the training rows.

    A batch is a dictionary: ``features`` (B, F) and ``target`` (B, C) float32, ``index`` (B,) int64, the number of the
    row in its part.

    Rows are shuffled once (``split_seed``); the first ``test_fraction`` are for the test, the next for validation.

    Args:
        reader: ``csv``: text files with a line of names, commas or semicolons between values. ``gemm``: run times of
            matrix products for 14 tuning parameters, from a model (`datamodules.synthetic_gemm`).
        file: Of ``csv``, below ``data_dir``: one, or several with the same columns.
        data_dir: Folder of the files.
        source: Where the data can be obtained; shown when they are missing.
        target: Of ``csv``: columns to predict.
        file_column: Of ``csv``: name of a further feature, the number of the file; None: there is none.
        num_rows: Of ``gemm``; None: all 966,400.
        noise: Of ``gemm``: standard deviation of the logarithm of a time.
        log_target: Whether the logarithm of the targets is predicted.
        num_features: F: checked against the data.
        num_targets: C: checked against the data.
        test_fraction: Part of the rows for the test.
        val_fraction: Part of the rows for validation.
        split_seed: Of what belongs to which part, and of ``gemm``.
        predict_part: Part that prediction goes through.
        batch_size: Rows per training step over all devices.
        eval_batch_size: Rows per evaluation step over all devices.
        drop_last: Drop the incomplete last batch of a training epoch.
        num_workers: Loader processes.
        pin_memory: Page-locked batches, for GPUs.
        seed: Of the order of the training rows.

    Raises:
        ValueError: Names the argument and the remedy.
        FileNotFoundError: Names the file, the folder, and where the data can be obtained.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("features", "target", "index")
    input_files: ClassVar[tuple[str, ...]] = ("file",)  # runner/check.py looks for them

    def __init__(
        self,
        reader: Reader = "gemm",
        file: str | Sequence[str] | None = None,
        data_dir: str = "data",
        source: str | None = None,
        target: Sequence[str] | None = None,
        file_column: str | None = None,
        num_rows: int | None = 12_000,
        noise: float = 0.01,
        log_target: bool = False,
        num_features: int = 14,
        num_targets: int = 1,
        test_fraction: float = 0.2,
        val_fraction: float = 0.1,
        split_seed: int = 1,
        predict_part: Part = "test",
        batch_size: int = 50,
        eval_batch_size: int = 1000,
        drop_last: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value, kind in (("reader", reader, Reader), ("predict_part", predict_part, Part)):
            if value not in get_args(kind):
                raise ValueError(f"data.{key}={value!r} is unknown; choose one of {', '.join(get_args(kind))}")
        self.files = [] if file is None else [file] if isinstance(file, str) else list(file)
        if (reader == "csv") != bool(self.files):
            raise ValueError(f"data.file={self.files or None}: data.reader=csv needs at least one, gemm has none")
        if reader == "csv" and not target:
            raise ValueError("data.target: name the columns to predict")
        if not 0 < test_fraction < 1 or not 0 <= val_fraction < 1 - test_fraction:
            raise ValueError(
                f"data.test_fraction={test_fraction}, data.val_fraction={val_fraction}: must not be negative, some "
                "rows are for the test, and some must be left to train on"
            )
        if noise < 0:
            raise ValueError(f"data.noise={noise}: must not be negative")
        for key, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size < 1:
                raise ValueError(f"data.{key}={size}: must be at least 1")
        self.reader, self.data_dir, self.source = reader, Path(data_dir), source
        self.target, self.file_column = list(target or ()), file_column
        self.num_rows, self.noise, self.log_target = num_rows, noise, log_target
        self.num_features, self.num_targets = num_features, num_targets
        self.test_fraction, self.val_fraction, self.split_seed = test_fraction, val_fraction, split_seed
        self.predict_part, self.batch_size, self.eval_batch_size = predict_part, batch_size, eval_batch_size
        self.drop_last, self.num_workers, self.pin_memory, self.seed = drop_last, num_workers, pin_memory, seed
        self._parts: dict[str, tuple[Tensor, Tensor]] | None = None  # features and targets as they are, float64
        self._statistics: dict[str, Tensor] = {}

    # ----------------------------------------------------------------------------------------------------------- rows

    @override
    def prepare_data(self) -> None:
        """Report missing files."""
        for file in self.files:
            if not (self.data_dir / file).is_file():
                obtain = f" It can be obtained from: {self.source}" if self.source else ""
                raise FileNotFoundError(
                    f"no file {self.data_dir / file} (data.data_dir={self.data_dir}, data.file={file}): set "
                    f"data.data_dir to the folder that holds it.{obtain}"
                )

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        if self.reader == "gemm":
            x, y = synthetic_gemm(self.num_rows, self.noise, self.split_seed)
        else:
            self.prepare_data()
            paths = [self.data_dir / file for file in self.files]
            x, y, _ = read_number_table(paths, self.target, self.file_column)
        for key, wanted, found in (("num_features", self.num_features, x), ("num_targets", self.num_targets, y)):
            if found.shape[1] != wanted:
                raise ValueError(f"data.{key}={wanted}, but the data have {found.shape[1]}: set it to that")
        if self.log_target:
            if not (y > 0).all():
                raise ValueError("data.log_target=true: some targets are not positive; set it to false")
            y = np.log(y)
        return x, y

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._parts is not None:
            return
        x, y = (torch.from_numpy(column) for column in self._read())
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.split_seed))
        tests, vals = round(self.test_fraction * len(x)), round(self.val_fraction * len(x))
        places = {"test": order[:tests], "val": order[tests : tests + vals], "train": order[tests + vals :]}
        if not len(places["train"]) or not tests:
            raise ValueError(f"data.test_fraction={self.test_fraction}: {len(x)} rows are too few to divide")
        if not self._statistics:
            for name, values in (("features", x), ("target", y)):
                train = values[places["train"]]
                deviation = train.std(0, unbiased=False)
                self._statistics[f"{name}_mean"] = train.mean(0)
                # A feature with one value everywhere says nothing, and stays 0.
                self._statistics[f"{name}_std"] = torch.where(deviation > 0, deviation, 1.0)
        self._parts = {part: (x[rows], y[rows]) for part, rows in places.items()}

    def _standardised(self, name: str, values: Tensor) -> Tensor:
        return ((values - self._statistics[f"{name}_mean"]) / self._statistics[f"{name}_std"]).float()

    def in_units(self, values: Tensor) -> Tensor:
        """Standardised targets ``(B, C)`` in the units of the data."""
        std, mean = (self._statistics[f"target_{name}"].to(values) for name in ("std", "mean"))
        values = values * std + mean
        return values.exp() if self.log_target else values

    @override
    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._statistics)

    @override
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Standardise as the run did that wrote the checkpoint."""
        self._statistics = dict(state_dict)

    # -------------------------------------------------------------------------------------------------------- loaders

    def _loader(self, part: Part, batch_size: int, **options: bool) -> DataLoader:
        assert self._parts is not None, "call setup() first"
        features, target = self._parts[part]
        return make_loader(
            Rows(self._standardised("features", features), self._standardised("target", target)),
            batch_size,
            seed=self.seed,
            layout=None if self.trainer is None else self.trainer.distributed_sampler_kwargs,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            collate_fn=whole_batch,
            **options,
        )

    @override
    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self.batch_size, shuffle=True, drop_last=self.drop_last)

    @override
    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Give the validation rows; none without a ``val_fraction``."""
        assert self._parts is not None, "call setup() first"
        return self._loader("val", self.eval_batch_size) if len(self._parts["val"][0]) else []

    @override
    def test_dataloader(self) -> DataLoader:
        return self._loader("test", self.eval_batch_size)

    @override
    def predict_dataloader(self) -> DataLoader:
        return self._loader(self.predict_part, self.eval_batch_size)


class Rows(WholeBatches):
    """Rows of a part, handed out as whole batches."""

    def __init__(self, features: Tensor, target: Tensor) -> None:
        self.features, self.target = features, target

    def __len__(self) -> int:
        return len(self.features)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Gather a whole batch."""
        index = torch.as_tensor(indices)
        return {"features": self.features[index], "target": self.target[index], "index": index}
