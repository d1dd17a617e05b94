"""How a node combines what it is with what all nodes were: equations (1) and (2) of docs/experiments/daso.md."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

MergeRule = Literal["delta", "paper"]


def merge(rule: MergeRule, x: Tensor, sent: Tensor, mean: Tensor, waited: int, nodes: int) -> Tensor:
    """Combine fresh and stale parameters.

    Args:
        rule: ``paper``: ``(2 W x + P mean) / (2 W + P)``, Coquelin et al. (2022), with the weight 1 in place of 2 W
            where nothing was waited; ``delta``: ``x + mean - sent``, which leaves the mean over the nodes as it is.
        x: x_i(t+W), of this node after the step at which it merges.
        sent: x_i(t), of this node when it sent.
        mean: mean_j x_j(t) over all nodes.
        waited: W, the steps between.
        nodes: P.
    """
    if rule == "delta":
        return (mean - sent).add_(x)
    local = 2 * waited or 1
    return (local * x).add_(mean, alpha=nodes).div_(local + nodes)
