"""Trained experiments as rows: composed and run as ``run.py`` does it, one process, several seeds."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks.measure import single_thread
from benchmarks.record import Row
from runner import job, schema

CONF = Path(__file__).parents[1] / "conf"
SEEDS = (0, 1, 2)
# Checkpoints are needed for the best epoch; figures, tables and logs are not.
LEAN = ("callbacks=early_stopping", "logger=none", "num_threads=1", "predict=false")


def configuration(run_dir: Path | str, *overrides: str, lean: Sequence[str] = LEAN) -> dict[str, Any]:
    """The configuration of the command line ``overrides``, without what ``lean`` leaves out, resolved to plain data."""
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", [*overrides, *lean, f"++run.dir={run_dir}"])
    return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True, enum_to_str=True)


def data_available(data: str) -> bool:
    """Whether the files of a data option are there."""
    node = configuration("/nowhere", "experiment=recycle", f"data={data}")["data"]
    try:
        job.instantiate("data", node).prepare_data()
    except FileNotFoundError:
        return False
    return True


@dataclass(frozen=True)
class Runs:
    """What the runs of one setting reported.

    Attributes:
        metrics: Metrics of each seed.
        seconds: Wall time of each run, building and testing included.
    """

    metrics: tuple[Mapping[str, float], ...]
    seconds: tuple[float, ...]

    def mean(self, metric: str) -> float:
        """Mean over the seeds."""
        return statistics.mean(m[metric] for m in self.metrics)

    def row(self, what: str, variant: str, metric: str, unit: str = "", **extra: Any) -> Row:
        """The mean as a row; the note has the single seeds."""
        values = [m[metric] for m in self.metrics]
        if len(values) > 1:
            note = f"seeds: {', '.join(f'{value:.4f}' for value in values)}"
            extra["note"] = f"{extra['note']}; {note}" if "note" in extra else note
        return {"what": what, "variant": variant, "value": statistics.mean(values), "unit": unit, **extra}


def runs(*overrides: str, seeds: Sequence[int] = SEEDS, lean: Sequence[str] = LEAN) -> Runs:
    """Train and test one setting with every seed; ``lean`` are overrides that leave out what a benchmark needs not.

    Raises:
        RuntimeError: If a run did not end.
    """
    metrics, seconds = [], []
    with single_thread():
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                result = job.run(configuration(folder, *overrides, f"seed={seed}", lean=lean))
                seconds.append(time.perf_counter() - begin)
            if result["status"] != "completed":
                raise RuntimeError(f"{' '.join(overrides)} seed={seed}: {result.get('error', result['status'])}")
            metrics.append(result["metrics"])
    return Runs(tuple(metrics), tuple(seconds))


def ratio_of_means(what: str, table: Mapping[str, Runs], ours: str, theirs: str, metric: str, **extra: Any) -> Row:
    """How the mean of ``ours`` relates to that of ``theirs``."""
    value = table[ours].mean(metric) / table[theirs].mean(metric)
    return {"what": f"{what}, ratio", "variant": f"{ours} / {theirs}", "value": value, "unit": "", **extra}


def best_of(table: Mapping[str, Runs], metric: str, among: Iterable[str] | None = None) -> str:
    """Name of the setting with the lowest mean."""
    return min(table if among is None else among, key=lambda name: table[name].mean(metric))
