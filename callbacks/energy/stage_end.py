"""StageEnd: tells the energy callback when all other callbacks are done with a stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
from typing_extensions import override

if TYPE_CHECKING:
    from callbacks.energy.callback import EnergyCallback


class StageEnd(pl.Callback):
    """Stands last among the callbacks of a Trainer and ends the stage of an `EnergyCallback`.

    What the others do in ``teardown`` (predictions are written there) belongs to the stage, wherever in the list the
    energy callback stands.
    """

    def __init__(self, energy: EnergyCallback) -> None:
        self.energy = energy

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.energy.end_stage(trainer)
