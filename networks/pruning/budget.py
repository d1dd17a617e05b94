"""Structured pruning to a budget: the ratio that meets a part of the parameters, multiplications or latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from networks.pruning.cost import latencies, macs
from networks.pruning.groups import Allocation, Granularity, Keep, choose, dim_groups, shrink
from networks.pruning.weights import num_real

Budget = Literal["channels", "parameters", "macs", "latency"]
FINALISTS = 3
"""Networks of a search for a latency that are measured again at its end."""


def keep_for(
    network: nn.Module,
    part: float,
    budget: Budget = "parameters",
    granularity: Sequence[Granularity] = ("ff", "qk", "v", "stream"),
    allocation: Allocation = "uniform",
    batch: Mapping[str, Tensor] | None = None,
    steps: int = 10,
    repeats: int = 7,
) -> Keep:
    """Channels that stay so that the smaller network costs a part of what the network does.

    Args:
        network: Declares groups.
        part: Of the cost, in (0, 1].
        budget: ``channels``: the part of the channels themselves. ``parameters``, ``macs``, ``latency``: the ratio is
            found by bisection; of networks that cost more and less than the part, the one nearest to it.
        granularity: See `networks.pruning.groups.choose`.
        allocation: See there.
        batch: One batch, for ``macs`` and ``latency``.
        steps: Of the bisection; each measures one network.
        repeats: Interleaved repeats of a measurement of latency; twice as many for the networks that came nearest.

    Raises:
        ValueError: The part is out of range, the budget is unknown, or even one channel per group costs more.
    """
    if budget not in get_args(Budget):
        raise ValueError(f"budget={budget!r} is unknown; choose one of {', '.join(get_args(Budget))}")
    if not 0 < part <= 1:
        raise ValueError(f"part={part} of the {budget} must lie in (0, 1]")
    if budget != "channels" and batch is None and budget != "parameters":
        raise ValueError(f"budget={budget!r} is measured on a batch: give one")
    if part == 1:
        return {}
    if budget == "channels":
        return choose(network, 1 - part, granularity, allocation)
    cost = _cost(budget, network, batch)
    low, high = 0.0, _highest(network, granularity, allocation)
    tried: dict[tuple[tuple[str, int], ...], tuple[float, Keep]] = {}  # by what is left: steps may meet again
    for step in range(steps):
        # The cheapest first: where it costs too much there is nothing to search.
        ratio = high if step == 0 else (low + high) / 2
        keep = choose(network, ratio, granularity, allocation)
        (found,) = cost([shrink(network, keep)], repeats)
        if step == 0 and found > part:
            raise ValueError(
                f"part={part} of the {budget} cannot be reached by granularity={list(granularity)}: with one "
                f"channel per group {found:.3f} is left; remove more kinds of channels, or ask for less"
            )
        tried[tuple((name, len(left)) for name, left in keep.items())] = abs(found - part), keep
        low, high = (ratio, high) if found > part else (low, ratio)
    nearest = sorted(tried.values(), key=lambda entry: entry[0])
    if budget != "latency":
        return nearest[0][1]
    # A measurement that was disturbed may lie nearest by mistake: the best of them once more, side by side.
    keeps = [keep for _, keep in nearest[:FINALISTS]]
    found = cost([shrink(network, keep) for keep in keeps], 2 * repeats)
    return keeps[min(range(len(keeps)), key=lambda i: abs(found[i] - part))]


def _highest(network: nn.Module, granularity: Sequence[Granularity], allocation: Allocation) -> float:
    """The highest ratio that leaves one channel everywhere."""
    if allocation == "uniform":
        return 1 - 1e-6
    groups = [group for group in dim_groups(network) if group.kind in granularity]
    units = sum(group.width for group in groups)
    return (units - len(groups)) / units if units else 0.0


def _cost(
    budget: Budget, network: nn.Module, batch: Mapping[str, Tensor] | None
) -> Callable[[Sequence[nn.Module], int], list[float]]:
    """The cost of smaller networks as parts of that of the network; the number is that of repeats of a measurement."""
    if budget == "parameters":
        total = num_real(network)
        return lambda smaller, _: [num_real(small) / total for small in smaller]
    if budget == "macs":
        whole = macs(network, batch)
        return lambda smaller, _: [macs(small, batch) / whole for small in smaller]

    def ratios(smaller: Sequence[nn.Module], repeats: int) -> list[float]:
        *own, dense = latencies([*smaller, network], batch, repeats)
        return [seconds / dense for seconds in own]

    return ratios
