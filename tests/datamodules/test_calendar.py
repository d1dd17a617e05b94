from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from datamodules.calendar import clock_marks, country_per_series, day_calendar, public_holidays


def test_day_types_of_a_week_with_a_holiday():
    # Thursday 4 July 2024 to Wednesday 10 July, and a series without holidays beside it
    calendar = day_calendar(pd.Timestamp("2024-07-04"), 7, ["US", None])
    assert calendar.day_type[:, 0].tolist() == [2, 0, 1, 2, 0, 0, 0]
    assert calendar.day_type[:, 1].tolist() == [0, 0, 1, 2, 0, 0, 0]
    assert calendar.holiday[:, 0].tolist() == [True] + [False] * 6
    assert calendar.day_type.dtype == np.int64


def test_a_saturday_holiday_counts_as_a_holiday():
    calendar = day_calendar(pd.Timestamp("2021-12-25"), 1, ["DE"])  # a Saturday
    assert calendar.day_type.tolist() == [[2]]


def test_vector_is_weekday_holiday_and_holiday_tomorrow():
    calendar = day_calendar(pd.Timestamp("2024-12-31"), 2, ["US"])  # Tuesday, then New Year
    assert calendar.vector[0, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert calendar.vector[1, 0].tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 0]


def test_holiday_tomorrow_is_known_for_the_last_day():
    calendar = day_calendar(pd.Timestamp("2024-12-24"), 1, ["US"])
    assert calendar.vector[0, 0, 8] == 1


def test_subdivision():
    days = pd.DatetimeIndex(["2024-11-05"])  # Melbourne Cup day
    assert public_holidays(days, "AU-VIC").tolist() == [True]
    assert public_holidays(days, "AU").tolist() == [False]


def test_marks_span_the_unit_interval():
    marks = clock_marks(pd.date_range("2024-01-01", periods=366 * 48, freq="30min"), 48)
    assert marks.dtype == np.float32
    assert marks.min(axis=0).tolist() == [-0.5] * 4
    np.testing.assert_allclose(marks.max(axis=0), 0.5)
    assert marks[47, 0] == 0.5 and marks[48, 0] == -0.5


@pytest.mark.parametrize(
    ("country", "message"),
    [
        ("USS", r"data\.country='USS'.*Did you mean US"),
        ("us", r"Did you mean US"),
        ("Atlantis", r"data\.country='Atlantis'.*ISO code"),
        ("AU-VIK", r"AU has no subdivision 'VIK'. Did you mean VIC"),
        (["US"], r"names 1 countries for 2 series"),
    ],
)
def test_wrong_country_is_one_line(country, message):
    with pytest.raises(ValueError, match=message) as error:
        country_per_series(country, 2)
    assert "\n" not in str(error.value)


def test_one_country_per_series():
    assert country_per_series("DE", 2) == ["DE", "DE"]
    assert country_per_series(None, 2) == [None, None]
    assert country_per_series(["DE", None], 2) == ["DE", None]
