"""Which weights of a network become low-rank."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from networks.low_rank.layers import FACTORED, LowRankWeight, factored_weights

_MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class LayerChoice:
    """Chooses weights: linear and convolutional layers, the input projections of attention, and what is named.

    Names are those of the dense network's ``state_dict``; patterns (``*``, ``?``, ``[...]``) may name a tensor
    (``net.encoder.*.weight``) or its module (``net.encoder.*``).

    Args:
        include: Patterns of names. None: every layer of the kinds above. A tensor of another module (a parameter of
            somebody's own layer) is converted only if a pattern names it.
        exclude: Patterns of names that stay dense.
        min_ratio: A weight stays dense if its short side is at most this share of its long side: its rank is small
            already.
        keep_first: Keep the first matrix of the network dense.
        keep_last: Keep the last one dense.
        embeddings: Convert embedding tables too.
    """

    def __init__(
        self,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        min_ratio: float = 0.1,
        keep_first: bool = False,
        keep_last: bool = True,
        embeddings: bool = False,
    ) -> None:
        if not 0 <= min_ratio < 1:
            raise ValueError(f"layers.min_ratio={min_ratio} must lie in [0, 1): it is short side / long side.")
        for name, patterns in (("include", include), ("exclude", exclude)):
            if isinstance(patterns, str):
                raise ValueError(f"layers.{name}={patterns!r} must be a list of patterns: [{patterns!r}].")
        self.include = None if include is None else tuple(include)
        self.exclude = tuple(exclude)
        self.min_ratio, self.keep_first, self.keep_last, self.embeddings = min_ratio, keep_first, keep_last, embeddings

    def __call__(self, network: nn.Module, order: Sequence[str] | None = None) -> list[LowRankWeight]:
        """The chosen weights in forward order, factored ones among them.

        Args:
            network: The network.
            order: Paths of modules in the order of their first call (`ForwardOrder`). None: the order of definition.

        Raises:
            ValueError: A pattern matches nothing, nothing is left, or a chosen weight is shared or quantised.
        """
        _refuse_quantised(network)
        found = in_forward_order(list(self._candidates(network)), order)
        self._check_patterns(network, found)
        ends = {w.name for w in found[: int(self.keep_first)]}
        ends |= {w.name for w in found[len(found) - 1 :] if self.keep_last}
        chosen = [w for w in found if w.name not in ends and self._wanted(w)]
        if not found:
            raise ValueError(
                "layers: the network has no trainable linear, convolutional or attention layer, the kinds that become "
                "low-rank; layers.include names other tensors with two axes."
            )
        if not chosen:
            raise ValueError(
                f"layers: no weight is left to convert; the network has {[w.name for w in found]}. Lower "
                f"layers.min_ratio={self.min_ratio}, set layers.keep_first=false and layers.keep_last=false, or widen "
                f"layers.include={self.include and list(self.include)}."
            )
        _refuse_shared(network, chosen)
        return chosen

    def _candidates(self, network: nn.Module) -> Iterator[LowRankWeight]:
        factored = {w.name: w for w in factored_weights(network)}
        for path, module in network.named_modules():
            if "parametrizations" in path.split("."):
                continue
            for tensor in self._tensors(module, path):
                name = f"{path}.{tensor}" if path else tensor
                if name in factored:
                    yield factored[name]
                elif parametrize.is_parametrized(module, tensor):
                    if self._named(name, path):
                        raise ValueError(
                            f"layers: {name} has a parametrization already (weight norm or the like); "
                            f"leave it out with layers.exclude=[{name}]."
                        )
                elif module._parameters[tensor].requires_grad:
                    yield LowRankWeight(module, tensor, path)

    def _tensors(self, module: nn.Module, path: str) -> Iterator[str]:
        """Names of the tensors of one module that may be converted."""
        kinds = (*_MATRIX_LAYERS, *((nn.Embedding,) if self.embeddings else ()))
        names = [name for name, value in module._parameters.items() if value is not None]
        if isinstance(module, tuple(FACTORED.values())):
            names = ["weight", *(name for name in names if name not in ("u", "sigma", "v"))]
        if parametrize.is_parametrized(module):
            names += list(module.parametrizations)
        for tensor in names:
            name = f"{path}.{tensor}" if path else tensor
            attention = isinstance(module, nn.MultiheadAttention) and tensor in _ATTENTION
            usual = isinstance(module, kinds) and tensor == "weight"
            # Patterns like net.* mean layers; another tensor is meant by one that ends with its name.
            meant = any(fnmatchcase(name, p) and p.rpartition(".")[2] == tensor for p in self.include or ())
            if attention or usual or (meant and self._special(module, tensor, name)):
                yield tensor

    @staticmethod
    def _special(module: nn.Module, tensor: str, name: str) -> bool:
        """Whether a tensor that a pattern names can be parametrized; biases and norms match wide patterns too."""
        value = getattr(module, tensor)
        if value.ndim < 2 or not value.is_floating_point():
            return False
        if isinstance(module, nn.RNNBase):
            raise ValueError(
                f"layers.include: {name} belongs to {type(module).__name__}, whose kernel reads its weights as one "
                "flat buffer; it cannot be low-rank. Name other layers."
            )
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
            raise ValueError(f"layers.include: {name} has max_norm or sparse gradients, which factors do not have.")
        return True

    def _named(self, name: str, path: str) -> bool:
        """Whether the patterns let a weight be converted."""
        if any(_matches(name, path, pattern) for pattern in self.exclude):
            return False
        return self.include is None or any(_matches(name, path, pattern) for pattern in self.include)

    def _wanted(self, weight: LowRankWeight) -> bool:
        return weight.n > self.min_ratio * weight.m and self._named(weight.name, weight.path)

    def _check_patterns(self, network: nn.Module, found: Sequence[LowRankWeight]) -> None:
        names = {name for name, _ in network.named_parameters(remove_duplicate=False)} | {w.name for w in found}
        for option, patterns in (("include", self.include or ()), ("exclude", self.exclude)):
            for pattern in patterns:
                if any(_matches(name, name.rpartition(".")[0], pattern) for name in names):
                    continue
                close = difflib.get_close_matches(pattern, sorted(names), 1, 0.4)
                advice = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"layers.{option}: {pattern!r} matches no weight of the network.{advice}")


def in_forward_order(weights: list[LowRankWeight], order: Sequence[str] | None) -> list[LowRankWeight]:
    """Sort weights by the first call of their module; one that is never called itself goes with its parent."""
    if order is None:
        return weights
    position = {path: i for i, path in enumerate(order)}

    def key(weight: LowRankWeight) -> int:
        path = weight.path
        while path and path not in position:
            path = path.rpartition(".")[0]
        return position.get(path, -1)

    return sorted(weights, key=key)  # stable: the order of definition decides within a module


class ForwardOrder:
    """Records in which order the modules of a network are called for the first time, until `stop`."""

    def __init__(self, network: nn.Module) -> None:
        self._paths: dict[str, None] = {}
        self._handles = [module.register_forward_pre_hook(self._hook(path)) for path, module in network.named_modules()]

    def _hook(self, path: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any) -> None:
            self._paths.setdefault(path)

        return note

    def stop(self) -> list[str]:
        """Take the hooks away and return the paths of the modules that were called."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return list(self._paths)


def _matches(name: str, path: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(path, pattern)


def _refuse_quantised(network: nn.Module) -> None:
    for path, module in network.named_modules():
        if ".quantized" in type(module).__module__:
            raise ValueError(
                f"layers: {path or 'the network'} is quantised ({type(module).__name__}); low-rank training needs "
                "weights with gradients. Train first, quantise the exported network afterwards."
            )


def _refuse_shared(network: nn.Module, chosen: Sequence[LowRankWeight]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for weight in chosen:
        names = owners[id(weight.trained)]
        if len(names) > 1 and not weight.converted:
            raise ValueError(
                f"layers: {' and '.join(names)} are one tensor (tied weights), which cannot have two factorisations; "
                f"leave it out with layers.exclude=[{', '.join(names)}]."
            )


def fractions(network: nn.Module) -> tuple[float, float]:
    """(trainable, stored) numbers of a network as shares of what its dense form has.

    Trainable: parameters with a gradient. Stored: all parameters, factors as ``r (m + n) + r^2``. Shared tensors count
    once, buffers do not count.
    """
    parameters = list(network.parameters())
    stored = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    dense = stored + sum(w.m * w.n - w.stored for w in factored_weights(network))
    return trainable / max(dense, 1), stored / max(dense, 1)


def dense_size(network: nn.Module) -> int:
    """Number of parameters of the dense form of a network."""
    stored = sum(p.numel() for p in network.parameters())
    return stored + sum(w.m * w.n - w.stored for w in factored_weights(network))
