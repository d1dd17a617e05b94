"""Results of power flows as tables with the names of buses, branches and scenarios."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from physics.power_flow import Grid

if TYPE_CHECKING:
    import pandas as pd

Outputs = Mapping[str, Tensor]
Namer = Callable[[int], str]

_BUS = ("vm_pu", "va_degree", "p_mw", "q_mvar")
_BRANCH = ("p_from_mw", "q_from_mvar", "p_to_mw", "q_to_mvar", "i_from_ka", "i_to_ka", "loading_percent")


def bus_table(grid: Grid, outputs: Outputs, namer: Namer) -> pd.DataFrame:
    """A row per scenario and bus: ``vm_pu``, ``va_degree``, ``p_mw``, ``q_mvar`` (fed in) and ``converged``.

    Args:
        grid: The grid.
        outputs: Of a predict step: ``scenario`` (B,), ``converged`` (B,) and the columns, (B, bus) each.
        namer: Name of a scenario by its number.
    """
    return _table(outputs, "bus", grid.bus_names, _BUS, namer)


def branch_table(grid: Grid, outputs: Outputs, namer: Namer) -> pd.DataFrame:
    """A row per scenario and branch: powers and currents at both ends, loading in percent, ``converged``.

    Args:
        grid: The grid.
        outputs: Of a predict step: ``scenario`` (B,), ``converged`` (B,) and the columns, (B, branch) each.
        namer: Name of a scenario by its number.
    """
    return _table(outputs, "branch", grid.branch_names, _BRANCH, namer)


def _table(outputs: Outputs, kind: str, names: tuple[str, ...], columns: tuple[str, ...], namer: Namer) -> pd.DataFrame:
    import pandas as pd

    scenarios = [namer(s) for s in outputs["scenario"].tolist()]
    table = {"scenario": np.repeat(np.array(scenarios, dtype=object), len(names)), kind: list(names) * len(scenarios)}
    table |= {name: outputs[name].numpy().reshape(-1) for name in columns if name in outputs}
    table["converged"] = np.repeat(outputs["converged"].numpy(), len(names))
    return pd.DataFrame(table)


def outage_table(grid: Grid, outputs: Outputs, namer: Namer) -> pd.DataFrame:
    """A row per outage, in the order of the batch.

    Columns: ``outage``; ``state`` (``solved``, ``estimated``, ``islanded``, ``not converged``); ``severity``, the sum
    over branches of the squared share by which they are overloaded; ``overloads``; ``worst_branch`` and
    ``worst_loading_percent``; ``low_voltages`` and ``high_voltages``; ``lowest_bus`` and ``lowest_vm_pu``;
    ``iterations`` and ``max_mismatch_pu``.

    Args:
        grid: The grid.
        outputs: Of a predict step: ``scenario``, ``islanding``, ``converged``, ``iterations``, ``max_mismatch``,
            ``overloads``, ``low_voltages``, ``high_voltages``, ``severity`` (B,), ``loading_percent`` (B, branch),
            ``vm_pu`` (B, bus), and where outages may be only estimated ``estimated`` (B,).
        namer: Name of an outage by its number.
    """
    import pandas as pd

    islanding, converged = outputs["islanding"].numpy(), outputs["converged"].numpy()
    loading, vm = outputs["loading_percent"].numpy(), outputs["vm_pu"].numpy()
    estimated = outputs["estimated"].numpy() if "estimated" in outputs else np.zeros_like(converged)
    states = [islanding, converged, estimated]
    known = np.isfinite(vm).all(1)
    worst = np.where(np.isfinite(loading), loading, -1).argmax(1)
    lowest = np.where(np.isfinite(vm), vm, np.inf).argmin(1)
    rows = np.arange(len(worst))

    def named(names: tuple[str, ...], index: np.ndarray) -> list[str]:
        return [names[i] if there else "" for i, there in zip(index.tolist(), known.tolist(), strict=True)]

    return pd.DataFrame(
        {
            "outage": [namer(s) for s in outputs["scenario"].tolist()],
            "state": np.select(states, ["islanded", "solved", "estimated"], "not converged"),
            "severity": outputs["severity"].numpy(),
            "overloads": outputs["overloads"].numpy(),
            "worst_branch": named(grid.branch_names, worst),
            "worst_loading_percent": np.where(known, loading[rows, worst], np.nan),
            "low_voltages": outputs["low_voltages"].numpy(),
            "high_voltages": outputs["high_voltages"].numpy(),
            "lowest_bus": named(grid.bus_names, lowest),
            "lowest_vm_pu": np.where(known, vm[rows, lowest], np.nan),
            "iterations": outputs["iterations"].numpy(),
            "max_mismatch_pu": outputs["max_mismatch"].numpy(),
        }
    )
