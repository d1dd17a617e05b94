"""Cost model of parallel training: fitted to records, tested by leaving runs out, asked about plans."""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from physics.energy_cost import Forecast
from physics.energy_cost.analysis import RefusedPlan, analyse, forecasts
from physics.energy_cost.planning import better_is

log = logging.getLogger(__name__)

_METRICS = {"mean_error": "mean_error", "max_error": "max_error", "left_out_mean": "loo_mean_error"}
_METRICS |= {"left_out_max": "loo_max_error"}
_PLAN_METRICS = ("mean_error", "max_error", "hours_mean_error", "hours_max_error")


class PlansRefused(ValueError):
    """Every plan was refused.

    A mistake of the settings although the test before has computed: the run ends with the message alone.

    Attributes:
        input_error: For `runner.job.is_input_error`.
    """

    input_error = True


class EnergyCostModel(pl.LightningModule):
    """Fits E = P_node M + P_device H + e_s S + e_u n U to the DataModule's records (`physics.energy_cost`).

    There is nothing to train: ``test`` and ``validate`` fit, and log errors on all runs and on left-out ones;
    ``predict`` gives hours and energy of ``data.plans``, NaN for a plan that is refused, and ends with an error where
    all are. They take the records from the DataModule (``records``).

    Args:
        draws: Of the bootstrap over repetitions, for intervals; 0: none.
        seed: Of the draws.
        metric_mode: ``max`` where more of ``data.metric`` is better, else ``min``; None: by its name (loss, error).
        tolerance: Share of the best metric that the largest useful batch may lose.
        carbon_intensity: Of the electricity, g/kWh, for the plans; None: no carbon dioxide.

    Raises:
        ValueError: If a number is out of range.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("configuration", "device_hours", "energy_kwh", "index")

    def __init__(
        self,
        draws: int = 1000,
        seed: int = 0,
        metric_mode: str | None = None,
        tolerance: float = 0.01,
        carbon_intensity: float | None = None,
    ) -> None:
        super().__init__()
        if draws < 0:
            raise ValueError(f"model.draws={draws}: give 0 or more")
        if metric_mode not in (None, "max", "min"):
            raise ValueError(f"model.metric_mode={metric_mode}: choose max, min or null")
        if not 0 <= tolerance < 1:
            raise ValueError(f"model.tolerance={tolerance}: give a share from 0 to 1")
        self.draws, self.seed, self.metric_mode, self.tolerance = draws, seed, metric_mode, tolerance
        self.carbon_intensity = carbon_intensity
        self.analysis: dict[str, Any] = {}
        self.forecasts: list[Forecast | RefusedPlan] = []

    def _analyse(self) -> None:
        data = self.trainer.datamodule
        mode = self.metric_mode or better_is(data.metric or "")
        self.analysis = analyse(data.records, self.draws, self.seed, mode, self.tolerance)
        for what, reason in self.analysis["refused"].items():
            log.warning("no fit of %s: %s", what, reason)
        for warning in (self.analysis["cost"] or {}).get("warnings", []):
            log.warning("%s", warning)

    on_validation_start = on_test_start = _analyse

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._errors("val", batch)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._errors("test", batch)

    def _errors(self, stage: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        cost = self.analysis["cost"]
        target = batch["energy_kwh"]
        prediction = torch.full_like(target, torch.nan)
        for i, row in enumerate(self.analysis["rows"]):
            if row["cost_error"] is not None:
                prediction[i] = target[i] * (1 + row["cost_error"])
        if cost is not None:
            values = {f"{stage}/{name}": cost[key] for key, name in _METRICS.items() if cost[key] is not None}
            values |= {f"{stage}/coefficient/{term}": value for term, value in cost["coefficients"].items()}
            self.log_dict(values, batch_size=len(target))
        if plans := self.analysis["plans"]:
            values = {f"{stage}/plan_{name}": plans[name] for name in _PLAN_METRICS}
            self.log_dict(values, batch_size=len(target))
        for name, series in self.analysis["series"].items():
            self.log(f"{stage}/kappa_kw/{name.replace(' ', '_')}", series["kappa_kw"], batch_size=len(target))
        if self.analysis["quality"]:
            self.log(f"{stage}/knee_global_batch_size", float(self.analysis["quality"]["knee"]), batch_size=len(target))
        return {"prediction": prediction, "target": target, "device_hours": batch["device_hours"]}

    @override
    def on_predict_start(self) -> None:
        data = self.trainer.datamodule
        kg = None if self.carbon_intensity is None else self.carbon_intensity / 1000
        self.forecasts = forecasts(data.means, data.plans, kg)
        for i, found in enumerate(self.forecasts):
            if isinstance(found, RefusedPlan):
                log.warning("data.plans[%d] is refused: %s", i, found.reason)

    @override
    def on_predict_end(self) -> None:
        """Raises `PlansRefused` where nothing could be predicted; by then the callbacks have written why."""
        refused = [found.reason for found in self.forecasts if isinstance(found, RefusedPlan)]
        if refused and len(refused) == len(self.forecasts):
            which = "the only plan is" if len(refused) == 1 else f"all {len(refused)} plans are"
            raise PlansRefused(f"data.plans: {which} refused: {'; '.join(dict.fromkeys(refused))}")

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        chosen = [self.forecasts[i] for i in batch["index"].tolist()]
        keys = ("energy_kwh", "energy_low", "energy_high", "hours", "hours_low", "hours_high")
        columns = {key: torch.tensor([getattr(f, key, math.nan) for f in chosen], dtype=torch.float64) for key in keys}
        return columns | {"prediction": columns["energy_kwh"], "index": batch["index"]}

    @override
    def configure_optimizers(self) -> None:
        return None
