"""Figures of lottery tickets and the comparison of the jobs of a sweep, on made-up rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from callbacks.figures import lottery
from callbacks.ticket_comparison import compared_masks, draw_sweep, read_jobs, table
from networks.lottery.tickets import Ticket, find_tickets, save_ticket, ticket_path


def rows(levels: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "level": level,
            "remaining": 0.8**level,
            "densities": {"layers.0": 0.9**level, "layers.1": 0.5**level},
            "metrics": {"val/accuracy": 0.9 - 0.01 * level, "val/nll": 0.1 + 0.1 * level},
        }
        for level in range(levels)
    ]


def test_metrics_show_what_was_measured():
    figure = lottery.metrics_against_remaining(rows())
    assert [axes.get_title() for axes in figure.axes] == ["accuracy", "NLL"]
    line, dense = figure.axes[0].lines
    assert list(line.get_xdata()) == pytest.approx([100, 80, 64, 51.2])
    assert list(line.get_ydata()) == pytest.approx([0.9, 0.89, 0.88, 0.87]) and dense.get_ydata()[0] == 0.9
    left, right = figure.axes[0].get_xlim()
    assert left > 100 and right < 51.2, "dense is at the left"


def test_metrics_of_a_forecast():
    """Where nothing is classified, what validation has."""
    forecasts = [row | {"metrics": {"val/loss": 0.3, "val/mae": 2.0 + row["level"]}} for row in rows()]
    figure = lottery.metrics_against_remaining(forecasts)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "mae"]
    assert list(figure.axes[1].lines[0].get_ydata()) == [2, 3, 4, 5]


def test_densities_of_levels():
    figure = lottery.layer_densities(rows(16))
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"]
    assert len(lines) == 5
    assert list(lines[-1].get_ydata()) == pytest.approx([100 * 0.9**15, 100 * 0.5**15])


def test_nothing_to_show_is_none():
    assert lottery.metrics_against_remaining([{"level": 0, "remaining": 1.0, "metrics": {}}]) is None
    assert lottery.layer_densities(rows(1)) is None and lottery.metrics_against_remaining(rows(1)) is None
    assert lottery.compared([]) is None and lottery.against_cost([]) is None and lottery.mask_overlaps({}) is None
    masks = {"w": torch.zeros(2, dtype=torch.bool)}
    assert lottery.frontier({"w": torch.ones(2)}, {"w": torch.ones(2)}, masks, masks) is None


def test_overlaps_and_frontier():
    masks = {
        name: {"w": torch.rand(40, generator=torch.Generator().manual_seed(i)) < 0.5} for i, name in enumerate("ab")
    }
    texts = [text.get_text() for text in lottery.mask_overlaps(masks).axes[0].texts]
    both = (masks["a"]["w"] & masks["b"]["w"]).sum() / (masks["a"]["w"] | masks["b"]["w"]).sum()
    assert texts[0] == "1.00" and texts[1].startswith(f"{float(both):.2f}")
    mu, sigma = {"w": torch.randn(40)}, {"w": torch.rand(40) + 0.1}
    kept = {"w": masks["a"]["w"] & (mu["w"].abs() > 0.2)}
    figure = lottery.frontier(mu, sigma, masks["a"], kept)
    stays, goes = figure.axes[0].collections
    assert len(stays.get_offsets()) == int(kept["w"].sum())
    assert len(goes.get_offsets()) == int((masks["a"]["w"] & ~kept["w"]).sum())


# --------------------------------------------------------------------------------------------------------------- sweeps


def finished(folder: Path, levels: dict[int, float], seed: int = 0, cost: float | None = None, **model: Any) -> Path:
    """A run that tested tickets."""
    folder.mkdir(parents=True)
    model = {"bayesian": True, "ticket": None, "control": "none", "source": "init"} | model
    pruning = {"score": "auto", "levels": 0 if model["ticket"] else 3, "rewind": "init"}
    metrics = {}
    for level, accuracy in levels.items():
        where = f"test/level_{level:02d}"
        metrics |= {f"{where}/remaining": 0.8**level, f"{where}/accuracy": accuracy, f"{where}/nll": 1 - accuracy}
        if cost is not None:
            masks = {"w": torch.tensor([True, model["source"] == "init", True])}
            about = {"level": level, "cost_s": cost * (level + 1)}
            save_ticket(ticket_path(folder / "tickets", level), Ticket(masks, {}, about=about))
    config = {"seed": seed, "model": model, "callbacks": {"iterative_pruning": pruning}}
    (folder / "results.json").write_text(json.dumps({"metrics": metrics, "config": config}))
    return folder


def test_a_run_that_went_on_is_compared_by_its_last_test(tmp_path):
    """A part of it that tested nothing does not hide the part that did."""
    run = finished(tmp_path / "run", {0: 0.9, 1: 0.8})
    record = json.loads((run / "results.json").read_text())
    part = {"metrics": {"val/loss": 1.0}, "config": record["config"], "earlier": [{"metrics": record["metrics"]}]}
    (run / "results.json").write_text(json.dumps(part))
    (tmp_path / "table.csv").write_text(f"status,run_dir\ncompleted,{run}\n")
    assert [row["accuracy"] for row in read_jobs(tmp_path)] == [0.9, 0.8]


def test_trainings_of_another_length_are_named(tmp_path):
    """The dense network and a ticket, trained as long as a search: columns of their own beside the search's."""
    source = finished(tmp_path / "search", {0: 0.95, 6: 0.94})
    jobs = [finished(tmp_path / str(level), {level: 0.98}, ticket=str(source)) for level in (0, 6)]
    for run, epochs in ((source, 15), (jobs[0], 105), (jobs[1], 105)):
        record = json.loads((run / "results.json").read_text())
        record["config"]["trainer"] = {"max_epochs": epochs}
        (run / "results.json").write_text(json.dumps(record))
    lines = [f"completed,{job}" for job in jobs]
    (tmp_path / "table.csv").write_text("\n".join(["status,run_dir", *lines]))
    found = table(read_jobs(tmp_path)).splitlines()
    assert found[0] == "| level (left), test accuracy | weights: init, 105 epochs | ticket (snr) |"
    assert found[2:] == ["| 0 (1.000) | 0.980 | 0.950 |", "| 6 (0.262) | 0.980 | 0.940 |"]


def sweep(tmp_path: Path) -> Path:
    source = finished(tmp_path / "search", {0: 0.97, 3: 0.96}, cost=10.0)
    folder = tmp_path / "sweep"
    compared = finished(tmp_path / "compared", {3: 0.97}, bayesian=False, cost=30.0)
    jobs = [
        finished(folder / "0", {3: 0.90}, ticket=str(source), control="reinit"),
        finished(folder / "1", {3: 0.92}, seed=1, ticket=str(source / "tickets"), control="reinit"),
        finished(folder / "2", {3: 0.95}, ticket=str(source / "tickets" / "level_03.pt"), source="trained", cost=1.0),
    ]
    record = json.loads((jobs[2] / "results.json").read_text())
    record["config"]["callbacks"]["iterative_pruning"]["compare"] = str(compared)
    (jobs[2] / "results.json").write_text(json.dumps(record))
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", "status", "run_dir"])
        writer.writerows([[i, "completed", job] for i, job in enumerate(jobs)])
        writer.writerow([9, "failed", folder / "9"])
    return folder


def test_jobs_beside_the_tickets_that_they_began_with(tmp_path):
    found = read_jobs(sweep(tmp_path))
    series = [(row["series"], row["level"], row["accuracy"]) for row in found]
    assert series == [
        ("reinit", 3, 0.90),
        ("reinit", 3, 0.92),
        ("weights: trained", 3, 0.95),
        ("ticket (snr)", 0, 0.97),
        ("ticket (snr)", 3, 0.96),
        ("ticket (ordinary network)", 3, 0.97),
    ]
    assert [row.get("cost_s") for row in found] == [None, None, 4.0, 10.0, 40.0, 120.0]
    lines = table(found).splitlines()
    own = "| reinit | weights: trained | ticket (snr) | ticket (ordinary network) |"
    assert lines[0] == f"| level (left), test accuracy {own}"
    assert lines[2:] == ["| 0 (1.000) |  |  | 0.970 |  |", "| 3 (0.512) | 0.910 | 0.950 | 0.960 | 0.970 |"]


def test_a_sweep_ends_with_tables_and_figures(tmp_path):
    folder = sweep(tmp_path)
    printed = draw_sweep(folder)
    assert "test accuracy" in printed and "test nll" in printed
    assert {path.name for path in (folder / "figures").iterdir()} == {"tickets.png", "cost.png", "overlaps.png"}


def test_masks_that_are_compared(tmp_path):
    """Of one level and one seed, the level with most series; the trained weights began with another mask here."""
    level, masks = compared_masks(read_jobs(sweep(tmp_path)))
    assert level == 3 and {name: mask["w"].tolist() for name, mask in masks.items()} == {
        "weights: trained": [True, False, True],
        "ticket (snr)": [True, True, True],
        "ticket (ordinary network)": [True, True, True],
    }
    assert compared_masks([]) == (0, {})


def test_the_frontier_of_a_run(tmp_path):
    """Points of the level in the middle: what the next ticket has kept."""
    state = {"w_mu": torch.tensor([0.1, -0.2, 0.3]), "w_log_sigma": torch.full((3,), -3.0)}
    for level, mask in enumerate(([1, 1, 1], [1, 0, 1], [0, 0, 1])):
        masks = {"w": torch.tensor(mask).bool()}
        save_ticket(ticket_path(tmp_path, level), Ticket(masks, state, trained=state, about={"level": level}))
    figure = lottery.pruning_frontier(find_tickets(tmp_path))
    stays, goes = (np.asarray(points.get_offsets()) for points in figure.axes[0].collections)
    assert stays == pytest.approx(np.array([[0.3, 1.0]])) and goes == pytest.approx(np.array([[0.1, 1.0]]))
    assert lottery.pruning_frontier({0: ticket_path(tmp_path, 0)}) is None
