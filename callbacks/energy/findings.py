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


def findings(study: Mapping[str, Any], profiles: Sequence[NodeProfile], cpu_load: float) -> list[dict[str, Any]]:
    """Statements about a study (`callbacks.energy.study.build`), each with its verdict and its numbers.

    Args:
        study: With ``rows``, ``comparisons`` and ``break_even``.
        profiles: Kinds of machines.
        cpu_load: Of the modelled ones.
    """
    rows, out = study["rows"], []
    workloads = sorted({row["workload"] for row in rows})
    for kind in (HERE, WHAT_IF):
        out += [_run_time(workload, kind, rows) for workload in workloads]
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


def _run_time(workload: str, kind: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Finding 1: E/t differs between node types, in the same phase."""
    chosen = [row for row in rows if row["workload"] == workload and row["kind"] == kind]
    if not chosen:
        return None
    parts, ratios = [], {}
    for phase in PHASES:
        found = sorted((row for row in chosen if row["phase"] == phase), key=lambda row: (row["mean_w"], row["node"]))
        if len(found) > 1:
            ratios[phase] = found[-1]["mean_w"] / found[0]["mean_w"]
            ends = [f"{number(row['mean_w'], 4)} W ({row['node']})" for row in (found[0], found[-1])]
            parts.append(f"{phase}: E/t from {' to '.join(ends)}, factor {ratios[phase]:.2f}")
    errors = [row["tdp_x_time_error"] for row in chosen if row["tdp_x_time_error"] is not None]
    if errors:
        span = f"{100 * min(errors):+.0f} %"
        span += f" to {100 * max(errors):+.0f} %" if max(errors) - min(errors) > 0.005 else ""
        parts.append(f"TDP x time is off by {span}")
    verdict = UNKNOWN
    if ratios:
        verdict = HOLDS if max(ratios.values()) > 1 + CLEARLY else FAILS
    else:
        parts.insert(0, f"one node type only: {chosen[0]['node']}")
    return _finding("1", workload, _bases(chosen), verdict, "; ".join(parts), e_per_t_ratio=ratios, tdp_errors=errors)


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
        f"{number(c['inference_j_per_sample'], 4)} in inference, ratio {c['ratio']:.2f}"
        for c in found
    )
    verdict = HOLDS if all(abs(ratio - 1) > CLEARLY for ratio in ratios.values()) else FAILS
    return _finding("3a", workload, _bases(found), verdict, text, ratios=ratios)


def _choice_flips(workload: str, kind: str, study: Mapping[str, Any]) -> dict[str, Any] | None:
    """Finding 3, second half: the advantage of GPUs in training is clear, that in inference need not be."""
    found = [c for c in study["comparisons"] if c["workload"] == workload and c["kind"] == kind]
    if not found and kind == WHAT_IF:
        return None
    best = {}
    for device in ("cpu", "gpu"):
        for phase in PHASES:
            chosen = [c for c in found if c["device"] == device]
            best[device, phase] = min(((c[f"{phase}_j_per_sample"], c["node"]) for c in chosen), default=(math.nan, ""))
    if any(math.isnan(joules) for joules, _ in best.values()):
        only = " and ".join(sorted({c["device"] for c in found})) or "neither"
        text = f"training and inference were both done on {only} only; it takes runs on CPU and GPU (trainer=cpu,gpu)"
        return _finding("3b", workload, _bases(found), UNKNOWN, text)
    if kind == WHAT_IF:
        rows = [row for row in study["rows"] if row["workload"] == workload and row["kind"] == WHAT_IF]
        if len({row["modelled_from"] for row in rows}) == 1:
            text = "all profiles are modelled from the same runs, with one speed for both phases"
            return _finding("3b", workload, "modelled", UNKNOWN, text)
    gains = {phase: best["cpu", phase][0] / best["gpu", phase][0] for phase in PHASES}
    flips = [b for b in study["break_even"] if b["workload"] == workload and b["inferences"] is not None]
    flips = [b for b in flips if {best["cpu", TRAINING][1], best["gpu", TRAINING][1]} == set(b["nodes"])]
    text = (
        f"the best CPU node uses {gains[TRAINING]:.2f} times the energy per sample of the best GPU node in training "
        f"and {gains[INFERENCE]:.2f} times in inference"
    )
    text += "".join(
        f"; {b['cheaper_first']} is cheaper up to {b['inferences']:,.0f} inferences, then {b['cheaper_after']}"
        for b in flips
    )
    if kind == WHAT_IF:
        for phase, gain in gains.items():
            speed = study["profiles"][best["cpu", phase][1]]["cpu_speed"] * gain
            text += f"; in {phase} the CPU node would use more if its cpu_speed were below {number(speed)}"
    verdict = HOLDS if gains[TRAINING] > 1 + CLEARLY > gains[INFERENCE] else FAILS
    return _finding("3b", workload, _bases(found), verdict, text, cpu_over_gpu=gains)
