"""Write what pandapower makes of its own cases: internal tables, admittances, solved voltages.

    python tests/physics/power_flow/reference/make.py

pandapower needs an older pandas than this project, so run it in an environment of its own (pandapower 3.5.6); the files
let the tests compare with it where it is not there. Angles come from its own Newton-Raphson from flat start, not from
lightsim2grid, which it would otherwise call.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

CASES = ("case14", "case118", "case300", "case1354pegase", "case9241pegase")
BUS_COLUMNS = (1, 2, 3, 4, 5, 9, 11, 12)
BRANCH_COLUMNS = (2, 3, 4, 5, 8, 9, 10, 21, 22, 23, 24, 25)
GEN_COLUMNS = (0, 1, 2, 3, 4, 5, 7)


def main() -> None:
    """One file per case, two for the largest."""
    import pandapower
    import pandapower.networks

    for name in CASES:
        net = getattr(pandapower.networks, name)()
        pandapower.runpp(
            net, init="flat", calculate_voltage_angles=True, tolerance_mva=1e-9, max_iteration=30, lightsim2grid=False
        )
        tables = net._ppc["internal"]
        bus, branch, gen = (np.real(tables[key]) for key in ("bus", "branch", "gen"))
        n = len(bus)
        # Y itself would be as large as the branches; its product with a random vector tells as much, and of the product
        # of the largest case random sums tell as much.
        rng = np.random.default_rng(0)
        probe = rng.standard_normal(n) + 1j * rng.standard_normal(n)
        branches = {
            "ends": branch[:, :2].T.astype(np.int16),
            "branch": np.ascontiguousarray(branch[:, BRANCH_COLUMNS].T),
        }
        rest = {
            "base_mva": tables["baseMVA"],
            "bus": np.ascontiguousarray(bus[:, BUS_COLUMNS].T),
            "gen": np.ascontiguousarray(gen[:, GEN_COLUMNS].T),
            "voltage": tables["V"],
            "product": projected(tables["Ybus"] @ probe),
            "largest": np.abs(tables["Ybus"].data).max(),
        }
        folder = Path(__file__).parent
        if len(branch) > 10_000:
            np.savez_compressed(folder / f"{name}_branches.npz", **branches)
            np.savez_compressed(folder / f"{name}.npz", **rest)
        else:
            np.savez_compressed(folder / f"{name}.npz", **branches, **rest)


def projected(product: np.ndarray) -> np.ndarray:
    """The product, of large grids 64 sums of it with random signs."""
    if len(product) <= 2000:
        return product
    return np.random.default_rng(1).choice([-1.0, 1.0], size=(64, len(product))) @ product


if __name__ == "__main__":
    main()
