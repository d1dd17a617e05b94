"""Members of an ensemble: built with random numbers of their own, or read from checkpoints of earlier runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DIVERSITIES = ("seed", "bootstrap", "classes")


def make_members(
    build: Callable[..., nn.Module],
    count: int,
    variants: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    biases: bool = True,
) -> list[nn.Module]:
    """Networks with other random initial weights each.

    Args:
        build: Makes a network from keyword arguments.
        count: How many.
        variants: What differs between them; None: nothing.
        seed: Member k begins with the random numbers of (seed, k), whatever was drawn before.
        biases: Whether linear layers and convolutions keep their biases; optimal transport of the paper has none.

    Raises:
        ValueError: Names the argument.
    """
    if count < 1:
        raise ValueError(f"model.num_members={count}: must be at least 1")
    if variants is not None and len(variants) != count:
        raise ValueError(f"model.variants has {len(variants)} entries for model.num_members={count}; one for each")
    members = []
    for k in range(count):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence((seed, k)).generate_state(1)[0]))
            member = build(**(variants[k] if variants else {}))
        members.append(member if biases else without_biases(member))
    return members


def without_biases(network: nn.Module) -> nn.Module:
    """Take the biases of linear layers and convolutions away, in place."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.bias is not None:
            module.bias = None
    return network


def read_members(paths: Sequence[str | Path], key: str = "model.members") -> list[dict[str, Tensor]]:
    """States of networks from earlier runs.

    Args:
        paths: Checkpoints, or folders of runs, of which the best checkpoint is taken, else the last. A run of this
            experiment gives all its members.
        key: Of the setting, for messages.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It has no network.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            options = [path / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
            file = next((option for option in options if option.is_file()), None)
        else:
            file = path if path.is_file() else None
        if file is None:
            raise FileNotFoundError(f"{key}: no checkpoint {path}; give a file, or the folder of a run that saved one")
        state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        net = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
        if not net:
            raise ValueError(f"{key}: {file} holds no network (no entry net.*)")
        numbers = sorted({int(name.split(".")[1]) for name in net if name.startswith("members.")})
        for k in numbers:
            prefix = f"members.{k}."
            found.append({name.removeprefix(prefix): v for name, v in net.items() if name.startswith(prefix)})
        if not numbers:
            found.append(net)
    return found


def load_members(members: Sequence[nn.Module], states: Sequence[Mapping[str, Tensor]], key: str) -> None:
    """Give members the weights of earlier runs.

    Raises:
        ValueError: There are not as many, or a member is of another architecture.
    """
    if len(members) != len(states):
        raise ValueError(f"{key} gives {len(states)} networks: set model.num_members={len(states)}")
    for k, (member, state) in enumerate(zip(members, states, strict=True)):
        own = member.state_dict()
        differing = next((n for n in (*own, *state) if n not in own or n not in state), None)
        differing = differing or next((n for n in own if own[n].shape != state[n].shape), None)
        if differing is not None:
            raise ValueError(
                f"{key}: network {k} differs from model.net at layer {differing} "
                f"({_shape(state, differing)} in the file, {_shape(own, differing)} here); describe in model.net, "
                "model.variants and model.biases what was trained"
            )
        member.load_state_dict(state)


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(state[name].shape)) if name in state else "missing"


def item_weights(labels: Tensor, members: int, diversity: str, concentration: float = 0.5, seed: int = 0) -> Tensor:
    """How often every member sees every training item, ``(member, item)`` float32.

    Args:
        labels: ``(item,)`` int64.
        members: m.
        diversity: ``seed``: all see all. ``bootstrap``: each draws as many items as there are, with replacement.
            ``classes``: every item belongs to one member; of each class, members get parts drawn from a symmetric
            Dirichlet distribution, as federated clients might have them.
        concentration: Of that distribution; the smaller, the fewer members share a class.
        seed: Of the draws.

    Raises:
        ValueError: The diversity is unknown.
    """
    if diversity not in DIVERSITIES:
        raise ValueError(f"model.diversity={diversity!r} is unknown; choose one of {', '.join(DIVERSITIES)}")
    number = len(labels)
    generator = np.random.default_rng(np.random.SeedSequence((seed, members)))
    if diversity == "seed":
        return torch.ones(members, number)
    if diversity == "bootstrap":
        draws = [np.bincount(generator.integers(0, number, number), minlength=number) for _ in range(members)]
        return torch.from_numpy(np.stack(draws)).float()
    weights = torch.zeros(members, number)
    for label in labels.unique().tolist():
        items = generator.permutation((labels == label).nonzero()[:, 0].numpy())
        parts = generator.dirichlet(np.full(members, concentration))
        cuts = np.round(np.cumsum(parts)[:-1] * len(items)).astype(int)
        for k, own in enumerate(np.split(items, cuts)):
            weights[k, own] = 1.0
    return weights
