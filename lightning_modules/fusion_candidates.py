"""What a fusion is told: candidates with their defaults and controls, checked; the networks that take part in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from networks.fusion.assembly import examined
from networks.fusion.methods import METHODS, options
from networks.fusion.transplantation import transplant

OBJECTIVES = ("labels", "distill")
# What a result means nothing without: the best member, trained as long as the fused networks.
CONTROLS: dict[str, dict[str, Any]] = {
    "member": {"method": "best"},
    "member_distill": {"method": "best", "objective": "distill"},
}
_SHAPING = ("target_width",)  # settings of a candidate that decide its shape


class Contest(nn.Module):
    """The members of an ensemble and the networks that are made of them.

    Args:
        members: The ensemble.
        fused: Networks of a member's inputs and outputs, by name.
        main: Name of the one that stands for the result.
    """

    def __init__(self, members: Sequence[nn.Module], fused: Mapping[str, nn.Module], main: str) -> None:
        super().__init__()
        self.members, self.fused, self.main = nn.ModuleList(members), nn.ModuleDict(fused), main
        first = members[0]
        for name in ("num_classes", "num_channels"):
            if hasattr(first, name):
                setattr(self, name, getattr(first, name))

    def ensemble(self, image: Tensor) -> Tensor:
        """Mean of the members' logits, (batch, class)."""
        return torch.stack([member(image) for member in self.members]).mean(0)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the main fused network, (batch, class)."""
        return self.fused[self.main](image)


def checked(candidates: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Candidates with their defaults, and the controls."""
    found: dict[str, dict[str, Any]] = {}
    for name, given in {**candidates, **{n: one for n, one in CONTROLS.items() if n not in candidates}}.items():
        if given is None:  # taken away by an experiment
            continue
        one = {"objective": "labels", **given}
        where = f"model.candidates.{name}"
        if not str(name).isidentifier() or (str(name).startswith("member_") and name not in CONTROLS):
            raise ValueError(f"{where}: a name has letters, digits and _ and does not begin with member_")
        if name in ("ensemble", "members", "best_member", "main") or hasattr(nn.ModuleDict, name):
            raise ValueError(f"{where}: the name is taken; choose another one")
        if one.get("method") not in METHODS or one["method"] == "ensemble":
            known = ", ".join(method for method in METHODS if method != "ensemble")
            raise ValueError(f"{where}.method={one.get('method')!r} is unknown; choose one of {known}")
        if one["objective"] not in OBJECTIVES:
            raise ValueError(f"{where}.objective={one['objective']!r} is unknown; choose {' or '.join(OBJECTIVES)}")
        known = options(one["method"])
        for key in one:
            if key not in ("method", "objective", *known):
                raise ValueError(f"{where}.{key}: method {one['method']} takes {', '.join(known) or 'no settings'}")
        found[str(name)] = one
    return found


def check(**values: Any) -> None:
    """Raise ValueError, with the argument and the remedy, for what a fusion cannot be told."""
    if values["num_members"] < 2:
        raise ValueError(f"model.num_members={values['num_members']}: fusion needs at least 2 members")
    epochs, paths = values["member_epochs"]
    if epochs < 0 or (epochs == 0 and paths is None):
        raise ValueError(f"model.member_epochs={epochs}: must be at least 1, or 0 with model.members (trained before)")
    for key in ("main", "predict_with"):
        name, candidates = values[key]
        if name not in candidates and not (key == "predict_with" and name in ("main", "ensemble")):
            raise ValueError(f"model.{key}={name!r} is no candidate; choose one of {', '.join(candidates)}")
    if values["synchronize"] is not None and values["synchronize"] not in METHODS:
        raise ValueError(
            f"model.synchronize={values['synchronize']!r} is unknown; choose one of {', '.join(METHODS)}, or null"
        )
    if values["temperature"] <= 0:
        raise ValueError(f"model.temperature={values['temperature']}: must be positive")
    inputs, views = values["num_inputs"]
    if inputs < 1 or views < 0:
        raise ValueError(f"model.num_inputs={inputs}, model.input_views={views}: at least 1 image, at least 0 views")
    if any(epoch < 0 for epoch in values["report_epochs"]):
        raise ValueError(f"model.report_epochs={list(values['report_epochs'])}: must not be negative")


def shape_of(members: Sequence[nn.Module], candidate: Mapping[str, Any], example: tuple[Tensor, ...]) -> nn.Module:
    """A network of the shape that a candidate will have."""
    settings = {key: candidate[key] for key in _SHAPING if key in candidate}
    if not settings:
        return copy.deepcopy(members[0])
    return transplant(members, examined(members, example), **settings).network
