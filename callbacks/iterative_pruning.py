"""Iterative magnitude pruning with rewinding: all levels of a lottery-ticket search inside one fit."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from callbacks.level_best import LevelBest, Mode
from callbacks.level_report import (
    compared_scores,
    cost,
    in_words,
    joules_of,
    label,
    logged,
    measured,
    origin,
    scores_of,
    seconds_by_level,
    spreads,
    within_net,
    work,
)
from callbacks.low_rank import draw, log_exact
from callbacks.replaced_weights import refuse_replaced_weights
from callbacks.rewinding import check_schedules, restart, rewind_point, set_weights, training_point, weights_of
from callbacks.segments import refuse_early_stopping_behind, refuse_stopping_after_validation, stopped_early
from networks.lottery.pruning import prune
from networks.lottery.scores import NEEDS_SIGMA, known
from networks.lottery.tickets import Ticket, find_tickets, load_ticket, save_ticket, ticket_path
from networks.masks import (
    MaskedWeight,
    PruneChoice,
    alive,
    checksum,
    density,
    empty_layers,
    install_masks,
    jaccard,
    layer_densities,
    masked_weights,
    masks_of,
)

log = logging.getLogger(__name__)

# Two runs with other values of these are not the same search.
_IDENTITY = ("rate", "score", "rewind", "epochs_per_level")


class IterativePruning(pl.Callback):
    """Train, remove the weights with the lowest scores, rewind, train again, in one `fit`.

    Level n trains with the masks that n prunings have left. At the end of a level a ticket is written
    (``<dirpath>/level_NN.pt``). At the beginning of the next one the lowest ``rate`` of the weights alive go, over all
    layers together; every parameter and buffer (unpruned layers and statistics of normalisations included) goes back to
    where ``rewind`` says; optimizers and schedulers get back the state that they had there; `EarlyStopping` and the
    best values of `ModelCheckpoint` begin anew. `EarlyStopping` ends a level, not the run.

    Levels decide how long the fit is: ``trainer.max_epochs`` is one training, as everywhere, which is a level; it may
    be -1 where ``epochs_per_level`` is given. Learning-rate schedules of another length than a level's are refused.

    A stopped run goes on in its level exactly: checkpoints hold masks, rewind point and level. Masks are computed on
    every rank from equal weights and compared over ranks.

    Logged after every validation: ``lottery/`` ``level``, ``remaining``, ``cumulative_epochs`` and
    ``density/<layer>``. To the loggers at the end of every level: ``lottery/`` ``rank_correlation/<score>``
    (Spearman, over weights alive, between the score in use and the others), ``overlap/<score>`` (Jaccard index of
    the masks that both would leave), ``overlap/compared`` (with the ticket of the same level in ``compare``),
    ``overlap/previous`` (with the level before: of nested masks, what is left of it),
    ``sign_agreement`` (with the initial weights), ``sigma/<layer>`` and ``snr/<layer>`` (means over weights alive),
    ``best``, ``seconds``, ``multiplications``, ``paper_accuracy`` (the highest of ``paper/accuracy``),
    ``energy_j``, ``cost_s`` (seconds of all levels up to this one, those that found a ticket included),
    ``cost_saved`` (part of the search in ``compare`` that a transplanted ticket saves).

    Args:
        levels: Prunings; levels 0 to ``levels`` are trained. Of a run that begins with a ticket: further prunings.
        epochs_per_level: E; null: ``trainer.max_epochs``. With ``rewind=epoch_k`` levels after the first have E - k.
        rate: Part of the weights alive that a pruning removes, between 0 and 1.
        score: One of `networks.lottery.scores.SCORES`; ``auto``: ``snr`` for Bayesian networks, else ``magnitude``.
        rewind: ``init``: back to the weights at the start of the fit. ``epoch_k`` (``epoch_2``): to those after k
            epochs of level 0. ``step_k``: to those after k optimizer steps of it; later levels are shorter by the
            whole epochs in k. ``lr_only``: weights stay, only optimizer and schedule begin anew (learning-rate
            rewinding).
        stop_at: Part of the weights: no level begins with less than this; null: all levels.
        compared_scores: Scores that are logged beside the one in use; those that the network lacks something for are
            left out.
        c: Weight of sigma in the score ``mu_plus_sigma``.
        seed: Of the score ``random``.
        prunable: Which weights, where the module has not given masks to some already; null: all linear and
            convolutional layers but the last.
        dirpath: Folder of the tickets.
        monitor: Metric by which the best epoch of a level is kept in the ticket: ``auto``, the highest
            ``val/accuracy`` where there is one, else the lowest ``val/loss``; a name; null: none is kept.
        mode: Whether ``min`` or ``max`` of a metric that is named is best.
        compare: A run with tickets (or its folder) whose masks are compared with those of this one; null: none.
        figures: Functions of `callbacks.figures.lottery` that draw the levels at the end of the fit.
        figures_dir: Their folder; null: no figures.

    Raises:
        ValueError: Names the argument, also for a checkpoint of a search with other settings.
    """

    def __init__(
        self,
        levels: int = 15,
        epochs_per_level: int | None = None,
        rate: float = 0.2,
        score: str = "auto",
        rewind: str = "init",
        stop_at: float | None = None,
        compared_scores: Sequence[str] = ("snr", "mu", "mu_scaled", "square"),
        c: float = 1.0,
        seed: int = 0,
        prunable: PruneChoice | None = None,
        dirpath: str = "tickets",
        monitor: str | None = "auto",
        mode: Mode = "max",
        compare: str | None = None,
        figures: Sequence[str] = ("metrics_against_remaining", "layer_densities", "pruning_frontier"),
        figures_dir: str | None = None,
    ) -> None:
        key = "callbacks.iterative_pruning"
        if levels < 0:
            raise ValueError(f"{key}.levels={levels}: must not be negative; 0 trains once, without pruning")
        if epochs_per_level is not None and epochs_per_level < 1:
            raise ValueError(f"{key}.epochs_per_level={epochs_per_level}: must be at least 1")
        if not 0 < rate < 1:
            raise ValueError(f"{key}.rate={rate}: must lie between 0 and 1, the part of the weights that a level loses")
        for name in (score, *compared_scores):
            known("magnitude" if name == "auto" else name, f"{key}.score")
        if stop_at is not None and not 0 < stop_at <= 1:
            raise ValueError(f"{key}.stop_at={stop_at}: must lie in (0, 1], a part of the weights, or be null")
        self.rewind_epoch, self.rewind_step = rewind_point(rewind, epochs_per_level, key)
        self.levels, self.epochs_per_level, self.rate, self.score = levels, epochs_per_level, rate, score
        self.rewind, self.stop_at, self.compared_scores = rewind, stop_at, tuple(compared_scores)
        self.c, self.seed, self.prunable = c, seed, prunable
        self.dirpath = Path(dirpath)
        self.compare, self.figures, self.figures_dir = compare, tuple(figures), figures_dir
        self.level, self.level_start = 0, 0  # prunings of this run; epoch in which the level began
        self.base = 0  # prunings of the ticket that the module began with
        self.history: list[dict[str, Any]] = []  # a row per finished level
        self._ended = False  # the level is over, the next one has not begun
        self._over = False  # all levels are
        self._point: dict[str, Any] | None = None  # what a level rewinds to
        self._initial: dict[str, Tensor] = {}  # weights of the running level at its start
        self._first: dict[str, Tensor] = {}  # theta_0
        self._best = LevelBest(monitor, mode)
        self._seconds, self._since = 0.0, time.perf_counter()
        self._compared: dict[int, Path] = {}

    # ------------------------------------------------------------------------------------------------------ beginning

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not masked_weights(pl_module):
            install_masks(pl_module, self.prunable)
        if str(getattr(stage, "value", stage)) != "fit":
            return
        refuse_replaced_weights(trainer, "iterative_pruning")
        if sum(isinstance(callback, IterativePruning) for callback in trainer.callbacks) > 1:
            raise ValueError("callbacks: two IterativePruning callbacks would prune by turns; keep one")
        refuse_early_stopping_behind(trainer, self, "callbacks.iterative_pruning")
        self._decide_length(trainer)
        if self.compare is not None:
            self._compared = find_tickets(self.compare, "callbacks.iterative_pruning.compare")

    def _decide_length(self, trainer: pl.Trainer) -> None:
        """Take the length of a level from the Trainer where it is not given, and tell the Trainer that of them all."""
        if self.epochs_per_level is None:
            if trainer.max_epochs is None or trainer.max_epochs < 1:
                raise ValueError(
                    f"callbacks.iterative_pruning.epochs_per_level=null takes trainer.max_epochs, which is "
                    f"{trainer.max_epochs}: set one of them to the epochs of a level"
                )
            self.epochs_per_level = trainer.max_epochs
            rewind_point(self.rewind, self.epochs_per_level, "callbacks.iterative_pruning")
        if not trainer.fast_dev_run:
            trainer.fit_loop.max_epochs = self.num_epochs

    @property
    def tickets_dir(self) -> Path:
        """Folder of the tickets, by which a module that tests them finds those of its run."""
        return self.dirpath

    @property
    def number(self) -> int:
        """Number of the running level: prunings in all, those of a ticket that the run began with included."""
        return self.base + self.level

    @property
    def num_epochs(self) -> int:
        """Epochs of all levels together."""
        return self.epochs_per_level + self.levels * (self.epochs_per_level - self.rewind_epoch)

    @property
    def level_length(self) -> int:
        """Epochs of the running level."""
        return self.epochs_per_level - (self.rewind_epoch if self.level else 0)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ticket = getattr(pl_module, "ticket", None)  # read in the module's setup, which comes after the callbacks'
        self.base = 0 if ticket is None else ticket.level
        chosen = self._score_name(masked_weights(pl_module))
        if chosen in NEEDS_SIGMA and any(w.log_sigma is None for w in masked_weights(pl_module)):
            raise ValueError(
                f"callbacks.iterative_pruning.score={chosen!r} needs standard deviations, but the network is "
                "deterministic; choose score=magnitude, or model.bayesian=true"
            )
        refuse_stopping_after_validation(trainer, "callbacks.iterative_pruning")
        if self._point is None:
            self._take_point(trainer, pl_module)
            self._first = self._initial = dict(self._point["weights"])
            self._point["epoch"] = 0

    def _score_name(self, weights: Sequence[MaskedWeight]) -> str:
        if self.score != "auto":
            return self.score
        return "snr" if all(w.bayesian for w in weights) else "magnitude"

    def _take_point(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember where levels go back to."""
        self._synchronize(trainer)
        self._point = training_point(trainer, pl_module)

    def _place_step(self, trainer: pl.Trainer) -> None:
        """In which epoch the step lies that levels go back to."""
        if not self.rewind_step or not math.isfinite(trainer.num_training_batches):
            return
        steps = max(1, math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
        if self.rewind_step >= steps * self.epochs_per_level:
            raise ValueError(
                f"callbacks.iterative_pruning.rewind={self.rewind}: level 0 has {steps * self.epochs_per_level} steps "
                f"({self.epochs_per_level} epochs of {steps})"
            )
        self.rewind_epoch = self.rewind_step // steps
        trainer.fit_loop.max_epochs = self.num_epochs

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.fast_dev_run:
            check_schedules(trainer, self.epochs_per_level)
            self._place_step(trainer)
        self._since = time.perf_counter()
        if self._over:
            trainer.should_stop = True

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._ended and not self._over:
            self._next_level(trainer, pl_module)
        elif self.level == 0 and not self.rewind_step and 0 < self.rewind_epoch == trainer.current_epoch:
            self._take_point(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # A checkpoint of the last batch of a level (every_n_train_steps) comes before the validation, and Lightning
        # goes on from it in the next epoch without the hooks of either: the level ends here, without their metrics.
        if not self._ended and trainer.current_epoch - self.level_start >= self.level_length:
            rank_zero_warn(
                f"level {self.number}: its last validation was lost with the process; its ticket has no metrics"
            )
            self._end_of_epoch(trainer, pl_module, epochs=trainer.current_epoch)
            if not self._over:
                self._next_level(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        reached = self.level == 0 and 0 < self.rewind_step == trainer.global_step
        if reached and self._point.get("step") != self.rewind_step:
            self._take_point(trainer, pl_module)

    # --------------------------------------------------------------------------------------------------- within a level

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        masks = masks_of(masked_weights(pl_module))
        log_exact(pl_module, "lottery/level", float(self.number))
        log_exact(pl_module, "lottery/remaining", density(masks))
        log_exact(pl_module, "lottery/cumulative_epochs", float(trainer.current_epoch + 1))
        for name, value in layer_densities(masks).items():
            log_exact(pl_module, f"lottery/density/{label(name)}", value)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Checkpoint callbacks come after this one: what they save knows that the level is over.
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._best.update(trainer, pl_module)
        self._best.keep_highest(trainer)
        if trainer.is_last_batch:
            self._end_of_epoch(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._ended:
            self._best.keep_highest(trainer)
        self._end_of_epoch(trainer, pl_module)  # without a validation, or stopped after it

    def _end_of_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epochs: int | None = None) -> None:
        """End the level if it has had its epochs: ``epochs`` of the fit are over, by default the running one too."""
        epochs = trainer.current_epoch + 1 if epochs is None else epochs
        if self._ended:
            return
        if epochs - self.level_start < self.level_length and not stopped_early(trainer):
            return
        self._ended = True
        self._seconds += time.perf_counter() - self._since
        self._since = time.perf_counter()
        self._finish(trainer, pl_module, epochs)
        self._over = self._is_last()
        trainer.should_stop = self._over

    def _is_last(self) -> bool:
        """Whether no level follows the one that has ended: all are done, or the next would begin with too little."""
        left = self.history[-1]["remaining"] * (1 - self.rate)
        return self.level >= self.levels or (self.stop_at is not None and left < self.stop_at)

    # --------------------------------------------------------------------------------------------------- end of a level

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epochs: int) -> None:
        """Write the ticket of the level and log what it tells."""
        weights = masked_weights(pl_module)
        masks = masks_of(weights)
        seconds = seconds_by_level(pl_module, [*(row["seconds"] for row in self.history), self._seconds])
        transplanted = getattr(pl_module, "ticket", None) is not None and self.level == 0
        row: dict[str, Any] = {
            "level": self.number,
            "remaining": density(masks),
            "alive": alive(masks),
            "epochs": epochs - self.level_start,
            "cumulative_epochs": epochs,
            "seconds": self._seconds,
            "densities": {label(name): value for name, value in layer_densities(masks).items()},
            "metrics": measured(trainer),
            "best_metrics": self._best.metrics,
            "score": self._score_name(weights),
            **self._insights(trainer, pl_module, weights, masks),
            **cost(sum(seconds), self.number, self._compared.get(self.number) if transplanted else None),
        }
        if (highest := self._best.paper) is not None:
            row["paper_accuracy"] = highest
        self.history.append(row)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            about = {
                **row,
                "rate": self.rate,
                "rewind": self.rewind,
                "epochs_per_level": self.epochs_per_level,
                "bayesian": all(w.bayesian for w in weights),
                "seconds_by_level": seconds,
                **origin(trainer, pl_module),
            }
            states = [within_net(state) for state in (masks, self._initial, weights_of(pl_module))]
            best = None if self._best.state is None else within_net(self._best.state)
            ticket = Ticket(*states, best, about)
            save_ticket(ticket_path(self.dirpath, self.number), ticket)
        values = logged(row)
        if self._best.value is not None:
            values["lottery/best"] = self._best.value
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        log.info("level %d: %s", self.number, in_words(row))

    def _insights(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        weights: Sequence[MaskedWeight],
        masks: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """Correlations, overlaps, signs, spreads."""
        own, values = self._score_name(weights), functools.partial(self._scores, trainer, weights)
        found = {"overlap/previous": alive(masks) / self.history[-1]["alive"]} if self.history else {}
        found |= compared_scores(own, self.compared_scores, values, weights, masks, self.rate)
        if (path := self._compared.get(self.number)) is not None:
            found["overlap/compared"] = jaccard(within_net(masks), load_ticket(path).masks)
        return found | spreads(weights, masks, self._first) | work(trainer, pl_module)

    def _scores(self, trainer: pl.Trainer, weights: Sequence[MaskedWeight], name: str) -> dict[str, Tensor]:
        return scores_of(name, weights, trainer.optimizers, self.c, self.seed * 1000 + self.number)

    # -------------------------------------------------------------------------------------------- from level to level

    def _next_level(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune, rewind, restart."""
        self._log_energy(trainer)
        self._synchronize(trainer)
        weights = masked_weights(pl_module)
        masks = prune(masks_of(weights), self._scores(trainer, weights, self._score_name(weights)), self.rate)
        self._compare_ranks(trainer, masks)
        for name in empty_layers(masks):
            rank_zero_warn(f"callbacks.iterative_pruning: layer {label(name)} is empty from level {self.number + 1} on")
        if alive(masks) < len(masks):
            rank_zero_warn(f"callbacks.iterative_pruning: level {self.number + 1} has fewer weights than layers")
        if self.rewind != "lr_only":
            set_weights(pl_module, self._point["weights"])
        for weight in weights:
            weight.set_mask(masks[weight.name])
        self._initial = weights_of(pl_module)
        restart(trainer, self._point)
        self.level, self.level_start, self._ended = self.level + 1, trainer.current_epoch, False
        self._best.begin()
        self._seconds, self._since = 0.0, time.perf_counter()

    @staticmethod
    def _synchronize(trainer: pl.Trainer) -> None:
        """Make replicas equal where the strategy lets them differ between its synchronisations."""
        if synchronize := getattr(trainer.strategy, "synchronize", None):
            synchronize()

    def _compare_ranks(self, trainer: pl.Trainer, masks: Mapping[str, Tensor]) -> None:
        if trainer.world_size == 1 or not dist.is_initialized():
            return
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, checksum(masks))
        if other := [rank for rank, value in enumerate(found) if value != found[0]]:
            raise RuntimeError(
                f"level {self.number + 1}: the masks of rank {other[0]} differ from those of rank 0, so their weights "
                "differ; strategy.assert_replicas_equal_every_n_steps (sampling_parallel) finds the step"
            )

    def _log_energy(self, trainer: pl.Trainer) -> None:
        """Energy of the level that is over, unless a part of it was trained by a process that is no more."""
        epochs = range(self.level_start, self.level_start + self.history[-1]["epochs"])
        if (joules := joules_of(trainer, epochs)) is not None:
            self.history[-1]["energy_j"] = joules
            for logger in trainer.loggers:
                logger.log_metrics({"lottery/energy_j": joules}, step=trainer.global_step)

    # ---------------------------------------------------------------------------------------------------------- the end

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._over and "energy_j" not in self.history[-1]:
            self._log_energy(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        if self.figures and self.figures_dir and self.history:
            plots = {name: functools.partial(self._plot, name) for name in self.figures}
            draw(trainer, plots, self.figures_dir, "callbacks.iterative_pruning.figures")

    def _plot(self, name: str) -> Any:
        from callbacks.figures import lottery

        if name in lottery.OF_TICKETS:
            return getattr(lottery, name)(find_tickets(self.dirpath))
        return getattr(lottery, name)(self.history)

    # ----------------------------------------------------------------------------------------------------------- state

    @override
    def state_dict(self) -> dict[str, Any]:
        now = time.perf_counter()
        seconds = self._seconds if self._ended else self._seconds + now - self._since
        return {
            "settings": {name: getattr(self, name) for name in _IDENTITY},
            "level": self.level,
            "level_start": self.level_start,
            "ended": self._ended,
            "over": self._over,
            "point": self._point,
            "initial": self._initial,
            "first": self._first,
            "best": self._best.state_dict(),
            "history": self.history,
            "seconds": seconds,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, stored in state_dict["settings"].items():
            if stored != getattr(self, name):
                raise ValueError(
                    f"callbacks.iterative_pruning.{name}={getattr(self, name)}: the checkpoint is of a search with "
                    f"{name}={stored}; go on with that, or begin a new run"
                )
        self.level, self.level_start = state_dict["level"], state_dict["level_start"]
        self._ended = state_dict["ended"]
        self._point, self._initial, self._first = (state_dict[key] for key in ("point", "initial", "first"))
        self._best.load_state_dict(state_dict["best"])
        self.history, self._seconds = state_dict["history"], state_dict["seconds"]
        self._over = state_dict["over"] and self._is_last()
