"""TrainingEvaluation: scores of the whole training set after every epoch, as a stage of energy of its own."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from callbacks.energy.callback import EnergyCallback

STAGE = "fit/train_eval"


class TrainingEvaluation(pl.Callback):
    """Evaluates the training images with the weights of the epoch's end, and logs ``train_eval/loss``, ``accuracy`` ...

    The authors of the scaling study did so after every epoch, inside of what they measured: about a third more compute
    (docs/experiments/energy_scaling.md). Here its energy and samples are in the stage ``fit/train_eval``, so that both
    views are there. The images are those of ``data.train_eval_dataloader()``, prepared as for validation: without
    augmentation, unless ``data.legacy_eval`` is set. Training goes on as it would without: no random number is drawn.

    Raises:
        ValueError: If the module or the data cannot do it; before training.
    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = getattr(trainer, "datamodule", None)
        for owner, name, group in ((pl_module, "scores", "model"), (data, "train_eval_dataloader", "data")):
            if not hasattr(owner, name):
                raise ValueError(
                    f"callbacks.training_evaluation evaluates classes of images, but {group}={type(owner).__name__} "
                    f"has no {name}; leave the callback out (~callbacks.training_evaluation)"
                )

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        energy = next((c for c in trainer.callbacks if isinstance(c, EnergyCallback)), None)
        if energy is None:
            found = self._evaluate(trainer, pl_module, None)
        else:
            with energy.stage(STAGE):
                found = self._evaluate(trainer, pl_module, energy)
        for name, value in found.items():  # equal on all ranks
            pl_module.log(f"train_eval/{name}", value, batch_size=1, sync_dist=True, rank_zero_only=True)

    @staticmethod
    def _evaluate(
        trainer: pl.Trainer, pl_module: pl.LightningModule, energy: EnergyCallback | None
    ) -> dict[str, torch.Tensor]:
        modes = [(module, module.training) for module in pl_module.modules()]
        pl_module.eval()
        trainer.validating = True  # the data prepare their batches as for validation
        try:
            pl_module.on_validation_epoch_start()
            with torch.no_grad(), trainer.precision_plugin.val_step_context(), isolate_rng():
                for number, batch in enumerate(trainer.datamodule.train_eval_dataloader()):
                    batch = trainer.precision_plugin.convert_input(batch)
                    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                    pl_module.validation_step(batch, number)
                    if energy is not None:
                        energy.count(batch)
            return pl_module.scores("val")  # synchronised
        finally:
            trainer.training = True
            for module, mode in modes:
                module.training = mode
