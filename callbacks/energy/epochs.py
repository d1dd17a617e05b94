"""What every epoch of a run has used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from callbacks.energy.accounting import Tally
from callbacks.energy.summary import J_PER_KWH, TRAIN, VALIDATION


class EpochBook:
    """The epochs of a run: of this machine while they go on, of all machines once `add` was told about the others.

    Attributes:
        epochs: One mapping per epoch, its validation and its checkpoints included: number, kWh (whole, training,
            validation, since the beginning of the run), seconds, mean power, J per sample, and what `note` has added.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self._number: int | None = None
        self._before: Mapping[str, Tally] = {}
        self._samples = 0
        self._summed = 0

    def begin(self, number: int, tallies: Mapping[str, Tally], samples: int) -> None:
        """Begin an epoch.

        Args:
            number: Of the epoch.
            tallies: What the machine has used before, by label.
            samples: That this process has trained on before.
        """
        self._number, self._before, self._samples = number, tallies, samples

    @property
    def running(self) -> bool:
        """Whether an epoch has begun and not ended."""
        return self._number is not None

    def end(
        self, tallies: Mapping[str, Tally], samples: int, shares: int, machines: int, earlier_j: float
    ) -> dict[str, Any]:
        """What the epoch has used on this machine.

        Args:
            tallies: What the machine has used by now, by label.
            samples: That this process has trained on by now.
            shares: Ranks with different samples, all of them.
            machines: Their number; the ranks of each do equal shares of the work.
            earlier_j: Energy of earlier parts of a resumed run, of all machines, J; rank 0 knows it.
        """
        used: dict[str, Tally] = {}
        for label, tally in tallies.items():
            used[label] = tally.minus(self._before.get(label, Tally()))
        whole = Tally()
        for tally in used.values():
            whole.add(tally)
        own_samples = (samples - self._samples) * shares / machines
        epoch = {
            "epoch": self._number,
            "it_kwh": whole.total_j / J_PER_KWH,
            "train_kwh": used.get(TRAIN, Tally()).total_j / J_PER_KWH,
            "val_kwh": used.get(VALIDATION, Tally()).total_j / J_PER_KWH,
            "duration_s": whole.seconds,
            "mean_w": whole.total_j / whole.seconds if whole.seconds else 0.0,
            "j_per_sample": whole.total_j / own_samples if own_samples else 0.0,
            "cumulative_kwh": (earlier_j + math.fsum(tally.total_j for tally in tallies.values())) / J_PER_KWH,
        }
        self._number = None
        return epoch

    def note(self, epoch: Mapping[str, Any]) -> None:
        """Keep an epoch that has ended."""
        self.epochs.append(dict(epoch))

    def add(self, others: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Add what the other machines have used in each epoch, a sequence for every machine."""
        for epochs in others:
            theirs = {epoch["epoch"]: epoch for epoch in epochs}
            for epoch in self.epochs[self._summed :]:
                if (other := theirs.get(epoch["epoch"])) is not None:
                    for key in ("it_kwh", "train_kwh", "val_kwh", "mean_w", "cumulative_kwh"):
                        epoch[key] += other[key]
                    epoch["j_per_sample"] = (epoch["j_per_sample"] + other["j_per_sample"]) / 2
        self._summed = len(self.epochs)
