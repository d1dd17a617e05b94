"""Modules of power flows: what they solve, log and return, and that training is what the solver does."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from datamodules.power_grids import PowerGrids
from lightning_modules.metrics.power_flow import FlowErrors, ScreeningErrors, VoltageErrors
from lightning_modules.power_flow import OutageAnalysis, PowerFlowDescent, PowerFlowSolver
from physics.power_flow import METHODS, AdamSettings, Scenarios, solve
from physics.power_flow.first_order import SERIES_FIRST, SERIES_FOLLOWING
from strategies.ddp import DDP

F64 = torch.float64


def trainer(**options) -> pl.Trainer:
    defaults = {"enable_checkpointing": False, "max_epochs": 1, "devices": 1}
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=False, **defaults | options,
    )  # fmt: skip


def evaluated(module: pl.LightningModule, data: PowerGrids) -> dict[str, float]:
    return {key: float(value) for key, value in trainer().test(module, data, verbose=False)[0].items()}


def series(**options) -> PowerGrids:
    return PowerGrids(**{"grid": "case14", "kind": "series", "num_scenarios": 6} | options)


# ------------------------------------------------------------------------------------------------------------ solver


@pytest.mark.parametrize("method", ["chord", "newton", "fdlf_xb", "fdlf_bx", "lm"])
def test_every_exact_method_solves_every_scenario(method):
    values = evaluated(PowerFlowSolver(method), series())
    assert values["test/converged_share"] == 1 and values["test/unsolved"] == 0
    assert values["test/max_mismatch_pu"] <= 1e-8 and values["test/dv_max_pu"] < 1e-7
    assert values["test/scenarios"] == 6 and values["test/loss"] == values["test/mse"] < 1e-15
    assert values["test/seconds_per_flow"] > 0


def test_batches_do_not_change_what_is_logged():
    one, several = (evaluated(PowerFlowSolver("newton"), series(eval_batch_size=size)) for size in (100, 4))
    for name, value in one.items():
        if "seconds" not in name:
            assert several[name] == pytest.approx(value, rel=1e-4, abs=1e-12), name


def test_predictions_have_all_flows():
    data = series(eval_batch_size=4)
    outputs = trainer().predict(PowerFlowSolver("newton"), data)
    assert [len(out["scenario"]) for out in outputs] == [4, 2]
    out = outputs[0]
    grid = data.grid
    batch = data.batch(out["scenario"].numpy())
    solution = solve(grid, Scenarios(torch.complex(batch["p_mw"], batch["q_mvar"]).mT / 100))
    torch.testing.assert_close(out["vm_pu"], solution.vm.mT, rtol=0, atol=1e-8)
    torch.testing.assert_close(out["prediction"], torch.polar(out["vm_pu"], torch.deg2rad(out["va_degree"])))
    # What is fed in is what was asked for, and what flows into the branches and shunts.
    free = torch.cat([grid.pv, grid.pq])
    torch.testing.assert_close(out["p_mw"][:, free], batch["p_mw"][:, free], rtol=0, atol=1e-5)
    torch.testing.assert_close(out["q_mvar"][:, grid.pq], batch["q_mvar"][:, grid.pq], rtol=0, atol=1e-5)
    losses = (out["p_from_mw"] + out["p_to_mw"]).sum(1)
    torch.testing.assert_close(out["p_mw"].sum(1), losses, rtol=0, atol=1e-5)
    assert out["loading_percent"].isnan().all()  # the case has no limits
    assert out["i_from_ka"].isnan().all()  # nor nominal voltages


def test_currents_are_those_of_powers_and_voltages():
    data = PowerGrids("case118")
    out = trainer().predict(PowerFlowSolver("newton"), data)[0]
    grid = data.grid
    for end, bus in (("from", grid.from_bus), ("to", grid.to_bus)):
        s = torch.hypot(out[f"p_{end}_mw"], out[f"q_{end}_mvar"])
        kv = grid.vn_kv[bus] * out["vm_pu"][:, bus]
        torch.testing.assert_close(out[f"i_{end}_ka"], s / (3**0.5 * kv))


def test_limits_are_counted():
    data = PowerGrids("case14", limits="base", limit_factor=0.5)
    assert evaluated(PowerFlowSolver(), data)["test/overloads"] == 20
    data = PowerGrids("case33bw", load_scale=1.2)
    values = evaluated(PowerFlowSolver(), data)
    assert values["test/low_voltages"] > 5 and values["test/high_voltages"] == 0


def test_steps_with_outages_are_solved_one_by_one():
    """Other injections and other branches in every scenario of a batch; what is islanded has no numbers."""
    data = PowerGrids("case14", kind="mixed", num_scenarios=40)
    out = trainer().predict(PowerFlowSolver("chord"), data)[0]
    cut = out["islanding"]
    assert 0 < int(cut.sum()) < 10 and out["vm_pu"][cut].isnan().all() and not out["converged"][cut].any()
    assert out["converged"][~cut].all()
    batch = data.batch(out["scenario"].numpy())
    for i in (~cut).nonzero()[::7, 0].tolist():
        status = data.grid.status.clone()
        status[batch["outage"][i]] = 0.0
        s = torch.complex(batch["p_mw"][i], batch["q_mvar"][i])[:, None] / 100
        alone = solve(data.grid.replace(status=status), Scenarios(s), "newton", tol=1e-10)
        torch.testing.assert_close(out["vm_pu"][i], alone.vm[:, 0], rtol=0, atol=1e-7)
        assert float(out["p_from_mw"][i, batch["outage"][i, 0]]) == 0
    values = evaluated(PowerFlowSolver("newton"), data)
    assert values["test/islanded"] == int(cut.sum()) and values["test/unsolved"] == 0


def test_generators_have_limits_of_reactive_power():
    data = PowerGrids("case14", load_scale=1.3)
    free, limited = (trainer().predict(PowerFlowSolver(q_limits=flag), data)[0] for flag in (False, True))
    grid, pv = data.grid, data.grid.pv
    low, high = (
        torch.zeros(14, dtype=F64).index_add(0, grid.gen_bus, limit)[pv]
        for limit in (grid.gen_q_min_mvar, grid.gen_q_max_mvar)
    )
    before, given = ((out["q_mvar"][0] + grid.q_load_mvar)[pv] for out in (free, limited))
    assert ((before > high + 1) | (before < low - 1)).any()
    assert ((given <= high + 1e-4) & (given >= low - 1e-4)).all()
    at_limit = limited["q_limited"][0, pv]
    assert at_limit.any() and (torch.minimum((given - high).abs(), (given - low).abs())[at_limit] < 1e-4).all()
    assert (limited["vm_pu"][0, pv] == grid.vm[pv])[~at_limit].all()
    assert evaluated(PowerFlowSolver(q_limits=True), data)["test/converged_share"] == 1


def test_what_has_no_solution_is_named_and_not_silent(caplog):
    """Load far beyond the nose of the curve."""
    data = PowerGrids("case14", load_scale=20.0)
    with caplog.at_level(logging.WARNING):
        values = evaluated(PowerFlowSolver("newton"), data)
    assert values["test/unsolved"] == 1 and values["test/converged_share"] == 0
    assert "case14: not converged: case: max|F| = " in caplog.text and " at Bus " in caplog.text
    out = trainer().predict(PowerFlowSolver("newton"), data)[0]
    assert out["converged"].tolist() == [False] and out["vm_pu"].isfinite().all()


def test_methods_are_compared_where_none_finds_a_solution():
    data = PowerGrids("case14", load_scale=20.0, num_scenarios=3)
    values = evaluated(PowerFlowSolver(compare=["newton", "chord"], compare_scenarios=3), data)
    assert values["test/chord_seconds_to_1e-3"] == math.inf and values["test/chord_max_mismatch_pu"] > 1e-3


def test_methods_are_compared_on_the_first_scenarios():
    module = PowerFlowSolver(compare=["newton", "adam", "dc"], compare_scenarios=2, compare_iterations={"adam": 30})
    found = []

    class Keep(pl.Callback):
        def on_test_batch_end(self, trainer, module, outputs, *args):
            found.append(outputs["history"])

    values = {
        k: float(v)
        for k, v in trainer(callbacks=[Keep()]).test(module, series(eval_batch_size=3), verbose=False)[0].items()
    }
    history = found[0]
    assert found[1].shape == (0, 6) and set(history[:, 0].int().tolist()) == {
        METHODS.index(m) for m in ("newton", "adam", "dc")
    }
    adam = history[history[:, 0] == METHODS.index("adam")]
    assert len(adam) == 30 and (adam[1:, 2] >= adam[:-1, 2]).all()
    assert values["test/newton_max_mismatch_pu"] < 1e-8 < 1e-3 < values["test/adam_max_mismatch_pu"]
    assert values["test/newton_seconds_to_1e-3"] <= values["test/newton_seconds"]
    assert values["test/adam_seconds_to_1e-3"] == float("inf")  # not reached
    assert values["test/buses"] == 14 and values["test/peak_mib"] > 50


SOLVER_MISTAKES = {
    "method": ({"method": "gauss"}, r"model\.method='gauss' is unknown; choose newton, chord"),
    "compare": ({"compare": ["gauss"]}, r"model\.compare='gauss' is unknown"),
    "tol": ({"tol": 0.0}, r"model\.tol=0\.0: give the largest mismatch"),
    "start": ({"start": "warm"}, r"model\.start='warm' is unknown; choose auto, dc, flat, case"),
    "iterations": ({"max_iter": 0}, r"model\.max_iter=0: must be at least 1"),
    "compared iterations": ({"compare_iterations": {"sgd": 3}}, r"model\.compare_iterations names 'sgd'"),
}


@pytest.mark.parametrize("what", SOLVER_MISTAKES)
def test_mistakes_of_the_solver_name_the_key(what):
    options, text = SOLVER_MISTAKES[what]
    with pytest.raises(ValueError, match=text):
        PowerFlowSolver(**options)


# ----------------------------------------------------------------------------------------------------------- descent


def fitted(module: PowerFlowDescent, data: PowerGrids, **options) -> PowerFlowDescent:
    trainer(**options).fit(module, data)
    return module


@pytest.mark.parametrize("method", ["adam", "rmsprop"])
def test_training_is_what_the_solver_does(method):
    """Bit for bit: a training step is a step of the solver, for all scenarios of a batch."""
    data = PowerGrids("case14", num_scenarios=3, iterations=40)
    settings = {"lr": 0.003} if method == "adam" else {}
    module = fitted(PowerFlowDescent(method, settings), data)
    batch = data.batch(torch.arange(3).numpy())
    s = torch.complex(batch["p_mw"], batch["q_mvar"]).mT / 100
    chosen = AdamSettings(lr=0.003) if method == "adam" else None
    solution = solve(data.grid, Scenarios(s, batch["vm_pu"].mT), method, max_iter=40, start="flat", settings=chosen)
    assert torch.equal(module.vm.data.mT, solution.vm) and torch.equal(module.va.data.mT, solution.va)
    assert module.steps.tolist() == [40] * 3
    values = evaluated(module, data)
    assert values["test/max_mismatch_pu"] == pytest.approx(float(solution.max_mismatch.max()), rel=1e-5)
    assert values["test/iterations_mean"] == 40 and values["test/converged_share"] == 0


def test_a_dense_matrix_gives_the_same():
    one, other = (fitted(PowerFlowDescent(dense=dense), PowerGrids("case14", iterations=20)) for dense in (False, True))
    torch.testing.assert_close(one.vm, other.vm, rtol=0, atol=1e-12)


def test_scenarios_stop_on_their_own():
    """A solved scenario stays where it is, while the others go on."""
    data = PowerGrids("case14", num_scenarios=3, sigma=0.3, iterations=600)
    module = fitted(PowerFlowDescent(settings={"lr": 0.01}, tol=0.02), data)
    steps = module.steps.tolist()
    assert len(set(steps)) == 3 and max(steps) < 600
    values = evaluated(module, data)
    assert values["test/converged_share"] == 1 and values["test/iterations_max"] == max(steps)
    assert 0.01 < values["test/max_mismatch_pu"] <= 0.02


def test_the_best_state_can_be_kept():
    data = PowerGrids("case14", iterations=25)
    rough = {"lr": 0.3}
    last, best = (
        evaluated(fitted(PowerFlowDescent(settings=rough, keep_best=keep), data), data) for keep in (False, True)
    )
    assert best["test/mse"] < last["test/mse"]


def test_batches_that_do_not_follow_begin_from_scratch():
    data = series(num_scenarios=4, batch_size=2, iterations=15)
    module = fitted(PowerFlowDescent(), data)
    alone = fitted(PowerFlowDescent(), series(num_scenarios=4, batch_size=4, iterations=15))
    torch.testing.assert_close(module.vm, alone.vm, rtol=0, atol=1e-13)


def test_a_series_begins_at_the_solution_before():
    data = series(num_scenarios=3, batch_size=1, iterations=200, following_iterations=30)
    module = PowerFlowDescent(sequential=True)
    fitted(module, data)
    assert module.steps.tolist() == [200, 30, 30]
    warm = evaluated(module, data)["test/mse"]
    cold = evaluated(fitted(PowerFlowDescent(), series(num_scenarios=3, batch_size=1, iterations=30)), data)["test/mse"]
    assert warm < 0.2 * cold


def test_settings_of_a_series_are_those_of_the_paper():
    module = PowerFlowDescent(sequential=True, settings={"lr": 0.01}, following={"patience": 7})
    assert module.settings_of(True) == AdamSettings(0.01, SERIES_FIRST.beta1, SERIES_FIRST.beta2)
    following = module.settings_of(False)
    assert following.patience == 7 and following.lr == SERIES_FOLLOWING.lr


def test_training_resumes_exactly(tmp_path):
    """Stopped in the middle of a batch of a series, with the state of the optimizer."""

    def data():
        return series(num_scenarios=4, batch_size=2, iterations=20, following_iterations=20)

    whole = PowerFlowDescent(sequential=True)
    trainer(max_epochs=2).fit(whole, data())
    part = PowerFlowDescent(sequential=True)
    first = trainer(max_epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
    first.fit(part, data())
    first.save_checkpoint(tmp_path / "part.ckpt")
    rest = PowerFlowDescent(sequential=True)
    trainer(max_epochs=2).fit(rest, data(), ckpt_path=tmp_path / "part.ckpt")
    assert torch.equal(rest.vm, whole.vm) and torch.equal(rest.va, whole.va) and torch.equal(rest.steps, whole.steps)
    content = torch.load(tmp_path / "part.ckpt", weights_only=True)
    bare = PowerFlowDescent(sequential=True)  # without its data, as runner.load does
    bare.load_state_dict(content["state_dict"])
    assert torch.equal(bare.vm, part.vm)


def test_validation_sees_the_running_state():
    data = PowerGrids("case14", iterations=40)
    losses = []

    class Keep(pl.Callback):
        def on_validation_end(self, trainer, module):
            losses.append(float(trainer.callback_metrics["val/loss"]))

    trainer(val_check_interval=10, callbacks=[Keep()]).fit(PowerFlowDescent(), data)
    assert len(losses) == 4 and len(set(losses)) == 4


def _descend(folder: str, devices: int) -> None:
    several = {"devices": 2, "strategy": DDP()} if devices == 2 else {}
    data = series(num_scenarios=4, batch_size=2, iterations=15, eval_batch_size=4)
    module, run = PowerFlowDescent(), trainer(**several)
    run.fit(module, data)
    values = run.test(module, data, verbose=False)[0]
    if run.is_global_zero:
        kept = {name: value for name, value in values.items() if "seconds" not in name}
        torch.save({"vm": module.vm.data, "values": kept}, f"{folder}/{devices}.pt")


def test_two_processes_share_the_scenarios(ranks2, tmp_path):
    """Each has every second one; voltages and metrics are those of one process."""
    ranks2(_descend, str(tmp_path), 2)
    _descend(str(tmp_path), 1)
    one, two = (torch.load(tmp_path / f"{number}.pt") for number in (1, 2))
    torch.testing.assert_close(one["vm"], two["vm"], rtol=0, atol=1e-12)
    for name, value in one["values"].items():
        assert two["values"][name] == pytest.approx(value, rel=1e-6), name


def test_islands_are_refused_by_name():
    data = PowerGrids("case14", kind="contingencies", num_scenarios=None, iterations=2, batch_size=20)
    with pytest.raises(
        ValueError, match=r"outages that island buses .*: Bus 7 ZV-Bus 8 TV; use model=power_flow_outages"
    ):
        fitted(PowerFlowDescent(), data)


DESCENT_MISTAKES = {
    "method": ({"method": "newton"}, r"model\.method='newton': the paper's descent is adam or rmsprop"),
    "settings": ({"settings": {"beta": 0.9}}, r"model\.settings\.beta: adam has no such setting; it has lr, beta1"),
    "following": ({"method": "rmsprop", "following": {"beta1": 0.9}}, r"model\.following\.beta1: rmsprop has no such"),
    "start": ({"start": "warm"}, r"model\.start='warm' is unknown"),
    "compare": ({"compare": ["sgd"]}, r"model\.compare='sgd' is unknown"),
    "record": ({"record_every": 0}, r"model\.record_every=0: must be at least 1"),
}


@pytest.mark.parametrize("what", DESCENT_MISTAKES)
def test_mistakes_of_the_descent_name_the_key(what):
    options, text = DESCENT_MISTAKES[what]
    with pytest.raises(ValueError, match=text):
        PowerFlowDescent(**options)


# ----------------------------------------------------------------------------------------------------------- outages


def outages(**options) -> PowerGrids:
    return PowerGrids(**{"grid": "case14", "kind": "contingencies", "num_scenarios": None, "limits": "base"} | options)


def test_outages_are_those_of_newtons_method():
    data = outages(limit_factor=1.2)
    values = evaluated(OutageAnalysis(), data)
    assert values["test/scenarios"] == 20 and values["test/islanded"] == 1 and values["test/unsolved"] == 0
    assert values["test/dv_max_pu"] < 1e-7 and values["test/max_mismatch_pu"] <= 1e-8
    assert values["test/overloads"] > 0
    general = evaluated(PowerFlowSolver("newton"), data)  # the same outages as scenarios with other branches
    for name in ("islanded", "overloads", "overloaded_scenarios", "low_voltages", "high_voltages"):
        assert values[f"test/{name}"] == general[f"test/{name}"], name


def test_what_is_returned_of_an_outage():
    data = outages(limit_factor=1.2, eval_batch_size=7)
    outputs = trainer().predict(OutageAnalysis(), data)
    joined = {key: torch.cat([out[key] for out in outputs]) for key in outputs[0]}
    cut = joined["islanding"]
    assert cut.nonzero()[:, 0].tolist() == [13] and joined["vm_pu"][cut].isnan().all()
    assert joined["vm_pu"][~cut].isfinite().all() and joined["converged"].tolist() == (~cut).tolist()
    over = (joined["loading_percent"][~cut] / 100 - 1).clamp(min=0)
    torch.testing.assert_close(joined["severity"][~cut], over.square().sum(1))
    assert torch.equal(joined["overloads"][~cut], (over > 0).sum(1))
    # A branch that is out carries nothing.
    gone = torch.arange(20)
    assert float(joined["p_from_mw"][gone, gone][~cut].abs().max()) < 1e-9
    table = data.outage_table(joined)
    assert table["state"].value_counts().to_dict() == {"solved": 19, "islanded": 1}


def test_estimates_find_overloads():
    values = evaluated(OutageAnalysis(screen=["woodbury_1", "woodbury_3", "dc"]), outages(limit_factor=1.2))
    assert values["test/woodbury_3_recall"] >= values["test/woodbury_1_recall"] > 0.8
    assert values["test/woodbury_3_recall"] > 0.98 and values["test/woodbury_3_precision"] > 0.98
    assert 0 <= values["test/dc_recall"] <= 1 and values["test/dc_seconds_per_flow"] > 0
    assert values["test/woodbury_1_outage_recall"] > 0.8


def test_only_what_is_flagged_is_solved():
    module = OutageAnalysis(screen=["woodbury_1"], exact="flagged", flag_percent=150.0)
    values = evaluated(module, outages(limit_factor=1.2))
    assert 0 < values["test/flagged_share"] < 1
    out = trainer().predict(module, outages(limit_factor=1.2))[0]
    solved = out["converged"].sum()
    assert int(solved) == round(values["test/flagged_share"] * 19)
    # What is not solved keeps its estimate, and is no failure.
    data = outages(limit_factor=1.2)
    everything = trainer().predict(OutageAnalysis(), data)[0]
    left = out["estimated"]
    assert int(left.sum()) == 19 - int(solved) and not bool((left & (out["converged"] | out["islanding"])).any())
    assert bool((out["loading_percent"][left].nan_to_num().amax(1) < 150).all())
    torch.testing.assert_close(out["vm_pu"][left], everything["vm_pu"][left], atol=0.02, rtol=0)
    assert bool((out["severity"][left] > 0).any()) and bool((out["max_mismatch"][left] > 1e-8).all())
    table = data.outage_table(out)
    assert table["state"].value_counts().to_dict() == {
        "solved": int(solved),
        "estimated": 19 - int(solved),
        "islanded": 1,
    }
    assert bool(table["worst_loading_percent"][table["state"] == "estimated"].notna().all())


def test_two_branches_at_once():
    values = evaluated(OutageAnalysis(), outages(num_outages=2, limit_factor=1.2))
    assert values["test/scenarios"] == 190 and values["test/islanded"] >= 19
    assert values["test/dv_max_pu"] < 1e-7


OUTAGE_MISTAKES = {
    "estimate": ({"screen": ["woodbury"]}, r"model\.screen='woodbury' is unknown; choose dc, woodbury_1"),
    "exact": ({"exact": "some"}, r"model\.exact='some' is unknown"),
    "flags": ({"exact": "flagged"}, r"model\.exact=flagged needs an estimate"),
    "tol": ({"tol": 2.0}, r"model\.tol=2\.0"),
    "iterations": ({"max_iter": 0}, r"model\.max_iter=0"),
    "percent": ({"flag_percent": 0.0}, r"model\.flag_percent=0\.0"),
}


@pytest.mark.parametrize("what", OUTAGE_MISTAKES)
def test_mistakes_of_outages_name_the_key(what):
    options, text = OUTAGE_MISTAKES[what]
    with pytest.raises(ValueError, match=text):
        OutageAnalysis(**options)


def test_outages_need_outages_and_limits():
    with pytest.raises(ValueError, match=r"data\.kind=series: outages of one base case need data\.kind=contingencies"):
        evaluated(OutageAnalysis(), series())
    with pytest.raises(ValueError, match=r"no branch has a limit, .*; set data\.limits=base data\.limit_factor=1\.2"):
        evaluated(OutageAnalysis(screen=["dc"]), outages(limits="case"))


# ----------------------------------------------------------------------------------------------------------- metrics


def test_flow_errors_are_sums():
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> dict:
        return {
            "islanded": torch.zeros(count, dtype=torch.bool),
            "converged": torch.rand(count, generator=generator) > 0.3,
            "iterations": torch.randint(1, 9, (count,), generator=generator),
            "mismatch": torch.randn(5, count, generator=generator, dtype=F64),
            "target": torch.randn(5, count, generator=generator, dtype=F64),
            "violations": {
                name: torch.randint(0, 3, (count,), generator=generator)
                for name in ("overloads", "low_voltages", "high_voltages")
            },
            "dv": torch.rand(count, generator=generator, dtype=F64),
            "dtheta": torch.rand(count, generator=generator, dtype=F64),
        }

    parts = [part(3), part(4)]
    metric, whole = FlowErrors(), FlowErrors()
    for one in parts:
        metric.update(**one)
    joined = {key: torch.cat([one[key] for one in parts], dim=-1) for key in parts[0] if key != "violations"} | {
        "violations": {k: torch.cat([one["violations"][k] for one in parts]) for k in parts[0]["violations"]}
    }
    whole.update(**joined)
    values = metric.compute()
    for name, value in whole.compute().items():
        torch.testing.assert_close(values[name], value)
    mismatch, target = joined["mismatch"], joined["target"]
    assert float(values["mse"]) == pytest.approx(float(mismatch.square().mean()))
    assert float(values["flow_deviation_percent"]) == pytest.approx(
        float(100 * mismatch.abs().sum() / target.abs().sum())
    )
    assert float(values["converged_share"]) == pytest.approx(float(joined["converged"].double().mean()))
    assert float(values["max_mismatch_pu"]) == float(mismatch.abs().max())


def test_islands_count_as_nothing_else():
    metric = FlowErrors()
    nothing = torch.zeros(0)
    counts = {name: nothing.int() for name in ("overloads", "low_voltages", "high_voltages")}
    metric.update(
        islanded=torch.tensor([True, True]), converged=nothing.bool(), iterations=nothing.int(),
        mismatch=torch.zeros(5, 0), target=torch.zeros(5, 0), violations=counts,
    )  # fmt: skip
    values = metric.compute()
    assert values["islanded"] == 2 and values["unsolved"] == 0 and values["converged_share"].isnan()
    assert "dv_max_pu" not in values


def test_screening_errors():
    metric = ScreeningErrors()
    metric.update(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
    metric.update(torch.tensor([True]), torch.tensor([True]))
    values = metric.compute()
    assert float(values["recall"]) == pytest.approx(2 / 3) and float(values["precision"]) == pytest.approx(2 / 3)
    assert values["overloads"] == 3


def test_voltage_errors():
    metric = VoltageErrors()
    metric.update(torch.tensor([[0.3, torch.nan], [-0.4, 0.0]]), torch.full((2, 2), torch.nan))
    values = metric.compute()
    assert float(values["vm_rms_pu"]) == pytest.approx((0.25 / 3) ** 0.5) and float(
        values["vm_max_pu"]
    ) == pytest.approx(0.4)
    assert values["va_rms_degree"].isnan() and values["va_max_degree"].isnan()


def test_checkpoints_are_plain(tmp_path: Path):
    data = PowerGrids("case14", iterations=2)
    run = trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    run.fit(PowerFlowDescent(), data)
    run.save_checkpoint(tmp_path / "x.ckpt")
    torch.load(tmp_path / "x.ckpt", weights_only=True)
