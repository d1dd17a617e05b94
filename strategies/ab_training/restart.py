"""Restarts from a checkpoint that was written within an AB phase: who may, and from which factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from networks.ab_factors import ABFactor, Factors
from strategies.ab_training.ab_phase import Start

# Factors at the split by path of the layer, and roots of the singular values where the trained one has them all.
Stored = Mapping[str, Sequence[Tensor]]


def check_agreement(
    here: Mapping[str, Any], there: Mapping[str, Any], starts: Stored, layers: Sequence[ABFactor]
) -> None:
    """Refuse a checkpoint that this run cannot go on from.

    Args:
        here: Settings of this run that it depends on.
        there: The same of the run that wrote it.
        starts: Factors in it.
        layers: That this run factorises.

    Raises:
        ValueError: Names what differs and the remedy.
    """
    differing = [f"{name}={there[name]} (here {here[name]})" for name in here if here[name] != there[name]]
    if missing := sorted(set(starts) - {layer.path for layer in layers}):
        differing.append(f"factors of {', '.join(missing)} (here kept whole)")
    if differing:
        raise ValueError(
            f"the checkpoint was written within an AB phase with {', '.join(differing)}: continue with the same, "
            "or begin with a full-rank phase by strategy.resume=consensus"
        )


def stored_starts(starts: Stored, layers: Sequence[ABFactor], device: torch.device) -> list[Start]:
    """The layers that were in factors, with these."""
    found: list[Start] = []
    for layer in layers:
        if layer.path in starts:
            a, b, *root = (t.to(device) for t in starts[layer.path])
            found.append((layer, Factors(a, b), root[0] if root else None))
    return found
