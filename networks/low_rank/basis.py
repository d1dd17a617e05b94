"""Orthogonal bases of weights: how much they turn, which singular values to keep. Tensors in, tensors and numbers out.

Source: Coquelin et al., "Harnessing Orthogonality to Train Low-Rank Neural Networks", ECAI 2024 (OIALR), sections on
stability and on the algorithm. ``W2`` is the tall view ``(m, n)`` of a weight (`networks.tall_view`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Criterion = Literal["relative", "energy"]

# Quintic that lifts small singular values fast and leaves all in about 0.7 to 1.2 (Jordan et al., "Muon", 2024), then
# the one that converges to 1 (Higham, "Functions of Matrices", 2008, section 8.3).
_LIFT = (3.4445, -4.7750, 2.0315)
_POLISH = (15 / 8, -10 / 8, 3 / 8)


def working_dtype(dtype: torch.dtype, least: torch.dtype = torch.float32) -> torch.dtype:
    """The type in which a weight of ``dtype`` is decomposed: never below ``least``, never below its own."""
    return torch.promote_types(dtype, least)


def decompose(matrix: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced SVD ``U (m, r), s (r,), V (n, r)`` with ``matrix = U diag(s) V^T``, computed in at least ``dtype``.

    A matrix that is not finite gives factors of nan instead of an error, so that ranks agree on what to do.
    """
    work = matrix.detach().to(working_dtype(matrix.dtype, dtype))
    if not bool(work.isfinite().all()):
        m, n = work.shape
        r = min(m, n)
        return work.new_full((m, r), math.nan), work.new_full((r,), math.nan), work.new_full((n, r), math.nan)
    u, s, vh = torch.linalg.svd(work, full_matrices=False)
    return u, s, vh.mT


# ---------------------------------------------------------------------------------------------------------- stability


def polar_factor(matrix: Tensor) -> Tensor:
    """``P = U V^T`` of ``W2 = U S V^T``, (m, n): the basis of a weight, by SVD.

    It does not depend on the signs and the order that an SVD happens to choose. A matrix whose rank is deficient, to
    rounding, has no unique factor: all entries are nan then.
    """
    u, s, v = decompose(matrix)
    smallest = 10 * torch.finfo(s.dtype).eps * s[0]
    if not bool(s[-1] > smallest):  # also where s is nan
        return torch.full_like(u @ v.mT, math.nan)
    return u @ v.mT


def polar_newton_schulz(matrix: Tensor, steps: int = 6) -> Tensor:
    """Estimate of the polar factor by products of matrices alone, (m, n).

    All but two of the steps lift small singular values, two bring all to 1. Directions whose singular value is below
    about a hundredth of the Frobenius norm stay short, and so count less in `stability`.
    """
    work = matrix.detach().to(working_dtype(matrix.dtype))
    work = work / work.norm().clamp(min=torch.finfo(work.dtype).tiny)
    for step in range(steps):
        a, b, c = _LIFT if step < steps - 2 else _POLISH
        gram = work.mT @ work
        work = a * work + work @ (b * gram + c * gram @ gram)
    return work


def stability(first: Tensor, second: Tensor, ranks: tuple[int, int] | None = None) -> float:
    """How little a basis has turned: 1 for equal polar factors, -1 for opposite ones.

    The paper's ``trace(P_i^T P_j) / n`` for two orthonormal bases, written as the cosine of the two, which is the same
    number there (``||P||_F^2 = n``) and suits estimates, whose columns are a little short.

    Args:
        first: Polar factor, (m, n).
        second: Another one.
        ranks: Their ranks, if they may differ: then it is divided by the smaller ``||P||_F^2``, so that a basis that
            has lost directions and kept the others as they were has not turned.
    """
    cosine = float((first * second).sum() / (first.norm() * second.norm()))
    return cosine if ranks is None else cosine * math.sqrt(max(ranks) / min(ranks))


def mixing(matrix: Tensor) -> Tensor:
    """``R`` of ``W2 = Q R`` with a positive diagonal, (n, n): how a weight mixes its basis."""
    r = torch.linalg.qr(matrix.detach().to(working_dtype(matrix.dtype)), mode="r").R
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r.dtype)
    return signs.unsqueeze(1) * r


def mixing_similarity(first: Tensor, second: Tensor) -> float:
    """``1 - ||R_i - R_j||_F / (||R_i||_F + ||R_j||_F)``: the paper's distance as a number between 0 and 1."""
    return float(1 - (first - second).norm() / (first.norm() + second.norm()))


# --------------------------------------------------------------------------------------------------------- truncation


def kept_rank(
    singular_values: Tensor,
    short_side: int,
    beta: float,
    criterion: Criterion = "relative",
    max_drop: float = 0.5,
    min_rank_fraction: float = 0.01,
) -> int:
    """How many singular values an update keeps.

    Args:
        singular_values: Of Sigma, descending, (r,).
        short_side: n of the tall view.
        beta: ``relative``: keep ``s_i >= beta s_1``. ``energy``: the share of ``sum s_i^2`` that may be dropped.
        criterion: Which of the two.
        max_drop: Largest share of the current rank that one update may drop.
        min_rank_fraction: Smallest rank as a share of n.

    Both guards round down, as in the published program: of rank 5, two remain. At least one value is kept.
    """
    rank = len(singular_values)
    if criterion == "relative":
        wanted = int((singular_values >= beta * singular_values[0]).sum())
    else:
        energy = singular_values.double().square()
        left = energy.flip(0).cumsum(0).flip(0)  # what dropping from i on would lose
        wanted = int((left > beta * energy.sum()).sum())
    least = max(1, int((1 - max_drop) * rank), int(min_rank_fraction * short_side))
    return min(rank, max(wanted, least))


def num_treated(update: int, step: float, num_layers: int) -> int:
    """How many layers the update with this number (from 1) treats: ``ceil(update * step * num_layers)``, at most all.

    The published program rounds down, which gives 0 for few layers, and then slices ``[-0:]``, which is all of them.
    """
    # Products like 3 * 0.1 * 10 are a little above the integer they mean.
    return min(num_layers, math.ceil(update * step * num_layers - 1e-9))


def common_threshold(
    spectra: list[Tensor], sizes: list[tuple[int, int]], dense: int, stored_fraction: float, min_rank: int = 1
) -> list[int]:
    """Ranks under one relative threshold for all layers, the largest that store no more than a share of the network.

    Args:
        spectra: Singular values of every layer, descending.
        sizes: ``(m, n)`` of every tall view.
        dense: Numbers of the whole dense network.
        stored_fraction: Share of them that may be stored, ``r (m + n) + r^2`` for a layer of rank r.
        min_rank: Least rank of a layer.

    Raises:
        ValueError: Not even the smallest ranks store so little.
    """
    elsewhere = dense - sum(m * n for m, n in sizes)

    def ranks(beta: float) -> list[int]:
        return [max(min_rank, int((s >= beta * s[0]).sum())) for s in spectra]

    def stored(beta: float) -> float:
        factors = sum(r * (m + n) + r * r for r, (m, n) in zip(ranks(beta), sizes, strict=True))
        return (elsewhere + factors) / dense

    if stored(1.0) > stored_fraction:
        raise ValueError(
            f"stored_fraction={stored_fraction} is below the {stored(1.0):.3f} that rank {min_rank} in every layer "
            "stores; choose a larger one."
        )
    thresholds = torch.cat([s / s[0] for s in spectra]).double().unique()  # ascending; counts change only there
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if stored(float(thresholds[middle])) <= stored_fraction:
            high = middle
        else:
            low = middle + 1
    return ranks(float(thresholds[low]))
