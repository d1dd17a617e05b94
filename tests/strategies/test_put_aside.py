from __future__ import annotations

import errno
import os
import tempfile

import psutil
import pytest
import torch

from strategies.ab_training.put_aside import bring_back, put_aside


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
)
def test_the_same_bits_come_back(dtype):
    value = (1000 * torch.randn(300, 70, 5)).to(dtype)
    aside = put_aside(value)
    assert aside.dtype == dtype and aside.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()
    assert torch.equal(aside, value)
    again = bring_back(aside, torch.device("cpu"))
    again.zero_()
    assert torch.equal(aside, value), "what trains on changes nothing that waits"


def test_any_layout_comes_back():
    value = torch.randn(64, 16, 8, 8).to(memory_format=torch.channels_last)[:, 2:]
    assert torch.equal(put_aside(value), value)
    assert torch.equal(put_aside(value.transpose(0, 1)), value.transpose(0, 1))


def test_it_is_out_of_memory_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    process, size = psutil.Process(), 256 * 2**20
    value = torch.ones(size // 4)
    before = process.memory_info().rss
    aside = put_aside(value)
    del value
    assert before - process.memory_info().rss > 0.9 * size
    assert not os.listdir(tmp_path)
    assert float(aside[-1]) == 1.0


def test_a_full_disk_costs_memory_and_nothing_else(monkeypatch, caplog):
    def full(**options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    value = torch.randn(100_000)
    assert torch.equal(put_aside(value), value)
    assert "waits in memory" in caplog.text and "No space left" in caplog.text


def test_a_disk_that_fills_up_meanwhile(monkeypatch, caplog):
    class Filling:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: Filling())
    value = torch.randn(100_000)
    assert torch.equal(put_aside(value), value)
    assert "waits in memory" in caplog.text


def test_saving_what_waits(tmp_path):
    value = torch.randn(100_000)
    torch.save({"state": put_aside(value)}, tmp_path / "file.ckpt")
    assert torch.equal(torch.load(tmp_path / "file.ckpt", weights_only=True)["state"], value)
