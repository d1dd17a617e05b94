"""What callbacks that make weights low-rank during training share: choice, distribution, checkpoints, export."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from callbacks.figures.callback import hand_over
from callbacks.replaced_weights import refuse_replaced_weights
from networks.low_rank import (
    ForwardOrder,
    LayerChoice,
    LowRankWeight,
    StateMode,
    decompose,
    exported,
    factored_weights,
    fractions,
    parameter_names,
    rebuild,
    regroup,
    structure,
)

log = logging.getLogger(__name__)

Export = Literal["dense", "folded", "factored", "none"]
Decomposition = tuple[Tensor, Tensor, Tensor]

# They keep parts of a weight on each rank, so that no rank could decompose it.
_SHARDED = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}


class LowRankCallback(pl.Callback):
    """Chooses weights, changes their form while a fit runs, and makes checkpoints of any form loadable.

    Args:
        key: Name of the callback in configurations (``callbacks.<key>``) and in front of logged values.
        layers: Which weights; None: `networks.low_rank.LayerChoice` with its defaults.
        opt_state: What happens to an optimizer's state (`networks.low_rank.optimizer_state`).
        svd_dtype: Least precision of decompositions, ``float32`` or ``float64``.
        export: Form in which the run's checkpoint (that of the first checkpoint callback) is written once more when the
            fit ends, beside it, as ``<name>_<form>.ckpt``; ``none`` writes nothing.
        figures: Functions of `callbacks.figures.low_rank` that draw the history at the end of the fit.
        figures_dir: Folder of the figures; None draws nothing.
        metric: Name of the logged metric that figures show; None: what the checkpoint callback monitors.
    """

    # Whether events may come later, when a strategy that replaces weights itself has them whole (AB-training).
    can_wait: ClassVar[bool] = False

    def __init__(
        self,
        key: str,
        layers: LayerChoice | None,
        opt_state: StateMode,
        svd_dtype: str,
        export: Export,
        figures: Sequence[str],
        figures_dir: str | None,
        metric: str | None,
    ) -> None:
        self.key, self.layers = key, layers or LayerChoice()
        self._one_of("opt_state", opt_state, get_args(StateMode))
        self._one_of("svd_dtype", svd_dtype, ("float32", "float64"))
        self._one_of("export", export, get_args(Export))
        self.opt_state, self.export = opt_state, export
        self.svd_dtype: torch.dtype = getattr(torch, svd_dtype)
        self.figures, self.figures_dir, self.metric = tuple(figures), figures_dir, metric
        self.weights: list[LowRankWeight] = []
        self.history: dict[str, Any] = {"rows": [], "spectra": {}, "sides": {}}
        self._order: list[str] | None = None
        self._recorder: ForwardOrder | None = None
        self._handled_step = -1  # the last optimizer step after which events were looked for
        self._names: list[Any] | None = None  # of the optimizers' parameters, from a checkpoint
        self._hooked = False  # whether the module's on_load_checkpoint is ours
        self._own_hook: Callable[..., None] | None = None  # what the module had in its place

    def _one_of(self, name: str, value: Any, allowed: Sequence[Any]) -> None:
        if value not in allowed:
            raise ValueError(
                f"callbacks.{self.key}.{name}={value!r} is unknown; choose one of {', '.join(map(str, allowed))}."
            )

    # ------------------------------------------------------------------------------------------------- what it acts on

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if others := [c.key for c in trainer.callbacks if isinstance(c, LowRankCallback) and c is not self]:
            raise ValueError(
                f"callbacks.{self.key}: callbacks.{others[0]} changes the form of weights as well; keep one of the two."
            )
        if self._hooked:
            return
        # Lightning calls the module's hook before it loads the weights, and the callbacks' after that: too late to
        # make room for factors of other ranks.
        self._hooked, self._own_hook = True, pl_module.__dict__.get("on_load_checkpoint")
        inner = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            low_rank = checkpoint.get("low_rank", {})
            rebuild(pl_module, low_rank.get("layers", []))
            self._names = low_rank.get("optimizer_names")
            inner(checkpoint)

        pl_module.on_load_checkpoint = on_load_checkpoint

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_shards(trainer)
        try:
            self.weights = self.layers(pl_module, self._order)
        except ValueError as error:
            raise ValueError(f"callbacks.{self.key}.{error}") from None
        if self._names is not None:  # the optimizers are new, their state is about to be restored
            regroup(pl_module, trainer.optimizers, self._names)
            self._names = None
        else:
            self._drop_frozen_bases(trainer, pl_module)

    def _refuse_shards(self, trainer: pl.Trainer) -> None:
        strategy = trainer.strategy
        names = {kind.__name__ for kind in type(strategy).__mro__}
        replicated = trainer.world_size == 1 or isinstance(strategy, DDPStrategy) or hasattr(strategy, "synchronize")
        if names & _SHARDED or not replicated:
            raise ValueError(
                f"callbacks.{self.key}: {type(strategy).__name__} does not keep whole weights on every rank, which a "
                "decomposition needs; choose strategy=auto or another data-parallel one."
            )
        if not (self.can_wait and hasattr(strategy, "weights_are_whole")):
            refuse_replaced_weights(trainer, self.key)
        elif getattr(strategy, "full_steps", 1) == 0:
            raise ValueError(
                f"strategy.full_steps=0 leaves no step with whole weights, in which callbacks.{self.key} could act: 1 "
                "or more"
            )
        module = trainer.lightning_module
        if getattr(module, "needs_plain_weights", False):
            raise ValueError(
                f"callbacks.{self.key}: {type(module).__name__} joins weights of several networks, which low-rank "
                "factors would replace: leave the callback out, or train the networks with it first and join them later"
            )
        for optimizer in trainer.optimizers:
            if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
                raise ValueError(
                    f"callbacks.{self.key}: ZeroRedundancyOptimizer keeps the state of a weight on one rank, and "
                    "weights change their shape; choose a plain optimizer (optimizer=adamw)."
                )

    @staticmethod
    def _drop_frozen_bases(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A network that was factored before this fit gave U and V to the optimizer, which never step."""
        frozen = {id(t) for w in factored_weights(pl_module) for t in (w.u, w.v) if not t.requires_grad}
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            group["params"] = [p for p in group["params"] if id(p) not in frozen]

    # ------------------------------------------------------------------------------------------------------- the clock

    def on_steps(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, epochs: int) -> None:
        """Act after the optimizer's step number ``step``; ``epochs`` are complete, the running one if it ends here."""
        raise NotImplementedError

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A checkpoint may have been saved between the step and our hook; step 0 comes before every batch.
        if trainer.global_step != self._handled_step:
            self._handle(trainer, pl_module, trainer.current_epoch)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._order is None and self._recorder is None:
            self._recorder = ForwardOrder(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._recorder is not None and self._whole(trainer):
            self._order = self._recorder.stop()
            self._recorder = None
            self.weights = self.layers(pl_module, self._order)
        if trainer.global_step != self._handled_step:  # not in the middle of accumulated gradients
            self._handle(trainer, pl_module, trainer.current_epoch + int(trainer.is_last_batch))

    def _handle(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epochs: int) -> None:
        self.on_steps(trainer, pl_module, trainer.global_step, epochs)
        self._handled_step = trainer.global_step

    # ---------------------------------------------------------------------------------------------------- distribution

    @staticmethod
    def _whole(trainer: pl.Trainer) -> bool:
        """Whether every weight stands in its place now; a strategy may train others instead for some time."""
        return getattr(trainer.strategy, "weights_are_whole", True)

    def _synchronize(self, trainer: pl.Trainer) -> None:
        """Make replicas equal where the strategy lets them differ between its synchronisations."""
        if synchronize := getattr(trainer.strategy, "synchronize", None):
            synchronize()

    def _decomposed(self, matrices: Sequence[Tensor]) -> list[Decomposition]:
        """SVDs of the matrices, the same on all ranks; the ranks take turns and exchange everything at once.

        Matrix q is decomposed by rank ``q mod world``. The results lie in one flat tensor that is zero where another
        rank has worked, so that one sum brings all of them to all ranks, bit for bit.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1) or not matrices:
            return [decompose(matrix, self.svd_dtype) for matrix in matrices]
        world, rank = dist.get_world_size(), dist.get_rank()
        work = max((torch.promote_types(m.dtype, self.svd_dtype) for m in matrices), key=lambda t: t.itemsize)
        shapes = []
        for m, n in (matrix.shape for matrix in matrices):
            r = min(m, n)
            shapes.append(((m, r), (r,), (n, r)))
        sizes = [[math.prod(shape) for shape in three] for three in shapes]
        flat = torch.zeros(sum(map(sum, sizes)), dtype=work, device=matrices[0].device)
        parts = [part.split(three) for part, three in zip(flat.split([sum(s) for s in sizes]), sizes, strict=True)]
        for q in range(rank, len(matrices), world):
            for part, value in zip(parts[q], decompose(matrices[q], work), strict=True):
                part.copy_(value.flatten())
        dist.all_reduce(flat)
        return [
            tuple(part.view(shape) for part, shape in zip(three, shape3, strict=True))
            for three, shape3 in zip(parts, shapes, strict=True)
        ]

    @staticmethod
    def _tell(trainer: pl.Trainer) -> None:
        """Let a strategy forget what it remembers of the weights before: their numbers mean something else now."""
        if forget := getattr(trainer.strategy, "parameters_changed", None):
            forget()

    @staticmethod
    def _rewrap(trainer: pl.Trainer) -> None:
        """Build DistributedDataParallel anew, which keeps a list of parameters and the sizes of its buckets."""
        strategy = trainer.strategy
        if isinstance(strategy.model, DistributedDataParallel):
            strategy.model._remove_autograd_hooks()  # parameters that stay would report to the old one as well
            strategy.model = strategy.lightning_module
            strategy.configure_ddp()

    # ------------------------------------------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"handled_step": self._handled_step, "order": self._order, "history": self.history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._handled_step, self._order = state_dict["handled_step"], state_dict["order"]
        self.history = state_dict["history"]

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        names = parameter_names(pl_module, trainer.optimizers, getattr(trainer.strategy, "stand_ins", None))
        checkpoint["low_rank"] = {"layers": structure(pl_module), "optimizer_names": names}

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        self._draw(trainer)
        if self.export == "none":
            return
        path = Path(getattr(trainer.checkpoint_callback, "best_model_path", "") or "none")
        if path.is_file():
            target = path.with_name(f"{path.stem}_{self.export}{path.suffix}")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            torch.save(exported(checkpoint, self.export), target)
            log.info("exported %s", target)

    def _unhook(self, pl_module: pl.LightningModule) -> None:
        if self._hooked:
            del pl_module.on_load_checkpoint
            if self._own_hook is not None:
                pl_module.on_load_checkpoint = self._own_hook
            self._hooked, self._own_hook = False, None
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._unhook(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._unhook(pl_module)

    # ---------------------------------------------------------------------------------------------------------- logging

    def _epoch_values(self, pl_module: pl.LightningModule) -> dict[str, float]:
        """What is logged after every validation."""
        trainable, stored = fractions(pl_module)
        values = {f"{self.key}/trainable_fraction": trainable, f"{self.key}/stored_fraction": stored}
        shares = [w.rank / w.n for w in self.weights]
        values[f"{self.key}/rank_fraction"] = sum(shares) / max(len(shares), 1)
        return values | {f"{self.key}/rank/{w.label}": float(w.rank) for w in self.weights}

    def _end_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, value in self._epoch_values(pl_module).items():
            log_exact(pl_module, name, value)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._end_epoch(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The metrics of this validation are known only now; checkpoints are saved after this hook.
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._note_epoch(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rows = self.history["rows"]
        if not rows or rows[-1]["epoch"] != trainer.current_epoch + 1:  # an epoch without a validation
            self._end_epoch(trainer, pl_module)
            self._note_epoch(trainer, pl_module)

    def _note_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        name = self.metric or getattr(trainer.checkpoint_callback, "monitor", None) or "val/loss"
        value = trainer.callback_metrics.get(name)
        trainable, stored = fractions(pl_module)
        self.history["sides"] = {w.label: [w.m, w.n] for w in self.weights}
        self.history["rows"].append(
            {
                "epoch": trainer.current_epoch + 1,
                "step": trainer.global_step,
                "metric": None if value is None else float(value),
                "metric_name": name,
                "trainable": trainable,
                "stored": stored,
                "ranks": {w.label: w.rank for w in self.weights},
            }
        )

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, value in zip(("trainable", "stored"), fractions(pl_module), strict=True):
            log_exact(pl_module, f"test/{name}_fraction", value)

    def _draw(self, trainer: pl.Trainer) -> None:
        if self.figures and self.figures_dir:
            from callbacks.figures import low_rank

            plots = {name: lambda name=name: getattr(low_rank, name)(self.history) for name in self.figures}
            draw(trainer, plots, self.figures_dir, f"callbacks.{self.key}.figures")


def log_exact(pl_module: pl.LightningModule, name: str, value: float) -> None:
    """Log a number that is already equal on all ranks."""
    pl_module.log(name, value, batch_size=1, sync_dist=True, rank_zero_only=True)


def draw(trainer: pl.Trainer, plots: dict[str, Callable[[], Any]], folder: str | Path, key: str) -> None:
    """Write PNGs and hand them to the loggers; a plot that has nothing to show gives None, one that fails a warning."""
    for name, plot in plots.items():
        try:
            if (figure := plot()) is None:
                continue
            Path(folder).mkdir(parents=True, exist_ok=True)
            path = Path(folder) / f"{name}.png"
            figure.savefig(path, dpi=150)
            for logger in trainer.loggers:
                hand_over(logger, f"figures/{name}", figure, [path], trainer.global_step)
        except Exception as error:  # figures never cost a run its results
            rank_zero_warn(f"{key}: figure {name!r} was not drawn: {type(error).__name__}: {error}")


def parse_time(key: str, value: int | str, otherwise: str = "") -> tuple[Literal["steps", "epochs"], int]:
    """A moment of training as ``("steps", 2500)`` or ``("epochs", 20)``.

    Args:
        key: Name of the setting, for the message.
        value: Optimizer steps (``2500``) or ``"20 epochs"``.
        otherwise: What else the setting may be.

    Raises:
        ValueError: It is neither.
    """
    number, _, unit = str(value).strip().partition(" ")
    if not number.isdecimal() or unit.strip() not in ("", "step", "steps", "epoch", "epochs"):
        raise ValueError(
            f"{key}={value!r} is unknown; give optimizer steps (2500), epochs ('20 epochs') {otherwise}".rstrip() + "."
        )
    return "epochs" if unit.strip().startswith("epoch") else "steps", int(number)
