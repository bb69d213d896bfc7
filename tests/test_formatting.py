"""Numbers and times for people."""

from __future__ import annotations

import math

import pytest

from chatmill.formatting import duration, number


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1234567, "1.23 M"),
        (25.138, "25.1"),
        (3e-4, "3e-4"),
        (0, "0"),
        (math.nan, "–"),
        (None, "–"),
        (4195.2, "4,195"),
        (51234, "51.2 k"),
    ],
)
def test_numbers_are_told_for_people(value: float | None, said: str) -> None:
    assert number(value) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3.21, "3.2 s"), (59, "59 s"), (577, "9 min 37 s"), (3725, "1 h 2 min"), (190_000, "2 d 4 h"), (math.nan, "–")],
)
def test_durations_are_told_for_people(seconds: float, said: str) -> None:
    assert duration(seconds) == said
