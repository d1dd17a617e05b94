"""How good solutions of power flows are: over all scenarios, whatever batches and ranks they came in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_modules.metrics.sums import Sums


class FlowErrors(Sums):
    """Mismatch, distance to a reference, effort, and violations of limits.

    `compute` returns, without the names of stages (islanded scenarios have no power flow and count in nothing but
    ``islanded``):

    - ``scenarios``, ``islanded``, ``unsolved`` and ``converged_share`` of those that are not islanded;
    - ``max_mismatch_pu``, the largest ``|F|`` of all; ``mse``, the mean of ``F^2`` over all equations;
      ``flow_deviation_percent = 100 sum |F| / sum |target|``, the paper's error;
    - ``iterations_mean`` and ``iterations_max``;
    - where there is a reference, ``dv_max_pu`` and ``dtheta_max_degree``, the largest difference of a voltage to it;
    - ``overloads`` (branches over all scenarios), ``overloaded_scenarios``, ``low_voltages``, ``high_voltages``.
    """

    full_state_update = False
    sums: Tensor
    largest: Tensor
    referenced: Tensor

    # Order of the sums.
    _SUMS = (
        "scenarios",
        "islanded",
        "converged",
        "squared",
        "equations",
        "absolute",
        "target",
        "iterations",
        "overloads",
        "overloaded_scenarios",
        "low_voltages",
        "high_voltages",
    )
    _LARGEST = ("max_mismatch_pu", "iterations_max", "dv_max_pu", "dtheta_max_degree")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(len(self._SUMS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("largest", torch.zeros(len(self._LARGEST), dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("referenced", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(
        self,
        *,
        islanded: Tensor,
        converged: Tensor,
        iterations: Tensor,
        mismatch: Tensor,
        target: Tensor,
        violations: dict[str, Tensor],
        dv: Tensor | None = None,
        dtheta: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            islanded: Whether the outage islands buses, (B,) bool. All following tensors have a column or an entry for
                each scenario that is not islanded, (S).
            converged: Whether the mismatch is below the tolerance, (S,) bool.
            iterations: (S,).
            mismatch: ``F``, per unit, (equation, S).
            target: Scheduled powers of the equations, per unit, (equation, S).
            violations: ``overloads``, ``low_voltages`` and ``high_voltages``, counts, (S,).
            dv: Largest difference of voltage magnitudes to the reference, per unit, (S,).
            dtheta: The same of angles, degrees, (S,).
        """
        absolute = mismatch.abs().double()
        added = {
            "scenarios": len(islanded),
            "islanded": islanded.sum(),
            "converged": converged.sum(),
            "squared": absolute.square().sum(),
            "equations": mismatch.numel(),
            "absolute": absolute.sum(),
            "target": target.abs().sum(),
            "iterations": iterations.sum(),
            "overloaded_scenarios": (violations["overloads"] > 0).sum(),
        } | {name: count.sum() for name, count in violations.items()}
        self.sums += torch.stack([torch.as_tensor(added[name], device=self.sums.device) for name in self._SUMS])
        if not mismatch.numel():
            return
        largest = [absolute.max(), iterations.max()]
        largest += [self.largest.new_zeros(()) if value is None else value.max() for value in (dv, dtheta)]
        self.largest = torch.maximum(self.largest, torch.stack([value.double() for value in largest]))
        self.referenced += float(dv is not None)

    @override
    def compute(self) -> dict[str, Tensor]:
        """All values by name, float64 scalars."""
        total = dict(zip(self._SUMS, self.sums, strict=True))
        solvable = total["scenarios"] - total["islanded"]
        out = {
            "scenarios": total["scenarios"],
            "islanded": total["islanded"],
            "unsolved": solvable - total["converged"],
            "converged_share": total["converged"] / solvable,
            "mse": total["squared"] / total["equations"],
            "flow_deviation_percent": 100 * total["absolute"] / total["target"],
            "iterations_mean": total["iterations"] / solvable,
        }
        out |= {name: total[name] for name in self._SUMS[-4:]}
        largest = dict(zip(self._LARGEST, self.largest, strict=True))
        if not self.referenced:
            del largest["dv_max_pu"], largest["dtheta_max_degree"]
        return out | largest


class ScreeningErrors(Sums):
    """Which overloads after outages a quick estimate finds: hits, false alarms and misses over branches and outages."""

    full_state_update = False
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, found: Tensor, true: Tensor) -> None:
        """Add overloads of a batch, as the estimate and the exact solution see them, both bool of one shape."""
        self.counts += torch.stack([(found & true).sum(), (found & ~true).sum(), (~found & true).sum()])

    @override
    def compute(self) -> dict[str, Tensor]:
        """``recall`` of the true overloads, ``precision`` of the alarms, and the number of ``overloads``."""
        hits, alarms, misses = self.counts
        return {"recall": hits / (hits + misses), "precision": hits / (hits + alarms), "overloads": hits + misses}


class VoltageErrors(Sums):
    """Differences of voltages to true ones: root mean square and largest, of magnitudes and angles."""

    full_state_update = False
    sums: Tensor
    largest: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("largest", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="max")

    @override
    def update(self, dvm: Tensor, dva: Tensor) -> None:
        """Add differences of magnitudes (per unit) and angles (rad), of any shape; NaN: not known."""
        parts = [value[value.isfinite()].abs().double() for value in (dvm, torch.rad2deg(dva))]
        new = [torch.stack([part.square().sum(), torch.as_tensor(part.numel()).to(part)]) for part in parts]
        self.sums += torch.cat(new)
        tops = [part.max() if part.numel() else part.new_zeros(()) for part in parts]
        self.largest = torch.maximum(self.largest, torch.stack(tops))

    @override
    def compute(self) -> dict[str, Tensor]:
        """``vm_rms_pu``, ``vm_max_pu``, ``va_rms_degree``, ``va_max_degree``; NaN where nothing is known."""
        square_vm, count_vm, square_va, count_va = self.sums
        return {
            "vm_rms_pu": (square_vm / count_vm).sqrt(),
            "vm_max_pu": torch.where(count_vm > 0, self.largest[0], torch.nan),
            "va_rms_degree": (square_va / count_va).sqrt(),
            "va_max_degree": torch.where(count_va > 0, self.largest[1], torch.nan),
        }
