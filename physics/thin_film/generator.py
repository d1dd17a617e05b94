"""Random stacks, deterministic from (seed, index): a stream, a fixed set and shards are the same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from physics.thin_film.materials import GROUPS, MaterialCatalog
from physics.thin_film.tokens import Vocabulary

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Space:
    """Which stacks there are, and where they are looked at.

    Attributes:
        materials: Names.
        thicknesses_nm: Grid, the same for every material.
        max_layers: Lmax; sequences have Lmax + 1 positions.
        wavelengths_nm: First, last and step of the wavelengths.
        substrate: What is behind the stack, see `Surroundings.parse`.
    """

    materials: tuple[str, ...]
    thicknesses_nm: tuple[float, ...]
    max_layers: int
    wavelengths_nm: tuple[float, float, float] = (300.0, 2000.0, 10.0)
    substrate: str = "none"

    def vocabulary(self) -> Vocabulary:
        """Tokens of the space."""
        return Vocabulary.build(self.materials, self.thicknesses_nm)

    def wavelengths(self) -> Tensor:
        """In nm, ``(W,)`` float64."""
        first, last, step = self.wavelengths_nm
        return first + step * torch.arange(round((last - first) / step) + 1, dtype=torch.float64)


def _grid(first: int, last: int, step: int) -> tuple[float, ...]:
    return tuple(float(t) for t in range(first, last + 1, step))


_SMALL_METALS = ("Ag", "SiO2", "TiO2", "Si", "Al2O3")
_CLEAR = ("SiO2", "TiO2", "MgF2", "Si3N4", "Al2O3")
_COARSE = {"wavelengths_nm": (300.0, 1980.0, 30.0), "substrate": "semi_infinite:1.5"}
SPACES: dict[str, Space] = {
    # That of the paper: sections 2.1 and 2.2.
    "paper": Space(tuple(sorted(sum(GROUPS.values(), ()))), _grid(10, 500, 10), 20),
    # Those of the small experiments: section 9.
    "metal6": Space(_SMALL_METALS, _grid(20, 200, 20), 6, **_COARSE),
    "metal10": Space(_SMALL_METALS, _grid(20, 200, 20), 10, **_COARSE),
    "dielectric6": Space(_CLEAR, _grid(20, 200, 20), 6, **_COARSE),
    "dielectric10": Space(_CLEAR, _grid(20, 200, 20), 10, **_COARSE),
}


class StackGenerator:
    """Stacks whose number alone says what they are (paper, section 6).

    Kinds of stacks, from the light side on; snapped to the thicknesses that the vocabulary has:

    - ``random``: a length uniform in its range, a first material uniform among all, each next one uniform among the
      others, thicknesses uniform.
    - ``dbr``: two materials other than metals in turns, a quarter of a wavelength each: Bragg reflectors.
    - ``fabry_perot``: the same with an odd number of layers and the middle one half a wavelength; or, for half of them
      where there are metals, thin films of one with equal cavities between them.
    - ``absorber``: clear layers and metals of some 10 nm in turns on a thick metal.
    - ``antireflection``: a quarter of a wavelength of the material with the lowest index, then materials other than
      metals of an eighth, a quarter or a half.

    Args:
        vocabulary: Tokens.
        max_layers: Lmax.
        min_layers: Least number of layers.
        seed: Of the set.
        mixture: Weights of the kinds; None: ``random`` alone.
        catalog: Indices for the quarter wavelengths; needed for all kinds but ``random`` and ``absorber``.
        centre_nm: Range of the wavelengths for which these are made.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        max_layers: int,
        min_layers: int = 1,
        seed: int = 0,
        mixture: Mapping[str, float] | None = None,
        catalog: MaterialCatalog | None = None,
        centre_nm: tuple[float, float] = (350.0, 1800.0),
    ) -> None:
        mixture = dict(mixture or {"random": 1.0})
        kinds: dict[str, Callable] = {
            "random": self._random, "dbr": self._dbr, "fabry_perot": self._fabry_perot, "absorber": self._absorber,
            "antireflection": self._antireflection,
        }  # fmt: skip
        if unknown := mixture.keys() - kinds.keys():
            raise ValueError(f"mixture: unknown kinds {sorted(unknown)}; choose among {', '.join(kinds)}")
        if min(mixture.values()) < 0 or sum(mixture.values()) <= 0:
            raise ValueError(f"mixture={mixture}: weights must not be negative, and one must be above 0")
        if not 1 <= min_layers <= max_layers:
            raise ValueError(f"min_layers={min_layers}, max_layers={max_layers}: must be 1 <= min_layers <= max_layers")
        self.vocabulary, self.max_layers, self.min_layers, self.seed = vocabulary, max_layers, min_layers, seed
        self.mixture = {kind: weight for kind, weight in mixture.items() if weight > 0}
        self._kinds = [kinds[kind] for kind in self.mixture]
        self._shares = np.cumsum(list(self.mixture.values()), dtype=np.float64) / sum(self.mixture.values())
        self._shares[-1] = 1.0
        names = vocabulary.materials
        if len(names) == 1 and max_layers > 1:
            raise ValueError(f"materials={list(names)}: neighbours must differ, so a single material has max_layers=1")
        # Tokens of each material by rising thickness, padded with the last one.
        tokens = [np.flatnonzero(vocabulary.material.numpy() == m) for m in range(len(names))]
        tokens = [ids[np.argsort(vocabulary.thickness_nm.numpy()[ids], kind="stable")] for ids in tokens]
        self._counts = np.array([len(ids) for ids in tokens])
        self._tokens = np.stack([np.pad(ids, (0, self._counts.max() - len(ids)), mode="edge") for ids in tokens])
        self._grid_nm = vocabulary.thickness_nm.numpy()[self._tokens]
        self._metals = np.flatnonzero([name in GROUPS["metals"] for name in names])
        self._clear = np.flatnonzero([name not in GROUPS["metals"] for name in names])
        self._centres = np.linspace(*centre_nm, 256)
        self._check_kinds(catalog)

    def _check_kinds(self, catalog: MaterialCatalog | None) -> None:
        structured = self.mixture.keys() - {"random"}
        if structured and self.max_layers < 3:
            raise ValueError(f"max_layers={self.max_layers}: {', '.join(sorted(structured))} need at least 3")
        if "fabry_perot" in structured and self._least(odd=True) > self.max_layers:
            raise ValueError(f"min_layers={self.min_layers}: fabry_perot needs an odd number up to {self.max_layers}")
        if "absorber" in structured and not (len(self._metals) and len(self._clear)):
            raise ValueError("mixture: absorber needs a metal and a material that is none; add them or drop it")
        if quarters := sorted(structured - {"absorber"}):
            if len(self._clear) < 2:
                raise ValueError(f"mixture: {', '.join(quarters)} need two materials that are no metals; add one")
            if catalog is None:
                raise ValueError(f"mixture: {', '.join(quarters)} need a catalog for their quarter wavelengths")
            index = catalog.indices(self.vocabulary.materials, torch.from_numpy(self._centres))
            # (material, centre); ITO is a metal in the infrared, n < 1.
            self._quarters_nm = self._centres / (4 * index.real.numpy().clip(min=1))

    def tokens(self, index: Tensor | np.ndarray | range) -> Tensor:
        """Stacks with these numbers.

        Args:
            index: ``(N,)`` numbers from 0 on, any of them in any order.

        Returns:
            Layers, EOS, PAD: ``(N, Lmax + 1)`` int64.
        """
        words = _Words(self.seed, np.asarray(index, dtype=np.int64).astype(np.uint64))
        kind = np.searchsorted(self._shares, words.uniform(), side="right")
        out = np.full((len(kind), self.max_layers + 1), self.vocabulary.pad, dtype=np.int64)
        for number, make in enumerate(self._kinds):
            rows = np.flatnonzero(kind == number)
            if len(rows):
                layers, length = make(words.of(rows))
                place = np.arange(self.max_layers + 1)
                filled = np.where(place == length[:, None], self.vocabulary.eos, self.vocabulary.pad)
                filled[:, :-1] = np.where(place[:-1] < length[:, None], layers, filled[:, :-1])
                out[rows] = filled
        return torch.from_numpy(out)

    def _random(self, words: _Words) -> tuple[np.ndarray, np.ndarray]:
        length = self.min_layers + words.below(self.max_layers - self.min_layers + 1)
        material = np.empty((len(length), self.max_layers), dtype=np.int64)
        choice = np.empty_like(material)
        for layer in range(self.max_layers):
            if layer == 0:
                material[:, 0] = words.below(len(self._counts))
            else:
                step = 1 + words.below(max(len(self._counts) - 1, 1))
                material[:, layer] = (material[:, layer - 1] + step) % len(self._counts)
            choice[:, layer] = words.below(self._counts[material[:, layer]])
        return self._tokens[material, choice], length

    def _dbr(self, words: _Words, odd: bool = False) -> tuple[np.ndarray, np.ndarray]:
        length = self._length(words, odd)
        first, second = self._two(words, self._clear)
        centre = words.below(len(self._centres))
        turn = np.arange(self.max_layers) % 2
        material = np.where(turn, second[:, None], first[:, None])
        thickness = self._quarters_nm[material, centre[:, None]]
        if odd:
            thickness = thickness * np.where(np.arange(self.max_layers) == length[:, None] // 2, 2, 1)
        return self._snap(material, thickness), length

    def _fabry_perot(self, words: _Words) -> tuple[np.ndarray, np.ndarray]:
        layers, length = self._dbr(words, odd=True)
        if not len(self._metals):
            return layers, length
        with_metal = words.below(2) == 1
        metal = self._metals[words.below(len(self._metals))]
        clear = self._clear[words.below(len(self._clear))]
        film_nm, cavity = 10 + words.below(41), words.below(self._counts[clear])
        turn = np.arange(self.max_layers) % 2
        material = np.where(turn, clear[:, None], metal[:, None])
        thickness = np.where(turn, self._grid_nm[clear, cavity][:, None], film_nm[:, None])
        length_of_metal = np.where(words.below(2) == 1, min(5, self.max_layers - 1 + self.max_layers % 2), 3)
        length_of_metal = np.maximum(length_of_metal, self._least(odd=True))
        layers = np.where(with_metal[:, None], self._snap(material, thickness), layers)
        return layers, np.where(with_metal, length_of_metal, length)

    def _absorber(self, words: _Words) -> tuple[np.ndarray, np.ndarray]:
        length = self._length(words, odd=False)
        from_back = length[:, None] - 1 - np.arange(self.max_layers)
        material = np.empty((len(length), self.max_layers), dtype=np.int64)
        thickness = np.empty(material.shape)
        back = self._metals[words.below(len(self._metals))]
        for layer in range(self.max_layers):
            metal = self._metals[words.below(len(self._metals))]
            clear = self._clear[words.below(len(self._clear))]
            clear_nm, metal_nm = 20 + words.below(131), 5 + words.below(16)
            is_clear = from_back[:, layer] % 2 == 1
            material[:, layer] = np.where(is_clear, clear, metal)
            thickness[:, layer] = np.where(is_clear, clear_nm, metal_nm)
        last = from_back == 0
        material = np.where(last, back[:, None], material)
        thickness = np.where(last, (100 + words.below(101))[:, None], thickness)
        return self._snap(material, thickness), length

    def _antireflection(self, words: _Words) -> tuple[np.ndarray, np.ndarray]:
        length = self._length(words, odd=False)
        centre = words.below(len(self._centres))
        material = np.empty((len(length), self.max_layers), dtype=np.int64)
        share = np.empty(material.shape)
        place = self._quarters_nm[self._clear][:, centre].argmax(0)  # in the list of clear materials
        for layer in range(self.max_layers):
            if layer:
                place = (place + 1 + words.below(len(self._clear) - 1)) % len(self._clear)
            material[:, layer] = self._clear[place]
            share[:, layer] = 0.5 * 2.0 ** words.below(3) if layer else 1.0
        return self._snap(material, share * self._quarters_nm[material, centre[:, None]]), length

    def _least(self, odd: bool) -> int:
        least = max(3, self.min_layers)
        return least + (odd and least % 2 == 0)

    def _length(self, words: _Words, odd: bool) -> np.ndarray:
        """From 3 or the least number of layers to the most."""
        least = self._least(odd)
        if odd:
            return least + 2 * words.below((self.max_layers - least) // 2 + 1)
        return least + words.below(self.max_layers - least + 1)

    @staticmethod
    def _two(words: _Words, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = words.below(len(among))
        return among[first], among[(first + 1 + words.below(len(among) - 1)) % len(among)]

    def _snap(self, material: np.ndarray, thickness_nm: np.ndarray) -> np.ndarray:
        """The token of each material whose thickness is next."""
        choice = np.empty_like(material)
        for m, count in enumerate(self._counts):
            middles = (self._grid_nm[m, 1:count] + self._grid_nm[m, : count - 1]) / 2
            here = material == m
            choice[here] = np.searchsorted(middles, thickness_nm[here])
        return self._tokens[material, choice]


class _Words:
    """Successive words of 64 bits for each stack: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) from a hash."""

    def __init__(self, seed: int, index: np.ndarray) -> None:
        key = np.uint64(seed % (1 << 64))
        self._state = _finalized(_finalized(np.full_like(index, key) + _GOLDEN) ^ (index + _GOLDEN))

    def of(self, rows: np.ndarray) -> _Words:
        """Those of some of the stacks, from here on."""
        part = object.__new__(_Words)
        part._state = self._state[rows]
        return part

    def _next(self) -> np.ndarray:
        self._state = self._state + _GOLDEN
        return _finalized(self._state)

    def below(self, number: int | np.ndarray) -> np.ndarray:
        """Uniform integers from 0 to ``number`` - 1."""
        high = self._next() >> np.uint64(32)
        return ((high * np.asarray(number, dtype=np.uint64)) >> np.uint64(32)).astype(np.int64)

    def uniform(self) -> np.ndarray:
        """Uniform in [0, 1)."""
        return (self._next() >> np.uint64(11)) * 2.0**-53


def _finalized(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
