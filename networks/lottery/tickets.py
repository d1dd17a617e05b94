"""Ticket files: a mask, the weights to begin with and those that were trained, and where all of it comes from.

A file is a dictionary that ``torch.load(path, weights_only=True)`` reads:

=========== =============================================================================================
key         meaning
=========== =============================================================================================
format      number of this layout
masks       ``{name: {"shape", "bits"}}``, bit-packed; names are those of the ordinary network
initial     weights that the level began with: theta_0, theta_k, or what learning-rate rewinding left
trained     weights at the end of the level, with statistics of normalisation layers
best        the same at the best validation of the level; None where there was none
about       level, score, rate, rewind, bayesian, densities, metrics, seconds, architecture, split seed,
            configuration, versions
=========== =============================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from networks.masks import MASK, from_structure, masked_weights, structure

FORMAT = 1
State = dict[str, Tensor]
Which = Literal["initial", "trained", "best"]
_NAME = re.compile(r"level_(\d+)\.pt")


@dataclass
class Ticket:
    """A ticket.

    Attributes:
        masks: Boolean, by name of the weight in the ordinary network.
        initial: Weights that the level began with.
        trained: Weights at its end; None: unknown.
        best: Weights at its best validation; None: unknown.
        about: Plain data: ``level``, ``score``, ``rate``, ``rewind``, ``bayesian``, ``remaining``, ``densities``,
            ``metrics``, ``seconds``, ``cumulative_epochs``, ``architecture`` (as text), ``split_seed`` of the data,
            ``config`` (None outside of a run), ``versions``.
    """

    masks: State
    initial: State
    trained: State | None = None
    best: State | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> int:
        """Number of prunings."""
        return self.about.get("level", 0)

    @property
    def bayesian(self) -> bool:
        """Whether its weights are Gaussians."""
        return any(name.endswith("_log_sigma") for name in self.initial)

    def state(self, which: Which) -> State:
        """One of the three sets of weights.

        Raises:
            ValueError: The file does not hold it.
        """
        state = getattr(self, which)
        if state is None:
            raise ValueError(f"the ticket of level {self.level} holds no {which!r} weights")
        return state


def save_ticket(path: Path | str, ticket: Ticket) -> None:
    """Write a ticket so that a crash leaves the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    content = {
        "format": FORMAT,
        "masks": structure(ticket.masks),
        **{key: _copied(getattr(ticket, key)) for key in ("initial", "trained", "best")},
        "about": ticket.about,
    }
    try:
        torch.save(content, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _copied(state: Mapping[str, Tensor] | None) -> State | None:
    return None if state is None else {name: value.detach().cpu().clone() for name, value in state.items()}


def load_ticket(path: Path | str) -> Ticket:
    """Read a ticket.

    Raises:
        ValueError: The file is no ticket.
        FileNotFoundError: There is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no ticket {path}: the run has not reached this level, or the path is wrong")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT or "masks" not in content:
        raise ValueError(f"{path} is no ticket of format {FORMAT}; tickets are the files tickets/level_NN.pt of a run")
    return Ticket(
        from_structure(content["masks"]), content["initial"], content["trained"], content["best"], content["about"]
    )


def ticket_path(folder: Path | str, level: int) -> Path:
    """The file of a level in the folder ``tickets`` of a run."""
    return Path(folder) / f"level_{level:02d}.pt"


def find_tickets(path: Path | str, key: str = "") -> dict[int, Path]:
    """Ticket files by level.

    Args:
        path: A run, its folder ``tickets``, or one file.
        key: The setting that gave it, for the message.

    Raises:
        FileNotFoundError: Nothing is there.
    """
    setting = f"{key}={path}: " if key else ""
    path = Path(path).expanduser()
    if path.is_file():
        return {load_ticket(path).level: path}
    folder = path / "tickets" if (path / "tickets").is_dir() else path
    found = {int(match[1]): file for file in folder.glob("level_*.pt") if (match := _NAME.fullmatch(file.name))}
    if not found:
        raise FileNotFoundError(
            f"{setting}no tickets in {path}: give a run that pruned (experiment=bayesian_lottery), its folder tickets, "
            "or a file"
        )
    return dict(sorted(found.items()))


def select_ticket(path: Path | str, level: int | None) -> Path:
    """The file of one level; None: the only file, or the highest level.

    Raises:
        ValueError: The level is not there.
        FileNotFoundError: Nothing is there.
    """
    found = find_tickets(path, "model.ticket")
    if level is None:
        return found[max(found)]
    if level not in found:
        raise ValueError(f"model.level={level}: {path} has the levels {', '.join(map(str, found))}")
    return found[level]


# ----------------------------------------------------------------------------------------- ordinary <-> Bayesian names


def means(state: Mapping[str, Tensor]) -> State:
    """The weights of an ordinary network: means take their names, standard deviations are left out."""
    return {name.removesuffix("_mu"): value for name, value in state.items() if not name.endswith(("_log_sigma", MASK))}


def mismatches(ticket: Ticket, network: nn.Module) -> list[str]:
    """Why a ticket does not fit a network with masks (`networks.masks.install_masks`); empty if it does."""
    found = []
    shapes = {w.name: list(w.mu.shape) for w in masked_weights(network)}
    for name in [*shapes, *(name for name in ticket.masks if name not in shapes)]:
        if name not in ticket.masks:
            found.append(f"{name} may be pruned here, the ticket has no mask for it")
        elif name not in shapes:
            found.append(f"the ticket has a mask for {name}, which is not pruned here or does not exist")
        elif list(ticket.masks[name].shape) != shapes[name]:
            found.append(f"{name} has shape {shapes[name]}, in the ticket {list(ticket.masks[name].shape)}")
    own, theirs = means(network.state_dict()), means(ticket.initial)
    for name in [*own, *(name for name in theirs if name not in own)]:
        if name in shapes or name in ticket.masks:
            continue
        if name not in theirs:
            found.append(f"the ticket lacks {name}")
        elif name not in own:
            found.append(f"the ticket has {name}, which this network lacks")
        elif theirs[name].shape != own[name].shape:
            found.append(f"{name} has shape {list(own[name].shape)}, in the ticket {list(theirs[name].shape)}")
    return found


def require_fit(ticket: Ticket, network: nn.Module) -> None:
    """Refuse a ticket of another architecture.

    Raises:
        ValueError: Names every mismatch.
    """
    if found := mismatches(ticket, network):
        raise ValueError("the ticket does not fit the network: " + "; ".join(found))


def apply_masks(network: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the masks of a network by name."""
    for weight in masked_weights(network):
        weight.set_mask(masks[weight.name])


def apply_weights(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network the weights of a ticket, across kinds if they differ.

    Between networks of one kind everything is copied. An ordinary network takes the means of a Bayesian ticket. A
    Bayesian network takes the weights of an ordinary ticket as means; its standard deviations stay what they are.
    Masks stay as well.
    """
    own = network.state_dict()
    with torch.no_grad():
        for name, target in own.items():
            if name.rpartition(".")[2] == MASK:
                continue
            for candidate in (name, name.removesuffix("_mu"), f"{name}_mu"):
                if candidate in state:
                    target.copy_(state[candidate])
                    break


def apply_ticket(network: nn.Module, ticket: Ticket, which: Which = "initial") -> None:
    """Masks and weights of a ticket for a network with masks.

    Raises:
        ValueError: It does not fit, or does not hold these weights.
    """
    require_fit(ticket, network)
    state = ticket.state(which)
    apply_masks(network, ticket.masks)
    apply_weights(network, state)
