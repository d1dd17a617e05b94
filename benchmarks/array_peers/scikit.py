"""scikit-learn and NumPy in one process with two threads: ``python -m benchmarks.array_peers.scikit DATA OUT``."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from benchmarks.array_peers import tasks


def main() -> None:
    """All tasks."""
    from sklearn.cluster import KMeans
    from sklearn.linear_model import Lasso
    from sklearn.metrics import euclidean_distances

    warnings.simplefilter("ignore")
    folder, out = tasks.arguments()
    data = {name: np.array(value) for name, value in tasks.files(folder).items()}
    x = data["blobs"]
    seconds: dict[str, float] = {}
    values: dict[str, Any] = {}

    def run(name: str, call: Any, repeats: int = 7) -> Any:
        seconds[name], value = tasks.timed(call, repeats)
        return value

    options = {"init": data["start"], "n_init": 1, "max_iter": tasks.ITERATIONS, "tol": 0, "algorithm": "lloyd"}
    means = run("k-means", lambda: KMeans(tasks.CLUSTERS, **options).fit(x), 7)
    seconds["k-means, an iteration"] = seconds["k-means"] / means.n_iter_
    values["k-means in float32"] = means.cluster_centers_
    doubles = options | {"init": data["start"].astype(np.float64)}
    values["k-means"] = KMeans(tasks.CLUSTERS, **doubles).fit(x.astype(np.float64)).cluster_centers_
    run("cdist", lambda: euclidean_distances(data["susy"]), 7)
    for axis in (None, 0, 1):
        run(f"mean and std, axis {axis}", lambda axis=axis: (x.mean(axis), x.std(axis)))
    run("std, axis 0", lambda: x.std(0))
    lasso = Lasso(tasks.LASSO_PENALTY, precompute=True, tol=1e-8, max_iter=10_000)
    values["lasso"] = run("lasso", lambda: lasso.fit(data["lasso_x"], data["lasso_y"]), 7).coef_
    tasks.report(out, seconds, values)


if __name__ == "__main__":
    main()
