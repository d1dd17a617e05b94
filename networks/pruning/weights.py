"""Which single weights may be pruned, and what a network keeps (pruning study, section 2.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from networks.series.dlinear import TimeLinear

Masks = dict[str, Tensor]
"""Boolean, True where a weight stays, by name of the parameter; of complex pairs (..., 2) one per number, (...)."""


@dataclass(frozen=True)
class PrunableWeight:
    """One weight tensor of the set S.

    Attributes:
        path: Of the module that owns it.
        module: That module.
        attribute: Name of the parameter in it.
        paired: Whether the last axis holds real and imaginary part, which go together.
    """

    path: str
    module: nn.Module
    attribute: str = "weight"
    paired: bool = False

    @property
    def name(self) -> str:
        """Name of the parameter in the network's ``state_dict``."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter."""
        return getattr(self.module, self.attribute)

    @property
    def reals(self) -> int:
        """Real numbers of one entry: 2 of a complex one."""
        return 2 if self.paired else 1

    @property
    def numel(self) -> int:
        """Entries that are kept or removed."""
        return self.tensor.numel() // self.reals

    @property
    def mask_name(self) -> str:
        """Name of the buffer that holds the mask."""
        return f"{self.attribute}_mask"

    @property
    def is_masked(self) -> bool:
        """Whether it has a mask."""
        return isinstance(getattr(self.module, self.mask_name, None), Tensor)

    @property
    def mask(self) -> Tensor:
        """The mask, all True where none was set."""
        shape = self.tensor.shape[:-1] if self.paired else self.tensor.shape
        mask = getattr(self.module, self.mask_name, None)
        return torch.ones(shape, dtype=torch.bool, device=self.tensor.device) if mask is None else mask

    def magnitude(self, tensor: Tensor | None = None) -> Tensor:
        """Absolute value of every entry, of the weight or of a tensor of its shape."""
        values = (self.tensor if tensor is None else tensor).detach()
        return values.norm(dim=-1) if self.paired else values.abs()

    def spread(self, mask: Tensor) -> Tensor:
        """The mask in the shape of the parameter."""
        return mask.unsqueeze(-1).expand_as(self.tensor) if self.paired else mask


def prunable_weights(
    network: nn.Module, channels: int, include_complex: bool = False, exclude_output: bool = True
) -> list[PrunableWeight]:
    """The set S, in the order of the network.

    Weights (no biases) of every linear layer and every 1-d convolution, those of torch's attention and the linear maps
    along time included. Left out are layers with one output, or with one per series: they write the forecast. Bare
    parameters, norms and tables of positions are never pruned, complex kernels only where that is asked for.

    Args:
        network: Any network.
        channels: Series of the data, by which output layers are known (also where the data has other than 7 of them).
        include_complex: Whether complex kernels (FEDformer) belong to S, an entry being a complex number.
        exclude_output: Whether output layers are left out.

    Raises:
        ValueError: Nothing is left.
    """
    found, seen = [], set()
    for path, module in network.named_modules():
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, nn.Linear | nn.Conv1d):
            outputs = {channels} if isinstance(module, nn.Conv1d) else {1, channels}
            if not (exclude_output and len(module.weight) in outputs):
                found.append(PrunableWeight(path, module))
        elif isinstance(module, TimeLinear):
            found.append(PrunableWeight(path, module))
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.append(PrunableWeight(path, module, "in_proj_weight"))
        elif include_complex and isinstance(getattr(module, "kernel", None), nn.Parameter):
            found.append(PrunableWeight(path, module, "kernel", paired=True))
    if not found:
        raise ValueError(
            f"{type(network).__name__} has no weight that may be pruned (linear layers and convolutions other than the "
            "output's): choose another model, or callbacks.pruning.exclude_output=false"
        )
    return found


# ---------------------------------------------------------------------------------------------------------------- masks


def apply_masks(weights: Iterable[PrunableWeight], masks: Mapping[str, Tensor]) -> None:
    """Set weights to zero where their mask is False, and keep the masks as buffers beside them.

    A buffer ``weight_mask`` is what `networks.masks` calls a mask, so that tickets and loading of runs know it.
    """
    for weight in weights:
        mask = masks[weight.name].to(weight.tensor.device)
        if weight.is_masked:
            getattr(weight.module, weight.mask_name).copy_(mask)
        else:
            weight.module.register_buffer(weight.mask_name, mask.clone())
    enforce(weights)


def enforce(weights: Iterable[PrunableWeight]) -> None:
    """Set what is masked to zero once more, after a step of an optimizer."""
    with torch.no_grad():
        for weight in weights:
            if weight.is_masked:
                weight.tensor.mul_(weight.spread(weight.mask))


def mask_gradients(weights: Iterable[PrunableWeight]) -> None:
    """Set gradients of what is masked to zero: a norm of the gradient then counts what is trained."""
    for weight in weights:
        if weight.tensor.grad is not None and weight.is_masked:
            weight.tensor.grad.mul_(weight.spread(weight.mask))


def remove_masks(network: nn.Module) -> None:
    """Forget masks; zeros stay zeros."""
    for module in network.modules():
        for name in [name for name in module._buffers if name.endswith("_mask")]:
            owner = name.removesuffix("_mask")
            if isinstance(module._parameters.get(owner), nn.Parameter):
                del module._buffers[name]


def masks_in(network: nn.Module) -> Masks:
    """Copies of all masks of a network by name of their parameter."""
    found = {}
    for path, module in network.named_modules():
        for name, buffer in module._buffers.items():
            owner = name.removesuffix("_mask")
            if name.endswith("_mask") and isinstance(buffer, Tensor) and owner in module._parameters:
                found[f"{path}.{owner}" if path else owner] = buffer.detach().cpu().clone()
    return found


def make_room(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give modules the buffers of masks that a ``state_dict`` holds, so that it can be loaded."""
    for name, value in state.items():
        path, _, buffer = name.rpartition(".")
        owner = buffer.removesuffix("_mask")
        if buffer.endswith("_mask"):
            module = network.get_submodule(path)
            if owner in module._parameters and module._buffers.get(buffer) is None:
                module.register_buffer(buffer, torch.ones(value.shape, dtype=torch.bool, device=value.device))


# ------------------------------------------------------------------------------------------------------------ densities


def num_real(network: nn.Module) -> int:
    """Real numbers of a network: those of complex parameters are two each."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in network.parameters())


@dataclass(frozen=True)
class Density:
    """What is left of a network.

    Attributes:
        prunable: Part of S.
        model: Part of all real numbers of the network.
        alive: Real numbers that are left.
        total: Real numbers of the dense network.
        covered: Part of them that S holds.
        layers: Part that is left of every tensor of S.
    """

    prunable: float
    model: float
    alive: int
    total: int
    covered: float
    layers: dict[str, float]


def density(network: nn.Module, weights: Sequence[PrunableWeight]) -> Density:
    """Count what the masks of a network leave."""
    total = num_real(network)
    reals = sum(weight.numel * weight.reals for weight in weights)
    kept = {w.name: w.numel if not w.is_masked else int(w.mask.sum()) for w in weights}
    gone = sum((weight.numel - kept[weight.name]) * weight.reals for weight in weights)
    layers = {weight.name: kept[weight.name] / weight.numel for weight in weights}
    return Density(1 - gone / reals, 1 - gone / total, total - gone, total, reals / total, layers)
