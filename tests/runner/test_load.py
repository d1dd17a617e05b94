"""`load_run` rebuilds a run from its folder alone."""

from __future__ import annotations

import shutil

import pytest
import torch

from networks.lottery.sparse_layers import SparseBayesLinear
from networks.lottery.tickets import Ticket, save_ticket, ticket_path
from networks.masks import density, masked_weights, masks_of
from runner import job
from runner.load import load_run
from tests.composing import composed, plain, tiny


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert job.run(tiny(folder, "seed=3"))["status"] == "completed"
    return folder


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_the_module_predicts_as_the_run_did(run_dir, tmp_path, checkpoint):
    moved = tmp_path / "moved"
    shutil.copytree(run_dir, moved)
    module, datamodule, config = load_run(moved, checkpoint)
    assert config == tiny(run_dir, "seed=3") and not module.training
    stored = torch.load(run_dir / f"checkpoints/{checkpoint}.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, stored[name]) for name, value in module.state_dict().items())
    datamodule.setup("test")
    inputs = datamodule.test.tensors[0]
    loss = torch.nn.functional.mse_loss(module.net(inputs), datamodule.test.tensors[1]).item()
    if checkpoint == "best":
        result = job.run(tiny(run_dir, "seed=3", "train=false"))  # evaluates the best checkpoint again
        assert loss == pytest.approx(result["metrics"]["test/loss"], rel=1e-6)


def test_a_path_and_no_checkpoint(run_dir, tmp_path):
    assert load_run(run_dir, str(run_dir / "checkpoints/last.ckpt"))[2]["name"] == "tiny"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_run(tmp_path)


def lottery(tmp_path, **about):
    """A ticket of a run that never ran, and the network that it holds."""
    config = plain(composed("experiment=bayesian_lottery", "model.net.hidden=[24,16]", run_dir=tmp_path))
    module, _ = job.build(config)
    masks = {name: torch.rand(mask.shape) < 0.05 for name, mask in masks_of(masked_weights(module.net)).items()}
    state = {name: value for name, value in module.net.state_dict().items() if not name.endswith("_mask")}
    path = ticket_path(tmp_path / "tickets", 3)
    trained = {name: value + 1 for name, value in state.items()}
    save_ticket(path, Ticket(masks, state, trained, about={"level": 3, "config": config, **about}))
    return path, masks, trained


def test_a_ticket_is_loaded_from_its_file_alone(tmp_path):
    """With the weights of the end of its level, since no best ones are known; executed as asked for."""
    path, masks, trained = lottery(tmp_path)
    module, datamodule, config = load_run(path, execution="compact", execution_noise="dense")
    assert not module.training and config["model"]["execution"] == "compact" and datamodule is not None
    assert torch.equal(module.net.layers[0].weight_mask, masks["layers.0.weight"])
    assert torch.equal(module.net.layers[0].weight_mu, trained["layers.0.weight_mu"])
    initial, _, _ = load_run(path, "initial")
    torch.testing.assert_close(initial.net.layers[0].weight_mu, trained["layers.0.weight_mu"] - 1)
    image = torch.randn(5, 1, 8, 8)
    plain_module, _, _ = load_run(path, "trained")
    with torch.no_grad():
        expected, found = (m.logits(image).log_probability for m in (plain_module, module))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert isinstance(module._executed[None].layers[0], SparseBayesLinear)
    with pytest.raises(ValueError, match="holds no configuration: build the module yourself"):
        load_run(lottery(tmp_path, config=None)[0])


def test_masks_of_a_callback_are_loaded(tmp_path):
    """A classifier knows of no masks; those of its checkpoint and of its tickets come with them."""
    small = ("debug=fast", "callbacks=iterative_pruning", "~callbacks.energy", "test=false", "predict=false")
    result = job.run(plain(composed("experiment=classification", *small, run_dir=tmp_path)))
    assert result["status"] == "completed", result
    for source in (tmp_path, tmp_path / "tickets/level_01.pt"):
        module, _, _ = load_run(source)
        assert density(masks_of(masked_weights(module))) == pytest.approx(0.8, abs=1e-3)
