"""A line of the log names a few weights."""

from __future__ import annotations

from networks.ranks_in_words import ranks_in_words


def test_few_weights_are_all_named_in_their_order():
    assert ranks_in_words([("a", 8, 8), ("b", 7, 8)]) == "ranks a 8 of 8, b 7 of 8"


def test_none():
    assert ranks_in_words([]) == "no ranks"


def test_of_many_those_that_have_lost_most():
    said = ranks_in_words([(f"w{i}", 8 - i, 8) for i in range(9)])
    assert said.startswith("ranks w8 0 of 8, w7 1 of 8, ")
    assert said.endswith(", w3 5 of 8 and of 3 more")
