"""The table of a sweep: overrides x metrics x status."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from runner.sweep_table import job_row, write_tables


def job(folder: Path, number: int, **record) -> dict:
    run_dir = folder / str(number)
    run_dir.mkdir()
    if record:
        (run_dir / "results.json").write_text(json.dumps(record))
    return job_row(run_dir, [f"model.lr=0.{number}", f"name=a=b{number}"], str(number))


def test_rows_of_all_kinds(tmp_path):
    rows = [
        job(tmp_path, 1, status="completed", world_size=2, seconds={"total": 3.5}, metrics={"test/mae": 0.123456789}),
        job(tmp_path, 2, status="failed", error="boom | bang\nsecond line", metrics={"val/mae": 1.0}),
        job(tmp_path, 3),
        job(tmp_path, 4, status="running", metrics={}),
    ]
    assert [row["status"] for row in rows] == ["completed", "failed", "failed", "failed"]
    write_tables(rows, tmp_path)
    stored = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["model.lr"] for row in stored] == ["0.1", "0.2", "0.3", "0.4"]
    assert stored[0]["name"] == "a=b1" and float(stored[0]["test/mae"]) == 0.123456789
    assert stored[1]["error"] == "boom | bang" and stored[2]["error"] and stored[0]["error"] == ""
    assert float(stored[1]["val/mae"]) == 1.0 and stored[0]["val/mae"] == ""
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    assert {line.replace("\\|", "").count("|") for line in lines} == {lines[0].count("|")}
    assert "0.12346" in lines[2] and "boom" in lines[3]


def test_a_second_table_replaces_the_first(tmp_path):
    rows = [job(tmp_path, 1, status="completed", metrics={"test/a": 1.0})]
    write_tables(rows, tmp_path)
    write_tables([*rows, job(tmp_path, 2, status="completed", metrics={"test/b": 2.0})], tmp_path)
    stored = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["test/b"] for row in stored] == ["", "2.0"]
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2", "table.csv", "table.md"}


def test_what_all_jobs_share_is_said_once(tmp_path):
    rows = [job_row(tmp_path, ["experiment=x", f"seed={seed}"], str(seed)) | {"test/mae": 1.0} for seed in (1, 2)]
    write_tables(rows, tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("all jobs: ") and "experiment=x" in lines[0]
    assert "experiment" not in lines[2] and "seed" in lines[2] and "status" in lines[2]
