"""Masks on weights: one interface for ordinary and for Bayesian layers.

A weight that a mask leaves out is no parameter any more: it vanishes from the forward pass, whatever its value (NaN
included), and gets no gradient. Ordinary `Linear` and `Conv1d/2d/3d` keep their object and change their class, so that
names, hooks and references stay what they were; Bayesian layers (those with parameters ``weight_mu`` and
``weight_log_sigma``) bring a buffer ``weight_mask`` themselves, which takes pruned weights out of the noise and of the
KL divergence as well. In both kinds the mask is a boolean buffer ``weight_mask`` beside the weight.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

MEAN, LOG_SIGMA, MASK = "weight_mu", "weight_log_sigma", "weight_mask"


class _Masked:
    """What the masked layers share: a boolean buffer of the weight's shape."""

    weight: nn.Parameter
    weight_mask: Tensor

    def _alive(self) -> Tensor:
        return torch.where(self.weight_mask, self.weight, self.weight.new_zeros(()))


class MaskedLinear(_Masked, nn.Linear):
    """`torch.nn.Linear` with a mask on its weight."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs (..., in) -> (..., out)``."""
        return F.linear(inputs, self._alive(), self.bias)


class _MaskedConv(_Masked):
    def forward(self, inputs: Tensor) -> Tensor:
        """The convolution with the weights that are alive."""
        return self._conv_forward(inputs, self._alive(), self.bias)  # type: ignore[attr-defined]


class MaskedConv1d(_MaskedConv, nn.Conv1d):
    """`torch.nn.Conv1d` with a mask on its weight."""


class MaskedConv2d(_MaskedConv, nn.Conv2d):
    """`torch.nn.Conv2d` with a mask on its weight."""


class MaskedConv3d(_MaskedConv, nn.Conv3d):
    """`torch.nn.Conv3d` with a mask on its weight."""


_MASKED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: MaskedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Conv3d: MaskedConv3d,
}
_KINDS = (*_MASKED, *_MASKED.values())


class MaskedWeight:
    """The weight of one layer and its mask.

    Attributes:
        path: Of the layer in the network, ``layers.0``.
        module: The layer.
        bayesian: Whether the weight is a Gaussian, with mean ``mu`` and ``log_sigma``.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self.bayesian = _is_bayesian(module)

    @property
    def name(self) -> str:
        """Name of the weight in the ``state_dict`` of the ordinary network, ``layers.0.weight``, for both kinds."""
        return f"{self.path}.weight" if self.path else "weight"

    @property
    def label(self) -> str:
        """Name for people: the path, without the attribute that a LightningModule keeps its network in."""
        return self.path.removeprefix("net.") or "weight"

    @property
    def mu(self) -> nn.Parameter:
        """The weight, or its mean."""
        return getattr(self.module, MEAN if self.bayesian else "weight")

    @property
    def log_sigma(self) -> nn.Parameter | None:
        """Logarithm of the standard deviation; None for an ordinary layer."""
        return getattr(self.module, LOG_SIGMA) if self.bayesian else None

    @property
    def fan_in(self) -> int:
        """Inputs of one output."""
        return self.mu[0].numel()

    @property
    def prior(self) -> tuple[float, float]:
        """Mean and standard deviation of the prior of the weight; N(0, 1) for an ordinary layer."""
        return self.module.prior.of_layer(self.fan_in) if self.bayesian else (0.0, 1.0)

    @property
    def mask(self) -> Tensor:
        """Boolean, of the weight's shape; all True where no mask was set."""
        mask = getattr(self.module, MASK, None)
        return torch.ones_like(self.mu, dtype=torch.bool) if mask is None else mask

    def set_mask(self, mask: Tensor) -> None:
        """Set the mask, which becomes part of the network's ``state_dict``.

        Raises:
            ValueError: For a mask of another shape.
        """
        if mask.shape != self.mu.shape:
            raise ValueError(f"the mask of {self.name} has shape {list(mask.shape)}, the weight {list(self.mu.shape)}")
        mask = mask.detach().to(device=self.mu.device, dtype=torch.bool)
        if isinstance(getattr(self.module, MASK, None), Tensor):
            with torch.no_grad():
                getattr(self.module, MASK).copy_(mask)
            return
        if type(self.module) in _MASKED:
            self.module.__class__ = _MASKED[type(self.module)]
        self.module.register_buffer(MASK, mask.clone())


def _is_bayesian(module: nn.Module) -> bool:
    return MEAN in module._parameters and LOG_SIGMA in module._parameters


class PruneChoice:
    """Chooses the layers whose weights may be pruned.

    Args:
        include: Patterns of layer names (``layers.*``); None: every linear and convolutional layer.
        exclude: Patterns of layers that stay dense.
        keep_last: Whether the last layer, which gives the classes, stays dense.
    """

    def __init__(
        self, include: Sequence[str] | None = None, exclude: Sequence[str] = (), keep_last: bool = True
    ) -> None:
        for key, patterns in (("include", include), ("exclude", exclude)):
            if isinstance(patterns, str):
                raise ValueError(f"model.prunable.{key}={patterns!r} must be a list of patterns: [{patterns!r}]")
        self.include = None if include is None else tuple(include)
        self.exclude, self.keep_last = tuple(exclude), keep_last

    def __call__(self, network: nn.Module) -> list[MaskedWeight]:
        """The chosen weights in the order in which the network defines them.

        Raises:
            ValueError: A pattern matches nothing, nothing is left, or two layers share one weight.
        """
        found = [MaskedWeight(p, m) for p, m in network.named_modules() if type(m) in _KINDS or _is_bayesian(m)]
        for key, patterns in (("include", self.include or ()), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(_matches(w, pattern) for w in found):
                    close = difflib.get_close_matches(pattern, [w.path for w in found], 1, 0.4)
                    advice = f" Did you mean {close[0]!r}?" if close else ""
                    raise ValueError(f"model.prunable.{key}: {pattern!r} matches no layer of the network.{advice}")
        chosen = [w for w in (found[:-1] if self.keep_last else found) if self._wanted(w)]
        if not chosen:
            raise ValueError(
                f"model.prunable: no layer is left to prune; the network has {[w.path for w in found]}. Widen "
                "model.prunable.include, or set model.prunable.keep_last=false"
            )
        owners: dict[int, str] = {}
        for weight in found:
            if (other := owners.setdefault(id(weight.mu), weight.path)) != weight.path:
                raise ValueError(f"{other} and {weight.path} share one weight, which one mask cannot describe")
        return chosen

    def _wanted(self, weight: MaskedWeight) -> bool:
        included = self.include is None or any(_matches(weight, p) for p in self.include)
        return included and not any(_matches(weight, p) for p in self.exclude)


def _matches(weight: MaskedWeight, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (weight.path, weight.label, weight.name))


def install_masks(network: nn.Module, choice: PruneChoice | None = None) -> list[MaskedWeight]:
    """Give the chosen weights a mask where they have none, all True: the function stays what it is, bit for bit."""
    weights = (choice or PruneChoice())(network)
    for weight in weights:
        if getattr(weight.module, MASK, None) is None:
            weight.set_mask(weight.mask)
    return weights


def set_masks(network: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set masks by name (``layers.0.weight``), also of layers that had none: as a ticket or a checkpoint has them."""
    for name, mask in masks.items():
        path = name.removesuffix("weight").removesuffix(".")
        MaskedWeight(path, network.get_submodule(path)).set_mask(mask)


def masked_weights(network: nn.Module) -> list[MaskedWeight]:
    """The weights that have a mask, in the order in which the network defines them."""
    return [
        MaskedWeight(path, module)
        for path, module in network.named_modules()
        if isinstance(getattr(module, "_buffers", {}).get(MASK), Tensor)
    ]


# ------------------------------------------------------------------------------------------------- what masks tell


def masks_of(weights: Iterable[MaskedWeight]) -> dict[str, Tensor]:
    """Copies of the masks by name, on the CPU."""
    return {w.name: w.mask.detach().cpu().clone() for w in weights}


def alive(masks: Mapping[str, Tensor]) -> int:
    """Number of weights that are left."""
    return sum(int(mask.sum()) for mask in masks.values())


def density(masks: Mapping[str, Tensor]) -> float:
    """Part of the prunable weights that is left."""
    return alive(masks) / sum(mask.numel() for mask in masks.values())


def layer_densities(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """The same of every layer."""
    return {name: float(mask.double().mean()) for name, mask in masks.items()}


def empty_layers(masks: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights of which nothing is left."""
    return [name for name, mask in masks.items() if not bool(mask.any())]


def jaccard(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Weights alive in both masks over weights alive in either; 1 where both are empty."""
    if one.keys() != other.keys():
        raise ValueError(f"the masks belong to other networks: {sorted(one.keys() ^ other.keys())} are in one of them")
    both = sum(int((one[name] & other[name]).sum()) for name in one)
    either = sum(int((one[name] | other[name]).sum()) for name in one)
    return both / either if either else 1.0


def pack(mask: Tensor) -> Tensor:
    """A mask of any shape as bits, uint8 (ceil(numel / 8),), the first weight in the lowest bit."""
    flat = mask.detach().cpu().flatten().to(torch.uint8)
    padded = F.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask that `pack` packed."""
    flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return flat.flatten()[: torch.Size(shape).numel()].bool().view(*shape)


def checksum(masks: Mapping[str, Tensor]) -> str:
    """A fingerprint that differs where a mask differs."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(f"{name}{list(masks[name].shape)}".encode())
        digest.update(bytes(pack(masks[name]).numpy()))
    return digest.hexdigest()


def structure(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Masks as plain data and packed bits, for files that ``torch.load(weights_only=True)`` reads."""
    return {name: {"shape": list(mask.shape), "bits": pack(mask)} for name, mask in masks.items()}


def from_structure(stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks that `structure` stored."""
    return {name: unpack(entry["bits"], entry["shape"]) for name, entry in stored.items()}
