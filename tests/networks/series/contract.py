"""What every backbone must do; each family's test file adds what is special to it."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

HISTORY, HORIZON, CHANNELS, MARKS = 24, 12, 5, 4


def inputs(
    batch: int = 3,
    history: int = HISTORY,
    horizon: int = HORIZON,
    channels: int = CHANNELS,
    marks: int = MARKS,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (batch, history, channels), (batch, history, marks), (batch, horizon, marks)
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)


def real_numbers(network: nn.Module) -> int:
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in network.parameters())


class BackboneContract:
    """Subclass, name it ``Test...`` and set ``network`` and ``sizes`` (small widths)."""

    network: ClassVar[type[nn.Module]]
    sizes: ClassVar[dict[str, Any]]
    uses_marks: ClassVar[bool] = True
    #: parameters whose gradient exists but is zero by construction; softmax ignores what is common to all keys
    zero_gradient: ClassVar[tuple[str, ...]] = ("key_projection.bias",)

    def build(self, **sizes: Any) -> nn.Module:
        torch.manual_seed(7)
        arguments = {"history_length": HISTORY, "horizon": HORIZON, "channels": CHANNELS, **self.sizes}
        if self.uses_marks:
            arguments["marks"] = MARKS
        return self.network(**{**arguments, **sizes})

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        ("history", "horizon", "channels", "marks"),
        [(24, 12, 5, 4), (21, 7, 24, 9), (25, 13, 1, 4), (7, 30, 2, 4)],
        ids=["hourly", "cycles", "odd and one channel", "horizon over history"],
    )
    def test_shape(self, history: int, horizon: int, channels: int, marks: int, training: bool) -> None:
        sizes = {"history_length": history, "horizon": horizon, "channels": channels}
        network = self.build(**sizes, **({"marks": marks} if self.uses_marks else {})).train(training)
        out = network(*inputs(3, history, horizon, channels, marks), torch.zeros(3, dtype=torch.int64))
        assert out.shape == (3, horizon, channels)
        assert out.isfinite().all()

    def test_calendar_is_optional_and_matters_when_there(self) -> None:
        history, history_marks, forecast_marks = inputs()
        if not self.uses_marks:
            network = self.build().eval()
            assert torch.equal(network(history), network(history, history_marks, forecast_marks))
            return
        assert self.build(marks=0)(history).shape == (3, HORIZON, CHANNELS)
        network = self.build().eval()
        reference = network(history, history_marks, forecast_marks)
        assert not torch.allclose(reference, network(history, history_marks + 1, forecast_marks))
        assert not torch.allclose(reference, network(history, history_marks, forecast_marks + 1))
        with pytest.raises(ValueError, match="marks=4"):
            network(history)

    def test_wrong_sizes_are_named(self) -> None:
        history, *marks = inputs(channels=CHANNELS + 1)
        with pytest.raises(ValueError, match="channels"):
            self.build()(history, *marks)
        with pytest.raises(ValueError, match="heads=3"):
            self.build(heads=3)

    def test_gradient_reaches_every_trainable_parameter(self) -> None:
        network = self.build().double().train()
        weights = torch.randn(3, HORIZON, CHANNELS, dtype=torch.float64)
        (network(*inputs(dtype=torch.float64)) * weights).sum().backward()
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None, name
                continue
            assert parameter.grad is not None, f"{name} gets no gradient (DDP would stop)"
            if not name.endswith(self.zero_gradient):
                assert parameter.grad.abs().max() > 1e-13, f"the gradient of {name} is zero"

    def test_evaluation_is_deterministic_and_leaves_the_random_state(self) -> None:
        network = self.build(dropout=0.5).eval()
        with torch.no_grad():
            first = network(*inputs())
            torch.manual_seed(123)
            before = torch.get_rng_state()
            second = network(*inputs())
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first, second)
        assert torch.equal(first, copy.deepcopy(network)(*inputs()))

    def test_evaluation_of_a_sample_does_not_depend_on_its_batch(self) -> None:
        network = self.build().double().eval()
        history, *marks = inputs(6, dtype=torch.float64)
        whole = network(history, *marks)
        torch.testing.assert_close(network(history[2:3], *(m[2:3] for m in marks)), whole[2:3], rtol=0, atol=1e-11)

    def test_float64(self) -> None:
        single, double = self.build().eval(), self.build().double().eval()
        out = double(*inputs(dtype=torch.float64))
        assert out.dtype == torch.float64
        torch.testing.assert_close(single(*inputs()), out.float(), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("training", [True, False])
    def test_bfloat16_autocast(self, training: bool) -> None:
        network = self.build(dropout=0.0).train(training)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = network(*inputs())
        assert out.isfinite().all()
        out.float().sum().backward()

    def test_bfloat16_weights(self) -> None:
        network = self.build().to(torch.bfloat16).eval()
        out = network(*inputs(dtype=torch.bfloat16))
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()

    def test_state_dict_round_trip(self) -> None:
        network = self.build().eval()
        torch.manual_seed(99)
        other = self.network(
            **{"history_length": HISTORY, "horizon": HORIZON, "channels": CHANNELS, **self.sizes},
            **({"marks": MARKS} if self.uses_marks else {}),
        ).eval()
        assert not torch.equal(other(*inputs()), network(*inputs()))
        other.load_state_dict(network.state_dict())
        assert torch.equal(other(*inputs()), network(*inputs()))

    def test_learns(self) -> None:
        network = self.build(dropout=0.0)
        target = inputs()[0][:, -HORIZON:]
        optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(60):
            loss = (network(*inputs()) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0]


SMALL: dict[str, Any] = {"d_model": 16, "heads": 4, "feed_forward": 32}
