from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from networks.ensemble import Ensemble


class Scaled(nn.Module):
    def __init__(self, bias: float = 0.0, weight: float | None = None) -> None:
        super().__init__()
        if bias > 5:
            raise ValueError(f"net.bias={bias} is too large.")
        self.map = nn.Linear(3, 3)
        if weight is not None:
            nn.init.constant_(self.map.weight, weight)
        nn.init.constant_(self.map.bias, bias)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.map(batch["history"])

    def penalty(self) -> Tensor:
        return self.map.weight.square().sum()


BATCH = {"history": torch.arange(6.0).view(2, 3)}


def test_forecast_is_the_mean_of_the_members():
    net = Ensemble(Scaled, [{}, {"bias": 1.0}, {"weight": 0.5}])
    expected = sum(member(BATCH) for member in net.members) / 3
    assert torch.allclose(net(BATCH), expected)
    assert [torch.equal(a, b(BATCH)) for a, b in zip(net.member_outputs(BATCH), net.members, strict=True)] == [True] * 3
    assert torch.allclose(net.penalty(), sum(member.map.weight.square().sum() for member in net.members))


def test_equal_settings_start_from_different_weights_and_variants_override():
    net = Ensemble(functools.partial(Scaled, bias=2.0), [{}, {}, {"bias": 3.0}])
    assert not torch.equal(net.members[0].map.weight, net.members[1].map.weight)
    assert [member.map.bias[0].item() for member in net.members] == [2.0, 2.0, 3.0]


def test_members_without_a_penalty_have_none():
    assert Ensemble(nn.Identity, [{}]).penalty() == 0


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([], r"net\.variants=\[\]"),
        ([{}, {"wdith": 3}], r"net\.variants\[1\]=\{'wdith': 3\}: .*wdith"),
        ([{"bias": 9.0}], r"net\.variants\[0\].*too large"),
    ],
)
def test_mistakes_name_the_member(variants, message):
    with pytest.raises(ValueError, match=message):
        Ensemble(Scaled, variants)
