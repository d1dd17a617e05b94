"""Files in the published layout; a round trip is in the acceptance test."""

from __future__ import annotations

import json
import struct

import pytest
import torch

from physics.thin_film.generator import SPACES, StackGenerator
from physics.thin_film.layout import FILLER, Shard, read_layout, read_shard, write_layout, write_shard
from physics.thin_film.materials import read_table
from physics.thin_film.token_tables import TokenTables
from tests.physics.thin_film.stacks import catalog

SPACE = SPACES["metal6"]
WAVELENGTHS = SPACE.wavelengths()


def shard(first: int = 0, number: int = 7) -> Shard:
    vocabulary = SPACE.vocabulary()
    tokens = StackGenerator(vocabulary, 6, seed=2).tokens(range(first, first + number))
    return Shard(TokenTables(vocabulary, catalog(), WAVELENGTHS)(tokens), tokens)


def damaged(path, change):
    """Write the file again with another header."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(change(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_the_package_reads_what_we_write_and_the_other_way_round(tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="needs the extra peers")
    written = shard()
    write_shard(tmp_path / "ours.safetensors", *written)
    theirs = package.load_file(tmp_path / "ours.safetensors")
    assert theirs["spectra"].dtype == torch.float16 and torch.equal(theirs["thin_films"], written.tokens)
    assert torch.equal(theirs["spectra"], written.spectra.half())
    tensors = {"thin_films": written.tokens, "spectra": written.spectra.half(), "another": torch.ones(3)}
    package.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"origin": "a test"})
    ours = read_shard(tmp_path / "theirs.safetensors")
    assert torch.equal(ours.spectra, written.spectra.half()) and torch.equal(ours.tokens, written.tokens)


def test_a_folder(tmp_path):
    vocabulary = SPACE.vocabulary()
    shards = [shard(7 * i) for i in range(11)]
    write_layout(tmp_path / "data", vocabulary, catalog(), WAVELENGTHS, shards, shard(100))
    found = read_layout(tmp_path / "data")
    assert found.vocabulary == vocabulary and len(found.train) == 11 and found.test is not None
    for path, expected in zip(found.train, shards, strict=True):  # 10 behind 9, not behind 1
        assert torch.equal(read_shard(path).tokens, expected.tokens)
    index = catalog().indices(SPACE.materials, WAVELENGTHS)
    again = found.catalog.indices(SPACE.materials, WAVELENGTHS)
    torch.testing.assert_close(again, index, rtol=1e-5, atol=0)
    assert len(read_table(tmp_path / "data" / "materials" / f"{FILLER}.csv").n) == len(WAVELENGTHS)


def test_numbers_are_mapped_and_files_stay_as_they_are(tmp_path):
    path = tmp_path / "a.safetensors"
    write_shard(path, *shard())
    before = path.read_bytes()
    assert (8 + struct.unpack("<Q", before[:8])[0]) % 8 == 0
    read_shard(path).tokens[:] = 0
    assert path.read_bytes() == before
    write_shard(path, torch.zeros(0, 3, 57), torch.zeros(0, 7))
    assert read_shard(path).spectra.shape == (0, 3, 57)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: {k: v for k, v in h.items() if k != "spectra"}, "has no tensor 'spectra', only thin_films"),
        (lambda h: [], "has no tensor 'spectra'"),
        (lambda h: h | {"spectra": {"dtype": "F16"}}, "the entry of 'spectra' in the header is broken"),
        (lambda h: h | {"spectra": h["spectra"] | {"dtype": "F32"}}, "spectra is F32"),
        (lambda h: h | {"spectra": h["spectra"] | {"shape": [7, 171]}}, "must be F16 with 3 dimensions"),
        (lambda h: h | {"spectra": h["spectra"] | {"shape": [9, 3, 57]}}, "does not fit into the file"),
        (lambda h: h | {"spectra": h["spectra"] | {"shape": [7, 57, 3]}}, r"must be \(N, 3, W\)"),
    ],
)
def test_broken_headers(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    write_shard(path, *shard())
    damaged(path, change)
    with pytest.raises(ValueError, match=message):
        read_shard(path)


def test_broken_files(tmp_path):
    path = tmp_path / "a.safetensors"
    write_shard(path, *shard())
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="may have been cut off"):
        read_shard(path)
    for content in (b"", b"abc", whole[:50], b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no safetensors file"):
            read_shard(path)
    path.write_bytes(struct.pack("<Q", 4) + b"nope" + whole)
    with pytest.raises(ValueError, match="its header is no JSON"):
        read_shard(path)
    with pytest.raises(ValueError, match=r"must be \(N, 3, W\) and \(N, S\)"):
        write_shard(path, torch.zeros(2, 3, 5), torch.zeros(3, 7))


def test_incomplete_folders(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokens\.json"):
        read_layout(tmp_path)
    SPACE.vocabulary().save(tmp_path / "tokens.json")
    with pytest.raises(ValueError, match=r"has no \*\.safetensors"):
        read_layout(tmp_path)
    (tmp_path / "train").mkdir()
    write_shard(tmp_path / "train" / "train-0.safetensors", *shard())
    assert read_layout(tmp_path).test is None
