"""Networks of this program, and any other, turned Bayesian in place and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch

import torch
from torch import nn

from networks.bayes.gaussian import Init, Prior
from networks.bayes.layers import BayesConv1d, BayesConv2d, BayesConv3d, BayesianLayer, BayesLinear, MCDropout

_CONVOLUTIONS: dict[type[nn.Module], type[BayesianLayer]] = {
    nn.Conv1d: BayesConv1d,
    nn.Conv2d: BayesConv2d,
    nn.Conv3d: BayesConv3d,
}
_DROPOUTS: dict[type[nn.Module], int] = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}


def bayesian_layers(net: nn.Module) -> Iterator[tuple[str, BayesianLayer]]:
    """Names and layers in the order of the network."""
    for name, module in net.named_modules():
        if isinstance(module, BayesianLayer):
            yield name, module


def to_bayesian(
    net: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    init: Init | None = None,
    prior: Prior | None = None,
) -> nn.Module:
    """Replace the linear and convolutional layers of a network by Bayesian ones of the same names, in place.

    ``layers.0.weight`` becomes ``layers.0.weight_mu`` and ``layers.0.weight_log_sigma``. Normalisation, embeddings and
    everything else stay deterministic. A layer that is used under several names stays one layer.

    Args:
        net: The network.
        include: Patterns of names (``blocks.*.mlp.*``) of layers to replace; None: every one.
        exclude: Patterns of layers that stay deterministic.
        init: Initial means and deviations.
        prior: Of all weights.

    Returns:
        The network, or a layer in place of one that was given.

    Raises:
        ValueError: For a pattern that fits no layer, and where nothing is left to replace.
    """
    init, prior = init or Init(), prior or Prior()
    layers = {n: m for n, m in net.named_modules(remove_duplicate=False) if _can_be_replaced(m)}
    names = list(layers)
    for key, patterns in (("include", include or ()), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in names):
                raise ValueError(f"model.{key}: {pattern!r} fits none of the layers {', '.join(names) or '(none)'}")
    chosen = {id(layers[name]) for name in names if include is None or any(fnmatch(name, p) for p in include)}
    chosen -= {id(layers[name]) for name in names if any(fnmatch(name, p) for p in exclude)}
    if not chosen and not any(isinstance(module, BayesianLayer) for module in net.modules()):
        raise ValueError("model.net: no linear or convolutional layer is left to be Bayesian (model.include, exclude)")
    left_out = sorted({type(m).__name__ for m in net.modules() if isinstance(m, nn.MultiheadAttention | nn.RNNBase)})
    if left_out:
        warnings.warn(f"{', '.join(left_out)} keep their weights in tensors of their own: deterministic", stacklevel=2)
    replaced: dict[int, BayesianLayer] = {}
    for layer in layers.values():
        if id(layer) in chosen and id(layer) not in replaced:
            replaced[id(layer)] = _bayesian(layer, init, prior)
    return replace_modules(net, lambda module: replaced.get(id(module), module))


def to_deterministic(net: nn.Module) -> nn.Module:
    """Replace Bayesian layers by ordinary ones that hold the means (zero where pruned), and MC dropout by dropout."""
    return replace_modules(net, _plain)


def to_mc_dropout(net: nn.Module, per_item: bool = False, in_evaluation: bool = True) -> nn.Module:
    """Replace the dropout layers of a network by `MCDropout`, in place.

    Functional dropout inside of a layer is not found; in this program that is the one on attention weights. It is off
    in evaluation, and in training it belongs to no sample.

    Args:
        net: The network.
        per_item: Whether every item of a training batch has its own mask.
        in_evaluation: Whether there are masks in evaluation too.

    Raises:
        ValueError: If there is no dropout.
    """
    if not has_dropout(net):
        raise ValueError("model.posterior=dropout: the network has no dropout; set model.net.dropout above 0")

    inside = sorted(
        {type(m).__name__ for m in net.modules() if isinstance(m, nn.MultiheadAttention | nn.RNNBase) and m.dropout > 0}
    )
    if inside:
        warnings.warn(f"{', '.join(inside)} have dropout of their own, which belongs to no sample", stacklevel=2)

    def replacement(module: nn.Module) -> nn.Module:
        dimensions = _DROPOUTS.get(type(module))
        if dimensions is None:
            return module
        return MCDropout(module.p, dimensions, per_item, in_evaluation).train(module.training)

    return replace_modules(net, replacement)


def has_dropout(net: nn.Module) -> bool:
    """Whether a network has dropout layers that drop anything."""
    return any(type(m) in (MCDropout, *_DROPOUTS) and m.p > 0 for m in net.modules())


def _can_be_replaced(module: nn.Module) -> bool:
    # Not subclasses: they may read their weight themselves (the output projection of nn.MultiheadAttention does).
    return type(module) is nn.Linear or type(module) in _CONVOLUTIONS


def replace_modules(net: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Put ``replacement(module)`` in the place of every module, under every name that it has.

    Torch's Transformers keep to their modules from now on: in evaluation a fused kernel would read the weights of the
    layers that were there, and skip dropout.
    """
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    done: dict[int, nn.Module] = {}
    for module in list(net.modules()):
        for name, child in list(module._modules.items()):  # named_children gives a child one name alone
            if child is None:
                continue
            if id(child) not in done:
                done[id(child)] = replacement(child)
            if done[id(child)] is not child:
                setattr(module, name, done[id(child)])
    return replacement(net)


def _bayesian(layer: nn.Module, init: Init, prior: Prior) -> BayesianLayer:
    bias, where = layer.bias is not None, {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        new: BayesianLayer = BayesLinear(layer.in_features, layer.out_features, bias, prior, init, **where)
    else:
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        kind = _CONVOLUTIONS[type(layer)]
        new = kind(*sizes, layer.groups, bias, layer.padding_mode, prior=prior, init=init, **where)
    if init.mu == "keep":
        with torch.no_grad():
            new.weight_mu.copy_(layer.weight)
            if bias:
                new.bias_mu.copy_(layer.bias)
    return new.train(layer.training)


def _plain(module: nn.Module) -> nn.Module:
    if isinstance(module, MCDropout):
        return (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[module.dimensions](module.p).train(
            module.training
        )
    if not isinstance(module, BayesianLayer):
        return module
    where = {"device": module.weight_mu.device, "dtype": module.weight_mu.dtype}
    bias = module.bias_mu is not None
    if isinstance(module, BayesLinear):
        new: nn.Module = nn.Linear(module.in_features, module.out_features, bias, **where)
    else:
        sizes = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
        kind = next(plain for plain, bayes in _CONVOLUTIONS.items() if type(module) is bayes)
        new = kind(*sizes, module.dilation, module.groups, bias, module.padding_mode, **where)
    with torch.no_grad():
        new.weight.copy_(module.mean_weight())
        if bias:
            new.bias.copy_(module.bias_mu)
    return new.train(module.training)
