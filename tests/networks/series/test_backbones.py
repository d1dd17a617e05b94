"""What every backbone must do, in both places where it is used."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from networks.recycle import CycleCompressed
from networks.series.cyclenet import CycleNet
from networks.series.direct import Direct
from networks.series.dlinear import DLinear
from networks.series.itransformer import ITransformer
from networks.series.mlp import MLP
from networks.series.nlinear import NLinear
from networks.series.patchtst import PatchTST
from networks.series.rlinear import RLinear
from networks.series.tide import TiDE
from networks.series.tsmixer import TSMixer


class Sizes(NamedTuple):
    history_length: int
    horizon: int
    channels: int
    marks: int


SIZES = {
    "day_tokens": Sizes(21, 7, 24, 9),  # inside CycleCompressed
    "hours_one_series": Sizes(504, 168, 1, 4),  # inside Direct
    "hours_seven_series": Sizes(504, 168, 7, 4),
}

BACKBONES = {
    "dlinear": lambda s: DLinear(s.history_length, s.horizon, s.channels),
    "dlinear_individual": lambda s: DLinear(s.history_length, s.horizon, s.channels, individual=True),
    "nlinear": lambda s: NLinear(s.history_length, s.horizon, s.channels),
    "nlinear_individual": lambda s: NLinear(s.history_length, s.horizon, s.channels, individual=True),
    "rlinear": lambda s: RLinear(s.history_length, s.horizon, s.channels),
    "rlinear_plain": lambda s: RLinear(s.history_length, s.horizon, s.channels, affine=False, dropout=0.1),
    "cyclenet": lambda s: CycleNet(s.history_length, s.horizon, s.channels, cycle_length=24),
    "cyclenet_mlp": lambda s: CycleNet(s.history_length, s.horizon, s.channels, 168, map="mlp", d_model=32),
    "cyclenet_plain": lambda s: CycleNet(s.history_length, s.horizon, s.channels, 24, instance_norm=False),
    "patchtst": lambda s: PatchTST(s.history_length, s.horizon),
    "patchtst_whole_window": lambda s: PatchTST(s.history_length, s.horizon, s.history_length, s.history_length),
    "itransformer": lambda s: ITransformer(s.history_length, s.horizon, d_model=32, feed_forward=48),
    "itransformer_no_marks": lambda s: ITransformer(s.history_length, s.horizon, d_model=32, use_marks=False),
    "tsmixer": lambda s: TSMixer(s.history_length, s.horizon, s.channels),
    "tsmixer_layer": lambda s: TSMixer(s.history_length, s.horizon, s.channels, norm="layer", instance_norm=False),
    "tide": lambda s: TiDE(s.history_length, s.horizon, s.marks, d_model=32, temporal_hidden=16),
    "tide_no_marks": lambda s: TiDE(s.history_length, s.horizon, 0, d_model=32, temporal_hidden=16, layer_norm=False),
    "mlp": lambda s: MLP(s.history_length, s.horizon, s.channels, s.marks),
    "mlp_linear": lambda s: MLP(s.history_length, s.horizon, s.channels, s.marks, hidden_layers=0),
    "mlp_no_embedding": lambda s: MLP(s.history_length, s.horizon, s.channels, 0, d_model=s.channels),
}


@pytest.fixture(params=SIZES)
def sizes(request: pytest.FixtureRequest) -> Sizes:
    return SIZES[request.param]


@pytest.fixture(params=BACKBONES)
def backbone(request: pytest.FixtureRequest, sizes: Sizes) -> nn.Module:
    torch.manual_seed(0)
    return BACKBONES[request.param](sizes)


def inputs(sizes: Sizes, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    history = torch.randn(batch, sizes.history_length, sizes.channels, generator=generator, dtype=dtype)
    history_marks = torch.rand(batch, sizes.history_length, sizes.marks, generator=generator, dtype=dtype) - 0.5
    forecast_marks = torch.rand(batch, sizes.horizon, sizes.marks, generator=generator, dtype=dtype) - 0.5
    return history, history_marks, forecast_marks, torch.arange(batch) * 31 + 5000


def test_shape_and_gradients(backbone: nn.Module, sizes: Sizes) -> None:
    forecast = backbone(*inputs(sizes, batch=4))
    assert forecast.shape == (4, sizes.horizon, sizes.channels)
    forecast.square().mean().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def batch_of_hours(channels: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "history": (4, 504, channels),
        "history_profile": (4, 504, channels),
        "forecast_profile": (4, 168, channels),
        "history_calendar": (4, 21, channels, 9),
        "forecast_calendar": (4, 7, channels, 9),
        "history_marks": (4, 504, 4),
        "forecast_marks": (4, 168, 4),
    }
    batch = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return batch | {"origin": torch.tensor([26, 30, 31, 40]) * 24}


@pytest.mark.parametrize("name", BACKBONES)
def test_inside_cycle_compressed(name: str) -> None:
    """On day tokens of the residual: the profile at first, and trainable from there."""
    torch.manual_seed(0)
    net = CycleCompressed(BACKBONES[name](SIZES["day_tokens"]), history_length=504, horizon=168, cycle_length=24)
    batch = batch_of_hours()
    forecast = net.eval()(batch)
    assert forecast.shape == (4, 168, 2)
    torch.testing.assert_close(forecast, batch["forecast_profile"])
    forecast.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in net.head.parameters())


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("channel_independent", [False, True])
def test_inside_direct(name: str, channel_independent: bool) -> None:
    torch.manual_seed(0)
    sizes = Sizes(504, 168, 1 if channel_independent else 2, 4)
    batch = batch_of_hours()
    forecast = Direct(BACKBONES[name](sizes), channel_independent)(batch)
    assert forecast.shape == (4, 168, 2)
    assert forecast.isfinite().all()


def test_double_precision(backbone: nn.Module, sizes: Sizes) -> None:
    forecast = backbone.double().eval()(*inputs(sizes, dtype=torch.float64))
    assert forecast.dtype == torch.float64
    assert forecast.isfinite().all()


def test_evaluation_depends_on_its_window_alone(backbone: nn.Module, sizes: Sizes) -> None:
    """In eval: no random numbers, no state left behind, no influence of the other windows of the batch."""
    backbone.double().eval()
    arguments = inputs(sizes, dtype=torch.float64)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    random_state = torch.get_rng_state()
    with torch.no_grad():
        together = backbone(*arguments)
        alone = backbone(*(argument[1:2] for argument in arguments))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    torch.testing.assert_close(together[1:2], alone, rtol=1e-9, atol=1e-10)


def test_state_dict_round_trip(request: pytest.FixtureRequest, backbone: nn.Module, sizes: Sizes) -> None:
    make = BACKBONES[request.node.callspec.params["backbone"]]
    backbone(*inputs(sizes)).mean().backward()  # moves the running statistics, where there are any
    torch.manual_seed(7)
    other = make(sizes)
    other.load_state_dict(backbone.state_dict())
    backbone.eval()
    other.eval()
    assert torch.equal(backbone(*inputs(sizes)), other(*inputs(sizes)))


def test_single_window_in_training(backbone: nn.Module, sizes: Sizes) -> None:
    """The last batch of an epoch may hold one window."""
    assert backbone.train()(*inputs(sizes, batch=1)).isfinite().all()


def test_constant_window_is_finite(backbone: nn.Module, sizes: Sizes) -> None:
    _, *context = inputs(sizes)
    history = torch.full((3, sizes.history_length, sizes.channels), 2.5, requires_grad=True)
    forecast = backbone(history, *context)
    forecast.sum().backward()
    assert forecast.isfinite().all()
    assert history.grad.isfinite().all()


@pytest.mark.parametrize("name", ["dlinear", "nlinear", "rlinear", "patchtst", "itransformer", "tsmixer"])
def test_context_is_optional(name: str) -> None:
    sizes = SIZES["day_tokens"]
    history, *_ = inputs(sizes)
    assert BACKBONES[name](sizes)(history).shape == (3, sizes.horizon, sizes.channels)


@pytest.mark.parametrize(("name", "key"), [("cyclenet", "origin"), ("tide", "marks=0"), ("mlp", "marks=0")])
def test_missing_context_is_named(name: str, key: str) -> None:
    sizes = SIZES["day_tokens"]
    history, *_ = inputs(sizes)
    with pytest.raises(ValueError, match=key):
        BACKBONES[name](sizes)(history)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: DLinear(21, 7, 24, kernel_size=24), "kernel_size=24"),
        (lambda: CycleNet(21, 7, 24, cycle_length=0), "cycle_length=0"),
        (lambda: CycleNet(21, 7, 24, cycle_length=7, map="cubic"), "map='cubic'"),
        (lambda: PatchTST(21, 7, patch_length=24), "patch_length=24"),
        (lambda: PatchTST(21, 7, patch_length=4, stride=5), "stride=5"),
        (lambda: PatchTST(21, 7, d_model=16, heads=3), "heads=3"),
        (lambda: ITransformer(21, 7, d_model=32, heads=5), "heads=5"),
        (lambda: TSMixer(21, 7, 24, norm="group"), "norm='group'"),
        (lambda: TiDE(21, 7, 9, encoder_layers=0), "encoder_layers=0"),
        (lambda: MLP(21, 7, 24, 9, hidden_layers=-1), "hidden_layers=-1"),
    ],
)
def test_wrong_options_are_named(make, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        make()
