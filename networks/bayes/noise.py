"""Seeds of random numbers that are a function of (run, purpose, optimizer step, weight sample) and of nothing else.

With a generator of its own for every sample and step, noise does not depend on which rank evaluates which samples, nor
on what was drawn before, so a run resumes without any random state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_HALF = (1 << 32) - 1
_STEP_BITS, _SAMPLE_BITS = 26, 6


class Stream(IntEnum):
    """What random numbers are for; numbers of different streams are independent."""

    WEIGHTS = 1
    EVALUATION = 2
    DROPOUT = 3
    ITEMS = 4


def mix64(*parts: int) -> int:
    """Hash integers to 64 bits.

    Each part goes through the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) together with the hash of
    those before. The finalizer permutes the 64-bit words, so two lists of equal length that differ in one part alone
    never collide.
    """
    state = 0
    for part in parts:
        z = ((state ^ (part & _WORD)) + 0x9E3779B97F4A7C15) & _WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
        state = z ^ (z >> 31)
    return state


def sample_seed(seed: int, stream: int, step: int, sample: int) -> int:
    """Seed of the generator of one weight sample at one step, 64 bits.

    torch's CPU generator reads the lowest 32 bits alone. For a given (seed, stream) these are a permutation of
    (step, sample) over step < 2^26 and sample < 64, so that no two of a training are equal; a hash of 32 bits would
    collide after some 10^5 steps. Beyond that range the permutation is another one.

    Args:
        seed: Of the run.
        stream: Purpose, see `Stream`; any integer is one.
        step: Optimizer step, or the number of an evaluation.
        sample: Global number of the weight sample.
    """
    counter = ((step & ((1 << _STEP_BITS) - 1)) << _SAMPLE_BITS) | (sample & ((1 << _SAMPLE_BITS) - 1))
    key = mix64(seed, stream, step >> _STEP_BITS, sample >> _SAMPLE_BITS)
    return (mix64(key, counter) & ~_HALF) | _permuted(counter, key)


def _permuted(word: int, key: int) -> int:
    """A permutation of the 32-bit words that depends on the key: two rounds of the finalizer of MurmurHash3."""
    for part in (key & _HALF, key >> 32):
        word ^= part
        word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _HALF
        word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _HALF
        word ^= word >> 16
    return word


def counter_uniform(key: Sequence[int], samples: Sequence[int], items: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform numbers in (0, 1) that belong to (sample, item, entry), whoever asks, ``(S, B, *shape)`` float64.

    Args:
        key: Of the run and the purpose.
        samples: Numbers of the samples.
        items: Numbers of the items, ``(B,)`` int64; the result lies on their device.
        shape: Of an item.
    """
    entries = torch.arange(math.prod(shape), device=items.device)
    seeds = torch.tensor([_signed(mix64(*key, s)) for s in samples], device=items.device)
    words = _finalized(_finalized(seeds[:, None] ^ items[None])[..., None] ^ entries)
    uniform = ((words >> 12) & ((1 << 52) - 1)).double().add_(0.5).mul_(2.0**-52)  # exact: neither 0 nor 1
    return uniform.view(len(seeds), len(items), *shape)


def counter_normal(key: Sequence[int], samples: Sequence[int], items: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers by the same rule as `counter_uniform`, ``(S, B, *shape)`` float64."""
    return torch.special.ndtri(counter_uniform(key, samples, items, shape))


def _signed(word: int) -> int:
    """The same 64 bits as a signed integer, which is what torch computes with."""
    return word - (1 << 64) if word >> 63 else word


def _finalized(z: Tensor) -> Tensor:
    """The finalizer of SplitMix64 on int64, whose products wrap around and whose shifts are made logical."""
    z = z + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return z ^ ((z >> 31) & ((1 << 33) - 1))
