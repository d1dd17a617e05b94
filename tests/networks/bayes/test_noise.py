"""Seeds and numbers that are a function of (run, purpose, step, sample): no collisions, no traces of their counters."""

from __future__ import annotations

import math

import pytest
import torch

from networks.bayes import Stream, counter_normal, mix64, noise, sample_seed


def test_the_hash_of_one_number_is_the_published_generator():
    """First outputs of SplitMix64 started at 0 and at 1234567 (Vigna's C code)."""
    assert mix64(0) == 0xE220A8397B1DCDAF
    assert mix64(1234567) == 6457827717110365317


def test_the_hash_sees_every_part_and_its_place():
    hashes = {mix64(*parts) for parts in [(1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (1,), (2,), (-1,), (1 << 63,), (0, 0)]}
    assert len(hashes) == 9
    assert all(0 <= h < 1 << 64 for h in hashes)
    assert mix64(-1) == mix64((1 << 64) - 1)  # words of 64 bits


def test_a_bit_of_a_part_turns_half_of_the_hash():
    turned = [(mix64(7, x) ^ mix64(7, x ^ (1 << bit))).bit_count() for x in range(40) for bit in range(64)]
    assert 31.5 < sum(turned) / len(turned) < 32.5 and min(turned) > 8


@pytest.mark.parametrize("stream", [Stream.WEIGHTS, mix64(Stream.WEIGHTS, Stream.DROPOUT)])
def test_no_two_steps_and_samples_of_a_training_collide(stream):
    """In the 32 bits that torch's CPU generator reads, and in all 64: t < 2000, s < 64."""
    seeds = [sample_seed(3, stream, step, sample) for step in range(2000) for sample in range(64)]
    assert len(set(seeds)) == len({s & 0xFFFFFFFF for s in seeds}) == 128_000
    assert all(0 <= s < 1 << 64 for s in seeds)
    # No trace of the counter: every bit is set half of the time (deviation 1 / (2 sqrt(128000)) = 0.0014).
    for bit in range(64):
        assert abs(sum(s >> bit & 1 for s in seeds[::8]) / 16_000 - 0.5) < 5 * 0.5 / math.sqrt(16_000)


def test_seeds_of_other_runs_purposes_and_far_steps_differ():
    low = [
        sample_seed(*key) & 0xFFFFFFFF
        for key in [(0, 1, 5, 3), (1, 1, 5, 3), (0, 2, 5, 3), (0, 1, 5 + (1 << 26), 3), (0, 1, 5, 3 + 64), (0, 1, 3, 5)]
    ]
    assert len(set(low)) == 6


def test_streams_have_values_of_their_own():
    assert len({int(s) for s in Stream}) == len(Stream)


# ------------------------------------------------------------------------------------------------------ counter_normal


def drawn(samples=range(8), items=None, shape=(24, 3), key=(1, 2)):
    return counter_normal(key, samples, torch.arange(1000) if items is None else items, shape)


def test_numbers_are_normal():
    z = drawn()
    assert z.shape == (8, 1000, 24, 3) and z.dtype == torch.float64
    n = z.numel()
    # Moments of a standard normal, with the standard error of each.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean().item() - expected) < 4 * math.sqrt(variance / n), power
    ordered = torch.special.ndtr(z.flatten().sort().values)
    steps = torch.arange(n, dtype=torch.float64)
    distance = max((ordered - steps / n).abs().max(), (ordered - (steps + 1) / n).abs().max()).item()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, a level of 0.001


def test_samples_items_and_entries_are_independent():
    z = drawn(shape=(64,))
    for dim, size in enumerate(z.shape):
        for lag in (1, 2, 3):
            a, b = z.narrow(dim, 0, size - lag), z.narrow(dim, lag, size - lag)
            for left, right in ((a, b), (a.square() - 1, b.square() - 1)):
                assert abs((left * right).mean().item()) < 4.5 * left.std().item() ** 2 / math.sqrt(a.numel()), (
                    dim,
                    lag,
                )
    flat = z.permute(0, 2, 1).reshape(512, 1000)
    correlation = torch.corrcoef(flat).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(1000)


def test_a_number_belongs_to_its_sample_item_and_entry_whoever_asks():
    items = torch.tensor([7, 3, 1000, 0, 3])
    whole = drawn(range(6), items, (4, 2))
    assert torch.equal(whole[:, 1], whole[:, 4])
    parts = torch.cat([drawn(range(0, 2), items, (4, 2)), drawn([2], items, (4, 2)), drawn(range(3, 6), items, (4, 2))])
    assert torch.equal(parts, whole)
    assert torch.equal(drawn(range(6), items[[2, 0]], (4, 2)), whole[:, [2, 0]])
    assert torch.equal(drawn(range(6), items, (8,)).view_as(whole), whole)
    for other in (drawn(range(6), items, (4, 2), (2, 1)), drawn(range(6), items, (4, 2), (1, 3))):
        assert (other != whole).all()


def test_no_number_is_infinite(monkeypatch):
    for word in (-1, 0, (1 << 63) - 1, -(1 << 63)):
        monkeypatch.setattr(noise, "_finalized", lambda z, word=word: torch.full_like(z, word))
        z = counter_normal((0,), [0], torch.arange(1), (1,))
        assert z.isfinite().all()


def test_the_hash_on_tensors_is_the_one_on_numbers():
    words = torch.tensor([0, 1, -1, 1234567, -(1 << 63)])
    assert noise._finalized(words).tolist() == [noise._signed(mix64(w)) for w in words.tolist()]
