"""Estimators on split arrays: what is fitted is the same for every number of ranks, and what scikit-learn finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import parallel.array as pa
from parallel.array import learning
from parallel.array.comm import Comm
from parallel.array.decompositions import hsvd, lstsq, qr, rsvd, solve, svd
from parallel.array.distance import cdist, kernel_sums, nearest, neighbour_counts
from parallel.array.generators import GENERATORS, Blobs, LowRank, Moons, SparseRegression, Waves
from parallel.array.learning import (
    DMD,
    KNN,
    PCA,
    GaussianNB,
    KMeans,
    KMedians,
    KMedoids,
    Lasso,
    MaxAbsScaler,
    MiniBatchKMeans,
    MinMaxScaler,
    Normalizer,
    Ridge,
    RobustScaler,
    Spectral,
    StandardScaler,
    Summary,
    finite_rows,
    lasso_cv,
    lasso_path,
    silhouette,
)
from tests.parallel.array_cases import comm_of

SIZES = (2, 3, 4)


def _rows(
    kind: Any, comm: Comm, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[pa.SplitArray, pa.SplitArray]:
    data = kind(**options)
    x, y = data.rows(0, data.num_rows, dtype)
    # Unbalanced, so that nothing can rely on the canonical map.
    map_ = tuple(np.diff([0, *np.linspace(1, len(x) - 1, comm.size - 1).astype(int), len(x)]).tolist())
    return (
        pa.from_global(x, 0, comm).redistribute(map_),
        pa.from_global(y, 0, comm).redistribute(map_),
    )


def _k_means(comm: Comm) -> dict[str, Any]:
    x, _ = _rows(Blobs, comm, num_rows=701, num_features=5, num_groups=6)
    given = KMeans(6, "given", torch.from_numpy(x[:6].numpy()), max_iter=7, tol=0.0).fit(x)
    found = KMeans(6, tol=0.0).fit(x)
    far = KMeans(6, "given", torch.full((6, 5), 50.0, dtype=torch.float64), tol=0.0, empty="farthest").fit(x)
    out = {"given": given.centres, "labels": given.predict(x), "inertia": given.inertia, "parallel": found.centres}
    out |= {"random": KMeans(6, "random").fit(x).centres, "far": (far.counts > 0).all()}
    out |= {"medians": KMedians(6).fit(x).centres, "medoids": KMedoids(6).fit(x).centres}
    blocks = MiniBatchKMeans(6)
    for i in range(0, 701, 200):
        blocks.partial_fit(x[i : i + 200])
    labels = found.predict(x)
    return out | {"blocks": blocks.centres, "score": found.score(x), "distances": found.transform(x),
                  "silhouette": silhouette(x, labels, 701), "sample": silhouette(x, labels, 50)}  # fmt: skip


def _regression(comm: Comm) -> dict[str, Any]:
    x, y = _rows(SparseRegression, comm, num_rows=300, num_features=12, num_nonzero=4)
    path, cv = lasso_path(x, y, 10), lasso_cv(x, y, 3, 8)
    lasso = Lasso(0.3).fit(x, y)
    return {
        "lasso": lasso.weights, "intercept": lasso.intercept, "residual": Lasso(0.3, mode="residual").fit(x, y).weights,
        "net": Lasso(0.3, 0.5).fit(x, y).weights, "path": path.weights, "cv": cv.errors, "best": cv.weights,
        "ridge": Ridge(2.0).fit(x, y).weights, "tsqr": Ridge(2.0, "tsqr").fit(x, y).weights, "r2": lasso.score(x, y),
        "prediction": lasso.predict(x), "lstsq": lstsq(x[:, 1:], y),
    }  # fmt: skip


def _components(comm: Comm) -> dict[str, Any]:
    x, _ = _rows(LowRank, comm, num_rows=211, num_features=9, rank=3, noise=0.01)
    out: dict[str, Any] = {}
    for method in ("gram", "tsqr", "hsvd", "rsvd"):
        pca = PCA(3, method).fit(x)
        out |= {f"{method} values": pca.singular_values, f"{method} components": pca.components}
    blocks = PCA(3, "incremental")
    for i in range(0, 211, 50):
        blocks.partial_fit(x[i : i + 50])
    out |= {"incremental values": blocks.singular_values, "error": blocks.reconstruction_error(x)}
    waves, _ = _rows(Waves, comm, num_rows=60)
    dmd = DMD(5).fit(waves)
    return out | {
        "modes": dmd.eigenvalues.abs(),
        "forecast": dmd.forecast(waves, 64),
        "scores": PCA(3).fit(x).transform(x),
    }


def _decompositions(comm: Comm) -> dict[str, Any]:
    out: dict[str, Any] = {}
    wide = pa.randn(23, 7, dtype=torch.float64, split=0, comm=comm, seed=3)
    few = pa.randn(3, 3, dtype=torch.float64, split=0, comm=comm, seed=4)  # fewer rows than columns on each rank
    for name, a in (("rows", wide), ("columns", wide.resplit(1)), ("few", few), ("whole", wide.resplit(None))):
        q, r = qr(a)
        out |= {f"q {name}": q, f"r {name}": r, f"{name} orthonormal": (q.T @ q).numpy() - np.eye(a.shape[1])}
    for name, a in (("tall", wide), ("wide", wide.T), ("columns", wide.resplit(1))):
        for method in ("tsqr", "gram"):
            found = svd(a, method)
            out |= {f"s {name} {method}": found.s, f"usv {name} {method}": (found.u * found.s) @ found.v.T}
    for split in (0, 1):
        h = hsvd(wide.resplit(split), rank=3)
        true = np.linalg.norm(wide.numpy() - ((h.u * h.s) @ h.v.T).numpy()) / np.linalg.norm(wide.numpy())
        out |= {f"hsvd bound {split}": np.array(true <= h.error * (1 + 1e-9))}
        low = hsvd(wide.resplit(split), rtol=0.2)
        true = np.linalg.norm(wide.numpy() - ((low.u * low.s) @ low.v.T).numpy()) / np.linalg.norm(wide.numpy())
        out |= {f"hsvd rtol {split}": np.array(true <= 0.2)}
        out |= {f"rsvd {split}": rsvd(wide.resplit(split), 3, power=8).s}
    spd = (wide.T @ wide).resplit(0)
    rhs = pa.randn(7, 2, dtype=torch.float64, split=0, comm=comm, seed=5)
    return out | {"cg": solve(spd, rhs).x, "lu": np.linalg.solve(spd.numpy(), rhs.numpy())}


def _neighbours(comm: Comm) -> dict[str, Any]:
    x = pa.randn(67, 4, dtype=torch.float64, split=0, comm=comm)
    y = pa.randn(31, 4, dtype=torch.float64, split=0, comm=comm, seed=1)
    out: dict[str, Any] = {}
    for metric in ("euclidean", "sqeuclidean", "manhattan", "cosine", "gaussian"):
        out |= {metric: cdist(x, y, metric), f"{metric} self": cdist(x, metric=metric, symmetric=True)}
    out |= {"columns": cdist(x.resplit(1), y), "whole": cdist(x, y.resplit(None)), "exact": cdist(x, y, exact=True)}
    labels = pa.from_global(torch.arange(67) % 3, 0, comm)
    out |= {"nearest": nearest(x, y, 5)[1], "self": nearest(x, x, 4, exclude_self=True)[1]}
    grid = pa.from_global(torch.arange(40.0)[:, None] // 4, 0, comm)  # equal distances
    out |= {"ties": nearest(grid, grid, 6)[1], "sums": kernel_sums(x, y, 1.5), "counts": neighbour_counts(x, y, 1.5)}
    knn, nb = KNN(5).fit(x, labels), GaussianNB().fit(x, labels)
    half = GaussianNB().partial_fit
    for i in (0, 40):
        nb_blocks = half(x[i : i + 40] if not i else x[40:], labels[:40] if not i else labels[40:])
    del nb_blocks
    return out | {"knn": knn.predict(y), "nb": nb.predict(y), "nb mean": nb.mean, "probabilities": nb.predict_proba(y)}


def _rest(comm: Comm) -> dict[str, Any]:
    x, y = _rows(Moons, comm, num_rows=150)
    out: dict[str, Any] = {}
    for affinity in ("knn", "gaussian"):
        spectral = Spectral(2, affinity, gamma=30.0).fit(x)
        same = spectral.labels.numpy() == y.numpy()
        out |= {f"{affinity} values": spectral.values, f"{affinity} agree": np.array(max(same.mean(), 1 - same.mean()))}
    for scaler in (StandardScaler(), MinMaxScaler(), MaxAbsScaler(), RobustScaler(), Normalizer()):
        out |= {type(scaler).__name__: scaler.fit(x).transform(x)}
        if hasattr(scaler, "inverse_transform"):
            out |= {f"{type(scaler).__name__} back": scaler.inverse_transform(scaler.transform(x)).numpy() - x.numpy()}
    summary = Summary().fit(x)
    blocks = Summary()
    for i in range(0, 150, 40):
        blocks.partial_fit(x[i : i + 40])
    out |= {f"{k}": v for k, v in summary.table().items()} | {f"{k} in blocks": v for k, v in blocks.table().items()}
    holes = pa.from_global(np.where(np.arange(300).reshape(150, 2) % 50 == 0, np.nan, x.numpy()), 0, comm)
    return out | {"omitted": finite_rows(holes, "omit")[0]}


FITS = {f.__name__: f for f in (_k_means, _regression, _components, _decompositions, _neighbours, _rest)}


def fit(name: str, size: int) -> dict[str, np.ndarray]:
    """Everything that a group of estimators finds on ``size`` ranks, whole and in host memory."""
    comm = comm_of(size)
    if comm is None:
        return {}
    found = FITS[name](comm)
    return {k: v.numpy() if isinstance(v, pa.SplitArray | torch.Tensor) else np.asarray(v) for k, v in found.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, np.ndarray]]:
    """What one process finds."""
    return {name: fit(name, 1) for name in FITS}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FITS)
def test_the_number_of_ranks_changes_nothing(name, size, alone, ranks4):
    for found in ranks4(fit, name, size)[:size]:
        assert found.keys() == alone[name].keys()
        for key, value in found.items():
            np.testing.assert_allclose(value, alone[name][key], rtol=1e-7, atol=1e-7, err_msg=f"{name} {key}")


def test_k_means_is_that_of_scikit_learn(alone):
    cluster = pytest.importorskip("sklearn.cluster")
    metrics = pytest.importorskip("sklearn.metrics")
    x = Blobs(701, 5, 6).rows(0, 701, torch.float64).x.numpy()
    peer = cluster.KMeans(6, init=x[:6], n_init=1, max_iter=7, tol=0, algorithm="lloyd").fit(x)
    np.testing.assert_allclose(alone["_k_means"]["given"], peer.cluster_centers_, atol=1e-10)
    best = cluster.KMeans(6, n_init=10, random_state=0).fit(x)
    assert -alone["_k_means"]["score"] <= 1.2 * best.inertia_  # one start against the best of ten
    labels = KMeans(6, tol=0.0).fit(pa.from_global(x, 0, Comm())).predict(pa.from_global(x, 0, Comm())).numpy()
    assert alone["_k_means"]["silhouette"] == pytest.approx(metrics.silhouette_score(x, labels), abs=1e-6)
    assert alone["_k_means"]["far"]


def test_regressions_are_those_of_scikit_learn(alone):
    linear = pytest.importorskip("sklearn.linear_model")
    data = SparseRegression(300, 12, 4)
    x, y = (t.numpy() for t in data.rows(0, 300, torch.float64))
    found = alone["_regression"]
    peer = linear.Lasso(0.3, tol=1e-12, max_iter=100_000).fit(x, y)
    np.testing.assert_allclose(found["lasso"], peer.coef_, atol=1e-5)
    np.testing.assert_allclose(found["residual"], peer.coef_, atol=1e-5)
    assert found["intercept"] == pytest.approx(peer.intercept_, abs=1e-5)
    peer = linear.ElasticNet(0.3, l1_ratio=0.5, tol=1e-12, max_iter=100_000).fit(x, y)
    np.testing.assert_allclose(found["net"], peer.coef_, atol=1e-5)
    for key in ("ridge", "tsqr"):
        np.testing.assert_allclose(found[key], linear.Ridge(2.0).fit(x, y).coef_, atol=1e-9)
    np.testing.assert_allclose(found["lstsq"], np.linalg.lstsq(x[:, 1:], y, rcond=None)[0], atol=1e-9)


def test_components_are_those_of_numpy(alone):
    data = LowRank(211, 9, 3, noise=0.01)
    x = data.rows(0, 211, torch.float64).x.numpy()
    s = np.linalg.svd(x - x.mean(0), compute_uv=False)[:3]
    for method, limit in (("gram", 1e-9), ("tsqr", 1e-12), ("incremental", 1e-9), ("rsvd", 1e-6), ("hsvd", 1e-6)):
        np.testing.assert_allclose(alone["_components"][f"{method} values"], s, rtol=limit, err_msg=method)
    overlap = np.linalg.svd(alone["_components"]["gram components"] @ data.directions, compute_uv=False)
    assert overlap.min() > 0.9999
    true = np.sort(np.abs([*Waves.eigenvalues, *np.conj(Waves.eigenvalues[:2])]))[::-1]
    np.testing.assert_allclose(alone["_components"]["modes"], true, atol=2e-3)


def test_decompositions_are_those_of_numpy(alone):
    found = alone["_decompositions"]
    a = pa.randn(23, 7, dtype=torch.float64, comm=Comm(), seed=3).numpy()
    q, r = np.linalg.qr(a)
    sign = np.sign(np.diag(r))
    for name in ("rows", "columns", "whole"):
        np.testing.assert_allclose(found[f"q {name}"], q * sign, atol=1e-12)
        np.testing.assert_allclose(found[f"r {name}"], r * sign[:, None], atol=1e-12)
    assert all(np.abs(v).max() < 1e-13 for k, v in found.items() if k.endswith("orthonormal"))
    s = np.linalg.svd(a, compute_uv=False)
    for key, value in found.items():
        if key.startswith("s "):
            np.testing.assert_allclose(value, s, rtol=1e-10)
        elif key.startswith("usv"):
            np.testing.assert_allclose(value, a.T if "wide" in key else a, atol=1e-10)
        elif key.startswith("hsvd"):
            assert value, key
        elif key.startswith("rsvd"):
            np.testing.assert_allclose(value, s[:3], rtol=1e-3)
    np.testing.assert_allclose(found["cg"], found["lu"], rtol=1e-8)


def test_distances_are_those_of_scipy(alone):
    from scipy.spatial import distance

    x = pa.randn(67, 4, dtype=torch.float64, comm=Comm()).numpy()
    y = pa.randn(31, 4, dtype=torch.float64, comm=Comm(), seed=1).numpy()
    found = alone["_neighbours"]
    d = distance.cdist(x, y)
    for key, name in (
        ("euclidean", "euclidean"),
        ("sqeuclidean", "sqeuclidean"),
        ("manhattan", "cityblock"),
        ("cosine", "cosine"),
    ):
        np.testing.assert_allclose(found[key], distance.cdist(x, y, name), atol=1e-7)
        np.testing.assert_allclose(found[f"{key} self"], distance.cdist(x, x, name), atol=1e-7)
    np.testing.assert_allclose(found["gaussian"], np.exp(-(d**2) / 2), atol=1e-9)
    np.testing.assert_allclose(found["exact"], d, atol=1e-12)
    np.testing.assert_array_equal(found["nearest"], np.argsort(d, 1)[:, :5])
    own = distance.cdist(x, x)
    np.fill_diagonal(own, np.inf)
    np.testing.assert_array_equal(found["self"], np.argsort(own, 1)[:, :4])
    np.testing.assert_allclose(found["sums"], np.exp(-(d**2) / 2 / 1.5**2).sum(1))
    np.testing.assert_array_equal(found["counts"], (d <= 1.5).sum(1))
    grid = np.arange(40)[:, None] // 4
    np.testing.assert_array_equal(found["ties"], np.argsort(np.abs(grid - grid.T), 1, kind="stable")[:, :6])


def test_clusters_of_moons_and_scaled_columns(alone):
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    found = alone["_rest"]
    assert found["knn agree"] == 1 and found["gaussian agree"] == 1
    x = Moons(150).rows(0, 150, torch.float64).x.numpy()
    for name in ("StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler", "Normalizer"):
        np.testing.assert_allclose(found[name], getattr(preprocessing, name)().fit_transform(x), atol=1e-12)
        assert np.abs(found.get(f"{name} back", 0)).max() < 1e-14
    for name in ("mean", "std", "skewness", "kurtosis", "min", "max"):
        np.testing.assert_allclose(found[name], found[f"{name} in blocks"], rtol=1e-12)


@pytest.mark.parametrize("name", GENERATORS)
def test_rows_do_not_know_who_asks(name):
    data = GENERATORS[name](100)
    whole = data.rows(0, 100)
    parts = [data.rows(*ends) for ends in ((0, 33), (33, 34), (34, 100))]
    assert torch.equal(whole.x, torch.cat([p.x for p in parts])) and torch.equal(
        whole.y, torch.cat([p.y for p in parts])
    )


def test_susy_like_can_be_told_apart_linearly():
    linear = pytest.importorskip("sklearn.linear_model")
    metrics = pytest.importorskip("sklearn.metrics")
    x, y = (t.numpy() for t in GENERATORS["susy_like"](6000).rows(0, 6000))
    x = (x - x.mean(0)) / x.std(0)
    model = linear.LogisticRegression(max_iter=200).fit(x[:4000], y[:4000])
    assert 0.75 < metrics.roc_auc_score(y[4000:], model.predict_proba(x[4000:])[:, 1]) < 0.88


X = pa.from_global(torch.arange(12.0).reshape(6, 2), 0, Comm())


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: KMeans(7).fit(X), "k=7: there are only 6 rows"),
        (lambda: KMeans(0), "k=0"),
        (lambda: KMeans(2, "given"), "give both or none"),
        (lambda: KMeans(2).predict(X), "not fitted yet"),
        (lambda: KMeans(2).fit(X).predict(X[:, :1]), "columns"),
        (lambda: KNN(9).fit(X, X[:, 0]), "k=9"),
        (lambda: Lasso(-1.0), "lam=-1"),
        (lambda: Lasso().fit(X), "learns from labels"),
        (lambda: Lasso().fit(X, X[:3, 0]), "6 rows and 3 labels"),
        (lambda: PCA(3).fit(X), "only 2 columns"),
        (lambda: qr(X.astype(torch.float16)), "16 bits"),
        (lambda: qr(X.T), "fewer rows than columns"),
        (lambda: hsvd(X), "give one of them"),
        (lambda: cdist(X, X[:, :1]), "equally many columns"),
        (lambda: nearest(X, X, 9), "k=9 neighbours among 6"),
        (lambda: solve(pa.from_global(-torch.eye(3), 0, Comm()), pa.ones(3, comm=Comm())), "not symmetric positive"),
        (
            lambda: finite_rows(pa.from_global(torch.tensor([[1.0], [torch.nan]]), 0, Comm()), "raise"),
            "the first is row 1",
        ),
        (lambda: Spectral(2, "fancy"), "choose knn"),
    ],
)
def test_mistakes_are_named(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()


def test_state_goes_on_elsewhere():
    x, y = (pa.from_global(t, 0, Comm()) for t in SparseRegression(200, 8, 3).rows(0, 200, torch.float64))
    for make, labels in ((lambda: KMeans(3, tol=0.0, max_iter=50), None), (lambda: Lasso(0.2, max_iter=50), y)):
        whole = make().fit(x, labels)
        first, second = make(), make()
        first.begin(x, labels)
        first.step(x, labels)
        second.load_state(first.state())
        while not second.converged and second.n_iter < 50:
            second.step(x, labels)
        assert second.n_iter == whole.n_iter and second.objective == whole.objective


@pytest.mark.parametrize("estimator", [learning.KMeans(3), learning.Lasso(0.1), learning.Summary()])
def test_rows_that_are_not_finite_are_named(estimator):
    x = np.random.default_rng(0).normal(size=(50, 4))
    x[3, 1] = np.nan
    x = pa.from_global(x, 0, Comm())
    with pytest.raises(ValueError, match="1 of 50 rows have NaN or infinities, the first is row 3"):
        estimator.fit(x, pa.ones(50, split=0, comm=Comm()) if estimator.supervised else None)


def test_estimators_say_what_they_take():
    with pytest.raises(TypeError, match=r"KMeans takes split arrays, not numpy.ndarray: parallel.array.from_global"):
        KMeans(2).fit(np.ones((5, 2)))
    assert repr(KNN(3)).startswith("KNN(k=3, metric='euclidean'")
    assert "tol=0.5" in repr(KMeans(2, tol=0.5))
