"""Products in float32 are used only where they are good enough, and shortcuts end where the long way does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import parallel.array as pa
from parallel.array import distance
from parallel.array.chunks import balanced
from parallel.array.decompositions import svd
from parallel.array.distance import cdist, tile
from parallel.array.gram import QUICK_ERROR, gram_of, squares_of, well_conditioned
from parallel.array.learning import Lasso, lasso_path
from parallel.array.learning.k_means import lloyd_sums
from parallel.array.learning.lasso import Problem, duality_gap, problem_moments
from parallel.array.moments import moments_of
from parallel.array.products import tall_product
from tests.parallel.array_cases import comm_of


def _columns(likeness: float, scales: np.ndarray, rows: int = 20_000) -> torch.Tensor:
    """Rows whose columns share a part of their variance, with scales and large means."""
    rng = np.random.default_rng(0)
    own, common = rng.standard_normal((rows, len(scales))), rng.standard_normal((rows, 1))
    return torch.from_numpy(((1 - likeness) ** 0.5 * own + likeness**0.5 * common + 5) * scales).float()


@pytest.mark.parametrize("likeness, quick", [(0.3, True), (0.9999, False)])
def test_lasso_of_float32_rows_is_as_good_as_of_float64(likeness, quick):
    x = _columns(likeness, np.array([1.0, 1e3, 1e-2, 5.0, 0.3]))
    y = (x.double() @ torch.tensor([2.0, 1e-3, 0.0, -0.5, 0.0], dtype=torch.float64)).float()
    rows, target = pa.from_local(x, 0), pa.from_local(y, 0)
    scatter = gram_of(x, precise=False).scatter
    assert well_conditioned(scatter, 0.1) is quick
    exact = gram_of(x.double(), target=y.double())
    found = problem_moments(rows, y)
    size = torch.outer(exact.scatter.diagonal().sqrt(), exact.scatter.diagonal().sqrt())
    assert float(((found.scatter - exact.scatter) / size).abs().max()) < (QUICK_ERROR if quick else 1e-14)
    assert found.scatter.equal(exact.scatter) is not quick
    single, double = Lasso(0.01).fit(rows, target), Lasso(0.01).fit(pa.from_local(x.double(), 0), target)
    scale = x.double().std(0)
    torch.testing.assert_close(single.weights * scale, double.weights * scale, rtol=1e-5, atol=1e-5)


def test_constant_columns_have_no_scatter():
    x = torch.cat([torch.full((70_000, 1), 0.1), torch.randn(70_000, 2)], 1)
    for precise in (True, False):
        assert float(gram_of(x, precise=precise).scatter[0].abs().max()) < 1e-20


@pytest.mark.parametrize("last", [0.7, 1e-3])
def test_singular_values_of_float32_from_products(last):
    """Also small ones, for which the products have to be those of float64."""
    rng = np.random.default_rng(1)
    u, v = np.linalg.qr(rng.standard_normal((20_000, 6)))[0], np.linalg.qr(rng.standard_normal((6, 6)))[0]
    a = torch.from_numpy((u * np.geomspace(1, last, 6)) @ v.T).float()
    true = np.linalg.svd(a.double().numpy(), compute_uv=False)
    found = svd(pa.from_local(a, 0), "gram")
    np.testing.assert_allclose(found.s.numpy(), true, rtol=2e-6)
    back = found.u.local * found.s @ found.v.local.mT
    torch.testing.assert_close(back, a, rtol=0, atol=2e-6 * float(a.abs().max()))
    if last == 1e-3:  # float32 products alone would not do
        alone = torch.linalg.eigvalsh(squares_of(a, precise=False)).clamp(min=0).sqrt()
        assert abs(float(alone[0]) / true[-1] - 1) > 2e-6


def test_a_penalty_path_is_that_of_scikit_learn():
    """Columns so much alike that coefficients enter and leave, with fewer and with more rows than columns."""
    linear = pytest.importorskip("sklearn.linear_model")
    for rows, columns in ((400, 12), (40, 60)):
        rng = np.random.default_rng(rows)
        x = rng.standard_normal((rows, columns)) + rng.standard_normal((rows, 1))
        y = x[:, :5] @ np.array([3.0, -2.0, 1.0, -1.0, 0.5]) + rng.standard_normal(rows)
        path = lasso_path(pa.from_local(torch.from_numpy(x), 0), pa.from_local(torch.from_numpy(y), 0), tol=1e-12)
        peer = linear.lasso_path(x - x.mean(0), y - y.mean(), alphas=path.lam, tol=1e-14, max_iter=100_000)[1].T
        np.testing.assert_allclose(path.weights, peer, atol=2e-5)
        problem = Problem.of(gram_of(torch.from_numpy(x), target=torch.from_numpy(y)))
        for lam, w, gap in zip(path.lam, path.weights, path.gaps, strict=True):
            assert gap <= 1e-12 * problem.yy
            assert gap == pytest.approx(duality_gap(problem, w, lam, 1.0)[1])


def test_equal_centres_share_no_row():
    """The first of equal centres has the rows, whichever block they are in."""
    x = torch.randn(40_001, 3)
    centres = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0], [0, 0, 5.0]])
    sums = lloyd_sums(x, centres)
    counts = sums[12:16]
    nearest = torch.cdist(x.double(), centres.double()).argmin(1)
    assert counts.tolist() == torch.bincount(nearest, minlength=4).tolist()
    assert counts[2] == 0 and counts[0] > 0
    expected = torch.zeros(4, 3, dtype=torch.float64).index_add_(0, nearest, x.double())
    torch.testing.assert_close(sums[:12].view(4, 3), expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 2, 3, 7279, 7282, 100_003])
def test_moments_of_any_number_of_blocks(rows):
    """Blocks are merged as a tree, all pairs of a level at once."""
    x = torch.randn(rows, 18) * torch.arange(1, 19) + 1e4
    found, true = moments_of(x), x.double().numpy()
    centred = true - true.mean(0)
    np.testing.assert_allclose(found.n, rows)
    np.testing.assert_allclose(found.mean, true.mean(0), rtol=1e-12)
    for value, power in ((found.m2, 2), (found.m3, 3), (found.m4, 4)):
        scale = (np.abs(centred) ** power).sum(0)
        np.testing.assert_allclose(value, (centred**power).sum(0), atol=1e-9 * max(scale.max(), 1e-12))


def test_products_of_tall_matrices():
    a, b = torch.randn(20_001, 18), torch.randn(18, 5)
    torch.testing.assert_close(tall_product(a, b), a @ b)
    torch.testing.assert_close(tall_product(a, b.double()).double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)
    assert tall_product(a[:0], b).shape == (0, 5)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "manhattan", "cosine", "gaussian"])
def test_tiles_in_place(metric):
    a, b, whole = torch.randn(9, 4), torch.randn(11, 4), torch.full((20, 30), -7.0)
    tile(a, b, metric, out=whole[3:12, 5:16])
    torch.testing.assert_close(whole[3:12, 5:16], tile(a, b, metric), rtol=0, atol=0)
    assert int((whole == -7).sum()) == 20 * 30 - 99
    torch.testing.assert_close(cdist(pa.from_local(a, 0), pa.from_local(b, 0), metric).local, tile(a, b, metric),
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def _in_pieces(size: int) -> dict[str, np.ndarray]:
    comm = comm_of(size)
    if comm is None:
        return {}
    x, y = (pa.randn(n, 4, dtype=torch.float64, split=0, comm=comm, seed=n) for n in (23, 31))
    y = y.redistribute((0, *balanced(31, comm.size - 1)) if comm.size > 1 else (31,))  # a rank without rows
    whole, distance.PIECE_BYTES = distance.PIECE_BYTES, 3 * 4 * 8  # three rows
    try:
        d, i = distance.nearest(x, y, 5)
        found = {"cdist": cdist(x, y), "nearest": d, "number": i, "counts": distance.neighbour_counts(x, y, 1.5)}
    finally:
        distance.PIECE_BYTES = whole
    last = pa.take(x, pa.from_global(np.array([-1, 0, -23, 22]), None, comm))
    return {name: value.numpy() for name, value in (found | {"last": last}).items()}


@pytest.mark.parametrize("size", [2, 3])
def test_rows_go_around_in_pieces_of_any_size(size, ranks4):
    alone = _in_pieces(1)
    assert alone["last"].shape == (4, 4)
    for found in ranks4(_in_pieces, size)[:size]:
        for name, value in found.items():
            np.testing.assert_allclose(value, alone[name], atol=1e-12, err_msg=name)
