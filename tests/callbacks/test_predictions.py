from __future__ import annotations

import pandas as pd
import pytest

from callbacks.predictions import PredictionWriter
from lightning_modules.recycle import ReCycle
from tests.lightning_modules.tiny_series import DAY, LinearNet, TinySeries, quiet_trainer


def predict(folder: str, **kwargs) -> list:
    trainer = quiet_trainer(callbacks=[PredictionWriter(folder)], **kwargs)
    return trainer.predict(ReCycle(LinearNet(zero=True)), datamodule=TinySeries(batch_size=1))


def test_table_holds_every_step_of_every_series_once(tmp_path):
    outputs = predict(str(tmp_path / "predictions"))
    table = pd.read_csv(tmp_path / "predictions" / "forecast.csv", parse_dates=["origin", "timestamp"])
    assert len(table) == 2 * 2 * 10
    assert list(table.columns) == ["series", "origin", "timestamp", "forecast", "rhp"]
    assert table.series.tolist() == ["north"] * 20 + ["south"] * 20
    data = TinySeries()
    data.setup()
    last = table[(table.series == "south") & (table.origin == table.origin.max())]
    assert last.timestamp.iloc[0] == data.timestamps[-1] + data.step
    assert (last.timestamp.diff().dropna() == data.step).all()
    assert last.forecast.tolist() == pytest.approx(outputs[1]["prediction"][0, :, 1].tolist())
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["forecast.csv"]


def test_outputs_are_returned_as_well(tmp_path):
    assert [out["origin"].item() for out in predict(str(tmp_path))] == [59 * DAY, 60 * DAY]


def _predict_on_two(folder: str, num_origins: int) -> None:
    from lightning.pytorch.strategies import DDPStrategy

    class Few(TinySeries):
        def predict_dataloader(self):
            loader = super().predict_dataloader()
            loader.dataset.origins = loader.dataset.origins[-num_origins:]
            return loader

    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = quiet_trainer(callbacks=[PredictionWriter(folder)], devices=2, strategy=strategy)
    trainer.predict(ReCycle(LinearNet(zero=True)), datamodule=Few(batch_size=1), return_predictions=False)


@pytest.mark.parametrize("num_origins", [1, 2])
def test_ranks_write_the_table_of_one_process(ranks2, tmp_path, num_origins):
    ranks2(_predict_on_two, str(tmp_path / "two"), num_origins)
    predict(str(tmp_path / "one"))
    one = pd.read_csv(tmp_path / "one" / "forecast.csv")
    one = one[one.origin >= sorted(set(one.origin))[-num_origins]].reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "two" / "forecast.csv"), one)


def test_rows_given_twice_are_written_once(tmp_path):
    class Padded(TinySeries):
        def prediction_table(self, outputs):
            table = super().prediction_table(outputs)
            return pd.concat([table, table])

    trainer = quiet_trainer(callbacks=[PredictionWriter(tmp_path)])
    trainer.predict(ReCycle(LinearNet(zero=True)), datamodule=Padded())
    assert len(pd.read_csv(tmp_path / "forecast.csv")) == 40


def test_an_interrupted_write_leaves_the_old_table(tmp_path, monkeypatch):
    predict(str(tmp_path))
    before = (tmp_path / "forecast.csv").read_bytes()

    def torn(self, path, **kwargs):
        path.write_text("series,orig")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", torn)
    with pytest.raises(OSError, match="disk full"):
        predict(str(tmp_path))
    assert (tmp_path / "forecast.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["forecast.csv"]


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match=r"\.csv or \.parquet"):
        PredictionWriter("predictions", "forecast.xlsx")
