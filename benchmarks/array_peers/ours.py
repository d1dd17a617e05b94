"""Ours on gloo processes with one thread each: ``python -m benchmarks.array_peers.ours DATA OUT RANKS``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import parallel.array as pa
from benchmarks.array_peers import tasks
from parallel.array.comm import Comm
from parallel.array.decompositions import svd
from parallel.array.distance import cdist
from parallel.array.learning import KMeans, Lasso
from parallel.array.learning.lasso import lasso_path


def work(rank: int, size: int, store: str, folder: str, out: str) -> None:
    """All tasks on one process of ``size``."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    comm = Comm.world()

    def barrier() -> None:
        comm.gather_counts(0)

    data = tasks.files(folder)
    rows = {
        n: pa.from_local(torch.from_numpy(tasks.part(a, rank, size)), 0, comm) for n, a in data.items() if n != "start"
    }
    x, susy, lasso_x, lasso_y = (rows[name] for name in ("blobs", "susy", "lasso_x", "lasso_y"))
    start = torch.from_numpy(data["start"].copy())
    seconds: dict[str, float] = {}
    values: dict[str, Any] = {}

    def clusters(x: pa.SplitArray = x) -> KMeans:
        means = KMeans(tasks.CLUSTERS, "given", start, max_iter=tasks.ITERATIONS, tol=0.0)
        means.begin(x)
        for _ in range(tasks.ITERATIONS):  # the number of iterations is given, as in the paper
            means.step(x)
        return means

    def sweeps() -> Lasso:
        lasso = Lasso(tasks.LASSO_PENALTY, tol=0.0)
        lasso.begin(lasso_x, lasso_y)
        for _ in range(tasks.LASSO_SWEEPS):
            lasso.step(lasso_x, lasso_y)
        return lasso

    def run(name: str, call: Any, repeats: int = 7) -> Any:
        seconds[name], value = tasks.timed(call, repeats, barrier=barrier)
        return value

    values["k-means"] = run("k-means", clusters).centres
    run("cdist", lambda: cdist(susy, symmetric=False))
    pairs = pa.from_local(susy.local.repeat(2, 1), 0, comm)
    run("cdist, more rows", lambda: cdist(pairs, symmetric=False), 3)
    for axis in (None, 0, 1):
        run(f"mean and std, axis {axis}", lambda axis=axis: (pa.mean(x, axis), pa.std(x, axis)))
    run("std, axis 0", lambda: pa.std(x, 0))
    more = pa.from_local(x.local.repeat(tasks.MORE, 1), 0, comm)
    run("k-means, more rows", lambda: clusters(more), 3)
    run("std, axis 0, more rows", lambda: pa.std(more, 0))

    values["lasso"] = run("lasso", sweeps).weights
    run("lasso to a gap of 1e-8", lambda: Lasso(tasks.LASSO_PENALTY).fit(lasso_x, lasso_y))
    run("lasso path of 50", lambda: lasso_path(lasso_x, lasso_y))
    values["svd"] = run("svd", lambda: svd(x, "gram", tasks.RANK)).s
    if rank == 0:
        tasks.report(out, seconds, values)
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        number = int(sys.argv[3])
        mp.spawn(work, (number, str(Path(scratch) / "store"), *tasks.arguments()), nprocs=number)
