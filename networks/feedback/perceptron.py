"""The fully connected network of the paper: wide layers with tanh (F3, section 2.5)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

Activation = Literal["tanh", "relu", "gelu", "sigmoid"]
_ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "sigmoid": nn.Sigmoid}


class Perceptron(nn.Sequential):
    """Inputs flattened, ``depth`` hidden layers of equal width, a linear layer.

    Maps (batch, *input_shape) to raw outputs (batch, num_outputs).

    Args:
        input_shape: Of one sample.
        num_outputs: Classes or values.
        depth: Hidden layers; 0: a linear map.
        width: Their features.
        activation: After each of them.

    Raises:
        ValueError: Names the argument.
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        num_outputs: int = 10,
        depth: int = 1,
        width: int = 500,
        activation: Activation = "tanh",
    ) -> None:
        for key, value, least in (("depth", depth, 0), ("width", width, 1), ("num_outputs", num_outputs, 1)):
            if value < least:
                raise ValueError(f"model.net.{key}={value}: must be at least {least}")
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"model.net.activation={activation!r} is unknown; choose one of {', '.join(get_args(Activation))}"
            )
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise([math.prod(input_shape), *[width] * depth]):
            layers += [nn.Linear(inputs, outputs), _ACTIVATIONS[activation]()]
        last = width if depth else math.prod(input_shape)
        super().__init__(*layers, nn.Linear(last, num_outputs))
        self.num_classes = num_outputs
