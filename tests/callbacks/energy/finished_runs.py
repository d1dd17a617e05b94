"""Folders of finished runs whose energies are known: record files, summary.json and results.json, without a Trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from callbacks.energy.meters.base import Channel
from callbacks.energy.record import Counts, HostEnergy, RecordFile, read_file, start_record
from callbacks.energy.recorder import Recorder
from callbacks.energy.summary import Facility, summarize
from tests.callbacks.energy.sources import Clock, Source

Power = float | Mapping[str, float]
PLAN = (("startup", 2.0), ("fit/train", 60.0), ("fit/val", 5.0), ("test", 20.0))


class ByLabel(Source):
    """A gauge that is constant within a label."""

    def __init__(self, channel: Channel, power: Power) -> None:
        super().__init__(clock=lambda: 0.0)
        self.channel, self.power_by_label, self.recorder = channel, power, None

    def read(self) -> list[float]:
        power = self.power_by_label
        return [power if isinstance(power, int | float) else power[self.recorder.label]]


def channel(name: str, measured: bool = True) -> Channel:
    source = "instrument of the test" if measured else "model (test)"
    component = name.rstrip("0123456789")
    return Channel(name, component, "gauge", measured, source, device=f"GPU-{name[3:]}" if component == "gpu" else None)


def record(
    path: Path,
    powers: Mapping[Channel, Power],
    plan: Sequence[tuple[str, float]] = PLAN,
    counts: Counts | None = None,
    host: str = "abc",
    world_size: int = 1,
    end: str | None = "completed",
    readings: int = 10,
) -> HostEnergy:
    """Write the file of one machine, ``readings`` in every label, and return its last part."""
    clock = Clock()
    sources = [ByLabel(channel, power) for channel, power in powers.items()]
    file = RecordFile(path)
    assert file.acquire()
    recorder = Recorder(sources, 1e6, file.write, clock=clock)
    for source in sources:
        source.recorder = recorder
    file.write(start_record(f"node-{host}", host, world_size, 1.0, list(powers), 0.0) | {"pid": 1})
    recorder.start(plan[0][0])
    for label, seconds in plan:
        # A gauge that jumps: the old value up to the boundary, the new one from it on.
        recorder.switch(label)
        recorder.read()
        for _ in range(readings):
            clock.now += seconds / readings
            recorder.read()
    recorder.stop()
    counts = counts or Counts()
    file.write({"kind": "counts", "world_size": world_size, "samples": counts.samples, "updates": counts.updates})
    if end:
        file.write({"kind": "end", "status": end, "t": recorder.elapsed()})
    file.close()
    return replace(read_file(path)[-1], host_id=host)


def finish(
    folder: Path,
    hosts: Sequence[HostEnergy],
    counts: Counts,
    name: str = "load",
    target: str = "lightning_modules.workloads.LoadForecaster",
    parameters: int = 9841,
    accelerator: str = "cpu",
    hardware: Mapping[str, Any] | None = None,
    world_size: int = 1,
    status: str = "completed",
    node: Mapping[str, Any] | None = None,
    epochs: Sequence[Mapping[str, Any]] = (),
    facility: Facility | None = None,
    data: Mapping[str, Any] | None = None,
    choices: Mapping[str, str | None] | None = None,
) -> Path:
    """Write what the callback and the runner leave at the end of a run; returns its folder.

    ``choices`` are the options of groups that Hydra notes in ``.hydra/hydra.yaml``.
    """
    facility = facility or Facility(1.2, 400.0, "test")
    summary = summarize(hosts, counts, facility) | {
        "status": status, "counts_exact": True, "period_s": 1.0, "earlier_kwh": 0.0,
    }  # fmt: skip
    result = {
        "status": status,
        "name": name,
        "parameters": parameters,
        "world_size": world_size,
        "seconds": {"total": summary["duration_s"]},
        "metrics": {"val/loss": 0.1},
        "hardware": {"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 4, "cuda": [], "threads": 2, **(hardware or {})},
        "energy": summary,
        "config": {
            "name": name,
            "model": {"_target_": target},
            "data": dict(data or {}),
            "trainer": {"accelerator": accelerator},
            "callbacks": {"energy": {"node": node}},
        },
    }
    (folder / "energy").mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result))
    if choices is not None:
        (folder / ".hydra").mkdir(exist_ok=True)
        hydra = {"hydra": {"runtime": {"choices": dict(choices)}}}
        (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    (folder / "energy" / "summary.json").write_text(json.dumps(summary | {"epochs": list(epochs)}))
    return folder


def cpu_run(
    folder: Path,
    *,
    train_s: float = 60.0,
    test_s: float = 20.0,
    watts: float = 50.0,
    samples: tuple[int, int] = (3000, 3200),
    measured: bool = False,
    gpus: Mapping[str, Power] | None = None,
    **options: Any,
) -> Path:
    """A run on the CPU; ``gpus`` are those that idle beside it."""
    return _run(folder, {channel("cpu", measured): watts, channel("dram", measured): 5.0}, gpus, train_s, test_s,
                samples, **options)  # fmt: skip


def gpu_run(
    folder: Path,
    *,
    train_s: float = 6.0,
    test_s: float = 8.0,
    watts: float = 60.0,
    samples: tuple[int, int] = (3000, 3200),
    gpus: Mapping[str, Power] | None = None,
    **options: Any,
) -> Path:
    """A run on one GPU, all measured."""
    gpus = gpus or {"gpu0": {"startup": 60.0, "fit/train": 300.0, "fit/val": 200.0, "test": 150.0}}
    defaults = {"accelerator": "gpu", "hardware": {"cuda": ["NVIDIA A100-SXM4-40GB"]}}
    return _run(folder, {channel("cpu"): watts}, gpus, train_s, test_s, samples, **(defaults | options))


def _run(
    folder: Path,
    powers: dict[Channel, Power],
    gpus: Mapping[str, Power] | None,
    train_s: float,
    test_s: float,
    samples: tuple[int, int],
    **options: Any,
) -> Path:
    plan = (("startup", 2.0), ("fit/train", train_s), ("fit/val", 1.0), ("test", test_s))
    counts = Counts({"fit/train": samples[0], "fit/val": 10, "test": samples[1]}, {"fit/train": 100})
    powers |= {channel(name): power for name, power in (gpus or {}).items()}
    host = record(folder / "energy" / "node-abc.jsonl", powers, plan, counts)
    return finish(folder, [host], counts, **options)
