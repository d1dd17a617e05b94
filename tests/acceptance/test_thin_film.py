"""What OptoLlama must achieve: lines 6 to 8 and 10 to 12 of the acceptance list; 1 to 5 and 9 are those of the optics.

Numbers in comments were measured with these tests. Line 7 trains networks: set THIN_FILM_RUNS to a folder in which
finished runs are kept, and found again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.stack_set import fingerprints
from lightning_modules.thin_film.candidates import diversity, errors
from networks.bayes.noise import counter_uniform
from networks.diffusion import Sampler, Schedule, sample
from networks.optogpt import OptoGPT
from networks.optollama import MaskedDiffusionDenoiser
from networks.token_choice import Constraints, SpecialTokens
from runner import job
from runner.load import load_run
from tests.composing import composed, plain
from tests.lightning_modules.thin_film_set import decoder, films, module
from tests.lightning_modules.tiny_series import quiet_trainer

SPECIAL = SpecialTokens.last(53)


def small_denoiser(**options: Any) -> MaskedDiffusionDenoiser:
    sizes = {"num_tokens": 53, "length": 7, "num_wavelengths": 57, "width": 32, "depth": 1, "heads": 2, "hidden": 64}
    return MaskedDiffusionDenoiser(**sizes | options).eval()


# --- 6: identities of the diffusion; many more in tests/networks/test_diffusion.py


def test_masks_have_the_rate_of_the_schedule():
    schedule, number = Schedule("quadratic"), 50_000
    for t in (0.1, 0.3, 0.5, 0.8, 1.0):
        uniform = counter_uniform((1, 2), [0], torch.arange(number), (7,))[0]
        rate = (uniform < schedule.rate(torch.tensor(t, dtype=torch.float64))).double().mean().item()
        sigma = math.sqrt(t**2 * (1 - t**2) / (7 * number)) if t < 1 else 0.0
        if t == 1:
            assert rate == pytest.approx(0.999, abs=0.001)
        else:
            assert abs(rate - t**2) < 3 * sigma + 1e-3 * t**2


@pytest.mark.parametrize("kind", ["remask", "confidence", "ancestral", "greedy"])
def test_a_thousand_samples_obey(kind):
    """No MSK, PAD only behind EOS, constraints, forced lengths."""
    torch.manual_seed(0)
    net, spectra = small_denoiser(), torch.rand(20, 3, 57)
    allowed = torch.ones(53, dtype=torch.bool)
    allowed[:10] = False  # no silver
    draw = functools.partial(net.sample, spectra, range(50), torch.arange(20), sampler=Sampler(kind, 7))
    for constraints, least, most in (
        (Constraints(allowed, max_layers=4), 1, 4),
        (Constraints(allowed, max_layers=3, min_layers=3), 3, 3),
    ):
        tokens = draw(constraints=constraints).view(-1, 7)
        layers = (tokens < 50).sum(1)
        assert len(tokens) == 1000 and not (tokens == SPECIAL.mask).any()
        assert not (tokens < 10).any() and layers.min() >= least and layers.max() <= most
        place = torch.arange(7)
        assert ((tokens == SPECIAL.eos) == (place == layers[:, None])).all()
        assert ((tokens == SPECIAL.pad) == (place > layers[:, None])).all()


def test_a_perfect_denoiser_gives_the_stack_with_every_sampler():
    data = films()
    data.setup("test")
    truth = data.part("test").tokens[:, None].expand(-1, 20, -1)
    special, table = SpecialTokens(9, 10, 11), Constraints().table(12, 4, SpecialTokens(9, 10, 11))

    def oracle(tokens, t):
        return torch.full((*tokens.shape, 12), -40.0).scatter(-1, truth[..., None], 40.0)

    def uniform(step, purpose):
        return counter_uniform((step, purpose), range(20), torch.arange(9), (4,)).transpose(0, 1)

    for kind in ("remask", "confidence", "ancestral", "greedy"):
        for steps in (1, 2, 5, 20, 100):
            found = sample(oracle, uniform, table, special, Schedule(), Sampler(kind, steps), (9, 20))
            assert torch.equal(found, truth), (kind, steps)


# --- 7: the small experiment

LIMIT_S = 300.0  # CPU seconds of training, each network


def finished(name: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """Train and test an experiment as a user does, or find it; what its results.json says, and CPU seconds of fit."""
    stored = os.environ.get("THIN_FILM_RUNS")
    folder = (Path(stored) if stored else folder) / name.replace("/", "_")
    record = folder / "results.json"
    if not record.is_file() or json.loads(record.read_text())["status"] != "completed":
        more = ("callbacks.energy.codecarbon=false", "callbacks.energy.figures=[]")
        config = plain(composed(f"experiment={name}", *more, *overrides, run_dir=folder))
        config["callbacks"]["footprint"] = {"_target_": "callbacks.footprint.Footprint"}
        result = job.run(config)
        assert result["status"] == "completed", result["error"]
    return json.loads(record.read_text()) | {"folder": folder}


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """The default experiment: the better denoiser, OptoGPT as published beside it."""
    return finished("thin_film", tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The denoiser with the paper's loss and sampler, alone."""
    return finished("thin_film/published", tmp_path_factory.mktemp("published"), "model.baselines.optogpt=null")


def values(run: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("test/"): value for name, value in run["metrics"].items()}


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_training_keeps_to_its_budget(default, published):
    """Two networks in the first run."""
    for run, networks in ((default, 2), (published, 1)):
        cpu = sum(run["processes"][0]["cpu_s"])
        print(run["name"], "CPU seconds of training, validation aside:", cpu)
        assert cpu <= networks * LIMIT_S


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_refined_draws_beat_templates(default):
    found = values(default)
    print({k: v for k, v in found.items() if "template" in k or k == "mae"})
    assert found["mae"] <= 0.006
    assert found["mae"] <= 0.6 * found["template_equal/best"]
    assert found["mae"] <= 0.9 * found["template_equal/refined"]


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_b_refined_draws_beat_those_of_optogpt(default):
    found = values(default)
    print(found["mae"], found["optogpt/refined_of_50"])
    assert found["mae"] <= 0.8 * found["optogpt/refined_of_50"]


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_c_the_network_is_good_from_the_first_draw(default):
    found = values(default)
    print({k: found[k] for k in ("first_mae", "best_of_10", "best_mae", "mae")})
    assert found["first_mae"] <= 0.030
    assert found["best_of_10"] <= 0.015


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_d_a_hybrid_is_at_least_as_good_as_its_parts(default, published):
    """Of 25 draws and 25 templates, which holds by construction, and of 50 of either, which does not.

    0.0031 beside 0.0039 and 0.0046 (25 each), 0.0037 and 0.0046 (50); published: 0.0045 beside 0.0080 and 0.0056,
    0.0070 and 0.0057. The hybrid refines five of each kind, ten in all.
    """
    for run in (default, published):
        found = values(run)
        print({k: v for k, v in found.items() if k.startswith("hybrid")})
        alone = min(found["hybrid/refined_net_alone"], found["hybrid/refined_template_alone"])
        assert found["hybrid/refined"] <= alone
        assert found["hybrid/refined"] <= min(found["mae"], found["template_equal/refined"])


@functools.cache
def loaded(folder: str) -> tuple[Any, Any]:
    """Module and data of a run, ready to draw."""
    own, data, _ = load_run(folder)
    data.setup("test")
    own.trainer = quiet_trainer()
    return own, data


def drawn(folder: Path, sampler: Sampler, draws: int) -> tuple[torch.Tensor, float]:
    """Errors of draws for the 150 targets, and CPU seconds of sampling."""
    own, data = loaded(str(folder))
    found, seconds = [], 0.0
    for batch in data.test_dataloader():
        begin = time.process_time()
        tokens = own.draw(own.designer, batch, range(draws), sampler)
        seconds += time.process_time() - begin
        found.append(errors(data.simulate(tokens), batch["spectrum"], batch["weight"]))
    return torch.cat(found), seconds


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_e_few_steps_do_and_are_fast(default, published):
    """Mean error of 50 draws with 7 and 20 steps against 50; 150 x 50 x 20 steps in a minute.

    1.01 and 1.02 for the default; 1.08, too many, and 1.03 for the published network, which redraws all positions in
    every step.
    """
    for run in (default, published):
        own, _ = loaded(str(run["folder"]))
        mae, seconds = {}, {}
        for steps in (7, 20, 50):
            found, seconds[steps] = drawn(run["folder"], dataclasses.replace(own.net.sampler, steps=steps), 50)
            mae[steps] = found.mean().item()
        print(run["name"], "mean error by steps:", mae, "CPU seconds:", seconds)
        assert seconds[20] <= 60
        assert mae[20] <= 1.05 * mae[50]
        assert run is published or mae[7] <= 1.05 * mae[50]


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_f_draws_differ_more_than_those_of_optogpt(default):
    """Distinct stacks among ten draws, within 1.5 times the best error that any of the twenty draws has."""
    found = values(default)
    names = ("distinct", "distinct_orders", "alternatives")
    print({f"{net}{name}": found[f"{net}{name}"] for net in ("", "optogpt/") for name in names})
    assert found["alternatives"] > found["optogpt/alternatives"]
    own, data = loaded(str(default["folder"]))
    batch = next(iter(data.test_dataloader()))
    for net in (own.net, own.baselines["optogpt"]):
        tokens = own.draw(net, batch, range(10))
        mae = errors(data.simulate(tokens), batch["spectrum"], batch["weight"])
        distinct, _ = diversity(tokens, mae, data.vocabulary)
        assert (distinct >= 1).all() and (distinct <= 10).all()


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.xfail(strict=True, reason="2.5 against 3.3: the better the best draw is, the fewer come near it")
def test_f_draws_differ_more_near_the_best_of_each_network(default):
    """The other reading of the line: within 1.5 times the best of the same network."""
    found = values(default)
    assert found["distinct"] > found["optogpt/distinct"]


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.xfail(strict=True, reason="0.0070 and 0.0085 in two trainings, where 0.006 is asked")
def test_a_with_the_loss_and_the_sampler_of_the_paper(published):
    assert values(published)["mae"] <= 0.006


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="0.0070 beside 0.0072: 0.97, where 0.8 is asked")
def test_b_with_the_loss_and_the_sampler_of_the_paper(default, published):
    assert values(published)["mae"] <= 0.8 * values(default)["optogpt/refined_of_50"]


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_and_b_with_the_loss_of_the_paper_and_all_of_its_distribution(default, published):
    """Drawn at temperature 1 without a cut, more different stacks come to be refined."""
    own, data, _ = load_run(published["folder"])
    own.net.sampler = dataclasses.replace(own.net.sampler, temperature=1.0, top_p=1.0)
    found = quiet_trainer().test(own, datamodule=data, verbose=False)[0]
    print({k: v for k, v in found.items() if "template_equal" in k or k == "test/mae"})
    assert found["test/mae"] <= 0.006
    assert found["test/mae"] <= 0.6 * found["test/template_equal/best"]
    assert found["test/mae"] <= 0.9 * found["test/template_equal/refined"]
    assert found["test/mae"] <= 0.8 * values(default)["optogpt/refined_of_50"]


# --- 8: the published sizes


def test_the_published_networks_have_their_size():
    with torch.device("meta"):
        optollama, optogpt = MaskedDiffusionDenoiser(), OptoGPT()
    count = {type(net).__name__: sum(p.numel() for p in net.parameters()) for net in (optollama, optogpt)}
    assert count["MaskedDiffusionDenoiser"] == pytest.approx(155.5e6, rel=0.005)  # 155,514,759
    assert count["OptoGPT"] == pytest.approx(103.2e6, rel=0.005)  # 103,158,663


@pytest.mark.parametrize("model", ["optollama_paper", "optogpt_paper"])
def test_the_published_configuration_has_its_size(model):
    node = plain(composed("experiment=thin_film/paper", f"model={model}"))["model"]["net"]
    sizes = {key: node[key] for key in ("num_tokens", "length", "num_wavelengths", "width", "depth", "heads", "hidden")}
    assert list(sizes.values()) == [903, 21, 171, 1024, 6, 8, 4096]


# --- 10: design targets


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("target", ["ar_coating", "dbr", "nir_reflector"])
def test_design_targets(target, default, tmp_path):
    """By predict, from the small checkpoint and the template library."""
    checkpoint = f"ckpt_path={default['folder']}/checkpoints/best.ckpt"
    limits = ["model.limits.exclude=[metals]"] if target == "ar_coating" else []
    more = ("callbacks.energy.codecarbon=false",)
    overrides = (f"data.targets=[{target}]", checkpoint, *limits, *more)
    config = plain(composed("experiment=thin_film/design", *overrides, run_dir=tmp_path))
    begin = time.process_time()
    result = job.run(config)
    seconds = time.process_time() - begin
    assert result["status"] == "completed", result["error"]
    (design,) = json.loads((tmp_path / "predictions/designs.json").read_text())
    best = design["candidates"][0]
    print(target, f"{seconds:.1f} CPU s, MAE {best['mae']:.4f}, {best['source']}:", best["stack"])
    assert seconds < 60
    assert len(best["stack"]) <= 6
    nm = torch.arange(400.0, 701.0, 2.0, dtype=torch.float64)
    if target == "ar_coating":
        assert not any(layer["material"] == "Ag" for layer in best["stack"])
        reflectance = spectrum_of(best, nm)[0]
        print("mean R, 400 to 700 nm:", reflectance.mean().item())
        assert reflectance.mean() < 0.005
    elif target == "dbr":
        reflectance = spectrum_of(best, torch.arange(525.0, 576.0, dtype=torch.float64))[0]
        print("least R, 525 to 575 nm:", reflectance.min().item())
        assert reflectance.min() > 0.99
    else:
        wide = spectrum_of(best, torch.arange(900.0, 1981.0, 10.0, dtype=torch.float64))
        print("mean R beyond 900 nm:", wide[0].mean().item(), "mean T, 400 to 700 nm:", spectrum_of(best, nm)[2].mean())
        assert wide[0].mean() > 0.95  # no number is asked for


def spectrum_of(candidate: dict[str, Any], nm: torch.Tensor) -> torch.Tensor:
    """R, A, T of a recipe on glass at other wavelengths than those it was designed for."""
    from physics.thin_film.materials import MaterialCatalog
    from physics.thin_film.surroundings import Surroundings
    from physics.thin_film.transfer_matrix import transfer_matrix

    index = MaterialCatalog.default().indices([layer["material"] for layer in candidate["stack"]], nm)
    thickness = torch.tensor([layer["thickness_nm"] for layer in candidate["stack"]], dtype=torch.float64)
    return transfer_matrix(index, thickness, nm, Surroundings(exit=1.5))


# --- 11: what validation sees, what a restart keeps, what a mean is a mean of


def test_validation_never_touches_test_targets():
    data = films(num_val=30, num_test=30, num_train=400)
    val, test = (fingerprints(data.part(part).tokens) for part in ("val", "test"))
    assert len(val) == 30 and not torch.isin(val, test).any()


def test_a_restart_keeps_the_best_score(tmp_path):
    """A worse epoch after the restart does not replace the best checkpoint."""
    overrides = ("data.num_train=400", "data.num_val=20", "data.batch_size=100", "model.val_draws=2", "test=false")
    overrides += ("model.net.width=16", "model.net.depth=1", "model.net.heads=2", "callbacks.energy.codecarbon=false")
    overrides += ("model.baselines.optogpt=null", "callbacks.energy.figures=[]", "model.net.sampler.steps=3")
    config = plain(composed("experiment=thin_film", *overrides, "trainer.max_epochs=3", run_dir=tmp_path))
    first = job.run(config)
    assert first["status"] == "completed", first["error"]
    best = first["metrics"]["val/best_mae_best"]
    content = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)
    spoilt = config | {"ckpt_path": "last", "model": config["model"] | {"optimizer": None}}
    spoilt["model"]["optimizer"] = config["model"]["optimizer"] | {"lr": 1.0}
    spoilt["model"]["scheduler"] = None
    spoilt["trainer"] = config["trainer"] | {"max_epochs": 5, "gradient_clip_val": None}
    second = job.run(spoilt)
    assert second["status"] == "completed", second["error"]
    after = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)
    assert second["metrics"]["val/best_mae"] > best  # the last epoch is worse: the file is the old one
    assert after["epoch"] == content["epoch"] and after["global_step"] == content["global_step"]
    assert second["metrics"]["val/best_mae_best"] == best


def test_an_uneven_last_batch_changes_no_mean():
    found = []
    for size in (9, 4, 2):  # of nine targets
        torch.manual_seed(0)
        (logged,) = quiet_trainer().test(module(), datamodule=films(eval_batch_size=size), verbose=False)
        found.append(logged)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6, abs=1e-9)


# --- 12: one process and two


def table(overrides: tuple[str, ...] = ()) -> dict[str, float]:
    """The test of a network and a baseline with weights that the seed says, float64."""
    torch.manual_seed(3)
    own = module(baselines={"gpt": decoder()})
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    options = {"devices": 2, "strategy": "ddp"} if distributed else {}
    trainer = quiet_trainer(**options)
    (found,) = trainer.test(own, datamodule=films(eval_batch_size=4), verbose=False)
    return {name: float(value) for name, value in found.items()}


def test_two_processes_give_the_table_of_one(ranks2):
    alone = table()
    for found in ranks2(table):
        assert found == pytest.approx(alone, rel=1e-7, abs=1e-9)
    assert len(alone) > 30
