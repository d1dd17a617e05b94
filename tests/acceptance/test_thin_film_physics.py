"""What the optics of thin films must achieve: lines 1 to 3, 5 and 9 of the acceptance list; 4 is in the benchmark.

Numbers in comments were measured with these tests. Peers are in the extra ``peers``; every line is also checked against
plain numpy (tests/physics/thin_film/reference.py), by other algorithms than ours.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from physics.thin_film.generator import SPACES, StackGenerator
from physics.thin_film.layout import Shard, read_layout, read_shard, write_layout
from physics.thin_film.refine import Refiner
from physics.thin_film.surroundings import Surroundings
from physics.thin_film.token_tables import TokenTables
from physics.thin_film.transfer_matrix import transfer_matrix
from tests.physics.thin_film import reference
from tests.physics.thin_film.stacks import WAVELENGTHS, arrays, catalog, random_stacks

F64 = torch.float64
WL = WAVELENGTHS.numpy()
EXITS = {"air": 1.0, "glass": 1.52, "silicon": catalog().index("Si", WAVELENGTHS)}


def worst(spectrum: torch.Tensor, r: np.ndarray, t: np.ndarray) -> float:
    """Largest difference of R and T."""
    return max(np.abs(spectrum[0].numpy() - r).max(), np.abs(spectrum[2].numpy() - t).max())


# --- 1: equal to tmm 0.2.0 -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fifty():
    """50 random stacks of 1 to 20 layers of all 18 materials."""
    vocabulary, tokens = random_stacks(50, seed=11)
    lengths = vocabulary.keep(tokens).sum(1)
    assert lengths.min() <= 2 and lengths.max() >= 19
    assert set(vocabulary.material[tokens[vocabulary.keep(tokens)]].tolist()) == set(range(18))
    return vocabulary, tokens, lengths, *arrays(vocabulary, tokens)


@pytest.mark.parametrize("exit", list(EXITS))
@pytest.mark.parametrize("polarization", ["s", "p"])
@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_spectra_are_exact(fifty, angle, polarization, exit):
    """Measured: 2e-14 here and in the token form, 5e-6 in single precision."""
    vocabulary, tokens, lengths, index, thickness = fifty
    around = Surroundings(exit=EXITS[exit], angle_rad=angle, polarization=polarization)
    behind = np.asarray(EXITS[exit])
    found = transfer_matrix(index, thickness, WAVELENGTHS, around)
    largest = 0.0
    for i, layers in enumerate(lengths.tolist()):
        stack = index[i, :layers].numpy(), thickness[i, :layers].numpy(), WL
        largest = max(largest, worst(found[i], *reference.airy(*stack, 1.0, behind, angle, polarization)))
    by_token = (TokenTables(vocabulary, catalog(), WAVELENGTHS, around)(tokens) - found).abs().max().item()
    single = (transfer_matrix(index.to(torch.complex64), thickness, WAVELENGTHS, around) - found).abs().max().item()
    print(f"theta {angle}, {polarization}, {exit}: {largest:.1e}, tokens {by_token:.1e}, complex64 {single:.1e}")
    assert largest < 1e-12 and by_token < 1e-12 and single < 1e-4


def tmm_stack(tmm, i, fifty, wavelength, angle, polarization, exit):
    """R and T of one stack at one wavelength by tmm."""
    _, _, lengths, index, thickness = fifty
    layers = int(lengths[i])
    behind = complex(torch.as_tensor(EXITS[exit], dtype=torch.complex128).expand(len(WL))[wavelength])
    n = [1.0, *index[i, :layers, wavelength].tolist(), behind]
    d = [math.inf, *thickness[i, :layers].tolist(), math.inf]
    found = tmm.coh_tmm(polarization, n, d, angle, WL[wavelength])
    return found["R"], found["T"]


def compare_with_tmm(fifty, angle, polarization, exit, wavelengths):
    tmm = pytest.importorskip("tmm", reason="needs the extra peers")
    around = Surroundings(exit=EXITS[exit], angle_rad=angle, polarization=polarization)
    found = transfer_matrix(fifty[3], fifty[4], WAVELENGTHS, around)
    largest = 0.0
    for i in range(len(found)):
        for w in wavelengths:
            r, t = tmm_stack(tmm, i, fifty, w, angle, polarization, exit)
            largest = max(largest, abs(found[i, 0, w].item() - r), abs(found[i, 2, w].item() - t))
    print(f"theta {angle}, {polarization}, {exit}: largest difference to tmm {largest:.1e}")
    assert largest < 1e-12


@pytest.mark.parametrize(
    ("angle", "polarization", "exit"), [(0.0, "s", "air"), (0.7, "p", "silicon"), (0.7, "s", "glass")]
)
def test_spectra_are_those_of_tmm_at_some_wavelengths(fifty, angle, polarization, exit):
    """Measured: 7e-15."""
    compare_with_tmm(fifty, angle, polarization, exit, range(3, 171, 42))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("exit", list(EXITS))
@pytest.mark.parametrize("polarization", ["s", "p"])
@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_spectra_are_those_of_tmm(fifty, angle, polarization, exit):
    """Measured: 4e-14, in the worst of all stacks and wavelengths."""
    compare_with_tmm(fifty, angle, polarization, exit, range(171))


# --- 2: closed forms -------------------------------------------------------------------------------------------------

ONE = torch.tensor([550.0], dtype=F64)


def at_550(*layers: tuple[float, float], **around) -> torch.Tensor:
    """R, A, T at 550 nm of layers (index, thickness in nm)."""
    index = torch.tensor([n for n, _ in layers], dtype=torch.complex128)[:, None]
    return transfer_matrix(index, torch.tensor([d for _, d in layers], dtype=F64), ONE, Surroundings(**around))[:, 0]


def test_quarter_wave_reflector():
    high, low, glass = 2.35, 1.46, 1.52
    pairs = [(high, 550 / 4 / high), (low, 550 / 4 / low)] * 8
    ratio = glass * (high / low) ** 16
    expected = ((1 - ratio) / (1 + ratio)) ** 2
    found = at_550(*pairs, exit=glass)[0].item()
    assert expected == pytest.approx(0.99870433, abs=5e-9)
    assert abs(found - expected) < 1e-12


def test_ideal_antireflection_coating():
    n = math.sqrt(1.52)
    assert at_550((n, 550 / 4 / n), exit=1.52)[0] < 1e-15


@pytest.mark.parametrize("incident", [1.0, 1.33])
@pytest.mark.parametrize("exit", [1.52, 0.05 + 3.5j])
def test_bare_surfaces(incident, exit):
    """Fresnel's equations."""
    angle = 0.6
    cos = math.cos(angle)
    cos_behind = np.sqrt(1 - (incident * math.sin(angle) / exit) ** 2 + 0j)
    s = (incident * cos - exit * cos_behind) / (incident * cos + exit * cos_behind)
    p = (exit * cos - incident * cos_behind) / (exit * cos + incident * cos_behind)
    index, thickness = torch.zeros(0, 1, dtype=torch.complex128), torch.zeros(0, dtype=F64)
    for kind, r in (("s", s), ("p", p)):
        around = Surroundings(incident=incident, exit=exit, angle_rad=angle, polarization=kind)
        found = transfer_matrix(index, thickness, ONE, around)[:, 0]
        assert found[0].item() == pytest.approx(abs(r) ** 2, abs=1e-14)
        assert found[2].item() == pytest.approx(1 - abs(r) ** 2, abs=1e-14)


@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_energy_is_conserved_and_nothing_is_gained(fifty, angle):
    found = transfer_matrix(fifty[3], fifty[4], WAVELENGTHS, Surroundings(exit=1.52, angle_rad=angle))
    assert (found.sum(1) - 1).abs().max() < 1e-15
    assert found.min() > -1e-13 and found.max() < 1 + 1e-13  # rounding
    clear = transfer_matrix(fifty[3].real + 0j, fifty[4], WAVELENGTHS, Surroundings(exit=1.52, angle_rad=angle))
    assert clear[:, 1].abs().max() < 1e-12


@pytest.mark.parametrize("polarization", ["s", "p"])
def test_transmittance_is_the_same_from_both_sides(fifty, polarization):
    _, _, lengths, index, thickness = fifty
    glass, angle = 1.52, 0.7
    inside = math.asin(math.sin(angle) / glass)
    forward = Surroundings(exit=glass, angle_rad=angle, polarization=polarization)
    backward = Surroundings(incident=glass, exit=1.0, angle_rad=inside, polarization=polarization)
    one = transfer_matrix(index, thickness, WAVELENGTHS, forward)
    other = transfer_matrix(index.flip(1), thickness.flip(1), WAVELENGTHS, backward)
    assert (one[:, 2] - other[:, 2]).abs().max() < 1e-12
    assert (one[:, 0] - other[:, 0]).abs().max() > 0.1  # of absorbing stacks, unlike the transmittance
    assert lengths.max() > 10


def test_a_layer_in_two_parts_is_the_same_layer(fifty):
    _, _, _, index, thickness = fifty
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(thickness.shape, generator=generator, dtype=F64)
    parts = torch.stack([share * thickness, (1 - share) * thickness], dim=2).flatten(1)
    for around in (Surroundings(), Surroundings(exit=1.52, angle_rad=0.7)):
        whole = transfer_matrix(index, thickness, WAVELENGTHS, around)
        split = transfer_matrix(index.repeat_interleave(2, dim=1), parts, WAVELENGTHS, around)
        assert (whole - split).abs().max() < 1e-12


def test_very_thick_layers_are_finite():
    germanium = catalog().index("Ge", WAVELENGTHS).expand(20, -1)
    for dtype in (torch.complex128, torch.complex64):
        thickness = torch.full((20,), 5000.0, dtype=F64).requires_grad_()
        found = transfer_matrix(germanium.to(dtype), thickness, WAVELENGTHS)
        found[0].sum().backward()
        assert found.isfinite().all() and thickness.grad.isfinite().all()
    bulk = transfer_matrix(germanium[:1], torch.tensor([1e6], dtype=F64), WAVELENGTHS)
    opaque = WAVELENGTHS < 1500
    layers = transfer_matrix(germanium, torch.full((20,), 5000.0, dtype=F64), WAVELENGTHS)
    assert (layers - bulk)[0, opaque].abs().max() < 1e-12


# --- 3: incoherent substrate -----------------------------------------------------------------------------------------

PLATES = {"glass": 1.5 + 2e-7j, "clear": 1.52 + 0j, "silica": None}


def plate_of(name: str) -> torch.Tensor:
    value = PLATES[name]
    return catalog().index("SiO2", WAVELENGTHS) if value is None else torch.full((171,), value, dtype=torch.complex128)


@pytest.mark.parametrize("plate", list(PLATES))
@pytest.mark.parametrize("polarization", ["s", "p"])
@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_thick_plates(fifty, plate, polarization, angle):
    """Against the sum of all round trips; measured 2e-14."""
    vocabulary, tokens, lengths, index, thickness = fifty
    behind = plate_of(plate)
    around = Surroundings(plate=behind, plate_mm=0.5, angle_rad=angle, polarization=polarization)
    found = transfer_matrix(index, thickness, WAVELENGTHS, around)
    by_token = TokenTables(vocabulary, catalog(), WAVELENGTHS, around)(tokens)
    assert (found.sum(1) - 1).abs().max() < 1e-15 and (by_token - found).abs().max() < 1e-12
    largest = 0.0
    for i, layers in enumerate(lengths.tolist()):
        stack = index[i, :layers].numpy(), thickness[i, :layers].numpy(), WL
        expected = reference.on_plate(*stack, behind.numpy(), 0.5e6, angle, polarization)
        largest = max(largest, worst(found[i], *expected))
    print(f"{plate}, {polarization}, theta {angle}: {largest:.1e}")
    assert largest < 1e-10


@pytest.mark.parametrize("plate", list(PLATES))
@pytest.mark.parametrize("polarization", ["s", "p"])
@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_thick_plates_are_those_of_tmm(fifty, plate, polarization, angle):
    """Measured: 3e-15."""
    tmm = pytest.importorskip("tmm", reason="needs the extra peers")
    _, _, lengths, index, thickness = fifty
    behind = plate_of(plate)
    around = Surroundings(plate=behind, plate_mm=0.5, angle_rad=angle, polarization=polarization)
    found = transfer_matrix(index, thickness, WAVELENGTHS, around)
    largest = 0.0
    for i in range(0, 50, 5):
        for w in range(3, 171, 56):
            layers = int(lengths[i])
            n = [1.0, *index[i, :layers, w].tolist(), complex(behind[w]), 1.0]
            d = [math.inf, *thickness[i, :layers].tolist(), 0.5e6, math.inf]
            kinds = ["i", *["c"] * layers, "i", "i"]
            expected = tmm.inc_tmm(polarization, n, d, kinds, angle, WL[w])
            largest = max(largest, abs(found[i, 0, w].item() - expected["R"]))
            largest = max(largest, abs(found[i, 2, w].item() - expected["T"]))
    print(f"{plate}, {polarization}, theta {angle}: largest difference to tmm {largest:.1e}")
    assert largest < 1e-10


# --- 5: gradients and refinement -------------------------------------------------------------------------------------


def test_gradients_of_thickness_and_index():
    """More: tests/physics/thin_film/test_transfer_matrix.py."""
    vocabulary, tokens = random_stacks(3, seed=4, min_layers=4)
    index, thickness = arrays(vocabulary, tokens)
    index, thickness = (index[:, :4, 20:150:60] + 0.01j).clone(), thickness[:, :4].clone()
    at = WAVELENGTHS[20:150:60]
    variables = index.requires_grad_(), thickness.requires_grad_()
    for angle in (0.0, 0.7):
        around = Surroundings(exit=1.52, angle_rad=angle)
        assert torch.autograd.gradcheck(lambda n, d, a=around: transfer_matrix(n, d, at, a), variables)


@pytest.mark.parametrize(("space", "share"), [("metal6", 0.8), ("dielectric6", 0.95)])
def test_refinement_recovers_stacks(space, share):
    """Of 100 stacks of six layers, thicknesses 10 % off. Measured: 90 and 100 %; at 30 %: 74 and 97 %.

    Without the ten steps of Levenberg-Marquardt behind those of Adam: 88 and 100 %.
    """
    space = SPACES[space]
    vocabulary, wavelength = space.vocabulary(), space.wavelengths()
    tokens = StackGenerator(vocabulary, 6, min_layers=6, seed=3).tokens(range(100))
    glass = Surroundings.parse(space.substrate, catalog(), wavelength)
    tables = TokenTables(vocabulary, catalog(), wavelength, glass)
    material, thickness = vocabulary.layers(tokens)
    generator = torch.Generator().manual_seed(0)
    off = thickness * (1 + 0.1 * (2 * torch.rand(thickness.shape, generator=generator, dtype=F64) - 1))
    refiner = Refiner(tables.index, wavelength, glass, steps=150, lr_nm=6.0, polish_steps=10, bounds_nm=(1.0, 400.0))
    found = refiner(material, off, tables(tokens))
    recovered = (found.mae < 1e-3).double().mean().item()
    print(f"{recovered:.0%} recovered; mean error {found.start_mae.mean():.4f} before, {found.mae.mean():.5f} after")
    assert recovered >= share


# --- 9: the published layout -----------------------------------------------------------------------------------------


def test_round_trip_through_the_published_layout(tmp_path):
    vocabulary = SPACES["paper"].vocabulary()
    stacks, tables = StackGenerator(vocabulary, 20, seed=1), TokenTables(vocabulary, catalog(), WAVELENGTHS)

    def shard(first: int) -> Shard:
        tokens = stacks.tokens(range(first, first + 500))
        return Shard(tables(tokens), tokens)

    train, test = [shard(0), shard(500)], shard(1000)
    write_layout(tmp_path, vocabulary, catalog(), WAVELENGTHS, train, test)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    materials = {f"materials/{name}.csv" for name in (*vocabulary.materials, "EVA")}
    shards = {"train/train-0.safetensors", "train/train-1.safetensors", "test/test.safetensors"}
    assert names == {"tokens.json"} | materials | shards
    found = read_layout(tmp_path)
    assert found.vocabulary == vocabulary
    for path, written in zip((*found.train, found.test), (*train, test), strict=True):
        read = read_shard(path)
        assert read.spectra.shape == (500, 3, 171) and read.spectra.dtype == torch.float16
        assert read.tokens.shape == (500, 21) and read.tokens.dtype == torch.int64
        assert torch.equal(read.tokens, written.tokens)
        assert (read.spectra - written.spectra).abs().max() <= 2**-12 + 1e-7  # half a unit of float16 below 1
    # What was read can be simulated again: the tables of materials are the same.
    again = TokenTables(found.vocabulary, found.catalog, WAVELENGTHS)(read.tokens)
    assert (again - test.spectra).abs().max() < 1e-3
