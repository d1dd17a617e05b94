"""First-order solvers: descent on the mean square of the mismatch, with the paper's settings.

They are the baseline that the paper proposes. The Hessian is about ``J^T J``, whose condition is that of the Jacobian
squared, so that thousands of steps do not reach what Newton's method reaches in five.
"""

from __future__ import annotations

from dataclasses import dataclass

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


class Descent:
    """Descent of all scenarios at once on ``mean(F^2)``, each with a loss, learning rate, schedule and stop of its own.

    The paper's batches share learning rate and stop; with one scenario this is the paper's solver. The rules are those
    of ``torch.optim`` with ``ReduceLROnPlateau`` (Adam) and ``StepLR`` (RMSprop), on unknowns ``[N_u, B]``.

    Args:
        equations: What is to vanish.
        batch: Scenarios, in the order of the equations (`Equations.batch`).
        state: Where they start; it is copied (`Equations.state`).
        settings: `AdamSettings` or `RMSpropSettings`.
        tol: A scenario is frozen once ``max|F| <= tol``, per unit.
        keep_best: Whether `best` keeps the state of least loss of every scenario.
    """

    _TENSORS = ("mean", "square", "lr", "frozen", "steps", "lowest", "bad", "cooling", "best_loss")

    def __init__(
        self,
        equations: Equations,
        batch: Batch,
        state: State,
        settings: Settings,
        tol: float = 1e-8,
        keep_best: bool = False,
    ) -> None:
        self.eq, self.batch, self.state, self.settings, self.tol = equations, batch, state.clone(), settings, tol
        size, count = equations.num_unknowns, batch.p.shape[1]
        self.mean, self.square = batch.p.new_zeros(size, count), batch.p.new_zeros(size, count)
        self.lr = batch.p.new_full((count,), settings.lr)
        self.lowest, self.best_loss = (batch.p.new_full((count,), torch.inf) for _ in range(2))
        self.steps, self.bad, self.cooling = (torch.zeros(count, dtype=torch.int64).to(self.lr.device) for _ in "123")
        self.frozen = torch.zeros_like(self.steps, dtype=torch.bool)
        self.best = self.state.clone() if keep_best else None

    def evaluate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss ``[B]``, mismatch ``[N_u, B]`` and gradient ``[N_u, B]`` at the present state."""
        eq, changes = self.eq, self.batch.changes
        ef, p, q = eq.injections(self.state, changes)
        mismatch = eq.mismatch_of(p, q, self.state, self.batch)
        weight = mismatch * (2 / len(mismatch))
        gradient = eq.transposed_product_of(ef, p, q, self.state, weight, changes)
        return mismatch.square().mean(0), mismatch, gradient

    def step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step of every scenario that is not frozen.

        Returns:
            Loss ``[B]`` and mismatch ``[N_u, B]`` before the step.
        """
        loss, mismatch, gradient = self.evaluate()
        if self.best is not None:
            better = loss < self.best_loss
            for kept, now in zip(self.best, self.state, strict=True):
                kept.copy_(torch.where(better, now, kept))
        self.best_loss = torch.minimum(self.best_loss, loss)
        self.frozen |= mismatch.abs().amax(0) <= self.tol
        self.steps += ~self.frozen
        if isinstance(self.settings, AdamSettings):
            du = self._adam(gradient, self.settings)
            self._plateau(loss, self.settings)
        else:
            du = self._rmsprop(gradient, self.settings)
            self.lr = torch.where(self.steps % self.settings.step_size == 0, self.lr * self.settings.gamma, self.lr)
        self.eq.step(self.state, torch.where(self.frozen, 0.0, du))
        return loss, mismatch

    def follow(self, batch: Batch, settings: Settings) -> None:
        """Go on with other injections from the present state, as the paper does between the steps of a series.

        The first moment is zeroed; the second and the count of steps stay; the schedule is a fresh one.

        Args:
            batch: The next injections. Set-points of slack and PV buses stay those of the state.
            settings: For this step.
        """
        self.batch, self.settings = batch, settings
        self.mean.zero_()
        self.lr.fill_(settings.lr)
        for tensor in (self.lowest, self.best_loss):
            tensor.fill_(torch.inf)
        for tensor in (self.bad, self.cooling, self.frozen):
            tensor.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of everything that a descent needs to go on exactly."""
        tensors = {name: getattr(self, name).clone() for name in self._TENSORS}
        for which in ("state", "best"):
            state = getattr(self, which)
            if state is not None:
                tensors |= {f"{which}.{name}": value.clone() for name, value in state._asdict().items()}
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            ValueError: If a tensor is missing.
        """
        own = {name: getattr(self, name) for name in self._TENSORS}
        for which in ("state", "best"):
            if getattr(self, which) is not None:
                own |= {f"{which}.{name}": value for name, value in getattr(self, which)._asdict().items()}
        if missing := sorted(set(own) - set(tensors)):
            raise ValueError(f"the state of a descent lacks {', '.join(missing)}")
        for name, value in own.items():
            value.copy_(tensors[name])

    def _adam(self, gradient: Tensor, settings: AdamSettings) -> Tensor:
        """Learning rate times the direction, ``[N_u, B]``."""
        self.mean.lerp_(gradient, 1 - settings.beta1)
        self.square.mul_(settings.beta2).addcmul_(gradient, gradient, value=1 - settings.beta2)
        steps = self.steps.clamp(min=1)
        size = (self.square.sqrt() / (1 - settings.beta2**steps).sqrt()).add_(_EPS)
        return self.lr / (1 - settings.beta1**steps) * self.mean / size

    def _rmsprop(self, gradient: Tensor, settings: RMSpropSettings) -> Tensor:
        """Learning rate times the direction, ``[N_u, B]``; ``mean`` holds the momentum."""
        self.square.mul_(settings.alpha).addcmul_(gradient, gradient, value=1 - settings.alpha)
        self.mean.mul_(settings.momentum).add_(gradient / self.square.sqrt().add_(_EPS))
        return self.lr * self.mean

    def _plateau(self, loss: Tensor, settings: AdamSettings) -> None:
        """The rules of ``ReduceLROnPlateau`` with a relative threshold, scenario by scenario."""
        better = loss < self.lowest * (1 - settings.threshold)
        self.lowest = torch.where(better, loss, self.lowest)
        self.bad = torch.where(better, 0, self.bad + 1)
        cooling = self.cooling > 0
        self.cooling -= cooling.long()
        self.bad = torch.where(cooling, 0, self.bad)
        reduce = self.bad > settings.patience
        lower = self.lr * settings.factor
        self.lr = torch.where(reduce & (self.lr - lower > _EPS), lower, self.lr)
        self.cooling = torch.where(reduce, settings.cooldown, self.cooling)
        self.bad = torch.where(reduce, 0, self.bad)


def adam_settings(name: str) -> AdamSettings:
    """The paper's settings for a grid, its default where it has none for that name."""
    return ADAM_SETTINGS.get(name, ADAM_SETTINGS["default"])


def descend(
    eq: Equations,
    batch: Batch,
    state: State,
    settings: Settings,
    tol: float,
    max_iter: int,
    recorder: Recorder,
) -> Outcome:
    """Run a `Descent` to the tolerance or to the end; the outcome has the last states, as the paper reports them."""
    descent = Descent(eq, batch, state, settings, tol)
    everyone = torch.arange(batch.p.shape[1], device=batch.p.device)
    for iteration in range(max_iter):
        _, mismatch = descent.step()
        if recorder.enabled:
            recorder(iteration, everyone, mismatch)
        if iteration % 10 == 0 and bool(descent.frozen.all()):
            break
    outcome = Outcome(eq, state)
    mismatch = eq.mismatch(descent.state, batch)
    outcome.write(everyone, descent.state, mismatch, max_iter)
    outcome.iterations[:] = descent.steps
    return outcome
