"""Alternations are counted."""

from __future__ import annotations

import pytest
import torch

from physics.thin_film.bragg import bragg_counts, longest_bragg


def count(text: str, tolerance: float = 20.0) -> list[int]:
    """Counts of a stack such as ``A10 B20 A10``; from length 3 on."""
    layers = text.split()
    material = torch.tensor([[ord(layer[0]) - ord("A") for layer in layers] + [-1, -1]])
    thickness = torch.tensor([[float(layer[1:]) for layer in layers] + [0.0, 0.0]])
    counts = bragg_counts(material, thickness, tolerance)[0].tolist()
    assert counts[:3] == [0, 0, 0] and counts[len(layers) + 1 :] == [0, 0]
    assert longest_bragg(material, thickness, tolerance).item() == max(
        [i for i, n in enumerate(counts) if n], default=0
    )
    return counts[3 : len(layers) + 1]


@pytest.mark.parametrize(
    ("stack", "counts"),
    [
        ("A50 B90 A50", [1]),
        ("A50 B90 A70", [1]),
        ("A50 B90 A71", [0]),
        ("A50 B90 C50", [0]),
        ("A50 A50 A50", [0]),
        ("A50 B90 A50 B90 A50 B90", [4, 3, 2, 1]),
        ("A50 B90 A60 B95 C10 B90 C20", [4, 2, 0, 0, 0]),
        ("A50 B90 A65 B90 A80", [3, 2, 0]),  # neighbours agree, the ends do not
    ],
)
def test_counts(stack, counts):
    assert count(stack) == counts


def test_tolerance_and_batches():
    assert count("A50 B90 A71", tolerance=21) == [1]
    material, thickness = torch.tensor([[0, 1, 0], [0, 1, 2], [-1, -1, -1]]), torch.full((3, 3), 10.0)
    assert bragg_counts(material, thickness)[:, 3].tolist() == [1, 0, 0]
    assert longest_bragg(material, thickness).tolist() == [3, 0, 0]
