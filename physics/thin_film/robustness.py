"""Noise, smoothing and filling that turn an idealised target into variants which a network may know better.

No stack has a perfectly rectangular spectrum. Variants that look more like simulated ones lie closer to what a network
was trained on; each draw may get its own (paper, section 2.5).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FILLINGS = ("flat_random", "tilted_random", "smooth_random", "prior_plus_noise")
CHANNELS = {"R": 0, "A": 1, "T": 2}


def add_noise(
    spectrum: Tensor,
    generator: torch.Generator,
    absolute: float = 0.01,
    relative: float = 0.0,
    channels: tuple[float, float, float] = (1.0, 0.0, 1.0),
) -> Tensor:
    """Gaussian noise, not clamped.

    Args:
        spectrum: R, A, T ``(..., 3, W)``.
        generator: Of the noise.
        absolute: Deviation.
        relative: Further deviation as a share of the value.
        channels: Factor of the deviation for R, A and T.
    """
    if absolute < 0 or relative < 0 or min(channels) < 0:
        raise ValueError(f"noise: absolute={absolute}, relative={relative}, channels={channels} must not be negative")
    noise = torch.randn(spectrum.shape, generator=generator, dtype=spectrum.dtype)
    return spectrum + noise * (absolute + relative * spectrum.abs()) * spectrum.new_tensor(channels)[:, None]


def smooth(spectrum: Tensor, window: int = 25, sigma: float = 1.5, kind: str = "gaussian") -> Tensor:
    """Moving average over wavelengths; the values at both ends go on beyond them.

    Args:
        spectrum: ``(..., W)``.
        window: Number of points, odd; 1 changes nothing.
        sigma: Of the Gaussian in points.
        kind: ``gaussian`` or ``boxcar``.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"smoothing: window={window} must be an odd number of points")
    if kind not in ("gaussian", "boxcar"):
        raise ValueError(f"smoothing: kind={kind!r} is unknown; choose gaussian or boxcar")
    if kind == "gaussian" and sigma <= 0:
        raise ValueError(f"smoothing: sigma={sigma} must be above 0")
    place = torch.arange(window, dtype=spectrum.dtype) - window // 2
    kernel = torch.exp(-0.5 * (place / sigma) ** 2) if kind == "gaussian" else torch.ones_like(place)
    kernel = kernel / kernel.sum()
    rows = spectrum.reshape(-1, 1, spectrum.shape[-1])
    padded = F.pad(rows, (window // 2, window // 2), mode="replicate")
    return F.conv1d(padded, kernel[None, None]).reshape(spectrum.shape)


def fill(
    spectrum: Tensor,
    weight: Tensor,
    generator: torch.Generator,
    mode: str = "smooth_random",
    strength: float = 0.95,
    kernel: int = 50,
) -> Tensor:
    """Random values where a target asks for nothing, within [0, 1] if the spectrum is.

    Args:
        spectrum: R, A, T ``(..., 3, W)``.
        weight: The same, or what broadcasts to it; values are replaced where it is 0.
        generator: Of the values.
        mode: ``flat_random``: one level; ``tilted_random``: a line between two; ``smooth_random``: noise smoothed over
            ``kernel`` points, from 0 to 1; ``prior_plus_noise``: the spectrum's own values plus such noise about 0.
        strength: Share of the random values in the result, or the largest deviation for ``prior_plus_noise``.
        kernel: In points.
    """
    if mode not in FILLINGS:
        raise ValueError(f"filling: mode={mode!r} is unknown; choose one of {', '.join(FILLINGS)}")
    if not 0 <= strength <= 1 or kernel < 1:
        raise ValueError(f"filling: strength={strength} must be in [0, 1], kernel={kernel} at least 1")
    points = spectrum.shape[-1]

    def uniform(number: int) -> Tensor:
        return torch.rand(*spectrum.shape[:-1], number, generator=generator, dtype=spectrum.dtype)

    if mode == "flat_random":
        values = uniform(1).expand(spectrum.shape)
    elif mode == "tilted_random":
        place = torch.linspace(0, 1, points, dtype=spectrum.dtype)
        values = torch.lerp(uniform(1), uniform(1), place)
    else:
        values = smooth(uniform(points), kernel + 1 - kernel % 2, kind="boxcar")
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        values = (values - low) / (high - low).clamp(min=1e-12)
    if mode == "prior_plus_noise":
        filled = (spectrum + strength * (2 * values - 1)).clamp(0, 1)
    else:
        filled = torch.lerp(spectrum, values, strength)
    return torch.where(weight.to(spectrum).expand_as(spectrum) == 0, filled, spectrum)


def restore_sum(spectrum: Tensor, priority: str = "R>T>A") -> Tensor:
    """R + A + T = 1 again, each in [0, 1].

    After clamping, the first channel takes the residue as far as it stays in [0, 1], then the next.

    Args:
        spectrum: R, A, T ``(..., 3, W)``.
        priority: Order of the channels.
    """
    order = priority.split(">")
    if sorted(order) != ["A", "R", "T"]:
        raise ValueError(f"priority={priority!r}: must be an order of R, A and T such as R>T>A")
    channels = list(spectrum.clamp(0, 1).unbind(-2))
    for name in order:
        at = CHANNELS[name]
        channels[at] = (channels[at] + 1 - sum(channels)).clamp(0, 1)
    return torch.stack(channels, dim=-2)


def variants(
    spectrum: Tensor,
    weight: Tensor,
    number: int,
    seed: int,
    absolute: float = 0.01,
    relative: float = 0.0,
    channels: tuple[float, float, float] = (1.0, 0.0, 1.0),
    window: int = 25,
    sigma: float = 1.5,
    kind: str = "gaussian",
    mode: str | None = None,
    strength: float = 0.95,
    kernel: int = 50,
    priority: str = "R>T>A",
) -> Tensor:
    """Variants of a target: noise, smoothing, filling, and the sum restored.

    Args:
        spectrum: R, A, T ``(3, W)``.
        weight: ``(3, W)``; 0 where nothing is asked for.
        number: Of variants.
        seed: Of all random values; a larger number has the same first variants.
        absolute: See `add_noise`.
        relative: See `add_noise`.
        channels: See `add_noise`.
        window: See `smooth`; 1: none.
        sigma: See `smooth`.
        kind: See `smooth`.
        mode: See `fill`; None: none.
        strength: See `fill`.
        kernel: See `fill`.
        priority: See `restore_sum`.

    Returns:
        ``(number, 3, W)``; number 0 is the target itself.
    """
    generator = torch.Generator().manual_seed(seed)
    found = [spectrum]
    for _ in range(1, number):
        varied = smooth(add_noise(spectrum, generator, absolute, relative, channels), window, sigma, kind)
        if mode is not None:
            varied = fill(varied, weight, generator, mode, strength, kernel)
        found.append(restore_sum(varied, priority))
    return torch.stack(found[:number])
