import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.design_writer import SOURCES as WRITTEN_SOURCES
from callbacks.oialr import OIALR
from datamodules.design_targets import Variants
from lightning_modules.metrics.spectra import summary
from lightning_modules.thin_film import Limits, Refinement
from lightning_modules.thin_film.candidates import (
    alike,
    best_distinct,
    diversity,
    errors,
    refine,
    repeated,
    sizes,
    take,
)
from lightning_modules.thin_film.proposals import SOURCES
from networks.ab_factors import decompose, split
from networks.diffusion import Sampler
from networks.low_rank import factored_weights
from networks.spectrum_encoders import DenseTokens
from strategies.ab_training.ranks import full_rank
from strategies.ab_training.selection import select
from tests.lightning_modules.thin_film_set import decoder, denoiser, films, module
from tests.lightning_modules.tiny_series import quiet_trainer

# ----------------------------------------------------------------------------------------------------------- candidates


def test_repetitions_are_seen():
    tokens = torch.tensor([[[1, 2], [3, 4], [1, 2], [3, 4], [1, 4]]])
    assert repeated(tokens).tolist() == [[False, False, True, True, False]]


def test_the_best_distinct_ones():
    tokens = torch.tensor([[[1], [2], [2], [3], [4]]])
    mae = torch.tensor([[0.4, 0.1, 0.1, torch.inf, 0.3]])
    assert best_distinct(tokens, mae, 2).tolist() == [[1, 4]]
    assert best_distinct(tokens, mae, 5).tolist() == [[1, 4, 0, -1, -1]]


def test_take_gathers_along_the_second_dimension():
    values = torch.arange(24).view(2, 3, 4)
    assert torch.equal(
        take(values, torch.tensor([[2, 0], [1, -1]])), torch.stack([values[0, [2, 0]], values[1, [1, 0]]])
    )


def test_a_simulation_that_failed_is_an_infinite_error():
    """Never a perfect absorber: not a number anywhere is worse than anything."""
    target = torch.tensor([0.0, 1.0, 0.0])[:, None].expand(3, 5)[None]
    spectra = target[:, None].repeat(1, 3, 1, 1)
    spectra[0, 1, 0, 2] = torch.nan
    spectra[0, 2] = torch.nan
    mae = errors(spectra, target, torch.ones(1, 3, 5))
    assert mae[0, 0] == 0 and mae[0, 1:].isinf().all()
    weight = torch.ones(1, 3, 5)
    weight[..., 2] = 0
    assert errors(spectra, target, weight)[0, 1].isinf()  # broken is broken, also where nothing is asked for


def test_errors_are_weighted():
    target, weight = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    weight[0, 0, :2], weight[0, 2, 0] = 1, 2
    spectra = torch.rand(1, 2, 3, 4)
    expected = (spectra[:, :, 0, 0] + spectra[:, :, 0, 1] + 2 * spectra[:, :, 2, 0]) / 4
    torch.testing.assert_close(errors(spectra, target, weight), expected)


def test_diversity_counts_good_answers_that_differ():
    data = films()
    data.setup("predict")
    v = data.vocabulary
    stacks = [["Ag_50"], ["Ag_100"], ["Ag_50"], ["SiO2_50"], ["TiO2_50"]]
    tokens = torch.stack([v.encode(s, 4) for s in stacks])[None]
    mae = torch.tensor([[0.010, 0.014, 0.010, 0.015, 0.016]])
    distinct, orders = diversity(tokens, mae, v)
    assert distinct.tolist() == [3] and orders.tolist() == [2]
    distinct, orders = diversity(tokens, mae, v, best=torch.tensor([0.0101 / 1.5]))  # another network knows better
    assert distinct.tolist() == [1] and orders.tolist() == [1]
    assert diversity(tokens, mae, v, best=torch.tensor([1e-3]))[0].tolist() == [0]


def test_recipes_that_are_alike():
    material = torch.tensor([[[0, 1, -1], [0, 1, -1], [0, 2, -1], [0, 1, -1]]])
    thickness = torch.tensor([[[50.0, 20, 0], [51, 19, 0], [50, 20, 0], [60, 20, 0]]])
    assert alike(material, thickness).tolist() == [[False, True, False, False]]


def test_each_stack_is_refined_once_and_never_gets_worse():
    data = films()
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    tokens = batch["tokens"][:, None].repeat(1, 3, 1)
    tokens[:, 1] = batch["tokens"].roll(1, 0)
    tokens[1, 2] = -1
    calls = []
    refiner = Refinement(steps=20).refiner(data, torch.device("cpu"))

    def counting(material, *rest):
        calls.append(len(material))
        return refiner(material, *rest)

    found = refine(
        counting, data.vocabulary, {"a": tokens[:, :2], "b": tokens[:, 1:]}, batch["spectrum"], batch["weight"]
    )
    start = errors(data.simulate(tokens.clamp(min=0)), batch["spectrum"], batch["weight"])
    assert calls[0] <= 4 * 3 and torch.equal(found["a"].mae[:, 1], found["b"].mae[:, 0])
    assert (found["a"].mae <= start[:, :2] + 1e-7).all() and found["a"].mae[:, 0].max() < 1e-6
    assert found["b"].mae[1, 1].isinf()
    assert found["a"].mae[:, 1].mean() < 0.9 * start[:, 1].mean()


def test_sizes_of_libraries():
    assert sizes([5, "equal"], 77) == {"template_5": 5, "template_equal": 77}
    for wrong in ("big", 0, -3):
        with pytest.raises(ValueError, match=r"model\.templates"):
            sizes([wrong], 1)


# ------------------------------------------------------------------------------------------------------------- training


def trained(own, data=None, epochs=2, **trainer):
    data = data or films()
    fit = quiet_trainer(max_epochs=epochs, **trainer)
    fit.fit(own, datamodule=data)
    return fit, data


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_what_training_and_validation_log():
    fit, _ = trained(module(baselines={"gpt": decoder()}))
    logged = fit.callback_metrics
    assert {"train/loss", "train/gpt/loss", "val/loss", "val/mae", "val/best_mae", "val/valid", "val/accuracy"} <= set(
        logged
    )
    assert any(name.startswith("val/loss_0_20") for name in logged)
    assert 0 < logged["val/best_mae"] <= logged["val/mae"] < 1 and logged["val/valid"] == 1


def test_a_baseline_does_not_disturb_the_network():
    """The same weights with and without one, clipped gradients included, and the baseline as if trained alone."""
    alone, gpt = module(), module(decoder(), seed=5)
    together = module(baselines={"gpt": decoder()})
    together.baselines["gpt"].load_state_dict(gpt.net.state_dict())
    start = weights(alone.net)
    assert torch.equal(weights(together.net), start)
    for own in (alone, gpt, together):
        trained(own, gradient_clip_val=0.1)
    assert not torch.equal(weights(alone.net), start)
    torch.testing.assert_close(weights(together.net), weights(alone.net), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights(together.baselines["gpt"]), weights(gpt.net), rtol=0, atol=1e-6)


def test_gradients_are_clipped_network_by_network():
    own = module(baselines={"gpt": decoder()})
    for p in own.parameters():
        p.grad = torch.full_like(p, 3.0)
    own.configure_gradient_clipping(None, 0.5, "norm")
    for net in (own.net, own.baselines["gpt"]):
        assert torch.cat([p.grad.flatten() for p in net.parameters()]).norm() == pytest.approx(0.5, rel=1e-4)


def test_the_average_of_the_weights_follows_and_is_evaluated():
    own = module(ema_decay=0.9)
    expected, steps = weights(own.net), []

    class Watch(Callback):
        """Sees at the end of a batch what a checkpoint of that moment would hold."""

        def on_train_batch_end(self, *args):
            nonlocal expected
            steps.append(own.global_step)
            decay = min(0.9, (1 + own.global_step) / (10 + own.global_step))
            expected = decay * expected + (1 - decay) * weights(own.net)
            torch.testing.assert_close(weights(own.ema), expected, rtol=0, atol=1e-6)

    trained(own, callbacks=[Watch()])
    assert own.designer is own.ema and steps == list(range(1, 11))
    torch.testing.assert_close(weights(own.ema), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(weights(own.ema), weights(own.net), atol=1e-4)
    assert not any(p.requires_grad for p in own.ema.parameters())
    assert module().designer is not None and module().ema is None


def in_use(net, names):
    """Weights by their names in the plain network, whatever trains in their place."""
    owners = dict(net.named_modules())
    return torch.cat([getattr(owners[n.rpartition(".")[0]], n.rpartition(".")[2]).detach().flatten() for n in names])


def test_the_average_follows_weights_of_which_factors_train():
    own = module(ema_decay=0.9)
    names = [name for name, _ in own.net.named_parameters()]
    expected, hook = weights(own.net), own.optimizer_step

    def watched(*args, **kwargs):
        nonlocal expected
        hook(*args, **kwargs)
        decay = min(0.9, (2 + own.global_step) / (11 + own.global_step))
        expected = decay * expected + (1 - decay) * in_use(own.net, names)

    own.optimizer_step = watched
    trained(own, callbacks=[OIALR(delay=3, frequency=2, beta=0.3, progressive=1, export="none")])
    assert len(list(factored_weights(own.net))) > 3 and not list(factored_weights(own.ema))
    assert [name for name, _ in own.ema.named_parameters()] == names
    torch.testing.assert_close(weights(own.ema), expected, rtol=0, atol=1e-5)

    own = module(ema_decay=0.9)  # AB-training's
    before = weights(own.net)
    for layer in select(own, None, 4):
        layer.factorize(split(decompose(layer.weight), full_rank(layer)), "a")
    followed = torch.cat([weight.flatten() for _, weight in own._averaged()])
    torch.testing.assert_close(followed, before, rtol=0, atol=1e-5)


def test_encoders_see_training_spectra_before_training(tmp_path):
    own = module(denoiser(encoder=DenseTokens(11, 16, hidden=16, depth=1, count=2)), ema_decay=0.9)
    fit, data = trained(own)
    spectra = data.library(200).spectra.double()[:, [0, 2]].flatten(1)
    for net in (own.net, own.ema):
        torch.testing.assert_close(net.encoder.whitening.mean, spectra.mean(0).float(), rtol=0, atol=1e-5)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = module(denoiser(encoder=DenseTokens(11, 16, hidden=16, depth=1, count=2)), ema_decay=0.9)
    with pytest.warns(UserWarning):  # the library of equal storage is larger than the training part
        quiet_trainer().test(again, datamodule=films(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert torch.equal(again.ema.encoder.whitening.map, own.ema.encoder.whitening.map)


def test_a_network_learns_the_tiny_space():
    """After 30 epochs the best of six draws is closer than a random stack by far."""
    own = module(num_draws=6)
    fit, data = trained(own, epochs=1)
    before = float(fit.callback_metrics["val/best_mae"])
    fit, _ = trained(own, data, epochs=40)
    after = {name: float(value) for name, value in fit.callback_metrics.items()}
    print("best of 2 draws in validation, after 1 and 40 epochs:", before, after["val/best_mae"])
    assert after["val/best_mae"] < 0.5 * before


def test_a_restart_changes_nothing(tmp_path):
    """Three epochs equal two, a restart and one more, bit for bit: masks depend on (seed, epoch, stack) alone."""
    options = {"ema_decay": 0.9, "scheduler": None}
    whole = module(baselines={"gpt": decoder()}, **options)
    trained(whole, epochs=3, gradient_clip_val=0.5)
    first = module(baselines={"gpt": decoder()}, **options)
    fit, _ = trained(first, epochs=2, gradient_clip_val=0.5)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = module(baselines={"gpt": decoder()}, seed=8, **options)
    quiet_trainer(max_epochs=3, gradient_clip_val=0.5).fit(again, datamodule=films(), ckpt_path=tmp_path / "a.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def trained_weights() -> tuple[torch.Tensor, float]:
    """Of two networks after two epochs, in this process or as one of several."""
    own = module(baselines={"gpt": decoder()}).double()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    options = {"devices": 2, "strategy": "ddp"} if distributed else {}
    fit, _ = trained(own, films(noise=0.01), precision="64-true", **options)
    return weights(own), float(fit.callback_metrics["train/loss"])


def test_two_processes_train_as_one(ranks2):
    """Times, masks and noise are those of the stacks, and the loss is the mean over the tokens of all processes."""
    alone, loss = trained_weights()
    for found, loss_of_rank in ranks2(trained_weights):
        assert (found - alone).abs().max() < 1e-9
        assert loss_of_rank == pytest.approx(loss, rel=1e-9)


# ----------------------------------------------------------------------------------------------------------------- test


def run_test(own=None, data=None):
    own = own or module(baselines={"gpt": decoder()})
    trainer = quiet_trainer()
    (found,) = trainer.test(own, datamodule=data or films(), verbose=False)
    return found, own


def test_a_test_compares_all_methods():
    found, own = run_test()
    table = own.test_table.compute()
    assert len(table["index"]) == 9
    assert found["test/mae"] == pytest.approx(summary(table["net/refined_of_6"])["mean"].item())
    assert found["test/gpt/best_of_2"] == pytest.approx(table["gpt/best_of_2"].mean().item())
    for name in ("net", "gpt"):
        assert (table[f"{name}/best_of_6"] <= table[f"{name}/best_of_2"]).all()
        assert (table[f"{name}/best_of_2"] <= table[f"{name}/first"]).all()
        for n in (2, 6):
            assert (table[f"{name}/refined_of_{n}"] <= table[f"{name}/refined_top1_of_{n}"]).all()
            assert (table[f"{name}/refined_top1_of_{n}"] <= table[f"{name}/best_of_{n}"] + 1e-7).all()
    alone = torch.minimum(table["hybrid/refined_net_alone"], table["hybrid/refined_template_alone"])
    assert (table["hybrid/refined"] <= alone).all()
    rows = own.results_table()
    assert [row["method"].split(",")[0] for row in rows] == [
        "template", "template", "gpt", "gpt", "OptoLlama", "OptoLlama", "hybrid"
    ]  # fmt: skip
    assert rows[0]["best"]["mean"].item() == pytest.approx(table["template_20/best"].mean().item())
    assert own.equal_storage() == 4 * sum(p.numel() for p in own.net.parameters()) // (2 * 2 * 11 + 4)
    assert own.sampled["net"][0] == 9 * 6


def test_results_do_not_depend_on_batches():
    """Uneven last batches, one batch, and sampling in small portions give the same table."""
    first, own = run_test(data=films(eval_batch_size=4))
    net, gpt = own.net.state_dict(), own.baselines["gpt"].state_dict()
    for size, sequences in ((9, 1024), (2, 7)):
        other = module(baselines={"gpt": decoder()}, max_sequences=sequences)
        other.net.load_state_dict(net)
        other.baselines["gpt"].load_state_dict(gpt)
        again, _ = run_test(other, films(eval_batch_size=size))
        assert again == pytest.approx(first, rel=1e-6, abs=1e-9)


def test_what_a_test_step_hands_to_figures():
    own, data = module(baselines={"gpt": decoder()}), films()
    seen = []
    step = own.test_step

    def watched(batch, batch_idx):
        seen.append(step(batch, batch_idx))
        return seen[-1]

    own.test_step = watched
    run_test(own, data)
    out = seen[0]
    assert out["draws_mae_OptoLlama"].shape == out["draws_mae_gpt"].shape == (4, 6)
    assert out["trajectory"].shape == (4, 4, 4) and out["trajectory_mae"].shape == (4, 4)
    torch.testing.assert_close(out["trajectory_mae"][:, -1], out["draws_mae_OptoLlama"][:, 0])
    mae = errors(out["prediction"][:, None], out["target"], out["weight"])[:, 0]
    torch.testing.assert_close(mae, out["refined_mae"].double(), rtol=1e-5, atol=1e-7)
    own_spectrum = own.refiner.simulate(out["material"], out["thickness_nm"])
    torch.testing.assert_close(own_spectrum, out["prediction"].double(), rtol=0, atol=1e-6)


def test_networks_that_do_not_fit_the_data_are_refused():
    with pytest.raises(ValueError, match=r"model\.net\.num_tokens=13, but the data have 12"):
        run_test(module(denoiser(num_tokens=13)))
    with pytest.raises(ValueError, match=r"model\.baselines\.gpt\.length=5, but the data have 4"):
        run_test(module(baselines={"gpt": decoder(length=5)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": 0}, r"model\.num_draws=0"),
        ({"report_draws": (7,)}, r"report_draws: 7 must be between 1 and model\.num_draws=6"),
        ({"hybrid": 7}, r"model\.hybrid=7"),
        ({"ema_decay": 1.0}, r"model\.ema_decay=1\.0"),
        ({"templates": ("some",)}, r"model\.templates"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_wrong_refinement_and_limits_name_the_setting():
    with pytest.raises(ValueError, match=r"model\.refinement\.lr_nm=0"):
        run_test(module(refinement=Refinement(lr_nm=0.0)))
    with pytest.raises(ValueError, match=r"model\.limits: allow: 'gold' is unknown"):
        predicted(module(limits=Limits(allow=["gold"])))
    with pytest.raises(ValueError, match=r"model\.limits: max_layers=0"):
        predicted(module(limits=Limits(max_layers=0)))
    with pytest.raises(ValueError, match="leaves no layer token"):
        predicted(module(limits=Limits(allow=["metals"], exclude=["Ag"])))


# ----------------------------------------------------------------------------------------------------------- prediction


def predicted(own, data=None, **trainer):
    data = data or films(targets=["ar_coating", "bandpass"])
    return quiet_trainer(**trainer).predict(own, datamodule=data)


def by_key(outputs):
    return {key: torch.cat([out[key] for out in outputs]) for key in outputs[0]}


def test_candidates_are_ranked_distinct_and_as_good_as_they_say(tmp_path):
    own = module()
    fit, data = trained(own)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    data = films(targets=["ar_coating", "bandpass", "perfect_absorber"])
    out = by_key(quiet_trainer().predict(own, datamodule=data, ckpt_path=tmp_path / "a.ckpt"))
    assert out["mae"].shape == (3, 3) and (out["mae"].diff(dim=1) >= 0).all()
    assert not alike(out["material"], out["thickness_nm"])[out["mae"].isfinite()].any()
    spectra = own.refiner.simulate(out["material"], out["thickness_nm"])
    torch.testing.assert_close(spectra, out["spectrum"].double(), rtol=0, atol=1e-6)
    mae = errors(out["spectrum"], out["target"], out["weight"])
    there = out["mae"].isfinite()
    torch.testing.assert_close(mae[there].double(), out["mae"][there].double(), rtol=1e-4, atol=1e-7)
    assert (out["mae"] <= out["raw_mae"] + 1e-6)[there].all()
    assert (out["robust_mae"] <= out["robust_mae_p95"] + 1e-9)[there].all()
    assert set(out["source"].unique().tolist()) <= {0, 1} and SOURCES == WRITTEN_SOURCES


def test_proposals_of_networks_and_templates_keep_to_limits(tmp_path):
    own = module(limits=Limits(exclude=["metals"], max_layers=2), num_draws=20, report_draws=(2,))
    fit, _ = trained(own)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    data = films(targets=["ar_coating", "bandpass"])
    out = by_key(quiet_trainer().predict(own, datamodule=data, ckpt_path=tmp_path / "a.ckpt"))
    silver = data.vocabulary.materials.index("Ag")
    assert not (out["material"] == silver).any() and (out["material"] >= 0).sum(-1).max() <= 2
    assert {0, 1} == set(out["source"].unique().tolist())


def test_without_a_checkpoint_templates_propose():
    with pytest.warns(UserWarning, match="no checkpoint"):
        out = by_key(predicted(module()))
    assert (out["source"] == 1).all() and out["mae"].isfinite().any(1).all()
    with pytest.raises(ValueError, match="nothing proposes stacks"):
        predicted(module(predict_templates=0))


def test_variants_share_the_draws(tmp_path):
    own = module(num_draws=6, predict_templates=0)
    fit, _ = trained(own)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    data = films(targets=["bandpass"], variants=Variants(number=3))
    asked = []
    draw = own.draw

    def watched(net, batch, draws, *rest, **more):
        asked.append((list(draws), rest[2]))
        return draw(net, batch, draws, *rest, **more)

    own.draw = watched
    out = by_key(quiet_trainer().predict(own, datamodule=data, ckpt_path=tmp_path / "a.ckpt"))
    assert [draws for draws, _ in asked] == [[0, 3], [1, 4], [2, 5]]
    assert not torch.equal(asked[0][1], asked[1][1]) and torch.equal(asked[0][1], out["target"])


def test_checkpoints_of_other_spaces_are_refused(tmp_path):
    own = module()
    fit, _ = trained(own)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    data = films(materials=["Ag", "SiO2", "Al2O3"])
    with pytest.raises(ValueError, match="trained with other tokens"):
        quiet_trainer().test(module(), datamodule=data, ckpt_path=tmp_path / "a.ckpt")
    data = films(wavelength_nm=[410, 1010, 60])
    with pytest.raises(ValueError, match="trained with other wavelengths"):
        quiet_trainer().test(module(), datamodule=data, ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize(("other", "what"), [({"width": 8}, "sizes differ"), ({"depth": 2}, r"net\.blocks\.1\.")])
def test_checkpoints_of_other_networks_are_refused(tmp_path, other, what):
    fit, _ = trained(module())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=rf"other networks than model \({what}.*take the model and the baselines"):
        quiet_trainer().test(module(denoiser(**other)), datamodule=films(), ckpt_path=tmp_path / "a.ckpt")


def test_checkpoints_hold_plain_data(tmp_path):
    own = module(baselines={"gpt": decoder()}, ema_decay=0.9, scheduler=None)
    fit, _ = trained(own)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["thin_film"]["wavelength_nm"][0] == 400
    again = module(baselines={"gpt": decoder()}, ema_decay=0.9, seed=3)
    again.load_state_dict(content["state_dict"])
    assert torch.equal(weights(again.designer), weights(own.ema))


def test_validation_samples_as_it_is_told():
    own = module(val_sampler=Sampler("greedy", 2), val_draws=2)
    fit, _ = trained(own, epochs=1)
    # Greedy draws are all the same.
    assert fit.callback_metrics["val/mae"] >= fit.callback_metrics["val/best_mae"]
    partial = functools.partial(torch.optim.SGD, lr=0.1)
    assert module(optimizer=partial).make_optimizer is partial
