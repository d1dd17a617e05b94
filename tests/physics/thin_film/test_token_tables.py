"""Stacks of tokens are simulated like the layers they stand for."""

from __future__ import annotations

import pytest
import torch

from physics.thin_film.surroundings import Surroundings
from physics.thin_film.token_tables import TokenTables
from physics.thin_film.tokens import Vocabulary
from physics.thin_film.transfer_matrix import transfer_matrix
from tests.physics.thin_film.stacks import WAVELENGTHS, arrays, catalog, random_stacks

SURROUNDINGS = {
    "air": Surroundings(),
    "glass": Surroundings(exit=1.52),
    "oblique": Surroundings(angle_rad=0.7, incident=1.2),
    "p on silicon": Surroundings(angle_rad=0.7, polarization="p", exit=catalog().index("Si", WAVELENGTHS)),
    "plate": Surroundings(plate=1.5 + 1e-7j, plate_mm=0.5),
    "oblique plate": Surroundings(angle_rad=0.4, plate=catalog().index("SiO2", WAVELENGTHS), plate_mm=1.0),
}


@pytest.fixture(scope="module")
def stacks():
    """Random lengths; special tokens before, between and after the layers."""
    vocabulary, tokens = random_stacks(60)
    tokens[:10, 2] = vocabulary.msk
    tokens[5:15, 0] = vocabulary.pad
    tokens[20, 0] = vocabulary.eos  # no layer at all
    tokens[21] = vocabulary.msk
    tokens[22:25, 19] = vocabulary.id("Ag_100")  # behind EOS
    return vocabulary, tokens


@pytest.mark.parametrize("name", list(SURROUNDINGS))
def test_tokens_are_their_layers(stacks, name):
    vocabulary, tokens = stacks
    expected = transfer_matrix(*arrays(vocabulary, tokens), WAVELENGTHS, SURROUNDINGS[name])
    exact = TokenTables(vocabulary, catalog(), WAVELENGTHS, SURROUNDINGS[name])(tokens)
    assert (exact - expected).abs().max() < 1e-12
    single = TokenTables(vocabulary, catalog(), WAVELENGTHS, SURROUNDINGS[name], torch.complex64)(tokens)
    assert single.dtype == torch.float32
    assert (single - expected).abs().max() < 1e-4


def test_order_shape_and_chunks_do_not_matter(stacks, monkeypatch):
    vocabulary, tokens = stacks
    tables = TokenTables(vocabulary, catalog(), WAVELENGTHS, SURROUNDINGS["glass"])
    expected = tables(tokens)
    torch.testing.assert_close(tables(tokens.flip(0)).flip(0), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(tables(tokens.view(3, 20, 21)).flatten(0, 1), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(tables(tokens[7]), expected[7], rtol=0, atol=1e-14)
    monkeypatch.setattr("physics.thin_film.transfer_matrix.CHUNK_ELEMENTS", 500)
    torch.testing.assert_close(tables(tokens), expected, rtol=0, atol=1e-14)
    assert tables(tokens[:0]).shape == (0, 3, 171)
    half = tables(tokens, torch.float16)
    assert half.dtype == torch.float16 and (half - expected).abs().max() < 5e-4


def test_input_is_left_alone(stacks):
    vocabulary, tokens = stacks
    before = tokens.clone()
    TokenTables(vocabulary, catalog(), WAVELENGTHS)(tokens)
    assert torch.equal(before, tokens)


def test_a_single_material_and_any_order_of_ids():
    vocabulary = Vocabulary(["<MSK>", "Ag_30", "<EOS>", "Ag_10", "<PAD>"])
    tables = TokenTables(vocabulary, catalog(), WAVELENGTHS)
    once = tables(vocabulary.encode(["Ag_30"], 5))
    torch.testing.assert_close(tables(vocabulary.encode(["Ag_10"] * 3, 5)), once, rtol=0, atol=1e-14)


def test_unknown_materials_and_types():
    vocabulary = Vocabulary.build(["Unobtainium"], [10])
    with pytest.raises(ValueError, match="unknown material 'Unobtainium'"):
        TokenTables(vocabulary, catalog(), WAVELENGTHS)
    with pytest.raises(ValueError, match="must be complex"):
        TokenTables(Vocabulary.build(["Ag"], [10]), catalog(), WAVELENGTHS, dtype=torch.float64)
