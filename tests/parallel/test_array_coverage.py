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
    with pytest.raises(RuntimeError, match="ZeroDivision"):
        whole // 0
