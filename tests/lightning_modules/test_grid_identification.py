"""Identification: right without noise, exact over batches, bounds and priors hold, gradients lead to the same."""

from __future__ import annotations

from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch

from datamodules.grid_measurements import GridMeasurements
from lightning_modules.power_flow import GridIdentification
from strategies.ddp import DDP
from tests.lightning_modules.test_power_flow import trainer


def identified(module: GridIdentification, data: GridMeasurements, epochs: int = 20) -> dict[str, float]:
    run = trainer(max_epochs=epochs)
    run.fit(module, data)
    return {key: float(value) for key, value in run.test(module, data, verbose=False)[0].items()}


def small(**options) -> GridMeasurements:
    return GridMeasurements(**{"num_train": 12, "num_val": 2, "num_test": 3} | options)


def test_without_noise_the_truth_is_found():
    values = identified(GridIdentification(), small(noise=0.0))
    assert values["test/start_error_median"] > 0.1 and values["test/parameter_error_max"] < 1e-6
    assert values["test/vm_max_pu"] < 1e-9 and values["test/loss"] < 1e-6


def test_noise_costs_what_statistics_say():
    """Half of the mean square of errors in units of their noise, and errors of the size of their standard errors."""
    data = GridMeasurements(noise=1e-4)
    module = GridIdentification()
    values = identified(module, data)
    assert values["test/loss"] == pytest.approx(0.5, abs=0.1)
    run = trainer()
    out = run.predict(module, data)[0]
    score = (out["parameter_found"] - out["parameter_true"]) / out["parameter_std"]
    assert 0.5 < float(score.square().mean().sqrt()) < 1.6


def test_batches_change_nothing():
    """The step is that of all scenarios, whatever batches they come in."""
    one, several = GridIdentification(), GridIdentification()
    identified(one, small(), epochs=3)
    identified(several, small(batch_size=5), epochs=3)
    torch.testing.assert_close(one.raw, several.raw, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "fields", [{"tap": None, "b": None}, {"r": None}, {"p_load_mw": ["Bus 9 LV"], "q_load_mvar": ["Bus 9 LV"]}]
)
def test_other_parameters(fields):
    data = small(unknown=fields, quantities=["vm", "va", "p_from", "q_from", "p_to", "q_to"], noise=1e-6)
    assert identified(GridIdentification(), data)["test/parameter_error_max"] < 0.01


def test_gradients_lead_to_the_same():
    data = small(noise=1e-4)
    exact, other = GridIdentification(), GridIdentification("gradient", optimizer=lbfgs)
    identified(exact, data)
    values = identified(other, data, epochs=5)
    torch.testing.assert_close(exact.raw, other.raw, rtol=0, atol=2e-3)
    assert values["test/parameter_error_median"] < 0.02


def lbfgs(params) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(
        params,
        max_iter=30,
        history_size=30,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )


def test_bounds_hold():
    data = small(noise=1e-3, unknown={"x": None}, start_error={"x": 0.05})
    module = GridIdentification(bounds={"x": [0.03, 0.3]})
    data.setup()
    with pytest.raises(ValueError, match=r"bounds \[0\.03, 0\.3\] of x leave out the start"):
        identified(module, data)
    module = GridIdentification(bounds={"x": [0.03, 0.7]})
    identified(module, data, epochs=6)
    values = torch.tensor(list(module.parameters_by_name().values()))
    assert ((values > 0.03) & (values < 0.7)).all()


def test_a_strong_prior_keeps_the_start():
    data = small(noise=1e-3)
    free, held = GridIdentification(), GridIdentification(prior={"x": 1e-6})
    assert identified(free, data, epochs=6)["test/parameter_error_median"] < 0.15
    identified(held, data, epochs=6)
    assert float(held.raw.abs().max()) < 1e-3 < float(free.raw.abs().max())


def test_a_step_too_far_is_taken_back():
    """Cost never rises, also from a start so wrong that some steps have no power flow."""
    data = small(start_error={"x": 0.9}, seed=3)
    costs = []

    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            costs.append(float(module.cost))

    module = GridIdentification()
    trainer(max_epochs=25, callbacks=[Keep()]).fit(module, data)
    assert all(later <= earlier for earlier, later in pairwise(costs)) and costs[-1] < costs[0]


def _identify(folder: str, devices: int) -> None:
    several = {"devices": 2, "strategy": DDP()} if devices == 2 else {}
    module, run = GridIdentification(), trainer(max_epochs=4, **several)
    run.fit(module, small(num_train=9, batch_size=4))
    if run.is_global_zero:
        torch.save(module.raw.data, f"{folder}/{devices}.pt")


def test_two_processes_take_the_step_of_one(ranks2, tmp_path):
    ranks2(_identify, str(tmp_path), 2)
    _identify(str(tmp_path), 1)
    one, two = (torch.load(tmp_path / f"{number}.pt") for number in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_parameters_by_name():
    data = small(unknown={"x": None})
    module = GridIdentification()
    identified(module, data, epochs=1)
    assert next(iter(module.parameters_by_name())) == f"x {data.grid.branch_names[0]}"


def test_it_resumes_exactly(tmp_path):
    whole = GridIdentification()
    trainer(max_epochs=4).fit(whole, small())
    first = trainer(max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path)
    first.fit(GridIdentification(), small())
    first.save_checkpoint(tmp_path / "part.ckpt")
    rest = GridIdentification()
    trainer(max_epochs=4).fit(rest, small(), ckpt_path=tmp_path / "part.ckpt")
    assert torch.equal(rest.raw, whole.raw) and torch.equal(rest.cost, whole.cost)
    bare = GridIdentification()
    bare.load_state_dict(torch.load(tmp_path / "part.ckpt", weights_only=True)["state_dict"])
    assert len(bare.raw) == 20


MISTAKES = {
    "method": ({"method": "newton"}, r"model\.method='newton' is unknown; choose gauss_newton or gradient"),
    "optimizer": ({"method": "gradient"}, r"model\.method=gradient needs an optimizer"),
    "bounds": ({"bounds": {"x": [1.0]}}, r"model\.bounds\.x=\[1\.0\]: give the smallest and the largest"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_name_the_key(what):
    options, text = MISTAKES[what]
    with pytest.raises(ValueError, match=text):
        GridIdentification(**options)


@pytest.mark.parametrize("key", ["forms", "bounds", "prior"])
def test_settings_of_fields_that_are_known(key):
    value = {"forms": "log", "bounds": [0.1, 1.0], "prior": 0.5}[key]
    with pytest.raises(ValueError, match=rf"model\.{key} names 'r', which is not among data\.unknown: x"):
        identified(GridIdentification(**{key: {"r": value}}), small())
