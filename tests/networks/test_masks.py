"""Masks on ordinary layers: function, gradients, choice, names, bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from networks.masks import (
    MaskedConv2d,
    MaskedLinear,
    PruneChoice,
    alive,
    checksum,
    density,
    empty_layers,
    from_structure,
    install_masks,
    jaccard,
    layer_densities,
    masked_weights,
    masks_of,
    pack,
    structure,
    unpack,
)
from networks.mlp import MLP
from networks.vit import ViT


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2, bias=False)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)),
    )


@pytest.mark.parametrize("make", [lambda: MLP(hidden=[12, 8]), conv_net, lambda: nn.Conv1d(3, 2, 5)])
def test_a_full_mask_changes_nothing(make):
    torch.manual_seed(0)
    net = make()
    image = torch.randn(3, 3, 9) if isinstance(net, nn.Conv1d) else torch.randn(3, 1, 8, 8)
    before, names = net(image), set(net.state_dict())
    weights = install_masks(net, PruneChoice(keep_last=not isinstance(net, nn.Conv1d)))
    assert torch.equal(net(image), before)
    masks = {w.name + "_mask" for w in weights}
    assert set(net.state_dict()) == names | masks and masks == {f"{w.path}.weight_mask".lstrip(".") for w in weights}
    assert all(isinstance(w.mu, nn.Parameter) and w.log_sigma is None for w in weights)


def test_a_pruned_weight_is_no_parameter_any_more():
    """Its value does not matter, not even NaN, and its gradient is zero; the others' are those of a zero weight."""
    net = MLP(hidden=[12, 8]).double()
    image = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    weights = install_masks(net)
    twin = MLP(hidden=[12, 8]).double()
    twin.load_state_dict({k: v for k, v in net.state_dict().items() if not k.endswith("_mask")})
    for i, weight in enumerate(weights):
        mask = torch.rand(weight.mu.shape, generator=torch.Generator().manual_seed(i)) < 0.4
        weight.set_mask(mask)
        with torch.no_grad():
            twin.get_parameter(weight.name)[~mask] = 0
    expected = twin(image)
    assert torch.equal(net(image), expected)
    net(image).square().sum().backward()
    expected.square().sum().backward()
    for weight in weights:
        reference = twin.get_parameter(weight.name).grad
        assert (weight.mu.grad[~weight.mask] == 0).all()
        assert torch.equal(weight.mu.grad[weight.mask], reference[weight.mask])
        with torch.no_grad():
            weight.mu[~weight.mask] = math.nan
    assert torch.equal(net(image), expected)


def test_choice_of_layers():
    net = MLP(hidden=[12, 8])
    assert [w.path for w in PruneChoice()(net)] == ["layers.0", "layers.1"]
    assert [w.path for w in PruneChoice(keep_last=False)(net)] == ["layers.0", "layers.1", "layers.2"]
    assert [w.path for w in PruneChoice(exclude=["layers.0"])(net)] == ["layers.1"]
    assert [w.path for w in PruneChoice(include=["layers.1.weight"])(net)] == ["layers.1"]
    vit = ViT(10, 1, 8, 4, width=24, depth=1, heads=3)
    paths = ["patch_embed.proj", *(f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))]
    assert [w.path for w in PruneChoice()(vit)] == paths
    assert [w.fan_in for w in PruneChoice()(conv_net())] == [9, 18]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"include": ["layer.*"]}, "'layer.\\*' matches no layer"),
        ({"exclude": ["layers.*"]}, "no layer is left to prune"),
    ],
)
def test_mistakes_of_a_choice(choice, message):
    with pytest.raises(ValueError, match=message):
        PruneChoice(**choice)(MLP(hidden=[4]))


def test_one_pattern_is_a_list():
    with pytest.raises(ValueError, match="must be a list"):
        PruneChoice(include="layers.*")


def test_shared_weights_are_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match="share one weight"):
        PruneChoice()(net)


def test_no_layer_at_all():
    with pytest.raises(ValueError, match="no layer is left to prune"):
        install_masks(nn.Sequential(nn.ReLU()))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="has shape"):
        install_masks(MLP(hidden=[4]))[0].set_mask(torch.ones(2, 2, dtype=torch.bool))


def test_classes_and_state_dict():
    net = conv_net()
    install_masks(net)
    assert type(net[0]) is MaskedConv2d and type(net[6]) is nn.Linear
    install_masks(net, PruneChoice(keep_last=False))
    assert type(net[6]) is MaskedLinear
    assert len(masked_weights(net)) == 3
    net[0].weight_mask[0] = False
    other = conv_net()
    install_masks(other, PruneChoice(keep_last=False))
    other.load_state_dict(net.state_dict())
    assert torch.equal(masks_of(masked_weights(other))["0.weight"], net[0].weight_mask)


def test_what_masks_tell():
    masks = {"a": torch.tensor([[True, False], [True, True]]), "b": torch.zeros(4, dtype=torch.bool)}
    assert alive(masks) == 3 and density(masks) == 3 / 8
    assert layer_densities(masks) == {"a": 0.75, "b": 0.0} and empty_layers(masks) == ["b"]
    other = {"a": torch.tensor([[True, True], [False, True]]), "b": torch.tensor([True, False, False, False])}
    assert jaccard(masks, other) == 2 / 5 and jaccard(masks, masks) == 1
    assert jaccard({"b": masks["b"]}, {"b": masks["b"]}) == 1
    assert checksum(masks) != checksum(other) and checksum(masks) == checksum(dict(reversed(masks.items())))
    with pytest.raises(ValueError, match="other networks"):
        jaccard(masks, {"a": masks["a"]})


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (2, 3, 3, 3)])
def test_bits(shape):
    mask = torch.rand(shape) < 0.5
    bits = pack(mask)
    assert bits.dtype == torch.uint8 and len(bits) == math.ceil(mask.numel() / 8)
    assert torch.equal(unpack(bits, shape), mask)
    assert torch.equal(from_structure(structure({"w": mask}))["w"], mask)
