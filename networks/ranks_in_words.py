"""Ranks of many weights in one line, for logs."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 6  # weights that a line names


def ranks_in_words(ranks: Sequence[tuple[str, int, int]]) -> str:
    """``ranks net.1 12 of 64, net.2 40 of 64``; of many weights those that have lost most, of none ``no ranks``.

    Args:
        ranks: Name, rank and full rank of every weight.
    """
    if not ranks:
        return "no ranks"
    few = list(ranks)
    if len(few) > _SHOWN:
        few = sorted(few, key=lambda entry: entry[1] / entry[2])[:_SHOWN]
    shown = ", ".join(f"{name} {rank} of {full}" for name, rank, full in few)
    return f"ranks {shown}" + (f" and of {len(ranks) - len(few)} more" if len(few) < len(ranks) else "")
