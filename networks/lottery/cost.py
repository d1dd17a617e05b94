"""What a ticket costs: seconds of the ways to a sparse Bayesian network, multiplications that are left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from networks.masks import masked_weights


@dataclass(frozen=True)
class Cost:
    """Seconds of two ways to a Bayesian ticket of one level.

    Attributes:
        level: n.
        full: Pruning the Bayesian network: levels 0 to n of it.
        transplanted: Pruning the ordinary network, then training the Bayesian one once.
    """

    level: int
    full: float
    transplanted: float

    @property
    def saving(self) -> float:
        """Part of the full cost that transplantation saves; negative where it costs more."""
        return 1 - self.transplanted / self.full


def transplant_cost(
    level: int,
    deterministic: float | Sequence[float],
    bayesian: float | Sequence[float],
    trained: bool = False,
    once: float | None = None,
) -> Cost:
    """Cost of a transplanted ticket against that of the Bayesian search.

    The mask of level n is known after n levels of the ordinary network (0 to n - 1); its trained weights after one
    more.

    Args:
        level: n.
        deterministic: Seconds of each level of the ordinary network, or one number for all.
        bayesian: The same of the Bayesian network.
        trained: Whether the ticket's trained weights are transplanted.
        once: Seconds of the Bayesian training on the transplanted ticket; None: those of a Bayesian level.

    Raises:
        ValueError: A level is negative or was not measured.
    """
    if level < 0:
        raise ValueError(f"level={level}: must not be negative")
    full = _sum(bayesian, level + 1, "bayesian")
    search = _sum(deterministic, level + int(trained), "deterministic")
    if once is None:
        once = bayesian if isinstance(bayesian, int | float) else bayesian[level]
    return Cost(level, full, search + once)


def _sum(seconds: float | Sequence[float], number: int, what: str) -> float:
    if isinstance(seconds, int | float):
        return float(seconds) * number
    if len(seconds) < number:
        raise ValueError(f"{what}: seconds of {number} levels are needed, {len(seconds)} were measured")
    return float(sum(seconds[:number]))


def multiplications(network: nn.Module, example: Tensor) -> tuple[int, int]:
    """(of the dense network, of the weights alive): multiplications of one input in linear and convolutional layers.

    Layers without a mask count in both.

    Args:
        network: The network, called once in evaluation mode without gradients.
        example: A batch of inputs.
    """
    masks: Mapping[int, Tensor] = {id(w.module): w.mask for w in masked_weights(network)}
    counted = [0, 0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = getattr(module, "weight_mu", None)
        weight = module.weight if weight is None else weight
        # Linear: one output vector per token; convolutions: one per place.
        places = output.numel() // (len(weight) * len(example))
        mask = masks.get(id(module))
        counted[0] += weight.numel() * places
        counted[1] += (weight.numel() if mask is None else int(mask.sum())) * places

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = [m for m in network.modules() if isinstance(m, kinds) or hasattr(m, "weight_mu")]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    training = network.training
    try:
        network.eval()
        with torch.no_grad():
            network(example)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return counted[0], counted[1]
