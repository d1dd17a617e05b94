"""Local refinement of thicknesses by gradients through the simulator."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from physics.thin_film.surroundings import Surroundings
from physics.thin_film.targets import weighted_mae
from physics.thin_film.transfer_matrix import Media, Waves, chunks, spectrum, spectrum_and_slopes

METHODS = ("adam", "levenberg_marquardt", "lbfgs")
_SWEEPS = 5  # over all layers, when thicknesses are brought to a grid


@dataclass(frozen=True)
class Refined:
    """Refined candidates, in the order in which they came.

    Attributes:
        material: ``(N, L)`` int64, rows of the table of indices, -1 where there is no layer. Layers first, then -1.
        thickness_nm: ``(N, L)`` float64, 0 where there is no layer.
        spectrum: R, A, T ``(N, 3, W)`` float64.
        mae: Weighted mean absolute error, ``(N,)``; infinite where the simulation failed.
        start_mae: The same before refinement, ``(N,)``.
    """

    material: Tensor
    thickness_nm: Tensor
    spectrum: Tensor
    mae: Tensor
    start_mae: Tensor


class Refiner:
    """Continuous thicknesses that bring spectra closer to their targets.

    Args:
        index: n + ik of the materials, ``(M, W)`` complex128.
        wavelength_nm: ``(W,)``.
        surroundings: None: air on both sides, normal incidence.
        method: ``adam``: all candidates at once, on the mean absolute error. ``levenberg_marquardt``: all at once, on
            the squared error, with the exact Jacobian; converges in a fraction of the steps. ``lbfgs``: one by one, on
            the squared error.
        steps: Of Adam or Levenberg-Marquardt, or iterations of L-BFGS-B at most.
        lr_nm: Step of Adam in nm at the start; decays to 0 on half a cosine.
        polish_steps: Of Levenberg-Marquardt after ``method``, kept where they lower the mean absolute error.
        bounds_nm: Least and largest thickness. Layers that are merged may together be thicker.
        grid_nm: Round to multiples of this, then move single layers by a step as long as that helps; None: continuous.
        drop_below_nm: Layers thinner than this are dropped, and equal neighbours merged.
    """

    def __init__(
        self,
        index: Tensor,
        wavelength_nm: Tensor,
        surroundings: Surroundings | None = None,
        method: Literal["adam", "levenberg_marquardt", "lbfgs"] = "adam",
        steps: int = 150,
        lr_nm: float = 6.0,
        polish_steps: int = 0,
        bounds_nm: tuple[float, float] = (0.0, 500.0),
        grid_nm: float | None = None,
        drop_below_nm: float = 1.0,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"refine.method={method!r} is unknown; choose one of {', '.join(METHODS)}")
        if steps < 0:
            raise ValueError(f"refine.steps={steps}: must not be negative")
        if polish_steps < 0:
            raise ValueError(f"refine.polish_steps={polish_steps}: must not be negative")
        if lr_nm <= 0:
            raise ValueError(f"refine.lr_nm={lr_nm}: must be above 0")
        if not 0 <= bounds_nm[0] < bounds_nm[1]:
            raise ValueError(f"refine.bounds_nm={list(bounds_nm)}: must be 0 <= least < largest")
        if grid_nm is not None and not 0 < grid_nm <= bounds_nm[1]:
            raise ValueError(f"refine.grid_nm={grid_nm}: must be above 0 and not above the largest thickness")
        if drop_below_nm < 0:
            raise ValueError(f"refine.drop_below_nm={drop_below_nm}: must not be negative")
        self.index, self.wavelength_nm = index, wavelength_nm
        self.method, self.steps, self.lr_nm, self.bounds_nm = method, steps, lr_nm, bounds_nm
        self.polish_steps, self.grid_nm, self.drop_below_nm = polish_steps, grid_nm, drop_below_nm
        self._media = Media.of(surroundings or Surroundings(), wavelength_nm, index.dtype, index.device)
        # Of materials, gathered for the layers of candidates.
        self._waves = [Waves.of(index, self._media, p).with_inverse() for p in self._media.polarizations]

    def __call__(self, material: Tensor, thickness_nm: Tensor, target: Tensor, weight: Tensor | None = None) -> Refined:
        """Refine candidates.

        Args:
            material: ``(N, L)`` int64, -1 for no layer.
            thickness_nm: ``(N, L)``.
            target: ``(N, 3, W)`` or ``(3, W)``.
            weight: ``(N, 3, W)`` or ``(3, W)``; None: all ones.

        Raises:
            ValueError: If the shapes do not fit, or a material is not in the table.
        """
        material, thickness = self._checked(material, thickness_nm)
        shape = (len(material), 3, len(self.wavelength_nm))
        real = self.index.real.dtype
        target = target.to(self.index.device, real).expand(shape)
        weight = torch.ones((), dtype=real) if weight is None else weight
        weight = weight.to(self.index.device, real).expand(shape)
        if not len(material):
            return Refined(material, thickness, target, target.new_zeros(0), target.new_zeros(0))
        material, thickness = tidy(material, thickness)
        # Candidates with as many layers as each other are simulated together.
        order = (material >= 0).sum(1).argsort(stable=True)
        parts = [
            self._refine(*(part[order[rows]] for part in (material, thickness, target, weight)))
            for rows in chunks(len(order), shape[2], material.device)
        ]
        back = order.argsort()
        found = {f.name: torch.cat([getattr(part, f.name) for part in parts])[back] for f in fields(Refined)}
        return Refined(**found)

    def simulate(self, material: Tensor, thickness_nm: Tensor) -> Tensor:
        """R, A, T ``(..., 3, W)`` of ``(..., L)`` layers; differentiable in the thickness."""
        return spectrum(self._of(material), thickness_nm.to(self.index.real.dtype), self._media)

    @torch.no_grad()
    def robustness(
        self,
        material: Tensor,
        thickness_nm: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        relative: float = 0.01,
        draws: int = 100,
        seed: int = 0,
    ) -> Tensor:
        """Mean absolute errors of stacks as they would be made, ``(N, draws)``.

        Args:
            material: ``(N, L)`` int64, -1 for no layer.
            thickness_nm: ``(N, L)``.
            target: ``(N, 3, W)`` or ``(3, W)``.
            weight: The same; None: all ones.
            relative: Deviation of the independent Gaussian errors of the thicknesses, as a share of them.
            draws: Stacks that are made of each.
            seed: Of the errors; each candidate gets the same ones, whatever else there is.
        """
        material, thickness = self._checked(material, thickness_nm)
        generator = torch.Generator().manual_seed(seed)
        errors = torch.randn(draws, thickness.shape[1], generator=generator, dtype=torch.float64).to(thickness)
        target = target.to(thickness).expand(len(material), -1, -1)
        weight = None if weight is None else weight.to(thickness).expand(len(material), -1, -1)
        found = thickness.new_empty(len(material), draws)
        for i, (kind, sizes) in enumerate(zip(material, thickness, strict=True)):
            made = self.simulate(kind, (sizes * (1 + relative * errors)).clamp_(min=0))
            found[i] = weighted_mae(made, target[i], None if weight is None else weight[i])
        return found

    def _checked(self, material: Tensor, thickness_nm: Tensor) -> tuple[Tensor, Tensor]:
        if material.shape != thickness_nm.shape or material.ndim != 2:
            shapes = f"{tuple(material.shape)} and {tuple(thickness_nm.shape)}"
            raise ValueError(f"material and thickness_nm have shapes {shapes}; both must be (N, L)")
        if material.numel() and not -1 <= int(material.min()) <= int(material.max()) < len(self.index):
            raise ValueError(f"material: rows must be from -1 (no layer) to {len(self.index) - 1}")
        return material.to(self.index.device), thickness_nm.to(self.index.device, self.index.real.dtype)

    def _of(self, material: Tensor) -> list[Waves]:
        """Waves in the layers of candidates; where there is no layer those of the first one, at thickness 0."""
        rows = material.where(material >= 0, material[..., :1]).clamp(min=0).movedim(-1, 0).contiguous()
        # In memory layer by layer, as the recursion reads them: a quarter less time at few wavelengths.
        return [Waves(*(part[rows].movedim(0, -2) for part in waves)) for waves in self._waves]

    def _refine(self, material: Tensor, thickness: Tensor, target: Tensor, weight: Tensor) -> Refined:
        used = int((material >= 0).sum(1).max())
        width, material, thickness = material.shape[1], material[:, :used], thickness[:, :used]
        with torch.no_grad():
            start_mae = _finite(weighted_mae(self.simulate(material, thickness), target, weight))
        if self.steps and used:
            methods = {"adam": self._adam, "levenberg_marquardt": self._levenberg_marquardt, "lbfgs": self._lbfgs}
            thickness = methods[self.method](material, thickness, target, weight, self.steps)
        with torch.no_grad():
            if self.polish_steps and used:
                polished = self._levenberg_marquardt(material, thickness, target, weight, self.polish_steps)
                errors = (weighted_mae(self.simulate(material, t), target, weight) for t in (polished, thickness))
                better = torch.lt(*errors)
                thickness = torch.where(better[:, None], polished, thickness)
            if self.grid_nm is not None:
                thickness = self._to_grid(material, thickness, target, weight)
            material, thickness = tidy(material, thickness, self.drop_below_nm)
            found = self.simulate(material, thickness)
            mae = _finite(weighted_mae(found, target, weight))
        pad = (0, width - used)
        material = torch.nn.functional.pad(material, pad, value=-1)
        return Refined(material, torch.nn.functional.pad(thickness, pad), found, mae, start_mae)

    def _adam(self, material: Tensor, thickness: Tensor, target: Tensor, weight: Tensor, steps: int) -> Tensor:
        """The best of all steps, candidate by candidate."""
        waves, layer = self._of(material), material >= 0
        low, high = self.bounds_nm
        value = torch.where(layer, thickness.clamp(low, high), 0.0).requires_grad_()
        optimizer = torch.optim.Adam([value], lr=self.lr_nm)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        best, best_mae = value.detach().clone(), torch.full_like(value[:, 0], torch.inf).detach()
        for step in range(steps + 1):
            mae = weighted_mae(spectrum(waves, value, self._media), target, weight)
            with torch.no_grad():
                better = mae < best_mae
                best_mae = torch.where(better, mae, best_mae)
                best = torch.where(better[:, None], value, best)
            if step == steps:
                break
            optimizer.zero_grad()
            mae.sum().backward()
            value.grad.masked_fill_(~layer | ~value.grad.isfinite(), 0.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                value.clamp_(low, high).masked_fill_(~layer, 0.0)
        return best

    def _levenberg_marquardt(
        self, material: Tensor, thickness: Tensor, target: Tensor, weight: Tensor, steps: int
    ) -> Tensor:
        """Batched, with bounds: thicknesses that a step would push over a bound stay there."""
        waves, layer = self._of(material), material >= 0
        low, high = self.bounds_nm
        scale = (weight / weight.sum((1, 2), keepdim=True).clamp(min=1e-300)).sqrt()

        def evaluate(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Mean squared error, its half gradient and its Gauss-Newton matrix."""
            found, slopes = spectrum_and_slopes(waves, value, self._media)
            residual = ((found - target) * scale).flatten(1)
            slopes = (slopes * scale[:, None]).flatten(2)
            return residual.square().sum(1), (slopes @ residual[..., None])[..., 0], slopes @ slopes.mT

        value = torch.where(layer, thickness.clamp(low, high), 0.0)
        damping = torch.full_like(value[:, 0], 1e-3)
        loss, gradient, matrix = evaluate(value)
        identity = torch.eye(value.shape[1], dtype=value.dtype, device=value.device)
        for _ in range(steps):
            stuck = ~layer | ((value <= low) & (gradient > 0)) | ((value >= high) & (gradient < 0))
            diagonal = matrix.diagonal(dim1=1, dim2=2)
            floor = 1e-9 * diagonal.amax(1, keepdim=True).clamp(min=1e-20)
            system = matrix + (damping[:, None] * (diagonal + floor) + floor)[..., None] * identity
            free = (~stuck).to(value.dtype)
            system = torch.where(stuck[:, None] | stuck[..., None], identity, system)
            step = torch.linalg.solve(system, gradient * free)
            trial = torch.where(layer, (value - step * free).clamp(low, high), 0.0)
            new = evaluate(trial)
            accept = new[0] < loss
            damping = torch.where(accept, damping * 0.2, damping * 4).clamp(1e-9, 1e9)
            value = torch.where(accept[:, None], trial, value)
            loss = torch.where(accept, new[0], loss)
            gradient = torch.where(accept[:, None], new[1], gradient)
            matrix = torch.where(accept[:, None, None], new[2], matrix)
        return value

    def _lbfgs(self, material: Tensor, thickness: Tensor, target: Tensor, weight: Tensor, steps: int) -> Tensor:
        low, high = self.bounds_nm
        out = torch.zeros_like(thickness)
        for i in range(len(material)):
            layer = material[i] >= 0
            waves, wanted = self._of(material[i, layer]), target[i]
            scale = weight[i] / weight[i].sum().clamp(min=1e-300)

            def objective(x: np.ndarray, waves=waves, wanted=wanted, scale=scale) -> tuple[float, np.ndarray]:
                value = torch.from_numpy(x).to(wanted).requires_grad_()
                loss = ((spectrum(waves, value, self._media) - wanted).square() * scale).sum()
                (gradient,) = torch.autograd.grad(loss, value)
                return loss.item(), gradient.double().cpu().numpy()

            start = thickness[i, layer].clamp(low, high).double().cpu().numpy()
            options = {"maxiter": steps, "ftol": 1e-15, "gtol": 1e-10}
            bounds = [(low, high)] * len(start)
            found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
            out[i, layer] = torch.from_numpy(found.x).to(out)
        return out

    def _to_grid(self, material: Tensor, thickness: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Multiples of the grid: rounded, then one layer after the other moved by a step where that helps."""
        grid, (low, high), layer = self.grid_nm, self.bounds_nm, material >= 0
        waves = self._of(material)
        low, high = math.ceil(low / grid - 1e-9) * grid, math.floor(high / grid + 1e-9) * grid

        def errors(value: Tensor) -> Tensor:
            return _finite(weighted_mae(spectrum(waves, value, self._media), target, weight))

        value = torch.where(layer, ((thickness / grid).round() * grid).clamp(low, high), 0.0)
        now = errors(value)
        for _ in range(_SWEEPS):
            before = now
            for j in range(value.shape[1]):
                for move in (-grid, grid):
                    trial = value.clone()
                    trial[:, j] = torch.where(layer[:, j], (value[:, j] + move).clamp(low, high), 0.0)
                    found = errors(trial)
                    better = found < now
                    value, now = torch.where(better[:, None], trial, value), torch.where(better, found, now)
            if torch.equal(before, now):
                break
        return value


def tidy(material: Tensor, thickness_nm: Tensor, drop_below_nm: float = 0.0) -> tuple[Tensor, Tensor]:
    """Drop layers that are thinner, merge neighbours of the same material, move layers to the front.

    Args:
        material: ``(N, L)`` int64, -1 for no layer.
        thickness_nm: ``(N, L)``.
        drop_below_nm: Layers of thickness 0 are dropped in any case.

    Returns:
        Material, -1 behind the last layer, and thickness, 0 there; ``(N, L)`` each.
    """
    keep = (material >= 0) & (thickness_nm > 0) & (thickness_nm >= drop_below_nm)
    front = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    keep = keep.gather(1, front)
    material = material.gather(1, front).where(keep, -1)
    thickness = thickness_nm.gather(1, front).where(keep, 0.0)
    begins = torch.ones_like(keep)
    begins[:, 1:] = material[:, 1:] != material[:, :-1]
    place = begins.cumsum(1) - 1
    merged = torch.zeros_like(thickness).scatter_add_(1, place, thickness)
    return torch.full_like(material, -1).scatter_(1, place, material), merged


def _finite(mae: Tensor) -> Tensor:
    """A simulation that failed is as far off as can be."""
    return torch.where(mae.isfinite(), mae, torch.inf)
