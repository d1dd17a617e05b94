"""The table of what each layer of a model in parts receives."""

from __future__ import annotations

import csv

import pytest

from callbacks.layer_communication import LayerCommunication
from callbacks.run_record import RunRecord
from tests.composing import composed, plain
from tests.strategies import mixers


class Record(RunRecord):
    """Keeps what callbacks note, without a folder."""

    def __init__(self):
        self.record = {}


def counted(grid, folder, steps):
    callback, record = LayerCommunication(folder, steps), Record()
    for hook in [name for name in dir(RunRecord) if name.startswith("on_") or name in ("setup", "teardown")]:
        setattr(record, hook, lambda *args, **kwargs: None)
    mixers.fit(grid, folder, 3, trainer_options={"callbacks": [callback, record]}, dropout=0.0)
    return callback.rows, record.record


@pytest.mark.parametrize("steps", [2, 10])
def test_the_table_is_what_the_formulas_say(ranks2, tmp_path, steps):
    for rows, record in ranks2(counted, {"channel": 2}, str(tmp_path), steps):
        assert {row["layer"] for row in rows} >= {"embedding", "blocks.0.token_in", "blocks.1.channel_norm", "recovery"}
        for row in rows:
            assert row["received_bytes_per_step"] == pytest.approx(row["formula_bytes"]), row["layer"]
            assert (row["calls_per_step"] > 0) == (row["formula_bytes"] > 0)
        assert {row["travelling"] for row in rows} >= {"weights", "statistics"}
        found = record["layer_communication"]
        assert found["steps"] == min(steps, 3)
        total = sum(row["formula_bytes"] for row in rows)
        assert total > 0 and found["received_bytes_per_step"] == pytest.approx(total)
    with open(tmp_path / "layer_communication.csv") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows) and float(written[0]["formula_bytes"]) == rows[0]["formula_bytes"]


def test_whole_models_have_nothing_to_count(ranks2, tmp_path):
    for rows, record in ranks2(counted, {}, str(tmp_path), 2):  # two instances of a whole model
        assert rows == [] and record == {}
    assert not (tmp_path / "layer_communication.csv").exists()


def test_weather_has_an_option_with_all():
    callbacks = {
        name: plain(composed("experiment=weather", f"callbacks={name}"))["callbacks"]
        for name in ("weather", "layer_communication", "weather_profile")
    }
    assert callbacks["weather_profile"] == callbacks["weather"] | callbacks["layer_communication"]
    assert {"figures", "skill", "forecasts", "layer_communication"} <= callbacks["weather_profile"].keys()


def test_steps_are_counted_from_one(tmp_path):
    with pytest.raises(ValueError, match=r"callbacks\.layer_communication\.steps=0"):
        LayerCommunication(str(tmp_path), 0)
