"""AB-training as a Lightning strategy: when ranks train together, when in groups, and what they tell each other."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from networks.ab_factors import ABFactor, Decomposition, Init, SigmaSplit, Sync, num_kept, set_spectra
from networks.ranks_in_words import ranks_in_words
from parallel.ab_layout import ABLayout, ab_layout
from parallel.collectives import gather_objects
from parallel.groups import Group, destroy, make_group
from parallel.layout import global_groups
from parallel.ledger import Ledger
from strategies.ab_training.ab_phase import ABPhase, Groups, Start
from strategies.ab_training.cutoff import Cutoff
from strategies.ab_training.grouped_interconnect import GroupedInterconnect
from strategies.ab_training.levelling import level_states
from strategies.ab_training.optimizer_slots import OptimizerSlots, OptState
from strategies.ab_training.phases import Phase, Rule, check_lengths, make_schedule
from strategies.ab_training.ranks import compression, full_rank, whole_rank
from strategies.ab_training.rebound import Rebound
from strategies.ab_training.restart import check_agreement, stored_starts
from strategies.ab_training.selection import select
from strategies.ab_training.settings import WIRE_TYPES, check_choices
from strategies.ab_training.splitting import ranks_of, split_weights, starts_of
from strategies.ab_training.step_times import StepTimes
from strategies.cluster import ClusterStrategy

log = logging.getLogger(__name__)

_PHASE_NUMBERS = {"warmup": 0, "ab": 1, "full": 2}


class ABTrainingStrategy(ClusterStrategy):
    """Trains one factor of every weight in independent groups of ranks, and the whole weights together in between.

    After ``warmup_steps`` of data parallelism every weight ``W`` with two axes becomes ``A B`` by a singular value
    decomposition without the small values. Half of the groups train ``A``, the others ``B``, and nothing passes between
    groups. After ``ab_steps`` the factors are combined to ``W`` by one all-reduce, all ranks train ``W`` together for
    ``full_steps``, and it begins again. Validation and checkpoints see the consensus, which is what a synchronisation
    would give at that moment; the training itself goes on undisturbed, also after a restart from such a checkpoint.
    The last phase is always a full-rank one. Gradients are clipped by the norm within the group.

    Other parameters (biases, norms, layers of ``keep_full``, weights whose factors would not be smaller) are trained by
    all groups and averaged, with their optimizer state, where the factors are combined. Running statistics of
    batch norms are averaged too, and synchronised batch norms speak to their group alone in AB phases.

    Source: Coquelin et al., AB-Training (arXiv 2405.01067).

    Args:
        warmup_steps: Optimizer steps before the first AB phase; below 1: a fraction of all.
        ab_steps: Optimizer steps of an AB phase.
        full_steps: Optimizer steps of the full-rank phase after it.
        final_full_steps: Of the last full-rank phase; None: ``full_steps``. 0: no last phase, and AB phases do not
            depend on the length of the training.
        schedule: ``relative``, or ``reference``: phases end at multiples of ``ab_steps + full_steps``, as in the
            published program.
        cutoff: Singular values below this fraction of the largest are dropped.
        final_cutoff: What the cutoff rises to in the course of the training; None: it stays. See
            `strategies.ab_training.cutoff.Cutoff`.
        cutoff_rise: Where that rise begins and ends, as fractions of all optimizer steps.
        first_cut: Whether the first AB phase drops any. Without, its factors together are larger than the weights.
        max_drop: Largest fraction of its rank that a weight loses at once.
        sync: Rule of combination (`networks.ab_factors.combine`); ``only-b`` has one group of all ranks, trains B alone
            and averages its gradients in every step.
        sigma_split: ``both`` factors share the singular values, or the ``trained`` one has them and the other is
            orthonormal.
        rebound_steps: After a switch the learning rate rises for this many steps, until it meets the scheduled one.
        rebound_lr: Where it begins.
        opt_state: Optimizer state of weights and factors at a switch (`strategies.ab_training.optimizer_slots`).
        init: Singular values of the weights at the start of a training (`networks.ab_factors.with_spectrum`).
        keep_full: Layers or weights that stay whole, by name, with ``*`` and ``?``; None: the first and the last layer;
            an empty list: none.
        min_dim: Weights with a side shorter than this stay whole.
        factor_embeddings: Whether embeddings are factorised too.
        group_size: Ranks of a group; None: a node, or half of it where there is only one.
        eval_model: What validation within a fit sees: the ``consensus``, or each rank its own ``group``.
        wire_dtype: ``bf16`` or ``fp16`` halve the bytes of a synchronisation (differences are sent, not weights);
            ``fp32``: full precision.
        resume: ``exact``: a checkpoint from within an AB phase needs the same number of processes and groups;
            ``consensus``: any will do, it begins with a full-rank phase.
        **cluster: Nodes, emulated network and DDP, see `ClusterStrategy`.

    Raises:
        ValueError: On all ranks, before training; names the setting, its value and the remedy.
    """

    # Callbacks that replace weights too look for this; those that can wait (OIALR) for `weights_are_whole`.
    replaces_weights: ClassVar[bool] = True

    def __init__(
        self,
        warmup_steps: float = 0.2,
        ab_steps: int = 60,
        full_steps: int = 10,
        final_full_steps: int | None = None,
        schedule: Rule = "relative",
        cutoff: float = 0.15,
        final_cutoff: float | None = None,
        cutoff_rise: Sequence[float] = (0.5, 0.8),
        first_cut: bool = True,
        max_drop: float = 1.0,
        sync: Sync = "only-learned",
        sigma_split: SigmaSplit = "both",
        rebound_steps: int = 9,
        rebound_lr: float = 1e-5,
        opt_state: OptState = "hold",
        init: Init = "unified",
        keep_full: Sequence[str] | None = None,
        min_dim: int = 16,
        factor_embeddings: bool = False,
        group_size: int | None = None,
        eval_model: Literal["consensus", "group"] = "consensus",
        wire_dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
        resume: Literal["exact", "consensus"] = "exact",
        **cluster: Any,
    ) -> None:
        check_choices(
            sync=sync, sigma_split=sigma_split, opt_state=opt_state, init=init, eval_model=eval_model, resume=resume,
            wire_dtype=wire_dtype,
        )  # fmt: skip
        self.cutoff = Cutoff(cutoff, final_cutoff, tuple(cutoff_rise))
        if not 0 <= max_drop <= 1:
            raise ValueError(f"strategy.max_drop={max_drop}: a fraction of the rank, between 0 and 1")
        if min_dim < 1:
            raise ValueError(f"strategy.min_dim={min_dim}: it counts rows or columns, 1 or more")
        check_lengths(warmup_steps, ab_steps, full_steps, final_full_steps, schedule)
        super().__init__(**cluster)
        self.warmup_steps, self.ab_steps, self.full_steps = warmup_steps, ab_steps, full_steps
        self.final_full_steps, self.rule = final_full_steps, schedule
        self.first_cut, self.max_drop = first_cut, max_drop
        self.sync, self.sigma_split, self.opt_state, self.init = sync, sigma_split, opt_state, init
        self.keep_full = None if keep_full is None else list(keep_full)
        self.min_dim, self.factor_embeddings = min_dim, factor_embeddings
        self.group_size, self.eval_model, self.wire_dtype, self.resume = group_size, eval_model, wire_dtype, resume
        self.rebound = Rebound(rebound_steps, rebound_lr)
        self.seconds = {"svd": 0.0, "sync": 0.0, "rewrap": 0.0}
        self._step_times = StepTimes()
        self.phase: Phase = "warmup"
        self.phase_begin = 0  # optimizer step at which the running phase began
        self.cycles = 0  # AB phases begun
        self.ranks: dict[str, int] = {}  # of every layer in the last AB phase
        self.ab: ABPhase | None = None  # within an AB phase
        self._layers: list[ABFactor] = []
        self._angle: tuple[float, float] | None = None
        self._loaded = False

    # ------------------------------------------------------------------------------------------------ environment

    def _layout(self, world_size: int) -> ABLayout:
        return ab_layout(world_size, self.local_size, self.group_size, grouped=self.sync != "only-b")

    @override
    def check_sizes(self, world_size: int) -> None:
        super().check_sizes(world_size)
        self._layout(world_size)

    @override
    def setup_environment(self) -> None:
        self._loaded = False
        super().setup_environment()
        self.layout = self._layout(self.groups.world.size)
        self.side = self.layout.member(self.global_rank).side
        self.interconnect = GroupedInterconnect(self.local_size, self.network, self.interconnect.ledger)
        self.interconnect.between = Ledger(self.global_rank, self.layout.group_size)
        self._own_groups: list[Group] = []
        self.group, self._peers = self.groups.node, self.groups.across  # peers: one rank of each group
        if (size := self.layout.group_size) != self.groups.node.size:
            families = self.layout.groups(), global_groups(self.groups.world.size, size)
            self.group, self._peers = self._own_groups = [make_group(ranks, self._timeout) for ranks in families]

    @property
    @override
    def gradient_group(self) -> Group:
        return self.group if self.phase == "ab" else self.groups.world

    @property
    def group_ledger(self) -> Ledger | None:
        """What has crossed from group to group, as if these were nodes; None: there is one group. Callbacks look."""
        return self.interconnect.between if self.layout.num_groups > 1 else None

    # ------------------------------------------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.refuse_manual_optimization()
            self.phase, self.phase_begin, self.cycles, self.ranks = "warmup", self.steps, 0, {}
            self._layers = select(self.lightning_module, self.keep_full, self.min_dim, self.factor_embeddings)
            if self.init != "unified" and not self._loaded:
                set_spectra(self.lightning_module, self.init)
        super().setup(trainer)

    @override
    def check_module(self) -> None:
        if self.layout.num_groups == 1 and self.sync != "only-b":
            rank_zero_warn(
                f"strategy.sync={self.sync} needs two processes or more: one alone trains B in AB phases, as by "
                "strategy.sync=only-b; trainer=cluster_2x2 makes two nodes of two processes on this machine"
            )
        self._find_slots()
        if not self._loaded:
            self._make_schedule()

    def _find_slots(self) -> None:
        self.slots = OptimizerSlots(self.optimizers, self._layers, self.opt_state)

    @property
    def weights_are_whole(self) -> bool:
        """Whether a callback may put other parameters in the place of weights now, the same on all ranks."""
        return self.ab is None

    def parameters_changed(self) -> None:
        """Look for the weights anew, in which a callback has exchanged some; it does so where they are whole."""
        if self.ab is not None:
            raise RuntimeError("parameters were exchanged within an AB phase: wait for weights_are_whole")
        self._layers = select(self.lightning_module, self.keep_full, self.min_dim, self.factor_embeddings)
        self.ranks = {layer.path: self.ranks[layer.path] for layer in self._layers if layer.path in self.ranks}
        self._find_slots()

    @property
    def stand_ins(self) -> dict[int, str]:
        """Names of the weights in whose place optimizers hold a factor now, by the identity of the factor."""
        if self.ab is None:
            return {}
        with self.ab.as_in_training():
            return {id(layer.trained): layer.path for layer in self.ab.layers}

    def _make_schedule(self) -> None:
        """Count the steps of the training, which builds the loader.

        Lightning gives a loader the state that a checkpoint has of it when it builds the loader, so a resumed run must
        have read that state before.
        """
        total = self.lightning_module.trainer.estimated_stepping_batches
        steps = int(total) if 0 <= total < math.inf else None
        lengths = self.warmup_steps, self.ab_steps, self.full_steps, self.final_full_steps
        self.schedule = make_schedule(*lengths, steps, self.rule, self.cut_short)
        _ = self.cutoff_now  # its length may be unknown

    def _from_all(self, value: Any) -> list[Any]:
        values = [value] * self.groups.world.size
        if len(values) > 1:
            dist.all_gather_object(values, value)
        return values

    # ------------------------------------------------------------------------------------------------------ training

    @override
    def on_train_start(self) -> None:
        known = self.steps
        super().on_train_start()
        if self.steps != known:  # the checkpoint of another strategy
            self.phase_begin = self.steps
        if self.ab is None:  # callbacks may have arranged the optimizers anew when the fit began
            self._find_slots()
        if self.schedule.has_no_ab_phase():
            self._say(
                f"a training of {self.schedule.total} steps is too short for an AB phase after {self.schedule.warmup} "
                "steps of warm-up: all ranks train whole weights together, as by strategy=ddp"
            )
        self._switch_if_due()  # there may be no warm-up, and a resumed run may have become longer
        self._step_times.begin()

    @override
    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        self.rebound.apply(self.steps, self.optimizers)
        try:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        finally:
            self.rebound.restore()

    @override
    def after_step(self, last: bool) -> None:
        self._step_times.end(self.phase)
        self.rebound.restore()  # a switch begins from the scheduled rates
        self._switch_if_due()
        self._step_times.begin()

    def _switch_if_due(self) -> None:
        while (end := self.schedule.end(self.phase, self.phase_begin)) is not None and self.steps >= end:
            if self.schedule.following(self.phase) == "ab":
                self._to_ab()
            else:
                self._to_full()

    def _to_ab(self) -> None:
        """Split the weights and part from the other groups."""
        begin = time.perf_counter()
        self.lightning_module.zero_grad(set_to_none=True)
        uncut = not self.first_cut and self.cycles == 0
        splits = split_weights(
            self._layers, whole_rank if uncut else self._cut_rank, uncut, self.interconnect, self.groups.world,
            self.global_rank,
        )  # fmt: skip
        self.seconds["svd"] += time.perf_counter() - begin
        starts = starts_of(splits, with_roots=self.sigma_split == "trained")
        if not starts:
            rank_zero_warn(
                f"no factors would be smaller than their weight at a cutoff of {self.cutoff_now:.3g}: the groups train "
                "whole weights in this AB phase; raise strategy.cutoff, or train longer before (strategy.warmup_steps)"
            )
        self.ranks = ranks_of(splits)
        self.cycles += 1
        self._enter("ab", starts)
        ranks = ranks_in_words([(path, self.ranks[path], full) for path, full in self.full_ranks.items()])
        self._say(f"AB phase {self.cycles}: {ranks}; {self.compression():.2f} times smaller")

    def _cut_rank(self, layer: ABFactor, parts: Decomposition) -> int:
        return num_kept(parts.sigma, self.cutoff_now, self.ranks.get(layer.path), self.max_drop)

    @property
    def cutoff_now(self) -> float:
        """Of a split at this moment."""
        return self.cutoff.at(self.steps, self.schedule.total)

    def _to_full(self, train_on: bool = True) -> None:
        """Combine what the groups have learned, and train together."""
        begin = time.perf_counter()
        self.lightning_module.zero_grad(set_to_none=True)
        if self.layout.num_groups > 1:
            world, device = self.groups.world, self.root_device
            level_states(self.slots, self.ab.common, self.scaler, self.interconnect, world, device)
        self._angle = self.ab.end(self._all_reduce)
        self.seconds["sync"] += time.perf_counter() - begin
        self.ab = None
        if train_on:
            self._enter("full")
        else:
            self.phase, self.phase_begin = "full", self.steps
        self._say("synchronised")

    def _enter(self, phase: Phase, starts: Sequence[Start] = ()) -> None:
        self.phase, self.phase_begin = phase, self.steps
        if phase == "ab":
            self.ab = self._make_phase(starts)
        self._join_group()
        self.rebound.switch(self.steps, self.optimizers)

    def _make_phase(self, starts: Sequence[Start]) -> ABPhase:
        num_ranks = {"a": self.layout.num_ranks_on("a"), "b": self.layout.num_ranks_on("b")}
        sync = self.sync if self.layout.num_groups > 1 else "only-b"
        groups = Groups(self.side, num_ranks, sync, WIRE_TYPES[self.wire_dtype])
        return ABPhase(self.lightning_module, self.slots, groups, starts)

    def _join_group(self) -> None:
        """Reduce gradients and batch statistics over the group of the phase that begins."""
        begin = time.perf_counter()
        group = self.gradient_group
        handle = group.handle if group.handle is not None else self._group_of_one()
        for module in self.lightning_module.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.process_group = handle
        # The old reducer listens to the parameters until it is destroyed, and a garbage collector may take its time.
        old, self.model = self.model, self.lightning_module
        if isinstance(old, DistributedDataParallel):
            old.logger = old.reducer = None
        del old
        # All ranks of the group are equal, there is nothing to send.
        self.model = DistributedDataParallel(
            self.lightning_module, device_ids=self.determine_ddp_device_ids(), process_group=handle, init_sync=False,
            **self._ddp_kwargs,
        )  # fmt: skip
        self._register_ddp_hooks()
        self.seconds["rewrap"] += time.perf_counter() - begin

    def _all_reduce(self, vector: Tensor) -> None:
        self.interconnect.all_reduce(vector, self.groups.world).wait()

    def _all_reduce_uncounted(self, vector: Tensor) -> None:
        """For checkpoints and validation, which are no training traffic."""
        if self.groups.world.size > 1:
            dist.all_reduce(vector)

    # ------------------------------------------------------------------------------------------------- validation

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if fitting and self.ab is not None and self.eval_model == "consensus":
            self.ab.show_consensus(self._all_reduce_uncounted)

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        if self.ab is not None:
            self.ab.resume_training()

    # ------------------------------------------------------------------------------------------------- checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The consensus under the names and in the shapes of the plain module. Called on all ranks together."""
        state = super().lightning_module_state_dict()
        return state if self.ab is None else self.ab.plain_state_dict(state, self._all_reduce_uncounted)

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """That of the plain module, so that any strategy can go on from the file."""
        if self.ab is None:
            return super().optimizer_state(optimizer)
        with self.ab.as_in_training():
            return self.slots.plain_state(getattr(optimizer, "_optimizer", optimizer), self.ab.layers)

    @override
    def state_dict(self) -> dict[str, Any]:
        ab: dict[str, Any] = {
            "phase": self.phase,
            "phase_begin": self.phase_begin,
            "cycles": self.cycles,
            "ranks": dict(self.ranks),
            "rebound": self.rebound.state_dict(),
            "between": self._from_all(self.interconnect.between.state_dict()),
            **self._must_agree(),
        }
        if self.ab is not None:
            ab["starts"] = self.ab.starts()
            if self.layout.member(self.global_rank).member == 0:
                mine = self.ab.group_state()
                if self.scaler is not None:
                    mine["scaler"] = self.scaler.state_dict()
                ab["groups"] = gather_objects(mine, self._peers, self.root_device)
        return super().state_dict() | {"ab": ab}

    def _must_agree(self) -> dict[str, Any]:
        """Settings that a checkpoint from within an AB phase depends on."""
        return {"group_size": self.layout.group_size, "sync": self.sync, "sigma_split": self.sigma_split}

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self._loaded = True
        return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self._make_schedule()
        self._find_slots()
        super().load_optimizer_state_dict(checkpoint)

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        ab = state["ab"]
        self.cycles, self.ranks, self.phase_begin = ab["cycles"], dict(ab["ranks"]), ab["phase_begin"]
        if len(ab["between"]) == self.groups.world.size and ab["group_size"] == self.layout.group_size:
            self.interconnect.between.load_state_dict(ab["between"][self.global_rank])
        if ab["phase"] != "ab":
            self.phase = ab["phase"]
            self.rebound.load_state_dict(ab["rebound"])
        elif self.resume == "consensus":
            self.phase, self.phase_begin = "full", self.steps
            self.rebound.switch(self.steps, self.optimizers)
        else:
            mine = {"processes": self.groups.world.size} | self._must_agree()
            theirs = {"processes": state["world_size"]} | {name: ab[name] for name in self._must_agree()}
            check_agreement(mine, theirs, ab["starts"], self._layers)
            self._resume_ab(ab)

    def _resume_ab(self, ab: Mapping[str, Any]) -> None:
        """Go on within an AB phase: with the state of this rank's group, where the file's weights are the consensus."""
        begin = self.phase_begin
        self._enter("ab", stored_starts(ab["starts"], self._layers, self.root_device))
        mine = ab["groups"][self.global_rank // self.layout.group_size]
        self.ab.load_group_state(mine)
        if self.scaler is not None and "scaler" in mine:
            self.scaler.load_state_dict(mine["scaler"])
        self.phase_begin = begin
        self.rebound.load_state_dict(ab["rebound"])

    # ----------------------------------------------------------------------------------------------------- the end

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self.ab is not None:  # stopped early, or by the clock of the published program
            self._to_full(train_on=False)

    @override
    def teardown(self) -> None:
        if self.ab is not None:  # an error, or a signal
            self.ab.abandon()
            self.ab, self.phase = None, "full"
        own = self.__dict__.pop("_own_groups", [])
        super().teardown()
        if dist.is_initialized():
            destroy(*own)

    # -------------------------------------------------------------------------------------------------------- report

    def compression(self) -> float:
        """Numbers of the whole network over those of its factors and other parameters, as of the last AB phase."""
        return compression(self.lightning_module, self._layers, self.ranks)

    @property
    def full_ranks(self) -> dict[str, int]:
        """Of the weights that are factorised; callbacks look for this."""
        return {layer.path: full_rank(layer) for layer in self._layers}

    def _say(self, text: str) -> None:
        if self.global_rank == 0:
            log.info("optimizer step %d: %s", self.steps, text)

    @override
    def report(self) -> dict[str, float]:
        values = {"ab/phase": float(_PHASE_NUMBERS[self.phase]), "ab/cycle": float(self.cycles)}
        if self.rebound.used:
            values["ab/lr"] = self.rebound.used[0][0]
        if self.ranks:
            values["ab/compression"], values["ab/cutoff"] = self.compression(), self.cutoff_now
            values |= {f"ab/rank/{path}": float(rank) for path, rank in self.ranks.items()}
        if self._angle is not None:
            values["ab/cosine_of_halves"], values["ab/relative_change"] = self._angle
        values |= {f"time/ab_{name}_s": value for name, value in self.seconds.items()}
        values |= {f"time/step_{phase}_s": mean for phase, mean in self._step_times.means().items()}
        values["comm/between_groups_bytes"] = self.interconnect.between.totals()["inter_node_bytes"]
        return values
