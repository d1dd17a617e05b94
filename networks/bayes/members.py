"""Deep ensembles as samples: layers that hold the weights of several networks (Lakshminarayanan et al., 2017).

What a Gaussian posterior draws, an ensemble looks up: sample s is network s. Samples are computed together, spread over
processes and averaged in evaluation just the same.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from typing_extensions import override

from networks.bayes.context import SampleContext, current
from networks.bayes.convert import replace_modules


class Members(nn.Module):
    """A linear or convolutional layer of M networks: ``weight`` (M, out, ...), ``bias`` (M, out) or None.

    The first network has the weights of the layer that was given. The others have the same numbers in random order,
    which is another draw of any initialisation with independent entries.

    Args:
        layer: `torch.nn.Linear` or a convolution of it.
        members: M.
    """

    def __init__(self, layer: nn.Module, members: int) -> None:
        super().__init__()
        self.members = members
        for name in ("weight", "bias"):
            given = getattr(layer, name)
            self.register_parameter(name, None if given is None else nn.Parameter(_redrawn(given.detach(), members)))
        # The layer itself maps, with weights that are lent to it: it knows padding and stride.
        self._layer = [copy.deepcopy(layer).requires_grad_(False)]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, ...)`` or, network after network, ``(S B, ...)`` to ``(S B, ...)``.

        Raises:
            RuntimeError: Outside of a `SampleContext`: there is no mean of networks.
            ValueError: If the context asks for more samples than there are networks.
        """
        context = current()
        if context is None:
            raise RuntimeError("an ensemble was called without samples: enter a networks.bayes.SampleContext")
        if max(context.ids) >= self.members:
            raise ValueError(f"sample {max(context.ids)} of an ensemble of {self.members} networks")
        if isinstance(self._layer[0], nn.Linear):
            return self._linear(x, context)
        parts = context.by_sample(x) if context.is_folded(x) else [x] * context.samples
        biases = [None] * self.members if self.bias is None else self.bias
        maps = self._layer[0]._conv_forward
        return torch.cat([maps(one, self.weight[s], biases[s]) for one, s in zip(parts, context.ids, strict=True)])

    def _linear(self, x: Tensor, context: SampleContext) -> Tensor:
        folded, inner = context.is_folded(x), x.shape[1:-1]
        ids = torch.tensor(context.ids, device=x.device)
        rows = x.reshape(context.samples if folded else 1, -1, x.shape[-1]).expand(context.samples, -1, -1)
        weight = self.weight[ids].mT
        out = torch.bmm(rows, weight) if self.bias is None else torch.baddbmm(self.bias[ids].unsqueeze(1), rows, weight)
        return out.reshape(-1, *inner, out.shape[-1])

    @override
    def extra_repr(self) -> str:
        return f"{self.members} x {self._layer[0]}"


def _redrawn(given: Tensor, members: int) -> Tensor:
    """The given numbers, then the same in other orders, ``(M, *given.shape)``."""
    others = [given.flatten()[torch.randperm(given.numel(), device=given.device)] for _ in range(members - 1)]
    return torch.stack([given, *(other.view_as(given) for other in others)])


def to_ensemble(net: nn.Module, members: int) -> nn.Module:
    """Replace the linear and convolutional layers of a network by `Members`, in place.

    Everything else, normalisation in particular, is shared by the networks.

    Args:
        net: The network.
        members: M, networks.

    Raises:
        ValueError: For less than one network, and where there is no such layer.
    """
    if members < 1:
        raise ValueError(f"model.num_samples={members}: an ensemble has at least one network")
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found: dict[int, Members] = {id(m): Members(m, members) for m in net.modules() if type(m) in kinds}
    if not found:
        raise ValueError("model.net: no linear or convolutional layer is left for model.posterior=ensemble")
    return replace_modules(net, lambda module: found.get(id(module), module))
