"""Settings of the first-order solvers: the paper's Adam, RMSprop."""

from __future__ import annotations

from dataclasses import dataclass


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
