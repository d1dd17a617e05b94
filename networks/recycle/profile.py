"""Recent historic profiles (RHP): the smoothed average of comparable past days (ReCycle, section III).

A *profile* of day type c is the mean of the last k days of that type, step by step of the cycle. It is forecast and
reference at once: a day-ahead or week-ahead forecast repeats the profiles that are known at the origin, and a network
on top of them only has to learn the residual. All functions here are pure and work in float64: sums of a few numbers
that a reader can reproduce with a pocket calculator to the last digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

NUM_DAY_TYPES = 3
"""Working day, Saturday, Sunday or public holiday."""

Unit = Literal["days_of_type", "weeks"]
HistoryVariant = Literal["last", "loose", "causal"]


def recent_historic_profile(
    values: Tensor,
    day_types: Tensor,
    *,
    depth: int = 3,
    unit: Unit = "days_of_type",
    by_day_type: bool = True,
) -> Tensor:
    """Tabulate the profile P of every day type as it is known at the start of every day.

    ``P[l, c, d]`` is the mean of ``values[j, d]`` over the last ``depth`` days ``j < l`` of type ``c``. The average is
    taken per step of the day over the values that exist: a missing one is skipped in favour of the next older day, and
    the mean of the ``n < depth`` available values stands in until there are ``depth`` of them. Before the first value
    of a type the profile is zero.

    One table serves every origin ``o``, not only midnight. With ``l = o // D`` and ``s0 = o % D``, the steps before
    ``s0`` have already been seen on day ``l``, so that they take row ``l + 1``; the others take row ``l``.

    Args:
        values: Series cut into days, (day, step, channel), NaN where missing.
        day_types: Type of each day, (day, channel), 0, 1 or 2.
        depth: k, the number of days (or weeks) averaged.
        unit: What ``depth`` counts. ``days_of_type``: k = 3 averages three working days, three Saturdays, three
            Sundays. ``weeks``: k = 3 averages all days of the type in the last 21 days (15 working days); a type
            without a value in that window keeps its latest one.
        by_day_type: Whether the types are averaged apart. If not, the three profiles are one: the mean of the
            preceding days of any type.

    Returns:
        The profiles, (day + 1, day type, step, channel), float64.
    """
    _check_options(depth, unit)
    if values.ndim != 3 or day_types.shape != (values.shape[0], values.shape[2]):
        raise ValueError(
            f"values of shape {tuple(values.shape)} and day_types of shape {tuple(day_types.shape)} do not fit: "
            "expected (day, step, channel) and (day, channel)."
        )
    values = values.to(torch.float64)
    present = ~values.isnan()
    window = 7 * depth if unit == "weeks" else None
    if not by_day_type:
        profile = _trailing_mean(values, present, depth, window)
        return profile.unsqueeze(1).expand(-1, NUM_DAY_TYPES, -1, -1)
    of_type = (day_types == day_type for day_type in range(NUM_DAY_TYPES))
    profiles = [_trailing_mean(values, present & mask.unsqueeze(1), depth, window) for mask in of_type]
    return torch.stack(profiles, dim=1)


def _trailing_mean(values: Tensor, member: Tensor, depth: int, window: int | None) -> Tensor:
    """Mean of the last members before each day: of ``depth`` of them, or of those in the last ``window`` days.

    The members are moved to the front of the time axis, so that "the i-th last before day l" is one look-up at
    ``count[l] - i``. Adding the few terms directly, instead of subtracting two cumulative sums, keeps the result
    exact and confines an absurd value to the windows that contain it.
    """
    num_days = values.shape[0]
    count = torch.zeros(num_days + 1, *values.shape[1:], dtype=torch.int64, device=values.device)
    torch.cumsum(member, dim=0, out=count[1:])
    packed = torch.zeros(num_days + 1, *values.shape[1:], dtype=values.dtype, device=values.device)
    rank = torch.where(member, count[:-1], num_days)  # the last row takes what is not a member; it is never read
    packed.scatter_(0, rank, values)
    if window is None:
        num_terms = count.clamp(max=depth)
    else:
        before = torch.cat([torch.zeros_like(count[:window]), count[: num_days + 1 - window]])[: num_days + 1]
        num_terms = (count - before).maximum(count.clamp(max=1))
    total = torch.zeros_like(packed)
    for i in range(1, int(num_terms.max()) + 1 if num_terms.numel() else 1):
        total += torch.where(num_terms >= i, packed.gather(0, (count - i).clamp(min=0)), 0.0)
    return total / num_terms.clamp(min=1)


def _check_options(depth: int, unit: str) -> None:
    if depth < 1:
        raise ValueError(f"rhp.depth={depth} averages nothing; give the number of days (or weeks), at least 1.")
    if unit not in get_args(Unit):
        raise ValueError(f"rhp.unit={unit!r} is unknown; choose one of {', '.join(get_args(Unit))}.")


@dataclass(frozen=True)
class RecentHistoricProfile:
    """The profile forecast with its options, evaluated for batches of origins.

    Naive forecasts are special cases: ``depth=1, by_day_type=False`` repeats the last day, ``depth=10,
    by_day_type=False`` the mean of the last ten.

    Args:
        depth: k, see :func:`recent_historic_profile`.
        unit: What ``depth`` counts, ``days_of_type`` or ``weeks``.
        by_day_type: Whether working days, Saturdays and Sundays/holidays have profiles of their own.
        history: Reference of the steps *before* the origin. ``last``: the profiles known at the origin, for all of
            them. ``loose``: the profile known after the step itself, which is one of the averaged values. ``causal``:
            the profile known before the step's own day. None of them looks beyond the origin.
    """

    depth: int = 3
    unit: Unit = "days_of_type"
    by_day_type: bool = True
    history: HistoryVariant = "last"

    def __post_init__(self) -> None:
        _check_options(self.depth, self.unit)
        if self.history not in get_args(HistoryVariant):
            known = ", ".join(get_args(HistoryVariant))
            raise ValueError(f"rhp.history={self.history!r} is unknown; choose one of {known}.")

    def table(self, values: Tensor, day_types: Tensor) -> Tensor:
        """Profiles at the start of every day, (day + 1, day type, step, channel)."""
        return recent_historic_profile(
            values, day_types, depth=self.depth, unit=self.unit, by_day_type=self.by_day_type
        )

    def forecast(self, table: Tensor, origins: Tensor, day_types: Tensor, horizon: int) -> Tensor:
        """Profile of the steps from each origin on: what is known at the origin for the type of the step's day.

        Args:
            table: Result of :meth:`table`.
            origins: Index of the first forecast step, (batch,) int64.
            day_types: Type of each day, (day', channel); must reach to the last forecast step.
            horizon: T, number of steps.

        Returns:
            Profile forecast, (batch, time, channel), in the dtype of the table.
        """
        return _known_at_origin(table, origins, origins, day_types, horizon)

    def history_profile(self, table: Tensor, origins: Tensor, day_types: Tensor, history_length: int) -> Tensor:
        """Profile of the ``history_length`` steps before each origin, by the variant ``history``.

        Args:
            table: Result of :meth:`table`.
            origins: Index of the first forecast step, (batch,) int64, at least ``history_length``.
            day_types: Type of each day, (day', channel).
            history_length: L, number of steps.

        Returns:
            Profile of the history, (batch, time, channel), in the dtype of the table.
        """
        start = origins - history_length
        if self.history == "last":
            return _known_at_origin(table, origins, start, day_types, history_length)
        day = _days(start, history_length, table.shape[2], len(day_types))
        # Row j + 1 holds, at step s, the values up to and including step s of day j.
        row = day + (1 if self.history == "loose" else 0)
        return _cut(_day_profiles(table, row, day, day_types), start, history_length)


def _known_at_origin(table: Tensor, origins: Tensor, start: Tensor, day_types: Tensor, length: int) -> Tensor:
    """Profiles that are known at the origins, for ``length`` steps from ``start`` on, (batch, time, channel).

    Whole days are gathered, which is several times faster than single steps.
    """
    cycle_length = table.shape[2]
    day = _days(start, length, cycle_length, len(day_types))
    row, seen = origins // cycle_length, origins % cycle_length
    profiles = _day_profiles(table, row.unsqueeze(1).expand_as(day), day, day_types)
    if seen.any():
        # Steps of the day that the origin's own day has already shown are known one row later.
        later = (row + 1).clamp(max=table.shape[0] - 1)
        newer = _day_profiles(table, later.unsqueeze(1).expand_as(day), day, day_types)
        step = torch.arange(cycle_length, device=table.device)
        profiles = torch.where((step < seen.unsqueeze(1))[:, None, :, None], newer, profiles)
    return _cut(profiles, start, length)


def _days(start: Tensor, length: int, cycle_length: int, num_typed: int) -> Tensor:
    """Days that the steps ``start .. start + length - 1`` touch, (batch, day); one too many for some windows."""
    first, offset = start // cycle_length, start % cycle_length
    if start.numel():
        last = (int(start.max()) + length - 1) // cycle_length
        assert last < num_typed, f"day types end before day {last}"
    count = -(-(int(offset.max()) + length) // cycle_length) if start.numel() else 0
    return first.unsqueeze(1) + torch.arange(count, device=start.device)


def _day_profiles(table: Tensor, row: Tensor, day: Tensor, day_types: Tensor) -> Tensor:
    """Gather ``table[row, type of the day]`` for every channel, (batch, day, step, channel)."""
    if day.numel():
        # Negative indices would wrap around silently.
        assert int(day.min()) >= 0, f"the window starts {-int(day.min())} days before the series"
        assert int(row.max()) < table.shape[0], f"origin beyond the {table.shape[0] - 1} days of the profile table"
    kind = day_types[day.clamp(max=len(day_types) - 1)]  # days past the end only pad the last window
    channel = torch.arange(table.shape[3], device=table.device)
    return table[row.unsqueeze(-1), kind, :, channel].transpose(2, 3)


def _cut(profiles: Tensor, start: Tensor, length: int) -> Tensor:
    """Steps ``start .. start + length - 1`` of whole days, (batch, time, channel)."""
    batch, days, cycle_length, channels = profiles.shape
    steps = profiles.reshape(batch, days * cycle_length, channels)
    offset = start % cycle_length
    if not offset.any():
        return steps[:, :length]
    index = offset.unsqueeze(1) + torch.arange(length, device=start.device)
    return steps.gather(1, index.unsqueeze(-1).expand(-1, -1, channels))
