"""Report of the scaling study: tables, fits, forecasts and figures, from records or at the end of a sweep."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from callbacks.energy.findings import number
from callbacks.energy.report import Section, markdown, page, png
from callbacks.figures import energy_scaling as plots
from callbacks.scaling_traces import power_traces
from physics.energy_cost import Forecast
from physics.energy_cost.analysis import RefusedPlan, analyse, check_sources
from physics.energy_cost.fitting import TERMS
from physics.energy_cost.planning import TIME_TERMS, better_is
from physics.energy_cost.records import read_runs

log = logging.getLogger(__name__)

TITLE = "Energy of parallel training"
UNTESTED = "as many costs as runs: nothing is tested; add runs at other batch sizes and numbers of devices"
COLUMNS: dict[str, str] = {
    "series": "series",
    "devices": "n",
    "nodes": "nodes",
    "local_batch_size": "LBS",
    "global_batch_size": "GBS",
    "num_samples": "samples",
    "energy_kwh": "E [kWh]",
    "energy_rms_kwh": "+-",
    "estimated": "estimated [%]",
    "device_hours": "H [h]",
    "device_hours_rms": "+- ",
    "kappa_kw": "kappa [kW]",
    "energy_ratio": "E / E_r",
    "device_hours_ratio": "H / H_r",
    "hours_ratio": "T / T_r",
    "proportional_error": "kappa H - E [%]",
    "cost_error": "costs - E [%]",
    "left_out_error": "left out [%]",
    "plan_error": "as a plan [%]",
    "metric": "metric",
}
_PERCENT = ("proportional_error", "cost_error", "left_out_error", "plan_error")
_NOT_FLAT = ("parts_kwh", "phases_s", "sources")
_MERGED = {"node+device": "P_device + P_node / n_node [kW]", "samples+updates": "e_s + e_u / LBS [J per sample]"}


class ScalingReport(pl.Callback):
    """Writes what `lightning_modules.energy_cost.EnergyCostModel` has found, and its forecasts.

    Files: ``scaling.{csv,md,tex,json}``, ``scaling.html`` (one file with all figures, no network), the figures as PNG;
    ``plans.csv`` and ``plans.md`` after a prediction.

    Args:
        dirpath: Folder of the files.
        figures_dir: Folder of the figures.
    """

    def __init__(self, dirpath: str, figures_dir: str) -> None:
        self.dirpath, self.figures_dir = Path(dirpath), Path(figures_dir)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            data = trainer.datamodule
            pl_module.analysis["power"] = power_traces(data.folders, data.records)
            write_report(pl_module.analysis, self.dirpath, self.figures_dir, data.skipped)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            rows = [plan_row(found) for found in pl_module.forecasts]
            self.dirpath.mkdir(parents=True, exist_ok=True)
            (self.dirpath / "plans.csv").write_text(_csv(rows))
            text = markdown("Planned trainings", [plans_section(pl_module.forecasts)])
            (self.dirpath / "plans.md").write_text(text)
            if pl_module.analysis:  # of the test before: its page gets the forecasts
                skipped = trainer.datamodule.skipped
                write_report(pl_module.analysis, self.dirpath, self.figures_dir, skipped, pl_module.forecasts)
            print(text)


def sweep_report(
    folder: Path, metric: str | None = None, metric_mode: str | None = None, allow_mixed: bool = False
) -> str:
    """The analysis of a sweep, as its end (``hydra.callbacks.sweep_table.epilogue``); what to print below the table.

    Args:
        folder: Of the sweep.
        metric: Quality of a run; ``optimized_metric`` of the jobs without it.
        metric_mode: Whether more (``max``) or less (``min``) of it is better; without it what the checkpoints of the
            jobs say of the same metric, or less for what is called a loss or an error.
        allow_mixed: Fit measured and estimated energies together.
    """
    folder = Path(folder)
    job = _first_job(folder)
    metric = metric or job.get("optimized_metric")
    records, skipped = read_runs(folder, metric)
    mode = metric_mode or _mode(job, metric)
    if not records:
        return "no run of the sweep can be analysed: " + "; ".join(f"{k}: {v}" for k, v in skipped.items())
    out = []
    for kind in sorted({record.hardware for record in records}):
        chosen = [record for record in records if record.hardware == kind]
        try:
            check_sources(chosen, allow_mixed)
        except ValueError as error:
            out.append(str(error))
            continue
        name = "energy_scaling" if len({r.hardware for r in records}) == 1 else f"energy_scaling_{_slug(kind)}"
        analysis = analyse(chosen, metric_mode=mode) | {"power": power_traces([folder], chosen)}
        paths = write_report(analysis, folder / name, folder / "figures", skipped)
        out.append(f"{summary(analysis)}\n\n{paths[-1]}")
    return "\n\n".join(out)


def write_report(
    analysis: Mapping[str, Any],
    folder: Path,
    figures_dir: Path,
    skipped: Mapping[str, str],
    forecasts: Sequence[Forecast | RefusedPlan] = (),
) -> list[Path]:
    """Write all files; returns their paths, the page last.

    Args:
        analysis: Of `physics.energy_cost.analysis.analyse`, with ``power`` of `callbacks.scaling_traces`.
        folder: Of tables and page.
        figures_dir: Of the figures.
        skipped: Runs that were left out, with reasons.
        forecasts: Planned trainings, for the page; refused ones too.
    """
    images, missing = {}, []
    for name in plots.FIGURES:
        try:
            images[name] = png(getattr(plots, name)(analysis))
        except ValueError as error:
            log.info("no figure %s: %s", name, error)
            missing.append(f"Not drawn: {name.replace('_', ' ')}: {error}")
    captions = [(name.replace("_", " "), image) for name, image in images.items()]
    sections = report_sections(analysis, skipped)
    if forecasts:
        sections.insert(1, plans_section(forecasts))
    names = dict.fromkeys(name for row in analysis["rows"] for name in row["phases_s"])
    rows = [
        {key: row[key] for key in row if key not in _NOT_FLAT}
        | {f"{name}_s": row["phases_s"].get(name) for name in names}
        for row in analysis["rows"]
    ]
    files = {
        folder / "scaling.csv": _csv(rows).encode(),
        folder / "scaling.md": markdown(TITLE, sections).encode(),
        folder / "scaling.tex": _latex(analysis["rows"]).encode(),
        folder / "scaling.json": (json.dumps(analysis, indent=2, sort_keys=True, allow_nan=False) + "\n").encode(),
        **{figures_dir / f"{name}.png": image for name, image in images.items()},
        folder / "scaling.html": page(TITLE, [*sections, Section("Figures", missing, images=captions)]).encode(),
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return list(files)


def summary(analysis: Mapping[str, Any]) -> str:
    """A few lines for the console."""
    lines = [text] if (text := provenance(analysis)) else []
    lines += [
        f"{name}: E = {fit['kappa_kw']:.4g} kW x device hours ({fit['low']:.4g} to {fit['high']:.4g}), errors up to "
        f"{100 * max(abs(e) for e in fit['errors']):.2g} %"
        for name, fit in analysis["series"].items()
    ]
    if cost := analysis["cost"]:
        terms = [f"{_symbol(term)} {number(cost['coefficients'][term])}" for term in cost["terms"]]
        left_out = f", left out {100 * cost['left_out_mean']:.2g} %" if cost["left_out_mean"] is not None else ""
        error = f"mean error {100 * cost['mean_error']:.2g} %{left_out}" if cost["left_out"] else UNTESTED
        lines.append(f"costs: {', '.join(terms)}; {error}")
        lines += cost["warnings"]
    if plans := analysis["plans"]:
        lines.append(_tested(plans))
    if quality := analysis["quality"]:
        lines.append(f"largest global batch within {100 * quality['tolerance']:g} % of the best: {quality['knee']}")
    return "\n".join([*lines, *(f"{what}: {why}" for what, why in analysis["refused"].items())])


def provenance(analysis: Mapping[str, Any]) -> str:
    """A warning where energies were not measured: simulated or estimated, from what; empty where they were."""
    shares = [row["estimated"] for row in analysis["rows"]]
    if max(shares) <= 0.01:
        return ""
    sources = sorted({source for row in analysis["rows"] for source in row["sources"]})
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    share = high if low == high else f"{low} to {high}"
    return f"{share} % of the energy was NOT MEASURED: {'; '.join(sources) or 'estimated'}"


def report_sections(analysis: Mapping[str, Any], skipped: Mapping[str, str]) -> list[Section]:
    """Parts of the page."""
    sections = [
        Section(
            "Runs",
            [
                *([text] if (text := provenance(analysis)) else []),
                "Ratios are to the fewest devices of the series; errors are (predicted - measured) / measured.",
            ],
            list(COLUMNS.values()),
            [[_cell(key, row[key]) for key in COLUMNS] for row in analysis["rows"]],
        )
    ]
    if analysis["series"]:
        sections.append(
            Section(
                "Energy in proportion to device hours",
                ["E = kappa H through the origin. A high R^2 hides relative errors of small runs: they are listed."],
                ("series", "kappa [kW]", "95 %", "R^2", "largest error"),
                [
                    [
                        name,
                        f"{fit['kappa_kw']:.5f}",
                        f"{fit['low']:.5f} to {fit['high']:.5f}",
                        "" if fit["r_squared"] is None else f"{fit['r_squared']:.5f}",
                        f"{100 * max(abs(e) for e in fit['errors']):.1f} %",
                    ]
                    for name, fit in analysis["series"].items()
                ],
            )
        )
    if cost := analysis["cost"]:
        sections.append(
            Section(
                "Energy as a sum of costs",
                [
                    "E = P_node M + P_device H + e_s S + e_u n U; non-negative least squares of relative errors.",
                    f"Errors: mean {100 * cost['mean_error']:.2f} %, largest {100 * cost['max_error']:.2f} %; each run "
                    f"predicted by the others: mean {100 * cost['left_out_mean']:.2f} %, largest "
                    f"{100 * cost['left_out_max']:.2f} %."
                    if cost["left_out_mean"] is not None
                    else f"{UNTESTED[0].upper()}{UNTESTED[1:]}.",
                    *cost["warnings"],
                ],
                ("cost", "value", "95 %"),
                [
                    [
                        _symbol(term),
                        number(cost["coefficients"][term], 4),
                        " to ".join(number(v, 4) for v in cost["intervals"][term]),
                    ]
                    for term in cost["terms"]
                ],
            )
        )
    if models := analysis["models"]:
        sections.append(
            Section(
                "Models",
                [
                    f"{len(models)} nested models were fitted to the same runs: even errors of left-out runs flatter "
                    "the one that is chosen after looking."
                ],
                ("terms", "mean", "largest", "left out, mean", "left out, largest"),
                [
                    [
                        " + ".join(model["terms"]),
                        *(
                            f"{100 * model[key]:.2f} %"
                            for key in ("mean_error", "max_error", "left_out_mean", "left_out_max")
                        ),
                    ]
                    for model in models
                ],
            )
        )
    if time := analysis["time"]:
        text = f"Device hours; each configuration predicted by the others: mean {100 * time['left_out_mean']:.2f} %."
        rows = [[TIME_TERMS[term], number(value, 4)] for term, value in time["coefficients"].items()]
        sections.append(Section("Time", [text], ("part", "value"), rows))
    if plans := analysis["plans"]:
        sections.append(_plans_tested(plans))
    if quality := analysis["quality"]:
        lost = f"{100 * quality['tolerance']:g} %"
        text = f"The largest global batch, from the best one on, that loses at most {lost} of it: {quality['knee']}."
        rows = [[str(size), number(value, 4)] for size, value in quality["points"]]
        sections.append(Section("Quality", [text], ("global batch size", "metric"), rows))
    sections.insert(1, _recommendation(analysis))
    if analysis["refused"] or skipped:
        rows = [[what, why] for what, why in [*analysis["refused"].items(), *skipped.items()]]
        sections.append(Section("Left out", [], ("what", "why"), rows))
    return sections


def _tested(plans: Mapping[str, Any]) -> str:
    """How well left-out runs were forecast, in a sentence."""
    inside = f", {plans['inside']} of {plans['bounded']} within their interval of 95 %" if plans["bounded"] else ""
    refused = sum(map(bool, plans["refused"]))
    mean, largest = 100 * plans["mean_error"], 100 * plans["max_error"]
    hours, worst = 100 * plans["hours_mean_error"], 100 * plans["hours_max_error"]
    return (
        f"{plans['forecast']} left-out runs as plans, hours forecast too: energy mean {mean:.2f} %, "
        f"largest {largest:.2g} %{inside}; hours mean {hours:.2g} %, largest {worst:.2g} %"
        f"{f'; {refused} refused' if refused else ''}"
    )


def _plans_tested(plans: Mapping[str, Any]) -> Section:
    """Each configuration as the others forecast it."""
    rows = []
    for key, *errors, refused in zip(
        plans["configurations"], plans["errors"], plans["hours_errors"], plans["refused"], strict=True
    ):
        devices, _, batch, samples, epochs = key
        percent = ["" if error is None else f"{100 * error:+.2f}" for error in errors]
        rows.append([str(devices), str(batch), f"{samples:,}", f"{epochs:g}", *percent, refused])
    columns = ("devices", "LBS", "samples", "epochs", "energy [%]", "hours [%]", "refused")
    return Section("Forecasts of left-out runs", [f"{_tested(plans)}."], columns, rows)


def _recommendation(analysis: Mapping[str, Any]) -> Section:
    """Runs that are worth a choice: nothing beats them in time, energy and quality at once."""
    costs = []
    for row in (analysis["rows"][i] for i in analysis["front"]):
        millions = row["num_samples"] * row["epochs"] / 1e6
        costs.append((row["hours"] / millions, row["energy_kwh"] / millions, row))
    costs.sort(key=lambda cost: cost[0])
    fast, thrifty = costs[0], min(costs, key=lambda cost: cost[1])
    text = ["Runs that no other one beats in wall time and energy per sample, and in the metric where all have one."]
    if fast is thrifty:
        text.append(f"{_named(fast[2])} is both the fastest and the cheapest.")
    else:
        text.append(
            f"{_named(fast[2])} takes {number(fast[0] / thrifty[0])} of the time and {number(fast[1] / thrifty[1])} "
            f"times the energy of {_named(thrifty[2])}."
        )
    if (quality := analysis["quality"]) and quality["inside"]:
        text.append(f"Beyond a global batch of {quality['knee']} the metric is worse.")
    cells = [
        [
            row["series"],
            str(row["devices"]),
            str(row["local_batch_size"]),
            str(row["global_batch_size"]),
            number(hours),
            number(kwh),
            "" if row["metric"] is None else number(row["metric"], 4),
        ]
        for hours, kwh, row in costs
    ]
    columns = ("series", "n", "LBS", "GBS", "hours per million samples", "kWh per million samples", "metric")
    return Section("Recommendation", text, columns, cells)


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['devices']} x {row['local_batch_size']} ({row['series']})"


def plan_row(found: Forecast | RefusedPlan) -> dict[str, Any]:
    """A forecast as a flat row; ``refused`` says why there is none."""
    plan = asdict(found.plan) | {"global_batch_size": found.plan.global_batch_size, "nodes": found.plan.nodes}
    if isinstance(found, RefusedPlan):
        return plan | {"refused": found.reason}
    values = {key: value for key, value in asdict(found).items() if key not in ("plan", "parts_kwh", "extrapolates")}
    parts = {f"{term}_kwh": value for term, value in found.parts_kwh.items()}
    return plan | values | parts | {"extrapolates": "; ".join(found.extrapolates), "refused": ""}


def plans_section(forecasts: Sequence[Forecast | RefusedPlan]) -> Section:
    """Forecasts as a table, with a column of reasons where plans were refused."""
    rows, refused = [], any(isinstance(f, RefusedPlan) for f in forecasts)
    for f in forecasts:
        plan = [str(f.plan.devices), str(f.plan.local_batch_size), f"{f.plan.num_samples:,}", f"{f.plan.epochs:g}"]
        if isinstance(f, RefusedPlan):
            rows.append([*plan, "", "", "", "", f.reason])
            continue
        found = [
            _with_bounds(f.hours, f.hours_low, f.hours_high),
            _with_bounds(f.energy_kwh, f.energy_low, f.energy_high),
            "" if f.co2_kg is None else number(f.co2_kg),
            "; ".join(f.extrapolates),
        ]
        rows.append([*plan, *found, *([""] if refused else [])])
    columns = ["devices", "LBS", "samples", "epochs", "hours (95 %)", "kWh (95 %)", "CO2 [kg]", "beyond the runs"]
    text = "Intervals from the errors of the fits, wider the farther a plan is from the runs."
    return Section("Forecasts", [text], [*columns, *(["refused"] if refused else [])], rows)


def _first_job(folder: Path) -> Mapping[str, Any]:
    """Configuration of the first job of a sweep; empty if there is none."""
    for path in sorted(folder.rglob("results.json"))[:1]:
        return json.loads(path.read_text()).get("config") or {}
    return {}


def _mode(job: Mapping[str, Any], metric: str | None) -> str:
    """``max`` or ``min``: that of a checkpoint that watches the metric, or by the name of the metric."""
    if metric is None:
        return "max"
    for callback in (job.get("callbacks") or {}).values():
        if isinstance(callback, Mapping) and callback.get("monitor") == metric and callback.get("mode"):
            return str(callback["mode"])
    return better_is(metric)


def _with_bounds(value: float, low: float, high: float) -> str:
    bounds = f"{number(low)} to {number(high)}" if math.isfinite(high) else "unknown: nothing was tested"
    return f"{number(value)} ({bounds})"


def _symbol(term: str) -> str:
    return _MERGED.get(term) or TERMS[term]


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "estimated":
        return f"{100 * value:.0f}"
    if key in _PERCENT:
        return f"{100 * value:+.2f}"
    if isinstance(value, float):
        return number(value, 4)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    buffer = io.StringIO()
    columns = max(rows, key=len)  # rows of refused plans are shorter
    writer = csv.DictWriter(buffer, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _latex(rows: Sequence[Mapping[str, Any]]) -> str:
    """A ``tabular`` with the measured columns."""
    keys = list(COLUMNS)[: list(COLUMNS).index("energy_ratio")]
    heads = [COLUMNS[key].strip().replace("+-", r"$\pm$").replace("kappa", r"$\kappa$") for key in keys]
    lines = [r"\begin{tabular}{l" + "r" * (len(keys) - 1) + "}", " & ".join(heads) + r" \\ \hline"]
    lines += [" & ".join(_cell(key, row[key]) for key in keys) + r" \\" for row in rows]
    return "\n".join([*lines, r"\end{tabular}", ""])
