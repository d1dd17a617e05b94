"""EnergyCallback: what a run costs, by stage, epoch, device, sample and update."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from callbacks.energy import identity
from callbacks.energy.batch_size import first_dimension
from callbacks.energy.epochs import EpochBook
from callbacks.energy.machines import gather, left_behind
from callbacks.energy.meters.base import Meter, Progress
from callbacks.energy.node import NodeProfile
from callbacks.energy.output import draw, log_power, log_row
from callbacks.energy.record import Counts, HostEnergy, RecordFile, read_folder, start_record
from callbacks.energy.recorder import Recorder
from callbacks.energy.selection import Selection, check_choice, describe, meter_options, select
from callbacks.energy.stage_end import StageEnd
from callbacks.energy.summary import (
    IDLE,
    J_PER_KWH,
    OTHER,
    SANITY,
    STARTUP,
    TRAIN,
    VALIDATION,
    facility_of,
    main_metrics_of,
    metrics_of,
    summarize,
)  # fmt: skip
from callbacks.figures import energy as plots
from callbacks.run_record import RunRecord, scalars, write_json

log = logging.getLogger(__name__)

STAGES = {"fit": OTHER, "validate": "validate", "test": "test", "predict": "predict"}


class EnergyCallback(pl.Callback):
    """Measures the energy of a run where there are instruments, estimates the rest, and says which is which.

    One process per machine records (the one that holds ``<dirpath>/<host>.jsonl``); the others only count samples. The
    meters are read every ``period_s`` in a thread and at every boundary between stages, epochs and validations, so that
    the stages' energies add up to the total. Every reading is in the file at once: a killed run loses at most what came
    after the last one. `summarize` lists what comes out; it is logged (``energy/...``), kept in ``summary.json`` and in
    ``results.json``.

    Stages: ``startup``, ``fit/sanity``, ``fit/train``, ``fit/val``, ``fit/other`` (loading the first batch of an epoch,
    checkpoints, ends of epochs), ``validate``, ``test``, ``predict``, and ``idle`` between them.

    Args:
        dirpath: Folder of the record.
        meters: ``auto``: the best instrument for each component and a model where there is none. ``estimates``: models
            only. A list of names (``nvml``, ``rapl``, ``hwmon``, ``ipmi``, ``slurm``, ``cray_pm``, ``cpu_model``,
            ``dram_model``): exactly these, an error if one cannot be read.
        extra_meters: Further meters by name, objects of `meters.base.Meter`.
        options: Arguments of the named meters, e.g. ``{cpu_model: {tdp_w: 270}}``.
        period_s: Time between two readings, s; at least 0.05.
        gpu_scope: GPUs that count: ``job``, those that the job may use; ``node``, all of the machine, because idle ones
            are fed as well; ``auto``, ``node`` where the scheduler says that the job has the machine for itself.
        overhead_w: Power of what no meter covers, W per machine.
        pue: Power usage effectiveness of the building.
        carbon_intensity: CO2 equivalents of the electricity, g/kWh; None: that of ``country``.
        country: ISO 3166 code of three letters (DEU); None: the mean of the world.
        codecarbon: Whether codecarbon's tracker runs beside, on its own models; its totals are logged as
            ``energy/codecarbon/...``.
        synchronize: Whether CUDA work is waited for at boundaries (not at steps).
        log_power: Whether loggers get the power over time, at most 2,000 points.
        figures: Functions of `callbacks.figures.energy` that draw the run when it is over.
        figures_dir: Folder of the figures; None: ``dirpath``.
        node: What kind of machine this is, for the estimates: processors' TDP, memory's power, the rest.
    """

    def __init__(
        self,
        dirpath: str,
        meters: str | Sequence[str] = "auto",
        extra_meters: Mapping[str, Meter] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        period_s: float = 1.0,
        gpu_scope: str = "auto",
        overhead_w: float = 0.0,
        pue: float = 1.0,
        carbon_intensity: float | None = None,
        country: str | None = None,
        codecarbon: bool = True,
        synchronize: bool = True,
        log_power: bool = True,
        figures: Sequence[str] = ("power_over_time", "energy_by_stage", "energy_against_metric"),
        figures_dir: str | None = None,
        node: NodeProfile | None = None,
    ) -> None:
        Recorder([], period_s, overhead_w=overhead_w)  # refuses impossible values
        check_choice(meters, extra_meters or {}, options or {}, gpu_scope)
        if missing := [name for name in figures if not hasattr(plots, name)]:
            raise ValueError(f"callbacks.energy.figures: callbacks/figures/energy.py has no {', '.join(missing)}.")
        self.dirpath = Path(dirpath)
        self.meters, self.extra_meters, self.options = meters, dict(extra_meters or {}), dict(options or {})
        self.period_s, self.gpu_scope, self.node = period_s, gpu_scope, node
        self.overhead_w = overhead_w if node is None or overhead_w else node.base_w
        self.facility = facility_of(pue, carbon_intensity, country)
        self.country, self.codecarbon, self.synchronize, self.log_power = country, codecarbon, synchronize, log_power
        self.figures, self.figures_dir = tuple(figures), Path(figures_dir or dirpath)
        self._reset()

    def _reset(self) -> None:
        """Begin anew: nothing measured, nothing open."""
        self.counts = Counts()  # of this rank
        self._book = EpochBook()
        self.summary: dict[str, Any] = {}
        self.record: RunRecord | None = None
        self._recorder: Recorder | None = None
        self._file: RecordFile | None = None
        self._tracker: Any = None
        self._begun = self._ended = False
        self._world_size = 1
        self._data_shares = 1  # ranks with different samples
        self._global_zero = True
        self._logged_until = 0.0
        self._label = ""  # of every process, recording or not
        self._gathered: tuple[list[HostEnergy], Counts] | None = None  # other machines, counts of all ranks
        self._earlier_j = 0.0
        self._begun_at = 0.0
        self._loggers: list[Any] = []
        self._host_name = ("", "")
        self._trained = False
        self._written_counts: dict[str, Any] = {}
        self._num_nodes = 1
        self._pid = os.getpid()
        self._batch_size: Callable[[Any], int] = first_dimension
        self._global_step: Callable[[], int] = lambda: 0
        self._updates_before = 0
        self._cuda = False

    # ----------------------------------------------------------------------------------------- beginning and end

    def begin_run(self) -> None:
        """Open the meters and begin with ``startup``; the first ``setup`` does it where nobody has."""
        if self._ended:  # another run with the same object
            self._reset()
        if self._begun:
            return
        self._begun, self._begun_at, self._label = True, time.time(), STARTUP
        self._pid = os.getpid()
        if int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))) != 0:
            return
        host, name = identity.host_id(), identity.hostname()
        file = RecordFile(self.dirpath / f"{name}-{host}.jsonl")
        try:
            if not file.acquire():
                log.info("energy: another process records this machine (%s)", file.path)
                return
            if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0:  # a resumed run
                (self.dirpath / "summary.json").unlink(missing_ok=True)
                earlier = read_folder(self.dirpath)
                self._earlier_j = sum(tally.total_j for host in earlier for tally in host.tallies.values())
        except OSError as error:
            log.warning("energy: %s cannot be written: %s; energy is measured, but not recorded", self.dirpath, error)
        selection = Selection()
        for meter in self.extra_meters.values():
            meter.follow(self._progress)
        try:
            selection = select(self.meters, self.extra_meters, meter_options(self.options, self.node, self.gpu_scope))
            self._recorder = Recorder(selection.meters, self.period_s, file.write, self.overhead_w)
            channels = [channel for meter in selection.meters for channel in meter.open()]
            world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))
            facility = {
                "pue": self.facility.pue,
                "intensity": self.facility.intensity_g_per_kwh,
                "source": self.facility.intensity_source,
            }
            file.write(start_record(name, host, world_size, self.period_s, channels, time.time(), facility))
            self._recorder.annotate = self._new_counts
            self._recorder.start(STARTUP)
        except BaseException:
            selection.close()
            file.close()
            self._recorder = None
            raise
        self._file, self._host_name = file, (host, name)
        atexit.register(self._at_exit)
        log.info("energy: %s", describe(self._recorder.channels, selection.absent))
        if self.codecarbon:
            self._start_codecarbon()

    def total_j(self) -> float | None:
        """Read the meters now: energy of this run on this machine so far, J; None where this process reads none."""
        if self._recorder is None or not self._recorder.running:
            return None
        self._recorder.read()
        return sum(tally.total_j for tally in self._recorder.tallies().values())

    def _start_codecarbon(self) -> None:
        from callbacks.energy.meters.codecarbon import CodecarbonTotals
        from callbacks.energy.meters.nvml import job_devices

        devices = job_devices(self.gpu_scope, os.environ)
        intensity = self.facility.intensity_g_per_kwh
        self._tracker = CodecarbonTotals(self.country, self.period_s, gpu_ids=devices, intensity_g_per_kwh=intensity)
        self._tracker.start()

    def end_run(self, status: str = "completed") -> None:
        """Take the last reading and close everything; twice without harm.

        Called by the runner, by ``on_exception`` or at exit. No collectives: other ranks may be dead.
        """
        if self._ended or (self._begun and os.getpid() != self._pid):
            return
        self._ended = True
        if self._recorder is not None and self._recorder.running:
            self._recorder.stop()
            self._write_counts()
            self._file.write({"kind": "end", "status": status, "t": self._recorder.elapsed()})
            self._file.sync()
            self._file.close()
            atexit.unregister(self._at_exit)
        if self._tracker is not None:
            self._tracker.stop()  # of a run shorter than its start, this waits for it: 2 s at most
        if self._begun and self._global_zero:
            self._publish(status)
            self._draw()

    def _at_exit(self) -> None:
        """Errors of a Trainer come through `on_exception`: between two stages nothing has failed."""
        self.end_run("completed" if self._label == IDLE else "failed")

    def _new_counts(self) -> dict[str, Any]:
        """Samples and updates for the record, when they have changed."""
        self._count_updates()
        counts = {"samples": dict(self.counts.samples), "updates": dict(self.counts.updates)}
        if counts == self._written_counts:
            return {}
        self._written_counts = counts
        return counts

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """What every epoch has used, see `callbacks.energy.epochs.EpochBook`."""
        return self._book.epochs

    # ------------------------------------------------------------------------------------------------- boundaries

    def _switch(self, label: str) -> None:
        if self._cuda and label != self._label:
            torch.cuda.synchronize()
        self._label = label
        if self._recorder is not None:
            self._recorder.switch(label)

    @contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """Book what happens within the block to a stage of its own, say ``fit/train_eval``, and then to the one before.

        For callbacks that do work of another kind than training; `count` counts its samples.
        """
        before = self._label
        self._switch(label)
        try:
            yield
        finally:
            self._switch(before)

    def count(self, batch: Any) -> None:
        """Count the samples of a batch in the running stage."""
        self.counts.samples[self._label] = self.counts.samples.get(self._label, 0) + self._batch_size(batch)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if sum(isinstance(callback, EnergyCallback) for callback in trainer.callbacks) > 1:
            raise ValueError("two EnergyCallbacks in one Trainer would count everything twice; keep one in callbacks.")
        self.begin_run()
        # A new list: the Trainer is going through the old one at this moment.
        others = [c for c in trainer.callbacks if not (isinstance(c, StageEnd) and c.energy is self)]
        trainer.callbacks = [*others, StageEnd(self)]
        self._gathered = None
        self._world_size, self._global_zero = trainer.world_size, trainer.is_global_zero
        layout = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        self._data_shares = layout.get("num_replicas", self._world_size)
        self._cuda = self.synchronize and trainer.strategy.root_device.type == "cuda"
        self._loggers = trainer.loggers
        self.record = next((c for c in trainer.callbacks if isinstance(c, RunRecord)), None)
        # Looked up once: an attribute that a module lacks costs as much as the rest of a hook.
        hook = getattr(pl_module, "batch_size", None)  # also the name of a number, for Lightning's BatchSizeFinder
        self._batch_size = hook if callable(hook) else first_dimension
        self._num_nodes = trainer.num_nodes
        if self._recorder is not None:
            self._recorder.step = lambda: trainer.global_step
        self._switch(STAGES[str(getattr(stage, "value", stage))])

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._switch(SANITY)

    @override
    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._switch(OTHER)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._updates_before = self.counts.updates.get(TRAIN, 0) - trainer.global_step
        self._global_step = lambda: trainer.global_step
        self._trained = True
        self._await_training()  # a run that resumes within an epoch does not come to its start

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_epoch(trainer)
        tallies = {} if self._recorder is None else self._recorder.tallies()
        self._book.begin(trainer.current_epoch, tallies, self.counts.samples.get(TRAIN, 0))
        self._await_training()

    def _await_training(self) -> None:
        """Have the next training step begin `TRAIN`.

        The hook of every batch exists until then only: asking at each step whether there is something to do would be a
        third of what the callback costs.
        """
        self.on_train_batch_start = self._begin_training

    def _begin_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        del self.on_train_batch_start
        self._switch(TRAIN)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        samples = self.counts.samples  # as in `_evaluation_batch_end`; this one is called often enough to save a call
        samples[self._label] = samples.get(self._label, 0) + self._batch_size(batch)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._switch(VALIDATION)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._switch(OTHER)
            self._await_training()

    def _evaluation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.count(batch)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _evaluation_batch_end

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._switch(OTHER)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._switch(OTHER)
        self._end_epoch(trainer)

    def end_stage(self, trainer: pl.Trainer) -> None:
        """Book what follows to ``idle`` and report the stage; `StageEnd` calls it when all other callbacks are done."""
        if not self._begun or self._ended:
            return
        self._switch(IDLE)
        self._write_counts(sync=True)
        self._gather()
        if self._global_zero:
            self._publish("running")
        if self.summary:
            self._log_power(trainer)
            log_row(trainer.loggers, metrics_of(self.summary), trainer.global_step)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._file is not None:
            self._file.write({"kind": "exception", "type": type(exception).__name__})
        self.end_run("failed" if isinstance(exception, Exception) and not _is_stop(exception) else "interrupted")

    def _count_updates(self) -> None:
        self.counts.updates = {TRAIN: self._updates_before + self._global_step()} if self._trained else {}

    def _progress(self) -> Progress:
        """What the processes of this node have done: they do equal shares of the work."""
        processes = self._world_size // self._num_nodes
        updates = self._updates_before + self._global_step() if self._trained else 0
        return Progress(self.counts.samples.get(TRAIN, 0) * processes, updates * processes)

    def _write_counts(self, sync: bool = False) -> None:
        self._count_updates()
        if self._file is None:
            return
        counts = {"samples": self.counts.samples, "updates": self.counts.updates}
        self._file.write({"kind": "counts", "world_size": self._world_size, **counts})
        if sync:
            self._file.sync()

    # ---------------------------------------------------------------------------------------------------- results

    def _host(self, status: str) -> HostEnergy | None:
        """What this process has recorded."""
        if self._recorder is None:
            return None
        host, name = self._host_name
        return HostEnergy(
            host, name, self._recorder.channels, self._recorder.tallies(), self.counts, self._world_size, status=status
        )

    def _gather(self) -> None:
        """Collect machines and counts of all ranks; every rank comes here at the end of a stage."""
        found = gather(self._host("running"), self.counts, self.epochs, self._world_size // self._data_shares)
        if found is not None:
            self._gathered = found.hosts, found.counts
            self._book.add(found.epochs)

    def _state(self, status: str) -> tuple[list[HostEnergy], Counts, bool]:
        """All machines, counts of all ranks, and whether every rank has confirmed them."""
        own = self._host(status)
        hosts = [] if own is None else [own]
        if self._world_size == 1:
            return hosts, self.counts, True
        if self._gathered is not None:
            others, counts = self._gathered
            return hosts + others, counts, True
        shares = Counts({label: n * self._data_shares for label, n in self.counts.samples.items()}, self.counts.updates)
        if not self._ended:  # the others are at work; what they use is gathered at the end of the stage
            return hosts, shares, False
        # Ranks that died cannot be asked: their machines' files can, and ranks do equal shares of the work.
        others = left_behind(self.dirpath, None if own is None else self._file.path, self._begun_at)
        return hosts + others, shares, False

    def _publish(self, status: str, write: bool = True) -> None:
        """Make the summary, and put it into the run's record and ``summary.json``."""
        hosts, counts, exact = self._state(status)
        if not hosts:
            return
        self.summary = summarize(hosts, counts, self.facility) | {
            "status": status,
            "counts_exact": exact,
            "period_s": self.period_s,
            "earlier_kwh": self._earlier_j / J_PER_KWH,
            "epochs": self.epochs,
        }
        if write and self._tracker is not None:  # asking it makes it measure, which takes a millisecond
            from callbacks.energy.meters.codecarbon import compare

            self.summary["codecarbon"] = self._tracker.totals()
            compare(self.summary["codecarbon"], self.summary)
        if write:
            try:
                write_json(self.dirpath / "summary.json", self.summary)
            except OSError as error:
                log.warning("energy: %s/summary.json was not written: %s", self.dirpath, error)
        if self.record is not None:
            shown = {key: value for key, value in self.summary.items() if key != "epochs"}
            self.record.costs = main_metrics_of(self.summary)
            self.record.record["energy"] = shown | {"costs": self.record.costs}

    def _end_epoch(self, trainer: pl.Trainer) -> None:
        """Book the energy since the epoch began, its validation and its checkpoints included."""
        if self._recorder is None or not self._book.running:
            return
        self._recorder.read()
        self._write_counts()
        tallies, samples = self._recorder.tallies(), self.counts.samples.get(TRAIN, 0)
        epoch = self._book.end(tallies, samples, self._data_shares, self._num_nodes, self._earlier_j)
        self._file.write({"kind": "epoch", **epoch})
        if not self._global_zero:
            self._book.note(epoch)
            return
        if not trainer.fast_dev_run:
            row = {f"energy/epoch/{key}": value for key, value in epoch.items() if key != "epoch"}
            log_row(trainer.loggers, row, trainer.global_step)
        self._book.note(epoch | {"metrics": scalars(trainer.callback_metrics)})
        self._publish("running", write=False)  # the record has every reading; waiting for a disk is for ends of stages

    def _log_power(self, trainer: pl.Trainer) -> None:
        """Hand the power since the last time to the loggers."""
        if not self.log_power or self._recorder is None or not trainer.loggers:
            return
        points = self._recorder.trace.points(self._logged_until)
        log_power(trainer.loggers, points, first=not self._logged_until)
        if points:
            self._logged_until = points[-1].time_s

    def _draw(self) -> None:
        """Draw the figures of the run; one that fails costs nothing else."""
        if self.figures and self._recorder is not None:
            points, step = self._recorder.trace.points(), self._recorder.step()
            draw(self.figures, self.summary, points, self.figures_dir, self._loggers, step)


def _is_stop(exception: BaseException) -> bool:
    """Whether an exception is the orderly end after a signal (`callbacks.interrupt`)."""
    from callbacks.interrupt import Interrupted

    return isinstance(exception, Interrupted)
