"""Following channels through the functions that a network calls, by rules that are registered for them.

The rules themselves: `networks.fusion.tracing_rules` (functions), `networks.fusion.tracing_attention` (modules).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from networks.fusion.layout import Axis, ChannelGroups, Group, Layer, Part, Role, Slot


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
        if self._inside or not tensors_in(result):
            return result
        name = getattr(func, "__name__", str(func)).rstrip("_") or "?"
        given = tensors_in([*args, *kwargs.values()])
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
        for tensor in tensors_in(result):
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
        outputs = tensors_in(output)
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


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in a value, also in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for one in value for t in tensors_in(one)] if isinstance(value, list | tuple) else []
