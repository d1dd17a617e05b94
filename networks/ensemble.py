"""An ensemble of networks that trains as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Mean of several networks, each trained on its own error (deep ensembles, Lakshminarayanan et al., NeurIPS 2017).

    The members start from different random weights and may differ in their settings. Averaging over unlike members
    takes the error that is not common to them: a member that fits one series badly costs little where it is good on
    another. Quantiles are averaged level by level, so that they stay in order.

    A module that trains it must sum the losses of `member_outputs`; the gradient of each member is then the one it
    has alone, and the ensemble is what training the members one by one on the same batches gives.

    Args:
        member: Makes a network from keyword arguments, e.g. ``functools.partial(ReCycleTransformer, ...)``.
        variants: Keyword arguments of each member that differ from those of ``member``; ``{}`` where none do.
    """

    def __init__(self, member: Callable[..., nn.Module], variants: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        if not variants:
            raise ValueError("net.variants=[] has no members; give a mapping for each, {} for a plain one.")
        members = []
        for i, variant in enumerate(variants):
            try:
                members.append(member(**variant))
            except (TypeError, ValueError) as error:
                raise ValueError(f"net.variants[{i}]={dict(variant)}: {error}") from error
        self.members = nn.ModuleList(members)

    def member_outputs(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """Output of every member, each (batch, time, channel[, quantile])."""
        return [member(batch) for member in self.members]

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean over the members, (batch, time, channel[, quantile])."""
        return torch.stack(self.member_outputs(batch)).mean(0)

    def penalty(self) -> Tensor:
        """Sum of the members' penalties."""
        penalties = [member.penalty() for member in self.members if hasattr(member, "penalty")]
        return torch.stack(penalties).sum() if penalties else torch.zeros(())
