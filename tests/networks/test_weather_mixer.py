"""WeatherMixer on one device: the published network, its counts, its choices and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from networks.weather_mixer import WeatherMixer
from parallel.sharding import JigsawGrid
from tests.networks.reference_mixer import reference_of

SIZES = {"height": 4, "width": 12, "num_inputs": 8, "num_outputs": 6, "patch": 3, "dim": 16, "blocks": 2}


def randomized(net: WeatherMixer) -> WeatherMixer:
    """Random numbers in all parameters, those of norms and biases too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


@pytest.mark.parametrize(("norm", "groups"), [("exact", 1), ("grouped", 2)])
def test_reference(norm, groups):
    """The same function as the published network, on one device and on devices with half of the channels each."""
    net = randomized(WeatherMixer(**SIZES, blend="reference", norm=norm, norm_groups=2))
    ref = reference_of(net, groups)
    x = torch.randn(2, SIZES["height"], SIZES["width"], SIZES["num_inputs"])
    wanted = ref(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(net(x), wanted, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in ref.parameters()) == net.num_parameters


def test_it_begins_as_the_state_and_a_tenth_of_its_output():
    net = WeatherMixer(**SIZES)
    x = torch.randn(2, 4, 12, 8)
    net.recovery.bias.data.zero_()
    for name in ("weight_processed", "weight_embedded"):
        getattr(net.recovery, name).data.zero_()
    assert torch.equal(net(x), x[..., :6])
    net.recovery.bias.data.fill_(2.0)
    torch.testing.assert_close(net(x), x[..., :6] + 0.2)
    residual = WeatherMixer(**SIZES, blend="residual")
    residual.load_state_dict(net.state_dict(), strict=False)
    torch.testing.assert_close(residual(x), x[..., :6] + 2.0)


def test_steps_repeat_the_processor():
    net = WeatherMixer(**SIZES, blend="residual")
    x = torch.randn(1, 4, 12, 8)
    z = first = net.embedding(net._to_patches(x))
    for _ in range(3):
        for block in net.blocks:
            z = block(z)
    y = net._to_points(net.recovery(torch.cat([net.norm(z), first], -1)))
    torch.testing.assert_close(net(x, 3), x[..., :6] + y)


def test_tokens_and_features_are_numbered_as_the_grid_wants():
    net = WeatherMixer(**SIZES)
    x = torch.arange(4 * 12 * 8).view(1, 4, 12, 8).float()
    patches = net._to_patches(x)
    token, channel, offset = 2 * 4 + 3, 5, 1  # third patch of the southernmost circle
    assert patches[0, token, channel * 3 + offset] == x[0, 3, 2 * 3 + offset, channel]
    assert torch.equal(net._to_points(patches), x)


def test_counts():
    """Parameters by torch, products by its counter, on one device and with the padding of two groups of channels."""
    net = WeatherMixer(**SIZES, blend="reference")
    assert net.num_parameters == sum(p.numel() for p in net.parameters())
    x = torch.randn(3, 4, 12, 8)
    with FlopCounterMode(display=False) as forward:
        out = net(x, 2)
    assert forward.get_total_flops() == net.flops(3, 2)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    embedding = net.embedding.flops(3 * 16)  # the input wants no gradient
    assert backward.get_total_flops() == 2 * net.flops(3, 2) - embedding
    padded = WeatherMixer(**SIZES | {"num_outputs": 5}, grid=JigsawGrid(1, 2))
    assert padded.flops() == WeatherMixer(**SIZES | {"num_outputs": 8}).flops()
    assert padded.num_parameters == WeatherMixer(**SIZES | {"num_outputs": 5}).num_parameters


def test_work_grows_linearly_with_the_grid_for_a_fixed_hidden_width():
    def work(width, **hidden):
        with torch.device("meta"):
            net = WeatherMixer(**SIZES | {"width": width}, **hidden)
        return net.flops(), net.num_parameters

    (flops, few), (twice, many) = (work(width, token_hidden=16) for width in (48, 96))
    assert twice == 2 * flops and many < 2 * few
    (flops, _), (more, _) = (work(width) for width in (480, 960))
    assert more / flops > 3.5  # a fraction of the tokens: nearly quadratic


def test_parameters_have_kinds():
    net = WeatherMixer(**SIZES)
    kinds = {net.parameter_kind(f"net.{name}") for name, _ in net.named_parameters()}
    assert kinds == {"embedding", "processor", "recovery", "blend"}
    assert net.parameter_kind("net.recovery.bias") == "recovery" and net.parameter_kind("norm.weight") == "processor"


def test_dropout_draws_again_in_every_pass_and_never_in_evaluation():
    net, x = WeatherMixer(**SIZES, dropout=0.3), torch.randn(2, 4, 12, 8)
    first, second = net(x), net(x)
    assert not torch.equal(first, second) and int(net.draws) == 2
    again = WeatherMixer(**SIZES, dropout=0.3)
    assert torch.equal(again(x), first)
    again.load_state_dict(net.state_dict())
    assert not torch.equal(again(x), second) and int(again.draws) == 3
    net.eval()
    assert torch.equal(net(x), net(x)) and int(net.draws) == 2
    assert not torch.equal(WeatherMixer(**SIZES, dropout=0.3, seed=1)(x), first)


def test_dropout_has_the_right_mean_and_gradient():
    from networks.jigsaw_layers import CounterDropout, Draw

    dropout, draw = CounterDropout("layer", JigsawGrid(), 0.25, 0), Draw(0, 0, torch.arange(4))
    ones = torch.ones(4, 50, 60)
    dropped = dropout(ones, draw)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs(float(dropped.mean()) - 1) < 0.03
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: dropout.after_gelu(t, draw), (x,))
    assert torch.autograd.gradcheck(lambda t: dropout(t, draw), (x,))
    torch.testing.assert_close(
        dropout.after_gelu(x, draw), torch.nn.functional.gelu(x) * (dropout(torch.ones_like(x), draw))
    )


def test_positions_differ_by_token_and_channel():
    net = WeatherMixer(**SIZES, positional="sinusoidal")
    table = net._positions(torch.zeros(1, 16, 16))
    assert table.shape == (16, 16) and float(torch.pdist(table).min()) > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 5}, "model.net.patch=5 does not divide model.net.width=12"),
        ({"num_outputs": 9}, "model.net.num_outputs=9 are the first of model.net.num_inputs=8 channels"),
        ({"blend": "plus"}, "model.net.blend='plus' is unknown; choose linear, residual, reference"),
        ({"norm": "local"}, "model.net.norm='local' is unknown"),
        ({"variant": "none"}, "model.net.variant='none' is unknown"),
        ({"positional": "learned"}, "model.net.positional='learned' is unknown"),
        ({"dropout": 1.0}, "model.net.dropout=1.0: a probability in [0, 1)"),
        ({"dim": 0}, "model.net.dim=0"),
        ({"token_hidden": 0}, "model.net.token_hidden gives a width of 0"),
        ({"channel_hidden_fraction": 0.01}, "model.net.channel_hidden_fraction gives a width of 0"),
        ({"grid": JigsawGrid(3, 1)}, "strategy.token=3 does not divide the 4 patches"),
        ({"grid": JigsawGrid(1, 9)}, "strategy.channel=9: there are only 8 input channels"),
        ({"grid": JigsawGrid(2, 2), "dim": 18, "channel_hidden_fraction": 0.5}, "a width of 9"),
        ({"grid": JigsawGrid(2, 2), "dim": 17}, "model.net.dim gives a width of 17"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WeatherMixer(**SIZES | change)


def test_widths_are_rounded_on_request():
    net = WeatherMixer(**SIZES | {"dim": 17, "token_hidden": 7}, round_dims=True, grid=JigsawGrid(2, 2))
    assert net.dim == 18 and net.blocks[0].token_in.outputs.size == 8


def test_fields_of_another_size_are_refused():
    with pytest.raises(ValueError, match=re.escape("(4, 12, 7), but the network has (4, 12, 8)")):
        WeatherMixer(**SIZES)(torch.randn(1, 4, 12, 7))
