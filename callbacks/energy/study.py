"""The paper's comparison from finished runs: training against inference, here and modelled on other kinds of machines.

Input are the ``results.json`` of runs (`callbacks.energy.runs`), output is one plain dictionary (`build`) that
`callbacks.energy.report` prints and `callbacks.figures.energy_study` draws. All energies are those of the machines (IT
energy, no PUE).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from callbacks.energy.findings import HERE, WHAT_IF, findings, quotient
from callbacks.energy.node import NodeProfile
from callbacks.energy.runs import INFERENCE, PHASES, TRAINING, Machine, Run, read_runs


class StudyError(ValueError):
    """The folders hold nothing to compare; says why."""


@dataclass(frozen=True)
class Assumptions:
    """What the modelled numbers rest on, beside the profiles.

    Attributes:
        cpu_load: Busy share of the hardware threads. 0.65: sockets and memory of the default profiles draw the 215 W
            that were fitted to published energies; the load of the published CPU runs is unknown.
        gpu_utilisation: Of the GPUs that compute. 0.665: an A100 draws the published 289 W.
        tdp_w: "TDP" of the machine the runs were on, for the error of TDP x time; None: only of runs with a profile.
    """

    cpu_load: float = 0.65
    gpu_utilisation: float = 0.665
    tdp_w: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("cpu-load", self.cpu_load), ("gpu-utilisation", self.gpu_utilisation)):
            if not 0 <= value <= 1:
                raise ValueError(f"--{name} {value} is no share; use a number from 0 to 1.")
        if self.tdp_w is not None and not 0 < self.tdp_w < math.inf:
            raise ValueError(f"--tdp {self.tdp_w} is no power; use a number of watts above 0.")


def build(folders: Sequence[Path], profiles: Sequence[NodeProfile], assumptions: Assumptions) -> dict[str, Any]:
    """The study as plain data: the same input gives the same bytes.

    Args:
        folders: Folders of runs or of sweeps.
        profiles: Kinds of machines to model the runs on.
        assumptions: What the models rest on.

    Returns:
        ``rows`` (workload x phase x node), ``comparisons`` (training / inference), ``break_even``, ``batch_sizes``,
        ``findings``, ``runs``, ``skipped``, ``profiles``, ``assumptions``. Energies in J, times in s.

    Raises:
        StudyError: If no run can be used.
    """
    runs, skipped = read_runs(folders, assumptions.tdp_w)
    if not runs:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
        raise StudyError(f"none of {len(skipped)} runs can be compared:{reasons}")
    workloads = _workloads(runs)
    rows = []
    for label, members in workloads.items():
        for phase in PHASES:
            here = _here(label, phase, members)
            rows += here + _what_ifs(label, phase, here, members, profiles, assumptions)
    study = {
        "version": 1,
        "assumptions": asdict(assumptions) | {"notes": _assumption_notes()},
        "profiles": {profile.name: _profile_numbers(profile, assumptions) for profile in profiles},
        "runs": {
            run.name: {"workload": label, "node": run.machine.label, "notes": list(run.notes)}
            for label, members in workloads.items()
            for run in members
        },
        "skipped": skipped,
        "rows": rows,
        "comparisons": _comparisons(rows),
        "break_even": _break_even(rows, workloads),
        "batch_sizes": _batch_sizes(rows),
    }
    return study | {"findings": findings(study, profiles, assumptions.cpu_load)}


def to_json(study: Mapping[str, Any]) -> str:
    """The study as JSON with sorted keys."""
    return json.dumps(study, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _workloads(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of the same work, by the name of their experiment; what differs in network or size has a longer name."""
    tasks: dict[str, set[tuple[str, int]]] = {}
    for run in runs:
        tasks.setdefault(run.experiment, set()).add(run.task)
    out: dict[str, list[Run]] = {}
    for run in runs:
        name, size = run.task
        alone = len(tasks[run.experiment]) == 1
        label = run.experiment if alone else f"{run.experiment} ({name}, {size:,} parameters)"
        out.setdefault(label, []).append(run)
    return dict(sorted(out.items()))


def _here(workload: str, phase: str, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per machine that ran it, and per batch size; repeated runs are added up.

    Where a machine has predicted, the tests of other runs on it say nothing about inference: they are short, and they
    compute errors.
    """
    machines: dict[str, list[Run]] = {}
    for run in runs:
        if phase in run.phases:
            machines.setdefault(run.machine.label, []).append(run)
    rows = []
    for label, members in sorted(machines.items()):
        best = min((run.phases[phase].stage for run in members), key=PHASES[phase].index)
        sizes: dict[int | None, list[Run]] = {}
        for run in members:
            if run.phases[phase].stage == best:
                sizes.setdefault(run.phases[phase].batch_size, []).append(run)
        for size, group in sorted(sizes.items(), key=lambda item: item[0] or 0):
            node = label if len(sizes) == 1 else f"{label}, batches of {size}"
            rows.append(_here_row(workload, phase, node, label, size, group))
    return rows


def _here_row(
    workload: str, phase: str, node: str, machine: str, batch_size: int | None, runs: Sequence[Run]
) -> dict[str, Any]:
    phases = [run.phases[phase] for run in runs]
    joules = math.fsum(p.joules for p in phases)
    measured = 1 - math.fsum(p.estimated_j for p in phases) / joules
    idle = [p.idle_gpus_j for p in phases]
    return _row(
        workload,
        phase,
        node,
        machine=machine,
        stage=phases[0].stage,
        batch_size=batch_size,
        kind=HERE,
        basis=_basis(measured),
        measured_fraction=measured,
        device=runs[0].machine.device,
        runs=len(runs),
        joules=joules,
        seconds=math.fsum(p.seconds for p in phases),
        samples=sum(p.samples for p in phases),
        updates=sum(p.updates for p in phases),
        device_hours=math.fsum(p.device_hours for p in phases),
        idle_gpus_j=None if None in idle else math.fsum(idle),
        nameplate_w=runs[0].machine.nameplate_w,
        each=[p.joules / p.samples for p in phases],
        each_w=[p.joules / p.seconds for p in phases],
    )


def _basis(measured: float) -> str:
    if measured > 0.995:
        return "measured"
    return "estimated" if measured < 0.005 else f"{100 * measured:.0f} % measured"


def _what_ifs(
    workload: str,
    phase: str,
    here: Sequence[Mapping[str, Any]],
    runs: Sequence[Run],
    profiles: Sequence[NodeProfile],
    assumptions: Assumptions,
) -> list[dict[str, Any]]:
    """The same work on each profile: from the runs on the same kind of device, else from those on the other kind."""
    rows = []
    machines = {run.machine.label: run.machine for run in runs}
    for profile in profiles:
        device = "gpu" if profile.gpus_used else "cpu"
        ranked = sorted(here, key=lambda row: (row["device"] != device, -row["samples"], row["node"]))
        if not ranked:
            continue
        base = ranked[0]
        speed = _speed_here(machines[base["machine"]], profile, profiles)
        if speed is None:
            continue
        seconds = base["time_s"] * speed / profile.speed()
        joules = profile.energy_j(seconds, assumptions.cpu_load, None, assumptions.gpu_utilisation)
        rows.append(
            _row(
                workload,
                phase,
                profile.name,
                machine=profile.name,
                stage=base["stage"],
                batch_size=base["batch_size"],
                kind=WHAT_IF,
                basis="modelled",
                measured_fraction=0.0,
                device=device,
                runs=base["runs"],
                joules=joules,
                seconds=seconds,
                samples=base["samples"],
                updates=base["updates"],
                device_hours=max(profile.gpus_used, 1) * seconds / 3600,
                idle_gpus_j=profile.idle_gpus_w() * seconds,
                nameplate_w=profile.nameplate_w(),
                each=[joules / base["samples"]],
                each_w=[joules / seconds],
                modelled_from=base["node"],
                lower_bound=profile.speed() > speed,
            )
        )
    return rows


def _speed_here(machine: Machine, profile: NodeProfile, profiles: Sequence[NodeProfile]) -> float | None:
    """Throughput of the machine of a run in CPU threads; None if nothing says how fast its GPUs are."""
    if machine.device == "cpu":
        return machine.profile.cpu_speed if machine.profile else float(machine.threads)
    # A GPU without a profile is taken for that of the profile, else for that of the first profile that has one.
    for candidate in (machine.profile, profile, *profiles):
        if candidate is not None and candidate.gpu_speed:
            return machine.devices * candidate.gpu_speed
    return None


def _row(
    workload: str,
    phase: str,
    node: str,
    *,
    joules: float,
    seconds: float,
    samples: int,
    updates: int,
    device_hours: float,
    idle_gpus_j: float | None,
    nameplate_w: float | None,
    each: Sequence[float],
    each_w: Sequence[float],
    **labels: Any,
) -> dict[str, Any]:
    tdp_j = None if nameplate_w is None else nameplate_w * seconds
    return {
        "workload": workload,
        "phase": phase,
        "node": node,
        "energy_j": joules,
        "time_s": seconds,
        "mean_w": joules / seconds,
        "mean_w_range": [min(each_w), max(each_w)],
        "samples": samples,
        "updates": updates,
        "j_per_sample": joules / samples,
        "j_per_sample_range": [min(each), max(each)],
        "s_per_sample": seconds / samples,
        "j_per_update": joules / updates if updates else None,
        "samples_per_device_hour": samples / device_hours if device_hours else None,
        "idle_gpus_j": idle_gpus_j,
        "tdp_x_time_j": tdp_j,
        "tdp_x_time_error": None if tdp_j is None else tdp_j / joules - 1,
        "modelled_from": None,
        "lower_bound": False,
        **labels,
    }


def _profile_numbers(profile: NodeProfile, assumptions: Assumptions) -> dict[str, Any]:
    return asdict(profile) | {
        "power_w": profile.power_w(assumptions.cpu_load, None, assumptions.gpu_utilisation),
        "idle_gpus_w": profile.idle_gpus_w(),
        "tdp_w": profile.nameplate_w(),
    }


def _assumption_notes() -> list[str]:
    return [
        "Modelled rows: energy = power of the profile at the stated load x time; nothing of them is measured.",
        "Modelled times: time here x speed here / speed of the profile. A CPU thread here counts as one of the "
        "profile's and work is taken to scale perfectly over them; a GPU here without a profile counts as one of the "
        "profile's.",
        "Times and energies on a faster machine are therefore lower bounds (≥): no step scales perfectly, and the "
        "small steps of a small network hardly at all.",
        "A profile is modelled from runs on the same kind of device where there are some. Otherwise its speed is the "
        "same in training and inference, and their ratio is that of the runs.",
        "A profile is one machine, also for runs on several. Energies are those of the machines; PUE is not applied.",
    ]


def _pairs(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(name, training, inference) of every workload and machine that has both; batch sizes apart."""
    out = []
    for training, inference in itertools.product(rows, rows):
        if (training["phase"], inference["phase"]) != (TRAINING, INFERENCE):
            continue
        if all(training[key] == inference[key] for key in ("workload", "kind", "machine")):
            sizes = [
                f"{r['phase']} in batches of {r['batch_size']}" for r in (training, inference) if _one_of_several(r)
            ]
            out.append((", ".join([training["machine"], *sizes]), training, inference))
    return out


def _one_of_several(row: Mapping[str, Any]) -> bool:
    return row["node"] != row["machine"]


def _comparisons(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            **{key: training[key] for key in ("workload", "kind", "device")},
            "node": name,
            "basis": _of_both(training, inference),
            "runs": [training["runs"], inference["runs"]],
            "lower_bound": training["lower_bound"] or inference["lower_bound"],
            "training_j_per_sample": training["j_per_sample"],
            "training_j_per_sample_range": training["j_per_sample_range"],
            "inference_j_per_sample": inference["j_per_sample"],
            "inference_j_per_sample_range": inference["j_per_sample_range"],
            "ratio": training["j_per_sample"] / inference["j_per_sample"],
            "ratio_range": quotient(training["j_per_sample_range"], inference["j_per_sample_range"]),
            "inferences_that_cost_the_training": training["energy_j"] / training["runs"] / inference["j_per_sample"],
        }
        for name, training, inference in _pairs(rows)
    ]


def _of_both(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    bases = list(dict.fromkeys((one["basis"], other["basis"])))
    return bases[0] if len(bases) == 1 else " / ".join(bases)


def break_even(training: tuple[float, float], per_inference: tuple[float, float]) -> tuple[int | None, float | None]:
    """When the choice between two nodes flips, if everything is done on one of them.

    Args:
        training: Energy of the training on either node, J.
        per_inference: Energy of one inference on either node, J.

    Returns:
        The node (0 or 1) that is cheaper at first and the number of inferences after which the other one is; the number
        is None if that never happens, the node is None if they cost the same.
    """
    ahead, per = training[1] - training[0], per_inference[1] - per_inference[0]
    if not ahead and not per:
        return None, None
    first = 0 if (ahead or per) > 0 else 1
    if first == 1:
        ahead, per = -ahead, -per
    return first, (ahead / -per if per < 0 else None)


def _break_even(rows: Sequence[Mapping[str, Any]], workloads: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """All pairs of nodes of a workload; of machines here with each other and of profiles with each other."""
    out = []
    for workload, runs in workloads.items():
        samples = max((run.phases[TRAINING].samples for run in runs if TRAINING in run.phases), default=0)
        found = [pair for pair in _pairs(rows) if pair[1]["workload"] == workload]
        for (name, *one), (other_name, *other) in itertools.combinations(found, 2):
            if one[0]["kind"] != other[0]["kind"] or one[0]["machine"] == other[0]["machine"]:
                continue
            training = one[0]["j_per_sample"] * samples, other[0]["j_per_sample"] * samples
            first, inferences = break_even(training, (one[1]["j_per_sample"], other[1]["j_per_sample"]))
            names = name, other_name
            origins = {row["modelled_from"] for row in (*one, *other)}
            out.append(
                {
                    "workload": workload,
                    "basis": _of_both({"basis": _of_both(*one)}, {"basis": _of_both(*other)}),
                    "nodes": list(names),
                    "training_samples": samples,
                    "cheaper_first": None if first is None else names[first],
                    "cheaper_after": None if first is None or inferences is None else names[1 - first],
                    "inferences": inferences,
                    "assumed": None not in origins and len(origins) == 1,
                }
            )
    return out


def _batch_sizes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where one machine did the same work in batches of several sizes: each of them, and whether another beats it.

    A size is on the front if no other one needs both less energy and less time per sample.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == HERE and _one_of_several(row):
            groups.setdefault((row["workload"], row["phase"], row["machine"]), []).append(row)
    costs = "j_per_sample", "s_per_sample"
    return [
        {key: row[key] for key in ("workload", "phase", "machine", "batch_size", *costs)}
        | {"on_front": not any(all(other[c] < row[c] for c in costs) for other in group)}
        for group in groups.values()
        for row in group
    ]
