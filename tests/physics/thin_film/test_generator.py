"""Stacks are a function of seed and number, with the distribution that the paper describes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from physics.thin_film.bragg import longest_bragg
from physics.thin_film.generator import SPACES, StackGenerator
from physics.thin_film.materials import GROUPS
from physics.thin_film.tokens import Vocabulary
from tests.physics.thin_film.stacks import catalog

KINDS = ("dbr", "fabry_perot", "absorber", "antireflection")
# The first two stacks and a late one of the space metal6 with seed 1.
PINNED = [
    "Ag_20 Si_100 Ag_180 Al2O3_80 SiO2_120 Ag_160",
    "Si_100 Ag_80 Si_160 Al2O3_140",
    "Ag_100 Si_100 TiO2_80",
]


def structured(kind: str, space: str = "paper", **options) -> tuple[Vocabulary, torch.Tensor]:
    vocabulary = SPACES[space].vocabulary()
    options = {"max_layers": SPACES[space].max_layers, "mixture": {kind: 1.0}, "catalog": catalog()} | options
    return vocabulary, StackGenerator(vocabulary, **options).tokens(range(500))


def test_any_subset_in_any_order():
    vocabulary = SPACES["metal6"].vocabulary()
    mixture = {"random": 0.4, "dbr": 0.2, "fabry_perot": 0.2, "absorber": 0.2}
    stacks = StackGenerator(vocabulary, 6, seed=7, mixture=mixture, catalog=catalog())
    all_of_them = stacks.tokens(range(1000))
    assert torch.equal(stacks.tokens([999, 3, 500]), all_of_them[[999, 3, 500]])
    assert torch.equal(stacks.tokens(torch.arange(250, 300)), all_of_them[250:300])
    assert torch.equal(torch.cat([stacks.tokens(np.arange(i, i + 100)) for i in range(0, 1000, 100)]), all_of_them)
    other = StackGenerator(vocabulary, 6, seed=8, mixture=mixture, catalog=catalog()).tokens(range(1000))
    assert (other != all_of_them).any(1).float().mean() > 0.99


def test_the_stream_is_pinned():
    """Data sets of earlier runs are made again: these stacks must never change."""
    vocabulary = SPACES["metal6"].vocabulary()
    found = [vocabulary.text(row) for row in StackGenerator(vocabulary, 6, seed=1).tokens([0, 1, 10**12])]
    assert found == PINNED


def test_distribution():
    """Lengths, materials, thicknesses and neighbours within four deviations of uniform."""
    space, number = SPACES["metal6"], 40_000
    vocabulary = space.vocabulary()
    tokens = StackGenerator(vocabulary, 6, seed=3).tokens(range(number))
    assert tokens.shape == (number, 7) and vocabulary.well_formed(tokens).all()
    material, thickness = vocabulary.layers(tokens)
    layer = material >= 0

    def uniform(values: torch.Tensor, kinds: int) -> None:
        counts = torch.bincount(values, minlength=kinds).double()
        expected = len(values) / kinds
        assert len(counts) == kinds and (counts - expected).abs().max() < 4 * expected**0.5, counts

    uniform(layer.sum(1) - 1, 6)
    uniform(material[:, 0], 5)
    uniform((thickness[layer] / 20).long() - 1, 10)
    pairs = layer[:, 1:]
    step = (material[:, 1:] - material[:, :-1]).remainder(5)[pairs]
    uniform(step - 1, 4)  # never the same material twice
    # There are 50 stacks of one layer and 2000 of two; longer ones hardly ever come twice.
    assert len(tokens.unique(dim=0)) > 2000 + 0.95 * number * 4 / 6


def test_least_number_of_layers():
    vocabulary = SPACES["metal6"].vocabulary()
    tokens = StackGenerator(vocabulary, 6, min_layers=6).tokens(range(100))
    assert (tokens[:, 6] == vocabulary.eos).all()
    _, tokens = structured("dbr", min_layers=10)
    assert ((tokens == vocabulary.eos).nonzero()[:, 1] >= 10).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", ["paper", "metal6"])
def test_structured_stacks_are_stacks(kind, space):
    vocabulary, tokens = structured(kind, space)
    assert vocabulary.well_formed(tokens).all()
    material, _ = vocabulary.layers(tokens)
    lengths = (material >= 0).sum(1)
    assert lengths.min() >= 3 and lengths.max() <= SPACES[space].max_layers
    assert not ((material[:, 1:] == material[:, :-1]) & (material[:, 1:] >= 0)).any()
    assert len(tokens.unique(dim=0)) > 200


def test_dbr_are_quarter_waves():
    vocabulary, tokens = structured("dbr")
    material, thickness = vocabulary.layers(tokens)
    lengths = (material >= 0).sum(1)
    assert torch.equal(longest_bragg(material, thickness, tolerance_nm=0), lengths)
    index = catalog().indices(vocabulary.materials, torch.linspace(350, 1800, 256, dtype=torch.float64))
    a, b = material[:, 0], material[:, 1]
    metals = torch.tensor([name in GROUPS["metals"] for name in vocabulary.materials])
    assert not metals[a].any() and not metals[b].any()
    # For some wavelength both layers are a quarter of it within half a step of the grid.
    centre = torch.linspace(350, 1800, 256, dtype=torch.float64)
    off = torch.maximum(
        *((centre / (4 * index.real[m].clamp(min=1)) - thickness[:, i : i + 1]).abs() for i, m in ((0, a), (1, b)))
    )
    assert (off.amin(1) <= 5 + 1e-9).all()


def test_fabry_perot_has_a_cavity_or_metal_mirrors():
    vocabulary, tokens = structured("fabry_perot")
    material, thickness = vocabulary.layers(tokens)
    lengths = (material >= 0).sum(1)
    assert (lengths % 2 == 1).all()
    metals = torch.tensor([name in GROUPS["metals"] for name in vocabulary.materials])
    metallic = metals[material[:, 0]]
    assert 0.4 < metallic.double().mean() < 0.6
    rows = torch.arange(len(tokens))[~metallic]
    middle, before = lengths[rows] // 2, lengths[rows] // 2 - 2
    cavity = thickness[rows, middle]
    with_neighbour = before >= 0
    ratio = cavity[with_neighbour] / thickness[rows, before.clamp(min=0)][with_neighbour]
    assert ratio.median() == pytest.approx(2, abs=0.15)
    assert (thickness[metallic, 0] <= 50).all() and metals[material[metallic, 2]].all()


def test_absorbers_end_in_thick_metal():
    vocabulary, tokens = structured("absorber")
    material, thickness = vocabulary.layers(tokens)
    last = (material >= 0).sum(1) - 1
    rows = torch.arange(len(tokens))
    metals = torch.tensor([name in GROUPS["metals"] for name in vocabulary.materials])
    assert metals[material[rows, last]].all() and (thickness[rows, last] >= 100).all()
    assert not metals[material[rows, last - 1]].any()
    assert metals[material[rows, last - 2]].all() and (thickness[rows, last - 2] <= 20).all()


def test_antireflection_coatings_begin_with_the_lowest_index():
    vocabulary, tokens = structured("antireflection", "dielectric6", centre_nm=(500.0, 600.0))
    material, thickness = vocabulary.layers(tokens)
    assert {vocabulary.materials[m] for m in material[:, 0].tolist()} == {"MgF2"}
    assert thickness[:, 0].unique().tolist() == [100.0]  # 500 to 600 nm / 4 / 1.38, on a grid of 20 nm
    assert set(material[:, 1].tolist()) == set(range(5)) - {vocabulary.materials.index("MgF2")}


def test_uneven_vocabularies():
    """A published list need not have all thicknesses of all materials, and may be in any order."""
    vocabulary = Vocabulary(["Ag_20", "<EOS>", "SiO2_100", "SiO2_50", "<PAD>", "TiO2_60", "<MSK>"])
    tokens = StackGenerator(vocabulary, 4).tokens(range(2000))
    assert vocabulary.well_formed(tokens).all() and (tokens != vocabulary.msk).all()
    silica = tokens[(tokens == 2) | (tokens == 3)]
    assert (silica == 2).double().mean() == pytest.approx(0.5, abs=0.05)


def test_shares_of_the_mixture():
    vocabulary = SPACES["paper"].vocabulary()
    tokens = StackGenerator(vocabulary, 20, mixture={"random": 3.0, "dbr": 1.0}, catalog=catalog()).tokens(range(4000))
    material, thickness = vocabulary.layers(tokens)
    lengths = (material >= 0).sum(1)
    reflectors = (longest_bragg(material, thickness, 0) == lengths) & (lengths >= 4)
    assert reflectors.double().mean() == pytest.approx(0.25 * 17 / 18, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_layers": 0}, "min_layers=0"),
        ({"min_layers": 7}, "max_layers=6"),
        ({"mixture": {"spiral": 1.0}}, r"unknown kinds \['spiral'\]"),
        ({"mixture": {"random": -1.0}}, "must not be negative"),
        ({"mixture": {"random": 0.0}}, "one must be above 0"),
        ({"mixture": {"dbr": 1.0}}, "need a catalog"),
        ({"mixture": {"absorber": 1.0}, "max_layers": 2}, "need at least 3"),
        ({"mixture": {"fabry_perot": 1.0}, "min_layers": 6, "catalog": catalog()}, "odd number up to 6"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        StackGenerator(SPACES["metal6"].vocabulary(), **({"max_layers": 6} | options))


def test_materials_that_a_kind_needs():
    clear = Vocabulary.build(["SiO2", "TiO2"], [50, 100])
    with pytest.raises(ValueError, match="absorber needs a metal"):
        StackGenerator(clear, 5, mixture={"absorber": 1.0})
    with pytest.raises(ValueError, match="two materials that are no metals"):
        StackGenerator(Vocabulary.build(["SiO2", "Ag"], [50]), 5, mixture={"dbr": 1.0}, catalog=catalog())
    with pytest.raises(ValueError, match="single material"):
        StackGenerator(Vocabulary.build(["SiO2"], [50]), 5)
    assert StackGenerator(Vocabulary.build(["SiO2"], [50]), 1).tokens([0]).shape == (1, 2)
    tokens = StackGenerator(clear, 5, mixture={"fabry_perot": 1.0}, catalog=catalog()).tokens(range(50))
    assert clear.well_formed(tokens).all()


def test_spaces():
    for space in SPACES.values():
        vocabulary = space.vocabulary()
        assert len(vocabulary) == len(space.materials) * len(space.thicknesses_nm) + 3
        assert set(space.materials) <= set(catalog().names)
    assert SPACES["paper"].wavelengths().tolist() == [300.0 + 10 * i for i in range(171)]
    assert len(SPACES["metal6"].wavelengths()) == 57 and SPACES["metal6"].wavelengths()[-1] == 1980
    assert len(SPACES["metal6"].vocabulary()) == 53
