from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import pytest

from callbacks.energy.__main__ import main
from callbacks.energy.record import Counts, RecordFile, start_record
from callbacks.energy.recorder import Recorder
from callbacks.energy.report import Section, markdown, page, run_page, run_summary, trace_points
from callbacks.figures import energy as plots
from tests.callbacks.energy.finished_runs import channel, cpu_run, finish, gpu_run, record
from tests.callbacks.energy.sources import Clock, Source, sine

EPOCHS = [
    {
        "epoch": i, "it_kwh": 1e-4, "train_kwh": 8e-5, "val_kwh": 1e-5, "duration_s": 3.0, "mean_w": 120.0,
        "j_per_sample": 1.2, "cumulative_kwh": 1e-4 * (i + 1), "metrics": {"val/loss": 1 / (i + 1)},
    }
    for i in range(3)
]  # fmt: skip


def cells(text: str) -> dict[str, list[str]]:
    """First cell -> the others, of every table of a page."""
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    plain = [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row)] for row in rows]
    return {row[0]: row[1:] for row in plain if row}


def images(text: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]


def test_the_trace_in_the_file_is_that_of_the_recorder(tmp_path):
    clock, path = Clock(), tmp_path / "a.jsonl"
    source = Source(sine(100.0, 50.0, 3.0)[0], clock=clock)
    file = RecordFile(path)
    assert file.acquire()
    recorder = Recorder([source], 1e6, file.write, overhead_w=7.0, clock=clock)
    file.write(start_record("node", "abc", 1, 1.0, [source.channel], 0.0))
    step = 0
    recorder.step = lambda: step
    recorder.start("startup")
    for step in range(400):
        recorder.switch(("fit/train", "fit/val")[step // 40 % 2])
        clock.now += 0.02 + 0.001 * (step % 7)
        recorder.read()
    recorder.stop()
    file.close()
    expected, (points, parts) = recorder.trace.points(), trace_points(path)
    assert parts == 1 and len(points) == len(expected) > 100
    for one, other in zip(points, expected, strict=True):
        assert (one.label, one.step) == (other.label, other.step)
        assert one.time_s == pytest.approx(other.time_s, abs=1e-5)
        assert one.total_w == pytest.approx(other.total_w, rel=1e-3)
        assert one.watts["cpu"] == pytest.approx(other.watts["cpu"], rel=1e-3)


def test_a_page_of_a_run(tmp_path):
    gpu_run(tmp_path, gpus={"gpu0": 300.0, "gpu1": 60.0}, epochs=EPOCHS)
    text = run_page(tmp_path)
    found = cells(text)
    assert "From energy/summary.json." in text and "<title>Energy of load" in text
    assert found["energy of the machines"] == ["7,140 J (0.00198 kWh)"]
    assert found["energy of the facility (PUE 1.2)"] == ["8,568 J (0.00238 kWh)"]
    assert found["fit/train"][:3] == ["2,520", "6", "420"] and found["fit/train"][4:6] == ["3,000", "100"]
    assert found["gpu1"][:5] == ["gpu", "measured", "1,020", "60", "instrument of the test"]
    assert found["2"][:1] == ["360"]  # the third epoch
    assert len(images(text)) == 3 and all(image.startswith(b"\x89PNG") for image in images(text))
    assert not [word for word in ("http:", "https:", "<script", "<link", "url(") if word in text]


def test_estimates_are_marked(tmp_path):
    cpu_run(tmp_path)
    assert '<span class="tag estimated">estimated</span>' in run_page(tmp_path)
    assert cells(run_page(tmp_path))["measured by an instrument"] == ["0 %"]


def test_the_same_run_gives_the_same_bytes(tmp_path, capsys):
    gpu_run(tmp_path / "a" / "run", epochs=EPOCHS)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    pages = []
    for place in ("a", "b"):
        assert main(["report", str(tmp_path / place / "run")]) == 0
        path = tmp_path / place / "run" / "energy_report.html"
        assert str(path) in capsys.readouterr().out
        pages.append(path.read_bytes())
    assert main(["report", str(tmp_path / "a" / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert pages[0] == pages[1] == (tmp_path / "page.html").read_bytes()


def test_two_machines_have_a_figure_each(tmp_path):
    counts = Counts({"fit/train": 100, "test": 50}, {"fit/train": 10})
    hosts = [
        record(tmp_path / "energy" / f"node-{host}.jsonl", {channel("cpu"): watts}, counts=counts, host=host)
        for host, watts in (("one", 60.0), ("two", 80.0))
    ]
    finish(tmp_path, hosts, counts, world_size=2)
    text = run_page(tmp_path)
    assert 'alt="power over time, node-one"' in text and 'alt="power over time, node-two"' in text
    found = cells(text)
    assert found["node-one one"][0] == "5,220" and found["node-two two"][0] == "6,960"
    assert {"node-one/cpu", "node-two/cpu"} <= set(found)


def test_a_killed_run_is_read_from_its_records(tmp_path):
    counts = Counts({"fit/train": 100}, {"fit/train": 10})
    host = record(tmp_path / "energy" / "node-abc.jsonl", {channel("cpu"): 60.0}, counts=counts, end=None)
    finish(tmp_path, [], counts, status="running", epochs=EPOCHS[:1])  # what it had published before is older
    summary, source = run_summary(tmp_path)
    assert summary["it_j"] == pytest.approx(60 * 87) and "did not end in order" in source
    assert summary["pue"] == 1.2 and summary["carbon_intensity_g_per_kwh"] == 400.0
    assert summary["epochs"] == EPOCHS[:1] and host.status == "killed"
    assert cells(run_page(tmp_path))["status"] == ["killed"]


def test_a_run_that_was_killed_before_its_first_report_keeps_its_building(tmp_path):
    path = tmp_path / "energy" / "node-abc.jsonl"
    record(path, {channel("cpu"): 60.0}, counts=Counts({"test": 5}), end=None)
    lines = path.read_text().splitlines()
    start = json.loads(lines[0]) | {"facility": {"pue": 1.3, "intensity": 250.0, "source": "here"}}
    path.write_text("\n".join([json.dumps(start), *lines[1:]]) + "\n")
    (tmp_path / "results.json").write_text(json.dumps({"status": "running", "metrics": {}}))
    summary, _ = run_summary(tmp_path)
    assert (summary["pue"], summary["carbon_intensity_g_per_kwh"]) == (1.3, 250.0)
    assert summary["co2_kg"] == pytest.approx(60 * 87 / 3.6e6 * 1.3 * 0.25)


def test_only_the_record_is_left(tmp_path):
    """The files of one machine, copied somewhere without anything else."""
    record(tmp_path / "node-abc.jsonl", {channel("cpu"): 60.0}, counts=Counts({"test": 5}))
    assert cells(run_page(tmp_path))["test"][:2] == ["1,200", "20"]


def test_a_resumed_run_shows_its_last_part(tmp_path):
    path = tmp_path / "energy" / "node-abc.jsonl"
    record(path, {channel("cpu"): 60.0}, [("startup", 2.0), ("fit/train", 40.0)], end=None)
    counts = Counts({"fit/train": 100, "test": 50}, {"fit/train": 10})
    host = record(path, {channel("cpu"): 80.0}, counts=counts)
    finish(tmp_path, [host], counts)
    points, parts = trace_points(path)
    assert parts == 2 and {round(point.total_w) for point in points} == {80}
    assert "the last of 2 parts is drawn" in run_page(tmp_path)


def test_what_cannot_be_reported(tmp_path, capsys):
    for folder, message in ((tmp_path / "none", "is no folder"), (tmp_path, "no energy/*.jsonl")):
        assert main(["report", str(folder)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 2
    assert "results.json" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_a_run_without_record_files_still_has_a_page(tmp_path):
    cpu_run(tmp_path)
    shutil.rmtree(tmp_path / "energy")
    text = run_page(tmp_path)
    assert "From results.json." in text and len(images(text)) == 1


def test_text_is_escaped(tmp_path):
    section = Section("<b>", ["a & b"], ("name", "value"), [("<i>|", "1,200"), ("x", "-")])
    html, text = page("<t>", [section]), markdown("t", [section])
    assert "<b>" not in html and "<i>" not in html and "a &amp; b" in html
    assert '<td class="n">1,200</td>' in html and "| <i>\\| | 1,200 |" in text and "|---|---:|" in text
    cpu_run(tmp_path, name="<script>alert(1)</script>")
    assert "<script>" not in run_page(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["name"].startswith("<script>")


def test_main_module_runs(tmp_path):
    import subprocess
    import sys

    cpu_run(tmp_path)
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "callbacks.energy", "report", str(tmp_path)]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "energy_report.html" in run.stdout, run.stderr


def test_stages_and_components_have_colours_of_their_own():
    assert not set(plots.STAGES.values()) & set(plots.COMPONENTS.values())
