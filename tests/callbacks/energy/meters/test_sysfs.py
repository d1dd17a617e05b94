from __future__ import annotations

import math
import os

import pytest

from callbacks.energy.meters.sysfs import NumberFile, entries, number, open_all, text


def test_a_number_file_is_read_anew_through_one_descriptor(tmp_path):
    path = tmp_path / "energy_uj"
    path.write_text("52000000\n")
    file = NumberFile(path, 1e-6)
    assert math.isnan(file.read())
    file.open()
    assert file.read() == pytest.approx(52)
    path.write_text("53000000\n")
    assert file.read() == pytest.approx(53)
    path.write_text("12345 J 1620000000 us\n")
    assert file.read() == pytest.approx(12345e-6)
    for nothing in ("", "\n", "unknown\n"):
        path.write_text(nothing)
        assert math.isnan(file.read())
    file.close()
    file.close()
    assert math.isnan(file.read())


def test_files_are_opened_all_or_none(tmp_path):
    (tmp_path / "there").write_text("1")
    files = [NumberFile(tmp_path / "there"), NumberFile(tmp_path / "missing")]
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with pytest.raises(FileNotFoundError):
        open_all(files)
    assert math.isnan(files[0].read())
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def test_small_files_and_folders(tmp_path):
    for name in ("hwmon10", "hwmon2", "hwmon1"):
        (tmp_path / name).write_text(" 7 W \n")
    assert [path.name for path in entries(tmp_path)] == ["hwmon1", "hwmon2", "hwmon10"]
    assert text(tmp_path / "hwmon1") == "7 W" and text(tmp_path / "missing") == ""
    assert number(tmp_path / "hwmon1") == 7 and number(tmp_path / "missing") is None
    assert entries(tmp_path / "missing") == []
