"""What functions of torch do to the channels of their arguments: layers, entry by entry, reshapes, reductions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from networks.fusion.layout import Role
from networks.fusion.tracer import Along, Tracer, Value, register, tensors_in

# --------------------------------------------------------------------------------------------------- layers that learn


@register("linear")
def _linear(tracer: Tracer, result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Value | None:
    return _layer(tracer, x, weight, bias, "linear", x.ndim - 1, result.ndim - 1)


def _layer(
    tracer: Tracer, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, dim: int, out: int
) -> Value | None:
    """A layer whose weight is (out, in, ...)."""
    name = tracer.name(weight)
    if name is None or (bias is not None and tracer.name(bias) is None):
        tracer.refuse(f"computes the weights of its {kind} layer")
    value = tracer.value(x)
    if value is not None:
        if value.dim != dim:
            tracer.refuse(f"applies a {kind} layer along another dimension than that of the channels")
        tracer.bind(name, 1, value.along, "reader")
    along = tracer.made(name, 0, weight.shape[0])
    if bias is not None:
        tracer.bind(tracer.name(bias), 0, along, "bias")
    if kind in ("linear", "conv2d"):
        tracer.layer(kind, name, None if bias is None else tracer.name(bias))
    return Value(out, along)


@register("conv1d", "conv2d", "conv3d")
def _conv(
    tracer: Tracer,
    result: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value | None:
    if groups == 1:
        return _layer(tracer, x, weight, bias, f"conv{weight.ndim - 2}d", 1, 1)
    value, name = tracer.value(x), tracer.name(weight)
    if value is None or name is None or groups != x.shape[1]:
        tracer.refuse(f"has a convolution of {groups} groups on {x.shape[1]} channels; one group for each is known")
    multiplier = weight.shape[0] // groups
    along = Along(tuple((node, inner * multiplier) for node, inner in value.along.parts), value.along.outer)
    tracer.bind(name, 0, along, "maker")
    if bias is not None:
        tracer.bind(tracer.name(bias), 0, along, "bias")
    return Value(1, along)


@register("embedding")
def _embedding(tracer: Tracer, result: Tensor, index: Tensor, weight: Tensor, *_: Any, **__: Any) -> Value | None:
    name = tracer.name(weight)
    if name is None:
        tracer.refuse("computes the weights of its embedding")
    return Value(result.ndim - 1, tracer.made(name, 1, weight.shape[1]))


# ------------------------------------------------------------------------------------------------------- normalisations


def _entries(tracer: Tracer, along: Along, **tensors: Tensor | None) -> None:
    roles: dict[str, Role] = {"weight": "norm", "bias": "bias", "mean": "buffer", "var": "buffer"}
    for kind, tensor in tensors.items():
        if tensor is not None:
            tracer.bind(tracer.name(tensor), 0, along, roles[kind])


@register("batch_norm", "instance_norm")
def _batch_norm(
    tracer: Tracer,
    result: Tensor,
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Value | None:
    value = tracer.value(x)
    if value is None:
        return None
    if value.dim != 1:
        tracer.refuse("normalises another dimension than that of the channels")
    _entries(tracer, value.along, mean=running_mean, var=running_var, weight=weight, bias=bias)
    return value


@register("layer_norm", "rms_norm")
def _layer_norm(
    tracer: Tracer,
    result: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Value | None:
    value = tracer.value(x)
    if value is None:
        return None
    if len(normalized_shape) != 1 or value.dim != x.ndim - 1:
        tracer.refuse("normalises over other dimensions than that of the channels")
    return _norm(tracer, value, weight, bias)


@register("group_norm")
def _group_norm(
    tracer: Tracer,
    result: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Value | None:
    value = tracer.value(x)
    return None if value is None else _norm(tracer, value, weight, bias)


def _norm(tracer: Tracer, value: Value, weight: Tensor | None, bias: Tensor | None) -> Value:
    """A normalisation in which channels meet: the concatenation of networks must keep them apart."""
    if len(value.along.parts) != 1 or value.along.outer != 1:
        tracer.refuse("normalises channels of several layers together")
    _entries(tracer, value.along, weight=weight, bias=bias)
    tracer.norms[tracer._stack[-1]] = value.along.parts[0]
    return value


# -------------------------------------------------------------------------------------------- functions entry by entry

_ENTRYWISE = (
    "relu",
    "relu6",
    "gelu",
    "silu",
    "mish",
    "elu",
    "selu",
    "celu",
    "leaky_relu",
    "sigmoid",
    "tanh",
    "softplus",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "softsign",
    "logsigmoid",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_dropout",
    "clone",
    "contiguous",
    "detach",
    "to",
    "float",
    "double",
    "half",
    "bfloat16",
    "type",
    "neg",
    "abs",
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "square",
    "pow",
    "clamp",
    "clamp_min",
    "clamp_max",
    "sin",
    "cos",
    "erf",
    "reciprocal",
    "nan_to_num",
    "type_as",
    "requires_grad",
)


@register(*_ENTRYWISE)
def _entrywise(tracer: Tracer, result: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Value | None:
    for other in tensors_in([*args, *kwargs.values()]):
        if tracer.value(other) is not None:
            return _combined(tracer, result, x, other)
    if tracer.value(x) is None and (name := tracer.name(x)) is not None:
        tracer.derive(result, name)
    return tracer.value(x)


@register("prelu")
def _prelu(tracer: Tracer, result: Tensor, x: Tensor, weight: Tensor) -> Value | None:
    value = tracer.value(x)
    if value is not None and weight.numel() > 1:
        tracer.bind(tracer.name(weight), 0, value.along, "bias")
    return value


@register("add", "sub", "mul", "div", "true_divide", "maximum", "minimum", "rsub", "__rsub", "__rdiv", "where", "lerp")
def _combined(tracer: Tracer, result: Tensor, *operands: Any, **kwargs: Any) -> Value | None:
    """Broadcasting: channels at the same place are the same ones; parameters get theirs from the other operand."""
    tensors = tensors_in([*operands, *kwargs.values()])
    values = [value for t in tensors if (value := _from_the_right(tracer, t)) is not None]
    if not values:
        for tensor in tensors:
            if (name := tracer.name(tensor)) is not None and tensor.shape == result.shape:
                tracer.derive(result, name)
        return None
    place, along = values[0]
    for other_place, other in values[1:]:
        if other_place != place:
            tracer.refuse("combines channels of one value with other dimensions of another")
        tracer.unite(along, other)
    for tensor in tensors:
        _match(tracer, tensor, place, along)
    return Value(result.ndim - place, along)


def _from_the_right(tracer: Tracer, tensor: Tensor) -> tuple[int, Along] | None:
    value = tracer.value(tensor)
    return None if value is None else (tensor.ndim - value.dim, value.along)


def _match(tracer: Tracer, tensor: Tensor, place: int, along: Along) -> None:
    """Give a parameter the channels of what it is combined with; other tensors pin them."""
    if tracer.value(tensor) is not None or tensor.ndim < place or tensor.shape[tensor.ndim - place] == 1:
        return
    name = tracer.name(tensor)
    if name is None:
        tracer.pin(along)  # the network's input
        return
    dim = len(tracer.shapes[name]) - place
    tracer.bind(name, dim, along, "bias")


@register("cat", "concat", "concatenate", "stack")
def _cat(tracer: Tracer, result: Tensor, tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Value | None:
    dim = kwargs.get("axis", dim)
    dim = dim % result.ndim
    if result.ndim != tensors[0].ndim:
        tracer.refuse("stacks values along a new dimension")
    values = [tracer.value(t) for t in tensors]
    first = next((v for v in values if v is not None), None)
    if first is None:
        return None
    if dim != first.dim:
        return _combined(tracer, result, *tensors)
    parts: list[tuple[int, int]] = []
    for value in values:
        if value is None or value.dim != dim or value.along.outer != 1:
            tracer.refuse("concatenates channels with its inputs")
        parts += value.along.parts
    return Value(dim, Along(tuple(parts)))


# --------------------------------------------------------------------------------------- other dimensions than channels

_POOLS = (
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "lp_pool2d",
    "interpolate",
    "boolean_dispatch",
    "_max_pool2d",
    "fn",
    "upsample",
)


@register(*_POOLS)
def _pooled(tracer: Tracer, result: Tensor, x: Tensor, *_: Any, **__: Any) -> Value | None:
    value = tracer.value(x)
    if value is not None and value.dim != 1:
        tracer.refuse("pools over the dimension of the channels")
    return value


@register("pad")
def _pad(tracer: Tracer, result: Tensor, x: Tensor, *_: Any, **__: Any) -> Value | None:
    value = tracer.value(x)
    if value is not None and result.shape[value.dim] != x.shape[value.dim]:
        tracer.refuse("pads the dimension of the channels")
    return value


@register("mean", "sum", "amax", "amin", "std", "var", "logsumexp", "prod")
def _reduced(
    tracer: Tracer, result: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Value | None:
    value = tracer.value(x)
    if value is None:
        return None
    dim = kwargs.get("axis", dim)
    dims = range(x.ndim) if dim is None else [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)]
    if value.dim in dims:
        tracer.refuse("adds up channels")
    return value if keepdim else Value(value.dim - sum(d < value.dim for d in dims), value.along)


@register("softmax", "log_softmax", "cumsum", "flip", "roll")
def _along_a_dim(tracer: Tracer, result: Tensor, x: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Value | None:
    value = tracer.value(x)
    if value is None:
        return None
    dim = kwargs.get("dims", args[0] if args and not isinstance(dim, int) else dim)
    dims = [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim or range(x.ndim))]
    if value.dim in dims:
        tracer.pin(value.along)  # allowed for outputs alone
    return value


@register("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def _reshaped(tracer: Tracer, result: Tensor, x: Tensor, *_: Any, **__: Any) -> Value | None:
    value = tracer.value(x)
    if value is None:
        name = tracer.name(x)
        if name is not None and result.shape[-len(tracer.shapes[name]) :] == tracer.shapes[name]:
            tracer.derive(result, name)
        return None
    before, size = math.prod(x.shape[: value.dim]), x.shape[value.dim]
    for dim in range(result.ndim):
        if math.prod(result.shape[:dim]) != before or (result.shape[dim] == 1 != size):
            continue
        if result.shape[dim] == size:
            return Value(dim, value.along)
        taken, inner = size, 1
        for length in x.shape[value.dim + 1 :]:  # later dimensions that became part of that of the channels
            taken, inner = taken * length, inner * length
            if result.shape[dim] == taken and value.along.outer == 1:
                return Value(dim, Along(tuple((node, n * inner) for node, n in value.along.parts)))
    tracer.refuse(f"reshapes {tuple(x.shape)} to {tuple(result.shape)}, which takes channels apart")
    return None


@register("permute")
def _permuted(tracer: Tracer, result: Tensor, x: Tensor, *dims: Any, **kwargs: Any) -> Value | None:
    value = tracer.value(x)
    if value is None:
        return None
    order = kwargs.get("dims", dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)
    return Value([d % x.ndim for d in order].index(value.dim), value.along)


@register("transpose", "swapaxes", "swapdims", "t")
def _transposed(tracer: Tracer, result: Tensor, x: Tensor, dim0: int = 0, dim1: int = 1, **kwargs: Any) -> Value | None:
    value = tracer.value(x)
    if value is None:
        return None
    first, second = (d % x.ndim for d in (kwargs.get("axis0", dim0), kwargs.get("axis1", dim1)))
    return Value({first: second, second: first}.get(value.dim, value.dim), value.along)


@register("movedim", "moveaxis")
def _moved(tracer: Tracer, result: Tensor, x: Tensor, source: Any, destination: Any) -> Value | None:
    value = tracer.value(x)
    if value is None:
        return None
    marked = torch.empty([2 if d == value.dim else 1 for d in range(x.ndim)])
    return Value(list(marked.movedim(source, destination).shape).index(2), value.along)


@register("__getitem", "select", "narrow")
def _chosen(tracer: Tracer, result: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Value | None:
    value = tracer.value(x)
    if value is None:
        name = tracer.name(x)
        if name is not None and result.ndim == x.ndim and result.shape[-1] == x.shape[-1]:
            tracer.derive(result, name)
        return None
    if any(isinstance(a, Tensor) for a in _flat(args)):
        tracer.refuse("picks entries by numbers that it computes")
    dim = _kept_dim(x, result, value.dim, args, kwargs)
    if dim is None or result.shape[dim] != x.shape[value.dim]:
        tracer.refuse("picks some of the channels")
    return Value(dim, value.along)


def _flat(value: Any) -> list[Any]:
    return [one for v in value for one in _flat(v)] if isinstance(value, list | tuple) else [value]


def _kept_dim(x: Tensor, result: Tensor, channels: int, args: Sequence[Any], kwargs: Any) -> int | None:
    """Where a dimension is after indexing; None: it is gone."""
    index = args[0] if args else None
    if isinstance(index, int) and len(args) == 2:  # select(dim, place)
        dim = index % x.ndim
        return None if dim == channels else channels - (dim < channels)
    if isinstance(index, int) and len(args) == 3:  # narrow
        return channels
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(1 for item in items if item is not None and item is not Ellipsis)
    if Ellipsis in items:
        place = items.index(Ellipsis)
        items[place : place + 1] = [slice(None)] * (x.ndim - used)
    else:
        items += [slice(None)] * (x.ndim - used)
    source = target = 0
    for item in items:
        if item is None:
            target += 1
            continue
        if source == channels:
            return target if isinstance(item, slice) else None
        source += 1
        target += isinstance(item, slice)
    return None


@register("chunk", "split", "unbind", "tensor_split")
def _split(tracer: Tracer, result: Any, x: Tensor, *args: Any, **kwargs: Any) -> Value | None:
    value = tracer.value(x)
    if value is None:
        return None
    parts = tensors_in(result)
    removed = parts[0].ndim < x.ndim
    given = args[-1] if args and (removed or len(args) > 1) else 0
    dim = kwargs.get("dim", given) % x.ndim
    if dim == value.dim:
        tracer.refuse("splits its channels")
    return Value(value.dim - (removed and dim < value.dim), value.along)


@register("expand", "expand_as", "repeat", "repeat_interleave", "unfold", "index_select", "gather", "tile")
def _repeated(tracer: Tracer, result: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Value | None:
    value = tracer.value(x)
    if value is None:
        if (name := tracer.name(x)) is not None:
            tracer.derive(result, name)
        return None
    dim = value.dim + result.ndim - x.ndim
    if result.shape[dim] != x.shape[value.dim]:
        tracer.refuse("repeats channels")
    return Value(dim, value.along)
