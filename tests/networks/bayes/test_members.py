"""A deep ensemble is networks that know nothing of each other."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from datamodules.images import Images
from lightning_modules.bayes import BayesClassifier
from networks.bayes import Members, SampleContext, to_ensemble
from networks.cnn import CNN
from networks.mlp import MLP
from strategies.sampling_parallel import SamplingParallel
from tests.lightning_modules.tiny_series import quiet_trainer
from tests.strategies import nets


def alone(net: nn.Module, ensemble: nn.Module, member: int) -> nn.Module:
    """One network of an ensemble as an ordinary one."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for name, module in ensemble.named_modules():
            if isinstance(module, Members):
                layer = net.get_submodule(name)
                layer.weight.copy_(module.weight[member])
                layer.bias.copy_(module.bias[member])
    return net


@pytest.mark.parametrize(
    ("net", "shape"),
    [(MLP(hidden=(16,)), (1, 8, 8)), (nn.Sequential(nn.Conv2d(2, 3, 3, 2, "valid"), nn.Flatten()), (2, 8, 8))],
    ids=["linear", "convolution"],
)
def test_sample_s_is_network_s(net, shape):
    torch.manual_seed(0)
    net = net.double()
    ensemble = to_ensemble(copy.deepcopy(net), 4)
    image = torch.randn(5, *shape, dtype=torch.float64)
    with SampleContext([1, 3], 4, batch=5):
        out = ensemble(image)
    expected = torch.cat([alone(net, ensemble, s)(image) for s in (1, 3)])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out[:5], out[5:])


def test_the_first_network_is_the_one_given_and_the_others_have_its_numbers():
    layer = nn.Linear(6, 4)
    members = Members(layer, 3)
    assert torch.equal(members.weight[0], layer.weight) and torch.equal(members.bias[0], layer.bias)
    for weight in members.weight[1:]:
        assert torch.equal(weight.flatten().sort().values, layer.weight.flatten().sort().values)
        assert not torch.equal(weight, layer.weight)


def test_networks_train_as_if_alone():
    """Two epochs of gradient descent with momentum: each network ends where it ends by itself, to 1e-12."""
    torch.manual_seed(1)
    net = MLP(hidden=(12,)).double()
    module = BayesClassifier(
        copy.deepcopy(net),
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
        posterior="ensemble",
        num_samples=3,
        num_eval_samples=3,
        objective="elbo",
    ).double()
    nets = [alone(net, module.net, s) for s in range(3)]
    data = Images(test_size=360, batch_size=128, max_train=512, val_fraction=0.1, seed=2)
    trainer = quiet_trainer(max_epochs=2, precision="64-true")
    seen = []

    step = module.training_step
    module.training_step = lambda batch, batch_idx: seen.append(batch) or step(batch, batch_idx)
    trainer.fit(module, datamodule=data)
    assert len(seen) > 4
    for s, one in enumerate(nets):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        for batch in seen:
            optimizer.zero_grad()
            F.cross_entropy(one(batch["image"].double()), batch["label"]).backward()
            optimizer.step()
        for name, value in alone(net, module.net, s).named_parameters():
            torch.testing.assert_close(value, one.get_parameter(name), rtol=1e-12, atol=1e-12)


def on_ranks(folder, size):
    """Weights after two epochs on two processes that share ``size`` ways what an ensemble of four has."""
    torch.manual_seed(1)
    optimizer = functools.partial(torch.optim.Adam, lr=1e-2)
    options = {"posterior": "ensemble", "objective": "elbo", "num_samples": 4, "num_eval_samples": 4}
    module = BayesClassifier(MLP(hidden=(12,)).double(), optimizer, **options).double()
    data = Images(test_size=360, batch_size=128, max_train=512, val_fraction=0.1, seed=2)
    strategy = SamplingParallel(sample_parallel_size=size)
    module, _ = nets.fit(strategy, folder, module=module, epochs=2, datamodule=data, precision="64-true")
    return nets.weights(module)


def test_processes_share_the_networks(ranks2, tmp_path):
    """A network gets the gradient of the process that evaluates it, in full."""
    by_samples, by_data = (ranks2(on_ranks, str(tmp_path), size) for size in (2, 1))
    assert torch.equal(*by_samples)
    torch.testing.assert_close(by_samples[0], by_data[0], rtol=1e-10, atol=1e-12)


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match=r"model.objective=elbo \(now predictive\) and model.num_eval_samples=16"):
        BayesClassifier(MLP(), posterior="ensemble")
    with pytest.raises(ValueError, match=r"no linear or convolutional layer"):
        to_ensemble(nn.ReLU(), 2)
    ensemble = to_ensemble(CNN(num_channels=3, widths=(4,)), 2)
    with pytest.raises(RuntimeError, match="without samples"):
        ensemble(torch.zeros(1, 3, 32, 32))
    with SampleContext([2], 3, batch=1), pytest.raises(ValueError, match="sample 2 of an ensemble of 2"):
        ensemble(torch.zeros(1, 3, 32, 32))
