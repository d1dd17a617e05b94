"""The page that says which of NumPy's functions there are is current, and lists NumPy's functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import parallel.array as pa
from parallel.array import coverage
from parallel.array.comm import Comm
from tests.composing import ROOT


def test_the_page_is_what_the_command_writes():
    assert (ROOT / "docs" / "arrays_coverage.md").read_text() == coverage.page()


def test_the_tables_name_functions_of_numpy():
    assert coverage.unknown() == []


def test_what_differs_from_numpy_is_as_the_page_says():
    whole = pa.from_global(np.array([1, 2, -1, 4]), 0, Comm())
    np.testing.assert_array_equal(pa.reciprocal(whole).numpy(), [1, 0.5, -1, 0.25])
    assert "where NumPy has 1 // x" in pa.reciprocal.__doc__
    assert (whole + pa.ones(4, split=0, comm=Comm())).dtype == torch.float32
    assert (whole**-1).tolist() == [1, 0, -1, 0]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.float64])
def test_divisions_by_zero_are_those_of_numpy(dtype):
    """Also of whole numbers, where torch raises: only the rank that has the zero would."""
    a, b = np.array([7, 0, 5, 9], dtype), np.array([2, 0, 0, 4], dtype)
    ours, theirs = (pa.from_global(x, 0, Comm()) for x in (a, b))
    with np.errstate(all="ignore"):
        for name in ("floor_divide", "remainder", "mod", "fmod"):
            np.testing.assert_array_equal(getattr(pa, name)(ours, theirs).numpy(), getattr(np, name)(a, b), name)
            zero = getattr(pa, name)(ours, 0)
            np.testing.assert_array_equal(zero.numpy(), getattr(np, name)(a, 0), name)
        np.testing.assert_array_equal((7 // theirs).numpy(), 7 // b)
