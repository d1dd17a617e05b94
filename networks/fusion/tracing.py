"""Finding the groups of channels of a network: it is run once on an example, and every function it calls is followed.

Nothing is assumed of the class of the network: what counts are the functions that `forward` calls (linear layers,
convolutions, normalisations, additions, concatenations, reshapes, pooling, functions entry by entry). Attention is
known as a module. Anything else is refused by name; `register` teaches a new function, `register_module` a new module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from networks.fusion.layout import Axis, ChannelGroups, Group, Layer, Part, Role, Slot
from networks.vit import Attention


class UnsupportedNetworkError(ValueError):
    """A network that cannot be taken apart into channels; the message names the module and the function."""


@dataclass(frozen=True)
class Along:
    """Channels along a dimension of a value: nodes of the union-find with their entries, all ``outer`` times."""

    parts: tuple[tuple[int, int], ...]
    outer: int = 1


@dataclass(frozen=True)
class Value:
    """What is known of a tensor: its channels lie along ``dim``."""

    dim: int
    along: Along


Rule = Callable[..., Value | None]
_RULES: dict[str, Rule] = {}
_MODULES: dict[type[nn.Module], Callable[..., Value | None]] = {}


def register(*names: str) -> Callable[[Rule], Rule]:
    """Teach the tracer functions of torch by name.

    The rule is called as ``rule(tracer, result, *args, **kwargs)`` with the arguments of the function, where at least
    one is a tensor with channels, and gives the `Value` of the result; `Tracer.value` gives those of arguments.
    """

    def add(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


def register_module(kind: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Teach the tracer a module: ``rule(tracer, path, module, result, *args)``; its functions are not followed."""

    def add(rule: Rule) -> Rule:
        _MODULES[kind] = rule
        return rule

    return add


@torch.no_grad()
def trace(network: nn.Module, *example: Any) -> ChannelGroups:
    """The groups of channels of a network.

    Args:
        network: Any module whose functions are known (see `register`).
        example: Arguments of its ``forward``; one item is enough. They decide how many pixels a channel has where
            features are flattened, and nothing else.

    Raises:
        UnsupportedNetworkError: Names the module and the function that is not known.
    """
    if not _tensors(list(example)):
        raise ValueError("tracing needs an example: the tensors that the network is called with")
    tracer = Tracer(network)
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with tracer:
            output = network(*example)
    finally:
        tracer.close()
        for module in training:
            module.training = True
    return tracer.groups(output)


class Tracer(TorchFunctionMode):
    """Follows the channels through the functions that a network calls.

    Args:
        network: Hooks are put on its modules, until `close`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.state: dict[int, str] = {}
        for named in (network.named_parameters(), network.named_buffers()):
            for name, tensor in named:
                self.state.setdefault(id(tensor), name)
        self.shapes = {name: t.shape for name, t in (*network.named_parameters(), *network.named_buffers())}
        self.parents: list[int] = []  # union-find over sets of channels
        self.widths: list[int] = []
        self.names: list[str] = []
        self.pinned: set[int] = set()
        self.slots: list[tuple[str, int, Along, Role]] = []
        self.axes: dict[tuple[str, int], Along] = {}
        self.layers: dict[str, Layer] = {}
        self.norms: dict[str, tuple[int, int]] = {}
        self.heads: dict[str, int] = {}
        self._known: dict[int, tuple[Tensor, Value]] = {}  # the tensor itself stays alive: ids are not used again
        self._derived: dict[int, tuple[Tensor, str]] = {}  # tensors that are a parameter but for leading dimensions
        self._stack = [""]
        self._inside = 0  # of a module whose functions are not followed
        self._hooks: list[Any] = []
        for path, module in network.named_modules():
            kind = next((k for k in type(module).__mro__ if k in _MODULES), None)
            self._hooks += [
                module.register_forward_pre_hook(self._entering(path, kind is not None)),
                module.register_forward_hook(self._leaving(path, kind), with_kwargs=True),
            ]

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _entering(self, path: str, opaque: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._stack.append(path)
            self._inside += opaque

        return hook

    def _leaving(self, path: str, kind: type[nn.Module] | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            self._stack.pop()
            if kind is None:
                return
            self._inside -= 1
            if self._inside == 0:
                self._note(result, _MODULES[kind](self, path, module, result, *args, **kwargs))

        return hook

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._inside or not _tensors(result):
            return result
        name = getattr(func, "__name__", str(func)).rstrip("_") or "?"
        given = _tensors([*args, *kwargs.values()])
        known = any(id(t) in self._known or id(t) in self._derived or id(t) in self.state for t in given)
        if known:
            rule = _RULES.get(name)
            if rule is None:
                self.refuse(f"calls {name}, which may mix channels")
            self._note(result, rule(self, result, *args, **kwargs))
        return result

    def _note(self, result: Any, value: Value | None) -> None:
        if value is None:
            return
        for tensor in _tensors(result):
            self._known[id(tensor)] = (tensor, value)

    # ---------------------------------------------------------------------------------------------- what rules may ask

    def value(self, tensor: Any) -> Value | None:
        """Where the channels of a tensor lie; None: it has none."""
        found = self._known.get(id(tensor))
        return None if found is None else found[1]

    def name(self, tensor: Any) -> str | None:
        """The name of a parameter or buffer, or of what is one but for repeated leading dimensions."""
        found = self._derived.get(id(tensor))
        return self.state.get(id(tensor)) if found is None else found[1]

    def derive(self, result: Tensor, name: str) -> None:
        """Note that a tensor is a parameter but for leading dimensions."""
        self._derived[id(result)] = (result, name)

    def refuse(self, what: str) -> None:
        """Raise the error that names the module that is running."""
        path = self._stack[-1]
        module = self.network.get_submodule(path) if path else self.network
        where = f"{type(module).__name__} ({path})" if path else type(module).__name__
        raise UnsupportedNetworkError(
            f"{where} {what}: its channels cannot be fused. Teach networks.fusion.tracing.register its function, or "
            f"register_module({type(module).__name__})"
        )

    def new(self, width: int, name: str) -> int:
        """A new set of channels."""
        self.parents.append(len(self.parents))
        self.widths.append(width)
        self.names.append(name)
        return len(self.parents) - 1

    def find(self, node: int) -> int:
        """The representative of a set of channels."""
        while self.parents[node] != node:
            self.parents[node] = self.parents[self.parents[node]]
            node = self.parents[node]
        return node

    def unite(self, first: Along, second: Along) -> None:
        """Make the channels of two places the same ones."""
        if first == second:
            return
        same = first.outer == second.outer and len(first.parts) == len(second.parts)
        for (a, inner), (b, other) in zip(first.parts, second.parts, strict=False):
            same = same and inner == other and self.widths[self.find(a)] == self.widths[self.find(b)]
        if not same:
            self.refuse("adds up channels that are arranged in different ways")
        for (a, _), (b, _) in zip(first.parts, second.parts, strict=True):
            a, b = sorted((self.find(a), self.find(b)))
            self.parents[b] = a

    def bind(self, tensor: str, dim: int, along: Along, role: Role) -> None:
        """Note that channels lie along an axis of a parameter or buffer."""
        if (tensor, dim) in self.axes:
            self.unite(self.axes[tensor, dim], along)
        self.axes[tensor, dim] = along
        self.slots.append((tensor, dim, along, role))

    def pin(self, along: Along) -> None:
        """Note that channels are what the network gives out, or are combined with its inputs."""
        self.pinned |= {self.find(node) for node, _ in along.parts}

    def made(self, weight: str, dim: int, width: int) -> Along:
        """The channels that a layer makes; the same ones if it is called again."""
        if (weight, dim) not in self.axes:
            self.bind(weight, dim, Along(((self.new(width, weight.rpartition(".")[0]), 1),)), "maker")
        return self.axes[weight, dim]

    def layer(self, kind: str, weight: str, bias: str | None) -> None:
        """Note a layer that can be fitted."""
        path = weight.rpartition(".")[0]
        self.layers.setdefault(path, Layer(path, kind, weight, bias))

    # ------------------------------------------------------------------------------------------------------- the result

    def groups(self, output: Any) -> ChannelGroups:
        """Put together what was found.

        Args:
            output: What the network gave.
        """
        self._stack = [""]
        outputs = _tensors(output)
        if not outputs or any(self.value(tensor) is None for tensor in outputs):
            self.refuse("gives something that no known layer makes")
        for tensor in outputs:
            self.pin(self.value(tensor).along)
        pinned = {self.find(node) for node in self.pinned}
        roots = list(dict.fromkeys(self.find(node) for node in range(len(self.parents))))
        number = {root: i for i, root in enumerate(roots)}
        slots: dict[int, dict[Slot, None]] = {root: {} for root in roots}
        for tensor, dim, along, role in self.slots:
            for node, _ in along.parts:
                root = self.find(node)
                slots[root][Slot(tensor, dim, role)] = None
                if root in pinned and role not in ("maker", "bias"):
                    self.refuse(f"uses its outputs, or what is combined with its inputs, again ({tensor})")
        axes: dict[str, dict[int, Axis]] = {}
        for (tensor, dim), along in self.axes.items():
            parts = tuple(Part(number[self.find(node)], inner) for node, inner in along.parts)
            axes.setdefault(tensor, {})[dim] = Axis(parts, along.outer)
        return ChannelGroups(
            tuple(Group(self.names[r], self.widths[r], tuple(slots[r]), r in pinned) for r in roots),
            axes,
            tuple(self.layers.values()),
            {path: Part(number[self.find(node)], inner) for path, (node, inner) in self.norms.items()},
            {path: number[self.find(node)] for path, node in self.heads.items()},
        )


def _tensors(value: Any) -> list[Tensor]:
    """Tensors in a value, also in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for one in value for t in _tensors(one)] if isinstance(value, list | tuple) else []


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
    for other in _tensors([*args, *kwargs.values()]):
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
    tensors = _tensors([*operands, *kwargs.values()])
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
    parts = _tensors(result)
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


# ------------------------------------------------------------------------------------------------------------ attention


@register_module(Attention)
def _attention(tracer: Tracer, path: str, module: Attention, result: Tensor, x: Tensor) -> Value | None:
    """Heads are the channels between queries, keys, values and the output: each has rows in all three of them."""
    prefix = f"{path}." if path else ""
    size = module.proj.in_features // module.heads
    node = tracer.new(module.heads, path)
    along = Along(((node, size),), outer=3)
    tracer.bind(f"{prefix}qkv.weight", 0, along, "maker")
    bias = None if module.qkv.bias is None else f"{prefix}qkv.bias"
    if bias:
        tracer.bind(bias, 0, along, "bias")
    return _heads(tracer, path, node, size, x, f"{prefix}qkv.weight", bias, module.proj, f"{prefix}proj")


@register_module(nn.MultiheadAttention)
def _multihead_attention(
    tracer: Tracer,
    path: str,
    module: nn.MultiheadAttention,
    result: tuple[Tensor, Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    **__: Any,
) -> Value | None:
    if module.in_proj_weight is None or module.bias_k is not None:
        tracer.refuse("has keys or values of another width, or a bias of its own")
    if key is not query or value is not query:
        tracer.refuse("attends to something else than its queries")
    prefix = f"{path}." if path else ""
    node = tracer.new(module.num_heads, path)
    along = Along(((node, module.head_dim),), outer=3)
    tracer.bind(f"{prefix}in_proj_weight", 0, along, "maker")
    if module.in_proj_bias is not None:
        tracer.bind(f"{prefix}in_proj_bias", 0, along, "bias")
    made = _heads(
        *(tracer, path, node, module.head_dim, query, f"{prefix}in_proj_weight", None),
        *(module.out_proj, f"{prefix}out_proj"),
        fitted=False,
    )
    tracer._note(result[0], made)
    return None


def _heads(
    tracer: Tracer,
    path: str,
    node: int,
    size: int,
    x: Tensor,
    weight: str,
    bias: str | None,
    out: nn.Linear,
    out_path: str,
    fitted: bool = True,
) -> Value:
    value = tracer.value(x)
    if value is not None:
        if value.dim != x.ndim - 1:
            tracer.refuse("attends along the dimension of the channels")
        tracer.bind(weight, 1, value.along, "reader")
    tracer.heads[path] = node
    tracer.bind(f"{out_path}.weight", 1, Along(((node, size),)), "reader")
    made = tracer.made(f"{out_path}.weight", 0, out.out_features)
    out_bias = None if out.bias is None else f"{out_path}.bias"
    if out_bias:
        tracer.bind(out_bias, 0, made, "bias")
    if fitted:
        tracer.layer("linear", weight, bias)
        tracer.layer("linear", f"{out_path}.weight", out_bias)
    return Value(x.ndim - 1, made)
