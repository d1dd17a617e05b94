"""What a meter is: a named source of cumulative energy or of power, with a plain statement of what it covers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Component = Literal["cpu", "gpu", "dram", "node", "other"]


class MeterError(ValueError):
    """A meter that was asked for cannot be read; the message says why and how to enable it."""


@dataclass(frozen=True)
class Availability:
    """Whether a meter can be read here, and if not why, with the remedy where there is one.

    Attributes:
        ok: It can be read.
        reason: Why not.
        present: It cannot be read, but the hardware is there: worth a warning, because somebody can mend it.
    """

    ok: bool
    reason: str = ""
    present: bool = False


@dataclass(frozen=True)
class Channel:
    """One number that a meter reads.

    Attributes:
        name: Unique in a run: ``cpu0``, ``dram0``, ``gpu3``, ``node``.
        component: What consumes the energy. A ``node`` channel covers everything in the machine: while it is valid it
            is the total, and the components are a breakdown of it.
        kind: ``counter``: cumulative energy in J. ``gauge``: power in W.
        measured: False for a model.
        source: For the reader: ``nvml (NVIDIA A100)``, ``model (2 x 270 W)``.
        modulus_j: Energy at which a counter starts again from zero; None: it never does.
        max_power_w: Power that the device cannot exceed; larger increments count as invalid. None: unknown.
        device: Identity of the device (UUID of a GPU), for the record.
        update_s: Longest time between two updates of a counter, s: so much later may energy show.
    """

    name: str
    component: Component
    kind: Literal["counter", "gauge"]
    measured: bool
    source: str
    modulus_j: float | None = None
    max_power_w: float | None = None
    device: str | None = None
    update_s: float = 0.2


@dataclass(frozen=True)
class Progress:
    """What the processes of a node have done in training.

    Attributes:
        samples: That went through.
        device_updates: Optimizer steps, counted on every device.
    """

    samples: int = 0
    device_updates: int = 0


class Meter(ABC):
    """Reads the channels of one kind of hardware.

    `probe` may be called at any time and leaves nothing open; `open` comes before `read`, and `close` after. One thread
    reads at a time. `read` must be quick (below a millisecond): a slow source polls in a thread of its own and returns
    the latest value (`meters.polled.Polled`).
    """

    @abstractmethod
    def probe(self) -> Availability:
        """Tell whether this meter can be read on this machine."""

    @abstractmethod
    def open(self) -> list[Channel]:
        """Open the source and describe its channels.

        Raises:
            MeterError: If the source cannot be read.
        """

    @abstractmethod
    def read(self) -> list[float]:
        """One value per channel, in the order of `open`; NaN where there is none at this moment."""

    def follow(self, progress: Callable[[], Progress]) -> None:
        """Take note of where the progress of the run can be asked for, before `open`; instruments do not care."""
        return

    def refresh(self) -> None:
        """Have the next `read` return values of this moment; a slow source may take its time. For the last reading."""
        return

    def close(self) -> None:
        """Release the source; twice without harm."""
        return
