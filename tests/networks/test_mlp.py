from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.mlp import MLP


def test_it_is_the_plain_sequence_of_layers():
    net = MLP(10, 1, 8, [512, 512])
    assert sum(p.numel() for p in net.parameters()) == 64 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10 == 301_066
    plain = nn.Sequential(nn.Flatten(), net.layers[0], nn.ReLU(), net.layers[1], nn.ReLU(), net.layers[2])
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(net(images), plain(images))
    assert list(net.state_dict())[:2] == ["layers.0.weight", "layers.0.bias"]


def test_no_hidden_layer_is_a_linear_classifier():
    assert [name for name, _ in MLP(3, 2, 4, []).named_parameters()] == ["layers.0.weight", "layers.0.bias"]


def test_dropout_is_for_training():
    net, images = MLP(hidden=[64], dropout=0.5), torch.randn(4, 1, 8, 8)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match=r"model\.net\.hidden=\[8, 0\]"):
        MLP(hidden=[8, 0])
