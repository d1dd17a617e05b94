"""A weight as the product of two factors of which one is trained: the arithmetic of AB-training, and layers with it.

Every weight ``W`` with two axes or more has a tall view ``W2`` (m, n), ``m >= n`` (`networks.tall_view`). It is split
into ``A`` (m, r) and ``B`` (r, n), one of them is trained, and what several copies learn is combined to one ``W2``.

Source: Coquelin et al., AB-Training (arXiv 2405.01067).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.tall_view import from_tall, is_transposed, tall_shape, to_tall

Side = Literal["a", "b"]
Sync = Literal["only-learned", "with-stale", "full", "only-b"]
SigmaSplit = Literal["both", "trained"]
Init = Literal["unified", "ortho-sigma", "rand-sigma", "sloped-sigma"]


class Factors(NamedTuple):
    """``W2 = a @ b``.

    Attributes:
        a: (m, r).
        b: (r, n).
    """

    a: Tensor
    b: Tensor


class Decomposition(NamedTuple):
    """Singular value decomposition of a tall view, in float32 or better.

    Attributes:
        u: Left vectors (m, n).
        sigma: Singular values (n,), descending.
        vh: Right vectors, transposed, (n, n).
    """

    u: Tensor
    sigma: Tensor
    vh: Tensor


# ------------------------------------------------------------------------------------------------------ split, combine


@torch.no_grad()
def decompose(weight: Tensor, name: str = "a weight") -> Decomposition:
    """Decompose the tall view of a weight.

    Raises:
        ValueError: If the weight holds NaN or infinity; names it.
    """
    matrix, _ = to_tall(weight.detach())
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{name} holds values that are not finite, it has no singular values: lower the learning rate")
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    return Decomposition(*torch.linalg.svd(matrix, full_matrices=False))


def num_kept(sigma: Tensor, cutoff: float, before: int | None = None, max_drop: float = 1.0) -> int:
    """Rank after the cutoff: the number of ``sigma_i > cutoff * sigma_1``.

    Args:
        sigma: Singular values, descending.
        cutoff: Relative to the largest; 0 keeps all that are not zero.
        before: Rank of the last split; None: all.
        max_drop: Largest fraction of ``before`` that one split may drop.

    Returns:
        At least 1. All of them for a weight that is zero, which has no directions to choose from.
    """
    total = len(sigma)
    if not sigma[0] > 0:
        return total
    kept = int((sigma > cutoff * sigma[0]).sum())
    before = total if before is None else min(before, total)
    return max(1, kept, before - int(max_drop * before))


def split(parts: Decomposition, rank: int) -> Factors:
    """The leading ``rank`` directions with the singular values shared: ``A = U sqrt(S)``, ``B = sqrt(S) V^T``."""
    root = parts.sigma[:rank].sqrt()
    return Factors(parts.u[:, :rank] * root, root[:, None] * parts.vh[:rank])


def scale_to(factors: Factors, root: Tensor, trained: Side) -> Factors:
    """Give the trained factor all of the singular values and the other one none; the product stays.

    Args:
        factors: As of `split`.
        root: Square roots of the singular values, (r,).
        trained: The factor that gets them.
    """
    root = root.clamp_min(torch.finfo(root.dtype).tiny)
    if trained == "a":
        return Factors(factors.a * root, factors.b / root[:, None])
    return Factors(factors.a / root, factors.b * root[:, None])


def combine(sync: Sync, start: Factors, a: Tensor, b: Tensor) -> Tensor:
    """What all groups together have learned, as a tall view (m, n).

    With ``dA = a - A0``, ``dB = b - B0``: ``only-learned`` is ``W0 + dA B0 + A0 dB + dA dB``, ``full`` is
    ``W0 + (dA B0 + A0 dB) / 2``, ``with-stale`` the same ``+ dA dB / 4``.

    Args:
        sync: Rule. ``only-learned``: the mean of every factor over the groups that train it. ``with-stale``: its mean
            over all groups, copies that nobody trained included. ``full``: the mean of the groups' products.
            ``only-b``: there is one group and it trains ``B``.
        start: Factors at the split, the same for all groups.
        a: Mean of ``A`` over the groups that train it.
        b: Mean of ``B`` over the groups that train it.
    """
    match sync:
        case "only-learned":
            return a @ b
        case "with-stale":
            return (a + start.a) @ (b + start.b) / 4
        case "full":
            return (a @ start.b + start.a @ b) / 2
        case "only-b":
            return start.a @ b
    raise ValueError(f"strategy.sync={sync!r}: choose only-learned, with-stale, full or only-b")


class Divergence(NamedTuple):
    """Inner products of what the two halves have changed, ``dA B0`` and ``A0 dB``; they add over layers.

    Attributes:
        inner: Of the two.
        of_a: Of ``dA B0`` with itself.
        of_b: Of ``A0 dB`` with itself.
        start: Of ``A0 B0`` with itself.
    """

    inner: float
    of_a: float
    of_b: float
    start: float


@torch.no_grad()
def divergence(start: Factors, a: Tensor, b: Tensor) -> Divergence:
    """How far the halves went and whether in the same direction, from (r, r) products alone."""
    change_a, change_b = a - start.a, b - start.b
    right = start.b @ start.b.T
    left = start.a.T @ start.a
    values = (
        (change_a.T @ start.a) * (start.b @ change_b.T),
        (change_a.T @ change_a) * right,
        left * (change_b @ change_b.T),
        left * right,
    )
    return Divergence(*(float(v.sum()) for v in values))


def num_factored(shape: tuple[int, ...], rank: int) -> int:
    """Numbers in both factors of a weight of this shape."""
    return rank * sum(tall_shape(shape))


def saves(shape: tuple[int, ...], rank: int) -> bool:
    """Whether the factors are smaller than the weight: ``r (m + n) < m n``."""
    m, n = tall_shape(shape)
    return rank * (m + n) < m * n


# --------------------------------------------------------------------------------------------------------- beginnings


@torch.no_grad()
def with_spectrum(weight: Tensor, init: Init, generator: torch.Generator | None = None) -> Tensor:
    """The weight with the same singular vectors and other singular values.

    Args:
        weight: Two axes or more.
        init: ``ortho-sigma``: all 1, so that trained directions rise above the rest and cutoffs become effective early.
            ``rand-sigma``: uniform between 0 and the largest one, sorted. ``sloped-sigma``: ``2 sigma_1 0.1^i``.
            ``unified``: the weight as it is.
        generator: For ``rand-sigma``.
    """
    if init == "unified":
        return weight.clone()
    u, sigma, vh = decompose(weight)
    match init:
        case "ortho-sigma":
            values = torch.ones_like(sigma)
        case "rand-sigma":
            drawn = torch.rand(len(sigma), generator=generator, dtype=sigma.dtype)
            values = sigma[0] * drawn.sort(descending=True).values.to(sigma.device)
        case "sloped-sigma":
            values = 2 * sigma[0] * 0.1 ** torch.arange(len(sigma), dtype=sigma.dtype, device=sigma.device)
        case _:
            raise ValueError(f"strategy.init={init!r}: choose unified, ortho-sigma, rand-sigma or sloped-sigma")
    return from_tall((u * values) @ vh, weight.shape, is_transposed(weight.shape)).to(weight.dtype)


def set_spectra(module: nn.Module, init: Init) -> None:
    """Replace all trained weights with two axes or more by those of `with_spectrum`, equally on all ranks of a seed.

    Args:
        module: What is trained.
        init: Of the singular values.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    for parameter in module.parameters():
        if parameter.requires_grad and sum(size > 1 for size in parameter.shape) >= 2:
            parameter.data.copy_(with_spectrum(parameter, init, generator))


# ---------------------------------------------------------------------------------------------------- optimizer state

# What torch's optimizers keep per parameter: averages of gradients, averages of their squares, numbers.
_FIRST_MOMENTS = {"exp_avg", "momentum_buffer", "grad_avg"}
_SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


@torch.no_grad()
def project_state(state: dict[str, Any], shape: tuple[int, ...], start: Factors, side: Side) -> dict[str, Any]:
    """The optimizer state that a factor would have if it had been trained instead of the weight.

    First moments are exact by the chain rule, ``m_A = m_W2 B0^T`` and ``m_B = A0^T m_W2``. Second moments take the
    entries of a gradient for independent, ``v_A = v_W2 (B0 * B0)^T`` and ``v_B = (A0 * A0)^T v_W2``.

    Args:
        state: Of the weight.
        shape: Of the weight.
        start: Factors at the split.
        side: The factor that is trained.

    Raises:
        ValueError: For a state that is neither; names it.
    """
    moved: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != torch.Size(shape):
            moved[key] = value.clone() if isinstance(value, Tensor) else value
        elif key in _FIRST_MOMENTS | _SECOND_MOMENTS:
            matrix, _ = to_tall(value)
            frozen = start.b if side == "a" else start.a
            frozen = (frozen * frozen if key in _SECOND_MOMENTS else frozen).to(matrix.dtype)
            moved[key] = matrix @ frozen.T if side == "a" else frozen.T @ matrix
        else:
            raise ValueError(
                f"strategy.opt_state=project does not know what the optimizer keeps as {key!r}: use hold or reset"
            )
    return moved


# -------------------------------------------------------------------------------------------------------------- layers


class ABFactor:
    """One weight of one module, whole or as two factors (modes ``full``, ``a``, ``b``).

    As factors, the module has the parameters ``<name>_a`` and ``<name>_b`` in the place of ``<name>``, one of which
    requires a gradient, and the memory of the weight is free. Linear and convolutional layers then compute with the
    factors themselves where that is cheaper. Everything else that reads ``module.<name>`` gets the product, through
    which gradients flow; so attention, embeddings and code of others work too. The module stays an instance of its
    class.

    Args:
        module: Owner of the weight.
        name: Attribute.
        path: Name for messages.
    """

    def __init__(self, module: nn.Module, name: str, path: str = "") -> None:
        self.module, self.name, self.path = module, name, path or name
        self.weight: nn.Parameter = module._parameters[name]
        self.shape = tuple(self.weight.shape)
        self.transposed = is_transposed(self.shape)
        self.a: nn.Parameter | None = None
        self.b: nn.Parameter | None = None

    @property
    def mode(self) -> Literal["full", "a", "b"]:
        """Whole, or which factor is trained."""
        if self.a is None:
            return "full"
        return "a" if self.a.requires_grad else "b"

    @property
    def rank(self) -> int:
        """Of the factors."""
        return self.a.shape[1]

    @property
    def trained(self) -> nn.Parameter:
        """The factor that is trained."""
        return self.a if self.mode == "a" else self.b

    @property
    def factors(self) -> Factors:
        """Both, as they are now."""
        return Factors(self.a, self.b)

    def product(self) -> Tensor:
        """The weight that the factors stand for, differentiable."""
        return from_tall(self.a @ self.b, self.shape, self.transposed)

    @torch.no_grad()
    def factorize(self, factors: Factors, side: Side) -> None:
        """Replace the weight by factors: a copy of the one that is trained, ``side``, and the other one as it is."""
        new = [
            f.detach().to(self.weight.dtype, copy=side == which).contiguous()
            for f, which in zip(factors, "ab", strict=True)
        ]
        a, b = (nn.Parameter(t, requires_grad=side == which) for t, which in zip(new, "ab", strict=True))
        self.attach(a, b)

    def attach(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """Put these factors in the place of the weight and free it."""
        assert self.a is None, f"{self.path} is factored already"
        self.a, self.b = a, b
        _replace(self.module, {self.name: {f"{self.name}_a": a, f"{self.name}_b": b}})
        self.weight.grad = None
        self.weight.data = self.weight.data.new_empty(0)
        self.module.__dict__.setdefault("_ab_factors", {})[self.name] = self
        _set_class(self.module)

    def detach(self, matrix: Tensor | None = None) -> tuple[nn.Parameter, nn.Parameter]:
        """Put the weight back and return the factors.

        Args:
            matrix: Its tall view (m, n); None: the product of the factors.
        """
        assert self.a is not None, f"{self.path} is not factored"
        a, b = self.a, self.b
        matrix = (a @ b if matrix is None else matrix).detach()
        self.weight.data = from_tall(matrix, self.shape, self.transposed).to(a.dtype).contiguous()
        self.a = self.b = None
        _replace(self.module, {f"{self.name}_a": {self.name: self.weight}, f"{self.name}_b": {}})
        del self.module.__dict__["_ab_factors"][self.name]
        _set_class(self.module)
        return a, b


def _replace(module: nn.Module, new: dict[str, dict[str, nn.Parameter]]) -> None:
    """Exchange parameters in their places: the order of ``parameters()`` must not depend on what happened before."""
    order = list(module._parameters.items())
    module._parameters.clear()
    for name, parameter in order:
        module._parameters.update(new.get(name, {name: parameter}))


def _set_class(module: nn.Module) -> None:
    base = getattr(type(module), "_ab_base", type(module))
    names = tuple(sorted(module.__dict__["_ab_factors"]))
    if not names:
        del module.__dict__["_ab_factors"]
    module.__class__ = _factored_class(base, names) if names else base


@cache
def _factored_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass whose weights are products, as torch.nn.utils.parametrize makes one."""
    members: dict[str, Any] = {name: property(_product_of(name)) for name in names}
    if "weight" in names:
        # Only where the class computes in torch's own way; another forward reads the product.
        if base.forward is nn.Linear.forward:
            members["forward"] = _linear
        elif base.forward in _CONVOLUTIONS:
            members["forward"] = _convolution
    return type(f"AB{base.__name__}", (base,), {"_ab_base": base, "__module__": base.__module__, **members})


def _product_of(name: str) -> Callable[[nn.Module], Tensor]:
    def product(module: nn.Module) -> Tensor:
        return module.__dict__["_ab_factors"][name].product()

    return product


def _linear(self: nn.Linear, x: Tensor) -> Tensor:
    """``y = (x B^T) A^T + bias``, or ``(x A) B + bias`` for a layer with fewer outputs than inputs."""
    ab: ABFactor = self.__dict__["_ab_factors"]["weight"]
    if not saves(ab.shape, ab.rank):
        return F.linear(x, ab.product(), self.bias)
    inner, outer = (ab.a.T, ab.b.T) if ab.transposed else (ab.b, ab.a)
    return F.linear(F.linear(x, inner), outer, self.bias)


def _convolution(self: Any, x: Tensor) -> Tensor:
    """A convolution with r kernels, then one of size 1 that mixes them."""
    ab: ABFactor = self.__dict__["_ab_factors"]["weight"]
    if self.groups > 1 or not saves(ab.shape, ab.rank):
        return self._conv_forward(x, ab.product(), self.bias)
    inner, outer = (ab.a.T, ab.b.T) if ab.transposed else (ab.b, ab.a)
    kernels = inner.reshape(ab.rank, *ab.shape[1:])
    mixing = outer.reshape(ab.shape[0], ab.rank, *[1] * (len(ab.shape) - 2))
    return _CONVOLUTIONS[type(self)._ab_base.forward](self._conv_forward(x, kernels, None), mixing, self.bias)


_CONVOLUTIONS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    nn.Conv1d.forward: F.conv1d,
    nn.Conv2d.forward: F.conv2d,
    nn.Conv3d.forward: F.conv3d,
}
