"""The places of weights in optimizers: a factor takes the place of its weight, and what happens to the state."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from networks.ab_factors import ABFactor, Factors, project_state
from strategies.ab_training.put_aside import bring_back, put_aside

OptState = Literal["hold", "reset", "project"]


class OptimizerSlots:
    """Edits the parameter groups of optimizers in place, so that rates, decays and schedulers stay with the layer.

    Args:
        optimizers: Of the training.
        layers: Whose weights come and go.
        opt_state: ``hold``: the state of a weight waits, in host memory or, without a device, in a file
            (`strategies.ab_training.put_aside`), until the weight is back; factors begin without one. ``project``:
            they begin with its projection instead. ``reset``: both begin without.

    Raises:
        ValueError: If the optimizers do not hold a weight exactly once.
    """

    def __init__(self, optimizers: list[Optimizer], layers: list[ABFactor], opt_state: OptState) -> None:
        self.optimizers, self.opt_state = optimizers, opt_state
        self.held: dict[str, dict[str, Any]] = {}
        places: dict[int, list[tuple[int, int, int]]] = {}
        for i, optimizer in enumerate(optimizers):
            for j, group in enumerate(optimizer.param_groups):
                for k, parameter in enumerate(group["params"]):
                    places.setdefault(id(parameter), []).append((i, j, k))
        self._places: dict[str, tuple[int, int, int]] = {}
        for layer in layers:
            found = places.get(id(layer.weight), [])
            if len(found) != 1:
                raise ValueError(
                    f"{layer.path} stands {len(found)} times in the optimizer, AB-training needs it there once: add it "
                    "to strategy.keep_full, or set requires_grad=False if it must not be trained"
                )
            self._places[layer.path] = found[0]

    def to_factor(self, layer: ABFactor, start: Factors) -> None:
        """Let the optimizer train the factor of a layer that was just factored from ``start``."""
        i, j, k = self._places[layer.path]
        optimizer = self.optimizers[i]
        state = optimizer.state.pop(layer.weight, None)
        if state and self.opt_state != "reset":
            self.held[layer.path] = {
                key: put_aside(value) if _is_large(value) else value for key, value in state.items()
            }
        if state and self.opt_state == "project":
            optimizer.state[layer.trained] = project_state(state, layer.shape, start, layer.mode)
        optimizer.param_groups[j]["params"][k] = layer.trained

    def to_weight(self, layer: ABFactor, factor: Tensor) -> None:
        """Let the optimizer train the weight of a layer again."""
        i, j, k = self._places[layer.path]
        optimizer = self.optimizers[i]
        optimizer.state.pop(factor, None)
        optimizer.param_groups[j]["params"][k] = layer.weight
        if held := self.held.pop(layer.path, None):
            device = layer.weight.device
            optimizer.state[layer.weight] = {
                key: bring_back(value, device) if _is_large(value) else value for key, value in held.items()
            }

    def plain_state(self, optimizer: Optimizer, layers: list[ABFactor]) -> dict[str, Any]:
        """The optimizer's ``state_dict`` as if the weights of these factored layers stood in it: fits any strategy."""
        state = optimizer.state_dict()
        flat = [p for group in optimizer.param_groups for p in group["params"]]
        index = {id(parameter): i for i, parameter in enumerate(flat)}
        for layer in layers:
            number = index.get(id(layer.trained))
            if number is None:
                continue
            state["state"].pop(number, None)
            if held := self.held.get(layer.path):
                state["state"][number] = held
        return state

    def counts(self, parameters: list[Tensor]) -> Tensor:
        """``(parameter, 3)``, float64: numbers in averages, other scalars added up, steps counted."""
        found = []
        for parameter in parameters:
            states = [o.state[parameter] for o in self.optimizers if o.state.get(parameter)]
            averages = sum(v.numel() for state in states for v in _averages(state))
            scalars = sum(float(v) for state in states for key, v in state.items() if key != "step" and _is_scalar(v))
            # A state without any average is one too.
            found.append([len(states) + averages, scalars, sum(float(state.get("step", 0)) for state in states)])
        return torch.tensor(found, dtype=torch.float64).view(-1, 3)

    def level(self, parameters: list[Tensor], low: Tensor, high: Tensor) -> None:
        """Count the most steps that any rank has taken; where ranks keep different things, all begin without a state.

        Args:
            parameters: As for `counts`.
            low: Smallest counts of all ranks.
            high: Largest ones.
        """
        same = (low[:, :2] == high[:, :2]).all(1).tolist()
        for parameter, alike, steps in zip(parameters, same, high[:, 2].tolist(), strict=True):
            for optimizer in self.optimizers:
                state = optimizer.state.get(parameter, {})
                if not alike:
                    optimizer.state.pop(parameter, None)
                elif isinstance(step := state.get("step"), Tensor):
                    step.fill_(steps)
                elif step is not None:
                    state["step"] = type(step)(steps)

    def moments(self, parameters: list[Tensor]) -> list[Tensor]:
        """What optimizers average over steps, whatever its shape, in a fixed order."""
        found = []
        for parameter in parameters:
            for optimizer in self.optimizers:
                found += _averages(optimizer.state.get(parameter, {}))
        return found


def _averages(state: dict[str, Any]) -> list[Tensor]:
    return [v for _, v in sorted(state.items()) if isinstance(v, Tensor) and v.dim() and v.is_floating_point()]


def _is_scalar(value: Any) -> bool:
    return not value.dim() if isinstance(value, Tensor) else isinstance(value, int | float)


def _is_large(value: Any) -> bool:
    """Whether it is worth moving: counts of steps stay where the optimizer keeps them."""
    return isinstance(value, Tensor) and value.dim() > 0
