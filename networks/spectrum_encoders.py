"""Encoders that turn a spectrum, ``(B, 3, W)``, into tokens for a network that writes stacks of thin films."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.stack_generator import Attention, feed_forward, sinusoidal


class ChannelTokens(nn.Module):
    """The published encoder: one token for each of R, A and T.

    Args:
        num_wavelengths: W.
        width: Of a token.
    """

    places: Tensor

    def __init__(self, num_wavelengths: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_wavelengths, width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width)
        )
        self.register_buffer("places", sinusoidal(torch.arange(3), width), persistent=False)

    def forward(self, spectrum: Tensor) -> Tensor:
        """``(B, 3, W)`` to ``(B, 3, width)``."""
        return self.layers(spectrum) + self.places


class PatchTokens(nn.Module):
    """A token for each window of wavelengths, of all three channels, and attention between the windows.

    Args:
        num_wavelengths: W.
        width: Of a token.
        patch: Wavelengths of a window; the last window is filled with the last values.
        depth: Blocks of attention.
        heads: Of the attention.
    """

    places: Tensor

    def __init__(self, num_wavelengths: int, width: int, patch: int = 8, depth: int = 1, heads: int = 4) -> None:
        super().__init__()
        if not 1 <= patch <= num_wavelengths:
            raise ValueError(f"model.net.encoder.patch={patch}: must be 1 to {num_wavelengths}, the wavelengths")
        self.patch = patch
        self.count = -(-num_wavelengths // patch)
        self.embed = nn.Linear(3 * patch, width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("places", sinusoidal(torch.arange(self.count), width), persistent=False)

    def forward(self, spectrum: Tensor) -> Tensor:
        """``(B, 3, W)`` to ``(B, patches, width)``."""
        missing = self.count * self.patch - spectrum.shape[-1]
        padded = F.pad(spectrum, (0, missing), mode="replicate") if missing else spectrum
        patches = padded.unflatten(2, (self.count, self.patch)).transpose(1, 2).flatten(2)
        x = self.embed(2 * patches - 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Whitening(nn.Module):
    """Reflectance and transmittance shifted and turned so that all directions vary alike.

    Spectra of neighbouring wavelengths vary together: what tells thicknesses apart is a small part of the variance,
    which a network learns last. Absorptance follows from the other two and is left out.

    Until `fit` has seen spectra, values are only mapped from [0, 1] to [-1, 1].

    Args:
        num_wavelengths: W.
        floor: Added to the variances: directions that vary less stay small.
    """

    mean: Tensor
    map: Tensor

    def __init__(self, num_wavelengths: int, floor: float = 1e-4) -> None:
        super().__init__()
        if floor <= 0:
            raise ValueError(f"model.net.encoder.floor={floor}: must be above 0")
        self.floor = floor
        self.register_buffer("mean", torch.full((2 * num_wavelengths,), 0.5))
        self.register_buffer("map", 2 * torch.eye(2 * num_wavelengths))

    @torch.no_grad()
    def fit(self, spectra: Tensor) -> None:
        """Take mean and covariance C from spectra ``(N, 3, W)``; the map is (C + floor)^(-1/2)."""
        x = spectra[:, [0, 2]].flatten(1).double()
        values, vectors = torch.linalg.eigh(torch.cov(x.T))
        self.mean.copy_(x.mean(0))
        self.map.copy_(vectors @ torch.diag((values.clamp(min=0) + self.floor).rsqrt()) @ vectors.T)

    def forward(self, spectrum: Tensor) -> Tensor:
        """``(B, 3, W)`` to ``(B, 2 W)``."""
        return (spectrum[:, [0, 2]].flatten(1) - self.mean) @ self.map


class DenseTokens(nn.Module):
    """Tokens that a residual perceptron reads off the whole spectrum.

    It sees a spectrum once, however many tokens and steps a stack takes: most weights for least time.

    Args:
        num_wavelengths: W.
        width: Of a token.
        hidden: Width of the perceptron.
        depth: Residual blocks.
        count: Number of tokens.
        floor: Of the variances of the whitened spectrum, see `Whitening`.
    """

    def __init__(
        self,
        num_wavelengths: int,
        width: int,
        hidden: int = 512,
        depth: int = 2,
        count: int = 8,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.count = count
        self.whitening = Whitening(num_wavelengths, floor)
        self.embed = nn.Linear(2 * num_wavelengths, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
            for _ in range(depth)
        )
        self.out = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, count * width))
        self.norm = nn.LayerNorm(width)

    def fit(self, spectra: Tensor) -> None:
        """Learn from spectra ``(N, 3, W)`` how they vary, before training."""
        self.whitening.fit(spectra)

    def forward(self, spectrum: Tensor) -> Tensor:
        """``(B, 3, W)`` to ``(B, count, width)``."""
        x = self.embed(self.whitening(spectrum))
        for block in self.blocks:
            x = x + block(x)
        return self.norm(self.out(x).unflatten(1, (self.count, -1)))


class EncoderBlock(nn.Module):
    """Self-attention and feed-forward layer, each behind a layer normalisation and beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feed_forward = Attention(width, heads), feed_forward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` to the same shape."""
        y = self.norm1(x)
        x = x + self.attention(y, self.attention.memory(y))
        return x + self.feed_forward(self.norm2(x))
