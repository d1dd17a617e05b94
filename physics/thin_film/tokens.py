"""The vocabulary of layer tokens, ``<material>_<thickness in nm>``, and the special tokens (paper, section 2.1).

Which token has which id is the order of the list in ``tokens.json`` and nothing else: ids are looked up, never assumed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from physics.thin_film.materials import GROUPS

EOS, PAD, MSK = "<EOS>", "<PAD>", "<MSK>"
SPECIALS = (EOS, PAD, MSK)


class Layer(NamedTuple):
    """One layer of a stack; stacks are listed from the light side to the back."""

    material: str
    thickness_nm: float

    def __str__(self) -> str:
        return f"{self.material}_{self.thickness_nm:g}"


class Vocabulary:
    """Tokens and their ids.

    Args:
        tokens: Names in the order of their ids; the three special tokens are among them.

    Attributes:
        tokens: As given.
        materials: Names of the materials in the order in which they first appear.
        eos, pad, msk: Ids of the special tokens.
        material: Index of the token's material in ``materials``, ``(V,)`` int64; -1 for special tokens.
        thickness_nm: Thickness of the token, ``(V,)`` float64; 0 for special tokens.
        is_layer: Whether the token is a layer, ``(V,)`` bool.

    Raises:
        ValueError: If a token is not of the form above, occurs twice, or a special token is missing.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tuple(tokens)
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self._ids) < len(self.tokens):
            twice = sorted({t for t in self.tokens if self.tokens.count(t) > 1})
            raise ValueError(f"tokens occur more than once: {', '.join(twice)}; list each once")
        if missing := [s for s in SPECIALS if s not in self._ids]:
            raise ValueError(f"special tokens are missing: {', '.join(missing)}; add them to the list")
        self.eos, self.pad, self.msk = (self._ids[s] for s in SPECIALS)
        layers = [None if t in SPECIALS else parse_layer(t, f"token {i}") for i, t in enumerate(self.tokens)]
        self.materials = tuple(dict.fromkeys(layer.material for layer in layers if layer))
        if not self.materials:
            raise ValueError("the vocabulary has no layer token; add at least one such as 'SiO2_100'")
        number = {name: i for i, name in enumerate(self.materials)}
        self.material = torch.tensor([number[layer.material] if layer else -1 for layer in layers])
        self.thickness_nm = torch.tensor(
            [layer.thickness_nm if layer else 0.0 for layer in layers], dtype=torch.float64
        )
        self.is_layer = self.material >= 0

    @classmethod
    def build(cls, materials: Iterable[str], thicknesses_nm: Iterable[float]) -> Vocabulary:
        """All thicknesses of all materials, material by material, then EOS, PAD, MSK."""
        materials, thicknesses_nm = list(materials), list(thicknesses_nm)
        if not materials or not thicknesses_nm:
            raise ValueError("a vocabulary needs at least one material and one thickness")
        return cls([str(Layer(m, t)) for m in materials for t in thicknesses_nm] + list(SPECIALS))

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read ``tokens.json``: a list of names (index = id)."""
        try:
            tokens = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: no JSON ({error.msg})") from error
        if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
            raise ValueError(f'{path}: must be a list of token names such as ["SiO2_100", ..., "<EOS>"]')
        try:
            return cls(tokens)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write ``tokens.json``."""
        Path(path).write_text(json.dumps(list(self.tokens), indent=0) + "\n")

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.tokens == other.tokens

    def __hash__(self) -> int:
        return hash(self.tokens)

    def id(self, token: str) -> int:
        """Id of a token.

        Raises:
            ValueError: If the vocabulary lacks it; names what comes close.
        """
        if token not in self._ids:
            close = difflib.get_close_matches(token, self.tokens, 3, 0.5)
            known = f"close: {', '.join(close)}" if close else f"materials: {', '.join(self.materials)}"
            raise ValueError(f"unknown token {token!r}; {known}")
        return self._ids[token]

    def encode(self, stack: Iterable[Layer | tuple[str, float] | str], length: int | None = None) -> Tensor:
        """Ids of a stack: its layers, EOS, then PAD up to ``length``.

        Args:
            stack: Layers from the light side on: pairs, or tokens as text.
            length: Of the sequence, EOS included; None: number of layers + 1.

        Raises:
            ValueError: For a layer without a token, or more layers than fit.
        """
        ids = [self.id(layer if isinstance(layer, str) else str(Layer(*layer))) for layer in stack]
        length = len(ids) + 1 if length is None else length
        if len(ids) >= length:
            raise ValueError(f"{len(ids)} layers and EOS do not fit into a sequence of {length}")
        return torch.tensor([*ids, self.eos, *[self.pad] * (length - len(ids) - 1)])

    def decode(self, ids: Tensor | Sequence[int]) -> list[Layer]:
        """Layers before the first EOS; special tokens among them are skipped.

        Raises:
            ValueError: For an id that the vocabulary does not have.
        """
        layers = []
        for i in ids.tolist() if isinstance(ids, Tensor) else ids:
            if not 0 <= i < len(self):
                raise ValueError(f"id {i} is outside of the vocabulary of {len(self)} tokens")
            if i == self.eos:
                break
            if i not in (self.pad, self.msk):
                layers.append(parse_layer(self.tokens[i]))
        return layers

    def text(self, ids: Tensor | Sequence[int]) -> str:
        """The stack as text, such as ``SiO2_100 TiO2_60``."""
        return " ".join(str(layer) for layer in self.decode(ids))

    def keep(self, ids: Tensor) -> Tensor:
        """Which positions are layers that count: layer tokens before the first EOS, ``(..., S)`` bool."""
        before = (ids == self.eos).cumsum(-1) == 0
        return self.is_layer.to(ids.device)[ids] & before

    def well_formed(self, ids: Tensor) -> Tensor:
        """Whether a sequence is layers, one EOS, and PAD to the end, ``(...,)`` bool."""
        eos = (ids == self.eos).cumsum(-1)
        layer = self.is_layer.to(ids.device)[ids]
        after = torch.where(ids == self.eos, eos == 1, ids == self.pad)
        return torch.where(eos == 0, layer, after).all(-1) & (eos[..., -1] == 1)

    def layers(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Material and thickness of every position, for the simulator.

        Args:
            ids: ``(..., S)`` int64.

        Returns:
            Material ``(..., S)`` int64, -1 where there is no layer, and thickness in nm ``(..., S)`` float64, 0 there.
        """
        keep = self.keep(ids)
        material = self.material.to(ids.device)[ids].where(keep, torch.tensor(-1, device=ids.device))
        thickness = self.thickness_nm.to(ids.device)[ids]
        return material, thickness.where(keep, torch.zeros((), dtype=thickness.dtype, device=ids.device))

    def allowed(self, allow: Iterable[str] | None = None, exclude: Iterable[str] = ()) -> Tensor:
        """Which tokens a sampler may emit, ``(V,)`` bool: EOS and PAD always, MSK never.

        Args:
            allow: Groups (``metals``, ``semiconductors``, ``dielectrics``), materials or tokens; None: all.
            exclude: The same, taken away from ``allow``.

        Raises:
            ValueError: For an unknown name, or if no layer token is left.
        """
        mask = self.is_layer.clone() if allow is None else self._members(allow, "allow")
        mask &= ~self._members(exclude, "exclude")
        if not mask.any():
            raise ValueError(f"allow={allow} without exclude={exclude} leaves no layer token; allow more materials")
        mask[[self.eos, self.pad]] = True
        return mask

    def _members(self, names: Iterable[str], setting: str) -> Tensor:
        mask = torch.zeros(len(self), dtype=torch.bool)
        for name in [names] if isinstance(names, str) else names:
            wanted = GROUPS.get(name, (name,))
            found = torch.tensor([m >= 0 and self.materials[m] in wanted for m in self.material.tolist()])
            if name in self._ids:
                found[self._ids[name]] = True
            if not found.any() and name not in GROUPS:
                known = f"groups: {', '.join(GROUPS)}; materials: {', '.join(self.materials)}; or a token"
                raise ValueError(f"{setting}: {name!r} is unknown; {known}")
            mask |= found
        return mask & self.is_layer


def parse_layer(token: str, where: str = "token") -> Layer:
    """Material and thickness of ``<material>_<thickness in nm>``; the material may contain underscores.

    Raises:
        ValueError: If the text is not of this form or the thickness is no positive finite number.
    """
    material, underscore, thickness = token.rpartition("_")
    try:
        value = float(thickness)
    except ValueError:
        value = float("nan")
    if not underscore or not material or not 0 < value < float("inf"):
        raise ValueError(f"{where}: {token!r} is no layer; expected <material>_<thickness in nm> such as TiO2_60")
    return Layer(material, value)
