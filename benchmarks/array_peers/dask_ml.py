"""dask and dask-ml on a local cluster of two processes: ``python dask_ml.py DATA OUT``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

here = str(Path(__file__).parent)
sys.path[:] = [p for p in sys.path if p != here]  # this file has the name of the package
sys.path.insert(0, str(Path(here).parents[1]))

from benchmarks.array_peers import tasks  # noqa: E402


def main() -> None:
    """All tasks."""
    import dask.array as da
    import dask_ml.cluster
    import dask_ml.metrics
    from dask.distributed import Client, LocalCluster, wait

    folder, out = tasks.arguments()
    data = tasks.files(folder)
    seconds: dict[str, float] = {}
    values: dict[str, Any] = {}
    with LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster):

        def array(name: str) -> Any:
            whole = data[name][:]
            found = da.from_array(whole, chunks=(len(whole) // 2, *whole.shape[1:])).persist()
            wait(found)
            return found

        def run(name: str, call: Any, repeats: int = 7, warm: bool = True) -> Any:
            # What was computed before has to be forgotten: dask would give it again.
            seconds[name], value = tasks.timed(call, repeats, warm, lambda: time.sleep(0.3), lambda: None)
            return value

        x, susy = array("blobs"), array("susy")
        means = dask_ml.cluster.KMeans(tasks.CLUSTERS, init=data["start"].copy(), max_iter=tasks.ITERATIONS, tol=-1.0)
        values["k-means"] = run("k-means", lambda: means.fit(x), 2, False).cluster_centers_

        def distances() -> None:
            found = dask_ml.metrics.euclidean_distances(susy, susy).persist()  # it stays on the workers
            wait(found)

        run("cdist", distances)
        for axis in (None, 0, 1):
            run(f"mean and std, axis {axis}", lambda axis=axis: da.compute(x.mean(axis), x.std(axis)))
        run("std, axis 0", lambda: x.std(0).compute())
    tasks.report(out, seconds, values)


if __name__ == "__main__":
    main()
