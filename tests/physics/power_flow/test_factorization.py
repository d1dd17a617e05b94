"""Solves with one factorised matrix, whatever does them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix, eye, random

from physics.power_flow import factorization
from physics.power_flow.factorization import DenseInverse, SingularMatrix, SparseLU, factorize, sparse_lu

CPU = torch.device("cpu")
SIZE = 120


@pytest.fixture
def matrix() -> csc_matrix:
    return csc_matrix(random(SIZE, SIZE, 0.03, random_state=0) + 1.5 * eye(SIZE))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("columns", [1, 3, 9])
@pytest.mark.parametrize("mkl", [True, False])
def test_solves(matrix, kind, dtype, bound, columns, mkl, monkeypatch):
    if not mkl:
        monkeypatch.setattr(factorization, "_solves_csr", lambda: False)
    found = factorize(matrix, CPU, dtype, kind)
    assert isinstance(found, DenseInverse if kind == "dense" else SparseLU)
    for _ in range(2):
        b = torch.randn(SIZE, columns, dtype=torch.float64)
        assert abs(matrix @ found.solve(b).double().numpy() - b.numpy()).max() < bound
        assert abs(matrix.T @ found.solve_transposed(b).double().numpy() - b.numpy()).max() < bound
    assert found.select(torch.tensor([0])) is found


def test_choice_by_size(matrix):
    assert isinstance(factorize(matrix, CPU), DenseInverse)
    assert isinstance(factorize(csc_matrix(eye(2000)), CPU), SparseLU)
    with pytest.raises(ValueError, match="choose 'auto', 'dense' or 'sparse'"):
        factorize(matrix, CPU, kind="qr")


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_singular(kind):
    singular = csc_matrix(np.diag([1.0, 0.0, 2.0]))
    with pytest.raises(SingularMatrix):
        factorize(singular, CPU, kind=kind)
    with pytest.raises(SingularMatrix):
        sparse_lu(csc_matrix(np.diag([1.0, np.nan])))


def test_products_without_mkl(monkeypatch):
    """Where torch cannot multiply CSR tensors, SciPy does."""
    from physics.power_flow import product, solve
    from tests.physics.power_flow.grids import embedded, noisy

    grid = embedded("case57")
    scenarios = noisy(grid, 3)
    expected = solve(grid, scenarios, tol=1e-11)
    monkeypatch.setattr(product, "multiplies_csr", lambda: False)
    monkeypatch.setattr(factorization, "_solves_csr", lambda: False)
    assert float((solve(grid, scenarios, tol=1e-11).v - expected.v).abs().max()) < 1e-9
