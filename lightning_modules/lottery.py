"""Lottery: the classifier of lottery tickets, ordinary or Bayesian, from a dense network or from a ticket file."""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.bayes import BayesClassifier
from networks.bayes.noise import mix64
from networks.lottery.compact import Execution, Noise, executed
from networks.lottery.controls import CONTROLS, DRAWS, Control, draw_weights, shuffled
from networks.lottery.tickets import (
    Ticket,
    Which,
    apply_masks,
    apply_weights,
    find_tickets,
    load_ticket,
    require_fit,
    select_ticket,
)
from networks.masks import PruneChoice, empty_layers, install_masks, masked_weights, masks_of

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Start = Literal["uniform", "normal", "keep"]
Source = Literal["init", "trained"]
Report = Literal["validation", "paper"]
_SPREAD = ("accuracy", "nll")  # whose spread over evaluation seeds is logged


class Lottery(BayesClassifier):
    """A `BayesClassifier` whose weights may be pruned; with ``bayesian=false`` the ordinary network, all else equal.

    Both kinds draw the same initial weights from one seed. Training begins with the dense network, or with a ticket:
    its mask (exchanged by a ``control``) and its weights. A ticket of the other kind is transplanted: a Bayesian
    network takes the weights as means and keeps its initial standard deviations, an ordinary one takes the means.

    Masks are full until `callbacks.iterative_pruning` prunes. Where nothing is trained and no checkpoint is given
    (``train=false``), the ticket is evaluated as its run left it. A test evaluates the checkpoint (``test/...``)
    and every ticket in ``tickets`` (``test/level_NN/...``: means over ``evaluation_seeds`` passes with other weight
    samples, and ``_std`` of accuracy and NLL).

    Args:
        net: Maps (batch, channel, height, width) to logits (batch, class).
        optimizer: Partial that takes the parameters. None: the module can only be evaluated.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        bayesian: Whether weights are Gaussians. If not, one sample is evaluated, whatever the numbers of samples are.
        start: Initial weights of linear and convolutional layers: ``uniform``, U(-1/sqrt(fan_in), 1/sqrt(fan_in));
            ``normal``, N(0, 2/fan_in); ``keep``, those of the network. Bayesian layers need ``init.mu=keep``.
        prunable: Which weights; None: all linear and convolutional layers but the last.
        ticket: A run with tickets, its folder ``tickets`` or one file to begin with; None: the dense network.
        level: Of the ticket; None: the highest there is. 0 without a ticket is the dense network.
        control: What is exchanged: ``none``, ``reinit`` (other initial weights), ``shuffle_global``, ``shuffle_even``
            or ``shuffle_layerwise`` (other masks, see `networks.lottery.controls`).
        control_seed: Of the exchange.
        source: Weights to begin with: those that the level began with (``init``) or its ``trained`` ones.
        tickets: Where a test looks for tickets: a run, a folder or a file; ``own``: where the callback that prunes
            (`callbacks.iterative_pruning`) has written some, if there is one; None: the checkpoint alone.
        test_levels: Levels that are tested; None: all.
        evaluate: Weights of tickets that are tested: ``trained`` (of the last epoch) or ``best`` (in validation).
        evaluation_seeds: Passes over the test images.
        execution: How evaluation and prediction compute: ``masked``: as in training, all weights, those that are pruned
            times zero. ``sparse``: layers of which little is left multiply by what is alive. ``compact``: and dead
            channels are gone (`networks.lottery.compact`). The function is the same, but for rounding.
        execution_noise: Of the last two: ``alive``: noise is drawn for the weights alive, which gives other samples of
            the same distribution; ``dense``: for all, so that the samples are those of ``masked``, at that cost.
        report: ``paper``: accuracy and NLL on the test images are logged as ``paper/...`` after every validation, or
            every epoch if there is none: published numbers are maxima over epochs of these. ``validation``: the test
            images are for the end.
        **options: Arguments of `BayesClassifier`.

    Raises:
        ValueError: Names the argument and the remedy, also where a ticket does not fit.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "label", "index")

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        bayesian: bool = True,
        start: Start = "uniform",
        prunable: PruneChoice | None = None,
        ticket: str | None = None,
        level: int | None = None,
        control: Control = "none",
        control_seed: int = 0,
        source: Source = "init",
        tickets: str | None = "own",
        test_levels: Sequence[int] | None = None,
        evaluate: Literal["trained", "best"] = "trained",
        evaluation_seeds: int = 5,
        execution: Execution = "masked",
        execution_noise: Noise = "alive",
        report: Report = "validation",
        **options: Any,
    ) -> None:
        choices = {"start": (start, (*DRAWS, "keep")), "control": (control, CONTROLS)}
        choices |= {"source": (source, get_args(Source)), "evaluate": (evaluate, ("trained", "best"))}
        choices |= {"report": (report, get_args(Report)), "execution": (execution, get_args(Execution))}
        choices |= {"execution_noise": (execution_noise, get_args(Noise))}
        for key, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"model.{key}={value!r} is unknown; choose one of {', '.join(allowed)}")
        if level is not None and level < 0:
            raise ValueError(f"model.level={level}: must not be negative")
        if ticket is None and level:
            raise ValueError(
                f"model.level={level}: needs model.ticket, a run that pruned (experiment=bayesian_lottery) or one of "
                "its files tickets/level_NN.pt; level 0 is the dense network"
            )
        if ticket is None and control != "none":
            raise ValueError(
                f"model.control={control}: is a control of a ticket; needs model.ticket, a run that pruned "
                "(experiment=bayesian_lottery) or one of its files tickets/level_NN.pt"
            )
        if evaluation_seeds < 1:
            raise ValueError(f"model.evaluation_seeds={evaluation_seeds}: must be at least 1")
        mu = getattr(options.get("init"), "mu", "init")
        if bayesian and mu != "keep":
            raise ValueError(
                f"model.init.mu={mu}: must be keep, so that model.start decides and both kinds of networks begin alike"
            )
        self.bayesian, self.start, self.prunable = bayesian, start, prunable
        self.ticket_path, self.level, self.control, self.control_seed = ticket, level, control, control_seed
        self.source, self.evaluate, self.report = source, evaluate, report
        self.tickets_path, self.test_levels = tickets, None if test_levels is None else list(test_levels)
        self.evaluation_seeds = evaluation_seeds if bayesian else 1
        self.execution, self.execution_noise = execution, execution_noise
        self.ticket: Ticket | None = None  # that training began with
        self._executed: dict[int | None, nn.Module] = {}  # networks of tickets by level; None: this module's own
        self._level: int | None = None  # of the ticket that is evaluated
        self._missing: FileNotFoundError | None = None
        if not bayesian:
            options |= {"num_samples": 1, "num_eval_samples": 1, "antithetic": False, "sample_chunk": None}
        super().__init__(net, optimizer, scheduler, **options)
        self._tested: dict[int, Ticket] = {}

    @override
    def _make_bayesian(self, net: nn.Module) -> nn.Module:
        if self.start != "keep":
            draw_weights(net, self.start)
        net = super()._make_bayesian(net) if self.bayesian else net
        install_masks(net, self.prunable)
        return net

    # ------------------------------------------------------------------------------------------------- real sparsity

    @property
    def is_masked(self) -> bool:
        """Whether networks run as they are trained: in a fit, and where nothing else is asked for."""
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        return self.execution == "masked" or self.training or fitting

    def executable(self, ticket: Ticket | None = None, example: Tensor | None = None) -> nn.Module:
        """The network as ``execution`` says, in evaluation, on its own: it shares no weights with this module.

        Args:
            ticket: Whose masks and weights (those that ``evaluate`` names) it gets; None: those of this module.
            example: Images as they will come, by whose size it is judged which convolutions become sparse.
        """
        net = copy.deepcopy(self.net).eval()
        if ticket is not None:
            apply_masks(net, ticket.masks)
            apply_weights(net, ticket.state(self.evaluate))
        return executed(net, self.execution, self.execution_noise, example)

    @override
    def logits(self, image: Tensor) -> Any:
        if self.is_masked:
            return super().logits(image)
        if self._level not in self._executed:
            self._executed[self._level] = self.executable(self._tested.get(self._level), image)
        own = self.net
        self.net = self._executed[self._level]
        try:
            return super().logits(image)
        finally:
            self.net = own

    def _weights_changed(self) -> None:
        self._executed = {}

    @override
    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._weights_changed()

    @override
    def on_predict_epoch_start(self) -> None:
        super().on_predict_epoch_start()
        self._weights_changed()

    # ------------------------------------------------------------------------------------------------ the beginning

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.ticket_path is not None and self.ticket is None:
            if stage == "fit":
                try:
                    self._begin_with(load_ticket(select_ticket(self.ticket_path, self.level)))
                except FileNotFoundError as error:  # a run that goes on has all of it in its checkpoint
                    self._missing = error
            elif self.trainer.ckpt_path is None:  # nothing was trained here
                self._evaluate_as(load_ticket(select_ticket(self.ticket_path, self.level)))
        if stage == "test":
            self._find_tickets()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.ticket is not None:  # a run goes on without the file that it began with
            checkpoint["ticket"] = self.ticket.about

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._weights_changed()
        if "ticket" in checkpoint:
            self.ticket = Ticket({}, {}, about=checkpoint["ticket"])

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.ticket is None and self._missing is not None:
            raise self._missing

    def _require_fit(self, ticket: Ticket, key: str | None = None) -> None:
        try:
            require_fit(ticket, self.net)
        except ValueError as error:
            raise ValueError(f"{key or f'model.ticket={self.ticket_path}'}: {error}") from None

    def _evaluate_as(self, ticket: Ticket) -> None:
        """Mask and weights of a ticket as its own run left them."""
        self._require_fit(ticket)
        apply_masks(self.net, ticket.masks)
        apply_weights(self.net, ticket.state(self.evaluate))

    def _begin_with(self, ticket: Ticket) -> None:
        """Mask and weights of a ticket, or what the control makes of them."""
        self._require_fit(ticket)
        generator = torch.Generator().manual_seed(mix64(self.control_seed, ticket.level))
        masks = shuffled(ticket.masks, self.control, generator)
        for name in empty_layers(masks):
            rank_zero_warn(
                f"model.control={self.control}: nothing is left of {name}; the network is disconnected there"
            )
        apply_masks(self.net, masks)
        apply_weights(self.net, ticket.state("initial" if self.source == "init" else "trained"))
        if self.control == "reinit":
            draw_weights(self.net, "uniform" if self.start == "keep" else self.start, generator)
        self.ticket = ticket
        kinds = [("ordinary", "Bayesian")[kind] for kind in (ticket.bayesian, self.bayesian)]
        log.info("a ticket of level %d (%s) for a network that is %s", ticket.level, *kinds)

    # ----------------------------------------------------------------------------------------------- tickets in a test

    def _find_tickets(self) -> None:
        """Read the tickets to test, and make metrics for each of them and each evaluation seed."""
        found, where = {}, self.tickets_path
        if where == "own":
            folders = [c.tickets_dir for c in self.trainer.callbacks if hasattr(c, "tickets_dir")]
            where = next((folder for folder in folders if any(folder.glob("level_*.pt"))), None)
        if where is not None:
            found = find_tickets(where, "model.tickets")
        for level in self.test_levels or ():
            if level not in found:
                raise ValueError(
                    f"model.test_levels: {level} is not in model.tickets={self.tickets_path}; there are {list(found)}"
                )
        chosen = found if self.test_levels is None else self.test_levels
        self._tested = {}
        for level in chosen:
            ticket = load_ticket(found[level])
            self._require_fit(ticket, f"model.tickets={self.tickets_path}, level {level}")
            for seed in range(self.evaluation_seeds):
                for name in ("loss", *self.score_names):
                    metric = copy.deepcopy(getattr(self, f"test_{name}"))
                    metric.reset()
                    setattr(self, f"{_stage(level, seed)}_{name}", metric)
            # All levels stay in memory: without the weights that are not tested.
            tested = {self.evaluate: ticket.state(self.evaluate)}
            self._tested[level] = Ticket(ticket.masks, {}, about=ticket.about, **tested)

    def _stages(self) -> list[tuple[int, int]]:
        return [(level, seed) for level in self._tested for seed in range(self.evaluation_seeds)]

    @override
    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self._weights_changed()
        for level, seed in self._stages():
            self._reset(_stage(level, seed))

    @override
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        outputs = super().test_step(batch, batch_idx, dataloader_idx)
        if not self._tested or dataloader_idx:  # images that the network cannot know have no scores by level
            return outputs
        own = {name: value.detach().clone() for name, value in self.net.state_dict().items()} if self.is_masked else {}
        which: Which = self.evaluate
        try:
            for level, ticket in self._tested.items():
                if self.is_masked:
                    apply_masks(self.net, ticket.masks)
                    apply_weights(self.net, ticket.state(which))
                self._level = level
                for seed in range(self.evaluation_seeds):
                    self._evaluate(batch, _stage(level, seed), seed)
        finally:
            self._level = None
            if own:
                self.net.load_state_dict(own)
        return outputs

    def _evaluate(self, batch: Batch, stage: str, seed: int) -> None:
        """Add a batch to the metrics of one ticket and one evaluation seed."""
        self.evaluation_seed, before = seed, self.evaluation_seed
        try:
            self._evaluation_step(batch, stage)
        finally:
            self.evaluation_seed = before

    @override
    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        for level, ticket in self._tested.items():
            every = [self.scores(_stage(level, seed)) for seed in range(self.evaluation_seeds)]
            where = f"test/level_{level:02d}"
            values = {f"{where}/remaining": torch.tensor(ticket.about.get("remaining", 1.0), dtype=torch.float64)}
            for name in every[0]:
                one = [float(scores[name]) for scores in every]
                values[f"{where}/{name}"] = torch.tensor(statistics.fmean(one), dtype=torch.float64)
                if name in _SPREAD and len(one) > 1:
                    values[f"{where}/{name}_std"] = torch.tensor(statistics.stdev(one), dtype=torch.float64)
            self._log_exact(values)
        masks = masks_of(masked_weights(self.net))
        alive, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
        self._log_exact({"test/remaining": torch.tensor(alive / total, dtype=torch.float64)})

    # ---------------------------------------------------------------------------------------- as published: test images

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.report == "paper" and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._report_test()

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        if self.report == "paper" and self.trainer.is_last_batch and not sum(self.trainer.num_val_batches):
            self.eval()
            self._report_test()
            self.train()

    def _report_test(self) -> None:
        """Accuracy and NLL on the test images, in the middle of a training."""
        self._reset("test")
        with torch.no_grad():
            for batch in self.trainer.datamodule.test_dataloader():
                self._evaluation_step(self.trainer.strategy.batch_to_device(batch, dataloader_idx=0), "test")
        scores = self.scores("test")
        for name in _SPREAD:  # equal on all ranks
            options = {"on_step": False, "on_epoch": True, "sync_dist": True, "rank_zero_only": True}
            self.log(f"paper/{name}", scores[name], batch_size=1, **options)


def _stage(level: int, seed: int) -> str:
    """Prefix of the attributes that hold the metrics of a ticket and an evaluation seed."""
    return f"ticket_{level:02d}_{seed}"
