import math

import pytest
import torch

from lightning_modules.metrics.spectra import RateBuckets, SampleTable, summary


def test_rows_come_back_in_the_order_of_samples_each_once():
    table = SampleTable(("a", "b"))
    table.update(torch.tensor([4, 1]), {"a": torch.tensor([0.4, 0.1]), "b": torch.tensor([4.0, 1.0])})
    table.update(torch.tensor([2, 4]), {"a": torch.tensor([0.2, 0.4]), "b": torch.tensor([2.0, 4.0])})
    found = table.compute()
    assert found["index"].tolist() == [1, 2, 4]
    assert found["a"].tolist() == pytest.approx([0.1, 0.2, 0.4]) and found["b"].tolist() == [1, 2, 4]
    table.reset()
    assert len(table.compute()["a"]) == 0


def test_the_mean_is_that_of_samples_not_of_batches():
    values = torch.rand(13, dtype=torch.float64)
    found = []
    for size in (13, 4, 5, 1):
        table = SampleTable(("mae",))
        for index in torch.arange(13).split(size):
            table.update(index, {"mae": values[index]})
        found.append(summary(table.compute()["mae"]))
    for one in found:
        assert all(torch.equal(one[name], found[0][name]) for name in one)
    assert found[0]["mean"] == pytest.approx(values.mean().item())


def test_median_and_percentile():
    found = summary(torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 10.0, 9.0, 8.0, 7.0, 6.0]).double())
    assert found["median"] == 5.5 and found["p90"] == 9 and found["mean"] == 5.5
    assert summary(torch.tensor([2.0]).double())["p90"] == 2
    assert all(math.isnan(value) for value in summary(torch.zeros(0)).values())


def test_a_failed_simulation_shows_in_the_mean():
    assert math.isinf(summary(torch.tensor([0.1, torch.inf]).double())["mean"])


def test_tokens_are_counted_by_mask_rate():
    buckets = RateBuckets((0.0, 0.5, 1.0))
    nll = torch.tensor([[1.0, 3.0], [5.0, 7.0], [9.0, 0.0]])
    correct = torch.tensor([[True, False], [True, True], [True, False]])
    counted = torch.tensor([[True, True], [True, False], [True, False]])
    buckets.update(nll, correct, counted, torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64))
    found = {name: value.item() for name, value in buckets.compute().items()}
    assert found["loss"] == pytest.approx(18 / 4) and found["accuracy"] == pytest.approx(3 / 4)
    assert found["loss_0_50"] == 2 and found["loss_50_100"] == 7
    assert found["accuracy_0_50"] == 0.5 and found["accuracy_50_100"] == 1
    buckets.reset()
    buckets.update(nll, correct, counted, torch.full((3,), 0.9).double())
    assert "loss_0_50" not in buckets.compute()
