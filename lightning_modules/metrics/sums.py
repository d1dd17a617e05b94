"""Metrics whose sums keep their type, whatever the precision of the network is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override


class Sums(Metric):
    """Base of metrics that are sums of float64.

    ``module.to(torch.bfloat16)``, which ``trainer.precision=bf16-true`` calls, also turns the states of a
    `torchmetrics.Metric` into numbers of 8 bits (``bfloat16()`` does not): 287 right answers would count as 288.
    """

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(keeping_type(fn), exclude_state)


def keeping_type(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What moves tensors to a device, or changes their type as well, without changing their type."""

    def moved(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return new if new.dtype == tensor.dtype else tensor.to(new.device)

    return moved
