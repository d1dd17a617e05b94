"""Finding the groups of channels of a network: it is run once on an example, and every function it calls is followed.

Nothing is assumed of the class of the network: what counts are the functions that `forward` calls (linear layers,
convolutions, normalisations, additions, concatenations, reshapes, pooling, functions entry by entry). Attention is
known as a module. Anything else is refused by name; `register` teaches a new function, `register_module` a new module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from networks.fusion import tracing_attention, tracing_rules  # noqa: F401 - they register what they know
from networks.fusion.layout import ChannelGroups
from networks.fusion.tracer import Along, Tracer, UnsupportedNetworkError, Value, register, register_module, tensors_in

__all__ = ["Along", "Tracer", "UnsupportedNetworkError", "Value", "register", "register_module", "trace"]


@torch.no_grad()
def trace(network: nn.Module, *example: Any) -> ChannelGroups:
    """The groups of channels of a network.

    Args:
        network: Any module whose functions are known (see `register`).
        example: Arguments of its ``forward``; one item is enough. They decide how many pixels a channel has where
            features are flattened, and nothing else.

    Raises:
        UnsupportedNetworkError: Names the module and the function that is not known.
    """
    if not tensors_in(list(example)):
        raise ValueError("tracing needs an example: the tensors that the network is called with")
    tracer = Tracer(network)
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with tracer:
            output = network(*example)
    finally:
        tracer.close()
        for module in training:
            module.training = True
    return tracer.groups(output)
