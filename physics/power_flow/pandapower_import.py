"""pandapower nets as grids: read from the internal tables that its own solver works on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from physics.power_flow.grid import BusType, Grid, called, listed, numbered

# Columns of pandapower's internal branch table beyond MATPOWER's (``pandapower.pypower.idx_brch``).
_R_ASYM, _X_ASYM, _G, _G_ASYM, _B_ASYM = 21, 22, 23, 24, 25
# Of its generator table.
_SLACK_WEIGHT = 25
# A limit at or beyond this many MVA is none.
_NO_LIMIT_MVA = 9_000.0
# Elements with equations of their own.
_UNKNOWN_TABLES = ("svc", "tcsc", "ssc", "vsc", "bus_dc", "line_dc")


def from_pandapower(net: Any) -> Grid:
    """See `Grid.from_pandapower`.

    Args:
        net: A ``pandapowerNet``.

    Raises:
        ValueError: Elements without a model here, injections that are nan, and what `Grid.check` finds.
    """
    _refuse(net)
    if not _has_tables(net):
        import pandapower

        pandapower.runpp(net, calculate_voltage_angles=True)
    tables = net._ppc["internal"]
    bus, branch, gen = (np.real(tables[key]) for key in ("bus", "branch", "gen"))
    base = float(tables["baseMVA"])
    kind = bus[:, 1].astype(np.int64)
    vm, voltage = bus[:, 7].copy(), tables["V"]
    gen_bus, gen_on = gen[:, 0].astype(np.int64), gen[:, 7] > 0
    held = gen_on & (kind[gen_bus] != BusType.PQ)
    vm[gen_bus[held]] = gen[held, 5]
    names = _bus_names(net, len(bus))
    rate = branch[:, 5].copy()
    rate[(rate == 0) | (rate >= _NO_LIMIT_MVA)] = math.inf
    tensors = {
        "bus_type": kind, "vn_kv": bus[:, 9], "vm": vm, "va": np.angle(voltage),
        "g_shunt": bus[:, 4] / base, "b_shunt": bus[:, 5] / base, "p_load_mw": bus[:, 2], "q_load_mvar": bus[:, 3],
        "vm_min": np.where(bus[:, 12] > 0, bus[:, 12], 0.0), "vm_max": np.where(bus[:, 11] > 0, bus[:, 11], 2.0),
        "from_bus": branch[:, 0].astype(np.int64), "to_bus": branch[:, 1].astype(np.int64),
        "r": branch[:, 2], "x": branch[:, 3], "g": branch[:, _G], "b": branch[:, 4],
        "r_asym": branch[:, _R_ASYM], "x_asym": branch[:, _X_ASYM],
        "g_asym": branch[:, _G_ASYM], "b_asym": branch[:, _B_ASYM],
        "tap": np.where(branch[:, 8] == 0, 1.0, branch[:, 8]), "shift": np.deg2rad(branch[:, 9]),
        "status": (branch[:, 10] > 0).astype(np.float64), "rate_mva": rate,
        "gen_bus": gen_bus, "gen_p_mw": gen[:, 1], "gen_q_mvar": np.nan_to_num(gen[:, 2]), "gen_vm": gen[:, 5],
        "gen_q_min_mvar": np.nan_to_num(gen[:, 4], nan=-math.inf),
        "gen_q_max_mvar": np.nan_to_num(gen[:, 3], nan=math.inf), "gen_status": gen_on.astype(np.float64),
    }  # fmt: skip
    weights = None
    if net.get("_options", {}).get("distributed_slack"):
        weights = np.bincount(gen_bus, gen[:, _SLACK_WEIGHT] * gen_on, minlength=len(bus))
        weights = torch.from_numpy(weights / weights.sum())
    return Grid(
        name=str(net.get("name") or "pandapower"),
        base_mva=base,
        bus_names=names,
        branch_names=_branch_names(net, tables, branch, names),
        gen_names=numbered([f"gen at {called('bus', [names[i]])}" for i in gen_bus]),
        **{key: torch.tensor(np.ascontiguousarray(value)) for key, value in tensors.items()},
        slack_weights=weights,
    ).check()


def _has_tables(net: Any) -> bool:
    tables = (net.get("_ppc") or {}).get("internal") or {}
    return {"bus", "branch", "gen", "V", "baseMVA"} <= set(tables)


def _refuse(net: Any) -> None:
    name = str(net.get("name") or "pandapower")
    for table in _UNKNOWN_TABLES:
        if table in net and len(net[table]):
            raise ValueError(f"{name}: net.{table} has {len(net[table])} elements, which have no model here; drop them")
    load = net.load[net.load.in_service]
    for column in (c for c in load.columns if c.startswith(("const_z", "const_i"))):
        if (there := load.index[load[column].fillna(0) != 0]).size:
            raise ValueError(
                f"{name}: net.load.{column} is not zero at load {listed([str(i) for i in there])}; loads have constant "
                "power here, set it to zero or use shunts"
            )
    for table, columns in (("load", ("p_mw", "q_mvar")), ("sgen", ("p_mw", "q_mvar")), ("gen", ("p_mw", "vm_pu"))):
        frame = net[table]
        for column in columns:
            bad = frame.index[frame[column].isna() & frame.in_service]
            if len(bad):
                places = [_labelled(table, i, frame.at[i, "name"] if "name" in frame else None) for i in bad]
                raise ValueError(f"{name}: net.{table}.{column} is not a number: {listed(places)}")


def _labelled(table: str, index: Any, name: Any) -> str:
    """``line 12``, or ``line 12 (name)`` where the element has a name of its own."""
    named = isinstance(name, str) and name.strip() and name.strip() != str(index)
    return f"{table} {index} ({name.strip()})" if named else f"{table} {index}"


def _bus_names(net: Any, count: int) -> tuple[str, ...]:
    """Names of the internal buses; buses joined by switches are one, with the name of the first."""
    lookup = net._pd2ppc_lookups["bus"]
    names = [""] * count
    for index, name in zip(net.bus.index, net.bus.name, strict=True):
        place = int(lookup[index])
        if 0 <= place < count and not names[place]:
            names[place] = str(name) if isinstance(name, str | int) and str(name).strip() else str(index)
    return numbered([name or f"auxiliary {i}" for i, name in enumerate(names)])


def _branch_names(net: Any, tables: Any, branch: np.ndarray, bus_names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the internal branches, which are those in service."""
    names = [""] * len(tables["branch_is"])
    for table, (first, last) in net._pd2ppc_lookups["branch"].items():
        frame = net[table]
        if not len(frame):
            continue
        labels = [
            _labelled(table, i, name) for i, name in zip(frame.index, frame.get("name", frame.index), strict=True)
        ]
        for place in range(first, last):
            part, element = divmod(place - first, len(labels))
            # Three-winding transformers are three blocks of branches.
            side = f" {('hv', 'mv', 'lv')[part]}" if last - first == 3 * len(labels) else ""
            names[place] = labels[element] + side
    there = [name for name, on in zip(names, tables["branch_is"], strict=True) if on]
    if len(there) != len(branch) or not all(there):
        there = [f"{bus_names[int(f)]}-{bus_names[int(t)]}" for f, t in branch[:, :2]]
    return numbered(there)
