"""What trainings have cost, from the runs of a sweep or from a table, and trainings that are planned."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from physics.energy_cost.analysis import check_sources
from physics.energy_cost.configuration import Configuration, Record, mean_over_seeds
from physics.energy_cost.planning import as_record
from physics.energy_cost.records import read_runs, read_table

log = logging.getLogger(__name__)

PUBLISHED = Path(__file__).parent / "embedded" / "energy_scaling" / "published.csv"
PLAN_KEYS = ("devices", "local_batch_size", "global_batch_size", "num_samples", "epochs")
_HOW_TO_PLAN = (
    "name trainings to predict, 'data.plans=[{devices: 64, local_batch_size: 128, num_samples: 1281167, epochs: 90}]'"
)
_FIELDS = ("devices", "nodes", "local_batch_size", "num_samples", "epochs", "samples", "updates")


class EnergyRecords(LightningDataModule):
    """Energy and time of trainings, a configuration a row; plans in prediction.

    A batch is a dictionary of float64 tensors:

    ============= ====== =============================================================================================
    key           shape  meaning
    ============= ====== =============================================================================================
    configuration (B, 7) devices n, nodes m, samples of a step on one device, samples of the set, epochs, samples that
                         went through training, optimizer steps
    device_hours  (B,)   H = n T; NaN: planned
    energy_kwh    (B,)   E of all nodes; NaN: planned
    index         (B,)   row
    ============= ====== =============================================================================================

    ``records`` are all runs, ``means`` their means over repetitions, ``plans`` what is to be predicted, ``skipped`` the
    runs that were left out, with reasons.

    Args:
        source: ``published`` (ResNet-50 on up to 256 A100, embedded), a CSV file (columns as in the embedded one), or
            the folder of a sweep; or a list of files and folders, whose runs are fitted together.
        metric: Quality of a run, by its name in results.json; None: not looked at.
        devices_per_node: Of the machine, for tables and plans; None: 4 for tables, the most of the runs for plans.
        allow_mixed: Fit measured and estimated energies together.
        hardware: Keep the runs on this one (a part of its name), where there are several.
        plans: Trainings to predict: mappings with ``devices``, ``num_samples``, ``epochs``, and one of
            ``local_batch_size`` and ``global_batch_size``. Empty: nothing is predicted.
        published_plans: What ``plans=None`` stands for where the source is ``published`` alone: other runs say nothing
            about such trainings.

    Raises:
        ValueError: If a plan is incomplete; in `setup`, if the source has nothing that can be fitted, or no run has the
            metric.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("configuration", "device_hours", "energy_kwh", "index")

    def __init__(
        self,
        source: str | Sequence[str] = "published",
        metric: str | None = None,
        devices_per_node: int | None = None,
        allow_mixed: bool = False,
        hardware: str | None = None,
        plans: Sequence[Mapping[str, Any]] | None = None,
        published_plans: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__()
        if devices_per_node is not None and devices_per_node < 1:
            raise ValueError(f"data.devices_per_node={devices_per_node}: give a number of at least 1")
        self.source, self.metric, self.devices_per_node = source, metric, devices_per_node
        self.allow_mixed, self.hardware = allow_mixed, hardware
        self.unplanned = plans is None and not published_plans
        if plans is None:
            plans = published_plans if source == "published" or list(source) == ["published"] else ()
        self.plans = [_plan(i, plan, devices_per_node or 4) for i, plan in enumerate(plans)]
        self.records: list[Record] = []
        self.means: list[Record] = []
        self.skipped: dict[str, str] = {}

    @override
    def setup(self, stage: str) -> None:
        if self.records:
            return
        records = self._read()
        kinds = _kinds(records)
        if self.hardware is not None:
            records = [record for record in records if self.hardware.lower() in record.hardware.lower()]
            if not records:
                raise ValueError(f"data.hardware={self.hardware}: no run has it; there are {'; '.join(kinds)}")
            kinds = _kinds(records)
        if len(kinds) > 1:
            part = "" if self.hardware is None else f" with data.hardware={self.hardware}"
            raise ValueError(
                f"data.source={self.source} has runs on {len(kinds)} kinds of hardware{part} ({'; '.join(kinds)}); "
                "choose one with data.hardware"
            )
        check_sources(records, self.allow_mixed)
        self.records, self.means = records, mean_over_seeds(records)
        if self.devices_per_node is None:
            most = max(round(record.devices_per_node) for record in records)
            self.plans = [replace(plan, devices_per_node=most) for plan in self.plans]
        for name, reason in self.skipped.items():
            log.warning("data.source: %s is left out: %s", name, reason)

    @property
    def folders(self) -> list[Path]:
        """Sources that are folders of runs."""
        sources = [self.source] if isinstance(self.source, str) else list(self.source)
        return [Path(source) for source in sources if source != "published" and Path(source).is_dir()]

    def _read(self) -> list[Record]:
        sources = [self.source] if isinstance(self.source, str) else list(self.source)
        if not sources:
            raise ValueError("data.source=[]: name at least one; choose published, CSV files or sweeps")
        records = [record for source in sources for record in self._read_one(source)]
        if self.metric is not None and all(record.metric is None for record in records):
            names = _metrics(self.folders)
            known = f"they have {', '.join(names)}" if names else "they have no metrics at all; leave it out"
            raise ValueError(f"data.metric={self.metric}: none of {len(records)} runs has it; {known}")
        return records

    def _read_one(self, source: str) -> list[Record]:
        if source == "published":
            return read_table(PUBLISHED, devices_per_node=4, repetitions=5)
        path = Path(source)
        if path.is_file():
            return read_table(path, self.devices_per_node or 4)
        if not path.is_dir():
            raise ValueError(f"data.source={source}: no such file; choose published, a CSV file or a sweep")
        records, skipped = read_runs(path, self.metric)
        if not records:
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
            raise ValueError(f"data.source={source}: none of {len(skipped)} runs can be used:{reasons}")
        self.skipped |= skipped
        return records

    @override
    def val_dataloader(self) -> DataLoader:
        return _loader(self.means, planned=False)

    @override
    def test_dataloader(self) -> DataLoader:
        return _loader(self.means, planned=False)

    @override
    def predict_dataloader(self) -> DataLoader:
        """Of the plans, without a batch where there are none.

        Raises:
            ValueError: If nobody has said what to predict, nor that nothing is.
        """
        if self.unplanned:
            raise ValueError(f"data.plans is empty: {_HOW_TO_PLAN}")
        if not self.plans:
            log.info("nothing is planned: %s", _HOW_TO_PLAN)
            warnings.filterwarnings("ignore", message="Total length of `DataLoader` across ranks is zero")
            return DataLoader([], batch_size=None)
        return _loader([as_record(plan, 1.0) for plan in self.plans], planned=True)


def _kinds(records: Sequence[Record]) -> list[str]:
    """Names of what the records ran on, for messages."""
    return sorted({record.hardware or "hardware without a name (column hardware of a table)" for record in records})


def _metrics(folders: Sequence[Path]) -> list[str]:
    """Names of the metrics of completed runs."""
    found: set[str] = set()
    for path in (path for folder in folders for path in folder.rglob("results.json")):
        with contextlib.suppress(OSError, ValueError):
            result = json.loads(path.read_text())
            if result.get("status") == "completed":
                found |= set(result.get("metrics") or {})
    return sorted(found)


def _plan(number: int, plan: Mapping[str, Any], devices_per_node: int) -> Configuration:
    where = f"data.plans[{number}]"
    if unknown := [key for key in plan if key not in PLAN_KEYS]:
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; a plan has {', '.join(PLAN_KEYS)}")
    sizes = [key for key in ("local_batch_size", "global_batch_size") if plan.get(key) is not None]
    if len(sizes) != 1:
        raise ValueError(f"{where}: give one of local_batch_size and global_batch_size")
    if missing := [key for key in ("devices", "num_samples", "epochs") if plan.get(key) is None]:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    devices, size = int(plan["devices"]), int(plan[sizes[0]])
    if sizes[0] == "global_batch_size":
        if size % devices:
            lower = size // devices * devices
            near = f"{lower} or {lower + devices}" if lower else str(devices)
            raise ValueError(f"{where}: global_batch_size={size} does not divide by {devices} devices; take {near}")
        size //= devices
    try:
        found = Configuration(devices, size, int(plan["num_samples"]), float(plan["epochs"]), devices_per_node)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not found.updates:
        steps = replace(found, epochs=1.0).updates
        raise ValueError(
            f"{where}.epochs={plan['epochs']}: less than one optimizer step, of which an epoch has {steps}; "
            f"give at least {math.ceil(1000 / steps) / 1000:g} epochs, or more samples"
        )
    return found


def _loader(records: Sequence[Record], planned: bool) -> DataLoader:
    rows = torch.tensor([[float(getattr(r, key)) for key in _FIELDS] for r in records], dtype=torch.float64)
    nothing = math.nan if planned else None
    batch: dict[str, Tensor] = {
        "configuration": rows,
        "device_hours": torch.tensor([nothing or r.device_hours for r in records], dtype=torch.float64),
        "energy_kwh": torch.tensor([nothing or r.energy_kwh for r in records], dtype=torch.float64),
        "index": torch.arange(len(records)),
    }
    return DataLoader([batch], batch_size=None)
