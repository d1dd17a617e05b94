"""First-order solvers: descent on the mean square of the mismatch, with the paper's settings.

They are the baseline that the paper proposes. The Hessian is about ``J^T J``, whose condition is that of the Jacobian
squared, so that thousands of steps do not reach what Newton's method reaches in five.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from physics.power_flow.equations import Batch, Equations, State
from physics.power_flow.outcome import Outcome, Recorder

_EPS = 1e-8  # of Adam and RMSprop, and the least change of a learning rate that a plateau makes


@dataclass(frozen=True)
class AdamSettings:
    """Adam with a plateau schedule, as the paper's code has it.

    Args:
        lr: Learning rate.
        beta1, beta2: Decay of the moments.
        factor: What the learning rate is multiplied by on a plateau.
        patience: Iterations without progress that are borne.
        threshold: Relative decrease of the loss that counts as progress.
        cooldown: Iterations after a reduction during which none is counted.
    """

    lr: float = 1e-4
    beta1: float = 0.979681
    beta2: float = 0.963442
    factor: float = 0.547191
    patience: int = 41
    threshold: float = 0.067321
    cooldown: int = 97


# Per-grid settings of the paper's code; ``default`` is its choice for large grids, ``first_study`` its LIPS study.
ADAM_SETTINGS: dict[str, AdamSettings] = {
    "default": AdamSettings(),
    "first_study": AdamSettings(0.003377, 0.979681, 0.963442, 0.547191, 41, 0.067321, 97),
    "case118": AdamSettings(0.01795, 0.97637, 0.95865, 0.89090, 14, 0.03790, 18),
    "case_illinois200": AdamSettings(0.01229, 0.97684, 0.98013, 0.73197, 40, 0.05798, 18),
    "case300": AdamSettings(0.00952, 0.97125, 0.94634, 0.48458, 36, 0.06968, 28),
    "case1354pegase": AdamSettings(0.00464, 0.96566, 0.93268, 0.12710, 44, 0.01112, 61),
    "case1888rte": AdamSettings(0.00335, 0.95056, 0.91450, 0.59349, 61, 0.08579, 29),
    "case2869pegase": AdamSettings(0.00268, 0.96356, 0.94031, 0.59522, 45, 0.08484, 50),
    "case3120sp": AdamSettings(0.00209, 0.74965, 0.80553, 0.45617, 70, 0.02260, 32),
    "case6495rte": AdamSettings(0.00566, 0.97562, 0.97230, 0.52266, 69, 0.09012, 44),
    "case9241pegase": AdamSettings(),
}
# Time series: the first step from flat start, and those that follow from the solution of the one before.
SERIES_FIRST = AdamSettings(0.0356, 0.9802, 0.9440)
SERIES_FOLLOWING = AdamSettings(2.71e-4, 0.785, 0.662, 0.8, 2, 0.0388, 2)


@dataclass(frozen=True)
class RMSpropSettings:
    """RMSprop with a step schedule, from the authors' notes but without their weight decay, which biases voltages.

    Args:
        lr: Learning rate.
        alpha: Decay of the mean square.
        momentum: Of the steps.
        step_size: Iterations between reductions of the learning rate.
        gamma: Its factor.
    """

    lr: float = 0.00605
    alpha: float = 0.5545
    momentum: float = 0.98056
    step_size: int = 6
    gamma: float = 0.9446


Settings = AdamSettings | RMSpropSettings


class DescentState(NamedTuple):
    """A descent of ``B`` scenarios, each with a learning rate, schedule and stop of its own: tensors alone.

    Args:
        u: Unknowns, ``[N_u, B]``.
        mean: First moment (Adam) or momentum (RMSprop), ``[N_u, B]``.
        square: Second moment, ``[N_u, B]``.
        steps: Steps taken, ``[B]`` int64.
        lr: Learning rates, ``[B]``.
        best: Least loss that the plateau schedule has seen, ``[B]``.
        bad: Iterations without progress, ``[B]`` int64.
        cooling: Iterations left during which none is counted, ``[B]`` int64.
        frozen: Scenarios that do not move any more, ``[B]`` bool.
    """

    u: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor
    lr: Tensor
    best: Tensor
    bad: Tensor
    cooling: Tensor
    frozen: Tensor


def start_descent(u: Tensor, settings: Settings) -> DescentState:
    """A descent that begins at ``u`` ``[N_u, B]``."""
    one = u.new_ones(u.shape[1])
    none = torch.zeros_like(one, dtype=torch.int64)
    zero = torch.zeros_like(u)
    return DescentState(
        u, zero, zero, none, settings.lr * one, torch.inf * one, none, none, torch.zeros_like(none, dtype=torch.bool)
    )


def follow(state: DescentState, settings: Settings) -> DescentState:
    """Go on with other injections from the present unknowns, as the paper does between the steps of a series.

    The first moment is zeroed; the second and the count of steps stay; the schedule is a fresh one.

    Args:
        state: At the end of the step before.
        settings: For the next.
    """
    fresh = start_descent(state.u, settings)
    return fresh._replace(square=state.square, steps=state.steps)


def descend(state: DescentState, loss: Tensor, gradient: Tensor, settings: Settings) -> DescentState:
    """One step of Adam with its plateau schedule, or of RMSprop with its step schedule, for every scenario.

    The rules are those of ``torch.optim`` with ``ReduceLROnPlateau`` and ``StepLR``; the paper's batches share one
    learning rate and one stop, here each scenario has its own, and with one scenario this is the paper's solver.

    Args:
        state: Before the step.
        loss: At ``state.u``, ``[B]``.
        gradient: At ``state.u``, ``[N_u, B]``.
        settings: `AdamSettings` or `RMSpropSettings`.
    """
    steps = state.steps + ~state.frozen
    state = state._replace(steps=steps)
    if isinstance(settings, AdamSettings):
        mean = torch.lerp(state.mean, gradient, 1 - settings.beta1)
        square = (state.square * settings.beta2).addcmul_(gradient, gradient, value=1 - settings.beta2)
        count = steps.clamp(min=1)
        size = (square.sqrt() / (1 - settings.beta2**count).sqrt()).add_(_EPS)
        du = state.lr / (1 - settings.beta1**count) * mean / size
        state = _plateau(state, loss, settings)
    else:
        square = (state.square * settings.alpha).addcmul_(gradient, gradient, value=1 - settings.alpha)
        mean = settings.momentum * state.mean + gradient / square.sqrt().add_(_EPS)
        du = state.lr * mean
        lower = (steps % settings.step_size == 0) & ~state.frozen
        state = state._replace(lr=torch.where(lower, state.lr * settings.gamma, state.lr))
    return state._replace(u=torch.where(state.frozen, state.u, state.u - du), mean=mean, square=square)


def _plateau(state: DescentState, loss: Tensor, settings: AdamSettings) -> DescentState:
    """The rules of ``ReduceLROnPlateau`` with a relative threshold, scenario by scenario."""
    better = loss < state.best * (1 - settings.threshold)
    cooling = state.cooling > 0
    bad = torch.where(better | cooling, 0, state.bad + 1)
    reduce = bad > settings.patience
    lower = state.lr * settings.factor
    return state._replace(
        best=torch.where(better, loss, state.best),
        lr=torch.where(reduce & (state.lr - lower > _EPS), lower, state.lr),
        cooling=torch.where(reduce, settings.cooldown, state.cooling - cooling.long()),
        bad=torch.where(reduce, 0, bad),
    )


def adam_settings(name: str) -> AdamSettings:
    """The paper's settings for a grid, its default where it has none for that name."""
    return ADAM_SETTINGS.get(name, ADAM_SETTINGS["default"])


def first_order(
    eq: Equations,
    batch: Batch,
    state: State,
    settings: Settings,
    tol: float,
    max_iter: int,
    recorder: Recorder,
) -> Outcome:
    """Descend to the tolerance or to the end; the outcome has the last states, as the paper reports them.

    Args:
        eq: The equations.
        batch: Scenarios.
        state: Where they start.
        settings: Of the optimizer and its schedule.
        tol: A scenario is frozen once ``max|F| <= tol``, per unit.
        max_iter: Most steps.
        recorder: Of the history.
    """
    everyone = torch.arange(batch.p.shape[1], device=batch.p.device)
    descent = start_descent(eq.unknowns(state), settings)
    for iteration in range(max_iter):
        loss, gradient, mismatch = eq.loss_and_gradient(state, batch)
        recorder(iteration, everyone, mismatch)
        frozen = descent.frozen | (mismatch.abs().amax(0) <= tol)
        if iteration % 10 == 0 and bool(frozen.all()):
            break
        descent = descend(descent._replace(frozen=frozen), loss, gradient, settings)
        state = eq.with_unknowns(state, descent.u)
    outcome = Outcome(eq, state)
    outcome.write(everyone, state, eq.mismatch(state, batch), 0)
    outcome.iterations[:] = descent.steps
    return outcome
