"""The end of a sweep over methods: gap closed, its table and figures; the callbacks that note what they show."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

from callbacks.feedback_comparison import draw_sweep, gap_closed, read_jobs, summarize
from callbacks.feedback_probe import FeedbackProbe
from callbacks.figures import feedback
from callbacks.step_cost import LiveTensors, StepCost
from tests.lightning_modules import feedback_runs as runs


class TestGapClosed:
    def test_definition(self):
        assert gap_closed([4.0], [8.0], [6.0]) == (0.5, None, None)
        assert gap_closed([4.0], [8.0], [3.0])[0] == pytest.approx(1.25)
        assert gap_closed([4.0], [8.0], [9.0])[0] == pytest.approx(-0.25)
        assert gap_closed([8.0], [8.0], [6.0]) is None and gap_closed([9.0], [8.0], [6.0]) is None

    def test_intervals_cover(self):
        """Of a true value of 0.5, with errors of ten seeds that scatter by a twentieth of the gap."""
        generator = np.random.default_rng(0)
        inside = 0
        for _ in range(60):
            bp, drtp, other = (list(generator.normal(mean, 0.2, 10)) for mean in (4, 8, 6))
            value, low, high = gap_closed(bp, drtp, other)
            assert low < value < high
            inside += low <= 0.5 <= high
        assert 48 <= inside <= 60


def sweep(folder, jobs):
    """A folder of a sweep as the runner leaves it."""
    rows = []
    for i, (algorithm, kind, seed, error) in enumerate(jobs):
        run = folder / str(i)
        run.mkdir()
        record = {
            "config": {"model": {"algorithm": algorithm}, "trainer": {"max_epochs": 2}},
            "epoch": 2,
            "step": {"time/step_s": 2e-3, "memory/peak_tensors_mib": 3.0 + i},
            "feedback": {"cosine": None if algorithm == "llo" else 0.5},
            "energy": {"stages": {"fit/train": {"it_j": 8.0}}},
        }
        (run / "results.json").write_text(json.dumps(record))
        epochs = [{"metrics": {"val/error": error + 2}}, {"metrics": {"val/error": error + 1}}]
        (run / "history.json").write_text(json.dumps({"epochs": epochs}))
        rows.append(
            {"job": i, "model.algorithm": algorithm, "model.feedback.kind": kind, "seed": seed, "parameters": 10}
            | {"status": "completed", "run_dir": str(run), "test/error": error}
        )
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


JOBS = [("f3", "trinomial", s, 6.0 + s) for s in (0, 1)] + [("bp", "trinomial", s, 4.0 + s) for s in (0, 1)]
JOBS += [("drtp", "trinomial", s, 8.0 + s) for s in (0, 1)] + [("llo", "trinomial", s, 9.0 + s) for s in (0, 1)]


def test_a_sweep_ends_with_a_table_and_figures(tmp_path):
    sweep(tmp_path, JOBS)
    jobs = read_jobs(tmp_path)
    assert jobs[0]["label"] == "f3" and jobs[0]["curve"] == [8.0, 7.0] and jobs[0]["epoch_j"] == 4.0
    rows = summarize(jobs)
    assert [row["label"] for row in rows] == ["bp", "f3", "drtp", "llo"]  # bp, then by error
    assert rows[1]["errors"] == [6.0, 7.0] and rows[1]["gap"] == pytest.approx(2) and rows[1]["closed"][0] == 0.5
    assert rows[3]["closed"][0] == pytest.approx(-0.25) and rows[2]["closed"] is None
    text = draw_sweep(tmp_path)
    assert (tmp_path / "gap.md").read_text().rstrip() in text
    line = next(line for line in text.splitlines() if line.startswith("| f3 "))
    assert "6.5 ± 0.71" in line and "+2" in line and "| 50% (" in line and "| no |" in line and "| 0.50 |" in line
    assert {p.stem for p in (tmp_path / "figures").glob("*.png")} == {"error_and_gap", "error_against_epoch", "cost"}


def test_what_else_differs_is_a_condition_with_references_of_its_own(tmp_path):
    jobs = [(a, "trinomial", 0, e) for a, e in (("bp", 4.0), ("drtp", 8.0), ("f3", 6.0))]
    jobs += [(a, "binomial", 0, e) for a, e in (("bp", 4.0), ("drtp", 12.0), ("f3", 6.0))]
    sweep(tmp_path, jobs)
    rows = {row["label"]: row for row in summarize(read_jobs(tmp_path))}
    assert rows["f3 feedback.kind=trinomial"]["closed"][0] == 0.5
    assert rows["f3 feedback.kind=binomial"]["closed"][0] == 0.75
    assert "feedback.kind=binomial" in draw_sweep(tmp_path)


def test_without_references_there_is_no_gap(tmp_path):
    sweep(tmp_path, [("f3", "trinomial", 0, 6.0)])
    assert "| f3 | 6 |  |  | no |" in draw_sweep(tmp_path)
    assert feedback.error_and_gap([]) is None and feedback.error_against_epoch([]) is None
    assert feedback.cost([]) is None and feedback.cosine_by_block([]) is None


class TestLiveTensors:
    def test_bytes_of_what_is_alive(self):
        with LiveTensors() as live:
            a = torch.zeros(256, 1024)
            b = a + 1
            assert live.bytes == 2 * 2**20
            view = b.view(-1)
            del b
            assert live.bytes == 2 * 2**20  # the storage lives on in the view
            del view
            assert live.bytes == 2**20 and live.peak_bytes == 2 * 2**20
            live.reset()
            assert live.peak_bytes == 2**20
        assert a.sum() == 0

    def test_what_backpropagation_keeps(self):
        x = torch.zeros(256, 1024, requires_grad=True)
        with LiveTensors() as live:
            live.watch(x)
            y = x.tanh().tanh().tanh()
            assert live.bytes == 4 * 2**20
            y.sum().backward()
            del y
            assert live.bytes == 2 * 2**20  # x and its gradient


class TestCallbacks:
    def test_cost_of_steps(self):
        cost = StepCost()
        runs.fit(runs.module("f3"), epochs=1, callbacks=(cost,))
        parameters = 4 * sum(p.numel() for p in runs.module("f3").parameters()) / 2**20
        assert (
            cost._peak_mib > 4 * parameters - 1e-3
        )  # gradients of a block, and two moments of Adam, beside the weights
        assert cost._mode is None and cost.state_dict()["peak_mib"] == cost._peak_mib
        again = StepCost()
        again.load_state_dict(cost.state_dict())
        runs.fit(runs.module("f3"), epochs=1, callbacks=(again,))
        assert again._peak_mib == cost._peak_mib

    def test_a_failed_step_leaves_no_mode(self):
        class Fail(runs.pl.Callback):
            def on_before_optimizer_step(self, *_):
                if cost._mode is not None:
                    raise RuntimeError("boom")

        cost = StepCost()
        with pytest.raises(RuntimeError, match="boom"):
            runs.fit(runs.module("f3"), epochs=1, callbacks=(cost, Fail()))
        assert cost._mode is None
        with LiveTensors() as live:  # nothing else is watching
            torch.zeros(3)
        assert live.bytes == 0

    @pytest.mark.parametrize("algorithm", ["f3", "bp", "llo"])
    def test_angles(self, algorithm, tmp_path):
        probe = FeedbackProbe(str(tmp_path / "feedback.json"), every=2, figures_dir=str(tmp_path))
        runs.fit(runs.module(algorithm), epochs=5, callbacks=(probe,))
        history = json.loads((tmp_path / "feedback.json").read_text())
        assert [row["epoch"] for row in history] == [0, 2, 4]
        assert history[0]["blocks"] == ([2] if algorithm == "llo" else [0, 1, 2])
        assert (tmp_path / "cosine_by_block.png").stat().st_size > 0
        if algorithm == "f3":
            assert len(history[2]["alignment"]) == 2 and history[2]["staleness"] > 0
            assert -1 <= history[2]["hidden_cosine"] <= 1
        twin = FeedbackProbe(str(tmp_path / "again.json"))
        twin.load_state_dict(probe.state_dict())
        assert twin.history == probe.history

    def test_it_can_be_off(self, tmp_path):
        probe = FeedbackProbe(str(tmp_path / "feedback.json"), every=None)
        runs.fit(runs.module("f3"), epochs=1, callbacks=(probe,))
        assert not probe.history and not list(tmp_path.iterdir())
        with pytest.raises(ValueError, match=r"callbacks\.feedback_probe\.every=0"):
            FeedbackProbe("x", every=0)
