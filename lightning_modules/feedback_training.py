"""F3 and its relatives behind one switch: training by fixed random feedback, and by backpropagation, of any task.

Flügel, Coquelin, Weiel, Debus, Streit and Götz, "Feed-Forward Optimization With Delayed Feedback for Neural Network
Training", arXiv 2304.13372.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.block_steps import BlockSteps
from lightning_modules.supervised import Supervised
from networks.feedback import (
    BlockChain,
    ErrorStore,
    FeedbackWeights,
    Objective,
    RandomBackward,
    blocks_of,
    error,
    is_delayed,
    signal,
)
from networks.feedback.diagnosis import alignments, cosine, norm, staleness
from networks.feedback.error_store import StoreType
from networks.feedback.learning import Apply, Gradients, Surrogate
from networks.feedback.objectives import ErrorInfo, ObjectiveName

Batch = dict[str, Tensor]
Algorithm = Literal[
    "bp", "llo", "fa", "dfa", "drtp", "f3", "delayed_error", "delayed_loss", "delayed_error_softmax",
    "delayed_loss_softmax", "delayed_error_one_hot", "delayed_loss_one_hot", "zeros",
]  # fmt: skip
Schedule = Literal["in_forward", "one_shot"]
Scale = Literal["none", "batch", "batch_outputs"]

_THROUGH_ALL = ("bp", "fa")  # gradients pass through the whole network
_WITH_FEEDBACK = ("dfa", "drtp", "f3")


class FeedbackTraining(Supervised):
    """Training of a chain of blocks, with or without a backward pass through it; its subclasses know the task.

    ======== ================================================================================================
    bp       backpropagation
    llo      only the last block learns
    fa       feedback alignment: backward weights of linear and convolutional layers are fixed and random
    dfa      direct feedback alignment: each block gets (fixed random matrix) x (error of this sample, now)
    drtp     direct random target projection: the target in place of the error
    f3       the error of this sample in the epoch before, in one of the forms of ``error_info``
    ======== ================================================================================================

    Names of delayed signals (``delayed_error``, ..., and ``zeros``) are algorithms as well: f3 with that
    ``error_info``.

    Within a block gradients are exact. With drtp and f3 what a block is told is known before the forward pass: under
    ``schedule=in_forward`` each block is updated right after its own forward pass and its activations are dropped. dfa
    waits for the output of the network and so always runs in one shot.

    Args:
        net: Any network that `networks.feedback.blocks_of` can cut; maps to raw outputs (batch, num_outputs).
        optimizer: Partial that takes the parameters. None: the module can only be evaluated.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        algorithm: One of the table.
        error_info: What f3 multiplies the feedback weights by (`networks.feedback.objectives`): ``delayed_error``,
            ``delayed_loss``, either with ``_softmax`` or ``_one_hot``, ``zeros``, and, for comparison,
            ``one_hot_target`` (drtp) and ``current_error`` (dfa). ``auto``: ``delayed_error_one_hot`` with sigmoids,
            ``delayed_error_softmax`` with raw numbers of classes, ``delayed_error`` for values.
        feedback: How feedback weights are drawn; None: trinomial.
        schedule: ``in_forward``, or ``one_shot``: all blocks are updated after a whole forward pass with its graph.
            Weights are the same, bit for bit.
        objective: ``sigmoid_bce``, ``softmax_nll`` or ``mse`` (`networks.feedback.Objective`).
        input_shape: Of one sample.
        num_outputs: C.
        boundaries: Numbers of the blocks of the network at which to cut; None: at all.
        grad_scale: What feedback is divided by: ``none``, the ``batch`` size, or that times C (``batch_outputs``).
            Adam does not care; with SGD hidden blocks of ``none`` take steps about N C times those of backpropagation.
        error_sign: 1: errors are target minus output, as in the paper; -1: the other way round.
        store_dtype: Type of the stored errors.
        num_train: Training samples, which the error store has rows for; None: the DataModule is asked.
        accumulate_batches: Batches of an optimizer step (the Trainer cannot do it where modules step by themselves).
        clip_norm: Largest norm of the gradient of a block; None: not clipped.
        learning_rates: Learning rates by algorithm, in place of the optimizer's, for those that need another one.
        scheduler_monitor: Metric given to schedulers that watch one.
        scheduler_interval: When the scheduler steps, after each ``epoch`` or each ``step``.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    objects: ClassVar[tuple[str, ...]] = ("net", "optimizer", "scheduler", "feedback")

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        algorithm: Algorithm = "f3",
        error_info: ErrorInfo | Literal["auto"] = "auto",
        feedback: FeedbackWeights | None = None,
        schedule: Schedule = "in_forward",
        objective: ObjectiveName = "sigmoid_bce",
        input_shape: Sequence[int] = (1, 8, 8),
        num_outputs: int = 10,
        boundaries: Sequence[int] | None = None,
        grad_scale: Scale = "none",
        error_sign: Literal[1, -1] = 1,
        store_dtype: StoreType = "float32",
        num_train: int | None = None,
        accumulate_batches: int = 1,
        clip_norm: float | None = None,
        learning_rates: Mapping[str, float] | None = None,
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        if (
            algorithm in get_args(ErrorInfo)
            and algorithm in get_args(Algorithm)
            and error_info not in ("auto", algorithm)
        ):
            raise ValueError(
                f"model.algorithm={algorithm} and model.error_info={error_info} contradict each other: set "
                "model.error_info=auto"
            )
        choices: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "algorithm": (algorithm, get_args(Algorithm)), "schedule": (schedule, get_args(Schedule)),
            "error_info": (error_info, (*get_args(ErrorInfo), "auto")), "grad_scale": (grad_scale, get_args(Scale)),
            "error_sign": (error_sign, (1, -1)),
        }  # fmt: skip
        for key, (value, allowed) in choices.items():
            if value not in allowed:
                known = ", ".join(map(str, allowed))
                raise ValueError(f"model.{key}={value!r} is unknown; choose one of {known}")
        for key, value in (("accumulate_batches", accumulate_batches), ("num_train", num_train)):
            if value is not None and value < 1:
                raise ValueError(f"model.{key}={value}: must be at least 1")
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"model.clip_norm={clip_norm}: must be positive, or null")
        if unknown := sorted(set(learning_rates or {}) - set(get_args(Algorithm))):
            raise ValueError(
                f"model.learning_rates.{unknown[0]}: is no algorithm; choose from {', '.join(get_args(Algorithm))}"
            )
        super().__init__(net, optimizer, scheduler, scheduler_monitor, scheduler_interval)
        self.save_hyperparameters(ignore=list(self.objects))
        self.automatic_optimization = False
        self.objective = Objective(objective)
        rates = learning_rates or {}
        self.learning_rate = rates.get(algorithm)
        if algorithm in get_args(ErrorInfo):
            self.learning_rate = rates.get(algorithm, rates.get("f3"))
            algorithm, error_info = "f3", algorithm
        self.algorithm, self.schedule = algorithm, schedule
        self.error_info = self._error_info(error_info)
        self.num_outputs, self.grad_scale, self.error_sign = num_outputs, grad_scale, error_sign
        self.num_train, self.accumulate_batches = num_train, accumulate_batches
        self.chain = BlockChain(blocks_of(net, boundaries), self.objective)
        if algorithm in _WITH_FEEDBACK and not self.chain.last:
            raise ValueError(
                f"model.algorithm={algorithm}: the network is one block, which learns from its own loss; there is "
                "nobody to give feedback to (model.boundaries, model.net.depth)"
            )
        self._steps = BlockSteps(self, self.chain.parameters, accumulate_batches, clip_norm)
        feedback = feedback or FeedbackWeights()
        sizes = self._sizes(input_shape) if algorithm in _WITH_FEEDBACK else []
        self.feedback_weights = feedback.draw(num_outputs, sizes)
        self.backward_weights = RandomBackward(net, feedback.seed) if algorithm == "fa" else None
        self.errors = ErrorStore(0, num_outputs, store_dtype) if is_delayed(self.error_info) else None
        self._store_dtype: StoreType = store_dtype
        self._warn()

    def _error_info(self, chosen: ErrorInfo | Literal["auto"]) -> ErrorInfo:
        """What is multiplied by the feedback weights; ``zeros`` where there are none."""
        if self.algorithm == "f3":
            return self.objective.best_error_info() if chosen == "auto" else chosen
        return {"drtp": "one_hot_target", "dfa": "current_error"}.get(self.algorithm, "zeros")

    def _sizes(self, input_shape: Sequence[int]) -> list[int]:
        """Features of the hidden blocks, found by showing the network zeros."""
        was_training = self.net.training
        self.net.eval()
        try:
            dtype = next((p.dtype for p in self.net.parameters()), None)
            return self.chain.sizes(torch.zeros(2, *input_shape, dtype=dtype))
        except RuntimeError as problem:
            raise ValueError(
                f"model.input_shape={list(input_shape)} does not fit the network ({problem}); give that of one sample"
            ) from problem
        finally:
            self.net.train(was_training)

    def _warn(self) -> None:
        kind = getattr(self.make_optimizer, "func", None)
        if kind is torch.optim.SGD and self.algorithm in _WITH_FEEDBACK and self.grad_scale == "none":
            rank_zero_warn(
                "SGD with model.grad_scale=none: the gradients of hidden blocks are sums over the batch, about "
                "(batch size x outputs) times those of backpropagation; use model.grad_scale=batch_outputs, or Adam"
            )
        if self.error_info == "current_error" and self.schedule == "in_forward":
            rank_zero_info(
                "the error of the current batch is known after the forward pass: blocks cannot be updated within it "
                "(update locking), model.schedule=one_shot is used"
            )

    # -------------------------------------------------------------------------------------------------------- the task

    def sample(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Inputs (batch, ...) and targets (batch, C) as numbers; classes are one-hot."""
        raise NotImplementedError

    def note(self, raw: Tensor, batch: Batch) -> None:
        """See what the network gave in training, for metrics."""

    # ------------------------------------------------------------------------------------------------------ the set-up

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "trainer.precision=16-mixed scales one loss of the whole network, but blocks are updated one by one: "
                "use bf16-mixed"
            )
        group = getattr(self.trainer.strategy, "gradient_group", None)
        if self.trainer.world_size > 1 and group is None:
            raise ValueError("blocks are averaged over processes by strategy=ddp; choose it")
        if self.errors is not None and not len(self.errors):
            self.errors = ErrorStore(self._count(), self.num_outputs, self._store_dtype).to(self.device)

    def _count(self) -> int:
        """Training samples."""
        if self.num_train is not None:
            return self.num_train
        data = self.trainer.datamodule
        try:
            return len(data.train_dataloader().dataset)
        except (AttributeError, TypeError) as problem:
            raise ValueError(
                "F3 keeps the error of every training sample and must know how many there are: set model.num_train"
            ) from problem

    @override
    def configure_optimizers(self) -> Any:
        if self.learning_rate is None or self.make_optimizer is None:
            return super().configure_optimizers()
        make = self.make_optimizer
        self.make_optimizer = lambda parameters: make(parameters, lr=self.learning_rate)
        try:
            return super().configure_optimizers()
        finally:
            self.make_optimizer = make

    # -------------------------------------------------------------------------------------------------------- learning

    @property
    def replicas(self) -> int:
        """Processes that share a batch."""
        group = getattr(self._trainer.strategy, "gradient_group", None) if self._trainer is not None else None
        return 1 if group is None else group.size

    def _index(self, batch: Batch) -> Tensor:
        if "index" not in batch:
            raise ValueError(
                "F3 needs batches with 'index', the number of every sample in the training part, beside inputs and "
                "targets"
            )
        return batch["index"]

    def _surrogate(self, told: Tensor) -> Surrogate:
        """Gradients of hidden blocks from what they are told, (batch, C)."""
        divisor = 1.0 if self.grad_scale == "none" else len(told) * self.replicas * self.accumulate_batches
        if self.grad_scale == "batch_outputs":
            divisor *= self.num_outputs
        told = told * (self.error_sign / divisor)

        def surrogate(block: int, h: Tensor) -> Tensor:
            return self.feedback_weights[block](told).view(h.shape).to(h.dtype)

        return surrogate

    def _told(self, target: Tensor, batch: Batch) -> Tensor:
        """What hidden blocks are told, of signals that are known before the forward pass."""
        remembered = self.errors.read(self._index(batch), target) if self.errors is not None else None
        return signal(self.error_info, target, remembered)

    def _error_now(self, raw: Tensor, target: Tensor) -> Tensor:
        info = self.error_info
        if info == "current_error" and self.objective.name == "softmax_nll":
            info = "delayed_error_softmax"  # raw numbers are no probabilities to subtract from a target
        return error(info, self.objective, raw, target, self.replicas)

    @property
    def _together(self) -> bool:
        """Whether all blocks are updated at the end of a batch."""
        if self.algorithm in _THROUGH_ALL or self.error_info == "current_error":
            return True
        return self.schedule == "one_shot"

    def gradients(self, batch: Batch, apply: Apply) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of every block by the chosen algorithm.

        Args:
            batch: Of the DataModule.
            apply: Gets the gradients of a block as soon as they are known.

        Returns:
            What the network gives (batch, C), the loss, and the targets (batch, C).
        """
        x, target = self.sample(batch)
        if self.algorithm == "fa":
            with self.backward_weights.of(self.net):
                found = self.chain.backpropagate(x, target, apply)
        elif self.algorithm == "bp":
            found = self.chain.backpropagate(x, target, apply)
        elif self.algorithm == "llo":
            found = self.chain.in_forward(x, target, None, apply)
        elif self.error_info == "current_error":
            found = self.chain.one_shot(x, target, lambda raw: self._surrogate(self._error_now(raw, target)), apply)
        elif self.schedule == "one_shot":
            surrogate = self._surrogate(self._told(target, batch))
            found = self.chain.one_shot(x, target, lambda _: surrogate, apply)
        else:
            found = self.chain.in_forward(x, target, self._surrogate(self._told(target, batch)), apply)
        return *found, target

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        if self.errors is not None and (self.device.type == "cpu" or not batch_idx):
            self.errors.check(self._index(batch))
        steps = self._steps
        steps.begin(self.trainer.is_last_batch, self._together)
        exact = self.algorithm in _THROUGH_ALL

        def apply(block: int, found: Gradients) -> None:
            steps.take(block, found, mean=exact or block == self.chain.last)

        raw, loss, target = self.gradients(batch, apply)
        steps.finish()
        if self.errors is not None:
            self.errors.write(batch["index"], self._error_now(raw, target))
            if self.trainer.is_last_batch:  # before a validation looks, and a checkpoint is written
                self.errors.merge(self._gathered)
        self._step_schedulers()
        self._add_to_epoch("loss", loss.double() * len(target), len(target))
        self.note(raw, batch)
        return {"loss": loss}

    def _step_schedulers(self) -> None:
        """Whoever steps the optimizer steps its scheduler; that of a metric waits for the validation."""
        scheduler: Any = self.lr_schedulers()
        if scheduler is None or isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            return
        if self._steps.stepped if self.scheduler_interval == "step" else self.trainer.is_last_batch:
            scheduler.step()

    def _gathered(self, mine: Tensor) -> list[Tensor]:
        """A tensor of every rank that shares the data, of equal shapes but for the length."""
        strategy = self.trainer.strategy
        group = getattr(strategy, "gradient_group", None)
        if group is None or group.size < 2:
            return [mine]
        lengths = torch.zeros(group.size, dtype=torch.int64, device=mine.device)
        strategy.interconnect.all_gather(lengths, torch.tensor([len(mine)], device=mine.device), group).wait()
        longest, per_row = int(lengths.max()), mine[:1].numel() if len(mine) else math.prod(mine.shape[1:])
        part = mine.new_zeros(longest, *mine.shape[1:])
        part[: len(mine)] = mine
        every = mine.new_zeros(group.size * longest * per_row)
        strategy.interconnect.all_gather(every, part.flatten(), group).wait()
        rows = every.view(group.size, longest, *mine.shape[1:])
        return [one[:length] for one, length in zip(rows, lengths.tolist(), strict=True)]

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._steps.forget()

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        scheduler: Any = self.lr_schedulers()
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            value = self.trainer.callback_metrics.get(self.scheduler_monitor)
            if value is None:
                raise ValueError(
                    f"model.scheduler_monitor={self.scheduler_monitor} is not logged; choose another metric"
                )
            scheduler.step(value)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.errors is not None and self.trainer.state.fn == "fit":  # in the middle of an epoch; on all ranks
            self.errors.merge(self._gathered)

    # ------------------------------------------------------------------------------------------------------- diagnosis

    def probe(self, batch: Batch) -> dict[str, Any]:
        """How far the gradients of this algorithm are from the true ones, on a batch of training samples.

        Networks are in evaluation mode meanwhile (no dropout, running statistics), and nothing changes.

        Returns:
            ``cosine`` and ``norm`` by block: the angle to the gradient of backpropagation, and the length. Where there
            are feedback weights, ``alignment`` by hidden block (`networks.feedback.diagnosis.alignments`). With delayed
            errors ``staleness``.
        """
        true: dict[int, Gradients] = {}
        own: dict[int, Gradients] = {}
        was_training = self.net.training
        self.net.eval()
        try:
            x, target = self.sample(batch)
            raw, _ = self.chain.backpropagate(x, target, true.__setitem__)
            self.gradients(batch, own.__setitem__)
            found: dict[str, Any] = {
                "cosine": {i: cosine(own[i], true[i]) for i in own},
                "norm": {i: norm(own[i]) for i in own},
            }
            if len(self.feedback_weights):
                matrices = list(self.feedback_weights)
                found["alignment"] = dict(enumerate(alignments(self.chain, matrices, x, self.error_sign)))
            if self.errors is not None:
                remembered = self.errors.read(self._index(batch), target)
                found["staleness"] = staleness(remembered, self._error_now(raw, target))
            return found
        finally:
            self.net.train(was_training)
