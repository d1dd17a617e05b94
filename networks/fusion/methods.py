"""Every way to make one network of several, behind one function."""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from networks.fusion.alignment import average, match_layers, match_weights, permuted, require_equal_shapes
from networks.fusion.assembly import examined, require_members, tensors
from networks.fusion.greedy import keep_fitting
from networks.fusion.layout import ChannelGroups
from networks.fusion.reconstruction import recalibrate_bn, reconstruct
from networks.fusion.selection import keep_best
from networks.fusion.transplantation import provenance, transplant

Score = Callable[[nn.Module], float]
"""What a network is worth, for example its accuracy in validation; more is better."""


@dataclass
class FusionResult:
    """A network made of several.

    Attributes:
        model: The network, in evaluation mode; it shares no tensor with the members.
        method: How it was made.
        seconds: That it took.
        provenance: By group: how many channels come from every member; empty where channels are mixed.
        details: What else a method has to say.
    """

    model: nn.Module
    method: str
    seconds: float = 0.0
    provenance: dict[str, list[int]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What methods get.

    Attributes:
        members: The networks.
        groups: Of every network; empty for methods that need none.
        batches: Unlabelled inputs; empty where there are none.
        score: Of a network; None: not known.
    """

    members: Sequence[nn.Module]
    groups: Sequence[ChannelGroups]
    batches: Sequence[Tensor]
    score: Score | None

    def require_batches(self, method: str) -> None:
        """Refuse a method that needs inputs where there are none."""
        if not len(self.batches):
            raise ValueError(f"method {method} fits layers to the members on unlabelled inputs and needs some")

    def scored(self, method: str) -> list[float]:
        """The score of every member.

        Raises:
            ValueError: There is none.
        """
        if self.score is None:
            raise ValueError(f"method {method} chooses among the members and needs a score, as of validation data")
        return [self.score(member) for member in self.members]


class MeanOfOutputs(nn.Module):
    """The ensemble itself: the mean of what its members give."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *inputs: Any) -> Tensor:
        """The mean, of the shape that each member gives."""
        return torch.stack([member(*inputs) for member in self.members]).mean(0)


# ------------------------------------------------------------------------------------------------------------- methods


def _best(request: Request) -> FusionResult:
    scores = request.scored("best")
    best = max(range(len(scores)), key=scores.__getitem__)
    return FusionResult(copy.deepcopy(request.members[best]), "best", details={"member": best, "scores": scores})


def _ensemble(request: Request) -> FusionResult:
    return FusionResult(MeanOfOutputs([copy.deepcopy(member) for member in request.members]), "ensemble")


def _average(request: Request) -> FusionResult:
    return FusionResult(average(request.members), "average")


def _soup(request: Request) -> FusionResult:
    """Greedy soup (Wortsman et al., ICML 2022): members join the mean, best first, as long as it does not get worse."""
    scores = request.scored("soup")
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    chosen, value = order[:1], scores[order[0]]
    for k in order[1:]:
        found = request.score(average([request.members[j] for j in (*chosen, k)]))
        if found >= value:
            chosen, value = [*chosen, k], found
    model = average([request.members[j] for j in chosen])
    return FusionResult(model, "soup", details={"members": chosen, "score": value})


def _aligned(
    request: Request, match: Callable[..., dict[int, Tensor]], method: str, ridge: float | None = None
) -> FusionResult:
    first, *others = request.members
    groups = request.groups[0]
    require_equal_shapes([tensors(member) for member in request.members])
    orders = [match(first, other, groups) for other in others]
    model = average([first, *(permuted(other, groups, order) for other, order in zip(others, orders, strict=True))])
    if ridge is not None:
        request.require_batches(method)
        orders = [{g: torch.arange(groups.groups[g].width) for g in groups.free}, *orders]
        share = 1 / len(request.members)
        sources = {g: [(orders[0][g], order[g], share) for order in orders] for g in groups.free}
        reconstruct(model, sources, [share] * len(orders), request.members, request.groups, request.batches, ridge)
        recalibrate_bn(model, request.batches)
    return FusionResult(model, method)


def _rebasin(request: Request) -> FusionResult:
    return _aligned(request, match_weights, "rebasin")


def _rebasin_r(request: Request, ridge: float = 1e-2) -> FusionResult:
    return _aligned(request, match_weights, "rebasin_r", ridge)


def _ot(request: Request) -> FusionResult:
    return _aligned(request, match_layers, "ot")


def _nt(
    request: Request,
    order: str = "joint",
    fraction: float | None = None,
    target_width: float = 1.0,
    p: float = 2.0,
    weighting: str = "width",
    base: int = 2,
) -> FusionResult:
    found = transplant(request.members, request.groups, order, fraction, target_width, p, weighting, base)
    return FusionResult(
        found.network,
        "nt",
        provenance=provenance(request.groups[0], found.origin, len(request.members)),
        details={"scales": found.scales},
    )


def _nt_r(
    request: Request,
    order: str = "joint",
    fraction: float | None = None,
    target_width: float = 1.0,
    p: float = 2.0,
    weighting: str = "width",
    base: int = 2,
    ridge: float = 1e-2,
    channels: str = "norms",
) -> FusionResult:
    request.require_batches("nt_r")
    choose = keep_best
    if channels not in ("norms", "activations"):
        raise ValueError(f"channels={channels!r} is unknown; choose norms or activations")
    if channels == "activations":
        if order != "joint" or fraction is not None:
            raise ValueError("channels=activations chooses among all members at once: use order=joint, fraction=null")
        choose = functools.partial(keep_fitting, batches=request.batches, ridge=ridge)
    found = transplant(request.members, request.groups, order, fraction, target_width, p, weighting, base, choose)
    reconstruct(
        *(found.network, found.sources, found.scales, request.members, request.groups, request.batches), ridge=ridge
    )
    return FusionResult(
        recalibrate_bn(found.network, request.batches),
        "nt_r",
        provenance=provenance(request.groups[0], found.origin, len(request.members)),
        details={"scales": found.scales},
    )


METHODS: dict[str, Callable[..., FusionResult]] = {
    "best": _best,
    "ensemble": _ensemble,
    "average": _average,
    "soup": _soup,
    "rebasin": _rebasin,
    "rebasin_r": _rebasin_r,
    "ot": _ot,
    "nt": _nt,
    "nt_r": _nt_r,
}


_WHOLE = ("best", "ensemble", "average", "soup")  # need not know how channels are connected: any network will do


def options(method: str) -> list[str]:
    """What a method can be told.

    Raises:
        ValueError: The method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    return list(inspect.signature(METHODS[method]).parameters)[1:]


def fuse(
    members: Sequence[nn.Module],
    method: str,
    example: Sequence[Any],
    batches: Sequence[Tensor] = (),
    score: Score | None = None,
    recalibrate: bool = False,
    **settings: Any,
) -> FusionResult:
    """Make one network of several.

    Args:
        members: At least two, of one architecture; they are not changed. Methods that average need equal widths.
        method: ``average``, ``ot``, ``rebasin``, ``soup``, ``nt`` (transplantation), ``nt_r`` and ``rebasin_r`` (with
            layers fitted to the ensemble), ``best`` (member) or ``ensemble`` (all of them, no fusion).
        example: Arguments of a member's ``forward``: tells how its layers are connected.
        batches: Unlabelled inputs, for ``nt_r`` and for the statistics of batch normalisations.
        score: Of a network, for ``best`` and ``soup``.
        recalibrate: Whether running statistics are estimated anew on ``batches``; ``nt_r`` and
            ``rebasin_r`` do so anyway.
        **settings: Of the method: see `networks.fusion.transplantation.transplant`, and ``ridge`` of
            `networks.fusion.reconstruction.reconstruct`; ``channels`` of ``nt_r``: chosen by their ``norms``, or by
            what can be fitted to their ``activations`` (`networks.fusion.greedy`).

    Raises:
        ValueError: Names what is wrong with members or settings.
    """
    known = options(method)
    if unknown := [name for name in settings if name not in known]:
        raise ValueError(f"method {method} takes no {unknown[0]!r}; it takes {', '.join(known) or 'nothing'}")
    modes = [member.training for member in members]
    begin = time.perf_counter()
    try:
        for member in members:
            member.eval()
        if method in _WHOLE:
            require_members(members)
        groups = [] if method in _WHOLE else examined(members, example)
        result = METHODS[method](Request(members, groups, batches, score), **settings)
        if recalibrate and method not in ("best", "ensemble", "nt_r", "rebasin_r"):
            recalibrate_bn(result.model, batches)
    finally:
        for member, mode in zip(members, modes, strict=True):
            member.train(mode)
    result.model.eval()
    result.seconds = time.perf_counter() - begin
    return result
