"""What transplantation loses, put back in closed form: layers fitted to the ensemble, statistics estimated anew.

A kept channel has lost its inputs from channels that were not kept. Some other kept channel carries a part of what they
carried: regression on a few thousand unlabelled inputs finds it, layer by layer (our addition to the paper).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.fusion.layout import ChannelGroups, Layer
from networks.fusion.transplantation import Sources


@torch.no_grad()
def reconstruct(
    fused: nn.Module,
    sources: Sources,
    scales: Sequence[float],
    networks: Sequence[nn.Module],
    groups: Sequence[ChannelGroups],
    batches: Sequence[Tensor],
    ridge: float = 1e-2,
    positions: int = 8192,
    seed: int = 0,
) -> nn.Module:
    """Fit the layers of a fused network, from the input on, to the pre-activations of its channels in the members.

    Layer l gets W + dW with dW = argmin |Z - H W^T - H dW^T|^2 + r |dW|^2, H what reaches the layer in the fused
    network (its earlier layers fitted already), Z what its channels are before activation in the networks that they
    come from (their mean, where they come from several), at the outputs the weighted mean of all, r = ``ridge`` times
    the mean of diag(H^T H). A bias is fitted too, without penalty. Convolutions are regressions on patches. Layers that
    read the inputs, and convolutions of one channel to one, are what they were. Sums are float64.

    Args:
        fused: The fused network, changed in place.
        sources: Where its channels come from.
        scales: Weight of every member in the outputs.
        networks: The members.
        groups: Of every member.
        batches: Inputs, ``(item, ...)`` each.
        ridge: Penalty over the mean of the squared features.
        positions: Places of an image that a batch gives to the regression of a convolution, at most, drawn at random.
        seed: Of that draw.

    Returns:
        The fused network, in evaluation mode.

    Raises:
        ValueError: There are no inputs.
    """
    if not len(batches):
        raise ValueError("reconstruction needs inputs: batches of images, labels are not looked at")
    fused.eval()
    for network in networks:
        network.eval()
    for layer in groups[0].layers:
        if groups[0].is_free(groups[0].axis(layer.weight, 1)) and is_regression(fused, layer):
            fit(layer, fused, (sources, scales), networks, groups, batches, ridge, positions, seed)
    return fused


def is_regression(network: nn.Module, layer: Layer) -> bool:
    """Whether what a layer gives is linear in rows that `inputs_and_outputs` can make."""
    module = network.get_submodule(layer.name)
    return layer.kind == "linear" or getattr(module, "padding_mode", "zeros") == "zeros"


def fit(
    layer: Layer,
    fused: nn.Module,
    come_from: tuple[Sources, Sequence[float]],
    networks: Sequence[nn.Module],
    groups: Sequence[ChannelGroups],
    batches: Sequence[Tensor],
    ridge: float,
    positions: int,
    seed: int,
) -> None:
    """Fit one layer of a fused network whose earlier layers are fitted; ``come_from`` are sources and scales."""
    module, parameters = fused.get_submodule(layer.name), dict(fused.named_parameters())
    weight, bias = parameters[layer.weight], None if layer.bias is None else parameters[layer.bias]
    outputs, features = weight.shape[0], weight[0].numel()
    size = features + (bias is not None)
    gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(size, outputs, dtype=torch.float64, device=weight.device)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        rows, now = inputs_and_outputs(fused, module, layer, batch)
        wanted = _targets(layer, outputs, come_from, networks, groups, batch)
        if len(rows) > positions and layer.kind == "conv2d":
            chosen = torch.randperm(len(rows), generator=generator)[:positions].to(rows.device)
            rows, now, wanted = rows[chosen], now[chosen], wanted[chosen]
        rows = rows.double()
        if bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        gram += rows.T @ rows
        cross += rows.T @ (wanted.double() - now.double())
    penalty = gram.diagonal()[:features].mean() * ridge
    gram.diagonal()[:features] += penalty.clamp(min=torch.finfo(torch.float64).tiny)
    change = torch.linalg.lstsq(gram, cross).solution if bool(penalty == 0) else torch.linalg.solve(gram, cross)
    weight += change[:features].T.reshape(weight.shape).to(weight.dtype)
    if bias is not None:
        bias += change[features].to(bias.dtype)


def _targets(
    layer: Layer,
    outputs: int,
    come_from: tuple[Sources, Sequence[float]],
    networks: Sequence[nn.Module],
    groups: Sequence[ChannelGroups],
    batch: Tensor,
) -> Tensor:
    """What the fused layer should give, ``(row, output)``: every channel as in the networks that it comes from."""
    sources, scales = come_from
    axis = groups[0].axes[layer.weight][0]
    widths = groups[0].widths
    for g, own in sources.items():
        widths[g] = 1 + max(int(places.max()) for places, _, _ in own if len(places))
    wanted: Tensor | None = None
    for k, (network, one, scale) in enumerate(zip(networks, groups, scales, strict=True)):
        _, made = inputs_and_outputs(network, network.get_submodule(layer.name), layer, batch, rows=False)
        if wanted is None:
            wanted = made.new_zeros(len(made), outputs)
        for (g, here), (_, there) in zip(axis.places(one.widths), axis.places(widths), strict=True):
            if g not in sources:
                wanted[:, there.flatten()] += scale * made[:, here.flatten()]
                continue
            places, channels, weight = sources[g][k]
            wanted[:, there[places].flatten()] += weight * made[:, here[channels].flatten()]
    assert wanted is not None
    return wanted


class _ReachedError(Exception):
    """A layer has been reached: what comes after it is not needed."""


def inputs_and_outputs(
    network: nn.Module, module: nn.Module, layer: Layer, batch: Tensor, rows: bool = True
) -> tuple[Tensor, Tensor]:
    """What reaches a layer, as rows of a regression, and what it gives, ``(row, feature)`` and ``(row, output)``."""
    seen: dict[str, Tensor] = {}

    def stop(_: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        seen["in"], seen["out"] = inputs[0], result
        raise _ReachedError

    hook = module.register_forward_hook(stop)
    with hook, suppress(_ReachedError):  # the hook is removed at the end, whatever happens
        network(batch)
    if layer.kind == "linear":
        return seen["in"].flatten(0, -2), seen["out"].flatten(0, -2)
    out = seen["out"].flatten(2).mT.flatten(0, 1)
    if not rows:
        return out, out
    padding = module.padding
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    elif padding == "valid":
        padding = 0
    patches = F.unfold(seen["in"], module.kernel_size, module.dilation, padding, module.stride)
    return patches.mT.flatten(0, 1), out


@torch.no_grad()
def recalibrate_bn(network: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Estimate the running statistics of batch normalisations anew: the mean over batches, each counted once.

    Args:
        network: Changed in place; comes back in the mode in which it was.
        batches: Inputs, ``(item, ...)`` each.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return network
    modes = {module: module.training for module in network.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
        norm.train()
    try:
        for batch in batches:
            network(batch)
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return network
