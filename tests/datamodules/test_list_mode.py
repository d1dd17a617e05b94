"""Hits as files: what is written is read, what is missing is filled in, what is wrong is named."""

from __future__ import annotations

import numpy as np
import pytest

from datamodules.readers.list_mode import read_hits, write_hits
from physics.pet.hits import Hits
from physics.pet.scanner import make_scanner
from physics.pet.toy import Toy, draw_delays, simulate_toy


@pytest.fixture
def hits():
    delays = draw_delays(24, 8, 0.5, 0)
    return simulate_toy(make_scanner("toy24"), Toy(num_steps=100, delay_trials=8), 40, delays, 0)


@pytest.mark.parametrize("suffix", [".csv", ".npz"])
def test_round_trip(hits, suffix, tmp_path):
    write_hits(hits, tmp_path / f"deeper/hits{suffix}")
    again = read_hits(tmp_path / f"deeper/hits{suffix}", num_crystals=24, num_steps=100)
    assert all(np.array_equal(getattr(hits, name), getattr(again, name)) for name in Hits.columns())
    assert [p.name for p in (tmp_path / "deeper").iterdir()] == [f"hits{suffix}"]


def test_a_stream_is_cut_into_samples(tmp_path):
    (tmp_path / "stream.csv").write_text("step, crystal\n250,3\n7,0\n199,23\n")
    hits = read_hits(tmp_path / "stream.csv", num_crystals=24, num_steps=100)
    assert (
        hits.sample.tolist() == [0, 1, 2] and hits.step.tolist() == [7, 99, 50] and hits.crystal.tolist() == [0, 23, 3]
    )
    assert (hits.decay == -1).all() and (hits.energy_kev == 511).all() and hits.num_samples == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step\n3\n", "no column 'crystal'"),
        ("step,crystal,colour\n1,2,3\n", "line 1.*'colour' is unknown"),
        ("step,crystal\n1\n", "line 2: 1 values for 2 columns"),
        ("step,crystal\n1,2\n1,x\n", "line 3"),
        ("step,crystal\n1,2.5\n", "line 2.*whole number"),
        ("step,crystal\n", "holds no hit"),
        ("step,crystal\n1,24\n", "crystal 24.*24 crystals"),
        ("sample,step,crystal\n0,100,1\n", "step 100"),
    ],
)
def test_mistakes_are_named(text, words, tmp_path):
    (tmp_path / "hits.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_hits(tmp_path / "hits.csv", num_crystals=24, num_steps=100)


def test_files_that_are_not_there_or_of_another_kind(tmp_path, hits):
    with pytest.raises(FileNotFoundError, match=r"data\.file"):
        read_hits(tmp_path / "nope.csv", num_crystals=24, num_steps=100)
    (tmp_path / "hits.root").write_text("")
    with pytest.raises(ValueError, match=r"\.csv and \.npz"):
        read_hits(tmp_path / "hits.root", num_crystals=24, num_steps=100)
    with pytest.raises(ValueError, match=r"\.csv and \.npz"):
        write_hits(hits, tmp_path / "hits.root")
