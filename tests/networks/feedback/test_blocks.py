"""Networks as chains of blocks: the chain is the network, and every parameter is in one block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from networks.cifar_resnet import CifarResNet
from networks.cnn import CNN
from networks.feedback import Perceptron, TokenNetwork, blocks_of, join
from networks.mlp import MLP
from networks.resnet import ResNet
from networks.simple_vit import SimpleViT
from networks.vgg import VGG
from networks.vit import ViT

NETWORKS = {
    "sequential": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, 10)), (1, 8, 8), 2),
    "perceptron": (lambda: Perceptron((1, 8, 8), 10, depth=3, width=12), (1, 8, 8), 4),
    "linear": (lambda: Perceptron((1, 8, 8), 10, depth=0), (1, 8, 8), 1),
    "token_network": (lambda: TokenNetwork(10, 1, 8, 2, 4, 3, 2, 4, 8), (1, 8, 8), 5),
    "mlp": (lambda: MLP(10, 1, 8, (12, 11)), (1, 8, 8), 3),
    "vit_class": (lambda: ViT(10, 1, 8, 4, 8, 3, 2), (1, 8, 8), 4),
    "vit_mean": (lambda: ViT(10, 1, 8, 4, 8, 1, 2, pool="mean"), (1, 8, 8), 2),
    "simple_vit": (lambda: SimpleViT(10, 1, 8, 4, 8, 3, 2), (1, 8, 8), 4),
    "resnet18": (lambda: ResNet(18, 10, 1, "cifar", 0.125), (1, 16, 16), 10),
    "resnet_rs": (lambda: ResNet(18, 10, 3, "rs", 0.25), (3, 32, 32), 10),
    "cifar_resnet": (lambda: CifarResNet(8, 10, 1, 0.25), (1, 8, 8), 5),
    "vgg_linear": (lambda: VGG(11, 10, 1, 0.05, 2, 32), (1, 32, 32), 9),
    "vgg_original": (lambda: VGG(11, 10, 1, 0.01, 2, 32, "original"), (1, 32, 32), 11),
    "cnn": (lambda: CNN(10, 1, (4, 6), 2), (1, 8, 8), 5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_blocks_are_the_network(name):
    make, shape, number = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    before = copy.deepcopy(net.state_dict())
    blocks = blocks_of(net)
    assert len(blocks) == number
    x = torch.randn(4, *shape)
    for training in (False, True):
        net.train(training)
        state = torch.get_rng_state()
        wanted = net(x)
        net.load_state_dict(before)
        torch.set_rng_state(state)
        h = x
        for block in blocks:
            h = block.forward(h)
        assert torch.equal(h, wanted)
        net.load_state_dict(before)
    owned = [p for block in blocks for p in block.parameters()]
    assert len(owned) == len(set(owned)) and set(owned) == set(net.parameters())
    assert net.state_dict().keys() == before.keys()


def test_a_copy_of_a_module_has_blocks_of_its_own():
    holder = nn.Module()
    holder.net = ViT(10, 1, 8, 4, 8, 2, 2)
    holder.chain = blocks_of(holder.net)
    twin = copy.deepcopy(holder)
    assert set(p for b in twin.chain for p in b.parameters()) == set(twin.net.parameters())
    with torch.no_grad():
        for p in twin.net.parameters():
            p.zero_()
    x = torch.randn(2, 1, 8, 8)
    for block in twin.chain:
        x = block.forward(x)
    assert not x.any()


def test_layers_without_parameters_belong_to_the_one_before_them():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Dropout(0.1), nn.LayerNorm(3), nn.Linear(3, 2))
    assert [len(block.parts) for block in blocks_of(net)] == [4, 1, 1]
    assert [block.name for block in blocks_of(net)] == ["1", "4", "5"]


def test_boundaries_join_blocks():
    net = Perceptron((6,), 2, depth=4, width=3)
    blocks = blocks_of(net, [2, 4])
    assert [len(block.parameters()) for block in blocks] == [4, 4, 2]
    x = torch.randn(5, 6)
    h = x
    for block in blocks:
        h = block.forward(h)
    assert torch.equal(h, net(x))
    assert len(blocks_of(net, [])) == 1
    for wrong in ([0], [5], [3, 2], [2, 2]):
        with pytest.raises(ValueError, match=r"model\.boundaries=.*between 1 and 4"):
            join(blocks_of(net), wrong)


def test_shared_weights_are_refused():
    net = Perceptron((4,), 4, depth=1, width=4)
    net[3].weight = net[1].weight
    with pytest.raises(ValueError, match=r"belongs to the blocks 1 and 3.*untie"):
        blocks_of(net)
    assert len(blocks_of(nn.Sequential(nn.Sequential(*net)))) == 1  # within a block they are its own business


def test_networks_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match=r"LSTM cannot be cut into blocks.*feedback_blocks"):
        blocks_of(nn.LSTM(3, 4))

    class Loose(nn.Sequential):
        def feedback_blocks(self):
            return blocks_of(self[0])

    with pytest.raises(ValueError, match=r"Loose: 1\.weight, 1\.bias belong to no block"):
        blocks_of(Loose(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)))
