"""Spectra of stacks of thin films: a batched, differentiable transfer-matrix method (paper, section 2.3).

The tangential fields B and C = H / E are carried from the exit to the light side. With X = exp(2 i delta), |X| <= 1, a
layer of admittance eta splits them into its two waves, whose common factor exp(-i delta) is left out, so that thick
metals cannot overflow:

    P = (B + C / eta) / 2,   M = (B - C / eta) / 2 X,   B' = P + M,   C' = eta (P - M)

Three products per layer instead of the four of the matrix, and the same numbers. The halves are put into the field at
the exit at once: 2^-L is exact.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from physics.thin_film.surroundings import Surroundings

# (stack, wavelength) at a time.
CHUNK_ELEMENTS = 1 << 16
ACCELERATOR_ELEMENTS = 1 << 25


def transfer_matrix(
    index: Tensor, thickness_nm: Tensor, wavelength_nm: Tensor, surroundings: Surroundings | None = None
) -> Tensor:
    """Spectra of stacks.

    Args:
        index: Refractive index n + ik (k >= 0 absorbs) of the layers from the light side on, complex128 or complex64,
            ``(..., L, W)``.
        thickness_nm: ``(..., L)``, broadcast against ``index``; a layer of thickness 0 is not there.
        wavelength_nm: In vacuum, ``(W,)``.
        surroundings: None: air on both sides, normal incidence.

    Returns:
        R, A and T, ``(..., 3, W)`` in the real type of ``index``; differentiable, once, in ``index`` and
        ``thickness_nm``.

    Raises:
        ValueError: If the shapes do not fit or ``index`` is not complex.
    """
    surroundings = surroundings or Surroundings()
    if not index.is_complex():
        raise ValueError("index: must be complex, n + ik; use index.to(torch.complex128)")
    if index.ndim < 2 or thickness_nm.ndim < 1 or index.shape[-2] != thickness_nm.shape[-1]:
        shapes = f"index {tuple(index.shape)}, thickness_nm {tuple(thickness_nm.shape)}"
        raise ValueError(f"{shapes}: must be (..., L, W) and (..., L) with the same number of layers L")
    if wavelength_nm.shape != index.shape[-1:]:
        raise ValueError(f"wavelength_nm has shape {tuple(wavelength_nm.shape)}, expected ({index.shape[-1]},)")
    media = Media.of(surroundings, wavelength_nm, index.dtype, index.device)
    waves = [Waves.of(index, media, polarization) for polarization in media.polarizations]
    return spectrum(waves, thickness_nm.to(media.wavenumber.dtype), media)


class Media(NamedTuple):
    """The surroundings at given wavelengths: numbers that do not depend on the stack.

    Attributes:
        wavenumber: 4 pi / wavelength in 1 / nm, ``(W,)`` real: X = exp(i wavenumber q d).
        tangential: n_0 sin(theta_0), the same in all media, ``(W,)`` real; None at normal incidence.
        incident, exit: Indices, ``(W,)`` complex.
        plate: Index of the thick plate, ``(W,)``; None: there is none.
        plate_nm: Its thickness.
        polarizations: ``s`` and ``p``; one alone at normal incidence, where they are equal.
    """

    wavenumber: Tensor
    tangential: Tensor | None
    incident: Tensor
    exit: Tensor
    plate: Tensor | None
    plate_nm: float
    polarizations: tuple[str, ...]

    @classmethod
    def of(cls, surroundings: Surroundings, wavelength_nm: Tensor, dtype: torch.dtype, device: torch.device) -> Media:
        """Evaluate the surroundings; computed in double precision, then rounded to ``dtype``."""
        wavelength = wavelength_nm.to(device, torch.float64)
        oblique = surroundings.angle_rad != 0

        def at_wavelengths(value: complex | Tensor) -> Tensor:
            found = torch.as_tensor(value, dtype=torch.complex128, device=device)
            return (found + torch.zeros_like(wavelength)).to(dtype)

        incident = at_wavelengths(surroundings.incident)
        if surroundings.polarization == "unpolarized":
            polarizations: tuple[str, ...] = ("s", "p") if oblique else ("s",)
        else:
            polarizations = (surroundings.polarization,)
        return cls(
            wavenumber=(4 * math.pi / wavelength).to(incident.real.dtype),
            tangential=incident.real * math.sin(surroundings.angle_rad) if oblique else None,
            incident=incident,
            exit=at_wavelengths(surroundings.exit),
            plate=None if surroundings.plate is None else at_wavelengths(surroundings.plate),
            plate_nm=surroundings.plate_mm * 1e6,
            polarizations=polarizations,
        )

    def normal_index(self, index: Tensor) -> Tensor:
        """Snell's law: q = n cos(theta) = sqrt(n^2 - n_0^2 sin^2(theta_0)), the branch with Im q >= 0."""
        if self.tangential is None:
            return index
        q = (index.square() - self.tangential.square()).sqrt()
        return torch.where(q.imag < 0, -q, q)

    def admittance(self, index: Tensor, q: Tensor, polarization: str) -> Tensor:
        """The ratio of the tangential magnetic and electric fields: q for s, n^2 / q for p."""
        return q if polarization == "s" or self.tangential is None else index.square() / q

    def of_medium(self, index: Tensor, polarization: str) -> Tensor:
        """Admittance of a half-space."""
        return self.admittance(index, self.normal_index(index), polarization)


class Waves(NamedTuple):
    """What layers do to waves of one polarization, except for their thickness.

    Attributes:
        q: n cos(theta), ``(..., L, W)`` complex.
        eta: Admittance, ``(..., L, W)`` complex.
        inverse: 1 / eta, for layers that are simulated more than once; None: computed when it is needed.
    """

    q: Tensor
    eta: Tensor
    inverse: Tensor | None = None

    @classmethod
    def of(cls, index: Tensor, media: Media, polarization: str) -> Waves:
        """From the index of the layers."""
        q = media.normal_index(index)
        return cls(q, media.admittance(index, q, polarization))

    def with_inverse(self) -> Waves:
        """The same with 1 / eta at hand."""
        return self._replace(inverse=self.eta.detach().reciprocal())

    def reversed(self) -> Waves:
        """The layers in the opposite order."""
        return Waves(*(None if part is None else part.flip(-2) for part in self))


def spectrum(waves: list[Waves], thickness_nm: Tensor, media: Media) -> Tensor:
    """R, A and T ``(..., 3, W)`` of layers ``(..., L, W)``, the mean over the polarizations of ``media``.

    Where the same layers are simulated again with other thicknesses, this saves all that depends on their index.
    """
    reflectance, transmittance = _mean(waves, thickness_nm[..., None], media)
    return torch.stack([reflectance, 1 - reflectance - transmittance, transmittance], dim=-2)


def spectrum_and_slopes(waves: list[Waves], thickness_nm: Tensor, media: Media) -> tuple[Tensor, Tensor]:
    """R, A and T ``(..., 3, W)`` and their derivatives with respect to the thicknesses, ``(..., L, 3, W)`` in 1 / nm.

    At each wavelength the spectrum depends on the thickness at this wavelength alone, so that two adjoints, of R and
    of T, give the whole Jacobian.
    """
    wavelengths = len(media.wavenumber)
    with torch.enable_grad():
        varied = thickness_nm.detach()[..., None].repeat_interleave(wavelengths, dim=-1).requires_grad_()
        reflectance, transmittance = _mean(waves, varied, media)
        (of_r,) = torch.autograd.grad(reflectance.sum(), varied, retain_graph=True)
        (of_t,) = torch.autograd.grad(transmittance.sum(), varied)
    reflectance, transmittance = reflectance.detach(), transmittance.detach()
    found = torch.stack([reflectance, 1 - reflectance - transmittance, transmittance], dim=-2)
    return found, torch.stack([of_r, -of_r - of_t, of_t], dim=-2)


def _mean(waves: list[Waves], thickness_nm: Tensor, media: Media) -> tuple[Tensor, Tensor]:
    """R and T, the mean over the polarizations; thickness ``(..., L, 1)`` or, by wavelength, ``(..., L, W)``."""
    pairs = [
        _coherent(wave, thickness_nm, media, polarization)
        if media.plate is None
        else _on_plate(wave, thickness_nm, media, polarization)
        for wave, polarization in zip(waves, media.polarizations, strict=True)
    ]
    reflectance, transmittance = (sum(part) / len(pairs) for part in zip(*pairs, strict=True))
    return reflectance, transmittance


def _coherent(wave: Waves, thickness_nm: Tensor, media: Media, polarization: str) -> tuple[Tensor, Tensor]:
    incident, exit = (media.of_medium(n, polarization) for n in (media.incident, media.exit))
    return intensities(*fields(wave, thickness_nm, media.wavenumber, exit), incident, exit)


def _on_plate(wave: Waves, thickness_nm: Tensor, media: Media, polarization: str) -> tuple[Tensor, Tensor]:
    """The stack on a plate whose faces do not interfere: the sum over all round trips of intensity."""
    incident, plate, exit = (media.of_medium(n, polarization) for n in (media.incident, media.plate, media.exit))
    front = intensities(*fields(wave, thickness_nm, media.wavenumber, plate), incident, plate)
    backwards = fields(wave.reversed(), thickness_nm.flip(-2), media.wavenumber, incident)
    back = intensities(*backwards, plate, incident)
    return through_plate(front, back, media, plate, exit)


def through_plate(
    front: tuple[Tensor, Tensor], back: tuple[Tensor, Tensor], media: Media, plate: Tensor, exit: Tensor
) -> tuple[Tensor, Tensor]:
    """R and T of a stack on a thick plate.

    Args:
        front: R and T of the stack for light from the front that ends in the plate.
        back: The same for light from inside the plate.
        media: With the plate.
        plate: Its admittance.
        exit: Admittance behind it.
    """
    one = torch.ones_like(plate)
    rear_r, rear_t = intensities(one, exit, torch.zeros_like(plate.real), plate, exit)
    once = torch.exp(-media.wavenumber * media.plate_nm * media.normal_index(media.plate).imag)
    trips = 1 / (1 - back[0] * rear_r * once.square())
    transmittance = front[1] * once * rear_t * trips
    return front[0] + front[1] * back[1] * once.square() * rear_r * trips, transmittance


def intensities(b: Tensor, c: Tensor, damping: Tensor, incident: Tensor, exit: Tensor) -> tuple[Tensor, Tensor]:
    """R and T from the fields on the light side.

    Args:
        b: B without the factors exp(-i delta), ``(..., W)``.
        c: C without them.
        damping: Sum of 2 Im(delta), ``(..., W)``.
        incident: Admittance on the light side; where it is complex, R and T are those of a wave that begins there.
        exit: Admittance behind the stack.
    """
    incoming = _squared(incident * b + c)
    reflectance = _squared(incident * b - c) / incoming
    # Where the wave before the layers is evanescent it carries no flux, and nothing can be transmitted.
    flows = incident.real > 0
    flux = torch.where(flows, 4 * _squared(incident) / torch.where(flows, incident.real, 1.0) * exit.real, 0.0)
    return reflectance, flux * torch.exp(-damping) / incoming


def _squared(z: Tensor) -> Tensor:
    """|z|^2, with a derivative at 0 too."""
    squares = torch.view_as_real(z).square()
    return squares[..., 0] + squares[..., 1]


def fields(wave: Waves, thickness_nm: Tensor, wavenumber: Tensor, exit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B, C on the light side of the layers and the sum of 2 Im(delta), each ``(..., W)``; see `intensities`.

    Args:
        wave: Layers, ``(..., L, W)``.
        thickness_nm: ``(..., L, 1)`` real, or ``(..., L, W)`` where it differs by wavelength.
        wavenumber: 4 pi / wavelength, ``(W,)``.
        exit: Admittance behind the layers, ``(W,)``.
    """
    layers, wavelengths = wave.eta.shape[-2:]
    batch = torch.broadcast_shapes(wave.eta.shape[:-2], thickness_nm.shape[:-2])

    def flat(part: Tensor | None, *shape: int) -> Tensor | None:
        return None if part is None else part.expand(*batch, *shape).reshape(math.prod(batch), *shape)

    waves = [flat(part, layers, wavelengths) for part in wave]
    found = _Recursion.apply(*waves, flat(thickness_nm, *thickness_nm.shape[-2:]), wavenumber, exit)
    return tuple(part.reshape(*batch, wavelengths) for part in found)


class _Recursion(torch.autograd.Function):
    """The recursion over layers and its adjoint by hand: a fraction of the time of a graph of its operations.

    Works on chunks of stacks, and on one layer of them at a time, so that everything stays in the cache. Gradients are
    kept conjugated on the way, so that the adjoint is made of the same plain products as the recursion.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, eta: Tensor, inverse: Tensor | None, thickness: Tensor, wavenumber: Tensor, exit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        number, layers, wavelengths = eta.shape
        b, c = (eta.new_empty(number, wavelengths) for _ in range(2))
        damping = thickness.new_zeros(number, wavelengths)
        # For the adjoint: X and M of every layer; C behind every layer where the admittance has a gradient.
        keep, keep_c = any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        xs, ms, cs = (eta.new_empty(layers, number, wavelengths) if k else None for k in (keep, keep, keep_c))
        for part in chunks(number, wavelengths, eta.device):
            p, h, total = b[part], c[part], damping[part]  # changed in place
            p.fill_(0.5**layers)
            h.copy_(exit).mul_(0.5**layers)
            x, m, scratch = torch.empty_like(p), torch.empty_like(p), _Scratch.like(total)
            for layer in reversed(range(layers)):
                if keep:
                    x, m = xs[layer, part], ms[layer, part]
                if keep_c:
                    cs[layer, part] = h
                scratch.exponential(q[part, layer], thickness[part, layer], wavenumber, total, out=x)
                h.mul_(scratch.reciprocal(eta[part, layer]) if inverse is None else inverse[part, layer])
                torch.sub(p, h, out=m)
                m.mul_(x)
                p.add_(h)
                torch.sub(p, m, out=h)
                h.mul_(eta[part, layer])
                p.add_(m)
        ctx.save_for_backward(q, eta, inverse, thickness, wavenumber, xs, ms, cs, c)
        return b, c, damping

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_b: Tensor, grad_c: Tensor, grad_damping: Tensor) -> tuple[Tensor | None, ...]:
        q, eta, inverse, thickness, wavenumber, xs, ms, cs, c = ctx.saved_tensors
        number, layers, wavelengths = eta.shape
        needs_q, needs_eta, _, needs_thickness, _, needs_exit = ctx.needs_input_grad
        of_q, of_eta = (eta.new_empty(eta.shape) if need else None for need in (needs_q, needs_eta))
        of_thickness = thickness.new_empty(thickness.shape) if needs_thickness else None
        of_exit = eta.new_zeros(wavelengths) if needs_exit else None
        by_wavelength = thickness.shape[-1] > 1
        for part in chunks(number, wavelengths, eta.device):
            gb, gc = (g[part].conj().resolve_conj().clone() for g in (grad_b, grad_c))
            gm, product, scratch = torch.empty_like(gb), torch.empty_like(gb), _Scratch.like(grad_damping[part])
            for layer in range(layers):
                now = eta[part, layer]
                back = scratch.reciprocal(now) if inverse is None else inverse[part, layer]
                if needs_eta:  # C' = eta (P - M)
                    ahead = c[part] if layer == 0 else cs[layer - 1, part]
                    torch.mul(gc, ahead, out=of_eta[part, layer])
                gc.mul_(now)
                torch.sub(gb, gc, out=gm)
                gb.add_(gc)
                torch.mul(ms[layer, part], gm, out=product)
                gm.mul_(xs[layer, part])
                torch.sub(gb, gm, out=gc)
                gb.add_(gm)
                gc.mul_(back)
                if needs_eta:  # C / eta
                    of_eta[part, layer] -= gc * cs[layer, part]
                    of_eta[part, layer] *= back
                # X = exp(i wavenumber q d): with respect to its exponent, whose real part is the damping, negated.
                product.sub_(grad_damping[part]).mul_(wavenumber)
                if needs_q:
                    torch.mul(product, 1j * thickness[part, layer], out=of_q[part, layer])
                if needs_thickness:
                    slope = product.mul_(q[part, layer]).imag
                    of_thickness[part, layer] = -slope if by_wavelength else -slope.sum(-1, keepdim=True)
            if needs_exit:
                of_exit += gc.sum(0) * 0.5**layers
        of_q, of_eta, of_exit = (None if g is None else g.conj() for g in (of_q, of_eta, of_exit))
        return of_q, of_eta, None, of_thickness, None, of_exit


class _Scratch(NamedTuple):
    """Memory that is used again for every layer: page faults would cost more than the arithmetic."""

    first: Tensor
    second: Tensor
    squares: Tensor
    inverse: Tensor

    @classmethod
    def like(cls, real: Tensor) -> _Scratch:
        squares = real.new_empty(*real.shape, 2)
        return cls(torch.empty_like(real), torch.empty_like(real), squares, torch.view_as_complex(squares.clone()))

    def exponential(self, q: Tensor, thickness: Tensor, wavenumber: Tensor, total: Tensor, out: Tensor) -> None:
        """X = exp(i wavenumber q d) by the real functions, which are faster; adds the damping to ``total``."""
        length, damping = self.first, self.second
        torch.mul(thickness, wavenumber, out=length)
        torch.mul(length, q.imag, out=damping)
        total.add_(damping)
        damping.neg_().exp_()
        length.mul_(q.real)
        cosine, parts = self.squares.view(2, *length.shape)[0], torch.view_as_real(out)
        torch.cos(length, out=cosine)
        torch.mul(cosine, damping, out=parts[..., 0])
        torch.mul(length.sin_(), damping, out=parts[..., 1])

    def reciprocal(self, z: Tensor) -> Tensor:
        """1 / z by real operations, in half of the time; no index is so large that its square overflows."""
        torch.square(torch.view_as_real(z), out=self.squares)
        size = torch.add(self.squares[..., 0], self.squares[..., 1], out=self.first)
        return torch.mul(torch.conj_physical(z, out=self.inverse), size.reciprocal_(), out=self.inverse)


def chunks(number: int, wavelengths: int, device: torch.device) -> list[slice]:
    """Slices of stacks that are simulated at a time: on a processor, what fits into its caches."""
    elements = CHUNK_ELEMENTS if device.type == "cpu" else ACCELERATOR_ELEMENTS
    most = max(1, elements // wavelengths)
    size = max(1, math.ceil(number / math.ceil(max(number, 1) / most)))  # of about equal size
    return [slice(i, min(i + size, number)) for i in range(0, number, size)]
