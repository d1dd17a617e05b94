"""`BayesClassifier` on the embedded digits and `BayesRegressor` on a tiny series in float64, the same every time."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric
from typing_extensions import override

from datamodules.images import Images
from lightning_modules.bayes import BayesClassifier, BayesRegressor, ClassPrediction
from networks.bayes import Init
from networks.mlp import MLP
from tests.lightning_modules.tiny_series import WEEK, TinySeries
from tests.strategies import nets

SAMPLES, NUM_TRAIN, NUM_VAL = 12, 1293, 144
ADAM = functools.partial(torch.optim.Adam, lr=1e-3)


class NormMLP(nn.Sequential):
    """64-32-10 with batch normalisation."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


class Sampled(BayesClassifier):
    """Keeps what a validation found, and the probabilities of this rank's items."""

    score_names = (*BayesClassifier.score_names, "items")

    def __init__(
        self,
        samples: int = SAMPLES,
        eval_samples: int = 16,
        scope: Any = "shared",
        dropout: bool = False,
        norm: bool = False,
        hidden: tuple[int, ...] = (128, 128),
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            super().__init__(
                NormMLP() if norm else MLP(hidden=hidden, dropout=0.2 if dropout else 0.0),
                ADAM,
                augment_scope=scope,
                posterior="dropout" if dropout else "gaussian",
                init=Init(sigma_scale=1.0),
                num_samples=samples,
                num_eval_samples=eval_samples,
                seed=3,
                **options,
            )
        self.to(dtype)
        self.val_items, self.test_items = SumMetric(), SumMetric()
        self.found: dict[str, Tensor] = {}
        self.evaluated: list[Tensor] = []

    @override
    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.evaluated = []

    @override
    def update_scores(self, stage: Any, logits: ClassPrediction, label: Tensor) -> None:
        super().update_scores(stage, logits, label)
        getattr(self, f"{stage}_items").update(len(label))
        self.evaluated.append(logits.log_probability.exp())

    @override
    def scores(self, stage: Any) -> dict[str, Tensor]:
        self.found = super().scores(stage) | {"items": getattr(self, f"{stage}_items").compute()}
        return dict(self.found)


class Windows(nn.Module):
    """The profile plus a perceptron with dropout on each series; mean, or mean and log-variance."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WEEK, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 10 * outputs))
        self.outputs = outputs

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        out = self.body(batch["history"].mT).unflatten(2, (10, self.outputs)).transpose(1, 2)
        shifted = out[..., 0] + batch["forecast_profile"]
        return shifted if self.outputs == 1 else torch.stack([shifted, 0.1 * out[..., 1]], -1)


class SampledForecasts(BayesRegressor):
    """Keeps what a validation found, and the intervals of this rank's windows."""

    def __init__(self, samples: int = SAMPLES, eval_samples: int = 16, **options: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            predicted = options.get("observation") == "predicted"
            super().__init__(
                Windows(2 if predicted else 1),
                ADAM,
                init=Init(sigma_scale=1.0),
                num_samples=samples,
                num_eval_samples=eval_samples,
                seed=3,
                **options,
            )
        self.double()
        self.found: dict[str, Tensor] = {}
        self.evaluated: list[Tensor] = []

    @override
    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.evaluated = []

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        out = super().validation_step(batch, batch_idx)
        self.evaluated.append(torch.stack([out[name] for name in ("prediction", "std", "lower_90", "upper_90")], 1))
        return out

    @override
    def _values(self, stage: Any) -> dict[str, Tensor]:
        self.found = super()._values(stage)
        return dict(self.found)


def fit(strategy: Any, folder: str, epochs: int = 3, data: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Train on the digits; returns the module and its trainer. Arguments of `nets.fit` and of `Sampled`."""
    own, rest = _split(kwargs)
    options = {"test_size": 360, "test_from": "random", "normalize": "none", "seed": 5} | (data or {})
    return nets.fit(strategy, folder, module=Sampled(**own), epochs=epochs, datamodule=Images(**options), **rest)


def fit_series(strategy: Any, folder: str, epochs: int = 2, **kwargs: Any) -> Any:
    """Train on the tiny series; arguments of `nets.fit` and of `SampledForecasts`."""
    own, rest = _split(kwargs)
    module, data = SampledForecasts(**own), TinySeries(batch_size=8)
    return nets.fit(strategy, folder, module=module, epochs=epochs, datamodule=data, precision="64-true", **rest)


def _split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    of_trainer = {"callbacks", "ckpt_path", "devices", "accumulate_grad_batches", "gradient_clip_val", "max_steps"}
    return (
        {key: value for key, value in kwargs.items() if key not in of_trainer},
        {key: value for key, value in kwargs.items() if key in of_trainer},
    )
