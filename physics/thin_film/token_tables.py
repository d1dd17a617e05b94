"""The transfer-matrix method for stacks of tokens: everything that costs an exponential is looked up.

Between layers of admittances eta_j the recursion of `transfer_matrix` carries D = C / eta_j instead of C, so that two
tables are enough: X of every token, and eta_j / eta_i of every pair of materials that can touch:

    D <- D eta_j / eta_i,   M = (B - D) / 2 X,   P = (B + D) / 2,   B' = P + M,   D' = P - M

The damping of T is linear in the thickness of each material in the stack, so it is one product of small matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from physics.thin_film.materials import MaterialCatalog
from physics.thin_film.surroundings import Surroundings
from physics.thin_film.tokens import Vocabulary
from physics.thin_film.transfer_matrix import Media, Waves, chunks, intensities, through_plate


class _Tables(NamedTuple):
    """Of one polarization, M materials and V tokens.

    Attributes:
        x: exp(2 i delta) of tokens, ``(V, W)``; special tokens have 1.
        ratios: eta_j / eta_i, ``((M + 2) M, W)``: row j M + i has material j behind material i; j = M is the half-space
            behind the stack, j = M + 1 the one before it, for light from behind.
        eta: Admittance of the materials and of the two half-spaces, ``(M + 2, W)``.
        damping: 2 Im(delta) per nm of the materials, ``(M, W)``.
        plate_exit: Admittance behind the plate, ``(W,)``; None without one.
    """

    x: Tensor
    ratios: Tensor
    eta: Tensor
    damping: Tensor
    plate_exit: Tensor | None


class _Stacks(NamedTuple):
    """Layers in rows, those with the most layers first.

    Attributes:
        tokens: Layers, then anything, ``(N, S)``.
        material: ``(N, S)``; M beyond the last layer.
        lengths: Number of layers, ``(N,)`` falling.
        thickness: Sum over the layers of each material in nm, ``(N, M)``.
    """

    tokens: Tensor
    material: Tensor
    lengths: Tensor
    thickness: Tensor


class TokenTables:
    """Simulator of token sequences (paper, section 2.3, token form).

    PAD, MSK, EOS and everything after the first EOS count as no layer.

    Args:
        vocabulary: Tokens.
        catalog: Optical constants of the vocabulary's materials.
        wavelength_nm: ``(W,)``.
        surroundings: None: air on both sides, normal incidence.
        dtype: complex128, or complex64 for less time at errors of 1e-5.
        device: Of the tables; tokens are moved there.

    Attributes:
        index: n + ik of the vocabulary's materials, ``(M, W)`` complex128.
        wavelength_nm: ``(W,)`` float64.
        surroundings: As given.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        catalog: MaterialCatalog,
        wavelength_nm: Tensor,
        surroundings: Surroundings | None = None,
        dtype: torch.dtype = torch.complex128,
        device: torch.device | str = "cpu",
    ) -> None:
        if not dtype.is_complex:
            raise ValueError(f"dtype={dtype}: must be complex128 or complex64")
        self.vocabulary = vocabulary
        self.wavelength_nm = wavelength_nm.to(device, torch.float64)
        self.surroundings = surroundings or Surroundings()
        self.index = catalog.indices(vocabulary.materials, self.wavelength_nm)
        self.dtype, self.device = dtype, torch.device(device)
        # Tables are computed in double precision whatever they are stored in.
        exact = Media.of(self.surroundings, self.wavelength_nm, torch.complex128, self.device)
        self._tables = [self._build(exact, polarization) for polarization in exact.polarizations]
        self._media = Media.of(self.surroundings, self.wavelength_nm, dtype, self.device)
        self._is_layer = vocabulary.is_layer.to(device)
        self._material = vocabulary.material.to(device)
        self._thickness = vocabulary.thickness_nm.to(device, self._media.wavenumber.dtype)

    def _build(self, media: Media, polarization: str) -> _Tables:
        waves = Waves.of(self.index, media, polarization)
        behind = media.exit if media.plate is None else media.plate
        half_spaces = torch.stack([media.of_medium(n, polarization) for n in (behind, media.incident)])
        eta = torch.cat([waves.eta, half_spaces])
        phase = waves.q * media.wavenumber
        material = self.vocabulary.material.to(self.device)
        x = torch.exp(1j * phase[material] * self.vocabulary.thickness_nm.to(self.device)[:, None])
        tables = _Tables(
            x=x,
            ratios=(eta[:, None] / waves.eta).flatten(0, 1),
            eta=eta,
            damping=phase.imag.clone(),
            plate_exit=None if media.plate is None else media.of_medium(media.exit, polarization),
        )
        real = torch.finfo(self.dtype).dtype
        to = {True: self.dtype, False: getattr(torch, real)}
        return _Tables(*(None if part is None else part.to(to[part.is_complex()]) for part in tables))

    @torch.no_grad()
    def __call__(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Spectra of sequences.

        Args:
            tokens: ``(..., S)`` int64.
            dtype: Of the result; None: the real type of the tables.

        Returns:
            R, A and T, ``(..., 3, W)``.
        """
        tokens = tokens.to(self.device)
        flat = tokens.reshape(-1, tokens.shape[-1])
        order, stacks = self._sorted(flat)
        out = torch.empty(
            len(flat), 3, len(self.wavelength_nm), device=self.device, dtype=dtype or self._thickness.dtype
        )
        for rows in chunks(len(flat), len(self.wavelength_nm), self.device):
            part = _Stacks(*(field[rows] for field in stacks))
            if order is None:
                self._spectra(part, out[rows])
            else:
                out.index_copy_(0, order[rows], self._spectra(part, out.new_empty(part.lengths.shape + out.shape[1:])))
        return out.reshape(*tokens.shape[:-1], *out.shape[1:])

    def _sorted(self, tokens: Tensor) -> tuple[Tensor | None, _Stacks]:
        """Only layers, at the front of each row, and the order in which the rows are; None: that of ``tokens``."""
        keep = self.vocabulary.keep(tokens)
        lengths, order = keep.sum(1), None
        if not bool((lengths[1:] <= lengths[:-1]).all()):
            order = lengths.argsort(descending=True, stable=True)
            tokens, keep, lengths = tokens[order], keep[order], lengths[order]
        used = int(lengths[0]) if len(lengths) else 0
        if not bool(keep[:, 1:].le(keep[:, :-1]).all()):  # special tokens between layers
            front = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
            tokens, keep = tokens.gather(1, front), keep.gather(1, front)
        tokens, keep = tokens[:, :used], keep[:, :used]
        materials = len(self.index)
        material = self._material[tokens].where(keep, torch.tensor(materials, device=self.device))
        thickness = self._thickness.new_zeros(len(tokens), materials + 1)
        thickness.scatter_add_(1, material, self._thickness[tokens])
        return order, _Stacks(tokens, material, lengths, thickness[:, :materials])

    def _spectra(self, stacks: _Stacks, out: Tensor) -> Tensor:
        """R, A and T of some stacks, written into ``out`` ``(N, 3, W)``."""
        media, pairs = self._media, []
        for tables in self._tables:
            materials = len(tables.damping)
            incident = tables.eta[materials + 1]
            damping = stacks.thickness @ tables.damping
            behind = tables.eta[materials]
            found = intensities(*_fields(tables, stacks, materials), damping, incident, behind)
            if tables.plate_exit is not None:
                fields = _fields(tables, _turned(stacks, materials), materials + 1)
                back = intensities(*fields, damping, behind, incident)
                found = through_plate(found, back, media, behind, tables.plate_exit)
            pairs.append(found)
        reflectance, transmittance = (sum(part) / len(pairs) for part in zip(*pairs, strict=True))
        out[:, 0], out[:, 2] = reflectance, transmittance
        out[:, 1] = reflectance.add_(transmittance).neg_().add_(1)
        return out


def _turned(stacks: _Stacks, materials: int) -> _Stacks:
    """The layers of each stack in the opposite order."""
    place = torch.arange(stacks.tokens.shape[1], device=stacks.tokens.device)
    source = (stacks.lengths[:, None] - 1 - place).clamp(min=0)
    inside = place < stacks.lengths[:, None]
    material = stacks.material.gather(1, source).where(inside, torch.tensor(materials, device=source.device))
    return stacks._replace(tokens=stacks.tokens.gather(1, source), material=material)


def _fields(tables: _Tables, stacks: _Stacks, half_space: int) -> tuple[Tensor, Tensor]:
    """B and C on the light side, ``(N, W)``; ``half_space`` is the row of the admittance behind the last layer."""
    materials, (number, most) = len(tables.damping), stacks.tokens.shape
    behind = torch.cat([stacks.material[:, 1:], stacks.material.new_full((number, 1), materials)], dim=1)[:, :most]
    pairs = behind.where(behind < materials, half_space) * materials + stacks.material
    pairs, tokens = pairs.T.contiguous(), stacks.tokens.T.contiguous()
    # Stacks are sorted by length: those that have a layer at some depth are the first ones.
    active = (stacks.lengths[None] > torch.arange(most, device=pairs.device)[:, None]).sum(1).tolist()
    wavelengths = tables.x.shape[1]
    scale = (0.5 ** stacks.lengths.to(tables.damping.dtype)).to(tables.x.dtype)
    b = scale[:, None].repeat(1, wavelengths)
    d = b.clone()
    ratio, m = torch.empty_like(b), torch.empty_like(b)
    for layer in reversed(range(most)):
        n = active[layer]
        if not n:
            continue
        b_, d_, m_, ratio_ = b[:n], d[:n], m[:n], ratio[:n]
        torch.index_select(tables.ratios, 0, pairs[layer, :n], out=ratio_)
        d_.mul_(ratio_)
        torch.sub(b_, d_, out=m_)
        torch.index_select(tables.x, 0, tokens[layer, :n], out=ratio_)
        m_.mul_(ratio_)
        b_.add_(d_)
        torch.sub(b_, m_, out=d_)
        b_.add_(m_)
    front = stacks.material[:, 0] if most else stacks.lengths.new_full((number,), materials)
    torch.index_select(tables.eta, 0, front.where(stacks.lengths > 0, half_space), out=m)
    return b, d.mul_(m)
