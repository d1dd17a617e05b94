"""OIALR: train full rank, freeze the bases of every weight, train the square matrix between them, drop directions."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from callbacks.low_rank import Export, LowRankCallback, parse_time
from networks.low_rank import (
    Criterion,
    LayerChoice,
    LowRankWeight,
    StateMode,
    convert,
    fractions,
    kept_rank,
    num_treated,
    polar_newton_schulz,
    scaled_steps,
    stability,
    state_bytes,
    update_basis,
)
from networks.ranks_in_words import ranks_in_words

log = logging.getLogger(__name__)

Order = Literal["last_first", "first_first", "all"]

_NEAR = 10  # steps before and after an event whose losses are compared


class OIALR(LowRankCallback):
    """Orthogonality-informed adaptive low-rank training of any LightningModule (Coquelin et al., ECAI 2024).

    Until ``delay`` the network trains as it is. Then every chosen weight becomes ``U Sigma V^T``, where U and V are
    frozen and the square matrix Sigma is trained, with all biases, norms and other weights. Every ``frequency`` steps
    an SVD of Sigma turns the bases, which changes nothing in the function, and small singular values are dropped.

    Checkpoints hold the factors; any run with this callback loads them, whatever its ranks. Works with one device and
    with strategies that keep a replica on each (DDP and those with a method ``synchronize()``, which is called before
    weights are decomposed). Under AB-training events wait for the next step of a phase with whole weights; the factors
    of an AB phase are then those of Sigma.

    Logged after every validation: ``oialr/trainable_fraction``, ``stored_fraction``, ``rank_fraction`` (mean r / n) and
    ``rank/<layer>``. To the loggers at every event: ``oialr/discarded/<layer>`` (share of the squared singular values),
    ``svd_s``, ``step_s`` (median since the last event), ``optimizer_mib``, ``lr``, and ten steps later ``loss_jump``
    (mean loss after the event over that before).

    Args:
        layers: Which weights become low-rank; None: `networks.low_rank.LayerChoice` with its defaults.
        delay: When: a number of optimizer steps, ``"20 epochs"``, or ``"stability:0.95"``: each weight by itself, as
            soon as its basis has turned so little over ``stability_gap`` epochs (checked every ``frequency`` steps).
        frequency: Optimizer steps between two updates of the bases.
        beta: What an update drops. ``relative``: singular values below this share of the largest. ``energy``: this
            share of the sum of squares.
        criterion: ``relative``, the paper's, or ``energy``.
        max_drop: Largest share of a rank that one update drops.
        min_rank_fraction: Smallest rank as a share of the short side.
        progressive: The q-th update treats ``ceil(q * progressive * layers)`` layers; 1: always all.
        order: Which of them: ``last_first``, ``first_first``, or ``all``.
        opt_state: Moments of the optimizer at events: ``rotate`` with the bases, ``reset`` with their counter, or
            ``zero``, what the published program does.
        warm_rebound_steps: Steps over which the learning rate rises to its value after the conversion; 0: none.
        svd_dtype: Least precision of decompositions.
        stability_gap: Epochs between the two bases that ``delay="stability:..."`` compares.
        export: Form in which the kept checkpoint is written once more at the end: ``dense``, ``folded``,
            ``factored`` or ``none``.
        figures: Functions of `callbacks.figures.low_rank` for the end of the fit.
        figures_dir: Their folder; None: no figures.
        metric: Logged metric that figures show; None: the one that checkpoints monitor.
    """

    can_wait = True

    def __init__(
        self,
        layers: LayerChoice | None = None,
        delay: int | str = 1000,
        frequency: int = 100,
        beta: float = 0.1,
        criterion: Criterion = "relative",
        max_drop: float = 0.5,
        min_rank_fraction: float = 0.01,
        progressive: float = 0.1,
        order: Order = "last_first",
        opt_state: StateMode = "rotate",
        warm_rebound_steps: int = 0,
        svd_dtype: str = "float32",
        stability_gap: float = 5,
        export: Export = "dense",
        figures: Sequence[str] = ("ranks", "metric_and_parameters", "spectra"),
        figures_dir: str | None = None,
        metric: str | None = None,
    ) -> None:
        super().__init__("oialr", layers, opt_state, svd_dtype, export, figures, figures_dir, metric)
        self._one_of("criterion", criterion, get_args(Criterion))
        self._one_of("order", order, get_args(Order))
        for name, value, low, open_end in (
            ("beta", beta, 0.0, True),
            ("max_drop", max_drop, 0.0, True),
            ("min_rank_fraction", min_rank_fraction, 0.0, False),
            ("progressive", progressive, 0.0, False),
        ):
            if not (low <= value < 1 or (value == 1 and not open_end)):
                raise ValueError(
                    f"callbacks.oialr.{name}={value} must lie in [0, 1{')' if open_end else ']'}: it is a share."
                )
        if progressive == 0:
            raise ValueError("callbacks.oialr.progressive=0 never updates a layer; 1 updates all of them every time.")
        if frequency < 1:
            raise ValueError(f"callbacks.oialr.frequency={frequency} must be at least 1: steps between two updates.")
        if warm_rebound_steps < 0:
            raise ValueError(f"callbacks.oialr.warm_rebound_steps={warm_rebound_steps} must be at least 0.")
        if stability_gap <= 0:
            raise ValueError(f"callbacks.oialr.stability_gap={stability_gap} must be positive: epochs.")
        self.delay, self.threshold = parse_delay(delay)
        self.delay_text = str(delay)
        self.frequency, self.beta, self.criterion = frequency, beta, criterion
        self.max_drop, self.min_rank_fraction = max_drop, min_rank_fraction
        self.progressive, self.order = progressive, order
        self.warm_rebound_steps, self.stability_gap = warm_rebound_steps, stability_gap
        self._first_event: int | None = None  # step of the first conversion
        self._updates = 0
        self._checks = 0  # rounds of ``frequency`` steps after which stability was looked at
        self._bases: list[dict[str, Any]] = []  # {"step", "factors": {name: P}}, oldest first
        self._losses: deque[Tensor] = deque(maxlen=_NEAR)
        self._loss_before: Tensor | None = None
        self._step_times: list[float] = []
        self._batch_begin = 0.0
        self._hooks: list[Any] = []

    # -------------------------------------------------------------------------------------------------------- schedule

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.warm_rebound_steps:
            for optimizer in trainer.optimizers:
                self._hooks += scaled_steps(optimizer, lambda: self._rebound(trainer.global_step))

    def _rebound(self, step: int) -> float:
        if self._first_event is None:
            return 1.0
        return min(1.0, (step - self._first_event + 1) / (self.warm_rebound_steps + 1))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        steps, epochs = trainer.estimated_stepping_batches, trainer.max_epochs
        too_late = (self.delay == "steps" and self.threshold >= steps) or (
            self.delay == "epochs" and epochs not in (None, -1) and self.threshold >= epochs
        )
        if too_late and self._first_event is None:
            rank_zero_warn(
                f"callbacks.oialr.delay={self.delay_text!r}: this run ends after {steps} steps ({epochs} epochs), "
                "so no layer will ever be low-rank; lower the delay or train longer."
            )

    @override
    def on_steps(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, epochs: int) -> None:
        if not self._whole(trainer):
            return  # what is due waits
        due = [w for w in self._due(trainer, step, epochs) if not w.converted]
        treated: list[LowRankWeight] = []
        if self._first_event is not None and step > self._first_event:
            if (step - self._first_event) // self.frequency > self._updates:
                self._updates = (step - self._first_event) // self.frequency
                treated = [w for w in self._treated(self._updates) if w.converted]
        elif self._first_event is None and due:
            self._first_event = step
        if due or treated:
            self._event(trainer, pl_module, due, treated)

    def _due(self, trainer: pl.Trainer, step: int, epochs: int) -> list[LowRankWeight]:
        """Weights whose time has come to be converted."""
        if all(w.converted for w in self.weights):
            return []
        if self.delay == "stability":
            if step // self.frequency <= self._checks:
                return []
            self._checks = step // self.frequency
            return self._stable(trainer, step)
        now = step if self.delay == "steps" else epochs
        return self.weights if now >= self.threshold and self._first_event is None else []

    def _treated(self, update: int) -> list[LowRankWeight]:
        """The layers that the update with this number (from 1) treats."""
        if self.order == "all":
            return self.weights
        count = num_treated(update, self.progressive, len(self.weights))
        return self.weights[-count:] if self.order == "last_first" else self.weights[:count]

    def _stable(self, trainer: pl.Trainer, step: int) -> list[LowRankWeight]:
        """Dense weights whose basis has turned little since one that is ``stability_gap`` epochs old."""
        dense = [w for w in self.weights if not w.converted]
        gap = self.stability_gap * trainer.num_training_batches / trainer.accumulate_grad_batches
        old_enough = [entry for entry in self._bases if step - entry["step"] >= gap]
        self._synchronize(trainer)
        now = {w.name: polar_newton_schulz(w.matrix()).cpu() for w in dense}
        values: dict[str, float] = {}
        if old_enough:
            before = old_enough[-1]["factors"]
            values = {w.name: stability(before[w.name], now[w.name]) for w in dense}
            values = trainer.strategy.broadcast(values)  # one decision, also where ranks round differently
            self._log_now(trainer, {f"oialr/stability/{w.label}": values[w.name] for w in dense})
            self._bases = [entry for entry in self._bases if entry["step"] >= old_enough[-1]["step"]]
        # A handful of snapshots bounds the memory; a comparison is at most a quarter older than asked for.
        if not self._bases or step - self._bases[-1]["step"] >= gap / 4:
            self._bases.append({"step": step, "factors": now})
        return [w for w in dense if values.get(w.name, -1.0) >= self.threshold]

    # ---------------------------------------------------------------------------------------------------------- events

    def _event(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, due: list[LowRankWeight], treated: list[LowRankWeight]
    ) -> None:
        self._synchronize(trainer)
        before = {id(w.trained) for w in (*due, *treated)}
        begin = time.perf_counter()
        decompositions = self._decomposed([w.matrix() for w in due] + [w.sigma.detach() for w in treated])
        seconds = time.perf_counter() - begin
        values: dict[str, float] = {}
        for weight, decomposition in zip(due, decompositions[: len(due)], strict=True):
            if self._finite(weight, decomposition[1]):
                convert(weight, decomposition, trainer.optimizers, self.opt_state)
                self.history["spectra"].setdefault(weight.label, {})["before"] = decomposition[1].tolist()
        for weight, decomposition in zip(treated, decompositions[len(due) :], strict=True):
            s = decomposition[1]
            if not self._finite(weight, s):
                continue
            rank = kept_rank(s, weight.n, self.beta, self.criterion, self.max_drop, self.min_rank_fraction)
            update_basis(weight, decomposition, rank, trainer.optimizers, self.opt_state)
            total = float(s.double().square().sum())
            dropped = float(s[rank:].double().square().sum()) / total if total else 0.0
            values[f"oialr/discarded/{weight.label}"] = dropped
            self.history["spectra"].setdefault(weight.label, {})["after"] = s[:rank].tolist()
        self._forget_bases()
        if before != {id(w.trained) for w in (*due, *treated)}:
            self._rewrap(trainer)
        self._tell(trainer)
        self._report(trainer, pl_module, due, treated, values | {"oialr/svd_s": seconds})

    def _forget_bases(self) -> None:
        """Of weights that are converted: nobody compares them any more, and checkpoints hold them."""
        dense = {w.name for w in self.weights if not w.converted}
        kept = [{**e, "factors": {n: p for n, p in e["factors"].items() if n in dense}} for e in self._bases]
        self._bases = [entry for entry in kept if entry["factors"]]

    def _finite(self, weight: LowRankWeight, singular_values: Tensor) -> bool:
        if bool(singular_values.isfinite().all()):
            return True
        what = "Sigma" if weight.converted else "weight"
        rank_zero_warn(
            f"callbacks.oialr: the {what} of {weight.label} is not finite; it keeps its last basis and rank. The "
            "training diverges: lower the learning rate, or clip gradients (trainer.gradient_clip_val)."
        )
        return False

    def _report(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        due: list[LowRankWeight],
        treated: list[LowRankWeight],
        values: dict[str, float],
    ) -> None:
        trainable, stored = fractions(pl_module)
        if self._losses:
            self._loss_before = torch.stack(list(self._losses)).mean()
            self._losses.clear()
        values |= {"oialr/trainable_fraction": trainable, "oialr/stored_fraction": stored}
        values["oialr/optimizer_mib"] = state_bytes(trainer.optimizers) / 2**20
        values["oialr/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        if self._step_times:
            values["oialr/step_s"] = statistics.median(self._step_times)
            self._step_times = []
        self._log_now(trainer, values)
        if not trainer.is_global_zero:
            return
        if due:
            log.info(
                "optimizer step %d: %d of %d layers are low-rank now, %.1f %% of the parameters train",
                trainer.global_step,
                sum(w.converted for w in self.weights),
                len(self.weights),
                100 * trainable,
            )
        if treated:
            ranks = ranks_in_words([(w.label, w.rank, w.n) for w in self.weights])
            log.info(
                "optimizer step %d: %s; %.1f %% of the parameters train", trainer.global_step, ranks, 100 * trainable
            )

    def _log_now(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        """To the loggers alone: times differ between equal runs, and events are not epochs."""
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._batch_begin = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step_times.append(time.perf_counter() - self._batch_begin)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())
            if self._loss_before is not None and len(self._losses) == _NEAR:
                jump = torch.stack(list(self._losses)).mean() / self._loss_before
                self._log_now(trainer, {"oialr/loss_jump": float(jump)})
                self._loss_before = None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._first_event is None and not trainer.fast_dev_run:
            rank_zero_warn(
                f"callbacks.oialr.delay={self.delay_text!r}: no layer became low-rank in this run of "
                f"{trainer.global_step} steps; lower the delay or the stability that it asks for."
            )
        super().on_fit_end(trainer, pl_module)

    # ----------------------------------------------------------------------------------------------------------- state

    @override
    def state_dict(self) -> dict[str, Any]:
        own = {"first_event": self._first_event, "updates": self._updates, "bases": self._bases, "checks": self._checks}
        return super().state_dict() | own

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._first_event, self._updates = state_dict["first_event"], state_dict["updates"]
        self._bases = state_dict["bases"]
        self._checks = state_dict.get("checks", self._handled_step // self.frequency)  # older checkpoints lack it

    @override
    def _unhook(self, pl_module: pl.LightningModule) -> None:
        super()._unhook(pl_module)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def parse_delay(delay: int | str) -> tuple[Literal["steps", "epochs", "stability"], float]:
    """What a delay counts and how much of it: ``2500``, ``"20 epochs"``, ``"stability:0.95"``.

    Raises:
        ValueError: It is neither.
    """
    if not str(delay).startswith("stability:"):
        return parse_time("callbacks.oialr.delay", delay, "or a stability ('stability:0.95')")
    try:
        threshold = float(str(delay).removeprefix("stability:"))
    except ValueError:
        threshold = math.nan
    if not 0 < threshold < 1:
        raise ValueError(
            f"callbacks.oialr.delay={delay!r}: the stability must be a number between 0 and 1, for example "
            "'stability:0.95'."
        )
    return "stability", threshold
