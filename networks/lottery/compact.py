"""Tickets that are really smaller: dead units leave the network, sparse linear layers multiply by what is alive.

Nothing here changes what a network computes, but for rounding. A unit without outgoing weights influences nothing and
goes. One without incoming weights is the constant act(bias): in an ordinary network it moves into the next bias; a
Gaussian bias stays random, so there the unit stays, as a row without entries, which costs nothing.

Measured (1024 x 1024, batch 128, 10 samples, one thread): a dense masked forward pass 80.8 ms, sparse 11.9 ms at a
density of 5 % and 3.3 ms at 1.2 %; a training step of one sample 13.8 and 3.9 ms at 1.2 %, but at 20 % 16.7 and 21.8:
`MAX_DENSITY` is where both are faster.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from networks.bayes.context import SampleContext, current
from networks.bayes.layers import BayesianLayer, BayesLinear
from networks.masks import MASK, MaskedLinear
from networks.mlp import MLP

MAX_DENSITY = 0.1
"""Linear layers with at most this part of their weights alive are made sparse."""

Noise = Literal["alive", "dense"]


class _Pattern(nn.Module):
    """Places of the weights that are alive, in rows and columns that were kept of a dense matrix."""

    crow: Tensor
    col: Tensor
    flat: Tensor
    rows: Tensor

    def __init__(self, mask: Tensor, rows: Tensor, cols: Tensor) -> None:
        super().__init__()
        kept = mask[rows][:, cols]
        row, col = kept.nonzero(as_tuple=True)
        crow = torch.zeros(len(rows) + 1, dtype=torch.int64)
        crow[1:] = kept.sum(1).cumsum(0)
        self.dense_shape, self.shape = tuple(mask.shape), (len(rows), len(cols))
        buffers = {"crow": crow, "col": col, "flat": rows[row] * mask.shape[1] + cols[col], "rows": rows}
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self._stacked: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def nnz(self) -> int:
        """Weights alive."""
        return len(self.col)

    def times(self, values: Tensor, inputs: Tensor) -> Tensor:
        """The product with ``inputs`` (in, n): (out, n), or (S out, n) of several samples."""
        if self.nnz == 0 or not inputs.numel():
            samples = 1 if values.ndim == 1 else len(values)
            return inputs.new_zeros(samples * self.shape[0], inputs.shape[1])
        return self.matrix(values) @ inputs

    def matrix(self, values: Tensor) -> Tensor:
        """The sparse matrix with these values, (nnz,); of several samples (S, nnz), one below the other."""
        if values.ndim == 1:
            return torch.sparse_csr_tensor(self.crow, self.col, values, self.shape, check_invariants=False)
        samples = len(values)
        key = samples, self.crow.device
        if key not in self._stacked:
            offsets = self.nnz * torch.arange(samples, device=self.crow.device)[:, None]
            crow = torch.cat([self.crow[:1], (self.crow[1:] + offsets).flatten()])
            self._stacked = {key: (crow, self.col.repeat(samples))}
        crow, col = self._stacked[key]
        shape = (samples * self.shape[0], self.shape[1])
        return torch.sparse_csr_tensor(crow, col, values.flatten(), shape, check_invariants=False)


class SparseLinear(nn.Module):
    """`torch.nn.Linear` whose weights alive are the values of a sparse matrix; they can be trained.

    Args:
        layer: The layer with its mask.
        rows: Outputs to keep.
        cols: Inputs to keep.
    """

    def __init__(self, layer: nn.Linear, rows: Tensor | None = None, cols: Tensor | None = None) -> None:
        super().__init__()
        mask, rows, cols = _places(layer, rows, cols)
        self.pattern = _Pattern(mask, rows, cols)
        self.values = nn.Parameter(layer.weight.detach().flatten()[self.pattern.flat].clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach()[rows].clone())

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in) -> (..., out)``."""
        out = self.pattern.times(self.values, x.flatten(0, -2).mT).mT
        out = out if self.bias is None else out + self.bias
        return out.unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        """Sizes and density."""
        return _described(self.pattern)


class SparseBayesLinear(BayesianLayer):
    """`BayesLinear` whose weights alive are the values of sparse matrices, mu + sigma eps for each sample.

    Args:
        layer: The layer with its mask.
        rows: Outputs to keep.
        cols: Inputs to keep.
        noise: ``alive``: noise is drawn for the weights alive. ``dense``: for all weights of the dense layer, so that
            samples equal those of the masked dense layer, at its cost.
    """

    def __init__(
        self, layer: BayesLinear, rows: Tensor | None = None, cols: Tensor | None = None, noise: Noise = "alive"
    ) -> None:
        if noise not in ("alive", "dense"):
            raise ValueError(f"noise={noise!r} is unknown; choose alive or dense")
        mask, rows, cols = _places(layer, rows, cols)
        pattern = _Pattern(mask, rows, cols)
        # Nothing to draw: the values, one vector of those alive, come from the layer.
        super().__init__((0,), False, layer.prior, layer.init)
        self.pattern, self.noise = pattern, noise
        for part in ("mu", "log_sigma"):
            weight = getattr(layer, f"weight_{part}").detach().flatten()[pattern.flat].clone()
            setattr(self, f"weight_{part}", nn.Parameter(weight))
            if layer.bias_mu is not None:
                setattr(self, f"bias_{part}", nn.Parameter(getattr(layer, f"bias_{part}").detach()[rows].clone()))
        self.dense_fan_in = layer.fan_in

    @property
    @override
    def fan_in(self) -> int:
        return getattr(self, "dense_fan_in", 1)

    @override
    def sample(self, context: SampleContext) -> tuple[Tensor, Tensor | None]:
        """Values ``(S, nnz)`` and biases ``(S, out)``."""
        eps, bias_eps = self._noise(context)
        values = torch.addcmul(self.weight_mu, self.weight_log_sigma.exp(), eps)
        if self.bias_mu is None:
            return values, None
        return values, torch.addcmul(self.bias_mu, self.bias_log_sigma.exp(), bias_eps)

    @override
    def _noise(self, context: SampleContext) -> tuple[Tensor, Tensor]:
        """Of the values ``(S, nnz)`` and the bias ``(S, out)``."""
        if self.noise == "alive":
            return super()._noise(context)
        out, into = self.pattern.dense_shape
        drawn = context.noise((out * into + (0 if self.bias_mu is None else out),), self.weight_mu)
        places = self.pattern.flat % into * out + self.pattern.flat // into  # BayesLinear draws inputs first
        return drawn[:, places], drawn[:, out * into + self.pattern.rows] if self.bias_mu is not None else drawn[:, :0]

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, ..., in)`` or ``(S B, ..., in)`` to ``(S B, ..., out)``; outside of a context by the means."""
        context = current()
        inner = x.shape[1:-1]
        if context is None:
            if self.training:
                raise RuntimeError("SparseBayesLinear was called in training without weight samples")
            out = self.pattern.times(self.weight_mu, x.flatten(0, -2).mT).mT
            out = out if self.bias_mu is None else out + self.bias_mu
            return out.unflatten(0, x.shape[:-1])
        if context.estimator != "weight":
            raise ValueError("model.estimator: sparse layers have explicit weights; use model.estimator=weight")
        values, bias = self.sample(context)
        if context.is_folded(x):
            parts = zip(values, context.by_sample(x), strict=True)
            out = torch.stack([self.pattern.times(one, part.flatten(0, -2).mT) for one, part in parts])
        else:
            out = self.pattern.times(values, x.flatten(0, -2).mT)
            out = out.unflatten(0, (context.samples, self.pattern.shape[0]))
        if bias is not None:  # out is (S, out, rows)
            out = out + bias.unsqueeze(-1)
        return out.mT.reshape(context.samples * (out.shape[2] // math.prod(inner)), *inner, out.shape[1])

    def extra_repr(self) -> str:
        """Sizes and density."""
        return _described(self.pattern)


def _described(pattern: _Pattern) -> str:
    part = pattern.nnz / max(math.prod(pattern.dense_shape), 1)
    return f"{pattern.shape[1]}, {pattern.shape[0]}, alive={pattern.nnz} ({100 * part:.2g} % of the dense layer)"


def _places(layer: nn.Module, rows: Tensor | None, cols: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    mask = _mask(layer)
    out, into = mask.shape
    rows = torch.arange(out) if rows is None else rows
    return mask, rows, torch.arange(into) if cols is None else cols


def _mask(layer: nn.Module) -> Tensor:
    weight = layer.weight_mu if isinstance(layer, BayesLinear) else layer.weight
    mask = getattr(layer, MASK, None)
    return torch.ones(weight.shape, dtype=torch.bool) if mask is None else mask.detach().cpu()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, BayesLinear) or type(module) in (nn.Linear, MaskedLinear)


def sparse(network: nn.Module, max_density: float = MAX_DENSITY, noise: Noise = "alive") -> nn.Module:
    """A copy of a network whose sparse linear layers multiply by what is alive.

    Args:
        network: With masks, ordinary or Bayesian.
        max_density: Layers with at most this part of their weights alive are exchanged.
        noise: See `SparseBayesLinear`.
    """
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if _is_linear(child) and float(_mask(child).double().mean()) <= max_density:
                new = SparseBayesLinear(child, noise=noise) if isinstance(child, BayesLinear) else SparseLinear(child)
                setattr(parent, name, new.train(child.training))
    return network


def compact(network: MLP, max_density: float = MAX_DENSITY, noise: Noise = "alive") -> MLP:
    """A copy of a perceptron without dead hidden units, sparse where that pays.

    Args:
        network: `networks.mlp.MLP` with masks, ordinary or Bayesian.
        max_density: Layers of which at most this part is alive (between the units that are left) become sparse; other
            ordinary layers become smaller dense ones. Bayesian layers that lose units are always sparse.
        noise: See `SparseBayesLinear`; ``dense`` makes all Bayesian layers sparse, so that each can pick its noise.

    Raises:
        ValueError: For another network, whose layers need not be a chain; `sparse` takes any.
    """
    if not isinstance(network, MLP) or (network.training and network.dropout.p):
        raise ValueError(
            f"{type(network).__name__}: dead units are removed from networks.mlp.MLP in evaluation; "
            "networks.lottery.compact.sparse executes the linear layers of any network sparsely"
        )
    network = copy.deepcopy(network)
    layers = list(network.layers)
    masks = [_mask(layer) for layer in layers]
    units = [torch.ones(mask.shape[1], dtype=torch.bool) for mask in masks]
    units.append(torch.ones(len(masks[-1]), dtype=torch.bool))
    _fold_constants(layers, masks, units)
    for i in reversed(range(1, len(masks))):  # no outgoing weights to a unit that stays
        units[i] &= (masks[i] & units[i + 1][:, None]).any(0)
    for i, layer in enumerate(layers):
        rows, cols = (units[j].nonzero().squeeze(1) for j in (i + 1, i))
        kept = masks[i][rows][:, cols]
        is_sparse = float(kept.double().mean()) <= max_density if kept.numel() else True
        if isinstance(layer, BayesLinear):
            if is_sparse or noise == "dense" or kept.shape != masks[i].shape:
                layers[i] = SparseBayesLinear(layer, rows, cols, noise)
        else:
            layers[i] = SparseLinear(layer, rows, cols) if is_sparse else _smaller(layer, masks[i], rows, cols)
        layers[i].train(network.training)
    network.layers = nn.ModuleList(layers)
    return network


def _fold_constants(layers: list[nn.Module], masks: list[Tensor], units: list[Tensor]) -> None:
    """Move constant hidden units into the biases behind them, in place, and strike them off ``units``.

    Between two ordinary layers only: a Gaussian bias makes a unit random, a Gaussian weight what comes of it.
    """
    varies = torch.ones(masks[0].shape[1], dtype=torch.bool)
    constant = torch.zeros(masks[0].shape[1], dtype=torch.float64)  # zero where a unit varies
    for i, layer in enumerate(layers[:-1]):
        if isinstance(layer, BayesLinear):
            varies, constant = (torch.ones(len(masks[i]), dtype=torch.bool), torch.zeros(len(masks[i])).double())
            continue
        offset = _add_to_bias(layer, masks[i], constant)
        varies = (masks[i] & varies).any(1) | isinstance(layers[i + 1], BayesLinear)
        constant = torch.where(varies, 0.0, F.relu(offset))
        units[i + 1] &= varies
    if not isinstance(layers[-1], BayesLinear):
        _add_to_bias(layers[-1], masks[-1], constant)


def _add_to_bias(layer: nn.Linear, mask: Tensor, constant: Tensor) -> Tensor:
    """Add what constant inputs contribute; the new bias, float64."""
    weight = torch.where(mask, layer.weight.detach().cpu().double(), 0.0)
    offset = weight @ constant
    if layer.bias is not None:
        offset = offset + layer.bias.detach().cpu().double()
    if bool(constant.any()):
        layer.bias = nn.Parameter(offset.to(layer.weight))
    return offset


def _smaller(layer: nn.Linear, mask: Tensor, rows: Tensor, cols: Tensor) -> nn.Linear:
    """The dense layer of the units that are left, zero where weights are pruned."""
    weight = torch.where(mask, layer.weight.detach().cpu(), torch.zeros((), dtype=layer.weight.dtype))[rows][:, cols]
    where = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    new = nn.Linear(len(cols), len(rows), layer.bias is not None, **where)
    with torch.no_grad():
        new.weight.copy_(weight)
        if layer.bias is not None:
            new.bias.copy_(layer.bias[rows.to(layer.bias.device)])
    return new
