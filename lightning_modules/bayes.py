"""BayesClassifier and BayesRegressor: networks that know what they do not know, by samples of weights or of masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_modules.classification import Batch, Classifier, Stage
from lightning_modules.forecasting import Forecaster, repeat_last
from lightning_modules.metrics.uncertainty import SampleScores, UncertaintyScores, entropy, sample_quantile
from lightning_modules.weight_samples import WeightSamples
from networks.bayes import counter_normal, data_term, gaussian_log_density, moment_term
from parallel.sample_collectives import gather_samples, log_mean_exp, mean_over_samples, sample_mean
from parallel.sample_layout import view_streams

Observation = Literal["learned", "fixed", "predicted"]


# ----------------------------------------------------------------------------------------------------- classification


class ClassPrediction(NamedTuple):
    """What all samples together say of a batch, float64.

    Attributes:
        log_probability: Logarithm of the mean over samples of the probabilities, ``(B, C)``.
        expected_entropy: Mean over samples of the entropy of each, nats, ``(B,)``.
        samples: Log-probabilities of this process's samples, ``(S_j, B, C)``.
    """

    log_probability: Tensor
    expected_entropy: Tensor
    samples: Tensor


class BayesClassifier(WeightSamples, Classifier):
    """One class per image, by the mean of the probabilities that several weight samples give.

    Batches are those of `datamodules.images.Images`; where ``augment_scope`` asks for it, every sample of the weights
    sees a random view of its own. Steps of validation and test return what those of `Classifier` do, further
    ``entropy`` of the prediction and ``mutual_information``, the part of it that is due to the weights, each (batch,)
    in nats; predict returns these too, and with ``predict_samples`` ``sample_probability`` (batch, sample, class).

    Logged: what `Classifier` logs, of the mean of the probabilities; ``val/`` and ``test/`` ``mace``, ``entropy`` and
    ``mutual_information`` (`metrics.uncertainty.UncertaintyScores`); ``train/`` ``data_term``, ``kl`` (of all weights,
    nats), ``kl_per_item`` (KL / N), ``accuracy`` (of a single sample, mean over samples), and of every Bayesian layer
    ``sigma_<layer>`` and ``snr_<layer>``, the means of sigma and |mu| / sigma. ``val/loss`` is the data term of the
    objective over the samples of evaluation, without label smoothing and divergence.

    Args:
        net: Maps (batch, channel, height, width) to logits (batch, class).
        optimizer: See `WeightSamples`.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        augment_scope: Who shares a random view of a training image: all samples (``shared``), those of a ``rank``,
            none (``sample``), or as many as a number of views leaves together, whatever the ranks are.
        predict_samples: Whether predict returns the probabilities of every sample.
        num_classes: Number of classes.
        label_smoothing: Part of the target that is spread over all classes; enters log p(y | x, w) in training.
        top_k: k of the top-k accuracy; None: not reported.
        num_bins: Bins of the expected calibration error.
        mace_bins: Bins of ``mace``.
        channels_last: Whether convolutions run with channels last in memory.
        scheduler_monitor: Metric given to schedulers that watch one (ReduceLROnPlateau).
        scheduler_interval: When the scheduler steps, after each ``epoch`` or each ``step``.
        **sampling: Arguments of `WeightSamples`.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    score_names: ClassVar[tuple[str, ...]] = ("scores", "uncertainty")
    uncertainty_names: ClassVar[tuple[str, ...]] = ("entropy", "mutual_information")

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        augment_scope: Literal["shared", "rank", "sample"] | int = "shared",
        predict_samples: bool = False,
        num_classes: int = 10,
        label_smoothing: float = 0.0,
        top_k: int | None = 5,
        num_bins: int = 15,
        mace_bins: int = 10,
        channels_last: bool = False,
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        **sampling: Any,
    ) -> None:
        if mace_bins < 1:
            raise ValueError(f"model.mace_bins={mace_bins}: must be at least 1")
        self.augment_scope, self.predict_samples = augment_scope, predict_samples
        super().__init__(
            net,
            optimizer,
            scheduler,
            num_classes=num_classes,
            label_smoothing=label_smoothing,
            top_k=top_k,
            num_bins=num_bins,
            channels_last=channels_last,
            scheduler_monitor=scheduler_monitor,
            scheduler_interval=scheduler_interval,
            **sampling,
        )
        view_streams(augment_scope, self.num_samples, self.share)  # refuses unknown scopes
        for stage in ("val", "test"):
            setattr(self, f"{stage}_uncertainty", UncertaintyScores(mace_bins))

    def view_streams(self) -> list[int]:
        """Stream of the random views that each of this process's samples sees, see `datamodules.images.Images`."""
        return view_streams(self.augment_scope, self.num_samples, self.share)

    def sample_logits(self, image: Tensor, items: int) -> Tensor:
        """Logits of this process's samples, ``(S_j, B, C)``.

        Args:
            image: ``(B, ...)``, or one view for each of the samples, ``(S_j B, ...)``.
            items: B.
        """
        num_samples = self.num_samples if self.training else self.num_eval_samples

        def run(part: slice, count: int) -> Tensor:
            if len(image) != items:
                return self(image[part.start * items : part.stop * items])
            return self(image.repeat(count, *(1,) * (image.ndim - 1)) if self.expand_input else image)

        logits = self.sampled(items, num_samples, run)
        return logits if logits.dtype == torch.float64 else logits.float()

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        label = batch["label"]
        logits = self.sample_logits(batch["image"], len(label))
        targets = label.repeat(len(logits))
        log_likelihood = -F.cross_entropy(
            logits.flatten(0, 1), targets, label_smoothing=self.label_smoothing, reduction="none"
        ).unflatten(0, (len(logits), len(label)))
        term = data_term(log_likelihood, self.num_samples, self.share, self.objective, self.sync)
        right = logits.detach().argmax(2) == label
        self._add_to_epoch("accuracy", right.sum(), right.numel())
        return {"loss": self._objective(term, batch_idx, len(label))}

    @override
    def logits(self, image: Tensor) -> ClassPrediction:
        """What the samples of evaluation say together."""
        log_p = self.sample_logits(image, len(image)).double().log_softmax(2)
        return ClassPrediction(
            log_mean_exp(log_p, self.num_eval_samples, self.share),
            mean_over_samples(entropy(log_p), self.num_eval_samples, self.share),
            log_p,
        )

    @override
    def _loss(self, logits: ClassPrediction, label: Tensor) -> Tensor:
        if self.objective == "predictive":
            return F.nll_loss(logits.log_probability, label)
        truth = label.expand(len(logits.samples), -1).unsqueeze(2)
        log_likelihood = logits.samples.gather(2, truth).squeeze(2)
        return -mean_over_samples(log_likelihood, self.num_eval_samples, self.share).mean()

    @override
    def update_scores(self, stage: Stage, logits: ClassPrediction, label: Tensor) -> None:
        getattr(self, f"{stage}_scores").update(logits.log_probability, label)
        getattr(self, f"{stage}_uncertainty").update(logits.log_probability, logits.expected_entropy, label)

    @override
    def scores(self, stage: Stage) -> dict[str, Tensor]:
        return super().scores(stage) | getattr(self, f"{stage}_uncertainty").compute()

    @override
    def uncertainties(self, logits: ClassPrediction) -> dict[str, Tensor]:
        """Entropy of the prediction, and the mutual information of class and weights, each (batch,) in nats."""
        total = entropy(logits.log_probability)
        return {"entropy": total, "mutual_information": total - logits.expected_entropy}

    @override
    def _outputs(self, batch: Batch, logits: ClassPrediction) -> dict[str, Tensor]:
        out = {"prediction": logits.log_probability.argmax(1), "probability": logits.log_probability.exp()}
        out |= {"index": batch["index"]} | self.uncertainties(logits)
        return out | ({"target": batch["label"]} if "label" in batch else {})

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        logits = self.logits(batch["image"])
        out = self._outputs(batch, logits)
        if self.predict_samples:
            samples = gather_samples(logits.samples.exp(), self.num_eval_samples, self.share)
            out["sample_probability"] = samples.transpose(0, 1)
        return out


# --------------------------------------------------------------------------------------------------------- regression


class SampledForecast(NamedTuple):
    """What the samples of all processes say of a batch of windows, scaled, float64.

    Attributes:
        mean: Of the predictive distribution, ``(B, T, C)``.
        samples: Of it, with the noise of observations, ``(S, B, T, C)``.
        log_density: Of the truth, value by value, ``(B, T, C)``; None where it is not known.
    """

    mean: Tensor
    samples: Tensor
    log_density: Tensor | None


class BayesRegressor(WeightSamples, Forecaster):
    """Forecasts with their uncertainty: samples of weights or masks, and Gaussian noise of observations around each.

    Works with the networks and batches of `Forecaster`; the batch is repeated for every sample. p(y | x, w) is a
    Gaussian around the output of the network, independent for every value, with deviation sigma_y on the scaled axis.
    l_{s,b} of the objectives is the log-density of a window. Beside ``elbo`` and ``predictive`` the objective
    ``moments`` fits one Gaussian, with mean and variance over the samples, to each value
    (`networks.bayes.moment_term`).

    Steps of validation, test and predict return what those of `Forecaster` do, for the mean over samples, further in
    the data's units ``std`` (batch, time, channel) and ``lower_<percent>``, ``upper_<percent>`` of the central
    intervals.

    Logged: the values of `Forecaster` for the mean, and those of `metrics.uncertainty.SampleScores`: ``crps``,
    ``nll_scaled``, ``coverage_50`` and ``coverage_90``, widths; ``train/`` as in `BayesClassifier`, and ``sigma_y``.
    Losses are per value; ``val/loss`` and ``test/loss`` are the NLL.

    Args:
        net: The network, called as ``net(batch)``.
        optimizer: See `WeightSamples`.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        observation: sigma_y: ``learned``, one number; ``fixed``; or ``predicted`` by a network that returns (batch,
            time, channel, 2), the mean and the logarithm of the variance.
        observation_sigma: Its initial or fixed value on the scaled axis.
        scheduler_monitor: Metric given to schedulers that watch one (ReduceLROnPlateau).
        scheduler_interval: When the scheduler steps, after each ``epoch`` or each ``step``.
        log_channels: Whether test reports the MAE of every channel.
        **sampling: Arguments of `WeightSamples`.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    more_objectives: ClassVar[tuple[str, ...]] = ("moments",)

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        observation: Observation = "learned",
        observation_sigma: float = 0.3,
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        log_channels: bool = False,
        **sampling: Any,
    ) -> None:
        if observation not in get_args(Observation):
            raise ValueError(f"model.observation={observation!r} is unknown; choose learned, fixed or predicted")
        if observation_sigma <= 0:
            raise ValueError(f"model.observation_sigma={observation_sigma}: must be above 0")
        sampling["expand_input"] = True  # batches have entries beside the history, which meet its samples
        super().__init__(
            net,
            optimizer,
            scheduler,
            scheduler_monitor=scheduler_monitor,
            scheduler_interval=scheduler_interval,
            log_channels=log_channels,
            # What the Gaussian likelihood and the samples stand for here; named, so that no configuration sets them.
            loss="l1",
            quantiles=None,
            quantile_set="equidistant",
            sort_quantiles=False,
            calibrate="none",
            calibration_windows=56,
            log_steps=False,
            **sampling,
        )
        if self.num_eval_samples < 2:
            raise ValueError(f"model.num_eval_samples={self.num_eval_samples}: intervals need 2 samples or more")
        if self.objective == "moments" and self.num_samples < 2:
            raise ValueError(f"model.num_samples={self.num_samples}: model.objective=moments needs 2 samples or more")
        self.observation = observation
        log_sigma = torch.tensor(math.log(observation_sigma))
        self.log_sigma_y = nn.Parameter(log_sigma, requires_grad=observation == "learned")

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        _, scale = self._datamodule().target_scale
        for part in ("val", "test"):
            setattr(self, f"{part}_samples", SampleScores(scale))
        # The smallest share, so that every rank refuses.
        if self.objective == "moments" and self.sync == "local" and self.num_samples // self.share.size < 2:
            raise ValueError(
                f"model.num_samples={self.num_samples} leaves a rank one sample, which has no variance: set "
                f"model.sync=exact, or model.num_samples={2 * self.share.size} or more"
            )

    @override
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of `WeightSamples`; sigma_y has no weight decay either."""
        groups = super().parameter_groups()
        for group in groups:
            group["params"] = [p for p in group["params"] if p is not self.log_sigma_y]
        own = {"params": [self.log_sigma_y], "weight_decay": 0.0}
        return [group for group in (*groups, *([own] if self.log_sigma_y.requires_grad else [])) if group["params"]]

    # ----------------------------------------------------------------------------------------------------- samples

    def sample_outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of an observation by this process's samples, ``(S_j, B, T, C)`` each, scaled."""
        history = batch["history"]
        items, channels = len(history), history.shape[2]
        num_samples = self.num_samples if self.training else self.num_eval_samples

        def run(part: slice, count: int) -> Tensor:
            repeated = {key: value.repeat(count, *(1,) * (value.ndim - 1)) for key, value in batch.items()}
            return self.net(repeated)

        out = self.sampled(items, num_samples, run)
        half = history.dtype in (torch.float16, torch.bfloat16)  # too short for sums over a window
        out = out.to(torch.float32 if half else history.dtype)
        sizes = (items, batch["forecast_profile"].shape[1], channels) + (2,) * (self.observation == "predicted")
        if out.shape[1:] != sizes:
            raise ValueError(
                f"model.net returned shape {tuple(out.shape[1:])} for a sample, expected {sizes} (batch, time, channel"
                f"{', mean and log-variance' if self.observation == 'predicted' else ''}); check the sizes of "
                f"model.net and model.observation={self.observation}"
            )
        if self.observation == "predicted":
            return out[..., 0], out[..., 1]
        return out, (2 * self.log_sigma_y).to(out).expand_as(out)

    def _window_log_density(self, batch: Batch, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Log-density of every window under every sample, missing series left out, ``(S_j, B)``."""
        density = gaussian_log_density(batch["target"], mean, log_variance).sum(2)
        return torch.where(batch["valid"], density, density.new_zeros(())).sum(2)

    def _data_term(self, batch: Batch, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Data term of the objective per value, of the training samples."""
        valid, horizon = batch["valid"], batch["target"].shape[1]
        if self.objective == "moments":
            noise = log_variance.exp()
            if self.observation == "predicted" and self.sync == "exact":
                noise = sample_mean(noise, self.num_samples, self.share)
            else:  # of all samples the same, or of this rank's alone
                noise = noise.mean(0)
            values = moment_term(mean, batch["target"], noise, self.num_samples, self.share, self.sync)
            # Divided by all windows, not by the valid ones: see Forecaster.training_step.
            return torch.where(valid.unsqueeze(1), values, values.new_zeros(())).mean()
        density = self._window_log_density(batch, mean, log_variance)
        term = data_term(density, self.num_samples, self.share, self.objective, self.sync)
        return term / (horizon * valid.shape[1])

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        target = batch["target"]
        mean, log_variance = self.sample_outputs(batch)
        term = self._data_term(batch, mean, log_variance)
        sigma = (0.5 * log_variance.detach().double()).exp()
        self._add_to_epoch("sigma_y", sigma.mean() * len(target), len(target))
        loss = self._objective(term, batch_idx, len(target), target[0].numel())
        return {"loss": loss + self.net.penalty() if hasattr(self.net, "penalty") else loss}

    # -------------------------------------------------------------------------------------------------- evaluation

    def sampled_forecast(self, batch: Batch) -> SampledForecast:
        """Mean, samples and log-density of the predictive distribution."""
        mean, log_variance = (x.double() for x in self.sample_outputs(batch))
        number, share = self.num_eval_samples, self.share
        noise = counter_normal((self.seed, self.evaluation_seed), share.ids(number), batch["origin"], mean.shape[2:])
        samples = gather_samples(mean + (0.5 * log_variance).exp() * noise.to(mean), number, share)
        density = None
        if "target" in batch:
            target = batch["target"].double()
            if self.objective == "moments":
                means = gather_samples(mean, number, share)
                variance = means.var(0) + mean_over_samples(log_variance.exp(), number, share)
                density = gaussian_log_density(target, means.mean(0), variance.log())
            else:
                density = log_mean_exp(gaussian_log_density(target, mean, log_variance), number, share)
        return SampledForecast(mean_over_samples(mean, number, share), samples, density)

    @override
    def _evaluation_step(self, batch: Batch, stage: Stage) -> dict[str, Tensor]:
        forecast = self.sampled_forecast(batch)
        target, valid, profile = batch["target"], batch["valid"], batch["forecast_profile"]
        mean = forecast.mean.to(target.dtype)
        nll = torch.where(valid.unsqueeze(1), -forecast.log_density, 0.0).sum()
        count = valid.sum() * target.shape[1]
        getattr(self, f"{stage}_loss").update(nll, count)
        last_week = repeat_last(batch["history"], self.season_length, target.shape[1])
        getattr(self, f"{stage}_errors").update(
            mean,
            target,
            valid,
            peers={"rhp": profile, "last_week": last_week},
            day_type=batch["target_day_type"],
            holiday=batch["target_holiday"],
        )
        getattr(self, f"{stage}_samples").update(forecast.samples, forecast.log_density, target, valid)
        return {"loss": (nll / count).to(target.dtype)} | self._in_units(batch, mean) | self._intervals(forecast)

    def _intervals(self, forecast: SampledForecast) -> dict[str, Tensor]:
        """Spread of the predictive distribution in the data's units."""
        ordered = forecast.samples.sort(dim=0).values
        out = {"std": forecast.samples.std(0) * self.units.scale.double()}
        for percent in self.test_samples.coverages:
            for name, sign in (("lower", -1), ("upper", 1)):
                scaled = sample_quantile(ordered, 0.5 + sign * percent / 200)
                out[f"{name}_{percent}"] = self.units(scaled)
        return {name: value.to(forecast.mean.dtype) for name, value in out.items()}

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        forecast = self.sampled_forecast(batch)
        return self._in_units(batch, forecast.mean.to(batch["history"].dtype)) | self._intervals(forecast)

    @override
    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._reset(self.val_samples)

    @override
    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self._reset(self.test_samples)

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        scores = self.val_samples.compute()
        self._log_exact({f"val/{name}": scores[name] for name in ("crps_scaled", "nll_scaled", "coverage_90")})

    @override
    def _values(self, stage: Stage) -> dict[str, Tensor]:
        return super()._values(stage) | getattr(self, f"{stage}_samples").compute()
