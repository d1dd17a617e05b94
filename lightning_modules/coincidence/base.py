"""What modules that find coincidences share: hits of a batch, scores of lists, sorters on the same samples."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_modules.coincidence.sorters import SORTERS, Sorter, counts_by_sample, tuned
from lightning_modules.metrics.coincidence import PairScores, SpikeScores
from lightning_modules.metrics.forecast import SumRatio
from lightning_modules.supervised import Supervised
from physics.pet.hits import Hits, Pairs, true_pairs
from physics.pet.matching import Labels, Spikes, count_pairs, count_spikes
from physics.pet.scanner import Scanner

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
TUNING_HITS = 200_000
"""Hits of the validation part that settings of sorters are chosen on, at most."""
ANGLES = (0.0, 40.0, 70.0, 90.0, 110.0, 120.0, 130.0, 140.0, 150.0, 155.0, 160.0, 165.0, 170.0)


LISTED_VALUES = ("f1", "precision", "recall")
OWN_VALUES = (
    *LISTED_VALUES, "f1_low", "f1_high", "randoms_fraction", "scatter_fraction", "multiples_fraction", "hit_precision",
    "hit_recall", "hit_f1", "pair_precision", "pair_recall", "pair_f1", "time_error_steps",
)  # fmt: skip
"""What is logged of a row of the table: of the other methods, of the module itself. Speeds are in the table alone."""


class Found(NamedTuple):
    """What a module finds in a batch.

    Args:
        hits: Hits that ``pairs`` are rows of.
        pairs: Coincidences.
        step: Time of every coincidence, steps.
        score: How sure they are.
        spikes: Output spikes of a network that has some.
        loss: Of the batch.
        operations: Synaptic operations of the batch, where they are counted.
        activity: Spikes of a neuron in a sample, mean over the neurons of all layers.
    """

    hits: Hits
    pairs: Pairs
    step: np.ndarray
    score: np.ndarray
    spikes: Spikes | None
    loss: Tensor
    operations: float | None = None
    activity: float | None = None


class CoincidenceModule(Supervised):
    """Base of modules whose batches are those of `datamodules.pet_events.PETEvents`.

    Steps of validation, test and predict return ``loss``; ``prediction``, coincidences (P, 6): sample, crystals a and
    b, step, score, whether the truth is one decay; ``target``, labels (M, 4): sample, a, b, step; ``hits`` (N, 4):
    sample, crystal, step, decay; ``spikes`` (K, 3): sample, crystal, step of the output. A test also returns
    ``methods``, (row, 3), at the first step: row of `results_table`, hits, seconds, for four sizes of the batch.

    A test ends with a table: this module and the classical sorters of ``baselines``, whose windows and angles are
    chosen on the validation part, on the same samples (`results_table`); the same numbers are logged as
    ``test/<method>_<value>``, those of the module as ``test/<value>``.

    Args:
        net: The network.
        optimizer: Partial that takes the parameters.
        scheduler: Partial that takes the optimizer.
        scheduler_monitor: Metric for schedulers that watch one.
        scheduler_interval: ``epoch`` or ``step``.
        baselines: Of `lightning_modules.coincidence.sorters.SORTERS`.
        windows: Windows that sorters may have, steps.
        aligned: Whether the network sees times without delays (``data.align``), or recorded ones.
        tolerance: Steps between an output spike and its label in ``pair_f1`` and ``hit_f1``.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    batch_keys: ClassVar[tuple[str, ...]] = (
        "sample", "hit_item", "hit_crystal", "hit_step", "hit_aligned_step", "hit_energy_kev", "hit_decay",
        "hit_scattered", "hit_true_step", "label_item", "label_a", "label_b", "label_step",
    )  # fmt: skip
    method: ClassVar[str] = "network"

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None,
        scheduler: Callable[..., Any] | None,
        scheduler_monitor: str,
        scheduler_interval: Literal["epoch", "step"],
        baselines: Sequence[str],
        windows: Sequence[int],
        aligned: bool,
        tolerance: int,
    ) -> None:
        super().__init__(net, optimizer, scheduler, scheduler_monitor, scheduler_interval)
        for name in baselines:
            if name not in SORTERS:
                raise ValueError(f"model.baselines names {name!r}, which is unknown; choose {', '.join(SORTERS)}")
        if not windows or min(windows) < 0:
            raise ValueError(f"model.windows={list(windows)}: give windows of at least 0 steps")
        if tolerance < 0:
            raise ValueError(f"model.tolerance={tolerance}: must be at least 0 steps")
        self.baselines, self.windows = tuple(baselines), tuple(windows)
        self.aligned, self.tolerance = aligned, tolerance
        self.val_loss, self.test_loss = SumRatio(), SumRatio()
        self.val_pairs = PairScores()
        self.val_spikes = SpikeScores()
        self.test_pairs = nn.ModuleDict({name: PairScores() for name in (self.method, *self.companions(), *baselines)})
        self.test_spikes = nn.ModuleDict({name: SpikeScores() for name in self.test_pairs})
        self.operations = nn.ModuleDict({stage: SumRatio() for stage in ("val", "test")})
        self.activity = nn.ModuleDict({stage: SumRatio() for stage in ("val", "test")})
        self.sorters: list[Sorter] = []

    # ------------------------------------------------------------------------------------------------------- to define

    @abstractmethod
    def find(self, batch: Batch, hits: Hits) -> Found:
        """Coincidences of a batch; ``hits`` are those that the module may see, as ``aligned`` says."""

    def companions(self) -> dict[str, Callable[[Batch, Hits], Found]]:
        """Further methods for the table of a test, by name; they see times without delays."""
        return {}

    # --------------------------------------------------------------------------------------------------- what is known

    @property
    def scanner(self) -> Scanner:
        """The scanner of the DataModule."""
        return self.trainer.datamodule.layout

    def hits_of(self, batch: Batch, aligned: bool) -> Hits:
        """The hits of a batch on the CPU, in the order of sample (place in the batch) and time."""
        source = self.trainer.datamodule
        values = {key: value.cpu().numpy() for key, value in batch.items() if key.startswith("hit_")}
        return Hits(
            sample=values["hit_item"],
            crystal=values["hit_crystal"],
            step=values["hit_aligned_step" if aligned else "hit_step"],
            decay=values["hit_decay"],
            true_step=values["hit_true_step"],
            energy_kev=values["hit_energy_kev"],
            scattered=values["hit_scattered"],
            num_samples=len(batch["sample"]),
            num_crystals=source.num_crystals,
            num_steps=source.num_steps,
        ).sorted()

    @staticmethod
    def labels_of(batch: Batch) -> Labels:
        """The labels of a batch on the CPU."""
        return Labels(*(batch[f"label_{name}"].cpu().numpy() for name in ("item", "a", "b", "step")))

    # ------------------------------------------------------------------------------------------------------------ steps

    @override
    def setup(self, stage: str) -> None:
        channels, crystals = getattr(self.net, "num_crystals", None), self.trainer.datamodule.num_crystals
        if channels not in (None, crystals):
            raise ValueError(
                f"model.net has {channels} crystals, the data have {crystals}: give both the same scanner "
                "(model.net.scanner, data.scanner), and no other number of crystals in data.scanner_changes"
            )
        own, layout = getattr(self.net, "layout", None), self.trainer.datamodule.layout
        shapes = [(s.crystals_per_ring, s.num_rings) for s in (own or layout, layout)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "model.net has rings of {} crystals times {}, the data have {} times {}: leave crystals_per_ring and "
                "num_rings out of data.scanner_changes".format(*shapes[0], *shapes[1])
            )

    @override
    def on_fit_start(self) -> None:
        if not len(true_pairs(self.trainer.datamodule.parts["train"]).first):
            raise ValueError(
                "the training part has no coincidence to learn from: hits of data.file need the column decay, a "
                "simulation more samples (data.num_train) or decays (data.activity_bq, data.rate); a trained network "
                "lists unlabelled hits with train=false test=false ckpt_path=<checkpoint>"
            )

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        found = self.find(batch, self.hits_of(batch, self.aligned))
        size = len(batch["sample"])
        self.val_loss.update(found.loss * size, size)
        self._score(self.val_pairs, found, 1.0)
        if found.spikes is not None:
            self.val_spikes.update(count_spikes(found.spikes, self.labels_of(batch), self.tolerance))
        self._count_costs("val", found)
        return self._outputs(batch, found)

    @override
    def on_validation_epoch_end(self) -> None:
        values = {"loss": self.val_loss.compute()}
        pairs = self.val_pairs.compute()
        values |= {name: pairs[name] for name in ("precision", "recall", "f1")}
        if self.val_spikes.sums.any():
            values |= self.val_spikes.compute()
        values |= self._costs("val")
        self._log_exact({f"val/{name}": value for name, value in values.items()}, prog_bar=True)
        for metric in (self.val_loss, self.val_pairs, self.val_spikes, self.operations["val"], self.activity["val"]):
            metric.reset()

    @override
    def on_test_start(self) -> None:
        source = self.trainer.datamodule
        if not len(true_pairs(source.parts["val"]).first):
            log.warning("no known coincidence in the validation part: settings of sorters are not chosen")
        if not len(true_pairs(source.parts["test"]).first):
            log.warning("no known coincidence in the test part: F1 is 0, whatever is found")
        raw = source.parts["val"]
        raw = raw.samples(0, int(raw.sample[min(len(raw), TUNING_HITS) - 1]) + 1) if len(raw) else raw
        aligned = raw.shifted(source.delays)
        self.sorters = [tuned(name, raw, aligned, self.scanner, self.windows, ANGLES) for name in self.baselines]

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        labels = self.labels_of(batch)
        raw, aligned = self.hits_of(batch, False), self.hits_of(batch, True)
        seen = aligned if self.aligned else raw
        if batch_idx == 0:  # what is compiled at the first call is no part of a speed
            self.find(batch, seen)
            for find in self.companions().values():
                find(batch, aligned)
        found, seconds = self._timed(lambda: self.find(batch, seen))
        size = len(batch["sample"])
        self.test_loss.update(found.loss * size, size)
        self._compare(self.method, found, seconds, labels)
        self._count_costs("test", found)
        for name, find in self.companions().items():
            self._compare(name, *self._timed(lambda find=find: find(batch, aligned)), labels)
        for sorter in self.sorters:
            hits = aligned if sorter.calibrated else raw
            pairs, seconds = self._timed(lambda sorter=sorter, hits=hits: sorter.find(hits, self.scanner))
            step = hits.step[pairs.second]
            spikes = Spikes(np.tile(hits.sample[pairs.first], 2), hits.crystal[np.concatenate(pairs)], np.tile(step, 2))
            result = Found(hits, pairs, step, np.ones(len(step)), spikes, found.loss)
            self._compare(sorter.name, result, seconds, labels)
        outputs = self._outputs(batch, found)
        outputs["methods"] = self._speeds(batch) if batch_idx == 0 else torch.empty(0, 3, dtype=torch.float64)
        return outputs

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._outputs(batch, self.find(batch, self.hits_of(batch, self.aligned)))

    @override
    def on_test_epoch_end(self) -> None:
        self._log_exact({"test/loss": self.test_loss.compute()})
        for row in self.results_table():
            own = row["method"] == self.method
            prefix, kept = ("", OWN_VALUES) if own else (f"{row['method']}_", LISTED_VALUES)
            values = {name: row[name] for name in kept if name in row}
            self._log_exact({f"test/{prefix}{name}": value for name, value in values.items()})
        self._log_exact({f"test/{name}": value for name, value in self._costs("test").items()})

    def results_table(self) -> list[dict[str, Any]]:
        """A row for every method, this module's first: ``method``, settings, and what the metrics compute."""
        settings = {sorter.name: sorter for sorter in self.sorters}
        rows = []
        for name, metric in self.test_pairs.items():
            row: dict[str, Any] = {"method": name}
            if name in settings:
                row |= {"window": settings[name].window, "angle_degree": settings[name].min_angle_degree}
            row |= _computed(metric)
            if self.test_spikes[name].sums.any():
                row |= _computed(self.test_spikes[name])
            rows.append(row)
        return rows

    # ------------------------------------------------------------------------------------------------------------ parts

    def _timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """A result, and its seconds: of the CPU, or of the wall where a GPU computes."""
        cuda = self.device.type == "cuda"
        clock = time.perf_counter if cuda else time.process_time
        begin = clock()
        result = call()
        if cuda:
            torch.cuda.synchronize()
        return result, clock() - begin

    def _compare(self, name: str, found: Found, seconds: float, labels: Labels) -> None:
        self._score(self.test_pairs[name], found, seconds)
        if found.spikes is not None:
            self.test_spikes[name].update(count_spikes(found.spikes, labels, self.tolerance))

    @staticmethod
    def _score(metric: PairScores, found: Found, seconds: float) -> None:
        true = true_pairs(found.hits)
        counts = count_pairs(found.hits, found.pairs, len(true.first))._asdict()
        by_sample = torch.from_numpy(counts_by_sample(found.hits, found.pairs, true))
        metric.update(counts | {"hits": len(found.hits), "seconds": max(seconds, 1e-9)}, by_sample)

    def _count_costs(self, stage: str, found: Found) -> None:
        if found.operations is not None:
            self.operations[stage].update(torch.tensor(found.operations), len(found.hits))
        if found.activity is not None:
            samples = found.hits.num_samples
            self.activity[stage].update(torch.tensor(found.activity * samples), samples)

    def _costs(self, stage: str) -> dict[str, Tensor]:
        """Synaptic operations of a hit, and spikes of a neuron in a sample, as far as they were counted."""
        costs = {"operations_per_hit": self.operations[stage], "spikes_per_neuron": self.activity[stage]}
        return {name: metric.compute() for name, metric in costs.items() if metric.denominator}

    def _speeds(self, batch: Batch) -> Tensor:
        """Hits and seconds of every method at an eighth, a quarter, half and all of the samples of a batch."""
        calls: list[tuple[Callable[[Batch, Hits], Any], bool]] = [(self.find, self.aligned)]
        calls += [(find, True) for find in self.companions().values()]
        rows = []
        for share in (8, 4, 2, 1):
            size = max(1, len(batch["sample"]) // share)
            part = {key: value[:size] for key, value in batch.items() if key == "sample"}
            for kind in ("hit", "label"):
                keep = batch[f"{kind}_item"] < size
                part |= {key: value[keep] for key, value in batch.items() if key.startswith(kind)}
            raw, aligned = self.hits_of(part, False), self.hits_of(part, True)
            for number, (call, with_delays_off) in enumerate(calls):
                hits = aligned if with_delays_off else raw
                _, seconds = self._timed(lambda call=call, part=part, hits=hits: call(part, hits))
                rows.append((number, len(raw), seconds))
            for number, sorter in enumerate(self.sorters, start=len(calls)):
                hits = aligned if sorter.calibrated else raw
                _, seconds = self._timed(lambda sorter=sorter, hits=hits: sorter.find(hits, self.scanner))
                rows.append((number, len(raw), seconds))
        return torch.tensor(rows, dtype=torch.float64)

    def _outputs(self, batch: Batch, found: Found) -> dict[str, Tensor]:
        number = batch["sample"].cpu().numpy()
        hits, pairs = found.hits, found.pairs
        same = (hits.decay[pairs.first] == hits.decay[pairs.second]) & (hits.decay[pairs.first] >= 0)
        labels = self.labels_of(batch)
        spikes = found.spikes or Spikes(*(np.empty(0, dtype=np.int64) for _ in range(3)))
        columns = {
            "prediction": (
                number[hits.sample[pairs.first]], hits.crystal[pairs.first], hits.crystal[pairs.second], found.step,
                found.score, same,
            ),
            "target": (number[labels.sample], labels.a, labels.b, labels.step),
            "hits": (number[hits.sample], hits.crystal, hits.step, hits.decay),
            "spikes": (number[spikes.sample], spikes.crystal, spikes.step),
        }  # fmt: skip
        out = {name: torch.from_numpy(np.stack([np.asarray(v, float) for v in c], -1)) for name, c in columns.items()}
        return {"loss": found.loss.detach()} | out


def _computed(metric: Metric) -> dict[str, Tensor]:
    return {name: value.float() for name, value in metric.compute().items()}
