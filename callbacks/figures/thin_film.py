"""Figures of designed stacks of thin films: spectra with layers, draws, errors, denoising, motifs, materials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from callbacks.figures.axes import make_figure, plain_log_ticks, whole_numbers
from physics.thin_film.bragg import bragg_counts

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

Outputs = Mapping[str, "Tensor"]

CHANNELS = {"R": "#2166AC", "A": "#4D4D4D", "T": "#B2182B"}
MATERIALS = {
    "Ag": "#A6A6A6", "Al": "#C9CED6", "TiN": "#B8860B", "Ge": "#5B4A6F", "ITO": "#8DA0CB", "Si": "#3B3B58",
    "ZnO": "#A6D854", "ZnS": "#E5C494", "ZnSe": "#D9A441", "Al2O3": "#66C2A5", "AlN": "#35978F", "HfO2": "#9E6EBD",
    "MgF2": "#CFE8F3", "MgO": "#F4CAE4", "Si3N4": "#3288BD", "SiO2": "#9ECAE1", "Ta2O5": "#F46D43", "TiO2": "#D53E4F",
}  # fmt: skip
FURTHER = ("#1B9E77", "#D95F02", "#7570B3", "#E7298A", "#66A61E", "#E6AB02")
METHODS = ("#D53E4F", "#3288BD", "#66A61E", "#9E6EBD")


def material_colour(name: str) -> str:
    """A colour that a material has in all figures."""
    return MATERIALS.get(name) or FURTHER[sum(name.encode()) % len(FURTHER)]


def layer_bar(axes: Any, material: Sequence[int], thickness_nm: Sequence[float], names: Sequence[str]) -> None:
    """A stack as a bar: light comes from the left, widths are thicknesses."""
    axes.grid(visible=False)
    begin = 0.0
    total = sum(d for m, d in zip(material, thickness_nm, strict=True) if m >= 0)
    for m, d in zip(material, thickness_nm, strict=True):
        if m < 0:
            continue
        axes.barh(0, d, left=begin, height=1.0, color=material_colour(names[m]), edgecolor="white", linewidth=0.8)
        if d > 0.09 * total:
            dark = names[m] in ("Si", "Ge", "TiN", "AlN", "TiO2", "Si3N4", "HfO2")
            axes.text(
                begin + d / 2, 0, f"{names[m]}\n{d:.0f}", ha="center", va="center", fontsize=6.5,
                color="white" if dark else "black",
            )  # fmt: skip
        begin += d
    axes.set_ylim(-0.5, 0.5)
    axes.set_xlim(0, max(begin, 1.0))
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _spectra(axes: Any, nm: np.ndarray, target: np.ndarray, weight: np.ndarray, found: np.ndarray) -> None:
    """R, A and T: wanted as a broad pale line where they count, achieved as a thin one."""
    for c, (name, colour) in enumerate(CHANNELS.items()):
        wanted = np.where(weight[c] > 0, target[c], np.nan)
        axes.plot(nm, wanted, color=colour, alpha=0.3, linewidth=4, solid_capstyle="butt")
        axes.plot(nm, found[c], color=colour, linewidth=1.2, label=name)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(nm[0], nm[-1])


def target_and_candidate(
    outputs: Outputs, datamodule: Any, quantiles: Sequence[float] = (0.1, 0.5, 0.9, 1.0)
) -> Figure:
    """Wanted and achieved spectra with the stack below, for targets of the test from well to badly met.

    Args:
        outputs: ``target``, ``prediction``, ``weight``, ``material``, ``thickness_nm``, ``refined_mae``.
        datamodule: With ``wavelength_nm`` and ``vocabulary``.
        quantiles: Of the error: which targets are shown.
    """
    mae = outputs["refined_mae"].numpy()
    order = mae.argsort(kind="stable")
    chosen = [order[min(int(q * len(order)), len(order) - 1)] for q in quantiles]
    nm, names = datamodule.wavelength_nm.numpy(), datamodule.vocabulary.materials
    figure, panels = make_figure(3.2 * len(chosen), 3.6, 2, len(chosen), heights=[5, 1])
    for column, (i, q) in enumerate(zip(chosen, quantiles, strict=True)):
        top, bottom = panels[column], panels[len(chosen) + column]
        _spectra(top, nm, outputs["target"][i], outputs["weight"][i].numpy(), outputs["prediction"][i])
        rank = "worst target" if q >= 1 else f"{100 * q:.0f} % of targets are better" if q > 0 else "best target"
        top.set_title(f"MAE {mae[i]:.2g}: {rank}", fontsize="small")
        top.set_xlabel("wavelength [nm]")
        layer_bar(bottom, outputs["material"][i].tolist(), outputs["thickness_nm"][i].tolist(), names)
        bottom.set_xlabel("depth from the light side [nm]", fontsize="small")
    panels[0].set_ylabel("part of the light")
    panels[0].legend(frameon=False, fontsize="small")
    return figure


def designs_for_target(target: Mapping[str, Tensor], datamodule: Any, name: str, shown: int = 3) -> Figure:
    """The best candidates for a wanted spectrum side by side.

    Args:
        target: Outputs of a predict step for one target.
        datamodule: With ``wavelength_nm`` and ``vocabulary``.
        name: Of the target.
        shown: Candidates at most.
    """
    there = target["mae"].isfinite().nonzero()[:shown, 0].tolist()
    nm, names = datamodule.wavelength_nm.numpy(), datamodule.vocabulary.materials
    figure, panels = make_figure(max(3.6 * len(there), 5), 3.8, 2, max(len(there), 1), heights=[5, 1])
    for column, k in enumerate(there):
        top, bottom = panels[column], panels[len(there) + column]
        _spectra(top, nm, target["target"].numpy(), target["weight"].numpy(), target["spectrum"][k].numpy())
        robust = float(target["robust_mae_p95"][k])
        top.set_title(f"MAE {float(target['mae'][k]):.3g}, 95 % with errors {robust:.3g}", fontsize="small")
        top.set_xlabel("wavelength [nm]")
        layer_bar(bottom, target["material"][k].tolist(), target["thickness_nm"][k].tolist(), names)
        bottom.set_xlabel("depth from the light side [nm]", fontsize="small")
    panels[0].set_ylabel("part of the light")
    panels[0].legend(frameon=False, fontsize="small")
    figure.suptitle(name)
    return figure


def _draws(outputs: Outputs) -> dict[str, np.ndarray]:
    """Errors of draws by network, ours first, ``(B, N)``."""
    prefix = "draws_mae_"
    return {k.removeprefix(prefix): v.double().numpy() for k, v in outputs.items() if k.startswith(prefix)}


def best_so_far(outputs: Outputs, datamodule: Any) -> Figure:
    """Error of the best of n draws against n: mean over targets as a line, quartiles as a band.

    Args:
        outputs: ``draws_mae_<network>``, ``best_mae_<template>``.
        datamodule: Not used.
    """
    figure, panels = make_figure(7.2, 3.2, 1, 2)
    for colour, (name, mae) in zip(METHODS, _draws(outputs).items(), strict=False):
        best = np.minimum.accumulate(mae, 1)
        n = np.arange(1, best.shape[1] + 1)
        for axes, middle in zip(panels, (best.mean(0), np.median(best, 0)), strict=True):
            axes.plot(n, middle, color=colour, label=name, linewidth=1.6)
        panels[1].fill_between(n, *np.quantile(best, (0.25, 0.75), axis=0), color=colour, alpha=0.15, linewidth=0)
    for style, (name, values) in zip((":", "--", "-."), _templates(outputs, "best").items(), strict=False):
        panels[0].axhline(values.mean(), color="#4D4D4D", linestyle=style, linewidth=1, label=name)
    for axes, title in zip(panels, ("mean over targets", "median and quartiles"), strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_log_ticks(axes.xaxis)
        plain_log_ticks(axes.yaxis)
        axes.set_xlabel("draws")
        axes.set_title(title, fontsize="small")
    panels[0].set_ylabel("spectral MAE of the best draw")
    panels[0].legend(frameon=False, fontsize="x-small")
    return figure


def _templates(outputs: Outputs, what: str) -> dict[str, np.ndarray]:
    prefix = f"{what}_mae_template_"
    names = {k: k.removeprefix(prefix) for k in outputs if k.startswith(prefix)}
    return {f"template, {n.replace('equal', 'equal storage')}": outputs[k].double().numpy() for k, n in names.items()}


def mae_histogram(outputs: Outputs, datamodule: Any, num_bins: int = 36) -> Figure:
    """How the errors are distributed over the targets: best draw and after refinement, network beside baselines.

    Args:
        outputs: As for `best_so_far`, and ``refined_mae_<method>``.
        datamodule: Not used.
        num_bins: Of the histogram.
    """
    raw = {name: mae.min(1) for name, mae in _draws(outputs).items()}
    equal = "template, equal storage"
    if equal in (found := _templates(outputs, "best")):
        raw[equal] = found[equal]
    refined = {name: outputs[f"refined_mae_{name}"].double().numpy() for name in raw if name != equal}
    if equal in raw:
        refined[equal] = outputs["refined_mae_template_equal"].double().numpy()
    floor = 1e-5
    finite = np.concatenate([v[np.isfinite(v)] for group in (raw, refined) for v in group.values()])
    edges = np.geomspace(floor, max(float(finite.max()) if len(finite) else 1.0, 1e-3), num_bins + 1)
    figure, panels = make_figure(7.2, 4.0, 1, 2)
    for axes, group, title in zip(panels, (raw, refined), ("best draw", "refined"), strict=True):
        for colour, (name, values) in zip(METHODS, group.items(), strict=False):
            values = values[np.isfinite(values)]
            share = np.full(len(values), 100 / max(len(values), 1))
            axes.hist(values.clip(floor * 1.01), edges, weights=share, color=colour, alpha=0.2)
            axes.hist(
                values.clip(floor * 1.01), edges, weights=share, color=colour, histtype="step", linewidth=1.4,
                label=f"{name}: {values.mean():.4f}",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_title(title, fontsize="small")
        axes.set_xlabel("spectral MAE")
        axes.legend(
            frameon=False, fontsize="x-small", title="mean over targets", title_fontsize="x-small", loc="lower center",
            bbox_to_anchor=(0.5, 1.06),
        )  # fmt: skip
    panels[0].set_ylabel("targets [%]")
    return figure


def denoising_trajectory(outputs: Outputs, datamodule: Any, target: int = 0) -> Figure:
    """How a stack comes about: tokens of one draw over the steps, and the error over the steps of all targets.

    Args:
        outputs: ``trajectory`` (B, steps, L), ``trajectory_mae`` (B, steps).
        datamodule: With ``vocabulary``.
        target: Whose tokens are shown: the one with this rank of the error of the last step.
    """
    vocabulary = datamodule.vocabulary
    mae = outputs["trajectory_mae"].double().numpy()
    one = int(mae[:, -1].argsort(kind="stable")[min(target, len(mae) - 1)])
    tokens = outputs["trajectory"][one]
    material, thickness = (x.numpy() for x in vocabulary.layers(tokens))
    steps, length = tokens.shape
    figure, (left, right) = make_figure(9.0, 0.5 * length + 1.4, 1, 2)
    left.grid(visible=False)
    for s in range(steps):
        for place in range(length - 1):
            m = material[s, place]
            if m >= 0:
                left.bar(s + 1, 0.96, bottom=place - 0.48, width=0.96, color=material_colour(vocabulary.materials[m]))
                if steps <= 25:
                    left.text(s + 1, place, f"{thickness[s, place]:.0f}", ha="center", va="center", fontsize=5)
    left.set_xlim(0.5, steps + 0.5)
    left.set_ylim(length - 1.5, -0.5)
    left.set_yticks(range(length - 1), [str(place + 1) for place in range(length - 1)])
    left.set_ylabel("layer, from the light side")
    left.set_xlabel("step")
    left.set_title(f"one draw, thickness in nm; MAE {mae[one, -1]:.2g}", fontsize="small")
    seen = [vocabulary.materials[m] for m in np.unique(material[material >= 0])]
    for name in seen:
        left.bar(0, 0, color=material_colour(name), label=name)
    left.legend(frameon=False, fontsize="x-small", loc="upper left", bbox_to_anchor=(0, -0.14), ncols=6)
    n = np.arange(1, steps + 1)
    right.plot(n, np.median(mae, 0), color=METHODS[0], label="median over targets")
    right.fill_between(n, *np.quantile(mae, (0.25, 0.75), axis=0), color=METHODS[0], alpha=0.2, linewidth=0)
    right.plot(n, mae[one], color="#4D4D4D", linewidth=0.9, label="the draw on the left")
    right.set_yscale("log")
    plain_log_ticks(right.yaxis)
    right.set_xlabel("step")
    right.set_ylabel("spectral MAE")
    right.legend(frameon=False, fontsize="x-small")
    for axes in (left, right):
        whole_numbers(axes.xaxis)
    return figure


def bragg_motifs(outputs: Outputs, datamodule: Any, most: int = 20_000) -> Figure:
    """Alternations ABAB... per 100 stacks by their length: targets, designs, training data.

    Args:
        outputs: ``tokens`` of the best draws, ``index``.
        datamodule: With ``vocabulary`` and ``part``.
        most: Training stacks that are counted.
    """
    vocabulary = datamodule.vocabulary
    test = datamodule.part("test").tokens
    groups = {"targets": test[outputs["index"].unique()], "designs": outputs["tokens"]}
    train = datamodule.part("train")
    if hasattr(train, "tokens"):
        groups["training"] = train.tokens[:most]
    counts = {}
    for name, tokens in groups.items():
        material, thickness = vocabulary.layers(tokens)
        counts[name] = 100 * bragg_counts(material[:, :-1], thickness[:, :-1]).sum(0).numpy() / len(tokens)
    figure, (axes,) = make_figure(4.8, 3.2)
    lengths = np.arange(3, max(4, len(counts["targets"])))
    for i, (name, values) in enumerate(counts.items()):
        width = 0.8 / len(counts)
        axes.bar(lengths + (i - (len(counts) - 1) / 2) * width, values[3:], width, label=name, color=METHODS[i])
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xlabel("successive layers that alternate")
    axes.set_ylabel("per 100 stacks")
    whole_numbers(axes.xaxis)
    axes.legend(frameon=False, fontsize="small")
    return figure


def optical_constants(outputs: Outputs, datamodule: Any) -> Figure:
    """Refractive index n and extinction k of the materials over the wavelengths.

    Args:
        outputs: Not used.
        datamodule: With ``wavelength_nm``, ``index`` and ``vocabulary``.
    """
    nm = datamodule.wavelength_nm.numpy()
    figure, (left, right) = make_figure(7.2, 3.2, 1, 2)
    for name, index in zip(datamodule.vocabulary.materials, datamodule.index.numpy(), strict=True):
        left.plot(nm, index.real, color=material_colour(name), label=name)
        right.plot(nm, np.where(index.imag > 1e-6, index.imag, np.nan), color=material_colour(name))
    right.set_yscale("log")
    for axes, what in ((left, "refractive index n"), (right, "extinction k")):
        axes.set_xlabel("wavelength [nm]")
        axes.set_ylabel(what)
    left.legend(frameon=False, fontsize="x-small", ncols=2)
    return figure
