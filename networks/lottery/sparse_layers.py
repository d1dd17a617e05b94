"""Layers whose weights alive are the values of sparse matrices: what is pruned is neither stored, drawn nor multiplied.

A linear layer is one product with a sparse matrix. A convolution is one for each place of its kernel, with the input
shifted: rows are channels, columns all places of all images, on a padded grid on which a shift is an offset and copies
nothing. Gradients reach the values, so that a sparse layer can be trained.

Measured, one thread, float32, inference of all samples with their noise. Linear, 1024 x 1024, batch 128, 10 samples:
masked 80.8 ms, sparse 11.9 ms at a density of 5 %, 3.3 ms at 1.2 %; a training step of one sample 13.8 and 3.9 ms at
1.2 %, but at 20 % 16.7 and 21.8. Networks of 32 pixels, batch 32, 4 samples, all layers of one density: VGG-11 700
ms masked, 710, 570, 220 ms sparse at 10, 5, 1.2 %; ResNet-20, whose layers of 16 channels are narrow, 230 ms masked,
260, 210, 150 ms.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from networks.bayes.context import SampleContext, current
from networks.bayes.layers import BayesConv2d, BayesianLayer, BayesLinear
from networks.masks import MASK, MaskedConv2d, MaskedLinear

Noise = Literal["alive", "dense"]
CPU = torch.device("cpu")


def mask_of(layer: nn.Module) -> Tensor:
    """The mask of a layer on the CPU, all True where it has none."""
    weight = weight_of(layer)
    mask = getattr(layer, MASK, None)
    return torch.ones(weight.shape, dtype=torch.bool, device=CPU) if mask is None else mask.detach().cpu()


def weight_of(layer: nn.Module) -> nn.Parameter:
    """The weight, or its mean."""
    return layer.weight_mu if isinstance(layer, BayesianLayer) else layer.weight


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that `sparse_layer` takes."""
    return type(module) in (BayesLinear, nn.Linear, MaskedLinear)


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution that `sparse_layer` takes: of images, in one group, padded with zeros."""
    if type(module) not in (BayesConv2d, nn.Conv2d, MaskedConv2d):
        return False
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def sparse_layer(
    layer: nn.Module, rows: Tensor | None = None, cols: Tensor | None = None, noise: Noise = "alive"
) -> nn.Module:
    """The sparse layer in the place of one with a mask, in its mode and on its device.

    Args:
        layer: Linear layer or convolution (`is_linear`, `is_conv`), ordinary or Bayesian.
        rows: Outputs to keep; None: all.
        cols: Inputs to keep; None: all.
        noise: See `SparseBayesLinear`.
    """
    if isinstance(layer, BayesianLayer):
        kind = SparseBayesLinear if is_linear(layer) else SparseBayesConv2d
        new: nn.Module = kind(layer, rows, cols, noise)
    else:
        new = (SparseLinear if is_linear(layer) else SparseConv2d)(layer, rows, cols)
    return new.train(layer.training)


# ------------------------------------------------------------------------------------------------------------- patterns


class _Pattern(nn.Module):
    """Places of the weights that are alive, in rows and columns that were kept of a dense matrix."""

    crow: Tensor
    col: Tensor
    flat: Tensor
    rows: Tensor

    def __init__(self, layer: nn.Module, rows: Tensor | None, cols: Tensor | None) -> None:
        super().__init__()
        mask, rows, cols = _places(layer, rows, cols)
        kept = mask[rows][:, cols]
        row, col = kept.nonzero(as_tuple=True)
        crow = torch.zeros(len(rows) + 1, dtype=torch.int64, device=CPU)
        crow[1:] = kept.sum(1).cumsum(0)
        self.dense_shape, self.shape = tuple(mask.shape), (len(rows), len(cols))
        buffers = {"crow": crow, "col": col, "flat": rows[row] * mask.shape[1] + cols[col], "rows": rows}
        for name, value in buffers.items():
            self.register_buffer(name, value.to(weight_of(layer).device))
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
        with torch.autocast(inputs.device.type, enabled=False):  # no sparse products of 16 bits
            return self.matrix(values) @ inputs.to(values.dtype)

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

    @property
    def dense_order(self) -> Tensor:
        """Where the noise of a value lies among that of the dense layer, which draws inputs first (`BayesLinear`)."""
        out, into = self.dense_shape
        return self.flat % into * out + self.flat // into


class _ConvPattern(nn.Module):
    """The same of a convolution: a sparse matrix (out, in) for every place of the kernel that has weights alive.

    Values lie place after place, then row by row.
    """

    crow: Tensor
    col: Tensor
    flat: Tensor
    rows: Tensor

    def __init__(self, layer: nn.Module, rows: Tensor | None, cols: Tensor | None) -> None:
        super().__init__()
        mask, rows, cols = _places(layer, rows, cols)
        kept = mask[rows][:, cols].permute(2, 3, 0, 1)  # (height, width, out, in)
        high, wide, row, col = kept.nonzero(as_tuple=True)
        counts = kept.sum(3).flatten(0, 1)  # (place, out)
        crow = F.pad(counts.cumsum(1), (1, 0))
        flat = ((rows[row] * mask.shape[1] + cols[col]) * mask.shape[2] + high) * mask.shape[3] + wide
        self.dense_shape, self.shape = tuple(mask.shape), (len(rows), len(cols))
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation = layer.padding, layer.dilation
        for name, value in {"crow": crow, "col": col, "flat": flat, "rows": rows}.items():
            self.register_buffer(name, value.to(weight_of(layer).device))
        ends = counts.sum(1).cumsum(0).tolist()
        # (place, offset down, offset right, slice of the values)
        self.taps: list[tuple[int, int, int, slice]] = []
        for place, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            i, j = divmod(place, mask.shape[3])
            if end > start:
                self.taps.append((place, i * self.dilation[0], j * self.dilation[1], slice(start, end)))

    @property
    def nnz(self) -> int:
        """Weights alive."""
        return len(self.col)

    @property
    def dense_order(self) -> Tensor:
        """Where the noise of a value lies among that of the dense layer."""
        return self.flat

    def grid(self, x: Tensor) -> Tensor:
        """Images ``(S, B, C, H, W)`` padded, as ``(S, phase down, phase right, C, B x rows x columns)``.

        With a stride s there are s phases in each direction, of every s-th row or column. A place of the kernel is then
        an offset in one of them, also across images: what it reads beyond one lands where no output is.
        """
        samples, batch, channels, height, width = x.shape
        rows, columns = grid_size(self, height, width)
        (top, left), (s, t) = self.padding, self.stride
        grid = x.new_zeros(samples, channels, batch, rows * s, columns * t)
        x = x[..., : rows * s - top, : columns * t - left].transpose(1, 2)  # with a stride, the end may be left out
        grid[..., top : top + x.shape[3], left : left + x.shape[4]] = x
        if s * t > 1:
            grid = grid.view(samples, channels, batch, rows, s, columns, t).permute(0, 4, 6, 1, 2, 3, 5)
        return grid.reshape(samples, s, t, channels, -1)

    def convolve(self, values: Tensor, x: Tensor) -> Tensor:
        """Images ``(S, B, C, H, W)`` by values ``(S, nnz)``: ``(S, B, out, H', W')``; one of both may be of one sample.

        Without gradients, products are added in place.
        """
        samples, batch = len(values), x.shape[1]
        (high, wide), (rows, columns) = output_size(self, *x.shape[3:]), grid_size(self, *x.shape[3:])
        grids = self.grid(x)
        out = values.new_empty(samples, batch, self.shape[0], high, wide)
        length = ((batch - 1) * rows + high - 1) * columns + wide  # up to the last output
        whole = values.new_empty(self.shape[0], batch * rows * columns)
        found = []
        for i, own in enumerate(values):
            part = self._products(own, grids[i if len(grids) > 1 else 0], columns, whole[:, :length])
            if part is None:
                found.append(values.new_zeros(batch, self.shape[0], high, wide))
            elif torch.is_grad_enabled():
                images = F.pad(part, (0, whole.shape[1] - length)).view(-1, batch, rows, columns)
                found.append(images[:, :, :high, :wide].transpose(0, 1))
            else:
                out[i] = whole.view(-1, batch, rows, columns)[:, :, :high, :wide].transpose(0, 1)
        return torch.stack(found) if found else out

    def _products(self, values: Tensor, grid: Tensor, columns: int, out: Tensor) -> Tensor | None:
        """Sum over the places of the kernel, ``(out, length)``; in ``out`` where there are no gradients; None: zero."""
        total = None
        for place, down, right, chosen in self.taps:
            (s, t), crow = self.stride, self.crow[place]
            shift = down // s * columns + right // t
            inputs = grid[down % s, right % t, :, shift : shift + out.shape[1]]
            matrix = torch.sparse_csr_tensor(crow, self.col[chosen], values[chosen], self.shape, check_invariants=False)
            if torch.is_grad_enabled():
                product = matrix @ inputs
                total = product if total is None else total + product
            else:
                total = torch.addmm(out, matrix, inputs, beta=0 if total is None else 1, out=out)
        return total


def output_size(layer: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width of the output of a convolution, or of the pattern of one."""
    return tuple(
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            (height, width), layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    )


def grid_size(layer: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a phase of its grid: the output, and what the kernel reaches beyond."""
    return tuple(
        out + dilation * (kernel - 1) // stride
        for out, kernel, dilation, stride in zip(
            output_size(layer, height, width), layer.kernel_size, layer.dilation, layer.stride, strict=True
        )
    )


def _places(layer: nn.Module, rows: Tensor | None, cols: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    mask = mask_of(layer)
    out, into = mask.shape[:2]
    rows = torch.arange(out, device=CPU) if rows is None else rows.cpu()
    return mask, rows, torch.arange(into, device=CPU) if cols is None else cols.cpu()


def _described(pattern: _Pattern | _ConvPattern) -> str:
    part = pattern.nnz / max(math.prod(pattern.dense_shape), 1)
    return f"{pattern.shape[1]}, {pattern.shape[0]}, alive={pattern.nnz} ({100 * part:.2g} % of the dense layer)"


# ------------------------------------------------------------------------------------------------------------- ordinary


class _Sparse(nn.Module):
    """An ordinary layer: values of the weights alive, and biases of the outputs that were kept."""

    def __init__(self, layer: nn.Module, pattern: _Pattern | _ConvPattern) -> None:
        super().__init__()
        self.pattern = pattern
        self.values = nn.Parameter(layer.weight.detach().flatten()[pattern.flat].clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach()[pattern.rows].clone())

    def extra_repr(self) -> str:
        """Sizes and density."""
        return _described(self.pattern)


class SparseLinear(_Sparse):
    """`torch.nn.Linear` whose weights alive are the values of a sparse matrix.

    Args:
        layer: The layer with its mask.
        rows: Outputs to keep; None: all.
        cols: Inputs to keep; None: all.
    """

    def __init__(self, layer: nn.Linear, rows: Tensor | None = None, cols: Tensor | None = None) -> None:
        super().__init__(layer, _Pattern(layer, rows, cols))

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in) -> (..., out)``."""
        out = self.pattern.times(self.values, x.flatten(0, -2).mT).mT
        out = out if self.bias is None else out + self.bias
        return out.unflatten(0, x.shape[:-1])


class SparseConv2d(_Sparse):
    """`torch.nn.Conv2d` whose weights alive are the values of sparse matrices.

    Args:
        layer: The layer with its mask; one group, zeros as padding.
        rows: Output channels to keep; None: all.
        cols: Input channels to keep; None: all.
    """

    def __init__(self, layer: nn.Conv2d, rows: Tensor | None = None, cols: Tensor | None = None) -> None:
        super().__init__(layer, _ConvPattern(layer, rows, cols))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in, H, W) -> (B, out, H', W')``."""
        with torch.autocast(x.device.type, enabled=False):
            out = self.pattern.convolve(self.values[None], x.to(self.values.dtype)[None])[0]
        return out if self.bias is None else out + self.bias[:, None, None]


# ------------------------------------------------------------------------------------------------------------- Bayesian


class _SparseBayes(BayesianLayer):
    """Values mu + sigma eps of the weights alive for each sample, and biases of the outputs that were kept."""

    def __init__(self, layer: BayesianLayer, pattern: _Pattern | _ConvPattern, noise: Noise) -> None:
        if noise not in ("alive", "dense"):
            raise ValueError(f"noise={noise!r} is unknown; choose alive or dense")
        # Nothing to draw: the values, one vector of those alive, come from the layer.
        super().__init__((0,), False, layer.prior, layer.init)
        self.pattern, self.noise, self.dense_fan_in = pattern, noise, layer.fan_in
        for part in ("mu", "log_sigma"):
            weight = getattr(layer, f"weight_{part}").detach().flatten()[pattern.flat].clone()
            setattr(self, f"weight_{part}", nn.Parameter(weight))
            if layer.bias_mu is not None:
                bias = getattr(layer, f"bias_{part}").detach()[pattern.rows].clone()
                setattr(self, f"bias_{part}", nn.Parameter(bias))

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
        weights, biases = math.prod(self.pattern.dense_shape), self.pattern.dense_shape[0]
        drawn = context.noise((weights + (0 if self.bias_mu is None else biases),), self.weight_mu)
        bias = drawn[:, :0] if self.bias_mu is None else drawn[:, weights + self.pattern.rows]
        return drawn[:, self.pattern.dense_order], bias

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, ...)`` or ``(S B, ...)`` to ``(S B, ...)``; outside of a context by the means."""
        context = current()
        if context is None:
            if self.training:
                raise RuntimeError(f"{type(self).__name__} was called in training without weight samples")
            return self._by_means(x)
        if context.estimator != "weight":
            raise ValueError("model.estimator: sparse layers have explicit weights; use model.estimator=weight")
        return self._by_values(x, *self.sample(context), context)

    def _by_means(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _by_values(self, x: Tensor, values: Tensor, bias: Tensor | None, context: SampleContext) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Sizes and density."""
        return _described(self.pattern)


class SparseBayesLinear(_SparseBayes):
    """`BayesLinear` whose weights alive are the values of sparse matrices, mu + sigma eps for each sample.

    Args:
        layer: The layer with its mask.
        rows: Outputs to keep; None: all.
        cols: Inputs to keep; None: all.
        noise: ``alive``: noise is drawn for the weights alive. ``dense``: for all weights of the dense layer, so that
            samples equal those of the masked dense layer, at its cost.
    """

    def __init__(
        self, layer: BayesLinear, rows: Tensor | None = None, cols: Tensor | None = None, noise: Noise = "alive"
    ) -> None:
        super().__init__(layer, _Pattern(layer, rows, cols), noise)

    @override
    def _by_means(self, x: Tensor) -> Tensor:
        out = self.pattern.times(self.weight_mu, x.flatten(0, -2).mT).mT
        out = out if self.bias_mu is None else out + self.bias_mu
        return out.unflatten(0, x.shape[:-1])

    @override
    def _by_values(self, x: Tensor, values: Tensor, bias: Tensor | None, context: SampleContext) -> Tensor:
        inner = x.shape[1:-1]
        if context.is_folded(x):
            parts = zip(values, context.by_sample(x), strict=True)
            out = torch.stack([self.pattern.times(one, part.flatten(0, -2).mT) for one, part in parts])
        else:
            out = self.pattern.times(values, x.flatten(0, -2).mT)
            out = out.unflatten(0, (context.samples, self.pattern.shape[0]))
        if bias is not None:  # out is (S, out, rows)
            out = out + bias.unsqueeze(-1)
        return out.mT.reshape(context.samples * (out.shape[2] // math.prod(inner)), *inner, out.shape[1])


class SparseBayesConv2d(_SparseBayes):
    """`BayesConv2d` whose weights alive are the values of sparse matrices; arguments of `SparseBayesLinear`."""

    def __init__(
        self, layer: BayesConv2d, rows: Tensor | None = None, cols: Tensor | None = None, noise: Noise = "alive"
    ) -> None:
        super().__init__(layer, _ConvPattern(layer, rows, cols), noise)

    @override
    def _by_means(self, x: Tensor) -> Tensor:
        bias = None if self.bias_mu is None else self.bias_mu[None]
        return self._convolved(x[None], self.weight_mu[None], bias)

    @override
    def _by_values(self, x: Tensor, values: Tensor, bias: Tensor | None, context: SampleContext) -> Tensor:
        return self._convolved(context.by_sample(x) if context.is_folded(x) else x[None], values, bias)

    def _convolved(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Images ``(S, B, ...)``, or ``(1, B, ...)`` of all samples, by the values of each."""
        with torch.autocast(x.device.type, enabled=False):
            out = self.pattern.convolve(values, x.to(values.dtype))
        return (out if bias is None else out + bias[:, None, :, None, None]).flatten(0, 1)
