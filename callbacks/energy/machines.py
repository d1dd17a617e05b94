"""The other machines of a run: what their ranks say, and what is in their files where they cannot be asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from callbacks.energy.record import Counts, HostEnergy, read_file
from callbacks.gathering import gather_to_rank_zero


class Gathered(NamedTuple):
    """What rank 0 learns from all ranks: the other machines, counts of all ranks, epochs of the other machines."""

    hosts: list[HostEnergy]
    counts: Counts
    epochs: list[Sequence[dict[str, Any]]]


def gather(
    host: HostEnergy | None, counts: Counts, epochs: Sequence[dict[str, Any]], ranks_per_share: int
) -> Gathered | None:
    """Collect machines and counts of all ranks, which come here together.

    Args:
        host: The machine that this rank records; None: it records none.
        counts: Of this rank.
        epochs: Of that machine.
        ranks_per_share: Ranks that count the same samples because they share something else.

    Returns:
        On rank 0; None on the others.
    """
    parts = gather_to_rank_zero((host, counts, epochs))
    if parts is None:
        return None
    total = Counts()
    for rank, (_, theirs, _) in enumerate(parts):
        total.add(theirs, updates=rank == 0)
    if ranks_per_share > 1:
        total.samples = {label: number // ranks_per_share for label, number in total.samples.items()}
    others = [(theirs, of_epochs) for theirs, _, of_epochs in parts[1:] if theirs is not None]
    return Gathered([theirs for theirs, _ in others], total, [of_epochs for _, of_epochs in others])


def left_behind(folder: Path, own: Path | None, since: float) -> list[HostEnergy]:
    """The last part of the record of every other machine, for ranks that have died and cannot be asked.

    Args:
        folder: Of the record.
        own: File of this machine.
        since: Files that were not written to after this time (of the epoch, s) are of earlier runs.
    """
    hosts: list[HostEnergy] = []
    for path in sorted(folder.glob("*.jsonl")):
        if path != own and path.stat().st_mtime >= since:
            hosts += read_file(path)[-1:]
    return hosts
