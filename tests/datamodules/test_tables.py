"""Tables of numbers: files in the wild's format, the model of kernel times, and the parts of both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.readers.number_table import read_number_table
from datamodules.synthetic_gemm import PARAMETERS, combinations, run_times_ms, synthetic_gemm
from datamodules.tables import Tables
from lightning_modules.feedback import FeedbackRegressor
from networks.feedback import Perceptron
from runner import job
from tests.composing import composed, plain
from tests.lightning_modules import feedback_runs as runs
from tests.lightning_modules.tiny_series import quiet_trainer

NAMES = ["fixed acidity", "pH", "quality"]


def write(path, rows, separator=";", names=NAMES):
    """A file as UCI's: names in quotation marks."""
    lines = [separator.join(f'"{name}"' for name in names), *(separator.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


class TestReader:
    @pytest.mark.parametrize("separator", [";", ","])
    def test_files_below_each_other(self, separator, tmp_path):
        red = write(tmp_path / "red.csv", [(7.4, 3.51, 5), (7.8, 3.2, 6)], separator)
        white = write(tmp_path / "white.csv", [(7, 3, 6)], separator)
        x, y, names = read_number_table([red, white], ["quality"], "colour")
        assert names == ["fixed acidity", "pH", "colour"]
        assert x.tolist() == [[7.4, 3.51, 0], [7.8, 3.2, 0], [7, 3, 1]] and y.tolist() == [[5], [6], [6]]
        x, _, names = read_number_table([red], ["quality", "pH"])
        assert names == ["fixed acidity"] and x.shape == (2, 1)

    def test_what_is_wrong_is_named(self, tmp_path):
        good = write(tmp_path / "a.csv", [(1, 2, 3)])
        cases = {
            "b.csv, line 3: column 'pH' has no number": write(tmp_path / "b.csv", [(1, 2, 3), (1, "acid", 3)]),
            "c.csv, line 2: 2 values for 3 columns": write(tmp_path / "c.csv", [(1, 2)]),
            "d.csv has no rows": write(tmp_path / "d.csv", []),
        }
        for message, path in cases.items():
            with pytest.raises(ValueError, match=message):
                read_number_table([path], ["quality"])
        with pytest.raises(ValueError, match=r"data\.target: .*a\.csv has no column 'grade'; it has fixed acidity, pH"):
            read_number_table([good], ["grade"])
        other = write(tmp_path / "e.csv", [(1, 2, 3)], names=["a", "b", "quality"])
        with pytest.raises(ValueError, match="has other columns than"):
            read_number_table([good, other], ["quality"])


class TestKernelTimes:
    def test_the_combinations_are_those_of_the_real_kernel(self):
        found = combinations()
        assert found.shape == (241_600, 14)  # as many as were measured
        assert len(np.unique(found[::50], axis=0)) == len(found[::50])
        for column, values in zip(found.T, PARAMETERS.values(), strict=True):
            assert set(np.unique(column)) == set(values)

    def test_times_are_positive_skewed_and_interact(self):
        every = combinations()[::97]
        times = run_times_ms(every)
        assert (times > 2).all() and times.max() > 20 * times.min()  # 2048^3 at the peak take 4.3 ms
        assert times.mean() > np.median(times)
        # A linear model of the parameters leaves much of the variance, a step in each of two adds up to no sum.
        design = np.column_stack([np.log2(every.astype(float) + 1), np.ones(len(every))])
        logarithm = np.log(times)
        left = logarithm - design @ np.linalg.lstsq(design, logarithm, rcond=None)[0]
        assert left.var() > 0.05 * logarithm.var()

    def test_rows_are_repeats_with_noise(self):
        x, y = synthetic_gemm(None, 0.01, seed=0)
        assert x.shape == (966_400, 14) and y.shape == (966_400, 1)
        repeats = np.log(y.reshape(-1, 4))
        assert repeats.std(1, ddof=1).mean() == pytest.approx(0.0092, rel=0.02)  # of four: 0.921 sigma
        again = synthetic_gemm(100, 0.01, seed=3)
        assert all(map(np.array_equal, again, synthetic_gemm(100, 0.01, seed=3)))
        with pytest.raises(ValueError, match=r"data\.num_rows=0: must be 1 to 966400"):
            synthetic_gemm(0, 0.0, 0)


def tables(tmp_path, **options):
    generator = np.random.default_rng(0)
    x = generator.normal(3, 2, (50, 2))
    write(tmp_path / "rows.csv", [(*row, row.sum() + 10) for row in x])
    settings = {"reader": "csv", "file": "rows.csv", "data_dir": str(tmp_path), "target": ["quality"]}
    settings |= {"num_features": 2, "batch_size": 10}
    return Tables(**(settings | options))


class TestTables:
    def test_parts_are_disjoint_and_standardised_by_the_training_part(self, tmp_path):
        data = tables(tmp_path)
        data.setup()
        sets = {name: getattr(data, f"{name}_dataloader")().dataset for name in ("train", "val", "test")}
        rows = {name: found.__getitems__(list(range(len(found)))) for name, found in sets.items()}
        assert {name: len(found["index"]) for name, found in rows.items()} == {"train": 35, "val": 5, "test": 10}
        torch.testing.assert_close(rows["train"]["features"].mean(0), torch.zeros(2), rtol=0, atol=1e-6)
        torch.testing.assert_close(rows["train"]["target"].std(0, unbiased=False), torch.ones(1))
        everything = torch.cat([found["features"] for found in rows.values()])
        assert len(everything.unique(dim=0)) == 50
        units = data.in_units(rows["test"]["target"])
        assert float(units.mean()) == pytest.approx(16, abs=3)

    def test_batches(self, tmp_path):
        data = tables(tmp_path)
        data.setup()
        batches = list(data.train_dataloader())
        assert len(batches) == 3 and batches[0]["features"].shape == (10, 2) and batches[0]["target"].shape == (10, 1)
        index = torch.cat([batch["index"] for batch in batches])
        assert len(index.unique()) == 30 and index.max() < 35
        assert tables(tmp_path, val_fraction=0.0).val_fraction == 0

    def test_logarithm(self, tmp_path):
        data = tables(tmp_path, log_target=True)
        data.setup()
        plain = tables(tmp_path)
        plain.setup()
        a, b = (d.in_units(next(iter(d.test_dataloader()))["target"].double()) for d in (data, plain))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def test_a_checkpoint_keeps_the_standardisation(self, tmp_path):
        data = tables(tmp_path)
        data.setup()
        other = tables(tmp_path, split_seed=7)
        other.setup()
        other.load_state_dict(data.state_dict())
        assert torch.equal(other.in_units(torch.zeros(1, 1)), data.in_units(torch.zeros(1, 1)))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"reader": "xls"}, r"data\.reader='xls' is unknown"),
            ({"file": None}, r"data\.reader=csv needs at least one"),
            ({"target": None}, r"data\.target: name the columns"),
            ({"test_fraction": 0.0}, r"data\.test_fraction=0\.0"),
            ({"val_fraction": 0.8}, r"data\.val_fraction=0\.8"),
            ({"batch_size": 0}, r"data\.batch_size=0"),
            ({"noise": -1.0}, r"data\.noise=-1\.0"),
            ({"num_features": 3}, r"data\.num_features=3, but the data have 2"),
            ({"num_targets": 2}, r"data\.num_targets=2, but the data have 1"),
        ],
    )
    def test_wrong_settings_are_named(self, options, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            tables(tmp_path, **options).setup()

    def test_a_missing_file_is_named(self, tmp_path):
        data = tables(tmp_path, file="none.csv", source="https://example.org")
        with pytest.raises(FileNotFoundError, match=r"no file .*none\.csv .*data\.data_dir=.*https://example\.org"):
            data.prepare_data()

    def test_targets_that_have_no_logarithm(self, tmp_path):
        write(tmp_path / "rows.csv", [(1, 2, -1)] * 20)
        data = Tables("csv", "rows.csv", str(tmp_path), target=["quality"], num_features=2, log_target=True)
        with pytest.raises(ValueError, match=r"data\.log_target=true: some targets are not positive"):
            data.setup()


def test_a_trainer_takes_it(tmp_path):
    data = tables(tmp_path)
    net = Perceptron((2,), 1, 1, 8)
    module = FeedbackRegressor(net, runs.ADAM, objective="mse", input_shape=(2,), num_outputs=1, algorithm="f3")
    trainer = quiet_trainer(max_epochs=40)
    trainer.fit(module, datamodule=data)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    assert found["test/mse"] < 0.3 and 0 < found["test/mape"] < 30
    predictions = torch.cat([o["prediction"] for o in trainer.predict(module, datamodule=data)])
    assert predictions.shape == (10, 1) and float(predictions.mean()) == pytest.approx(16, abs=4)


WINE = [*(f"property {i}" for i in range(11)), "quality"]  # as many columns as UCI's files


@pytest.mark.parametrize("separator", [";", ","])
def test_the_experiment_reads_the_files_of_a_user(separator, tmp_path):
    generator = np.random.default_rng(0)
    for name, rows in (("red", 60), ("white", 140)):
        x = generator.normal(size=(rows, 11)).round(3)
        table = [(*row, grade) for row, grade in zip(x, (5 + x[:, 0]).round().astype(int), strict=True)]
        write(tmp_path / f"winequality-{name}.csv", table, separator, WINE)
    lean = ("logger=none", "callbacks=none", "num_threads=1", "trainer.max_epochs=3")
    config = composed("experiment=f3/wine", f"data_dir={tmp_path}", *lean, run_dir=tmp_path / "run")
    result = job.run(plain(config))
    assert result["status"] == "completed", result.get("error")
    assert 0 < result["metrics"]["test/mse"] < 1.5
    _, data = job.build(plain(config))
    data.setup()
    (batch,) = data.test_dataloader()
    assert batch["features"].shape == (40, 12)
    assert len(batch["features"][:, -1].unique()) == 2  # red and white, standardised


def test_the_stand_in_needs_no_file(tmp_path):
    lean = ("logger=none", "callbacks=none", "num_threads=1", "trainer.max_epochs=1", "data.num_rows=500")
    result = job.run(plain(composed("experiment=f3/gemm", *lean, run_dir=tmp_path)))
    assert result["status"] == "completed", result.get("error")
    assert result["metrics"]["test/mse"] > 0
