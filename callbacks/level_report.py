"""What a level of a lottery-ticket search tells when it ends: masks, scores, spreads, time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from callbacks.energy.callback import EnergyCallback
from callbacks.run_record import RunRecord
from networks.lottery.cost import Cost, multiplications
from networks.lottery.pruning import prune, sign_agreement
from networks.lottery.scores import NEEDS_SIGMA, Posterior, rank_correlation, score
from networks.lottery.tickets import load_ticket
from networks.masks import MaskedWeight, jaccard

# Parts of a row that are for the ticket alone, or logged after every validation.
_NOT_LOGGED = ("metrics", "best_metrics", "densities", "score", "level", "cumulative_epochs", "remaining")

Values = dict[str, Tensor]


def within_net(state: Mapping[str, Tensor]) -> Values:
    """Names inside of the attribute ``net`` that modules of this program keep their network in."""
    return {name.removeprefix("net."): value for name, value in state.items()}


def label(name: str) -> str:
    """A layer's name as logs and tables have it."""
    return name.removesuffix(".weight").removeprefix("net.")


def measured(trainer: pl.Trainer) -> dict[str, float]:
    """What validation has measured."""
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("val/", "paper/"))}


def logged(row: Mapping[str, Any]) -> dict[str, float]:
    """What loggers get of the row of a level, with the names that they get it under."""
    return {f"lottery/{name}": value for name, value in _flat(row) if name.partition("/")[0] not in _NOT_LOGGED}


def _flat(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found.append((f"{prefix}{name}", float(value)))
    return found


def in_words(row: Mapping[str, Any]) -> str:
    """A line about the row of a level."""
    metrics = row["metrics"]
    shown = [f"{name} {metrics[name]:.4f}" for name in ("val/accuracy", "val/loss") if name in metrics]
    return f"{100 * row['remaining']:.1f} % of the weights left, {', '.join(shown) or 'no validation'}"


def scores_of(
    name: str, weights: Sequence[MaskedWeight], optimizers: Sequence[Optimizer], c: float, seed: int
) -> Values:
    """Values of a score by name of the weight.

    Args:
        name: One of `networks.lottery.scores.SCORES`.
        weights: All prunable weights.
        optimizers: Those that train them, whose running means some scores read.
        c: Weight of sigma in ``mu_plus_sigma``.
        seed: Of ``random``.
    """
    generator = torch.Generator().manual_seed(seed)
    posteriors = [
        Posterior(
            w.mu.cpu(),
            None if w.log_sigma is None else w.log_sigma.cpu(),
            w.fan_in,
            _gradient_sq(optimizers, w),
            *w.prior,
            c=c,
            generator=generator,
        )
        for w in weights
    ]
    values = score(name, posteriors, [w.label for w in weights])
    return {w.name: value for w, value in zip(weights, values, strict=True)}


def _gradient_sq(optimizers: Sequence[Optimizer], weight: MaskedWeight) -> Tensor | None:
    """The running mean of squared gradients that Adam keeps of a weight."""
    for optimizer in optimizers:
        state = optimizer.state.get(weight.mu)
        if state and "exp_avg_sq" in state:
            return state["exp_avg_sq"].cpu()
    return None


def compared_scores(
    own: str,
    others: Sequence[str],
    scores: Callable[[str], Values],
    weights: Sequence[MaskedWeight],
    masks: Mapping[str, Tensor],
    rate: float,
) -> dict[str, float]:
    """Rank correlation of other scores with the one in use, and overlap of the masks that both would leave.

    Args:
        own: The score in use.
        others: Those to compare; those that the network lacks something for are left out.
        scores: Values of a score by name of the weight.
        weights: All prunable weights.
        masks: Of the level.
        rate: Part that the next pruning removes.
    """
    found: dict[str, float] = {}
    first = scores(own)
    mine = prune(masks, first, rate)
    places = torch.cat([mask.flatten() for mask in masks.values()])
    flat = torch.cat([first[name].flatten() for name in masks])[places]
    for other in others:
        if other == own or (other in NEEDS_SIGMA and not all(w.bayesian for w in weights)):
            continue
        theirs = scores(other)
        values = torch.cat([theirs[name].flatten() for name in masks])[places]
        found[f"rank_correlation/{other}"] = rank_correlation(flat, values)
        found[f"overlap/{other}"] = jaccard(mine, prune(masks, theirs, rate))
    return found


def spreads(
    weights: Sequence[MaskedWeight], masks: Mapping[str, Tensor], first: Mapping[str, Tensor]
) -> dict[str, float]:
    """Agreement of the signs with those of the initial weights; means of sigma and signal to noise per layer.

    Args:
        weights: All prunable weights.
        masks: Of the level.
        first: Weights at the start of the search.
    """
    initial = [first[f"{w.name}_mu" if w.bayesian else w.name] for w in weights]
    own = [w.mu.detach().cpu() for w in weights]
    found = {"sign_agreement": sign_agreement(own, initial, list(masks.values()))}
    for weight in weights:
        if weight.log_sigma is not None and bool(weight.mask.any()):
            logs = weight.log_sigma.detach().double()[weight.mask]
            ratios = weight.mu.detach().double()[weight.mask].abs() / logs.exp()
            found[f"sigma/{weight.label}"] = float(logs.exp().mean())
            found[f"snr/{weight.label}"] = float(ratios.mean())
    return found


def work(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
    """Multiplications that the masks leave, where the size of an input is known."""
    shape = getattr(getattr(trainer, "datamodule", None), "input_shape", None)
    if shape is None or not hasattr(pl_module, "net"):
        return {}
    example = torch.zeros((1, *shape), dtype=pl_module.dtype, device=pl_module.device)
    return {"multiplications": multiplications(pl_module.net, example)[1]}


def origin(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Of which network, split, configuration and versions a ticket is."""
    return {
        "architecture": str(getattr(pl_module, "net", pl_module)),
        "split_seed": getattr(getattr(trainer, "datamodule", None), "split_seed", None),
        "config": next((c.config for c in trainer.callbacks if isinstance(c, RunRecord)), None),
        "versions": {name: version(name) for name in ("torch", "lightning")},
    }


def joules_of(trainer: pl.Trainer, epochs: Iterable[int]) -> float | None:
    """Energy of epochs by the energy callback, J; None where it has not measured all of them."""
    energy = next((c for c in trainer.callbacks if isinstance(c, EnergyCallback)), None)
    used = {row["epoch"]: row["it_kwh"] for row in (energy.epochs if energy else ())}
    found = [used.get(epoch) for epoch in epochs]
    return None if None in found else 3.6e6 * sum(found)


def seconds_by_level(pl_module: pl.LightningModule, own: Sequence[float]) -> list[float]:
    """Seconds of levels 0 to the running one; those of the search that found the module's ticket come first.

    The level of the ticket is trained again: its first training counts where its trained weights were taken.

    Args:
        pl_module: With a ticket that it began with, or without.
        own: Seconds of the levels of this run.
    """
    found = list(own)
    ticket = getattr(pl_module, "ticket", None)
    if ticket is None:
        return found
    searched = list(ticket.about.get("seconds_by_level", ()))
    if len(searched) <= ticket.level:  # a ticket of another program
        return found
    if getattr(pl_module, "source", "init") == "trained":
        found[0] += searched[ticket.level]
    return searched[: ticket.level] + found


def cost(seconds: float, number: int, compared: Path | None) -> dict[str, float]:
    """Seconds of all levels up to one, and what a transplant saves.

    Args:
        seconds: Of the levels.
        number: Of the level.
        compared: Ticket of the same level of the search that a transplant saves; None where there is none.
    """
    if compared is None:
        return {"cost_s": seconds}
    return {"cost_s": seconds, "cost_saved": Cost(number, load_ticket(compared).about["cost_s"], seconds).saving}
