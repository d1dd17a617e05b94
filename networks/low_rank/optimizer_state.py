"""What happens to an optimizer when a weight becomes Sigma, or Sigma is expressed in new bases.

The parameter is exchanged inside its group, so that learning rate, weight decay and schedulers go on. Its moments
either move along (``rotate``), start afresh with their step counter (``reset``), or do what the published program does
(``zero``: zeros under a step counter that goes on, later cut without being rotated), which makes the first steps up to
three times too long.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from networks.tall_view import to_tall

StateMode = Literal["rotate", "reset", "zero"]

# By how they follow a change of basis. Of torch's optimizers: SGD, Adam(W), NAdam, RAdam, RMSprop, Adagrad, Adadelta.
LINEAR = {"exp_avg", "momentum_buffer", "grad_avg"}
SQUARED = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"}

_warned: set[str] = set()


def exchange(
    optimizers: Iterable[Optimizer],
    old: nn.Parameter,
    new: nn.Parameter,
    mode: StateMode,
    left: Tensor,
    right: Tensor,
    converting: bool,
    more: Sequence[nn.Parameter] = (),
) -> None:
    """Put ``new`` into the place of ``old`` and move its state: ``L^T m R`` and ``(L*L)^T v (R*R)``.

    The first is exact, since ``dL/dSigma = U^T (dL/dW2) V``; the second takes entries of the gradient to be
    independent (OIALR's design note, section 2.3).

    Args:
        optimizers: All optimizers; those without the parameter are left alone.
        old: The parameter so far, a weight of any shape or Sigma.
        new: Sigma, (r, r).
        mode: ``rotate``, ``reset`` or ``zero``.
        left: From the old tall rows to the new ones, (rows, r): U, or U' of an update.
        right: The same for columns.
        converting: Whether the old parameter is a weight; otherwise it is Sigma.
        more: Parameters that join the group behind the new one.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                if parameter is old:
                    group["params"][i] = new
                    group["params"][i + 1 : i + 1] = list(more)
                    state = optimizer.state.pop(old, None)
                    if state and mode != "reset":
                        moved = _moved(type(optimizer).__name__, state, old, mode, left, right, converting)
                        if moved is not None:
                            optimizer.state[new] = moved
                    break


def _moved(
    optimizer: str,
    state: dict[str, Any],
    old: nn.Parameter,
    mode: StateMode,
    left: Tensor,
    right: Tensor,
    converting: bool,
) -> dict[str, Any] | None:
    shaped = {key for key, value in state.items() if isinstance(value, Tensor) and value.shape == old.shape}
    # A tensor of one number is a counter, unless the weight is one number too.
    others = {key for key, value in state.items() if isinstance(value, Tensor) and value.numel() > 1} - shaped
    if unknown := sorted((shaped - LINEAR - SQUARED) | others):
        if optimizer not in _warned:
            _warned.add(optimizer)
            warnings.warn(
                f"the state {unknown} of {optimizer} is unknown: the state of converted weights starts afresh. "
                "opt_state=reset says so on purpose.",
                stacklevel=2,
            )
        return None
    rank = left.shape[1]

    def transformed(key: str, value: Tensor) -> Tensor:
        if mode == "zero":
            return value.new_zeros(rank, rank) if converting else value[:rank, :rank].clone()
        matrix = (to_tall(value)[0] if converting else value).to(left.dtype)
        if key in LINEAR:
            return (left.mT @ matrix @ right).to(value.dtype).contiguous()
        return (left.square().mT @ matrix @ right.square()).to(value.dtype).contiguous()

    return {key: transformed(key, value) if key in shaped else value for key, value in state.items()}


def scale_moments(optimizers: Iterable[Optimizer], parameter: nn.Parameter, factor: Tensor) -> None:
    """Give a parameter the moments of gradients that are ``factor`` times what they were, entry by entry.

    For a parameter that was divided by ``factor`` so that the network stayed what it is.

    Args:
        optimizers: All optimizers.
        parameter: Of any shape.
        factor: Of the same shape.
    """
    for optimizer in optimizers:
        for key, value in optimizer.state.get(parameter, {}).items():
            if key in LINEAR:
                value.mul_(factor)
            elif key in SQUARED:
                value.mul_(factor.square())


def parameter_names(
    network: nn.Module, optimizers: Iterable[Optimizer], stand_ins: Mapping[int, str] | None = None
) -> list[list[list[str]]]:
    """Names of the parameters of every group of every optimizer, which is what their saved state is numbered by.

    Args:
        network: Whose parameters they are.
        optimizers: Of the training.
        stand_ins: Names of the weights in whose place others are trained for now, by the identity of those.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()} | dict(stand_ins or {})
    return [[[names[id(p)] for p in group["params"]] for group in o.param_groups] for o in optimizers]


def regroup(network: nn.Module, optimizers: Sequence[Optimizer], saved: Sequence[Sequence[Sequence[str]]]) -> None:
    """Give fresh optimizers the parameters in the groups and the order that were saved.

    A network that was rebuilt with factors lists its parameters in another order than one that was converted while it
    trained, and U and V among them; states are restored by position.

    Raises:
        ValueError: The numbers of optimizers or groups differ, or a parameter is missing.
    """
    named = dict(network.named_parameters())
    if [len(groups) for groups in saved] != [len(o.param_groups) for o in optimizers]:
        raise ValueError(
            f"the checkpoint has parameter groups {[len(groups) for groups in saved]}, this run's optimizers have "
            f"{[len(o.param_groups) for o in optimizers]}; resume with the optimizer that the run began with."
        )
    for optimizer, groups in zip(optimizers, saved, strict=True):
        for group, names in zip(optimizer.param_groups, groups, strict=True):
            if missing := [name for name in names if name not in named]:
                raise ValueError(f"the optimizer of the checkpoint trains {missing}, which this network lacks.")
            group["params"] = [named[name] for name in names]


def scaled_steps(optimizer: Optimizer, factor: Callable[[], float]) -> list[Any]:
    """Multiply the learning rates by ``factor()`` during every step, unseen by schedulers; returns the hooks."""
    rates: list[Any] = []

    def before(_: Optimizer, *__: Any) -> None:
        rates[:] = [group["lr"] for group in optimizer.param_groups]
        if (scale := factor()) != 1:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * scale

    def after(_: Optimizer, *__: Any) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Memory of the optimizers' state in bytes."""
    tensors: list[torch.Tensor] = [
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return sum(t.numel() * t.element_size() for t in tensors)
