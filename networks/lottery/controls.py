"""Controls: what is left of a ticket when its mask or its initial weights are exchanged for random ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from networks.masks import density

Control = Literal["none", "reinit", "shuffle_global", "shuffle_even", "shuffle_layerwise"]
CONTROLS = get_args(Control)
Draw = Literal["uniform", "normal"]
DRAWS = get_args(Draw)


def shuffled(masks: Mapping[str, Tensor], control: Control, generator: torch.Generator) -> dict[str, Tensor]:
    """The masks of a control.

    - ``shuffle_global``: all masks behind each other in one random order, cut apart again; small layers may lose all.
    - ``shuffle_even``: every layer gets a random mask of the global density.
    - ``shuffle_layerwise``: every mask in a random order; the densities of layers stay.
    - ``none``, ``reinit``: as they are.

    Args:
        masks: Of the ticket.
        control: Which one.
        generator: Of the permutations, on the CPU.

    Raises:
        ValueError: The control is unknown.
    """
    if control not in CONTROLS:
        raise ValueError(f"control={control!r} is unknown; choose one of {', '.join(CONTROLS)}")
    if control == "shuffle_global":
        flat = torch.cat([mask.flatten() for mask in masks.values()])
        flat = flat[torch.randperm(len(flat), generator=generator)]
        parts = flat.split([mask.numel() for mask in masks.values()])
        return {name: part.view(masks[name].shape).clone() for name, part in zip(masks, parts, strict=True)}
    if control == "shuffle_even":
        part = density(masks)
        return {n: _random_mask(m.shape, round(part * m.numel()), generator) for n, m in masks.items()}
    if control == "shuffle_layerwise":
        return {name: _random_mask(mask.shape, int(mask.sum()), generator) for name, mask in masks.items()}
    return {name: mask.clone() for name, mask in masks.items()}


def _random_mask(shape: torch.Size, alive: int, generator: torch.Generator) -> Tensor:
    flat = torch.zeros(shape.numel(), dtype=torch.bool)
    flat[torch.randperm(len(flat), generator=generator)[:alive]] = True
    return flat.view(shape)


def draw_weights(network: nn.Module, how: Draw = "uniform", generator: torch.Generator | None = None) -> None:
    """Draw the weights (or their means) of all linear and convolutional layers anew, in place.

    ``uniform``: U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases. ``normal``: N(0, 2/fan_in) for weights
    (Kaiming normal), uniform biases. Standard deviations of Bayesian layers stay.

    Args:
        network: The network.
        how: Which distribution.
        generator: On the CPU; None: the global one.

    Raises:
        ValueError: The distribution is unknown.
    """
    if how not in DRAWS:
        raise ValueError(f"init={how!r} is unknown; choose one of {', '.join(DRAWS)}")
    for module in network.modules():
        found = {name: getattr(module, name, None) for name in ("weight_mu", "bias_mu")}
        if not isinstance(found["weight_mu"], nn.Parameter):
            if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                continue
            found = {"weight_mu": module.weight, "bias_mu": module.bias}
        weight, bias = found["weight_mu"], found["bias_mu"]
        fan_in = weight[0].numel()
        bound = 1 / math.sqrt(fan_in)
        with torch.no_grad():
            drawn = torch.empty(weight.shape, dtype=weight.dtype)
            if how == "normal":
                drawn.normal_(0.0, math.sqrt(2 / fan_in), generator=generator)
            else:
                drawn.uniform_(-bound, bound, generator=generator)
            weight.copy_(drawn)
            if bias is not None:
                bias.copy_(torch.empty(bias.shape, dtype=bias.dtype).uniform_(-bound, bound, generator=generator))
