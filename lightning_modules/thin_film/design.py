"""InverseDesign: a network that writes stacks for spectra, trained and tested beside the baselines it must beat."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lightning_modules.metrics.spectra import RateBuckets, SampleTable
from lightning_modules.thin_film.candidates import Limits, Refinement, sizes
from lightning_modules.thin_film.comparison import Comparison
from lightning_modules.thin_film.proposals import Proposals
from networks.diffusion import Sampler
from networks.stack_generator import StackGenerator


class InverseDesign(Comparison, Proposals):
    """Stacks of thin films for wanted spectra: sampled, simulated, ranked and refined.

    Batches are those of `datamodules.thin_films.ThinFilms`. Baselines are networks of the same kind as ``net``: they
    are trained on the same batches by the same optimizer, each with its own gradient and clipping, so that one run
    compares them on the same data. Template libraries answer with the nearest training spectra.

    A test follows one protocol for all methods (paper, section 2.8): ``num_draws`` stacks per target, simulated; error
    of the first draw and of the best of the first n; the best ``refine_top`` distinct ones refined by gradients through
    the simulator. `results_table` has it as rows, `callbacks.design_table` writes them. Everything that is drawn is a
    function of (seed, target, draw): results do not depend on batches and ranks.

    Steps of validation return ``loss``, ``prediction`` (spectrum of the best draw), ``target`` (B, 3, W) and ``index``;
    steps of test further what figures show: ``weight``, ``tokens`` (best draw), ``material`` and ``thickness_nm`` of
    the refined stack, ``prediction`` its spectrum, ``draws_mae_<network>`` (B, N) for the label and every baseline,
    ours first, ``refined_mae``, ``refined_mae_<method>``, ``trajectory`` (B, steps, L) and ``trajectory_mae`` of the
    first draw. Steps of predict return ``index``, ``target``, ``weight`` and K candidates, best first: ``tokens``
    (B, K, L), ``material`` and ``thickness_nm`` (B, K, L - 1) refined, ``spectrum`` (B, K, 3, W), ``mae``,
    ``raw_mae``, ``source`` (see `proposals.SOURCES`), ``robust_mae`` and ``robust_mae_p95`` (B, K).

    Logged: ``train/loss``; ``val/loss`` and ``val/accuracy`` of tokens, also by mask rate; ``val/mae`` of the first and
    ``val/best_mae`` of the best of ``val_draws`` draws; what a test finds as ``test/...``, of other methods as
    ``test/<method>/...``.

    Args:
        net: The network.
        optimizer: Partial that takes the parameters. None: the module can only be evaluated.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        label: What tables and figures call the network.
        baselines: Further networks by name, trained along; None for one leaves it out.
        ema_decay: Of the moving average of the weights of ``net`` that is evaluated; None: the weights themselves.
        num_draws: Stacks per target in a test.
        report_draws: Numbers of draws after which the best is reported, each at most ``num_draws``.
        refine_top: Distinct candidates per target that are refined.
        refinement: How; None: `Refinement` as it is.
        templates: Sizes of template libraries that a test compares with; ``equal``: as many bytes as the weights of the
            network in single precision.
        hybrid: Draws of the network, and as many hits of the template library of ``equal`` size, that are refined
            together; 0: not tested.
        diversity_draws: Draws among which different answers are counted.
        val_draws: Stacks per target in validation.
        val_sampler: How they are drawn; None: as in a test.
        limits: What stacks may be made of in prediction; None: anything.
        predict_templates: Template hits beside the ``num_draws`` draws in prediction; 0: none.
        predict_library: Training stacks, at most, among which these are looked for.
        num_candidates: Candidates per target that prediction delivers.
        thickness_error: Relative standard deviation of thicknesses for the robustness of a candidate.
        max_sequences: Sequences that are sampled at once.
        evaluation_seed: Of draws.
        seed: Of the masks of training.
        scheduler_monitor: Metric given to schedulers that watch one.
        scheduler_interval: When the scheduler steps, after each ``epoch`` or each ``step``.

    Raises:
        ValueError: Names the argument and the remedy, also where network and data do not fit.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("spectrum", "tokens", "weight", "index")
    objects: ClassVar[tuple[str, ...]] = (
        *("net", "optimizer", "scheduler", "baselines", "refinement", "val_sampler", "limits"),
    )

    def __init__(
        self,
        net: StackGenerator,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        label: str = "OptoLlama",
        baselines: Mapping[str, StackGenerator | None] | None = None,
        ema_decay: float | None = None,
        num_draws: int = 50,
        report_draws: Sequence[int] = (10, 50),
        refine_top: int = 5,
        refinement: Refinement | None = None,
        templates: Sequence[int | str] = (1000, "equal", 100_000),
        hybrid: int = 25,
        diversity_draws: int = 10,
        val_draws: int = 4,
        val_sampler: Sampler | None = None,
        limits: Limits | None = None,
        predict_templates: int = 50,
        predict_library: int = 100_000,
        num_candidates: int = 5,
        thickness_error: float = 0.01,
        max_sequences: int = 1024,
        evaluation_seed: int = 0,
        seed: int = 0,
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "step",
    ) -> None:
        counts = {"num_draws": num_draws, "refine_top": refine_top, "val_draws": val_draws}
        counts |= {"num_candidates": num_candidates, "max_sequences": max_sequences}
        counts |= {"predict_library": predict_library}
        for key, value in counts.items():
            if value < 1:
                raise ValueError(f"model.{key}={value}: must be at least 1")
        if wrong := [n for n in report_draws if not 1 <= n <= num_draws]:
            raise ValueError(f"model.report_draws: {wrong[0]} must be between 1 and model.num_draws={num_draws}")
        for key, value in {"hybrid": hybrid, "diversity_draws": diversity_draws}.items():
            if not 0 <= value <= num_draws:
                raise ValueError(f"model.{key}={value}: must be between 0 and model.num_draws={num_draws}")
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"model.ema_decay={ema_decay}: must be at least 0 and below 1, or null")
        sizes(templates, 1)
        super().__init__(net, optimizer, scheduler, scheduler_monitor, scheduler_interval)
        self.save_hyperparameters(ignore=list(self.objects))
        self.label = label
        self.baselines = nn.ModuleDict({k: v for k, v in (baselines or {}).items() if v is not None})
        self.ema = None if ema_decay is None else copy.deepcopy(net).requires_grad_(False)
        self.ema_decay = ema_decay
        self.num_draws, self.report_draws, self.refine_top = num_draws, sorted(set(report_draws)), refine_top
        self.refinement, self.templates, self.hybrid = refinement or Refinement(), list(templates), hybrid
        self.diversity_draws, self.val_draws, self.val_sampler = diversity_draws, val_draws, val_sampler
        self.limits = limits or Limits()
        self.predict_templates, self.predict_library = predict_templates, predict_library
        self.num_candidates, self.thickness_error = num_candidates, thickness_error
        self.max_sequences, self.evaluation_seed, self.seed = max_sequences, evaluation_seed, seed
        self.val_tokens, self.test_tokens = RateBuckets(), RateBuckets()
        self.val_table = SampleTable(("first", "best", "valid"))
        self.test_table = None
        self.libraries, self.proposers, self.sampled = {}, [], {}
