"""Pruning of forecasters: dense training, densities one after the other, fine-tuning of each, in one `fit`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from callbacks.low_rank import draw
from callbacks.pruning_batches import squared_error, training_batches, validation_loss
from callbacks.pruning_network import NetworkSlot, state_of
from callbacks.pruning_origin import about, config_of, find_dense, refuse_other_sizes
from callbacks.pruning_settings import KEY, Rewind, Schedule, Segment, check, densities_of, naming_the_callback, plan_of
from callbacks.pruning_table import Table, measure, publish
from callbacks.replaced_weights import refuse_replaced_weights
from callbacks.segments import (
    begin_stopping_anew,
    refuse_early_stopping_behind,
    refuse_stopping_after_validation,
    scale_rates,
    stopped_early,
)
from networks.pruning.budget import Budget
from networks.pruning.groups import Allocation, Granularity
from networks.pruning.pruner import DensityOf, Pruner
from networks.pruning.unstructured import Scope, cubic_density
from networks.pruning.variants import Variant, cut, load_variant
from networks.pruning.weights import apply_masks, enforce, mask_gradients, masks_in

log = logging.getLogger(__name__)

# Two runs with other values of these are not the same study.
_IDENTITY = ("method", "scope", "schedule", "rewind", "densities", "finetune_epochs", "include_complex", "budget")


class Pruning(pl.Callback):
    """Train dense, prune to one density after the other, fine-tune each, and compare all of them in the test.

    The fit has segments. ``dense`` is the ordinary training (``trainer.max_epochs``, with its early stopping). Then,
    with ``finetune_epochs``, the dense network goes on as long as the pruned ones will (``control``: what extra epochs
    alone bring), and every density below 1 is pruned and trained with its masks. Each segment begins with a new
    optimizer and schedule and ends with the weights of its best validation loss, those that it began with among them.
    Networks are files in ``dirpath``: ``dense``, ``control``, ``l1_0.512`` (not trained since), ``l1_0.512_tuned``.

    At the end the *deployed* network is put into the module and its checkpoint: the sparsest one whose validation loss
    is within ``deploy_tolerance`` of the dense one's, else the pruned one with the lowest. ``test`` measures all
    networks (`callbacks.pruning_table`) and writes them as one table; ``predict`` forecasts with the deployed one.

    Masks of single weights are buffers: what is masked gets no gradient and is set to zero after every step.
    ``structured`` makes the network of a segment a smaller one. A stopped run goes on exactly where it was.

    Args:
        method: Which single weights stay: those of the highest ``l1`` (magnitude), ``taylor`` (weight times gradient),
            ``wanda`` (weight times norm of its inputs), or ``random`` ones; ``lottery``: magnitude, iterative, rewound
            to ``rewind`` (init where none is chosen). ``structured``: whole channels, by magnitude.
        sparsity: Part that goes, in [0, 1), one number or a list; null: ``densities``.
        densities: Parts that stay, in (0, 1]; null: 0.8^n for n = 0 to 9.
        scope: Of single weights: ``global`` over all tensors, per ``layer``, per ``row``, or ``2:4``.
        schedule: ``one_shot``: every density from the dense network. ``iterative``: from the network of the density
            before. ``cubic``: single weights go in the course of the fine-tuning, rho + (1 - rho)(1 - t)^3.
        finetune_epochs: At most so many epochs of each segment after the dense one; 0: none.
        finetune_lr: Learning rate of these segments as a part of the dense training's.
        rewind: Weights with which a pruned network begins: its own (``none``), or those of the start of the dense
            training (``init``) or after its first epoch (``early``).
        control: Whether the dense network is trained on for as long; all densities together if ``iterative``.
        include_complex: Whether complex kernels (FEDformer) are pruned too.
        density_of: What a density is a part of: ``prunable`` weights, as in the paper, or the whole ``model``.
        exclude_output: Whether layers with one output, or one per series, stay dense.
        granularity: Channels that ``structured`` removes: ``ff``, ``qk``, ``v``, ``heads``, ``stream``.
        allocation: ``uniform``: the same part of every group. ``global``: the least important of all groups together.
        budget: What a density of ``structured`` is a part of: ``channels``, ``parameters``, ``macs`` or measured
            ``latency``.
        dense: Where the dense network comes from: null, training; the path of a ``dense.pt`` or of a run that has one;
            ``sweep``, an earlier job of the same sweep that trained it, else training.
        score_batches: Training batches for ``taylor`` and ``wanda``.
        deploy_tolerance: See above.
        seed: Of ``random``.
        dirpath: Folder of the networks.
        table_dir: Folder of the table; null: the folder above ``dirpath``.
        latency_batches: Batch sizes of which the latency is measured.
        latency_repeats: Interleaved repeats of each measurement.
        energy_s: Seconds of forecasts per network while the energy callback's meters run; 0: none.
        quantize: Whether size and error of every network with 8-bit weights are columns too.
        sparse_execution: Whether the latency of masked networks with sparse matrix products is a column.
        references: Whether repeat-last-day and DLinear are rows.
        figures: Functions of `callbacks.figures.pruning` that draw the table.
        figures_dir: Their folder; null: no figures.

    Raises:
        ValueError: Names the argument, also for a checkpoint of another study.
    """

    def __init__(
        self,
        method: str = "l1",
        sparsity: float | Sequence[float] | None = None,
        densities: Sequence[float] | None = None,
        scope: Scope = "global",
        schedule: Schedule = "one_shot",
        finetune_epochs: int = 0,
        finetune_lr: float = 1.0,
        rewind: Rewind = "none",
        control: bool = True,
        include_complex: bool = False,
        density_of: DensityOf = "prunable",
        exclude_output: bool = True,
        granularity: Sequence[Granularity] = ("ff", "qk", "v", "stream"),
        allocation: Allocation = "uniform",
        budget: Budget = "parameters",
        dense: str | None = None,
        score_batches: int = 8,
        deploy_tolerance: float = 0.05,
        seed: int = 0,
        dirpath: str = "pruned",
        table_dir: str | None = None,
        latency_batches: Sequence[int] = (1, 8, 64),
        latency_repeats: int = 5,
        energy_s: float = 0.5,
        quantize: bool = True,
        sparse_execution: bool = True,
        references: bool = True,
        figures: Sequence[str] = ("error_against_density", "error_against_cost", "layer_densities", "parameters"),
        figures_dir: str | None = None,
    ) -> None:
        options = {"granularity": list(granularity), "allocation": allocation, "budget": budget, "seed": seed}
        options |= {"density_of": density_of, "exclude_output": exclude_output, "include_complex": include_complex}
        with naming_the_callback():
            self.pruner = Pruner(method, scope, **options)
        self.densities = densities_of(sparsity, densities)
        self.method, self.scope, self.schedule, self.rewind = method, scope, schedule, rewind
        self.finetune_epochs, self.finetune_lr, self.control = finetune_epochs, finetune_lr, control
        self.dense, self.score_batches, self.deploy_tolerance = dense, score_batches, deploy_tolerance
        self.include_complex, self.budget, self.dirpath = include_complex, budget, Path(dirpath)
        self.table_dir = self.dirpath.parent if table_dir is None else Path(table_dir)
        self.latency_batches, self.latency_repeats = list(latency_batches), latency_repeats
        self.energy_s, self.quantize, self.sparse_execution = energy_s, quantize, sparse_execution
        self.references, self.figures, self.figures_dir = references, tuple(figures), figures_dir
        check(self)
        if method == "lottery":
            self.schedule, self.rewind = "iterative", "init" if rewind == "none" else rewind
        self.plan: list[Segment] = []
        self.number, self.begin = 0, 0  # running segment, epoch in which it began
        self._ended = self._over = False
        self._best: dict[str, Any] = {"loss": None, "state": None, "epoch": 0}
        self._points: dict[str, dict[str, Tensor]] = {}  # weights of the start (init) and after an epoch (early)
        self._kept: dict[str, Variant] = {}  # dense, and what the next segment of an iterative schedule begins with
        self.slot = NetworkSlot()  # the network in the module
        self._losses: dict[str, float] = {}  # best validation losses by name
        self._deployed: str | None = None
        self._steps = 0  # of the running segment
        self.table: Table | None = None

    # ------------------------------------------------------------------------------------------------------ preparation

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            raise ValueError(
                f"{KEY} runs in one process: set trainer.devices=1; a sweep (-m) does its jobs side by side elsewhere"
            )
        if not hasattr(pl_module, "net"):
            raise ValueError(f"{KEY}: {type(pl_module).__name__} has no network in an attribute 'net' to prune")
        self.slot.attach(pl_module)
        self.pruner = replace(self.pruner, channels=len(trainer.datamodule.channel_names))
        with naming_the_callback():
            self.pruner.check(self.slot.full)
        self._warn_of_uncovered()
        if str(getattr(stage, "value", stage)) != "fit":
            return
        refuse_replaced_weights(trainer, "pruning")
        refuse_early_stopping_behind(trainer, self, KEY)
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            raise ValueError(f"{KEY}: trainer.max_epochs={trainer.max_epochs} is the dense training; give a number")
        self.plan = plan_of(self, trainer.max_epochs)
        self._set_length(trainer)

    def _set_length(self, trainer: pl.Trainer) -> None:
        if not trainer.fast_dev_run:
            trainer.fit_loop.max_epochs = sum(segment.epochs for segment in self.plan)

    def _warn_of_uncovered(self) -> None:
        """Say so where complex kernels stay whole: a density then tells little of the model."""
        if (share := self.pruner.uncovered(self.slot.full)) is not None:
            rank_zero_warn(
                f"{KEY}.include_complex=false leaves {share:.1%} of the parameters uncovered, most of them complex "
                "kernels: a density is that of the rest; the table has the density of the model beside it"
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.slot.detach()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    # --------------------------------------------------------------------------------------------------------- segments

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_stopping_after_validation(trainer, KEY)
        if "init" in self._points:  # a checkpoint was loaded
            return
        self._points["init"] = state_of(pl_module.net)
        if (found := find_dense(self.dense, self.dirpath, config_of(trainer), KEY)) is not None:
            self._take_dense(trainer, pl_module, found)

    def _take_dense(self, trainer: pl.Trainer, pl_module: pl.LightningModule, variant: Variant) -> None:
        refuse_other_sizes(variant, pl_module.net, self.dense, KEY)
        pl_module.net.load_state_dict(variant.state)
        self._points |= {"early": variant.about["early"]} if variant.about.get("early") else {}
        self._points["init"] = variant.about.get("init", self._points["init"])
        self._keep(trainer, variant)
        self.plan = [segment for segment in self.plan if segment.kind != "dense"]
        self._set_length(trainer)
        log.info("the dense network is that of %s", variant.about.get("run_dir"))
        if self.plan:
            self._start(trainer, pl_module)
        else:
            self._finish_study(trainer, pl_module)
            self._over = True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._over:
            trainer.should_stop = True

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._ended and not self._over:
            self.number, self.begin, self._ended = self.number + 1, trainer.current_epoch, False
            self._start(trainer, pl_module)

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a segment after the dense one: prune, rewind, new optimizers."""
        segment = self.plan[self.number]
        self._best, self._steps = {"loss": None, "state": None, "epoch": 0}, 0
        if segment.kind == "control":
            self.slot.put(pl_module, self._before("control"))
        else:
            pruned = self._prune(trainer, pl_module, segment.density)
            self._keep(trainer, pruned)
            if self.schedule == "cubic":
                self.slot.put(pl_module, self._kept["dense"])
                weights = self.pruner.weights(pl_module.net)
                apply_masks(weights, {weight.name: torch.ones_like(weight.mask) for weight in weights})
            else:
                self.slot.put(pl_module, pruned)
            self._rewind(pl_module)
        if segment.kind == "control" or self.schedule != "cubic":
            self._best |= {"loss": validation_loss(trainer, pl_module), "state": state_of(pl_module.net)}
        trainer.strategy.setup_optimizers(trainer)
        scale_rates(trainer, self.finetune_lr)
        begin_stopping_anew(trainer)
        log.info("%s: density %.3g, at most %d epochs", segment.kind, segment.density, segment.epochs)

    def _rewind(self, pl_module: pl.LightningModule) -> None:
        """Let what is left begin with earlier weights."""
        if self.rewind == "none":
            return
        point = self._points.get(self.rewind)
        if point is None:
            raise ValueError(f"{KEY}.rewind={self.rewind!r}: the dense network was not trained here; choose init")
        self.slot.rewind(pl_module, point)
        if not self.pruner.structured:
            enforce(self.pruner.weights(pl_module.net))

    # ---------------------------------------------------------------------------------------------------------- pruning

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rho: float) -> Variant:
        """The network of a density, not trained since; the module holds some network afterwards."""
        source = self._before("tuned")
        self.slot.put(pl_module, source)
        if self.pruner.structured:
            batch = next(training_batches(trainer, pl_module, 1))
            keep = self.pruner.keep(pl_module.net, rho / source.density, batch)
            small = cut(pl_module.net, [keep] if keep else [])
            cuts = [*source.cuts, *([keep] if keep else [])]
            return Variant("pruned", rho, self.method, state_of(small), cuts, about(self, trainer))
        self._mask(trainer, pl_module, rho)
        return Variant("pruned", rho, self.method, state_of(pl_module.net), [], about(self, trainer))

    def _before(self, stage: str) -> Variant:
        last = self._kept.get("last") if self.schedule == "iterative" else None
        return self._kept["dense"] if last is None or last.stage != stage else last

    def _mask(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rho: float) -> None:
        """Mask the network in the module."""
        batches = functools.partial(training_batches, trainer, pl_module, self.score_batches)
        with naming_the_callback():
            masks = self.pruner.masks(pl_module.net, rho, batches, squared_error(pl_module))
        apply_masks(self.pruner.weights(pl_module.net), masks)

    def _keep(self, trainer: pl.Trainer, variant: Variant) -> None:
        if variant.stage != "pruned":
            self._kept["dense" if variant.stage == "dense" else "last"] = variant
        if trainer.is_global_zero and not trainer.fast_dev_run:
            variant.save(self.dirpath)

    # ------------------------------------------------------------------------------------------------- within a segment

    @property
    def _masked(self) -> bool:
        return bool(self.plan) and self.plan[self.number].kind == "tuned" and not self.pruner.structured

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self._masked:
            mask_gradients(self.pruner.weights(pl_module.net))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._masked:
            return
        self._steps += 1
        if self.schedule == "cubic":
            batches = max(1, trainer.num_training_batches)
            last = batches * max(1, self.plan[self.number].epochs - 1)  # one epoch is left to recover in
            if self._steps % max(1, last // 20) == 0 and self._steps <= last:
                rho = cubic_density(self.plan[self.number].density, self._steps / last)
                self._mask(trainer, pl_module, rho)
        enforce(self.pruner.weights(pl_module.net))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Checkpoint callbacks come after this one: what they save knows that the segment is over.
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        loss = trainer.callback_metrics.get("val/loss")
        gradual = self.schedule == "cubic" and self._masked
        final = not gradual or self.pruner.reached(pl_module.net, self.plan[self.number].density)
        if loss is not None and final and (self._best["loss"] is None or float(loss) < self._best["loss"]):
            epoch = trainer.current_epoch + 1 - self.begin
            self._best = {"loss": float(loss), "state": state_of(pl_module.net), "epoch": epoch}
        if trainer.is_last_batch:
            self._end_of_epoch(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0 and self.plan[self.number].kind == "dense" and self.rewind == "early":
            self._points["early"] = state_of(pl_module.net)
        self._end_of_epoch(trainer, pl_module)

    def _end_of_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._ended:
            return
        segment, epochs = self.plan[self.number], trainer.current_epoch + 1 - self.begin
        if epochs < segment.epochs and not stopped_early(trainer):
            return
        self._ended = True
        self._end_segment(trainer, pl_module, epochs)
        self._over = self.number + 1 >= len(self.plan)
        trainer.should_stop = self._over

    def _end_segment(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epochs: int) -> None:
        segment, loss = self.plan[self.number], self._best["loss"]
        state = state_of(pl_module.net) if self._best["state"] is None else self._best["state"]
        known = about(self, trainer) | {"epochs": epochs, "best_epoch": self._best["epoch"], "val_loss": loss}
        if segment.kind == "dense":
            known |= {"init": self._points["init"], "early": self._points.get("early")}
        method = self.method if segment.kind == "tuned" else "none"
        variant = Variant(segment.kind, segment.density, method, state, list(self.slot.cuts), known)
        self._keep(trainer, variant)
        if loss is not None:
            self._losses[variant.name] = loss
            for logger in trainer.loggers:
                logger.log_metrics({"pruning/density": segment.density, "pruning/best": loss}, trainer.global_step)

    # ---------------------------------------------------------------------------------------------------------- the end

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._over and self._deployed is None:
            self._finish_study(trainer, pl_module)

    def _finish_study(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Networks that are not trained after their pruning; then the deployed one into module and checkpoint."""
        if not self.finetune_epochs:
            for rho in self.densities:
                if rho < 1:
                    self._keep(trainer, self._prune(trainer, pl_module, rho))
        deployed = self._choose(trainer, pl_module)
        self._deployed = deployed.name
        self.slot.put(pl_module, deployed)
        path = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if path and Path(path).is_file() and not trainer.fast_dev_run:
            trainer.save_checkpoint(path)
        log.info("deployed: %s", deployed.name)

    def _choose(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Variant:
        """The sparsest network that is about as good as the dense one, by the validation loss."""
        stage = "tuned" if self.finetune_epochs else "pruned"
        names = [Variant(stage, rho, self.method, {}).name for rho in self.densities if rho < 1]
        if not names or trainer.fast_dev_run:
            return self._kept["dense"]
        found = {name: load_variant(self.dirpath / f"{name}.pt") for name in names}
        losses = {name: self._losses.get(name) for name in names}
        if any(loss is None for loss in losses.values()) or "dense" not in self._losses:
            # Networks without an epoch of their own: the validation loss of a dense network is known only here.
            losses = {name: self._loss(trainer, pl_module, variant) for name, variant in found.items()}
            self._losses["dense"] = self._loss(trainer, pl_module, self._kept["dense"])
        self._losses |= losses
        good = [n for n in names if losses[n] <= (1 + self.deploy_tolerance) * self._losses["dense"]]
        return found[min(good, key=lambda n: found[n].density) if good else min(losses, key=losses.__getitem__)]

    def _loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule, variant: Variant) -> float:
        self.slot.put(pl_module, variant)
        return validation_loss(trainer, pl_module)

    # ------------------------------------------------------------------------------------------------------------- test

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning tests in inference mode, whose tensors nothing could be loaded into afterwards.
        with torch.inference_mode(False), torch.no_grad():
            own = Variant("dense", 1.0, "none", state_of(pl_module.net), list(self.slot.cuts))
            training = pl_module.training
            try:
                self.table = measure(self, trainer, pl_module, self._found(trainer, pl_module))
            finally:
                self.slot.put(pl_module, own)
                pl_module.train(training)
        for name, value in self.table.metrics().items():
            pl_module.log(name, value, batch_size=1, sync_dist=True, rank_zero_only=True)

    def _found(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Variant]:
        """All networks of the study in order: of this run or an earlier one, else one-shot prunings of the weights."""
        if (self.dirpath / "dense.pt").is_file():
            pruned = [Variant("pruned", rho, self.method, {}).name for rho in self.densities if rho < 1]
            names = ["dense", "control", *(name + stage for name in pruned for stage in ("", "_tuned"))]
            return [load_variant(path) for name in names if (path := self.dirpath / f"{name}.pt").is_file()]
        dense = Variant("dense", 1.0, "none", state_of(pl_module.net), list(self.slot.cuts), about(self, trainer))
        if self.slot.cuts or masks_in(pl_module.net):
            return [dense]
        self._kept = {"dense": dense}
        return [dense, *(self._prune(trainer, pl_module, rho) for rho in self.densities if rho < 1)]

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or self.table is None:
            return
        publish(self.table, trainer, self.table_dir)
        if self.figures and self.figures_dir:
            from callbacks.figures import pruning

            plots = {name: lambda name=name: getattr(pruning, name)(self.table.rows) for name in self.figures}
            draw(trainer, plots, self.figures_dir, f"{KEY}.figures")

    # ------------------------------------------------------------------------------------------------------ checkpoints

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["pruning"] = {"cuts": self.slot.cuts}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": {name: getattr(self, name) for name in _IDENTITY},
            "number": self.number,
            "begin": self.begin,
            "ended": self._ended,
            "over": self._over,
            "best": self._best,
            "points": self._points,
            "kept": {name: vars(variant) for name, variant in self._kept.items()},
            "losses": self._losses,
            "steps": self._steps,
            "skips_dense": bool(self.plan) and self.plan[0].kind != "dense",
            "deployed": self._deployed,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, stored in state_dict["settings"].items():
            if stored != getattr(self, name):
                raise ValueError(
                    f"{KEY}.{name}={getattr(self, name)}: the checkpoint is of a study with {name}={stored}; go on "
                    "with that, or begin a new run"
                )
        self.number, self.begin = state_dict["number"], state_dict["begin"]
        self._ended, self._over = state_dict["ended"], state_dict["over"]
        self._best, self._points = state_dict["best"], state_dict["points"]
        self._kept = {name: Variant(**fields) for name, fields in state_dict["kept"].items()}
        self._losses, self._steps, self._deployed = (state_dict[key] for key in ("losses", "steps", "deployed"))
        if state_dict["skips_dense"]:
            self.plan = [segment for segment in self.plan if segment.kind != "dense"]
