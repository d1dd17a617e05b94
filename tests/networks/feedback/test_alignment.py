"""Feedback alignment: with the true weights it is backpropagation, with others it is what it should be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from networks.cifar_resnet import CifarResNet
from networks.feedback import RandomBackward
from networks.vit import ViT

NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), (5,)),
    "vit": (lambda: ViT(3, 1, 8, 4, 8, 2, 2), (1, 8, 8)),
    "resnet": (lambda: CifarResNet(8, 3, 1, 0.25), (1, 8, 8)),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 6, 2, dilation=2, groups=2, padding=1)),
        (1, 9, 9),
    ),
}


def gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(net(x).square().sum(), list(net.parameters())))


@pytest.mark.parametrize("name", NETWORKS)
def test_with_the_true_weights_it_is_backpropagation(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = make().double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    fa = RandomBackward(net, seed=0)
    for layer_name, weight in fa.weights().items():
        weight.copy_(net.get_submodule(layer_name).weight)
    with fa.of(net):
        output, found = net(x), gradients(net, x)
    torch.testing.assert_close(output, net(x))
    for one, other in zip(found, gradients(net, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert all("forward" not in vars(module) for module in net.modules())


def test_closed_form_of_three_layers():
    torch.manual_seed(0)
    net = NETWORKS["linear"][0]().double()
    fa = RandomBackward(net, seed=1)
    b2, b3 = fa.weights()["2"], fa.weights()["4"]
    x = torch.randn(7, 5, dtype=torch.float64)
    h1 = (x @ net[0].weight.T + net[0].bias).tanh()
    h2 = (h1 @ net[2].weight.T + net[2].bias).tanh()
    delta3 = 2 * (h2 @ net[4].weight.T + net[4].bias)
    delta2 = (delta3 @ b3) * (1 - h2**2)
    delta1 = (delta2 @ b2) * (1 - h1**2)
    wanted = [delta1.T @ x, delta1.sum(0), delta2.T @ h1, delta2.sum(0), delta3.T @ h2, delta3.sum(0)]
    with fa.of(net):
        found = gradients(net, x)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[0], gradients(net, x)[0])


def test_the_weights_are_fixed_private_and_saved():
    net = NETWORKS["linear"][0]()
    state = torch.get_rng_state()
    fa = RandomBackward(net, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(fa.state_dict()) == 3 and not list(fa.parameters())
    assert all(w.abs().max() <= w.shape[1] ** -0.5 for w in fa.weights().values())
    twin = copy.deepcopy(net)
    with fa.of(net):
        gradients(net, torch.randn(2, 5))
        assert all("forward" not in vars(module) for module in twin.modules())


def test_layers_that_hide_their_matrices_are_refused():
    with pytest.raises(ValueError, match="multiplies by its weights itself"):
        RandomBackward(nn.Sequential(nn.MultiheadAttention(4, 2)), seed=0)
    conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    with RandomBackward(conv, 0).of(conv), pytest.raises(ValueError, match="pads with 'circular'"):
        conv(torch.zeros(1, 1, 4, 4))
