"""Run times of matrix products on a GPU for tuning parameters of the kernel, computed from a model: synthetic data.

The parameters, their values and the constraints between them are those of a tunable OpenCL kernel (CLTune, Nugteren and
Codreanu, MCSoC 2015), measured in UCI's "SGEMM GPU kernel performance" data: 241,600 combinations that can run. Times
are not measured: they follow a roofline with occupancy, vector widths and shared memory, so that features interact as
they do there.
"""

from __future__ import annotations

import numpy as np

PARAMETERS: dict[str, tuple[int, ...]] = {
    "MWG": (16, 32, 64, 128),
    "NWG": (16, 32, 64, 128),
    "KWG": (16, 32),
    "MDIMC": (8, 16, 32),
    "NDIMC": (8, 16, 32),
    "MDIMA": (8, 16, 32),
    "NDIMB": (8, 16, 32),
    "KWI": (2, 8),
    "VWM": (1, 2, 4, 8),
    "VWN": (1, 2, 4, 8),
    "STRM": (0, 1),
    "STRN": (0, 1),
    "SA": (0, 1),
    "SB": (0, 1),
}
REPEATS = 4  # measurements of a combination
_SIZE = 2048  # of the square matrices
_PEAK_FLOPS, _BANDWIDTH = 4e12, 2.2e11  # per second, bytes per second
_REGISTERS = 65536  # of a multiprocessor
_THREADS = 2048  # of a multiprocessor


def combinations() -> np.ndarray:
    """All combinations that the kernel can run with, ``(241600, 14)`` int16, in the order of `PARAMETERS`."""
    values = [np.array(allowed, dtype=np.int16) for allowed in PARAMETERS.values()]
    p = {n: v.ravel() for n, v in zip(PARAMETERS, np.meshgrid(*values, indexing="ij"), strict=True)}
    threads = p["MDIMC"] * p["NDIMC"]
    possible = (
        (p["KWG"] % p["KWI"] == 0)
        & (p["MWG"] % (p["MDIMC"] * p["VWM"]) == 0)
        & (p["NWG"] % (p["NDIMC"] * p["VWN"]) == 0)
        & (p["MWG"] % (p["MDIMA"] * p["VWM"]) == 0)
        & (p["NWG"] % (p["NDIMB"] * p["VWN"]) == 0)
        & (p["KWG"] % np.maximum(threads // p["MDIMA"], 1) == 0)
        & (p["KWG"] % np.maximum(threads // p["NDIMB"], 1) == 0)
    )
    return np.stack([column[possible] for column in p.values()], axis=1)


def run_times_ms(parameters: np.ndarray) -> np.ndarray:
    """Times of the model, ``(n,)`` in milliseconds, of parameters ``(n, 14)``."""
    p = dict(zip(PARAMETERS, np.asarray(parameters, dtype=np.float64).T, strict=True))
    threads = p["MDIMC"] * p["NDIMC"]
    per_thread = p["MWG"] / p["MDIMC"] * p["NWG"] / p["NDIMC"]
    # A thread keeps its part of the result, and the pieces of both factors it multiplies.
    registers = per_thread + p["MWG"] / p["MDIMC"] + p["NWG"] / p["NDIMC"] + 20
    resident = np.minimum(_REGISTERS / registers, _THREADS)
    occupancy = np.minimum(np.floor(resident / threads).clip(min=0.25) * threads / _THREADS, 1.0)
    spilled = np.maximum(registers / 255 - 1, 0)
    # Work of a thread hides latencies as well as many threads do; loops that are unrolled little cost control.
    hidden = 1 - np.exp(-2.2 * occupancy - 0.12 * np.sqrt(per_thread))
    unrolled = 1 - 0.25 / p["KWI"]
    vector = 1 - 0.08 * np.abs(np.log2(p["VWM"] * p["VWN"]) - 3) / 3
    compute_s = 2 * _SIZE**3 / (_PEAK_FLOPS * hidden * unrolled * vector) * (1 + 6 * spilled)
    # Bytes of each factor: once per tile with shared memory, else once per thread row with what caches save.
    a = 4 * _SIZE**3 / p["NWG"] * np.where(p["SA"] == 1, 1.0, 0.35 * p["NDIMC"])
    b = 4 * _SIZE**3 / p["MWG"] * np.where(p["SB"] == 1, 1.0, 0.35 * p["MDIMC"])
    coalesced_a = np.minimum(p["MDIMA"] * p["VWM"], 32) / 32 * np.where(p["STRM"] == 1, 1.0, 0.9)
    coalesced_b = np.minimum(p["NDIMB"] * p["VWN"], 32) / 32 * np.where(p["STRN"] == 1, 1.0, 0.9)
    memory_s = (a / coalesced_a + b / coalesced_b) / _BANDWIDTH / 8  # caches of the second level
    barriers_s = _SIZE / p["KWG"] * (p["SA"] + p["SB"]) * 4e-6 * (_SIZE**2 / (p["MWG"] * p["NWG"])) / 64
    # A smooth maximum: what is bound by one of the two still feels the other.
    return 1e3 * ((compute_s**4 + memory_s**4) ** 0.25 + barriers_s)


def synthetic_gemm(num_rows: int | None, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the data set.

    Args:
        num_rows: How many, chosen at random; None: all, four for each combination.
        noise: Standard deviation of the logarithm of a time.
        seed: Of the choice and of the noise.

    Returns:
        Parameters ``(n, 14)`` float64 and times ``(n, 1)`` in milliseconds, float64.

    Raises:
        ValueError: If there are not that many rows.
    """
    generator = np.random.default_rng(seed)
    every = combinations()
    total = len(every) * REPEATS
    if num_rows is not None and not 1 <= num_rows <= total:
        raise ValueError(f"data.num_rows={num_rows}: must be 1 to {total}, or null for all")
    rows = np.arange(total) if num_rows is None else generator.choice(total, num_rows, replace=False)
    chosen = every[rows // REPEATS]
    times = run_times_ms(chosen) * np.exp(noise * generator.standard_normal(len(rows)))
    return chosen.astype(np.float64), times[:, None]
