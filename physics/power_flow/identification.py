"""Unknown parameters of a grid: how optimizers see them, and how measurements depend on them.

A parameter is written ``value = exp(z)`` (form ``log``: reactances, resistances, line charging, loads) or ``value = z``
(``linear``: taps, phase shifts); optimizers work on ``raw``, zero at the start, with ``z = z_start + scale raw``, or
with bounds ``z = low + (high - low) sigmoid(raw_start + raw)``, which no step can leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from physics.power_flow.equations import Equations, residual
from physics.power_flow.grid import Grid, listed
from physics.power_flow.measurements import simulate
from physics.power_flow.scenarios import Scenarios

Form = Literal["log", "linear"]

BRANCH_FIELDS = ("r", "x", "g", "b", "tap", "shift")
BUS_FIELDS = ("p_load_mw", "q_load_mvar", "g_shunt", "b_shunt")
FIELDS = (*BRANCH_FIELDS, *BUS_FIELDS)
LINEAR_FIELDS = ("tap", "shift")
LOADS = ("p_load_mw", "q_load_mvar")


@dataclass(frozen=True, eq=False)
class Unknown:
    """One field of some elements.

    Args:
        field: One of `FIELDS`. A load means what is drawn in all scenarios beyond what they say themselves.
        elements: Indices of branches or buses, ``[P]`` int64.
        start: Values to begin with, ``[P]``.
        form: ``log`` keeps the sign of the start.
        bounds: Smallest and largest value; None: none.
        prior: Standard deviation of a Gaussian prior around the start, of ``z`` (with ``log`` relative); None: none.
    """

    field: str
    elements: Tensor
    start: Tensor
    form: Form = "log"
    bounds: tuple[float, float] | None = None
    prior: float | None = None

    def __post_init__(self) -> None:
        if self.field not in FIELDS:
            raise ValueError(f"parameter {self.field!r} is unknown; choose from {', '.join(FIELDS)}")
        if self.form not in ("log", "linear"):
            raise ValueError(f"form {self.form!r} of {self.field} is unknown; choose log or linear")
        if self.form == "log" and bool((self.start == 0).any()):
            raise ValueError(
                f"{self.field} is 0 at the start at {int((self.start == 0).sum())} elements, and stays 0 in the form "
                "log; leave them out, or use the form linear"
            )
        if self.bounds is not None:
            low, high = self.bounds
            size = self.start.abs() if self.form == "log" else self.start
            if not low < high or (self.form == "log" and low <= 0):
                raise ValueError(
                    f"bounds {list(self.bounds)} of {self.field}: give the smaller one first, above 0 for log"
                )
            if bool(((size <= low) | (size >= high)).any()):
                raise ValueError(f"bounds {list(self.bounds)} of {self.field} leave out the start of an element")
        if self.prior is not None and not self.prior > 0:
            raise ValueError(f"prior {self.prior} of {self.field}: the standard deviation must be above 0")

    def __len__(self) -> int:
        return len(self.elements)

    @property
    def _z_start(self) -> Tensor:
        return self.start.abs().log() if self.form == "log" else self.start

    @property
    def _z_bounds(self) -> tuple[float, float] | None:
        if self.bounds is None or self.form == "linear":
            return self.bounds
        low, high = torch.tensor(self.bounds, dtype=torch.float64).log().tolist()
        return low, high

    def z(self, raw: Tensor) -> Tensor:
        """``z`` of ``raw``, ``[P]``."""
        start, bounds = self._z_start, self._z_bounds
        if bounds is not None:
            low, high = bounds
            share = (start - low) / (high - low)
            return low + (high - low) * torch.sigmoid(torch.logit(share) + raw)
        if self.form == "log":
            return start + raw
        size = self.start.abs()
        typical = size[size > 0].mean() if bool((size > 0).any()) else size.new_tensor(1.0)
        return start + torch.where(size > 0, size, typical) * raw

    def values(self, raw: Tensor) -> Tensor:
        """Parameters, ``[P]``."""
        z = self.z(raw)
        return self.start.sign() * z.exp() if self.form == "log" else z

    def penalty(self, raw: Tensor) -> Tensor:
        """Deviations from the prior in units of its standard deviation, ``[P]`` or ``[0]``."""
        return raw[:0] if self.prior is None else (self.z(raw) - self._z_start) / self.prior

    def to(self, device: torch.device | str) -> Unknown:
        """The same elsewhere."""
        return Unknown(self.field, self.elements.to(device), self.start.to(device), self.form, self.bounds, self.prior)


class Unknowns:
    """Several fields together; ``raw`` is one vector ``[P]`` for all.

    Args:
        parts: The fields, each at most once.
    """

    def __init__(self, parts: Sequence[Unknown]) -> None:
        self.parts = list(parts)
        fields = [part.field for part in self.parts]
        if twice := [field for field in fields if fields.count(field) > 1]:
            raise ValueError(f"parameter {twice[0]!r} is named twice")

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def split(self, raw: Tensor) -> list[Tensor]:
        """``raw`` by field."""
        return list(raw.split([len(part) for part in self.parts]))

    def values(self, raw: Tensor) -> Tensor:
        """Parameters, ``[P]``."""
        return torch.cat([part.values(r) for part, r in zip(self.parts, self.split(raw), strict=True)])

    def penalty(self, raw: Tensor) -> Tensor:
        """Deviations from the priors in units of their standard deviations, ``[K]``."""
        return torch.cat([part.penalty(r) for part, r in zip(self.parts, self.split(raw), strict=True)])

    def apply(self, grid: Grid, raw: Tensor) -> tuple[Grid, Tensor]:
        """The grid with these parameters, and the change of the injections ``[n]`` per unit; differentiable."""
        fields: dict[str, Tensor] = {}
        ds = torch.zeros_like(grid.vm)
        change = {name: ds for name in LOADS}
        for part, r in zip(self.parts, self.split(raw), strict=True):
            values = part.values(r)
            if part.field in LOADS:
                drawn = (part.start - values) / grid.base_mva
                change[part.field] = ds.index_add(0, part.elements, drawn)
            else:
                fields[part.field] = getattr(grid, part.field).index_copy(0, part.elements, values)
        return grid.replace(**fields), torch.complex(change["p_load_mw"], change["q_load_mvar"])

    def names(self, grid: Grid) -> list[str]:
        """``field element`` of every parameter."""
        found = []
        for part in self.parts:
            elements = grid.branch_names if part.field in BRANCH_FIELDS else grid.bus_names
            found += [f"{part.field} {elements[i]}" for i in part.elements.tolist()]
        return found

    def to(self, device: torch.device | str) -> Unknowns:
        """The same elsewhere."""
        return Unknowns([part.to(device) for part in self.parts])


class Sensitivity(NamedTuple):
    """Derivatives at a solution.

    Attributes:
        voltages: Of magnitudes and angles to ``raw``, ``[2 n, B, P]``.
        measurements: Of the quantities, by name, ``[elements, B, P]``.
    """

    voltages: Tensor
    measurements: dict[str, Tensor]


def sensitivity(
    grid: Grid,
    unknowns: Unknowns,
    raw: Tensor,
    scenarios: Scenarios,
    vm: Tensor,
    va: Tensor,
    quantities: Sequence[str],
) -> Sensitivity:
    """How voltages and measurements change with the parameters: ``du/draw = -J^-1 dF/draw`` (implicit functions).

    Dense in the unknowns of a scenario: meant for grids of up to some hundred buses and parameters.

    Args:
        grid: The grid, without the parameters applied.
        unknowns: The parameters.
        raw: Where, ``[P]``.
        scenarios: ``B`` scenarios, without the parameters applied.
        vm: Solution, per unit, ``[n, B]``.
        va: Solution, rad, ``[n, B]``.
        quantities: Of `physics.power_flow.measurements.QUANTITIES`.
    """
    raw = raw.detach()

    def equations(r: Tensor) -> Tensor:
        changed, ds = unknowns.apply(grid, r)
        return residual(changed, vm, va, scenarios.s + ds[:, None], scenarios.status)

    by_raw = torch.func.jacfwd(equations)(raw)  # [N_u, B, P]
    changed, ds = unknowns.apply(grid, raw)
    eq = Equations(changed)
    given = eq.batch(Scenarios(scenarios.s + ds[:, None], scenarios.vm, scenarios.status, scenarios.names))
    jacobian = eq.pattern.dense(eq.jacobian_values(eq.state(vm, va), given.changes))  # [B, N_u, N_u]
    du = -torch.linalg.solve(jacobian, by_raw.movedim(1, 0)).movedim(0, 1)
    angles = eq.num_angles
    dva = torch.zeros(*va.shape, len(raw), dtype=vm.dtype, device=vm.device)
    dvm = torch.zeros_like(dva)
    dva[eq.order[eq.num_slack :]] = du[:angles]
    dvm[eq.order[eq.first_pq :]] = du[angles : angles + eq.num_magnitudes]

    def seen(step: Tensor) -> dict[str, Tensor]:
        moved, _ = unknowns.apply(grid, raw + step)
        return simulate(moved, vm + dvm @ step, va + dva @ step, quantities)

    return Sensitivity(torch.cat([dvm, dva]), torch.func.jacfwd(seen)(torch.zeros_like(raw)))


class NormalEquations(NamedTuple):
    """Sums over measurements: ``matrix = S^T S`` ``[P, P]``, ``gradient = S^T r`` ``[P]``, ``cost = r^T r / 2``."""

    matrix: Tensor
    gradient: Tensor
    cost: Tensor

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(*(a + b for a, b in zip(self, other, strict=True)))


def normal_equations(weighted: Tensor, slopes: Tensor) -> NormalEquations:
    """Of weighted residuals ``[M]`` with derivatives ``[M, P]``."""
    return NormalEquations(slopes.mT @ slopes, slopes.mT @ weighted, 0.5 * weighted.square().sum())


def damped_step(normal: NormalEquations, damping: float) -> Tensor:
    """Levenberg-Marquardt's step, ``-(A + damping diag A)^-1 g``, ``[P]``.

    Parameters that no measurement depends on have zeros on the diagonal and do not move.
    """
    diagonal = normal.matrix.diagonal()
    scale = torch.where(diagonal > 0, diagonal, diagonal.max().clamp(min=1e-300))
    return -torch.linalg.solve(normal.matrix + torch.diag(damping * scale + 1e-14 * scale), normal.gradient)


def condition_number(normal: NormalEquations) -> Tensor:
    """Largest over smallest singular value of the weighted sensitivities.

    How much worse than the best-determined combination of parameters the worst is known; NaN without a solution.
    """
    if not bool(normal.matrix.isfinite().all()) or not bool(normal.matrix.any()):
        return normal.cost.new_tensor(torch.nan)
    values = torch.linalg.eigvalsh(normal.matrix)
    return (values[-1] / values[0].clamp(min=values[-1] * 1e-16)).sqrt()


def standard_errors(matrix: Tensor) -> Tensor:
    """Standard deviations of ``raw`` that noise of variance 1 leads to, ``[P]``; infinite where nothing is known.

    Args:
        matrix: Of the normal equations, ``[P, P]``.
    """
    values, vectors = torch.linalg.eigh(matrix)
    known = values > values[-1] * 1e-14
    inverse = torch.where(known, 1 / values.clamp(min=1e-300), torch.inf)
    weight = vectors.square()
    return torch.where(weight > 1e-12, weight * inverse, 0.0).sum(1).sqrt()


def elements_of(grid: Grid, field: str, names: Sequence[str] | None) -> Tensor:
    """Indices of the elements of a field, by name; None: all branches in service, or buses, that have such a thing.

    Raises:
        ValueError: Names an element that the grid lacks, or the field.
    """
    if field not in FIELDS:
        raise ValueError(f"parameter {field!r} is unknown; choose from {', '.join(FIELDS)}")
    at_branch = field in BRANCH_FIELDS
    if names is None:
        on = grid.status != 0 if at_branch else getattr(grid, field) != 0
        if at_branch and field != "x":  # taps of transformers, shifts of phase shifters, charging of lines
            on = on & (getattr(grid, field) != (1.0 if field == "tap" else 0.0))
        return on.nonzero()[:, 0]
    known = grid.branch_names if at_branch else grid.bus_names
    kind = "branch" if at_branch else "bus"
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"{grid.name} has no {kind} {listed(missing)} to identify {field} of")
    return torch.tensor([known.index(name) for name in names], device=grid.device)
