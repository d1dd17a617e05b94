"""The simulator of thin films against tmm, the reference, and tmm-fast, its vectorised form in PyTorch.

Random stacks of all 18 materials at 171 wavelengths (300 to 2000 nm) in air at normal incidence, double precision, one
thread. All compute R and T of the same stacks from the same n, k: tmm a stack and wavelength at a time, tmm-fast and
ours all at once; the token form starts from ids and looks up what costs an exponential. tmm is timed on a few of the
stacks and scaled, all wavelengths of each. Ratios are those of CPU time. The design study found 174 stacks of 20 layers
per second for tmm-fast, 5 for tmm, 1973 for ours and 6374 for the token form, on a busy machine.

With gradients: R of all stacks and wavelengths is summed and derived with respect to all thicknesses.

The peers are in the extra ``peers``; rows of those that are not there are left out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import Clock, Lap, Timing, interleave, median, ratio, single_thread
from benchmarks.record import Result, Row
from physics.thin_film.generator import SPACES, StackGenerator
from physics.thin_film.materials import MaterialCatalog
from physics.thin_film.surroundings import Surroundings
from physics.thin_film.token_tables import TokenTables
from physics.thin_film.transfer_matrix import transfer_matrix

CLAIM: str = (
    "On one thread and 20 layers the simulator takes at most an eighth of the time of tmm-fast, and a 25th of it with "
    "tables of tokens; and a 300th of the time of tmm."
)

STACKS, TMM_STACKS = 256, 2
LAYERS = (20, 6)
PEERS = {"tmm": "tmm", "tmm_fast": "tmm-fast"}
BOUNDS = {("tmm-fast", "ours"): 8, ("tmm-fast", "tokens"): 25, ("tmm", "ours"): 300}
EARLIER = {
    20: {("tmm-fast", "ours"): "11", ("tmm-fast", "tokens"): "37", ("tmm", "ours"): "395"},
    6: {("tmm-fast", "tokens"): "11"},
}


class Problem:
    """The same stacks in the forms that the programs want.

    Attributes:
        vocabulary: Of the paper, 903 tokens.
        tokens: ``(N, 21)``.
        index: n + ik ``(N, L, W)``.
        thickness_nm: ``(N, L)``.
        wavelength_nm: ``(W,)``.
    """

    def __init__(self, number: int, layers: int) -> None:
        self.vocabulary, self.wavelength_nm = SPACES["paper"].vocabulary(), SPACES["paper"].wavelengths()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some tables end before 2000 nm
            self.catalog = MaterialCatalog.default()
            indices = self.catalog.indices(self.vocabulary.materials, self.wavelength_nm)
        generator = StackGenerator(self.vocabulary, layers, min_layers=layers, seed=0)
        self.tokens = generator.tokens(range(number))
        material, thickness = self.vocabulary.layers(self.tokens)
        self.index, self.thickness_nm = indices[material[:, :layers]].contiguous(), thickness[:, :layers].contiguous()

    def ours(self) -> Tensor:
        """R and T ``(N, 2, W)``."""
        with torch.no_grad():
            return transfer_matrix(self.index, self.thickness_nm, self.wavelength_nm)[:, ::2]

    def ours_complex64(self) -> Callable[[], Tensor]:
        """The same in single precision."""
        index = self.index.to(torch.complex64)

        def run() -> Tensor:
            with torch.no_grad():
                return transfer_matrix(index, self.thickness_nm, self.wavelength_nm)[:, ::2]

        return run

    def tables(self, dtype: torch.dtype = torch.complex128) -> Callable[[], Tensor]:
        """From tokens; the tables are made beforehand."""
        tables = TokenTables(self.vocabulary, self.catalog, self.wavelength_nm, dtype=dtype)
        return lambda: tables(self.tokens)[:, ::2]

    def _with_air(self) -> tuple[Tensor, Tensor]:
        """Index and thickness with half-spaces of air on both sides, as the peers want them."""
        number, _, wavelengths = self.index.shape
        air = torch.ones(number, 1, wavelengths, dtype=torch.complex128)
        infinite = torch.full((number, 1), math.inf, dtype=torch.float64)
        index = torch.cat([air, self.index, air], dim=1)
        return index, torch.cat([infinite, self.thickness_nm, infinite], dim=1)

    def tmm_fast(self, gradient: bool = False) -> Callable[[], Tensor]:
        """All stacks in one call of the peer; its input is made beforehand."""
        from tmm_fast import coh_tmm

        index, thickness = self._with_air()
        angle = torch.zeros(1, dtype=torch.float64)
        thickness.requires_grad_(gradient)

        def run() -> Tensor:
            found = coh_tmm("s", index, thickness, angle, self.wavelength_nm)
            reflectance, transmittance = found["R"][:, 0], found["T"][:, 0]
            if gradient:
                return torch.autograd.grad(reflectance.sum(), thickness)[0][:, 1:-1]
            return torch.stack([reflectance, transmittance], dim=1)

        return run

    def ours_gradient(self) -> Tensor:
        """Derivatives of the sum of R, ``(N, L)``."""
        thickness = self.thickness_nm.clone().requires_grad_()
        found = transfer_matrix(self.index, thickness, self.wavelength_nm)
        return torch.autograd.grad(found[:, 0].sum(), thickness)[0]

    def tmm(self, number: int) -> Callable[[], Tensor]:
        """The first ``number`` stacks, a wavelength at a time."""
        from tmm import coh_tmm

        index, thickness = (part[:number] for part in self._with_air())
        columns = [[stack[:, w].tolist() for w in range(stack.shape[1])] for stack in index]
        lists, wavelengths = thickness.tolist(), self.wavelength_nm.tolist()

        def run() -> Tensor:
            with contextlib.redirect_stdout(io.StringIO()):  # it remarks on opaque layers
                found = [
                    [coh_tmm("s", n, d, 0.0, w) for n, w in zip(stack, wavelengths, strict=True)]
                    for stack, d in zip(columns, lists, strict=True)
                ]
            return torch.tensor([[[one[key] for one in stack] for key in "RT"] for stack in found])

        return run


def installed() -> list[str]:
    """Peers that are there."""
    return [name for name in PEERS if importlib.util.find_spec(name)]


def timed(function: Callable[[], Tensor], share: float = 1.0) -> Callable[[], Lap]:
    """Time of a call, divided by the share of the stacks that it simulates."""
    clock = Clock()

    def lap() -> Lap:
        begin = clock.now()
        function()
        end = clock.now()
        return Lap((end.wall - begin.wall) / share, (end.cpu - begin.cpu) / share)

    return lap


def compared(
    what: str, variants: dict[str, Callable[[], Lap]], pairs: dict[tuple[str, str], dict], repeats: int
) -> list:
    """Rows of CPU time per variant and of ratios."""
    timings = {name: Timing.of(laps) for name, laps in interleave(variants, repeats).items()}
    rows: list[Row] = []
    for name, timing in timings.items():
        found = median(timing.cpu)
        values = {"value": 1e3 * found.value, "low": 1e3 * found.low, "high": 1e3 * found.high}
        rows.append({"what": f"{what}, CPU time", "variant": name, "unit": "ms"} | values)
    for (peer, mine), extra in pairs.items():
        if peer in timings and mine in timings:
            found = ratio(timings[peer].cpu, timings[mine].cpu)
            values = {"value": found.value, "low": found.low, "high": found.high, "cpu": found.value}
            rows.append({"what": f"{what}, ratio", "variant": f"{peer} / {mine}", "unit": ""} | values | extra)
    return rows


def forward_rows(layers: int, number: int, tmm_number: int, repeats: int) -> list[Row]:
    """R and T of all stacks."""
    problem, peers = Problem(number, layers), installed()
    variants = {
        "ours": timed(problem.ours),
        "ours, complex64": timed(problem.ours_complex64()),
        "tokens": timed(problem.tables()),
        "tokens, complex64": timed(problem.tables(torch.complex64)),
    }
    if "tmm_fast" in peers:
        variants["tmm-fast"] = timed(problem.tmm_fast())
    if "tmm" in peers:
        variants["tmm"] = timed(problem.tmm(tmm_number), tmm_number / number)
    pairs = {
        pair: ({"at_least": bound} if layers == 20 else {})
        | ({"note": f"{EARLIER[layers][pair]} in the design study"} if pair in EARLIER.get(layers, {}) else {})
        for pair, bound in BOUNDS.items()
    }
    return compared(f"{number} stacks of {layers} layers", variants, pairs, repeats)


def gradient_rows(layers: int, number: int, repeats: int) -> list[Row]:
    """Derivatives with respect to all thicknesses."""
    problem = Problem(number, layers)
    variants = {"ours": timed(problem.ours_gradient)}
    if "tmm_fast" in installed():
        variants["tmm-fast"] = timed(problem.tmm_fast(gradient=True))
    what = f"{number} stacks of {layers} layers with gradients"
    return compared(what, variants, {("tmm-fast", "ours"): {}}, repeats)


def difference_rows(layers: int, number: int, tmm_number: int) -> list[Row]:
    """Largest differences of R and T to the peers, on the stacks that are timed."""
    problem, rows = Problem(number, layers), []
    ours = problem.ours()
    others = {"tokens": problem.tables()()}
    if "tmm_fast" in installed():
        others["tmm-fast"] = problem.tmm_fast()()
    if "tmm" in installed():
        others["tmm"] = problem.tmm(tmm_number)()
    for name, other in others.items():
        difference = (other.double() - ours[: len(other)]).abs().max().item()
        rows.append(
            {"what": "largest difference of R and T", "variant": f"{name} - ours", "unit": "", "value": difference}
        )
    return rows


def data_rows(number: int, repeats: int) -> list[Row]:
    """Making a training set of section 9: stacks of the space metal6 with their spectra."""
    space = SPACES["metal6"]
    vocabulary, catalog, wavelength = space.vocabulary(), MaterialCatalog.default(), space.wavelengths()
    stacks = StackGenerator(vocabulary, space.max_layers, seed=1)
    around = Surroundings.parse(space.substrate, catalog, wavelength)
    tables = TokenTables(vocabulary, catalog, wavelength, around)
    variants = {"ours": timed(lambda: tables(stacks.tokens(range(number)), torch.float16))}
    rows = compared(f"{number} stacks of 1 to 6 layers, drawn and simulated at 57 wavelengths", variants, {}, repeats)
    rows[0]["note"] = "2000 ms for 100 000 in the design study"
    return rows


def run(
    repeats: int = 7, stacks: int = STACKS, tmm_stacks: int = TMM_STACKS, data: int = 100_000, layers: tuple = LAYERS
) -> Result:
    """Time all of them in turns, on one thread."""
    rows: list[Row] = []
    with single_thread():
        for count in layers:
            rows += forward_rows(count, stacks, tmm_stacks, repeats)
        rows += gradient_rows(layers[0], stacks, repeats)
        rows += difference_rows(layers[0], stacks, tmm_stacks)
        rows += data_rows(data, repeats)
    packages = tuple(PEERS[name] for name in installed())
    missing = ", ".join(set(PEERS.values()) - set(packages)) or "-"
    settings = {"stacks": stacks, "stacks of tmm": tmm_stacks, "wavelengths": 171, "threads": 1, "repeats": repeats}
    return Result(rows, settings | {"not installed": missing}, packages=packages)
