"""Tickets that are really smaller: dead channels leave the network, sparse layers multiply by what is alive.

Nothing here changes what a network computes, but for rounding. A channel that nobody reads influences nothing and goes.
One without incoming weights is constant where its bias is no random number: it goes if the constant is zero, or if it
can move into the biases behind it, which it can in ordinary linear layers and in convolutions without padding (behind
padding, a constant is none at the border). Otherwise, as with a Gaussian bias, it stays, as a row without entries,
which costs next to nothing.

When sparse products pay was measured (`networks.lottery.sparse_layers`): linear layers up to `MAX_DENSITY`; of
convolutions `costs` estimates both ways where the size of the images is known, else `MAX_CONV_DENSITY` decides.
"""

from __future__ import annotations

import copy
import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from networks.bayes.layers import BayesConv2d, BayesianLayer, BayesLinear, MCDropout
from networks.lottery.channels import Channels, channels
from networks.lottery.sparse_layers import (
    CPU,
    Noise,
    SparseBayesConv2d,
    SparseBayesLinear,
    SparseConv2d,
    SparseLinear,
    grid_size,
    is_conv,
    is_linear,
    mask_of,
    output_size,
    sparse_layer,
    weight_of,
)
from networks.masks import MASK

__all__ = [
    "Execution",
    "Noise",
    "SparseBayesConv2d",
    "SparseBayesLinear",
    "SparseConv2d",
    "SparseLinear",
    "compact",
    "executed",
    "sparse",
]

MAX_DENSITY = 0.1
"""Linear layers with at most this part of their weights alive are made sparse."""
MAX_CONV_DENSITY = 0.05
"""The same of convolutions, where the size of the images is not known."""

Execution = Literal["masked", "sparse", "compact"]
EXECUTIONS = get_args(Execution)


def executed(network: nn.Module, how: Execution, noise: Noise = "alive", example: Tensor | None = None) -> nn.Module:
    """The network itself (``masked``), or its copy by `sparse` or `compact`.

    Args:
        network: With masks, ordinary or Bayesian.
        how: Which.
        noise: See `sparse`.
        example: See `sparse`.

    Raises:
        ValueError: The execution is unknown.
    """
    if how not in EXECUTIONS:
        raise ValueError(f"execution={how!r} is unknown; choose one of {', '.join(EXECUTIONS)}")
    if how == "masked":
        return network
    return (sparse if how == "sparse" else compact)(network, noise=noise, example=example)


def sparse(
    network: nn.Module, max_density: float | None = None, noise: Noise = "alive", example: Tensor | None = None
) -> nn.Module:
    """A copy of a network whose sparse linear layers and convolutions multiply by what is alive.

    Args:
        network: With masks, ordinary or Bayesian.
        max_density: Layers with at most this part of their weights alive are exchanged; None: those for which it pays.
        noise: See `networks.lottery.sparse_layers.SparseBayesLinear`.
        example: A batch as it will be evaluated, by whose size it is judged whether a sparse convolution pays.
    """
    sizes = _input_sizes(network, example) if max_density is None else {}
    network = copy.deepcopy(network)
    for path, layer in _layers(network).items():
        if _pays(layer, mask_of(layer), max_density, sizes.get(path)):
            network = _put(network, path, sparse_layer(layer, noise=noise))
    return network


def compact(
    network: nn.Module, max_density: float | None = None, noise: Noise = "alive", example: Tensor | None = None
) -> nn.Module:
    """A copy of a network without dead channels, sparse where that pays.

    Channels go where their layers are known (`networks.lottery.channels`); other networks become `sparse`.

    Args:
        network: With masks, ordinary or Bayesian, in evaluation.
        max_density: Layers of which at most this part is alive (between the channels that are left) become sparse, see
            `sparse`; others that lose channels become smaller dense ones.
        noise: See `networks.lottery.sparse_layers.SparseBayesLinear`; ``dense`` makes all Bayesian layers sparse, so
            that each can pick its noise.
        example: See `sparse`.

    Raises:
        ValueError: In training, where normalisation and dropout make another function.
    """
    if network.training:
        raise ValueError(
            f"{type(network).__name__} is in training, where dead channels count in normalisation and dropout: call "
            "network.eval() first, or use networks.lottery.compact.sparse, which can be trained"
        )
    sizes = _input_sizes(network, example) if max_density is None else {}
    network = copy.deepcopy(network)
    layers = _layers(network)
    known = [one for one in channels(network) if all(path in layers for path in (*one.makers, *one.readers))]
    left = _Left(network, layers, known)
    left.drop_constants()
    left.drop_unread()
    for path, layer in layers.items():
        rows, cols = left.rows(path), left.cols(path)
        mask = mask_of(layer)
        kept = mask[rows][:, cols]
        if _pays(layer, kept, max_density, sizes.get(path)) or (noise == "dense" and isinstance(layer, BayesianLayer)):
            network = _put(network, path, sparse_layer(layer, rows, cols, noise))
        elif kept.shape != mask.shape:
            network = _put(network, path, _smaller(layer, rows, cols))
    for one, alive in zip(known, left.alive, strict=True):
        for norm in one.norms:
            if norm is not None and not alive.all():
                network = _put(network, norm, _smaller_norm(network.get_submodule(norm), alive))
    return network


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    """Layers that can be sparse, by path."""
    return {path: m for path, m in network.named_modules() if is_linear(m) or is_conv(m)}


def _pays(layer: nn.Module, kept: Tensor, max_density: float | None, images: torch.Size | None) -> bool:
    """Whether to make a layer sparse of which ``kept`` is the mask between the channels that are left."""
    if not kept.numel():
        return True
    if images is not None and is_conv(layer):
        dense, sparse_ = costs(layer, kept, images)
        return sparse_ < dense
    limit = (MAX_DENSITY if is_linear(layer) else MAX_CONV_DENSITY) if max_density is None else max_density
    return float(kept.double().mean()) <= limit


def costs(layer: nn.Module, kept: Tensor, images: torch.Size) -> tuple[float, float]:
    """Nanoseconds of one sample of a convolution, dense and sparse, as a fit to measurements has them.

    Ten layers of 16 to 512 channels and 2 to 32 pixels at densities of 1 to 10 %, one thread, float32: the mean error
    of the fit is 15 and 12 %. Drawing weights is a part of it that does not grow with the images; a sparse layer pads
    them, which counts where they are small.

    Args:
        layer: The convolution.
        kept: Its mask between the channels that are left.
        images: (batch, channel, height, width) of its input.
    """
    alive, random = int(kept.sum()), isinstance(layer, BayesianLayer)
    outputs, padded = (images[0] * math.prod(size(layer, *images[2:])) for size in (output_size, grid_size))
    dense = 0.023 * kept.numel() * outputs + 6.4 * random * kept.numel()
    return dense, 0.092 * alive * padded + 1.0 * sum(kept.shape[:2]) * padded + 19 * random * alive + 7e5


@torch.no_grad()
def _input_sizes(network: nn.Module, example: Tensor | None) -> dict[str, torch.Size]:
    """What convolutions get of a batch, by path; found with one of its items. Empty without a batch."""
    found: dict[str, torch.Size] = {}
    if example is None:
        return found
    layers = {path: layer for path, layer in _layers(network).items() if is_conv(layer)}
    hooks = []
    for path, layer in layers.items():

        def note(_: nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
            found[path] = torch.Size((len(example), *inputs[0].shape[1:]))

        hooks.append(layer.register_forward_pre_hook(note))
    training = network.training
    try:
        network.eval()(example[:1])
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return found


def _put(network: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put a module into its place; the network, which is the module itself at the root."""
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)
    return network


# -------------------------------------------------------------------------------------------------------- dead channels


class _Left:
    """Which channels of a network are left.

    Args:
        network: Its biases are changed in place.
        layers: By path.
        known: What layers make and read.
    """

    def __init__(self, network: nn.Module, layers: dict[str, nn.Module], known: list[Channels]) -> None:
        self.network, self.layers, self.known = network, layers, known
        # (out, in): whether any place of the kernel is alive.
        masks = {path: mask_of(layer) for path, layer in layers.items()}
        self.connected = {path: mask.flatten(2).any(2) if mask.ndim > 2 else mask for path, mask in masks.items()}
        self.made = {path: i for i, one in enumerate(known) for path in one.makers}
        self.read = {path: i for i, one in enumerate(known) for path in one.readers}
        self.alive = [torch.ones(len(self.connected[one.makers[0]]), dtype=torch.bool, device=CPU) for one in known]

    def rows(self, path: str) -> Tensor:
        """Outputs of a layer that are left, as indices."""
        out = len(self.connected[path])
        kept = torch.ones(out, dtype=torch.bool, device=CPU) if path not in self.made else self.alive[self.made[path]]
        return kept.nonzero().squeeze(1)

    def cols(self, path: str) -> Tensor:
        """Inputs of a layer that are left, as indices."""
        return self._inputs(path).nonzero().squeeze(1)

    def _inputs(self, path: str) -> Tensor:
        into = self.connected[path].shape[1]
        if path not in self.read:
            return torch.ones(into, dtype=torch.bool, device=CPU)
        alive = self.alive[self.read[path]]
        return alive.repeat_interleave(into // len(alive))  # images that were flattened: places of a channel in a row

    def drop_constants(self) -> None:
        """Strike off channels without incoming weights that are zero, or whose constant moves into biases."""
        random_masks = any(isinstance(m, MCDropout) and m.p and m.in_evaluation for m in self.network.modules())
        for i, one in enumerate(self.known):
            maker = self.layers[one.makers[0]]
            if one.activation is None or (isinstance(maker, BayesianLayer) and maker.bias_mu is not None):
                continue
            value = one.activation(_constant(maker, one.norms[0], self.network))
            weights = self.connected[one.makers[0]] & self._inputs(one.makers[0])
            constant = ~weights.any(1)
            takes = all(_takes_constants(self.layers[reader]) for reader in one.readers) and not random_masks
            gone = self._spared(i, constant if takes else constant & (value == 0))
            for reader in one.readers:
                _add_to_bias(self.layers[reader], mask_of(self.layers[reader]), torch.where(gone, value, 0.0))
            self.alive[i] &= ~gone

    def drop_unread(self) -> None:
        """Strike off channels to which no reader that stays has a weight, from the output back."""
        for i in reversed(range(len(self.known))):
            used = torch.zeros_like(self.alive[i])
            for reader in self.known[i].readers:
                columns = self.connected[reader][self.rows(reader)].any(0)
                used |= columns.view(len(used), -1).any(1)
            self.alive[i] &= ~self._spared(i, ~used)

    def _spared(self, i: int, gone: Tensor) -> Tensor:
        """Channels that may go: of images one must stay."""
        left = (self.alive[i] & ~gone).any()
        if not left and any(is_conv(self.layers[path]) for path in (*self.known[i].makers, *self.known[i].readers)):
            gone = gone.clone()
            gone[self.alive[i].nonzero()[0]] = False
        return gone


def _constant(layer: nn.Module, norm: str | None, network: nn.Module) -> Tensor:
    """What a layer without weights gives, behind its normalisation, float64 on the CPU."""
    bias = None if isinstance(layer, BayesianLayer) else layer.bias
    out = len(weight_of(layer))
    value = torch.zeros(out, dtype=torch.float64, device=CPU) if bias is None else bias.detach().cpu().double()
    if norm is None:
        return value
    bn = network.get_submodule(norm)
    mean, variance = (t.detach().cpu().double() for t in (bn.running_mean, bn.running_var))
    value = (value - mean) / (variance + bn.eps).sqrt()
    return value if bn.weight is None else value * bn.weight.detach().cpu().double() + bn.bias.detach().cpu().double()


def _takes_constants(layer: nn.Module) -> bool:
    """Whether a constant input is an addition to the bias."""
    if isinstance(layer, BayesianLayer):
        return False
    return is_linear(layer) or (layer.padding[0] == 0 and layer.padding[1] == 0)


def _add_to_bias(layer: nn.Module, mask: Tensor, constant: Tensor) -> None:
    """Add what constant input channels contribute."""
    if not bool(constant.any()):
        return
    weight = torch.where(mask, layer.weight.detach().cpu().double(), 0.0).flatten(1)
    offset = weight @ constant.repeat_interleave(weight.shape[1] // len(constant))
    if layer.bias is not None:
        offset = offset + layer.bias.detach().cpu().double()
    layer.bias = nn.Parameter(offset.to(layer.weight))


def _smaller(layer: nn.Module, rows: Tensor, cols: Tensor) -> nn.Module:
    """The dense layer of the channels that are left, with its mask if it has one."""
    where = {"device": weight_of(layer).device, "dtype": weight_of(layer).dtype}
    bayesian = isinstance(layer, BayesianLayer)
    bias = (layer.bias_mu if bayesian else layer.bias) is not None
    own = {"prior": layer.prior, "init": layer.init} if bayesian else {}
    sizes = (len(cols), len(rows))
    with torch.random.fork_rng(devices=[]):  # initial values are drawn and overwritten
        if is_linear(layer):
            new: nn.Module = (BayesLinear if bayesian else nn.Linear)(*sizes, bias, **own, **where)
        else:
            kind = BayesConv2d if bayesian else nn.Conv2d
            shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            new = kind(*sizes, *shape, bias=bias, **own, **where)
    rows, cols = rows.to(where["device"]), cols.to(where["device"])
    mask = getattr(layer, MASK, None)
    with torch.no_grad():
        for part in ("_mu", "_log_sigma") if bayesian else ("",):
            weight = getattr(layer, f"weight{part}")
            if not bayesian and mask is not None:
                weight = torch.where(mask, weight, torch.zeros_like(weight))
            getattr(new, f"weight{part}").copy_(weight[rows][:, cols])
            if bias:
                getattr(new, f"bias{part}").copy_(getattr(layer, f"bias{part}")[rows])
    if bayesian and mask is not None:
        new.weight_mask = mask[rows][:, cols].clone()
    return new.train(layer.training)


def _smaller_norm(norm: nn.Module, alive: Tensor) -> nn.Module:
    """The batch normalisation of the channels that are left."""
    kept = alive.nonzero().squeeze(1)
    new = copy.deepcopy(norm)
    new.num_features = len(kept)
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(norm, name)
        if value is not None:
            part = value.detach()[kept.to(value.device)].clone()
            setattr(new, name, nn.Parameter(part) if isinstance(value, nn.Parameter) else part)
    return new
