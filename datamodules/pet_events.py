"""Hits of a PET scanner in samples: the paper's toy, a Monte Carlo of physics, or files in list mode."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from datamodules.loading import make_loader, whole_batch
from datamodules.readers.list_mode import read_hits
from datamodules.readers.petsird_file import write_coincidences
from physics.pet.calibration import estimate_delays
from physics.pet.hits import NO_DECAY, Hits, true_pairs
from physics.pet.matching import Labels
from physics.pet.monte_carlo import Acquisition, DeadTime, cut, simulate
from physics.pet.scanner import Scanner, make_scanner
from physics.pet.sources import Shape, Source
from physics.pet.toy import Toy, draw_delays, simulate_toy

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

PARTS = ("train", "val", "test")
MANY_MULTIPLES = 0.5
"""Share of hits in windows with a third one above which a warning is due."""


class SampleSet(Dataset[dict[str, Tensor]]):
    """Samples with their hits and labels, a whole batch at a time; see `PETEvents` for the keys.

    Args:
        hits: Recorded hits.
        delays: Steps by crystal that are added for ``hit_aligned_step``.
        first_sample: Number of the first sample.
    """

    def __init__(self, hits: Hits, delays: np.ndarray, first_sample: int = 0) -> None:
        self.hits, self.delays, self.first_sample = hits, delays, first_sample
        bounds = np.arange(hits.num_samples + 1)
        self.hit_bounds = np.searchsorted(hits.sample, bounds)
        self.labels = labels_of(hits)
        self.label_bounds = np.searchsorted(self.labels.sample, bounds)

    def __len__(self) -> int:
        return self.hits.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sample as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Gather a whole batch."""
        chosen = np.asarray(indices, dtype=np.int64)
        item, row = _ranges(self.hit_bounds, chosen)
        label_item, label = _ranges(self.label_bounds, chosen)
        hits, labels = self.hits, self.labels
        batch = {
            "sample": chosen + self.first_sample,
            "hit_item": item,
            "hit_crystal": hits.crystal[row],
            "hit_step": hits.step[row],
            "hit_aligned_step": hits.step[row] + self.delays[hits.crystal[row]],
            "hit_energy_kev": hits.energy_kev[row].astype(np.float32),
            "hit_decay": hits.decay[row],
            "hit_scattered": hits.scattered[row],
            "hit_true_step": hits.true_step[row],
            "label_item": label_item,
            "label_a": labels.a[label],
            "label_b": labels.b[label],
            "label_step": labels.step[label],
        }
        return {key: torch.from_numpy(value) for key, value in batch.items()}


def _ranges(bounds: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place among the chosen samples, and row, of everything that they hold."""
    counts = bounds[chosen + 1] - bounds[chosen]
    item = np.repeat(np.arange(len(chosen)), counts)
    starts = np.cumsum(counts) - counts
    return item, np.arange(len(item)) - starts[item] + bounds[chosen][item]


def labels_of(hits: Hits) -> Labels:
    """True coincidences at the steps of their decays, by sample; none where a decay is outside of the sample."""
    first, second = true_pairs(hits)
    step = hits.true_step[first]
    inside = (step >= 0) & (step < hits.num_steps)
    first, second, step = first[inside], second[inside], step[inside]
    order = np.lexsort((step, hits.sample[first]))
    first, second = first[order], second[order]
    return Labels(hits.sample[first], hits.crystal[first], hits.crystal[second], step[order])


class PETEvents(LightningDataModule):
    """Samples of hits of a scanner, with the coincidences among them.

    A batch is a dictionary of a list of hits and a list of labels, N and M over its B samples:

    =================== ============ =============================================================================
    key                 shape        meaning
    =================== ============ =============================================================================
    sample              (B,) int64   number of the sample in its part
    hit_item            (N,) int64   place of the hit's sample in the batch
    hit_crystal         (N,) int64
    hit_step            (N,) int64   recorded time
    hit_aligned_step    (N,) int64   the same with the delay of the crystal added (``align``); may exceed T
    hit_energy_kev      (N,) float32
    hit_decay           (N,) int64   decay that made the hit, -1: none; truth, as the following
    hit_scattered       (N,) bool
    hit_true_step       (N,) int64   time of the decay
    label_item          (M,) int64   true coincidences: place of the sample, both crystals, step of the decay
    label_a, label_b    (M,) int64
    label_step          (M,) int64
    =================== ============ =============================================================================

    Args:
        scanner: Preset (`physics.pet.scanner.PRESETS`).
        scanner_changes: Values of the scanner to change, by name.
        kind: ``toy``: the paper's simulation; ``physics``: Monte Carlo; ``file``: hits of ``file``.
        num_train: Samples of the training part.
        num_val: Of the validation part.
        num_test: Of the test part.
        num_steps: Steps T of a sample.
        rate: Toy: decays of a sample, mean.
        efficiency: Toy: probability that a photon is detected.
        spread: Toy: crystals between the second photon and the opposite of the first, at most.
        mirrored: Toy: the mirror image in place of the opposite, as the reference code has it.
        delay_trials: Delays of crystals are binomial: trials ...
        delay_probability: ... and probability; also of the physics.
        activity_bq: Physics: decays per second.
        source: Physics: ``cylinder``, ``point``, ``line``, ``derenzo`` or ``hot_spheres``.
        source_radius_mm: Of the source.
        source_half_height_mm: Half of its length.
        object_radius_mm: Of the water around it.
        object_half_height_mm: Half of its length.
        max_scatters: Scatters of a photon in the object, at most; 0: none.
        half_life_s: Of the tracer; None: constant activity.
        positron_range_mm: Mean distance from decay to annihilation.
        acollinearity_degree: Width (FWHM) of the angle between photons.
        crystal_scatter: Share of Compton deposits whose rest stays in the next crystal.
        dead_time_ns: Of a crystal.
        dead_time: ``none``, ``paralysable`` or ``non_paralysable``.
        dark_rate_hz: Hits of a crystal per second without a decay.
        overlap: Physics: steps that a sample shares with the next one.
        file: Hits in list mode, ``.csv`` or ``.npz`` (`datamodules.readers.list_mode`), for ``kind=file``; the last
            ``num_test`` samples are the test part, those before the validation part, the others are for training.
        data_dir: Folder of ``file``.
        align: Delays that are taken off in ``hit_aligned_step``: ``estimated`` from the training part without labels,
            ``true``, or ``none``.
        calibration_gap: Largest difference of two hits behind an estimate, steps.
        calibration_spread: How far their crystals may be from facing each other.
        batch_size: Samples of a training step over all devices.
        eval_batch_size: Samples of an evaluation step over all devices.
        drop_last: Drop the incomplete last batch of a training epoch.
        num_workers: Loader processes.
        seed: Of everything drawn.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    batch_keys: ClassVar[tuple[str, ...]] = (
        "sample", "hit_item", "hit_crystal", "hit_step", "hit_aligned_step", "hit_energy_kev", "hit_decay",
        "hit_scattered", "hit_true_step", "label_item", "label_a", "label_b", "label_step",
    )  # fmt: skip

    def __init__(
        self,
        scanner: str = "clinical240",
        scanner_changes: Mapping[str, Any] | None = None,
        kind: Literal["toy", "physics", "file"] = "toy",
        num_train: int = 4000,
        num_val: int = 500,
        num_test: int = 1000,
        num_steps: int = 1000,
        rate: float = 20.0,
        efficiency: float = 0.141,
        spread: int = 2,
        mirrored: bool = False,
        delay_trials: int = 20,
        delay_probability: float = 0.5,
        activity_bq: float = 3e8,
        source: Shape = "cylinder",
        source_radius_mm: float = 16.0,
        source_half_height_mm: float = 15.0,
        object_radius_mm: float = 16.0,
        object_half_height_mm: float = 15.0,
        max_scatters: int = 1,
        half_life_s: float | None = None,
        positron_range_mm: float = 0.6,
        acollinearity_degree: float = 0.5,
        crystal_scatter: float = 0.0,
        dead_time_ns: float = 0.0,
        dead_time: DeadTime = "none",
        dark_rate_hz: float = 0.0,
        overlap: int = 0,
        file: str | None = None,
        data_dir: str | None = None,
        align: Literal["none", "estimated", "true"] = "estimated",
        calibration_gap: int = 20,
        calibration_spread: int = 2,
        batch_size: int = 64,
        eval_batch_size: int = 128,
        drop_last: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for key, value, known in (
            ("kind", kind, ("toy", "physics", "file")),
            ("align", align, ("none", "estimated", "true")),
        ):
            if value not in known:
                raise ValueError(f"data.{key}={value!r} is unknown; choose {', '.join(known)}")
        sizes = {"num_train": num_train, "num_val": num_val, "num_test": num_test, "num_steps": num_steps}
        for key, value in sizes.items():
            if value < 1:
                raise ValueError(f"data.{key}={value}: must be at least 1")
        if kind == "file" and file is None:
            raise ValueError("data.kind=file needs data.file, a .csv or .npz with hits")
        if kind == "file" and align == "true":
            raise ValueError("data.align=true: files do not say the delays of crystals; use estimated or none")
        if delay_trials >= num_steps:
            raise ValueError(f"data.delay_trials={delay_trials}: must be below data.num_steps={num_steps}")
        self.layout: Scanner = make_scanner(scanner, **dict(scanner_changes or {}))
        self.kind, self.num_steps, self.align = kind, num_steps, align
        self.sizes = dict(zip(PARTS, (num_train, num_val, num_test), strict=True))
        try:
            self.toy = Toy(num_steps, rate, efficiency, spread, delay_trials, delay_probability, mirrored)
            self.acquisition = Acquisition(
                activity_bq, Source(source, source_radius_mm, source_half_height_mm), object_radius_mm,
                object_half_height_mm, 0.0096, max_scatters, half_life_s, positron_range_mm, acollinearity_degree,
                crystal_scatter, False, dead_time_ns, dead_time, dark_rate_hz,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"data.{error}") from error
        self.overlap, self.calibration_gap, self.calibration_spread = overlap, calibration_gap, calibration_spread
        self.path = None if file is None else Path(data_dir or ".") / file
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.num_workers, self.seed = num_workers, seed
        self.true_delays: np.ndarray | None = None
        self.parts: dict[str, Hits] = {}
        self.lost_pairs = 0
        self.first_listed = 0  # what number the first sample of the test part has in the file

    # ---------------------------------------------------------------------------------------------------------- set-up

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.parts:
            return
        if self.kind == "file":
            self._read()
        else:
            self.true_delays = draw_delays(
                self.layout.num_crystals, self.toy.delay_trials, self.toy.delay_probability, self.seed
            )
            for number, (part, size) in enumerate(self.sizes.items()):
                self.parts[part] = self._simulated(size, (self.seed, number)).check()
        self.delays = self._delays()
        self._warn_of_multiples()

    def _simulated(self, samples: int, seed: tuple[int, int]) -> Hits:
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        if self.kind == "toy":
            return simulate_toy(self.layout, self.toy, samples, self.true_delays, seed)
        steps = samples * (self.num_steps - self.overlap) + self.overlap
        stream = simulate(self.layout, self.acquisition, steps * self.layout.time_step_ns, self.true_delays, seed)
        hits, lost = cut(stream, self.layout, self.num_steps, self.overlap)
        self.lost_pairs += lost
        if lost:
            log.info("%d true pairs lie across the border of two samples (data.overlap=%d)", lost, self.overlap)
        return hits

    def _read(self) -> None:
        hits = read_hits(self.path, num_crystals=self.layout.num_crystals, num_steps=self.num_steps)
        held = self.sizes["val"] + self.sizes["test"]
        if hits.num_samples <= held:
            raise ValueError(
                f"{self.path} has {hits.num_samples} samples; data.num_val and data.num_test take {held}, which leaves "
                "none for training"
            )
        ends = np.cumsum([hits.num_samples - held, self.sizes["val"], self.sizes["test"]])
        self.first_listed = int(ends[1])
        for part, first, stop in zip(PARTS, [0, *ends[:-1]], ends, strict=True):
            self.parts[part] = hits.samples(int(first), int(stop))

    def _delays(self) -> np.ndarray:
        """Steps by crystal that are taken off."""
        if self.align == "none":
            return np.zeros(self.layout.num_crystals, dtype=np.int64)
        if self.align == "true":
            return self.true_delays
        median = round(self.toy.delay_trials * self.toy.delay_probability) if self.kind != "file" else 0
        found = estimate_delays(
            self.parts["train"], self.layout, median_delay=median, max_gap=self.calibration_gap,
            spread=self.calibration_spread,
        )  # fmt: skip
        delays = np.rint(found).astype(np.int64)
        return delays - delays.min() if self.kind == "file" else delays  # no hit comes before the sample

    def _warn_of_multiples(self) -> None:
        """Say so where most hits have two others within a microscopic window: no sorter can do much there."""
        aligned = self.parts["train"].shifted(self.delays)
        line = aligned.sample * (4 * self.num_steps) + aligned.step
        near = np.searchsorted(line, line + 1, side="right") - np.searchsorted(line, line - 1)
        if len(line) and (near > 2).mean() > MANY_MULTIPLES:
            log.warning(
                "%.0f %% of the hits have two or more others within one step: the activity is too high for this clock",
                100 * (near > 2).mean(),
            )

    # ---------------------------------------------------------------------------------------------- what others know

    @property
    def num_crystals(self) -> int:
        """Channels of a network's input."""
        return self.layout.num_crystals

    def calibration_errors(self) -> np.ndarray | None:
        """Delays that are taken off less the true ones, steps, (crystal,); None where the true ones are not known."""
        return None if self.true_delays is None else self.delays - self.true_delays

    def prediction_table(self, outputs: Mapping[str, Tensor]) -> pd.DataFrame:
        """Coincidences of a predict step: sample, crystals, step, time in ns, score, and what the truth says.

        Samples of a file keep their numbers, others are counted from the first of the test part.
        """
        import pandas as pd

        rows = outputs["prediction"].double().numpy()
        table = pd.DataFrame(
            {
                "sample": rows[:, 0].astype(np.int64) + self.first_listed,
                "crystal_a": rows[:, 1].astype(np.int64),
                "crystal_b": rows[:, 2].astype(np.int64),
                "step": rows[:, 3].astype(np.int64),
                "time_ns": rows[:, 3] * self.layout.time_step_ns,
                "score": rows[:, 4],
            }
        )
        if (self.parts["test"].decay != NO_DECAY).any():
            table["same_decay"] = rows[:, 5].astype(bool)
        return table

    def write_petsird(self, table: pd.DataFrame, path: Path) -> None:
        """Store coincidences of `prediction_table` as PETSIRD, samples one after the other in time."""
        stride = (self.num_steps - self.overlap) * self.layout.time_step_ns
        time_ns = np.maximum(table["sample"].to_numpy() * stride + table["time_ns"].to_numpy(), 0.0)
        order = np.argsort(time_ns, kind="stable")
        a, b = (table[f"crystal_{end}"].to_numpy()[order] for end in "ab")
        write_coincidences(path, self.layout, a, b, time_ns[order])

    # -------------------------------------------------------------------------------------------------------- loaders

    def _loader(self, part: str, batch_size: int, **kwargs: Any) -> DataLoader:
        layout = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        data = SampleSet(self.parts[part], self.delays)
        return make_loader(
            data, batch_size, seed=self.seed, layout=layout, num_workers=self.num_workers, collate_fn=whole_batch,
            **kwargs,
        )  # fmt: skip

    @override
    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self.batch_size, shuffle=True, drop_last=self.drop_last)

    @override
    def val_dataloader(self) -> DataLoader:
        return self._loader("val", self.eval_batch_size)

    @override
    def test_dataloader(self) -> DataLoader:
        return self._loader("test", self.eval_batch_size)

    @override
    def predict_dataloader(self) -> DataLoader:
        return self._loader("test", self.eval_batch_size)
