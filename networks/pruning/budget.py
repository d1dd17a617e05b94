"""Structured pruning to a budget: the ratio that meets a part of the parameters, multiplications or latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from networks.pruning.cost import latencies, macs
from networks.pruning.groups import Allocation, Granularity, Keep, choose, shrink
from networks.pruning.weights import num_real

Budget = Literal["channels", "parameters", "macs", "latency"]


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
        repeats: Interleaved repeats of a measurement of latency.

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
    cost = _cost(budget, network, batch, repeats)
    low, high = 0.0, _highest(network, granularity, allocation)
    best: tuple[float, Keep] = (float("inf"), {})
    for step in range(steps):
        # The cheapest first: where it costs too much there is nothing to search.
        ratio = high if step == 0 else (low + high) / 2
        keep = choose(network, ratio, granularity, allocation)
        found = cost(shrink(network, keep))
        if step == 0:
            if found > part:
                raise ValueError(
                    f"part={part} of the {budget} cannot be reached by granularity={list(granularity)}: with one "
                    f"channel per group {found:.3f} is left; remove more kinds of channels, or ask for less"
                )
            best = abs(found - part), keep
            continue
        best = min(best, (abs(found - part), keep), key=lambda entry: entry[0])
        if found > part:
            low = ratio
        else:
            high = ratio
    return best[1]


def _highest(network: nn.Module, granularity: Sequence[Granularity], allocation: Allocation) -> float:
    """The highest ratio that leaves one channel everywhere."""
    if allocation == "uniform":
        return 1 - 1e-6
    from networks.pruning.groups import dim_groups

    groups = [group for group in dim_groups(network) if group.kind in granularity]
    units = sum(group.width for group in groups)
    return (units - len(groups)) / units if units else 0.0


def _cost(
    budget: Budget, network: nn.Module, batch: Mapping[str, Tensor] | None, repeats: int
) -> Callable[[nn.Module], float]:
    """The cost of a smaller network as a part of that of the network."""
    if budget == "parameters":
        total = num_real(network)
        return lambda small: num_real(small) / total
    if budget == "macs":
        whole = macs(network, batch)
        return lambda small: macs(small, batch) / whole

    def ratio(small: nn.Module) -> float:
        own, dense = latencies([small, network], batch, repeats)
        return own / dense

    return ratio
