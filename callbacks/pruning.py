"""Pruning of forecasters: dense training, densities one after the other, fine-tuning of each, in one `fit`."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from callbacks.low_rank import draw
from callbacks.pruning_table import Table, errors, measure, write_table
from callbacks.replaced_weights import refuse_replaced_weights
from callbacks.run_record import RunRecord
from networks.pruning.budget import Budget
from networks.pruning.groups import Allocation, Granularity
from networks.pruning.pruner import DensityOf, Pruner
from networks.pruning.unstructured import Scope, cubic_density
from networks.pruning.variants import Cuts, Variant, cut, load_variant
from networks.pruning.weights import apply_masks, enforce, make_room, mask_gradients, masks_in, remove_masks

log = logging.getLogger(__name__)

KEY = "callbacks.pruning"
Schedule = Literal["one_shot", "iterative", "cubic"]
Rewind = Literal["none", "init", "early"]
STUDY_DENSITIES = tuple(0.8**n for n in range(10))
# Two runs with other values of these are not the same study.
_IDENTITY = ("method", "scope", "schedule", "rewind", "densities", "finetune_epochs", "include_complex", "budget")


@dataclass(frozen=True)
class Segment:
    """A part of the fit: dense training, its continuation as a control, or the fine-tuning of one density."""

    kind: Literal["dense", "control", "tuned"]
    density: float
    epochs: int


class Pruning(pl.Callback):
    """Train dense, prune to one density after the other, fine-tune each, and compare all of them in the test.

    The fit has segments. ``dense`` is the ordinary training (``trainer.max_epochs``, with its early stopping). Then,
    with ``finetune_epochs``, the dense network goes on as long as every pruned one will (``control``: what extra epochs
    alone bring), and every density below 1 is pruned and trained with its masks. Each segment begins with a new
    optimizer and schedule and ends with the weights of its best validation loss. The networks are kept as files
    (``<dirpath>/<name>.pt``): ``dense``, ``control``, ``l1_0.512`` (pruned, not trained since), ``l1_0.512_tuned``.

    At the end the *deployed* network is put into the module and its checkpoint: the sparsest one whose validation loss
    is within ``deploy_tolerance`` of the dense one's, else the pruned one with the lowest. ``test`` measures all
    networks (`callbacks.pruning_table`) and writes them as one table; ``predict`` forecasts with the deployed one.

    Single weights are masked: masks are buffers, masked weights are set to zero after every step and get no gradient.
    ``structured`` removes channels; the network of a segment is then a smaller one. A stopped run goes on exactly where
    it was.

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
        control: Whether the dense network is trained on for as long.
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
        for name, value, kind in (
            ("schedule", schedule, Schedule),
            ("rewind", rewind, Rewind),
        ):
            if value not in get_args(kind):
                raise ValueError(f"{KEY}.{name}={value!r} is unknown; choose one of {', '.join(get_args(kind))}")
        options = {"granularity": list(granularity), "allocation": allocation, "budget": budget, "seed": seed}
        options |= {"density_of": density_of, "exclude_output": exclude_output, "include_complex": include_complex}
        try:
            self.pruner = Pruner(method, scope, **options)
        except ValueError as error:
            raise ValueError(f"{KEY}.{error}") from None
        self.densities = _densities(sparsity, densities)
        for name, value in (("finetune_epochs", finetune_epochs), ("latency_repeats", latency_repeats - 1)):
            if value < 0:
                raise ValueError(f"{KEY}.{name}={value}: must not be negative")
        if finetune_lr <= 0 or deploy_tolerance < 0 or score_batches < 1 or min(latency_batches, default=0) < 1:
            raise ValueError(
                f"{KEY}: finetune_lr={finetune_lr}, score_batches={score_batches} and latency_batches="
                f"{list(latency_batches)} must be positive, deploy_tolerance={deploy_tolerance} not negative"
            )
        if schedule != "one_shot" and not finetune_epochs:
            raise ValueError(f"{KEY}.schedule={schedule!r} prunes between epochs: set finetune_epochs to 1 or more")
        if schedule == "cubic" and method == "structured":
            raise ValueError(f"{KEY}.schedule='cubic' masks single weights; choose one_shot or iterative")
        if method == "lottery" and schedule == "cubic":
            raise ValueError(f"{KEY}.method='lottery' is iterative; choose schedule=one_shot or iterative")
        if rewind != "none" and not finetune_epochs:
            raise ValueError(f"{KEY}.rewind={rewind!r} leaves an untrained network: set finetune_epochs")
        if scope == "2:4" and any(rho not in (0.5, 1.0) for rho in self.densities):
            raise ValueError(f"{KEY}.scope='2:4' keeps two of four weights: set sparsity=0.5")
        if method == "lottery" and not finetune_epochs:
            raise ValueError(f"{KEY}.method='lottery' trains every ticket: set finetune_epochs")
        self.method, self.scope, self.rewind = method, scope, rewind
        self.schedule = "iterative" if method == "lottery" else schedule
        if method == "lottery" and rewind == "none":
            self.rewind = "init"
        self.finetune_epochs, self.finetune_lr, self.control = finetune_epochs, finetune_lr, control
        self.dense, self.score_batches, self.deploy_tolerance = dense, score_batches, deploy_tolerance
        self.include_complex, self.budget, self.dirpath = include_complex, budget, Path(dirpath)
        self.table_dir = self.dirpath.parent if table_dir is None else Path(table_dir)
        self.latency_batches, self.latency_repeats = list(latency_batches), latency_repeats
        self.energy_s, self.quantize, self.sparse_execution = energy_s, quantize, sparse_execution
        self.references, self.figures, self.figures_dir = references, tuple(figures), figures_dir
        self.plan: list[Segment] = []
        self.number, self.begin = 0, 0  # running segment, epoch in which it began
        self._ended = self._over = False
        self._best: dict[str, Any] = {"loss": None, "state": None}
        self._points: dict[str, dict[str, Tensor]] = {}  # weights of the start (init) and after an epoch (early)
        self._kept: dict[str, Variant] = {}  # dense, and what the next density of an iterative schedule begins with
        self._cuts: Cuts = []  # of the network that is in the module
        self._full: nn.Module | None = None  # the network before any cut
        self._losses: dict[str, float] = {}  # best validation losses by name
        self._unhook: Callable[[], None] | None = None
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
        if self._full is None:
            self._full = copy.deepcopy(pl_module.net)
        self._hook(pl_module)
        self.pruner = replace(self.pruner, channels=len(trainer.datamodule.channel_names))
        try:
            self.pruner.check(self._full)
        except ValueError as error:
            raise ValueError(f"{KEY}.{error}") from None
        self._warn_of_uncovered()
        if str(getattr(stage, "value", stage)) != "fit":
            return
        refuse_replaced_weights(trainer, "pruning")
        if any(isinstance(c, EarlyStopping) for c in trainer.callbacks[trainer.callbacks.index(self) :]):
            raise ValueError(f"{KEY}: must stand behind callbacks.early_stopping, whose segments end")
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            raise ValueError(f"{KEY}: trainer.max_epochs={trainer.max_epochs} is the dense training; give a number")
        self.plan = self._make_plan(trainer.max_epochs)
        if not trainer.fast_dev_run:
            trainer.fit_loop.max_epochs = sum(segment.epochs for segment in self.plan)

    def _warn_of_uncovered(self) -> None:
        """Say so where complex kernels stay whole: a density then tells little of the model."""
        if (share := self.pruner.uncovered(self._full)) is not None:
            rank_zero_warn(
                f"{KEY}.include_complex=false leaves {share:.1%} of the parameters uncovered, most of them complex "
                "kernels: a density is that of the rest; the table has the density of the model beside it"
            )

    def _make_plan(self, dense_epochs: int) -> list[Segment]:
        plan = [Segment("dense", 1.0, dense_epochs)]
        if self.finetune_epochs:
            if self.control:
                plan.append(Segment("control", 1.0, self.finetune_epochs))
            plan += [Segment("tuned", rho, self.finetune_epochs) for rho in self.densities if rho < 1]
        return plan

    def _hook(self, pl_module: pl.LightningModule) -> None:
        """Make checkpoints of any form loadable: Lightning asks the module, before it loads the weights."""
        if self._unhook is not None:
            return
        own = pl_module.__dict__.get("on_load_checkpoint")
        inner = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._reshape(pl_module, checkpoint.get("pruning", {}).get("cuts", []))
            remove_masks(pl_module)
            make_room(pl_module, checkpoint["state_dict"])
            inner(checkpoint)

        def unhook() -> None:
            del pl_module.on_load_checkpoint
            if own is not None:
                pl_module.on_load_checkpoint = own

        pl_module.on_load_checkpoint, self._unhook = on_load_checkpoint, unhook

    def _reshape(self, pl_module: pl.LightningModule, cuts: Cuts) -> None:
        """Put a network of other sizes into the module, if it does not have these already."""
        if not _same_cuts(cuts, self._cuts):
            pl_module.net = cut(self._full, cuts).to(pl_module.device).train(pl_module.net.training)
            self._cuts = list(cuts)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._unhook is not None:
            self._unhook()
            self._unhook = None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    # --------------------------------------------------------------------------------------------------------- segments

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any(c._check_on_train_epoch_end for c in trainer.callbacks if isinstance(c, EarlyStopping)):
            raise ValueError(
                f"callbacks.early_stopping.check_on_train_epoch_end: must be false beside {KEY}, which ends a segment "
                "in the validation that stops it"
            )
        if "init" in self._points:  # a checkpoint was loaded
            return
        self._points["init"] = _state(pl_module.net)
        if (found := self._find_dense(trainer)) is not None:
            self._take_dense(trainer, pl_module, found)

    def _find_dense(self, trainer: pl.Trainer) -> Variant | None:
        """The dense network of another run, None where it is to be trained."""
        if self.dense is None:
            return None
        if self.dense != "sweep":
            path = Path(self.dense)
            path = path / "pruned" / "dense.pt" if path.is_dir() else path
            if not path.is_file():
                raise ValueError(f"{KEY}.dense={self.dense}: there is no {path}; give a run of this experiment")
            return load_variant(path)
        mine = _training(_config(trainer))
        for path in sorted(self.dirpath.parent.parent.glob(f"*/{self.dirpath.name}/dense.pt")):
            variant = load_variant(path)
            if mine is not None and _training(variant.about.get("config")) == mine:
                return variant
        return None

    def _take_dense(self, trainer: pl.Trainer, pl_module: pl.LightningModule, variant: Variant) -> None:
        own = pl_module.net.state_dict()
        wrong = [name for name, value in variant.state.items() if name not in own or own[name].shape != value.shape]
        if wrong or own.keys() - variant.state.keys():
            raise ValueError(
                f"{KEY}.dense={self.dense}: the network has other sizes than the model of this run (first: "
                f"{(wrong or sorted(own.keys() - variant.state.keys()))[0]}); choose the model that it was trained as"
            )
        pl_module.net.load_state_dict(variant.state)
        self._points |= {"early": variant.about["early"]} if variant.about.get("early") else {}
        self._points["init"] = variant.about.get("init", self._points["init"])
        self._keep(trainer, variant)
        self.plan = [segment for segment in self.plan if segment.kind != "dense"]
        if not trainer.fast_dev_run:
            trainer.fit_loop.max_epochs = sum(segment.epochs for segment in self.plan)
        log.info("the dense network is that of %s", variant.about.get("run_dir"))
        if not self.plan:
            self._finish_study(trainer, pl_module)
            self._over = True
        else:
            self._start(trainer, pl_module)

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
        self._best, self._steps = {"loss": None, "state": None}, 0
        if segment.kind == "control":
            self._put(pl_module, self._kept["dense"])
        else:
            pruned = self._prune(trainer, pl_module, segment.density)
            self._keep(trainer, pruned)
            if self.schedule == "cubic":
                self._put(pl_module, self._kept["dense"])
                weights = self.pruner.weights(pl_module.net)
                apply_masks(weights, {weight.name: torch.ones_like(weight.mask) for weight in weights})
            else:
                self._put(pl_module, pruned)
            self._rewind(pl_module)
        trainer.strategy.setup_optimizers(trainer)
        self._scale_rates(trainer)
        for callback in trainer.callbacks:
            if isinstance(callback, EarlyStopping):
                callback.wait_count, callback.stopped_epoch = 0, 0
                callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
        log.info("%s: density %.3g, at most %d epochs", segment.kind, segment.density, segment.epochs)

    def _scale_rates(self, trainer: pl.Trainer) -> None:
        """Begin with another learning rate, and the schedule with it."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for name in ("lr", "initial_lr"):
                    if name in group:
                        group[name] = group[name] * self.finetune_lr
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]

    def _put(self, pl_module: pl.LightningModule, variant: Variant) -> None:
        """Put the network of a variant into the module."""
        self._reshape(pl_module, variant.cuts)
        remove_masks(pl_module.net)
        make_room(pl_module.net, variant.state)
        pl_module.net.load_state_dict(variant.state)
        pl_module.net.to(pl_module.device)

    def _rewind(self, pl_module: pl.LightningModule) -> None:
        """Let what is left begin with earlier weights."""
        if self.rewind == "none":
            return
        point = self._points.get(self.rewind)
        if point is None:
            raise ValueError(
                f"{KEY}.rewind={self.rewind!r}: the dense network was not trained here; choose init or none"
            )
        earlier = copy.deepcopy(self._full)
        earlier.load_state_dict(point)
        pl_module.net.load_state_dict(cut(earlier, self._cuts).state_dict(), strict=False)  # the masks stay
        if not self.pruner.structured:
            enforce(self.pruner.weights(pl_module.net))

    # ---------------------------------------------------------------------------------------------------------- pruning

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rho: float) -> Variant:
        """The network of a density, not trained since; the module holds some network afterwards."""
        source = self._kept["last"] if self.schedule == "iterative" and "last" in self._kept else self._kept["dense"]
        self._put(pl_module, source)
        if self.pruner.structured:
            batch = next(iter(self._batches(trainer, pl_module)))
            keep = self.pruner.keep(pl_module.net, rho / source.density, batch)
            small = cut(pl_module.net, [keep] if keep else [])
            cuts = [*source.cuts, *([keep] if keep else [])]
            return Variant("pruned", rho, self.method, _state(small), cuts, self._about(trainer))
        self._mask(trainer, pl_module, rho)
        return Variant("pruned", rho, self.method, _state(pl_module.net), [], self._about(trainer))

    def _mask(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rho: float) -> None:
        """Mask the network in the module."""
        batches = functools.partial(self._batches, trainer, pl_module)
        try:
            masks = self.pruner.masks(pl_module.net, rho, batches, _loss_of(pl_module))
        except ValueError as error:
            raise ValueError(f"{KEY}.{error}") from None
        apply_masks(self.pruner.weights(pl_module.net), masks)

    def _batches(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        loader = islice(trainer.datamodule.train_dataloader(), self.score_batches)
        return (move_data_to_device(batch, pl_module.device) for batch in loader)

    def _about(self, trainer: pl.Trainer) -> dict[str, Any]:
        config = _config(trainer)
        return {
            "config": config,
            "schedule": self.schedule,
            "scope": self.scope,
            "rewind": self.rewind,
            "epochs": 0,
            "run_dir": None if config is None else config["run"]["dir"],
        }

    def _keep(self, trainer: pl.Trainer, variant: Variant) -> None:
        self._kept |= {"dense": variant} if variant.stage == "dense" else {}
        if variant.stage == "tuned":
            self._kept["last"] = variant
        if trainer.is_global_zero and not trainer.fast_dev_run:
            variant.save(self.dirpath)

    # ------------------------------------------------------------------------------------------------- within a segment

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self._masked:
            mask_gradients(self.pruner.weights(pl_module.net))

    @property
    def _masked(self) -> bool:
        return bool(self.plan) and self.plan[self.number].kind == "tuned" and not self.pruner.structured

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
            self._best = {"loss": float(loss), "state": _state(pl_module.net)}
        if trainer.is_last_batch:
            self._end_of_epoch(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0 and self.plan[self.number].kind == "dense" and self.rewind == "early":
            self._points["early"] = _state(pl_module.net)
        self._end_of_epoch(trainer, pl_module)

    def _end_of_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._ended:
            return
        segment, epochs = self.plan[self.number], trainer.current_epoch + 1 - self.begin
        stopped = trainer.should_stop and any(isinstance(c, EarlyStopping) for c in trainer.callbacks)
        if epochs < segment.epochs and not stopped:
            return
        self._ended = True
        self._end_segment(trainer, pl_module, epochs)
        self._over = self.number + 1 >= len(self.plan)
        trainer.should_stop = self._over

    def _end_segment(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epochs: int) -> None:
        segment = self.plan[self.number]
        state = _state(pl_module.net) if self._best["state"] is None else self._best["state"]
        about = self._about(trainer) | {"epochs": epochs, "val_loss": self._best["loss"]}
        if segment.kind == "dense":
            about |= {"init": self._points["init"], "early": self._points.get("early")}
        method = self.method if segment.kind == "tuned" else "none"
        variant = Variant(segment.kind, segment.density, method, state, list(self._cuts), about)
        self._keep(trainer, variant)
        if self._best["loss"] is not None:
            self._losses[variant.name] = self._best["loss"]
            values = {"pruning/density": segment.density, "pruning/best": self._best["loss"]}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

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
        self._put(pl_module, deployed)
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

    @torch.no_grad()
    def _loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule, variant: Variant) -> float:
        self._put(pl_module, variant)
        loader = trainer.datamodule.val_dataloader()
        limit = trainer.num_val_batches[0] if trainer.num_val_batches else math.inf
        return errors(pl_module, loader, limit)["mse"]

    # ------------------------------------------------------------------------------------------------------------- test

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning tests in inference mode, whose tensors nothing could be loaded into afterwards.
        with torch.inference_mode(False), torch.no_grad():
            own = Variant("dense", 1.0, "none", _state(pl_module.net), list(self._cuts))
            training = pl_module.training
            try:
                self.table = measure(self, trainer, pl_module, self._found(trainer, pl_module))
            finally:
                self._put(pl_module, own)
                pl_module.train(training)
        for name, value in self.table.metrics().items():
            pl_module.log(name, value, batch_size=1, sync_dist=True, rank_zero_only=True)

    def _found(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Variant]:
        """All networks of the study in order: of this run or an earlier one, else one-shot prunings of the weights."""
        names = ["dense", "control"]
        for rho in self.densities:
            if rho < 1:
                pruned = Variant("pruned", rho, self.method, {})
                names += [pruned.name, f"{pruned.name}_tuned"]
        if (self.dirpath / "dense.pt").is_file():
            return [load_variant(path) for name in names if (path := self.dirpath / f"{name}.pt").is_file()]
        dense = Variant("dense", 1.0, "none", _state(pl_module.net), list(self._cuts), self._about(trainer))
        if self._cuts or masks_in(pl_module.net):
            return [dense]
        self._kept = {"dense": dense}
        return [dense, *(self._prune(trainer, pl_module, rho) for rho in self.densities if rho < 1)]

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or self.table is None:
            return
        write_table(self.table, self.table_dir)
        log.info("all networks on the test part:\n%s", self.table.text())
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                columns = self.table.columns()
                rows = [[row.get(c) for c in columns] for row in self.table.rows]
                logger.log_table("pruning", columns=columns, data=rows)
        if self.figures and self.figures_dir:
            from callbacks.figures import pruning

            plots = {name: lambda name=name: getattr(pruning, name)(self.table.rows) for name in self.figures}
            draw(trainer, plots, self.figures_dir, f"{KEY}.figures")

    # ------------------------------------------------------------------------------------------------------ checkpoints

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["pruning"] = {"cuts": self._cuts}

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
        self._losses, self._steps = state_dict["losses"], state_dict["steps"]
        self._deployed = state_dict["deployed"]
        if state_dict["skips_dense"]:
            self.plan = [segment for segment in self.plan if segment.kind != "dense"]


def _densities(sparsity: float | Sequence[float] | None, densities: Sequence[float] | None) -> list[float]:
    if sparsity is not None:
        values = [sparsity] if isinstance(sparsity, int | float) else list(sparsity)
        if wrong := [value for value in values if not 0 <= value < 1]:
            raise ValueError(f"{KEY}.sparsity={wrong[0]}: must lie in [0, 1), the part of the weights that goes")
        found = [round(1 - value, 12) for value in values]
    else:
        found = [float(value) for value in (STUDY_DENSITIES if densities is None else densities)]
        if wrong := [value for value in found if not 0 < value <= 1]:
            raise ValueError(f"{KEY}.densities={wrong[0]}: must lie in (0, 1], the part of the weights that stays")
    if not found:
        raise ValueError(f"{KEY}.densities is empty: give at least one, or null for those of the study")
    return sorted(set(found), reverse=True)


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def _same_cuts(one: Cuts, other: Cuts) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, other, strict=True)
    )


def _loss_of(pl_module: pl.LightningModule) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Mean squared error of the point forecasts of valid windows."""

    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        squared = (pl_module.point(pl_module(batch)) - batch["target"]).square().mean(1)
        return (squared * batch["valid"]).sum() / batch["valid"].sum().clamp(min=1)

    return loss


def _config(trainer: pl.Trainer) -> dict[str, Any] | None:
    return next((c.config for c in trainer.callbacks if isinstance(c, RunRecord)), None)


def _training(config: Mapping[str, Any] | None) -> Any:
    """What decides the weights of a dense training."""
    if config is None:
        return None
    trainer = {key: config["trainer"][key] for key in ("max_epochs", "limit_train_batches", "precision")}
    stopping = config["callbacks"].get("early_stopping")
    return config["model"], config["data"], config["seed"], trainer, stopping
