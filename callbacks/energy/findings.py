"""The three findings of the paper as statements about the rows of a study: they hold, or not, or cannot be told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from callbacks.energy.node import NodeProfile
from callbacks.energy.runs import INFERENCE, PHASES, TRAINING

HERE, WHAT_IF = "here", "what-if"
HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told from these runs"
CLEARLY = 0.2
"""Relative difference from which two numbers count as different (the paper's checks: 20 %)."""

CLAIMS = {
    "1": "energy is not proportional to run time",
    "2": "unused accelerators cost",
    "3a": "training and inference cost differently per sample",
    "3b": "GPUs win training, CPU nodes can be as efficient for inference",
}


def number(value: float | None, digits: int = 3) -> str:
    """A number as a person reads it: ``12,300``, ``0.0456``, ``7.89e-5``; a dash for None."""
    if value is None:
        return "-"
    if value and not 1e-3 <= abs(value) < 1e9:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{float(f'{value:.{digits}g}'):,.10g}"


def quotient(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Least and greatest quotient of two ranges of positive numbers."""
    return [one[0] / other[1], one[1] / other[0]]


def findings(study: Mapping[str, Any], profiles: Sequence[NodeProfile], cpu_load: float) -> list[dict[str, Any]]:
    """Statements about a study (`callbacks.energy.study.build`), each with its verdict and its numbers.

    Args:
        study: With ``rows``, ``comparisons`` and ``break_even``.
        profiles: Kinds of machines.
        cpu_load: Of the modelled ones.
    """
    rows, out = study["rows"], []
    workloads = sorted({row["workload"] for row in rows})
    out += [_run_time(workload, rows) for workload in workloads]
    out.append(_run_time_modelled(rows))
    out += [_idle_here(workload, rows) for workload in workloads]
    out.append(_idle_modelled(profiles, cpu_load))
    out += [_phases_differ(workload, study["comparisons"]) for workload in workloads]
    for kind in (HERE, WHAT_IF):
        out += [_choice_flips(workload, kind, study) for workload in workloads]
    return [finding for finding in out if finding is not None]


def _finding(which: str, workload: str, basis: str, verdict: str, text: str, **numbers: Any) -> dict[str, Any]:
    return {
        "finding": which, "claim": CLAIMS[which], "workload": workload, "basis": basis, "verdict": verdict,
        "text": text, "numbers": numbers,
    }  # fmt: skip


def _bases(rows: Sequence[Mapping[str, Any]]) -> str:
    """``measured``, ``estimated``, ``modelled``, or what there is of them."""
    found = list(dict.fromkeys(row["basis"] for row in rows))
    return found[0] if len(found) == 1 else "partly measured" if found else ""


def _spread(runs: Sequence[int]) -> str:
    """What to add to a number that rests on so many runs."""
    if max(runs) == 1:
        return " (one run each: no spread is known)"
    return " (one of them rests on one run)" if min(runs) == 1 else ""


def _run_time(workload: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Finding 1 in the runs: E/t differs between node types, in the same phase."""
    chosen = [row for row in rows if row["workload"] == workload and row["kind"] == HERE]
    if not chosen:
        return None
    parts, ratios, ranges = [], {}, []
    for phase in PHASES:
        found = sorted((row for row in chosen if row["phase"] == phase), key=lambda row: (row["mean_w"], row["node"]))
        if len(found) > 1:
            least, most = found[0], found[-1]
            ratios[phase] = most["mean_w"] / least["mean_w"]
            ranges.append(quotient(most["mean_w_range"], least["mean_w_range"]))
            ends = [f"{number(row['mean_w'], 4)} W ({row['node']})" for row in (least, most)]
            spread = _spread([least["runs"], most["runs"]])
            parts.append(f"{phase}: E/t from {' to '.join(ends)}, factor {ratios[phase]:.2f}{spread}")
    errors = [row["tdp_x_time_error"] for row in chosen if row["tdp_x_time_error"] is not None]
    if errors:
        parts.append(_tdp_errors(errors))
    verdict = UNKNOWN
    if not ratios:
        parts.insert(0, f"one node type only: {chosen[0]['machine']}")
    elif any(low > 1 + CLEARLY for low, _ in ranges):
        verdict = HOLDS
    elif all(high <= 1 + CLEARLY for _, high in ranges):
        verdict = FAILS
    else:
        parts.append("the runs differ too much among themselves")
    return _finding("1", workload, _bases(chosen), verdict, "; ".join(parts), e_per_t_ratio=ratios, tdp_errors=errors)


def _tdp_errors(errors: Sequence[float]) -> str:
    span = f"{100 * min(errors):+.0f} %"
    span += f" to {100 * max(errors):+.0f} %" if max(errors) - min(errors) > 0.005 else ""
    return f"TDP x time is off by {span}"


def _run_time_modelled(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Finding 1 on the profiles: their powers at the stated load are the same whatever runs on them."""
    profiles = {row["node"]: row for row in rows if row["kind"] == WHAT_IF}
    if not profiles:
        return None
    found = sorted(profiles.values(), key=lambda row: (row["mean_w"], row["node"]))
    errors = [row["tdp_x_time_error"] for row in found]
    if len(found) == 1:
        text = f"one profile only: {found[0]['node']}; {_tdp_errors(errors)}"
        return _finding("1", "any", "modelled", UNKNOWN, text, e_per_t_ratio={}, tdp_errors=errors)
    ratio = found[-1]["mean_w"] / found[0]["mean_w"]
    ends = [f"{number(row['mean_w'], 4)} W ({row['node']})" for row in (found[0], found[-1])]
    text = f"E/t from {' to '.join(ends)}, factor {ratio:.2f}, from the profiles alone; {_tdp_errors(errors)}"
    verdict = HOLDS if ratio > 1 + CLEARLY else FAILS
    return _finding("1", "any", "modelled", verdict, text, e_per_t_ratio={"any": ratio}, tdp_errors=errors)


def _idle_here(workload: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Finding 2 in the runs: what the GPUs that did nothing have used."""
    here = [row for row in rows if row["workload"] == workload and row["kind"] == HERE]
    known = [row for row in here if row["idle_gpus_j"]]
    if not known:
        why = "no run had an unused GPU whose meter was read; callbacks.energy.gpu_scope=node reads all of a machine"
        if any(row["idle_gpus_j"] is None for row in here):
            why = "which GPUs were unused cannot be told without the record files (energy/*.jsonl) of the runs"
        return _finding("2", workload, _bases(here), UNKNOWN, why)
    factors = {
        f"{row['phase']}, {row['node']}": row["energy_j"] / max(row["energy_j"] - row["idle_gpus_j"], 1e-300)
        for row in known
    }
    text = "; ".join(
        f"{name}: {number(row['idle_gpus_j'], 4)} J of {number(row['energy_j'], 4)} J are those of unused GPUs, factor "
        f"{factor:.2f}"
        for (name, factor), row in zip(factors.items(), known, strict=True)
    )
    verdict = HOLDS if min(factors.values()) > 1 else FAILS
    return _finding("2", workload, _bases(known), verdict, text, factors=factors)


def _idle_modelled(profiles: Sequence[NodeProfile], cpu_load: float) -> dict[str, Any]:
    """Finding 2 on the profiles: the same CPU work with and without GPUs beside it."""
    pairs = [
        (forced, bare)
        for forced in profiles
        for bare in profiles
        if forced.num_gpus and not forced.gpus_used and not bare.num_gpus
        and (forced.sockets, forced.cpu_tdp_w) == (bare.sockets, bare.cpu_tdp_w)
    ]  # fmt: skip
    if not pairs:
        return _finding("2", "any", "modelled", UNKNOWN, "no two profiles differ in idle GPUs alone")
    parts, ratios = [], {}
    for forced, bare in pairs:
        at_load, full = (forced_cpu_ratio(forced, bare, load) for load in (cpu_load, 1.0))
        ratios[f"{forced.name} / {bare.name}"] = {"at_load": at_load, "at_full_load": full}
        parts.append(
            f"{forced.name} uses {at_load:.2f} times the energy of {bare.name} for the same work at a CPU load of "
            f"{cpu_load:g}, {full:.2f} times at full load"
        )
    verdict = HOLDS if min(r["at_full_load"] for r in ratios.values()) > 1 else FAILS
    return _finding("2", "any", "modelled", verdict, "; ".join(parts), ratios=ratios)


def forced_cpu_ratio(forced: NodeProfile, bare: NodeProfile, cpu_load: float) -> float:
    """Energy of a CPU run on a machine with idle GPUs / on one without, for the same work at the same load."""
    energies = [profile.power_w(cpu_load, 0) / profile.speed(0) for profile in (forced, bare)]
    return energies[0] / energies[1]


def _phases_differ(workload: str, comparisons: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Finding 3, first half: J/sample of training and of inference, on the machines that ran both."""
    found = [c for c in comparisons if c["workload"] == workload and c["kind"] == HERE]
    if not found:
        return _finding("3a", workload, "", UNKNOWN, "no machine ran both training and inference")
    ratios = {c["node"]: c["ratio"] for c in found}
    text = "; ".join(
        f"{c['node']}: {number(c['training_j_per_sample'], 4)} J/sample in training, "
        f"{number(c['inference_j_per_sample'], 4)} in inference, ratio {c['ratio']:.2f}{_ratio_range(c)}"
        for c in found
    )
    differ = [c["ratio_range"][0] > 1 + CLEARLY or c["ratio_range"][1] < 1 - CLEARLY for c in found]
    alike = [c["ratio_range"][0] >= 1 - CLEARLY and c["ratio_range"][1] <= 1 + CLEARLY for c in found]
    verdict = HOLDS if all(differ) else FAILS
    if not all(one or other for one, other in zip(differ, alike, strict=True)):
        verdict = UNKNOWN
        text += "; the runs differ too much among themselves"
    return _finding("3a", workload, _bases(found), verdict, text, ratios=ratios)


def _ratio_range(comparison: Mapping[str, Any]) -> str:
    low, high = comparison["ratio_range"]
    spread = _spread(comparison["runs"])
    return spread if max(comparison["runs"]) == 1 else f" ({low:.2f} to {high:.2f}){spread}"


def _choice_flips(workload: str, kind: str, study: Mapping[str, Any]) -> dict[str, Any] | None:
    """Finding 3, second half: the advantage of GPUs in training is clear, that in inference need not be."""
    found = [c for c in study["comparisons"] if c["workload"] == workload and c["kind"] == kind]
    if not found and kind == WHAT_IF:
        return None
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for device in ("cpu", "gpu"):
        for phase in PHASES:
            chosen = [c for c in found if c["device"] == device]
            if chosen:
                best[device, phase] = min(chosen, key=lambda c: (c[f"{phase}_j_per_sample"], c["node"]))
    if len(best) < 4:
        only = " and ".join(sorted({c["device"] for c in found})) or "neither"
        text = f"training and inference were both done on {only} only; it takes runs on CPU and GPU (trainer=cpu,gpu)"
        return _finding("3b", workload, _bases(found), UNKNOWN, text)
    if kind == WHAT_IF:
        rows = [row for row in study["rows"] if row["workload"] == workload and row["kind"] == WHAT_IF]
        if len({row["modelled_from"] for row in rows}) == 1:
            text = "all profiles are modelled from the same runs, with one speed for both phases"
            return _finding("3b", workload, "modelled", UNKNOWN, text)
    name = "{}_j_per_sample".format
    gains = {p: best["cpu", p][name(p)] / best["gpu", p][name(p)] for p in PHASES}
    ranges = {p: quotient(*(best[d, p][f"{name(p)}_range"] for d in ("cpu", "gpu"))) for p in PHASES}
    for phase in PHASES:  # a lower bound may be any amount too low
        if best["cpu", phase]["lower_bound"]:
            ranges[phase][1] = math.inf
        if best["gpu", phase]["lower_bound"]:
            ranges[phase][0] = 0.0
    flips = [b for b in study["break_even"] if b["workload"] == workload and b["inferences"] is not None]
    flips = [b for b in flips if {best[d, TRAINING]["node"] for d in ("cpu", "gpu")} == set(b["nodes"])]
    text = (
        f"the best CPU node uses {gains[TRAINING]:.2f} times the energy per sample of the best GPU node in training "
        f"and {gains[INFERENCE]:.2f} times in inference"
    )
    text += "" if kind == WHAT_IF else _spread([n for c in best.values() for n in c["runs"]])
    text += "".join(
        f"; {b['cheaper_first']} is cheaper up to {b['inferences']:,.0f} inferences, then {b['cheaper_after']}"
        for b in flips
    )
    if kind == WHAT_IF:
        for phase, gain in gains.items():
            speed = study["profiles"][best["cpu", phase]["node"]]["cpu_speed"] * gain
            text += f"; in {phase} the CPU node would use more if its cpu_speed were below {number(speed)}"
    clear = 1 + CLEARLY
    if ranges[TRAINING][0] > clear and ranges[INFERENCE][1] < clear:
        verdict = HOLDS
    elif ranges[TRAINING][1] <= clear or ranges[INFERENCE][0] >= clear:
        verdict = FAILS
    else:
        verdict = UNKNOWN
        bounds = any(c["lower_bound"] for c in best.values())
        text += "; these are lower bounds" if bounds else "; the runs differ too much among themselves"
    return _finding("3b", workload, _bases(found), verdict, text, cpu_over_gpu=gains)
