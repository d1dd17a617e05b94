"""HeAT under MPI, started by `benchmarks.arrays`: ``mpirun -n 2 python heat.py DATA OUT``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

here = str(Path(__file__).parent)
sys.path[:] = [p for p in sys.path if p != here]  # this file has the name of the package
sys.path.insert(0, str(Path(here).parents[1]))

import heat as ht  # noqa: E402
import torch  # noqa: E402

from benchmarks.array_peers import tasks  # noqa: E402


def main() -> None:
    """All tasks."""
    torch.set_num_threads(1)
    comm = ht.MPI_WORLD
    rank, size = comm.rank, comm.size
    folder, out = tasks.arguments()
    data = tasks.files(folder)

    def array(name: str) -> Any:
        return ht.array(torch.from_numpy(tasks.part(data[name], rank, size)), is_split=0)

    x, susy, lasso_x, lasso_y = (array(name) for name in ("blobs", "susy", "lasso_x", "lasso_y"))
    seconds: dict[str, float] = {}
    values: dict[str, Any] = {}

    def run(name: str, call: Any, repeats: int = 7, warm: bool = True) -> Any:
        seconds[name], value = tasks.timed(call, repeats, warm, comm.handle.Barrier)
        return value

    def clusters() -> Any:
        means = ht.cluster.KMeans(tasks.CLUSTERS, init=ht.array(torch.from_numpy(data["start"].copy())),
                                  max_iter=tasks.ITERATIONS, tol=-1.0)  # fmt: skip
        means.fit(x)
        return means

    values["k-means"] = run("k-means", clusters, 2, False).cluster_centers_.numpy()
    run("cdist", lambda: ht.spatial.cdist(susy, quadratic_expansion=False))
    run("cdist, expanded", lambda: ht.spatial.cdist(susy, quadratic_expansion=True))
    for axis in (None, 0, 1):
        run(f"mean and std, axis {axis}", lambda axis=axis: (ht.mean(x, axis), ht.std(x, axis)))
    run("std, axis 0", lambda: ht.std(x, 0))
    y = ht.reshape(lasso_y, (lasso_y.shape[0], 1))
    # One sweep: five take most of a minute.
    run(
        "lasso",
        lambda: ht.regression.Lasso(lam=tasks.LASSO_PENALTY, max_iter=tasks.LASSO_SWEEPS, tol=-1.0).fit(lasso_x, y),
        2,
        False,
    )
    run("svd", lambda: ht.linalg.hsvd_rank(x, tasks.RANK, compute_sv=True))
    if rank == 0:
        tasks.report(out, seconds, values)


main()
