from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from callbacks.energy import identity
from callbacks.energy.meters.base import Channel
from callbacks.energy.record import Counts, RecordFile, read_folder, start_record
from callbacks.energy.recorder import Recorder
from tests.callbacks.energy.sources import Clock, Source

CHANNELS = [Channel("cpu", "cpu", "gauge", True, "test")]


def recorded(path: Path, host: str = "abc", watts: float = 100.0, plan=(("startup", 1), ("test", 4)), end="completed"):
    """A file as a run of the recorder leaves it."""
    clock = Clock()
    file = RecordFile(path)
    assert file.acquire()
    recorder = Recorder([Source(watts, clock=clock)], 1000.0, file.write, clock=clock)
    file.write(start_record(f"node-{host}", host, 2, 1.0, CHANNELS, 0.0))
    recorder.start(plan[0][0])
    for label, seconds in plan:
        recorder.switch(label)
        clock.now += seconds
    recorder.stop()
    file.write({"kind": "counts", "world_size": 2, "samples": {"test": 10}, "updates": {"fit/train": 3}})
    if end:
        file.write({"kind": "end", "status": end, "t": 5.0})
    file.close()


def test_a_file_tells_the_whole_segment(tmp_path):
    recorded(tmp_path / "a.jsonl")
    (host,) = read_folder(tmp_path)
    assert (host.host_id, host.hostname, host.world_size, host.status) == ("abc", "node-abc", 2, "completed")
    assert {label: t.total_j for label, t in host.tallies.items()} == {"startup": 100.0, "test": 400.0}
    assert host.tallies["test"].seconds == 4 and host.tallies["test"].joules == {"cpu": 400.0}
    assert host.counts == Counts({"test": 10}, {"fit/train": 3})


def test_machines_are_kept_apart_and_parts_of_one_are_added(tmp_path):
    recorded(tmp_path / "a.jsonl", "one")
    recorded(tmp_path / "a.jsonl", "one", end=None)  # a resumed run appends
    recorded(tmp_path / "b.jsonl", "two", 50.0)
    one, two = read_folder(tmp_path)
    assert (one.tallies["test"].total_j, one.segments, one.status) == (800.0, 2, "killed")
    assert (two.tallies["test"].total_j, two.segments, two.status) == (200.0, 1, "completed")


def test_two_files_of_one_machine_are_one_machine(tmp_path):
    recorded(tmp_path / "a.jsonl", "one")
    recorded(tmp_path / "b.jsonl", "one")
    assert [host.segments for host in read_folder(tmp_path)] == [2]


@pytest.mark.parametrize("cut", [2, 20, 57])
def test_a_line_torn_by_a_death_costs_that_line(tmp_path, cut):
    recorded(tmp_path / "a.jsonl", plan=(("fit/train", 1), ("test", 4)), end=None)
    path = tmp_path / "a.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)[:-1]  # without counts: the last one is a sample
    path.write_bytes(b"".join(lines)[:-cut])
    (host,) = read_folder(tmp_path)
    assert host.status == "killed"
    assert sum(t.total_j for t in host.tallies.values()) == 100.0
    recorded(path)  # the next part begins on a line of its own
    (host,) = read_folder(tmp_path)
    assert sum(t.total_j for t in host.tallies.values()) == 600.0


def test_lines_are_in_the_file_at_once(tmp_path):
    file = RecordFile(tmp_path / "a.jsonl")
    file.acquire()
    file.write({"kind": "sample", "t": 1.5})
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"kind": "sample", "t": 1.5}
    file.close()
    file.close()
    file.write({"kind": "late"})


def test_only_one_process_of_a_machine_records(tmp_path):
    path = tmp_path / "a.jsonl"
    file = RecordFile(path)
    assert file.acquire()
    program = (
        "import sys; from pathlib import Path; from callbacks.energy.record import RecordFile;"
        "print(RecordFile(Path(sys.argv[1])).acquire())"
    )

    def other() -> str:
        run = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    assert other() == "False"
    file.close()
    assert other() == "True"
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]  # no lock file


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_ends_the_record_and_not_the_run(tmp_path, caplog):
    file = RecordFile(tmp_path / "a.jsonl")
    file.acquire()
    os.close(file._file)
    file._file = os.open("/dev/full", os.O_WRONLY)
    for _ in range(3):
        file.write({"kind": "sample"})
    assert sum("cannot be written any more" in message for message in caplog.messages) == 1


def test_records_of_another_version_are_refused(tmp_path):
    recorded(tmp_path / "a.jsonl")
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text().replace('"version":1', '"version":99'))
    with pytest.raises(ValueError, match="version 99"):
        read_folder(tmp_path)


def test_machines_have_an_identity(monkeypatch):
    monkeypatch.delenv("WATTLIGHT_HOST_ID", raising=False)
    assert identity.host_id() == identity.host_id() and len(identity.host_id()) == 8
    monkeypatch.setattr(identity, "hostname", lambda: "another")
    other = identity.host_id()
    monkeypatch.setenv("WATTLIGHT_HOST_ID", "given")
    assert identity.host_id() == "given" != other
