"""Options of a pruning study, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from callbacks.pruning import Pruning

KEY = "callbacks.pruning"
Schedule = Literal["one_shot", "iterative", "cubic"]
Rewind = Literal["none", "init", "early"]
STUDY_DENSITIES = tuple(0.8**n for n in range(10))


@dataclass(frozen=True)
class Segment:
    """A part of the fit: dense training, its continuation as a control, or the fine-tuning of one density."""

    kind: Literal["dense", "control", "tuned"]
    density: float
    epochs: int


@contextmanager
def naming_the_callback() -> Iterator[None]:
    """Let errors of a `networks.pruning.pruner.Pruner`, which name its argument, name the option of the callback."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{KEY}.{error}") from None


def check(pruning: Pruning) -> None:
    """Refuse what cannot be done.

    Args:
        pruning: With its options as they were given.

    Raises:
        ValueError: Names the option.
    """
    method, schedule, epochs = pruning.method, pruning.schedule, pruning.finetune_epochs
    for name, kind in (("schedule", Schedule), ("rewind", Rewind)):
        if (value := getattr(pruning, name)) not in get_args(kind):
            raise ValueError(f"{KEY}.{name}={value!r} is unknown; choose one of {', '.join(get_args(kind))}")
    for name, value in (("finetune_epochs", epochs), ("latency_repeats", pruning.latency_repeats - 1)):
        if value < 0:
            raise ValueError(f"{KEY}.{name}={getattr(pruning, name)}: must not be negative")
    positive = (pruning.finetune_lr, pruning.score_batches, *pruning.latency_batches)
    if min(positive) <= 0 or pruning.deploy_tolerance < 0 or not pruning.latency_batches:
        raise ValueError(
            f"{KEY}: finetune_lr={pruning.finetune_lr}, score_batches={pruning.score_batches} and latency_batches="
            f"{pruning.latency_batches} must be positive, deploy_tolerance={pruning.deploy_tolerance} not negative"
        )
    if schedule != "one_shot" and not epochs:
        raise ValueError(f"{KEY}.schedule={schedule!r} prunes between epochs: set finetune_epochs to 1 or more")
    if schedule == "cubic" and method == "structured":
        raise ValueError(f"{KEY}.schedule='cubic' masks single weights; choose one_shot or iterative")
    if method == "lottery" and schedule == "cubic":
        raise ValueError(f"{KEY}.method='lottery' is iterative; choose schedule=one_shot or iterative")
    if pruning.rewind != "none" and not epochs:
        raise ValueError(f"{KEY}.rewind={pruning.rewind!r} leaves an untrained network: set finetune_epochs")
    if pruning.scope == "2:4" and any(rho not in (0.5, 1.0) for rho in pruning.densities):
        raise ValueError(f"{KEY}.scope='2:4' keeps two of four weights: set sparsity=0.5")
    if method == "lottery" and not epochs:
        raise ValueError(f"{KEY}.method='lottery' trains every ticket: set finetune_epochs")


def densities_of(sparsity: float | Sequence[float] | None, densities: Sequence[float] | None) -> list[float]:
    """Parts that stay, descending, of a sparsity or of densities; both None: those of the study."""
    if sparsity is not None:
        values = [sparsity] if isinstance(sparsity, int | float) else list(sparsity)
        if wrong := [value for value in values if not 0 <= value < 1]:
            raise ValueError(f"{KEY}.sparsity={wrong[0]}: must lie in [0, 1), the part of the weights that goes")
        found = [round(1 - value, 12) for value in values]
    else:
        found = [float(value) for value in (STUDY_DENSITIES if densities is None else densities)]
        if wrong := [value for value in found if not 0 < value <= 1]:
            raise ValueError(f"{KEY}.densities={wrong[0]}: must lie in (0, 1], the part of the weights that stays")
    if not found:
        raise ValueError(f"{KEY}.densities is empty: give at least one, or null for those of the study")
    return sorted(set(found), reverse=True)


def plan_of(pruning: Pruning, dense_epochs: int) -> list[Segment]:
    """Parts of the fit in their order."""
    plan = [Segment("dense", 1.0, dense_epochs)]
    if pruning.finetune_epochs:
        tuned = [Segment("tuned", rho, pruning.finetune_epochs) for rho in pruning.densities if rho < 1]
        # Iterative: the sparsest network was trained on in every segment, so its control is, unless it begins anew.
        in_a_row = max(1, len(tuned)) if pruning.schedule == "iterative" and pruning.rewind == "none" else 1
        plan += [Segment("control", 1.0, pruning.finetune_epochs)] * (in_a_row if pruning.control else 0) + tuned
    return plan
