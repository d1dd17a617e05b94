"""Candidate stacks for targets: which are best, which are different, what refinement makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from networks.token_choice import Constraints
from physics.thin_film.refine import Refined, Refiner
from physics.thin_film.targets import weighted_mae
from physics.thin_film.tokens import Vocabulary


@dataclass(frozen=True)
class Refinement:
    """How thicknesses are refined by gradients through the simulator.

    Args:
        method: ``adam``, ``levenberg_marquardt`` (both for all candidates at once) or ``lbfgs``.
        steps: Of Adam or Levenberg-Marquardt, or iterations of L-BFGS-B at most.
        lr_nm: Step of Adam at the start, nm; decays to 0.
        polish_steps: Of Levenberg-Marquardt afterwards.
        bounds_nm: Least and largest thickness.
        grid_nm: Round the result to multiples of this; None: continuous.
        drop_below_nm: Thinner layers are dropped and equal neighbours merged.
    """

    method: Literal["adam", "levenberg_marquardt", "lbfgs"] = "adam"
    steps: int = 120
    lr_nm: float = 8.0
    polish_steps: int = 0
    bounds_nm: Sequence[float] = (1.0, 400.0)
    grid_nm: float | None = None
    drop_below_nm: float = 1.0

    def refiner(self, data: Any, device: torch.device) -> Refiner:
        """For the materials, wavelengths and surroundings of a DataModule.

        Raises:
            ValueError: Names the argument and the remedy.
        """
        try:
            return Refiner(
                data.index.to(device),
                data.wavelength_nm.to(device),
                data.surroundings,
                method=self.method,
                steps=self.steps,
                lr_nm=self.lr_nm,
                polish_steps=self.polish_steps,
                bounds_nm=tuple(self.bounds_nm),
                grid_nm=self.grid_nm,
                drop_below_nm=self.drop_below_nm,
            )
        except ValueError as error:
            raise ValueError(str(error).replace("refine.", "model.refinement.", 1)) from None


@dataclass(frozen=True)
class Limits:
    """What stacks may be made of in prediction.

    Args:
        allow: Groups (``metals``, ``semiconductors``, ``dielectrics``), materials or tokens; None: all.
        exclude: The same, taken away.
        max_layers: None: as many as the network writes.
        min_layers: At least so many; equal to ``max_layers`` it forces the number.
    """

    allow: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    max_layers: int | None = None
    min_layers: int = 1

    def constraints(self, vocabulary: Vocabulary) -> Constraints:
        """For the tokens of a vocabulary.

        Raises:
            ValueError: For unknown names, or where nothing is left.
        """
        try:
            return Constraints(vocabulary.allowed(self.allow, self.exclude), self.max_layers, self.min_layers)
        except ValueError as error:
            raise ValueError(f"model.limits: {error}") from None

    def obeyed(self, tokens: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Which stacks ``(N, L)`` keep to them, ``(N,)`` bool."""
        allowed = vocabulary.allowed(self.allow, self.exclude).to(tokens.device)
        layers = vocabulary.keep(tokens).sum(-1)
        most = tokens.shape[-1] if self.max_layers is None else self.max_layers
        return allowed[tokens].all(-1) & (layers <= most) & (layers >= self.min_layers)


class Chosen(NamedTuple):
    """Refined candidates.

    Attributes:
        mae: After refinement, ``(B, K)``; that before where it was lower; inf for a candidate that is not there.
        refined: Details, ``(B, K, ...)``.
    """

    mae: Tensor
    refined: Refined


def errors(spectra: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean absolute errors of ``(B, N, 3, W)``, ``(B, N)``; inf where a simulation failed."""
    mae = weighted_mae(spectra, target[:, None].to(spectra.dtype), weight[:, None].to(spectra.dtype))
    return torch.where(spectra.isfinite().all((-1, -2)) & mae.isfinite(), mae, torch.inf)


def repeated(tokens: Tensor) -> Tensor:
    """Which stacks of ``(B, N, L)`` have occurred earlier along N, ``(B, N)`` bool."""
    same = (tokens[:, :, None] == tokens[:, None]).all(-1)
    return torch.tril(same, diagonal=-1).any(-1)


def best_distinct(tokens: Tensor, mae: Tensor, count: int) -> Tensor:
    """The best stacks of each target without repetitions.

    Args:
        tokens: ``(B, N, L)``.
        mae: ``(B, N)``.
        count: K, at most N.

    Returns:
        Their places along N, ``(B, K)``, best first; -1 where there are no more.
    """
    order = mae.sort(dim=1, stable=True).indices
    ordered = tokens.gather(1, order[..., None].expand_as(tokens))
    again = repeated(ordered)
    front = again.long().sort(dim=1, stable=True).indices[:, :count]
    chosen = order.gather(1, front)
    return chosen.masked_fill(again.gather(1, front) | mae.gather(1, chosen).isinf(), -1)


def take(values: Tensor, places: Tensor) -> Tensor:
    """Entries of ``(B, N, ...)`` at places ``(B, K)``; -1 takes the first."""
    index = places.clamp(min=0).view(*places.shape, *[1] * (values.ndim - 2))
    return values.gather(1, index.expand(*places.shape, *values.shape[2:]))


def refine(
    refiner: Refiner, vocabulary: Vocabulary, stacks: Mapping[str, Tensor], target: Tensor, weight: Tensor
) -> dict[str, Chosen]:
    """Refine the candidates of several methods together, each stack once.

    Args:
        refiner: For the materials of the vocabulary.
        vocabulary: Tokens.
        stacks: By method, ``(B, K, L)``; a first token of -1 says that there is no candidate.
        target: ``(B, 3, W)``.
        weight: ``(B, 3, W)``.
    """
    if not stacks:
        return {}
    joined = torch.cat(list(stacks.values()), 1)
    there = joined[..., 0] >= 0
    owner = torch.arange(len(joined), device=joined.device)[:, None].expand(joined.shape[:2])
    rows, place = torch.cat([owner[..., None], joined.clamp(min=0)], -1)[there].unique(dim=0, return_inverse=True)
    material, thickness = vocabulary.layers(rows[:, 1:])
    inputs = (material[:, :-1], thickness[:, :-1], target[rows[:, 0]].double(), weight[rows[:, 0]].double())
    with torch.inference_mode(False), torch.enable_grad():  # evaluation has no gradients, refinement needs them
        found = refiner(*(x.clone() for x in inputs))
    where = torch.zeros(joined.shape[:2], dtype=torch.int64, device=joined.device)
    where[there] = place
    result, begin = {}, 0
    for name, own in stacks.items():
        part = slice(begin, begin + own.shape[1])
        begin += own.shape[1]
        refined = _picked(found, where[:, part])
        mae = torch.where(there[:, part], torch.minimum(refined.mae, refined.start_mae), torch.inf)
        result[name] = Chosen(mae, refined)
    return result


def recipes(found: Chosen, stacks: Tensor, data: Any) -> dict[str, Tensor]:
    """Refined candidates, or the stacks ``(B, K, L)`` themselves where refinement did not help.

    Returns:
        ``material`` and ``thickness_nm`` (B, K, L - 1), ``spectrum`` (B, K, 3, W) and ``mae`` (B, K).
    """
    refined = found.refined
    material, thickness = data.vocabulary.layers(stacks.clamp(min=0))
    spectra = data.simulate(stacks.clamp(min=0))
    better = refined.mae <= refined.start_mae
    return {
        "material": torch.where(better[..., None], refined.material, material[..., :-1]),
        "thickness_nm": torch.where(better[..., None], refined.thickness_nm, thickness[..., :-1]),
        "spectrum": torch.where(better[..., None, None], refined.spectrum, spectra),
        "mae": found.mae,
    }


def _picked(found: Refined, where: Tensor) -> Refined:
    fields = ("material", "thickness_nm", "spectrum", "mae", "start_mae")
    return Refined(**{name: getattr(found, name)[where] for name in fields})


def diversity(
    tokens: Tensor, mae: Tensor, vocabulary: Vocabulary, best: Tensor | None = None, factor: float = 1.5
) -> tuple[Tensor, Tensor]:
    """How many really different answers a target got.

    Counted are draws whose error is at most ``factor`` times the best one.

    Args:
        tokens: ``(B, N, L)``.
        mae: ``(B, N)``.
        vocabulary: Of the tokens.
        best: The error that counts as the best, ``(B,)``; None: that of these draws. Two networks can only be compared
            by a common one: the better the best draw of a network is, the fewer others come near it.
        factor: See above.

    Returns:
        Distinct stacks ``(B,)``, and distinct orders of materials ``(B,)``.
    """
    good = mae <= factor * (mae.amin(1) if best is None else best)[:, None]
    material, _ = vocabulary.layers(tokens)
    # A draw that is not good cannot repeat a good one: give it a token that no stack has.
    marked = [x.masked_fill(~good[..., None], -2) for x in (tokens, material)]
    stacks, orders = ((good & ~repeated(x)).sum(1) for x in marked)
    return stacks, orders


def alike(material: Tensor, thickness_nm: Tensor, tolerance_nm: float = 2.0) -> Tensor:
    """Which recipes of ``(B, K, L)`` repeat an earlier one along K within a tolerance, ``(B, K)`` bool."""
    same = (material[:, :, None] == material[:, None]).all(-1)
    near = ((thickness_nm[:, :, None] - thickness_nm[:, None]).abs() <= tolerance_nm).all(-1)
    return torch.tril(same & near, diagonal=-1).any(-1)


def sizes(wanted: Iterable[int | str], equal: int) -> dict[str, int]:
    """Sizes of template libraries by the names that tables give them; ``equal``: as many bytes as the network.

    Raises:
        ValueError: For an entry that is neither.
    """
    found = {}
    for entry in wanted:
        if entry != "equal" and not (isinstance(entry, int) and entry > 0):
            raise ValueError(f"model.templates: {entry!r} must be a number of stacks, or equal")
        found["template_equal" if entry == "equal" else f"template_{entry}"] = equal if entry == "equal" else entry
    return found
