"""The crash-proof record: one JSON object per line, one file per machine, readable after any kind of death."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from callbacks.energy.accounting import Maximum, Tally, shortest_for_maximum
from callbacks.energy.meters.base import Channel

log = logging.getLogger(__name__)

VERSION = 1

_open_files: weakref.WeakSet[RecordFile] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """A worker must neither write into the record nor keep it locked."""
    for file in list(_open_files):
        file._close_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


@dataclass
class Counts:
    """What was done in each stage, by label.

    Attributes:
        samples: Samples that went through the network, all ranks together.
        updates: Optimiser steps (of a model, not of a rank).
    """

    samples: dict[str, int] = field(default_factory=dict)
    updates: dict[str, int] = field(default_factory=dict)

    def add(self, other: Counts, updates: bool = True) -> None:
        """Add other counts to these; ``updates=False`` for another rank of the same model."""
        pairs = [(self.samples, other.samples)] + ([(self.updates, other.updates)] if updates else [])
        for mine, theirs in pairs:
            for label, number in theirs.items():
                mine[label] = mine.get(label, 0) + number


@dataclass
class HostEnergy:
    """What one machine has used, all its processes and restarts together.

    Attributes:
        host_id: Identity of the machine (name and boot).
        hostname: Its name.
        channels: Description of every channel.
        tallies: Energy by label.
        counts: Samples and updates that this machine's recording process has seen.
        world_size: Ranks of the run.
        segments: Times that recording started (1 + the number of resumes).
        facility: PUE, carbon intensity and its source, as the run had them.
        status: How the last segment ended: ``completed``, ``interrupted``, ``failed``, or ``killed`` if it has no end.
    """

    host_id: str
    hostname: str
    channels: list[Channel]
    tallies: dict[str, Tally] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    world_size: int = 1
    segments: int = 1
    facility: dict[str, Any] = field(default_factory=dict)
    status: str = "killed"

    def add(self, other: HostEnergy) -> None:
        """Add a later segment of the same machine."""
        known = {channel.name for channel in self.channels}
        self.channels += [channel for channel in other.channels if channel.name not in known]
        for label, tally in other.tallies.items():
            self.tallies.setdefault(label, Tally()).add(tally)
        self.counts.add(other.counts)
        self.segments += other.segments
        self.facility = other.facility
        self.world_size, self.status = other.world_size, other.status


class RecordFile:
    """Appends records to a file that one process of a machine may hold.

    Every line reaches the operating system at once, so a killed process loses nothing of what it wrote. A full disk
    ends the record, not the run.

    Args:
        path: File; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def acquire(self) -> bool:
        """Open the file and claim it for this process; False if another process of this run holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                return False
            # A file system without locks: one recorder per machine is then up to local rank 0 alone.
        self._file = descriptor
        _open_files.add(self)
        self._end_torn_line()
        return True

    def _end_torn_line(self) -> None:
        """Begin on a line of its own where a killed process stopped in the middle of one."""
        with self.path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                self.write_line("\n")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; a failure is reported once and ends the record."""
        self.write_line(json.dumps(record, separators=(",", ":")) + "\n")

    def write_line(self, line: str) -> None:
        """Append a line as it is."""
        if self._file is None:
            return
        data = line.encode()
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            log.warning("energy: %s cannot be written any more: %s; the record ends here", self.path, error)
            self.close()

    def sync(self) -> None:
        """Have the operating system put everything on the disk (survives a power cut)."""
        if self._file is not None:
            try:
                os.fsync(self._file)
            except OSError as error:
                log.warning("energy: %s: %s", self.path, error)

    def close(self) -> None:
        """Release the file; twice without harm."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)  # also for copies in processes that were forked meanwhile
            os.close(self._file)
            self._file = None

    def _close_in_child(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_folder(folder: Path) -> list[HostEnergy]:
    """All machines of a run from its record files, in the order of their names.

    Two files of one machine (same host id) are added up. Lines that a dying process left incomplete are skipped.
    """
    hosts: dict[str, HostEnergy] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for host in read_file(path):
            if host.host_id in hosts:
                hosts[host.host_id].add(host)
            else:
                hosts[host.host_id] = host
    return list(hosts.values())


def read_records(path: Path) -> Iterable[dict[str, Any]]:
    """Complete records of a file."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def read_file(path: Path) -> list[HostEnergy]:
    """Segments of one file: what every start of the recorder has measured."""
    segments: list[HostEnergy] = []
    before: dict[str, Any] = {}
    for record in read_records(path):
        kind = record.get("kind")
        if kind == "start":
            if record["version"] != VERSION:
                raise ValueError(f"{path}: version {record['version']} of the record; this program reads {VERSION}.")
            channels = [Channel(**channel) for channel in record["channels"]]
            segments.append(
                HostEnergy(record["host_id"], record["hostname"], channels, world_size=record["world_size"])
            )
            segments[-1].facility = record.get("facility", {})
            before, maximum = {}, Maximum(shortest_for_maximum(channels))
        elif not segments:
            continue
        elif kind == "sample":
            if before:
                tally = _difference(before, record, segments[-1].channels)
                tally.max_w = maximum.add(tally, record["label"])
                segments[-1].tallies.setdefault(record["label"], Tally()).add(tally)
            before = record
            if "samples" in record:
                segments[-1].counts = Counts(record["samples"], record["updates"])
        elif kind == "counts":
            segments[-1].counts = Counts(record["samples"], record["updates"])
            segments[-1].world_size = record["world_size"]
        elif kind == "end":
            segments[-1].status = record["status"]
    return segments


def _difference(before: Mapping[str, Any], after: Mapping[str, Any], channels: list[Channel]) -> Tally:
    seconds = after["t"] - before["t"]
    total = after["total_j"] - before["total_j"]
    return Tally(
        seconds=seconds,
        joules={c.name: b - a for c, a, b in zip(channels, before["j"], after["j"], strict=True)},
        total_j=total,
        estimated_j=after["estimated_j"] - before["estimated_j"],
        covered_seconds=after["covered_s"] - before["covered_s"],
    )


def start_record(
    hostname: str,
    host_id: str,
    world_size: int,
    period_s: float,
    channels: list[Channel],
    unix_time: float,
    facility: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The first record of a segment."""
    return {
        "kind": "start",
        "version": VERSION,
        "hostname": hostname,
        "host_id": host_id,
        "pid": os.getpid(),
        "world_size": world_size,
        "period_s": period_s,
        "unix_time": unix_time,
        "facility": dict(facility or {}),
        "channels": [asdict(channel) for channel in channels],
    }
