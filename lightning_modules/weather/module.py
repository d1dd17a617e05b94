"""WeatherMixerModule: training on steps or rollouts, rollouts scored at leads beside the baselines, forecasts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.metrics.forecast import SumRatio
from lightning_modules.metrics.weather import products
from lightning_modules.supervised import Supervised
from lightning_modules.weather.baselines import FittedBaselines
from lightning_modules.weather.blocks import Blocks
from lightning_modules.weather.loss import channel_weights, relative_distance, squared_error
from lightning_modules.weather.rollout import Rollouts
from lightning_modules.weather.scoring import OfBatch, Scoring, logged, skill
from lightning_modules.weather.work import Work
from parallel.sharding import clip_grad_norm_, grid_of
from parallel.sharding.memory import held_bytes
from parallel.sharding.stored import load_network

Batch = dict[str, Tensor]
Mode = Literal["fixed", "cycle", "random"]
Rollout = Literal["autoregressive", "latent"]
Loss = Literal["squared", "relative"]
Stage = Literal["val", "test"]

# Specific humidity is shown in g/kg.
_SHOWN = {"q": 1000.0}


class WeatherMixerModule(Supervised):
    """A network that forecasts the next state of the atmosphere, trained on one step or on rollouts.

    A longer forecast is made in one of two ways: ``autoregressive``, every step from the forecast before, or
    ``latent``, the processor of the network applied once per step between one embedding and one recovery (the paper's).

    Under a grid of ranks (``strategy=jigsaw``) a rank has its block of fields and weights; all sums are completed over
    the ranks, and what is logged does not depend on their number.

    Steps of validation return ``loss``; those of the test also what figures need, since fields are too large to be
    collected: ``mse`` (B, F, L, V) in the units of the fields and ``acc`` (B, F, L, V) of the network and the baselines
    of `forecasts`, ``power`` (B, 2, L, V, M), zonal power of forecast and truth, ``valid_h``, and in the first step
    ``map_forecast`` and ``map_truth`` (1, L, H, W, V); on ranks that share the items of another one these have no
    items. Prediction returns ``prediction``, (B, L, H, W, V), this rank's block in the units of the fields, ``index``
    and ``valid_h``.

    Logged: ``<stage>/loss`` (of the first lead), ``<stage>/rmse/<channel>@<lead>``, ``acc/...``,
    ``persistence_ratio/...`` and ``climatology_ratio/...`` (RMSE over theirs), ``<stage>/small_scales/...`` (zonal
    power of forecast over truth in waves of 3 to 8 grid lengths), in the test also ``damped_ratio/...`` and
    ``linear_ratio/...``; after every epoch of training what a rank needs for it, see
    `lightning_modules.weather.work.Work`.

    Args:
        net: Partial of a network like `networks.weather_mixer.WeatherMixer`; it is built where the ranks are known.
        optimizer: Partial that takes the parameters.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        scheduler_monitor: Metric given to schedulers that watch one.
        scheduler_interval: ``epoch`` or ``step``.
        edge_lr_factor: Learning rate of embedding and recovery, relative to the others.
        rollout_mode: How many steps a training step rolls out: always ``rollout_max`` (``fixed``), 1 to ``rollout_max``
            in turns (``cycle``), or at ``random``, equal on all ranks.
        rollout_max: Most steps in training; the data need ``data.train_steps`` of as many.
        rollout: How training rolls out, ``autoregressive`` (the loss is the mean over the steps) or ``latent`` (that of
            the last).
        eval_rollout: How evaluation and prediction do.
        loss: ``squared``: weighted mean squared error. ``relative``: ||p - t|| / ||t|| of a sample over all channels
            and points, without weights (FourCastNet); for whole fields alone.
        channel_weights: Of the loss: null, ``era5`` (the paper's), or a mapping of names to weights.
        weight_power: Exponent of the weights: 1, or 2 as in the published code.
        latitude_weighted: Whether the loss weights latitudes by their area.
        linear_patterns: Empirical orthogonal functions of the linear baseline; 0: leave it out.
        linear_ridge: Its ridge.
        baseline_samples: Most training samples that damped persistence and the linear baseline are fitted to.
        logged_channels: Whose scores are logged; None: of all. The table of skill has all.
        weights: Checkpoint whose network this one begins with, of any grid of ranks on any other; the optimizer begins
            anew. None: at random.
        seed: Of random rollouts.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("input", "target", "index", "valid_h", "step", "io_bytes", "io_s")

    def __init__(
        self,
        net: Callable[..., nn.Module],
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        edge_lr_factor: float = 1.0,
        rollout_mode: Mode = "fixed",
        rollout_max: int = 1,
        rollout: Rollout = "autoregressive",
        eval_rollout: Rollout = "autoregressive",
        loss: Loss = "squared",
        channel_weights: str | Mapping[str, float] | None = None,
        weight_power: int = 1,
        latitude_weighted: bool = True,
        linear_patterns: int = 100,
        linear_ridge: float = 0.01,
        baseline_samples: int = 1024,
        logged_channels: Sequence[str] | None = None,
        weights: str | None = None,
        seed: int = 0,
    ) -> None:
        chosen = {"rollout_mode": (rollout_mode, Mode), "rollout": (rollout, Rollout), "loss": (loss, Loss)}
        for key, (value, choices) in {**chosen, "eval_rollout": (eval_rollout, Rollout)}.items():
            if value not in get_args(choices):
                raise ValueError(f"model.{key}={value!r} is unknown; choose {', '.join(get_args(choices))}")
        if rollout_max < 1 or baseline_samples < 2 or linear_patterns < 0:
            raise ValueError(
                f"model.rollout_max={rollout_max}, model.baseline_samples={baseline_samples}, "
                f"model.linear_patterns={linear_patterns}: must be at least 1, 2, 0"
            )
        if weight_power not in (1, 2):
            raise ValueError(f"model.weight_power={weight_power}: choose 1, or 2 as in the published code")
        if loss == "relative" and (channel_weights is not None or latitude_weighted):
            raise ValueError(
                "model.loss=relative has no weights: set model.latitude_weighted=false and model.channel_weights=null"
            )
        if not edge_lr_factor > 0:
            raise ValueError(f"model.edge_lr_factor={edge_lr_factor}: must be above 0")
        with torch.device("meta"):  # counted before it is built; see `configure_model`
            placeholder = net()
        super().__init__(placeholder, optimizer, scheduler, scheduler_monitor, scheduler_interval)
        self.save_hyperparameters(ignore=["net", "optimizer", "scheduler"])
        self.make_net = net
        self.edge_lr_factor = edge_lr_factor
        self.rollout_mode, self.rollout_max = rollout_mode, rollout_max
        self.rollout, self.eval_rollout, self.loss = rollout, eval_rollout, loss
        self.weights_kind, self.weight_power, self.latitude_weighted = channel_weights, weight_power, latitude_weighted
        self.linear_patterns, self.linear_ridge, self.baseline_samples = linear_patterns, linear_ridge, baseline_samples
        self.logged_channels, self.weights, self.seed = logged_channels, weights, seed
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"model.weights={weights}: no such file; name a checkpoint of an earlier run, or null")
        self.losses = nn.ModuleDict({stage: SumRatio() for stage in ("val_", "test_")})
        self._scoring: dict[str, Scoring] = {}
        self._fitted: FittedBaselines | None = None
        self._constants: dict[str, Tensor] = {}
        self._work = Work()

    # ------------------------------------------------------------------------------------------------------- network

    @override
    def configure_model(self) -> None:
        if any(parameter.is_meta for parameter in self.net.parameters()):
            self.net = self.make_net(grid=grid_of(self._trainer))
            if self.weights is not None:
                self._begin_with(self.weights)

    def _begin_with(self, path: str) -> None:
        try:
            load_network(self.net, path)
        except ValueError as error:
            raise ValueError(f"model.weights={path}: {error}") from None

    @override
    def cpu(self) -> Self:
        if any(parameter.is_meta for parameter in self.net.parameters()):
            return self  # a run that has failed before there was a network ends too, with its own message
        return super().cpu()

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.configure_model()
        return super().load_state_dict(state_dict, *args, **kwargs)

    @override
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            clip_grad_norm_(self.net.parameters(), gradient_clip_val, self.net.grid)

    @override
    def parameter_groups(self) -> list[Any]:
        if self.edge_lr_factor == 1:
            return super().parameter_groups()
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.net.named_parameters():
            groups[self.net.parameter_kind(name) in ("embedding", "recovery")].append(parameter)
        lr = self.make_optimizer.keywords["lr"]
        return [{"params": groups[False]}, {"params": groups[True], "lr": lr * self.edge_lr_factor}]

    @override
    def forward(self, x: Tensor, steps: int = 1) -> Tensor:
        """Normalised channels after some steps, this rank's block, (B, H, W, V)."""
        return self.net(x, steps)

    def _roll(self, batch: Batch, steps: Sequence[int], kind: Rollout) -> list[Tensor]:
        """Forecasts after some numbers of steps, in increasing order."""
        return Rollouts(self, self.blocks, self.data.step_input)(batch["input"], batch["step"], steps, kind)

    # ---------------------------------------------------------------------------------------------------------- data

    @property
    def data(self) -> Any:
        """The DataModule."""
        return self.trainer.datamodule

    @property
    def blocks(self) -> Blocks:
        """Which block of the fields is this rank's."""
        return Blocks(self.net.grid, self.data.num_outputs, self.data.num_inputs, self.data.width)

    @property
    def forecasts(self) -> list[str]:
        """What is scored: the network, and the baselines that it is compared with in the running stage."""
        names = ["model", "persistence", "climatology"]
        if self.trainer.testing:
            names.append("damped_persistence")
            if self.linear_patterns:
                names.append("linear")
        return names

    @override
    def setup(self, stage: str) -> None:
        if self.rollout_max > self.data.train_steps:
            raise ValueError(
                f"model.rollout_max={self.rollout_max}: the training samples have {self.data.train_steps} targets; set "
                f"data.train_steps={self.rollout_max}"
            )
        grid = grid_of(self._trainer)
        if self.loss == "relative" and not grid.is_serial:
            raise ValueError("model.loss=relative needs whole fields: use model.loss=squared, or strategy=ddp")
        sizes = {name: getattr(self.net, name) for name in ("height", "width", "num_inputs", "num_outputs")}
        for name, size in sizes.items():
            if getattr(self.data, name) != size:
                raise ValueError(f"model.net.{name}={size}: the data have {getattr(self.data, name)} (data.{name})")
        if strange := [name for name in self.logged_channels or () if name not in self.data.names]:
            raise ValueError(
                f"model.logged_channels names {strange[0]!r}; the channels are {', '.join(self.data.names)}"
            )
        own = grid.channels(self.data.num_outputs, self.data.num_inputs)
        self._constants = {
            "latitude": self.data.latitude_weight,
            "channel": channel_weights(self.data.names, self.weights_kind)[own],
        }
        self._fitted = None

    def _constant(self, name: str) -> Tensor:
        """A constant of the data on the device of the module."""
        value = self._constants[name]
        if value.device != self.device:
            value = self._constants[name] = value.to(self.device)
        return value

    @cached_property
    def _scale(self) -> Tensor:
        """Standard deviations of all channels in the units that are shown, (V,), float64."""
        shown = [_SHOWN.get(channel.variable, 1.0) for channel in self.data.channels]
        return self.data.scale[1] * torch.tensor(shown, dtype=torch.float64)

    def _climatology(self, hours: Tensor) -> Tensor:
        """Normalised climatology of this rank at times (B, L), (B, L, H, W, V); with one field for all (1, 1, ...)."""
        if "climatology" not in self._constants:
            self._constants["climatology"] = self.data.climatology
        fields = self._constant("climatology")
        if len(fields) == 1:
            return fields[None]
        basis = self.data.climatology_basis(hours).to(fields)
        return torch.einsum("blk,khwv->blhwv", basis, fields)

    # ------------------------------------------------------------------------------------------------------ training

    def _steps_now(self) -> int:
        """Steps of the training step at hand, equal on all ranks."""
        if self.rollout_mode == "fixed" or self.rollout_max == 1:
            return self.rollout_max
        if self.rollout_mode == "cycle":
            return 1 + self.trainer.global_step % self.rollout_max
        return 1 + int(np.random.default_rng([self.seed, self.trainer.global_step]).integers(self.rollout_max))

    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """This rank's share of the loss of a batch."""
        own = slice(0, self.blocks.own_count)
        if self.loss == "relative":
            return relative_distance(prediction[..., own], target[..., own])
        latitude = self._constant("latitude")
        if not self.latitude_weighted:
            latitude = torch.ones_like(latitude)
        count = len(target) * self.data.height * self.data.width * self.data.num_outputs
        return squared_error(
            prediction[..., own], target[..., own], latitude, self._constant("channel"), self.weight_power, count
        )

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        steps = self._steps_now()
        with self._work.saving(steps, self.net):
            loss = self._loss_of(batch, steps)
        size, first = len(batch["target"]), self.blocks.first_of_instance
        self._add_to_epoch("loss", loss.detach() * size, size if first else 0)
        forward = self.net.flops(size, steps) if self.rollout == "latent" else steps * self.net.flops(size, 1)
        self._work.add(3 * forward / self.net.grid.size, size if first else 0, batch["io_bytes"], batch["io_s"])
        return loss

    def _loss_of(self, batch: Batch, steps: int) -> Tensor:
        """This rank's share of the loss of a rollout of some steps."""
        if self.rollout == "latent":
            return self._loss(self._roll(batch, [steps], "latent")[0], batch["target"][:, steps - 1])
        outputs = self._roll(batch, list(range(1, steps + 1)), "autoregressive")
        return sum(self._loss(output, batch["target"][:, i]) for i, output in enumerate(outputs)) / steps

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._work.begin_step(self.net.grid.traffic.total())

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self._work.end_step(self.net.grid.traffic.total())
        if not self._work.held and self.trainer.global_step > self._work.first_step:  # validation drops gradients
            self._work.held = held_bytes(self.parameters(), self.trainer.optimizers)

    @override
    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._work.begin_epoch()

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._work = Work(self.trainer.global_step)  # epochs that go on in their middle have no other hook

    @override
    def on_train_epoch_end(self) -> None:
        if self._work.steps:  # before the means, which take time
            found = self._work.of_epoch(self.trainer.strategy.root_device)
            self._log_exact({name: torch.tensor(value) for name, value in found.items()})
        super().on_train_epoch_end()

    # ---------------------------------------------------------------------------------------------------- evaluation

    def _start_stage(self, stage: Stage) -> None:
        self._scoring[stage] = Scoring(self.forecasts, len(self.data.lead_steps), self.blocks, self.device)
        self.losses[f"{stage}_"].reset()

    @override
    def on_validation_epoch_start(self) -> None:
        self._start_stage("val")

    @override
    def on_test_epoch_start(self) -> None:
        self._start_stage("test")

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val", batch_idx)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test", batch_idx)

    def _evaluate(self, batch: Batch, stage: Stage, batch_idx: int) -> dict[str, Tensor]:
        blocks = self.blocks
        own, size = slice(0, blocks.own_count), len(batch["target"])
        outputs = self._roll(batch, self.data.lead_steps, self.eval_rollout)
        loss = self._loss(outputs[0], batch["target"][:, 0])
        self.losses[f"{stage}_"].update(loss * size, size if blocks.first_of_instance else 0)
        forecast, truth = torch.stack(outputs, 1)[..., own], batch["target"][..., own]
        climatology = self._climatology(batch["valid_h"][:, 1:])
        every = {"model": forecast} | self._baselines(batch, climatology, truth)
        latitude = self._constant("latitude")
        sums = [products(every[name], truth, climatology, latitude, blocks.width) for name in self.forecasts]
        power = blocks.zonal_power(torch.stack([forecast, truth], 1), latitude)  # (B, 2, L, V, M)
        of_batch = self._scoring[stage].update(torch.stack(sums), power)
        out = {"loss": blocks.grid.sum_over_instance(loss)}
        if stage == "test":
            out |= self._for_figures(batch, of_batch, power, (forecast, truth), batch_idx)
        return out

    def _baselines(self, batch: Batch, climatology: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Forecasts of the baselines, (B, L, H, W, V) each."""
        now = batch["input"][..., : self.blocks.own_count]
        found = {
            "persistence": now[:, None].expand_as(truth),
            "climatology": climatology.expand_as(truth),
        }
        if not self.trainer.testing:
            return found
        if self._fitted is None:
            self._fitted = self._fit_baselines()
        anomaly = now - self._climatology(batch["valid_h"][:, :1])[:, 0]
        fitted = self._fitted.anomalies(anomaly, self.net.grid.sum_over_instance)
        return found | {name: climatology + later for name, later in fitted.items()}

    def _fit_baselines(self) -> FittedBaselines:
        """Fit what is fitted to the training part; all ranks together."""
        columns, hours = self.data.training_pairs(self.data.lead_steps, self.baseline_samples)
        anomalies = (
            self.data.block.fields(row).to(self.device) - self._climatology(torch.from_numpy(hour)[None])[0]
            for row, hour in zip(columns, hours, strict=True)
        )
        grid, latitude = self.net.grid, self._constant("latitude")
        return FittedBaselines.fit(
            anomalies, latitude, self.linear_patterns, self.linear_ridge, grid.sum_over_instance, grid.sum_over_tokens
        )

    def _for_figures(
        self, batch: Batch, of_batch: OfBatch, power: Tensor, fields: tuple[Tensor, Tensor], batch_idx: int
    ) -> dict[str, Tensor]:
        """What figures show of the samples, from all channels, on the first rank of an instance."""
        blocks, scale = self.blocks, self._scale.to(self.device)
        found = {
            "mse": blocks.all_channels(of_batch.squared.movedim(0, 1)) * scale**2,
            "acc": blocks.all_channels(of_batch.correlations.movedim(0, 1)),
            "power": blocks.all_channels(power, -2) * scale[:, None] ** 2,
            "valid_h": batch["valid_h"],
        }
        shown = slice(0, 1 if batch_idx == 0 else 0)
        mean, std = (value.to(self.device) for value in self.data.scale)
        for name, field in zip(("map_forecast", "map_truth"), fields, strict=True):
            found[name] = (blocks.gather(field[shown]).double() * std + mean).float()
        return found if blocks.first_of_instance else {name: value[:0] for name, value in found.items()}

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    @override
    def on_validation_start(self) -> None:
        self._work.pause()

    @override
    def on_validation_end(self) -> None:
        self._work.resume()

    @override
    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _log_scores(self, stage: Stage) -> None:
        found, scale = self._scoring[stage].compute(), self._scale.to(self.device)
        values = {"loss": self.losses[f"{stage}_"].compute()}
        values |= logged(found, scale, self.data.names, self.data.lead_names, self.logged_channels)
        self._log_exact({f"{stage}/{name}": value for name, value in values.items()})
        self.skill = skill(found, scale, self.data.names, self.data.lead_names)

    # ---------------------------------------------------------------------------------------------------- prediction

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        outputs = self._roll(batch, self.data.lead_steps, self.eval_rollout)
        blocks = self.blocks
        block = torch.stack(outputs, 1)[..., : blocks.own_count]
        mean, std = (value[blocks.own].to(self.device) for value in self.data.scale)
        prediction = (block.double() * std + mean).float()
        return {"prediction": prediction, "index": batch["index"], "valid_h": batch["valid_h"]}
