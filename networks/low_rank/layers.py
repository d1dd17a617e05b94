"""Layers whose weight is ``W2 = U Sigma V^T``, and the handle through which methods turn weights into them and back.

``W2`` (m, n) is the tall view of the weight. Two mechanisms serve one interface, `LowRankWeight`:

- `Linear`, `Conv1d/2d/3d` and `Embedding` keep their object and change their class: hooks, names, the bias and other
  references stay what they were, and ``forward`` multiplies by the factors where that costs less.
- Any other tensor (`MultiheadAttention.in_proj_weight`, layers of somebody's own) gets a parametrization, which
  computes the dense weight on every access.

U and V are parameters without a gradient. As buffers, DistributedDataParallel would send them with every forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from typing_extensions import override

from networks.tall_view import from_tall, is_transposed, tall_shape, to_tall

# Sees the dense weight whenever it is computed; while there is one, layers compute with the dense weight.
Observer = Callable[[Tensor], None]


def factored_is_cheaper(m: int, n: int, rank: int) -> bool:
    """Whether a row costs fewer multiplications through the factors: ``r (m + n) + r^2 < m n``."""
    return rank * (m + n) + rank * rank < m * n


class _Factored:
    """What the drop-in layers share. The parameters are ``u`` (m, r), ``sigma`` (r, r), ``v`` (n, r)."""

    dense_class: ClassVar[type[nn.Module]]
    u: nn.Parameter
    sigma: nn.Parameter
    v: nn.Parameter
    observe: Observer | None = None

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the weight that the factors stand for."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.u.shape[1]  # not that of Sigma, which AB-training computes whenever it is read

    @property
    def weight(self) -> Tensor:
        """The dense weight, computed on access: attention reads the weight of its output projection."""
        shape = self.dense_shape
        weight = from_tall(self.u @ self.sigma @ self.v.mT, shape, is_transposed(shape))
        if self.observe is not None:
            self.observe(weight)
        return weight

    def _factored(self) -> bool:
        return self.observe is None and factored_is_cheaper(len(self.u), len(self.v), self.rank)

    def _two_maps(self) -> tuple[Tensor, Tensor]:
        """``(up (out, r), down (r, rest))`` with ``W = up @ down``; Sigma is folded into the shorter factor."""
        if is_transposed(self.dense_shape):  # W = V Sigma^T U^T
            return self.v @ self.sigma.mT, self.u.mT
        return self.u, self.sigma @ self.v.mT

    def extra_repr(self) -> str:
        """The layer's own description and the rank."""
        return f"{super().extra_repr()}, rank={self.rank}"  # type: ignore[misc]


class _LinearForward(_Factored):
    @property
    @override
    def dense_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs (..., in) -> (..., out)``."""
        if not self._factored():
            return F.linear(inputs, self.weight, self.bias)
        if inputs.numel() >= len(self.v) * self.in_features:  # more rows than the fold costs
            up, down = self._two_maps()
            return F.linear(F.linear(inputs, down), up, self.bias)
        if is_transposed(self.dense_shape):
            down, middle, up = self.u.mT, self.sigma.mT, self.v
        else:
            down, middle, up = self.v.mT, self.sigma, self.u
        return F.linear(F.linear(F.linear(inputs, down), middle), up, self.bias)


class LowRankLinear(_LinearForward, nn.Linear):
    """`torch.nn.Linear` with a factored weight."""

    dense_class = nn.Linear


class LowRankAttentionOutput(_LinearForward, NonDynamicallyQuantizableLinear):
    """The output projection of `torch.nn.MultiheadAttention`, which reads ``weight`` and never calls ``forward``."""

    dense_class = NonDynamicallyQuantizableLinear


class _ConvForward(_Factored):
    @property
    @override
    def dense_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def forward(self, inputs: Tensor) -> Tensor:
        """A convolution to r channels (stride, padding and dilation are its) and one of kernel 1 to all channels."""
        if self.groups > 1 or not self._factored():
            return self._conv_forward(inputs, self.weight, self.bias)
        up, down = self._two_maps()
        reduced = self._conv_forward(inputs, down.reshape(self.rank, *self.dense_shape[1:]), None)
        ones = (1,) * len(self.kernel_size)
        return self._pointwise(reduced, up.reshape(*up.shape, *ones), self.bias)


class LowRankConv1d(_ConvForward, nn.Conv1d):
    """`torch.nn.Conv1d` with a factored weight."""

    dense_class = nn.Conv1d
    _pointwise = staticmethod(F.conv1d)


class LowRankConv2d(_ConvForward, nn.Conv2d):
    """`torch.nn.Conv2d` with a factored weight."""

    dense_class = nn.Conv2d
    _pointwise = staticmethod(F.conv2d)


class LowRankConv3d(_ConvForward, nn.Conv3d):
    """`torch.nn.Conv3d` with a factored weight."""

    dense_class = nn.Conv3d
    _pointwise = staticmethod(F.conv3d)


class LowRankEmbedding(_Factored, nn.Embedding):
    """`torch.nn.Embedding` with a factored table: rows of the long factor are looked up, then multiplied."""

    dense_class = nn.Embedding

    @property
    @override
    def dense_shape(self) -> tuple[int, ...]:
        return self.num_embeddings, self.embedding_dim

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        if self.observe is not None:
            return F.embedding(inputs, self.weight, self.padding_idx)
        if is_transposed(self.dense_shape):
            return F.embedding(inputs, self.v, self.padding_idx) @ self.sigma.mT @ self.u.mT
        return F.embedding(inputs, self.u, self.padding_idx) @ self.sigma @ self.v.mT


FACTORED: dict[type[nn.Module], type[nn.Module]] = {
    layer.dense_class: layer
    for layer in (
        LowRankLinear,
        LowRankAttentionOutput,
        LowRankConv1d,
        LowRankConv2d,
        LowRankConv3d,
        LowRankEmbedding,
    )
}


class LowRankParametrization(nn.Module):
    """Parametrization of any tensor by Sigma, which is the ``original`` parameter; U and V are held here."""

    observe: Observer | None = None

    def __init__(self, u: Tensor, sigma: Tensor, v: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(u, requires_grad=False), nn.Parameter(v, requires_grad=False)
        self.shape = tuple(shape)
        self._first = sigma  # what right_inverse returns while the parametrization is registered

    def forward(self, sigma: Tensor) -> Tensor:
        """The dense weight of Sigma (r, r)."""
        weight = from_tall(self.u @ sigma @ self.v.mT, self.shape, is_transposed(self.shape))
        if self.observe is not None:
            self.observe(weight)
        return weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Sigma of the weight that is being parametrized; later, the projection of a weight on the bases."""
        if self._first is not None:
            sigma, self._first = self._first, None
            return sigma
        matrix, _ = to_tall(weight)
        return self.u.mT @ matrix @ self.v


class LowRankWeight:
    """One weight of a network, dense or ``U Sigma V^T``: the handle that selects, converts, updates and restores it.

    Args:
        module: The module that holds the tensor.
        tensor: Name of the parameter in that module.
        path: Path of the module in the network, ``""`` for the network itself.
    """

    def __init__(self, module: nn.Module, tensor: str, path: str) -> None:
        self.module, self.tensor, self.path = module, tensor, path
        self.drop_in = tensor == "weight" and (isinstance(module, _Factored) or type(module) in FACTORED)
        self.shape = module.dense_shape if isinstance(module, _Factored) else tuple(getattr(module, tensor).shape)
        self.transposed = is_transposed(self.shape)
        self.m, self.n = tall_shape(self.shape)

    def __repr__(self) -> str:
        kind = f"rank {self.rank} of {self.n}" if self.converted else "dense"
        return f"LowRankWeight({self.name}, {self.shape}, {kind})"

    @property
    def name(self) -> str:
        """Path of the tensor, as in the ``state_dict`` of the dense network."""
        return f"{self.path}.{self.tensor}" if self.path else self.tensor

    @property
    def label(self) -> str:
        """Short name for logs and figures: the path of the module where its tensor is called ``weight``."""
        return self.path if self.path and self.tensor == "weight" else self.name

    # ------------------------------------------------------------------------------------------------------- reading

    @property
    def converted(self) -> bool:
        """Whether the weight is factored now."""
        return isinstance(self.module, _Factored) if self.drop_in else self._parametrization() is not None

    def _parametrization(self) -> LowRankParametrization | None:
        if not parametrize.is_parametrized(self.module, self.tensor):
            return None
        first = self.module.parametrizations[self.tensor][0]
        return first if isinstance(first, LowRankParametrization) else None

    @property
    def u(self) -> nn.Parameter:
        """Left basis, (m, r)."""
        return self.module.u if self.drop_in else self._parametrization().u

    @property
    def v(self) -> nn.Parameter:
        """Right basis, (n, r)."""
        return self.module.v if self.drop_in else self._parametrization().v

    @property
    def sigma(self) -> nn.Parameter:
        """The square matrix between the bases, (r, r)."""
        return self.module.sigma if self.drop_in else self.module.parametrizations[self.tensor].original

    @property
    def sigma_place(self) -> tuple[nn.Module, str]:
        """The module that holds Sigma, and its name there."""
        return (self.module, "sigma") if self.drop_in else (self.module.parametrizations[self.tensor], "original")

    @property
    def sigma_path(self) -> str:
        """Path of Sigma, as in the ``state_dict`` of the factored network."""
        inner = "sigma" if self.drop_in else f"parametrizations.{self.tensor}.original"
        return f"{self.path}.{inner}" if self.path else inner

    @property
    def trained(self) -> nn.Parameter:
        """What the optimizer holds in the place of the weight: Sigma, or the dense weight."""
        return self.sigma if self.converted else getattr(self.module, self.tensor)

    @property
    def rank(self) -> int:
        """Rank of the factors; that of a dense weight is taken to be n."""
        return len(self.sigma) if self.converted else self.n

    @property
    def trains_bases(self) -> bool:
        """Whether U and V are trained as well."""
        return self.converted and self.u.requires_grad

    @property
    def stored(self) -> int:
        """Numbers kept for this weight: ``r (m + n) + r^2``, or ``m n``."""
        return self.rank * (self.m + self.n) + self.rank**2 if self.converted else self.m * self.n

    def dense(self) -> Tensor:
        """The weight in its own shape."""
        return getattr(self.module, self.tensor)

    def matrix(self) -> Tensor:
        """The tall view, (m, n)."""
        return to_tall(self.dense())[0]

    # ------------------------------------------------------------------------------------------------------- writing

    def observe(self, observer: Observer | None) -> None:
        """Show every dense weight that a factored weight computes to an observer (for gradients); None: stop."""
        (self.module if self.drop_in else self._parametrization()).observe = observer

    @torch.no_grad()
    def assign(self, u: Tensor, sigma: Tensor, v: Tensor, train_bases: bool = False) -> None:
        """Make the weight ``u sigma v^T``, in the weight's type.

        Factors of the same shape take the values; otherwise all three are new parameters and the old ones are left as
        they are: autograd remembers the shape of a parameter beyond a change of its data.
        """
        old = self.trained
        u, sigma, v = (t.to(device=old.device, dtype=old.dtype).contiguous() for t in (u, sigma, v))
        if self.converted and self.rank == len(sigma) and self.trains_bases == train_bases:
            for parameter, value in ((self.u, u), (self.sigma, sigma), (self.v, v)):
                parameter.copy_(value)
            return
        if not self.converted:
            self._begin(u, sigma, v)
        if self.drop_in:
            self.module.u, self.module.sigma, self.module.v = (nn.Parameter(t) for t in (u, sigma, v))
        else:
            held = self._parametrization()
            held.u, held.v = nn.Parameter(u), nn.Parameter(v)
            self.module.parametrizations[self.tensor].original = nn.Parameter(sigma)
        self.sigma.requires_grad_(old.requires_grad)
        self.u.requires_grad_(train_bases)
        self.v.requires_grad_(train_bases)

    def _begin(self, u: Tensor, sigma: Tensor, v: Tensor) -> None:
        module = self.module
        if self.drop_in:
            rest = {name: value for name, value in module._parameters.items() if name != "weight"}
            module._parameters.clear()
            module.__class__ = FACTORED[type(module)]
            for name in ("u", "sigma", "v"):
                module.register_parameter(name, None)
            module._parameters.update(rest)
            return
        # The parametrization would change the data of the parameter that the optimizer still holds: give it a copy.
        weight = getattr(module, self.tensor)
        setattr(module, self.tensor, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
        if parametrize.is_parametrized(module):
            _own_class(module)
        parametrization = LowRankParametrization(u, sigma, v, weight.shape)
        parametrize.register_parametrization(module, self.tensor, parametrization, unsafe=True)

    @torch.no_grad()
    def restore(self) -> None:
        """Make the weight dense again, in a new parameter with the value that it has."""
        if not self.converted:
            return
        requires_grad = self.sigma.requires_grad
        weight = nn.Parameter(self.dense().detach().clone().contiguous(), requires_grad=requires_grad)
        module = self.module
        if self.drop_in:
            rest = {name: p for name, p in module._parameters.items() if name not in ("u", "sigma", "v")}
            module._parameters.clear()
            module.__class__ = module.dense_class
            module._parameters.update({"weight": weight} | rest)
        else:
            # Not parametrize.remove_parametrizations: it takes the property from a class that copies share.
            del module.parametrizations[self.tensor]
            if len(module.parametrizations):
                _own_class(module, without=self.tensor)
            else:
                del module.parametrizations
                module.__class__ = type(module).__bases__[0]
            module.register_parameter(self.tensor, weight)


def _own_class(module: nn.Module, without: str | None = None) -> None:
    """Give a parametrized module a class of its own, perhaps without the property of one tensor.

    Copies of a module share the class that `torch.nn.utils.parametrize` made for it, and its properties with it.
    """
    shared = type(module)
    left_out = {"__dict__", "__weakref__", without}
    members = {name: value for name, value in vars(shared).items() if name not in left_out}
    module.__class__ = type(shared.__name__, shared.__bases__, members)


def factored_weights(network: nn.Module) -> Iterator[LowRankWeight]:
    """All weights of a network that are factored now, in the order of definition."""
    for path, module in network.named_modules():
        if isinstance(module, _Factored):
            yield LowRankWeight(module, "weight", path)
        elif parametrize.is_parametrized(module):
            for tensor, held in module.parametrizations.items():
                if isinstance(held[0], LowRankParametrization):
                    yield LowRankWeight(module, tensor, path)


def weight_of(network: nn.Module, name: str) -> LowRankWeight:
    """The handle of the weight with this dotted name.

    Raises:
        AttributeError: The network has no such weight.
    """
    path, _, tensor = name.rpartition(".")
    module: Any = network.get_submodule(path)
    if not isinstance(getattr(module, tensor, None), Tensor):
        raise AttributeError(f"{type(module).__name__} at {path!r} has no tensor {tensor!r}")
    return LowRankWeight(module, tensor, path)
