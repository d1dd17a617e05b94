from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from lightning_modules.weather.baselines import DampedPersistence, LinearInverseModel

H, W, V = 5, 8, 2


def alone(total: torch.Tensor) -> torch.Tensor:
    return total


def weight() -> torch.Tensor:
    cos = torch.cos(torch.deg2rad(torch.linspace(70, -70, H, dtype=torch.float64)))
    return cos * H / cos.sum()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_damping_is_found():
    first = random(40, H, W, V)
    factor = torch.tensor([[0.9, 0.5], [0.6, 0.1]], dtype=torch.float64)  # (lead, channel)
    later = first[:, None] * factor[None, :, None, None, :]
    damped = DampedPersistence.fit(zip(first, later, strict=True), weight(), alone)
    assert torch.allclose(damped.factor, factor, atol=1e-12)
    assert torch.allclose(damped(first), later, atol=1e-12)


def test_damping_is_never_worse_than_persistence_or_climatology_where_it_was_fitted():
    first, later = random(30, H, W, V), random(30, 2, H, W, V, seed=1)
    later = later + 0.4 * first[:, None]
    damped = DampedPersistence.fit(zip(first, later, strict=True), weight(), alone)
    a = weight()[:, None, None]
    error = [(a * (f - later) ** 2).mean() for f in (damped(first), first[:, None].expand_as(later), 0 * later)]
    assert error[0] < min(error[1:])


def linear_world(samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Anomalies in the span of six patterns whose amplitudes follow a linear map."""
    patterns = random(6, H, W, V, seed=4)
    step = 0.8 * torch.linalg.qr(random(6, 6, seed=5))[0]
    amplitude = random(samples, 6, seed=6)
    later = torch.stack([amplitude @ step, amplitude @ step @ step], 1)
    fields = [torch.einsum("...k,khwv->...hwv", x, patterns) for x in (amplitude, later)]
    return fields[0], fields[1], patterns


def test_a_linear_world_is_found():
    first, later, _ = linear_world(60)
    model = LinearInverseModel.fit(first, later, weight(), 20, 0.0, alone, alone)
    assert model.patterns.shape[-1] == 6  # as many as there are
    forecast = model(first[:5], alone)
    assert torch.allclose(forecast, later[:5], atol=1e-8)
    gram = torch.einsum("hwvk,hwvj->kj", model.patterns, model.patterns)
    assert torch.allclose(gram, torch.eye(6, dtype=torch.float64), atol=1e-10)


BLOCKS = [
    (slice(0, 3), slice(0, 1)),
    (slice(3, 8), slice(0, 1)),
    (slice(0, 3), slice(1, 2)),
    (slice(3, 8), slice(1, 2)),
]


class Exchange:
    """Sums over threads that stand for ranks."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.parts: list[torch.Tensor] = [torch.zeros(())] * size

    def over(self, rank: int, peers: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
        def total(part: torch.Tensor) -> torch.Tensor:
            self.parts[rank] = part
            self.barrier.wait(30)
            found = sum(self.parts[peer] for peer in peers)
            self.barrier.wait(30)
            return found

        return total


def test_bands_and_channels_give_the_same_model():
    """Each of four threads has a block of the fields, as the ranks of a grid do."""
    first, later, _ = linear_world(40)
    first = first + 0.1 * random(*first.shape, seed=9)
    whole = LinearInverseModel.fit(first, later, weight(), 5, 0.01, alone, alone)
    expected = whole(first[:3], alone)
    exchange = Exchange(len(BLOCKS))

    def rank(number: int) -> torch.Tensor:
        columns, own = BLOCKS[number]
        over_field = exchange.over(number, list(range(len(BLOCKS))))
        over_tokens = exchange.over(number, [peer for peer, block in enumerate(BLOCKS) if block[1] == own])
        mine = first[..., columns, own], later[..., columns, own]
        model = LinearInverseModel.fit(*mine, weight(), 5, 0.01, over_field, over_tokens)
        return model(first[:3, :, columns, own], over_field)

    with ThreadPoolExecutor(len(BLOCKS)) as pool:
        found = list(pool.map(rank, range(len(BLOCKS))))
    for part, (columns, own) in zip(found, BLOCKS, strict=True):
        assert torch.allclose(part, expected[..., columns, own], atol=1e-9)
