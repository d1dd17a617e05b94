"""What modules with random weights share: conversion, samples of a step, objective, groups of the optimizer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_modules.supervised import Supervised
from networks.bayes import (
    Estimator,
    Init,
    NoiseMode,
    Prior,
    SampleContext,
    Stream,
    bayesian_layers,
    has_dropout,
    in_chunks,
    kl_divergence,
    l2_divergence,
    to_bayesian,
    to_ensemble,
    to_mc_dropout,
)
from networks.bayes.objectives import Objective, Sync, check_objective
from parallel.sample_layout import SampleShare, check_num_samples

Posterior = Literal["gaussian", "dropout", "ensemble"]
Divergence = Literal["auto", "l2"]


class WeightSamples(Supervised):
    """A network that evaluates several samples of its weights, or of dropout masks, for every batch.

    Under a strategy with a ``sample_share`` (`strategies.sampling_parallel`) the samples are shared between processes;
    under any other every process evaluates all of them. Samples of training depend on (seed, optimizer step, number of
    the sample) alone; those of evaluation on (seed, ``evaluation_seed``, number), so that every batch of a part of the
    data sees the same functions.

    Args:
        net: The network, deterministic or with Bayesian layers of its own.
        optimizer: Partial that takes the parameters. Means and deviations of weights get no weight decay: the
            divergence from the prior is theirs. None: the module can only be evaluated.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        posterior: What is random: ``gaussian`` weights, or the masks of ``dropout`` (without a divergence: that is
            what the weight decay of the optimizer stands for; or ``kl=l2``). ``ensemble``: nothing, sample s is
            network s of ``num_samples`` networks with linear and convolutional layers of their own, each trained as if
            alone (``objective=elbo``); the baseline that Bayesian networks are measured by.
        include: Patterns of layers with random weights; None: every linear and convolutional layer.
        exclude: Patterns of layers that stay deterministic.
        init: Initial means and deviations; None: `networks.bayes.Init`'s defaults.
        prior: Of all weights; None: N(0, 1).
        dropout_per_item: Whether every item of a training batch has its own mask; otherwise a sample is one mask. Under
            other posteriors dropout is ordinary dropout, off in evaluation, whose masks do not depend on the layout.
        num_samples: S in training, over all processes that share them.
        num_eval_samples: S in validation, test and prediction.
        objective: ``elbo``: mean of the log-likelihood over samples. ``predictive``: logarithm of the mean likelihood,
            tighter, and what the published programs minimise.
        sync: Of ``predictive``: ``exact`` over the samples of all processes, ``local`` over those of each, which is
            another objective (as published).
        kl: Divergence from the prior: ``auto``, that of Gaussian weights in closed form, none of dropout and ensembles;
            ``l2``, for dropout: the negative logarithm of the prior, with an optimizer without weight decay.
        temperature: T, the factor of the divergence; below 1 a "cold" posterior.
        kl_anneal_epochs: Epochs over which that factor rises from 0; fractions are allowed.
        estimator: How samples reach the outputs of a layer in training: ``weight``, ``lrt`` or ``flipout``
            (`networks.bayes.SampleContext`).
        allow_shared_lrt: Whether ``lrt`` is accepted where weights are used at several places of an item.
        noise: ``counter``: the same numbers however samples are laid out; ``rank``: a generator for each process.
        antithetic: Whether samples of training come in pairs of opposite noise.
        sample_chunk: Samples that are computed at once; the memory of activations is theirs, at the price of a second
            forward pass. None: all in training, as many in evaluation.
        expand_input: Repeat the input for every sample before the network: for networks whose first random layer is in
            a branch, or which change the number of rows.
        lr_scale_lambda: Factor of the learning rate of the logarithms of the deviations.
        seed: Of the samples.
        evaluation_seed: Of the samples of evaluation.
        **others: Arguments of the other base.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    objects: ClassVar[tuple[str, ...]] = (*Supervised.objects, "init", "prior")
    more_objectives: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        posterior: Posterior = "gaussian",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        init: Init | None = None,
        prior: Prior | None = None,
        dropout_per_item: bool = False,
        num_samples: int = 16,
        num_eval_samples: int = 64,
        objective: Objective = "predictive",
        sync: Sync = "exact",
        kl: Divergence = "auto",
        temperature: float = 0.1,
        kl_anneal_epochs: float = 0.0,
        estimator: Estimator = "weight",
        allow_shared_lrt: bool = False,
        noise: NoiseMode = "counter",
        antithetic: bool = False,
        sample_chunk: int | None = None,
        expand_input: bool = False,
        lr_scale_lambda: float = 1.0,
        seed: int = 0,
        evaluation_seed: int = 0,
        **others: Any,
    ) -> None:
        if posterior not in get_args(Posterior):
            raise ValueError(f"model.posterior={posterior!r} is unknown; choose gaussian, dropout or ensemble")
        if posterior == "ensemble" and (objective != "elbo" or num_eval_samples != num_samples):
            raise ValueError(
                f"model.posterior=ensemble trains model.num_samples={num_samples} networks one by one and evaluates "
                f"all: set model.objective=elbo (now {objective}) and model.num_eval_samples={num_samples} (now "
                f"{num_eval_samples})"
            )
        if kl not in get_args(Divergence) or (kl == "l2" and posterior != "dropout"):
            raise ValueError(
                f"model.kl={kl!r} with model.posterior={posterior}: choose auto, or l2 with model.posterior=dropout"
            )
        check_objective(objective, sync, self.more_objectives)
        check_num_samples(num_samples, 1, "model.num_samples", antithetic)
        check_num_samples(num_eval_samples, 1, "model.num_eval_samples")
        for key, value in {"temperature": temperature, "kl_anneal_epochs": kl_anneal_epochs}.items():
            if value < 0:
                raise ValueError(f"model.{key}={value}: must not be negative")
        if lr_scale_lambda <= 0:
            raise ValueError(f"model.lr_scale_lambda={lr_scale_lambda}: must be above 0")
        if sample_chunk is not None and (sample_chunk < 1 or (antithetic and sample_chunk % 2)):
            raise ValueError(f"model.sample_chunk={sample_chunk}: at least 1, and even if antithetic, or null")
        if sample_chunk is not None and any(isinstance(m, _BatchNorm) for m in net.modules()):
            raise ValueError(
                f"model.sample_chunk={sample_chunk}: batch normalisation takes its statistics over samples x items, "
                "and chunks would have statistics of their own; set model.sample_chunk=null, or use a network with "
                "layer normalisation"
            )
        # Refuses unknown choices now, not in the first step.
        SampleContext([0], 1, batch=1, estimator=estimator, noise=noise)
        self.posterior, self.dropout_per_item = posterior, dropout_per_item
        self.include, self.exclude, self.init, self.prior = include, exclude, init, prior
        self.kl = kl
        self.num_samples, self.num_eval_samples = num_samples, num_eval_samples
        self.objective, self.sync = objective, sync
        self.temperature, self.kl_anneal_epochs = temperature, kl_anneal_epochs
        self.estimator, self.allow_shared_lrt, self.noise_mode = estimator, allow_shared_lrt, noise
        self.antithetic, self.sample_chunk, self.expand_input = antithetic, sample_chunk, expand_input
        self.lr_scale_lambda = lr_scale_lambda
        self.seed, self.evaluation_seed = seed, evaluation_seed
        self._num_train: int | None = None  # known when training starts
        super().__init__(self._make_bayesian(net), optimizer, scheduler, **others)

    def _make_bayesian(self, net: nn.Module) -> nn.Module:
        """Make the weights of the network random, or its dropout a matter of samples."""
        if self.posterior == "dropout":
            return to_mc_dropout(net, self.dropout_per_item)
        if self.posterior == "ensemble":
            net = to_ensemble(net, self.num_samples)
        else:
            net = to_bayesian(net, self.include, self.exclude, self.init, self.prior)
        # Ordinary dropout, but for its numbers: torch's generator knows neither samples nor their layout.
        return to_mc_dropout(net, per_item=True, in_evaluation=False) if has_dropout(net) else net

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        for key in ("num_samples", "num_eval_samples"):
            antithetic = self.antithetic and key == "num_samples"
            check_num_samples(getattr(self, key), self.share.size, f"model.{key}", antithetic)

    # ------------------------------------------------------------------------------------------------------- samples

    @property
    def share(self) -> SampleShare:
        """Which samples are this process's."""
        if self._trainer is None:
            return SampleShare()
        return getattr(self.trainer.strategy, "sample_share", SampleShare())

    def _context(self, ids: Sequence[int], num_samples: int, items: int) -> SampleContext:
        layout: dict[str, int] = {"rank": 0, "num_replicas": 1}
        step = part = rank = 0
        if self._trainer is not None:
            layout = self.trainer.distributed_sampler_kwargs or layout
            rank = self.trainer.global_rank
        if not self.training:
            return SampleContext(
                ids,
                num_samples,
                batch=items,
                seed=self.seed,
                step=self.evaluation_seed,
                stream=Stream.EVALUATION,
                expanded=self.expand_input,
            )
        if self._trainer is not None:
            step = self.trainer.global_step
            part = self.trainer.fit_loop.epoch_loop.batch_idx % self.trainer.accumulate_grad_batches
        return SampleContext(
            ids,
            num_samples,
            batch=items,
            seed=self.seed,
            step=step,
            estimator=self.estimator,
            noise=self.noise_mode,
            antithetic=self.antithetic,
            rank=rank,
            rows=(layout["rank"], layout["num_replicas"]),
            part=part,
            expanded=self.expand_input,
            allow_shared_lrt=self.allow_shared_lrt,
        )

    def sampled(self, items: int, num_samples: int, run: Callable[[slice, int], Tensor]) -> Tensor:
        """Outputs of this process's samples, (sample, item, ...).

        Args:
            items: Items in the batch.
            num_samples: S over all processes.
            run: Applies the network for the samples of a slice, given the slice and their number; returns
                (sample x item, ...).
        """
        ids = self.share.ids(num_samples)

        def some(part: slice) -> Tensor:
            chosen = ids[part]
            with self._context(chosen, num_samples, items):
                try:
                    out = run(part, len(chosen))
                except RuntimeError as error:
                    if self.expand_input or "must match the size of tensor" not in str(error):
                        raise
                    raise ValueError(
                        f"model.net: the first random layer is in a branch, whose {len(chosen)} samples of {items} "
                        f"items meet {items} rows elsewhere ({error}); set model.expand_input=true"
                    ) from error
            if len(out) != len(chosen) * items:
                raise ValueError(
                    f"model.net returned {len(out)} rows for {len(chosen)} samples of {items} items: no layer of it "
                    "is random, or its first random layer is in a branch (set model.expand_input=true)"
                )
            return out.unflatten(0, (len(chosen), items))

        return in_chunks(len(ids), self._chunk_size(), some)

    def _chunk_size(self) -> int | None:
        if self.training or self.sample_chunk is not None:
            return self.sample_chunk
        return len(self.share.ids(self.num_samples))  # what training has memory for

    # ----------------------------------------------------------------------------------------------------- objective

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._num_train = len(self.trainer.train_dataloader.dataset)

    def kl_factor(self, batch_idx: int) -> float:
        """T, or the part of it that annealing has reached."""
        if not self.kl_anneal_epochs:
            return self.temperature
        done = self.trainer.current_epoch + batch_idx / self.trainer.num_training_batches
        return self.temperature * min(1.0, done / self.kl_anneal_epochs)

    def _objective(self, data_term: Tensor, batch_idx: int, items: int, values_per_item: int = 1) -> Tensor:
        """Add T KL / N to a data term per value, log both, and refuse what is not finite."""
        kl = kl_divergence(self.net) if self.kl == "auto" else l2_divergence(self.net, self.prior or Prior())
        kl_per_value = kl / ((self._num_train or items) * values_per_item)
        loss = data_term + self.kl_factor(batch_idx) * kl_per_value.to(data_term.device)
        for name, value in (("loss", loss), ("data_term", data_term), ("kl", kl), ("kl_per_item", kl_per_value)):
            self._add_to_epoch(name, value.detach().double() * items, items)
        if self._is_checked(loss, batch_idx) and not torch.isfinite(loss):
            raise FloatingPointError(self._what_diverged(float(loss)))
        # The sum of the losses of networks that have nothing in common is, to each, its own.
        return loss * self.num_samples if self.posterior == "ensemble" else loss

    def _is_checked(self, loss: Tensor, batch_idx: int) -> bool:
        """Whether to look at the loss: on accelerators that waits for all work so far."""
        every = getattr(self.trainer, "log_every_n_steps", 1) or 1
        return loss.device.type == "cpu" or batch_idx % every == 0

    def _what_diverged(self, loss: float) -> str:
        where = f"the loss is {loss} at step {self.trainer.global_step}"
        found = [(float(layer.weight_sigma().max()), name) for name, layer in bayesian_layers(self.net)]
        if not found:
            return f"{where}; lower the learning rate"
        sigma, name = max(found, key=lambda pair: (pair[0] != pair[0], pair[0]))  # NaN before any number
        where = f"{where}; the largest deviation is {sigma:.3g} in layer {name or 'net'}"
        return f"{where}: lower model.optimizer.lr or model.lr_scale_lambda"

    @override
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Deterministic parameters, means, and logarithms of deviations; the last two without weight decay."""
        mu, log_sigma = [], []
        for _, layer in bayesian_layers(self.net):
            for tensor in layer.random_tensors():
                mu.append(tensor.mu)
                log_sigma.append(tensor.log_sigma)
        random = {id(p) for p in (*mu, *log_sigma)}
        groups = [
            {"params": [p for p in self.parameters() if id(p) not in random]},
            {"params": mu, "weight_decay": 0.0},
            {"params": log_sigma, "weight_decay": 0.0},
        ]
        if self.lr_scale_lambda != 1:
            groups[2]["lr"] = self.lr_scale_lambda * self._base_lr()
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        return [group for group in groups if group["params"]]

    def _base_lr(self) -> float:
        make = self.make_optimizer
        given = make.keywords if isinstance(make, functools.partial) else {}
        lr = given.get("lr", getattr(inspect.signature(make).parameters.get("lr"), "default", None))
        if not isinstance(lr, int | float):
            raise ValueError(f"model.lr_scale_lambda={self.lr_scale_lambda} needs an optimizer with a learning rate lr")
        return lr

    # ----------------------------------------------------------------------------------------------------- posterior

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self._log_exact(self.posterior_summary())

    @torch.no_grad()
    def posterior_summary(self) -> dict[str, Tensor]:
        """Mean deviation and mean |mu| / sigma of the weights of every layer that are alive."""
        values = {}
        for name, layer in bayesian_layers(self.net):
            weight = next(layer.random_tensors())
            mu, log_sigma = (t if weight.mask is None else t[weight.mask] for t in (weight.mu, weight.log_sigma))
            if mu.numel():
                values[f"train/sigma_{name}"] = log_sigma.double().exp().mean()
                values[f"train/snr_{name}"] = (mu.double().abs().log() - log_sigma.double()).exp().mean()
        return values
