"""The page that says which of NumPy's functions there are is current, and lists NumPy's functions."""

from __future__ import annotations

from parallel.array import coverage
from tests.composing import ROOT


def test_the_page_is_what_the_command_writes():
    assert (ROOT / "docs" / "arrays_coverage.md").read_text() == coverage.page()


def test_the_tables_name_functions_of_numpy():
    assert coverage.unknown() == []
