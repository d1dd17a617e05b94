from __future__ import annotations

import torch
from torch import Tensor

from networks.series.cyclenet import CycleNet
from networks.series.direct import Direct
from networks.series.tide import TiDE


def batch_of(size: int, history_length: int, horizon: int, channels: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "history": torch.randn(size, history_length, channels, generator=generator, dtype=torch.float64),
        "history_marks": torch.randn(size, history_length, 4, generator=generator, dtype=torch.float64),
        "forecast_marks": torch.randn(size, horizon, 4, generator=generator, dtype=torch.float64),
        "origin": torch.tensor([100 + 5 * i for i in range(size)]),
    }


def test_hands_everything_to_the_backbone() -> None:
    batch = batch_of(3, 48, 24, 2)
    backbone = TiDE(48, 24, marks=4, d_model=16, temporal_hidden=8).double().eval()
    expected = backbone(batch["history"], batch["history_marks"], batch["forecast_marks"], batch["origin"])
    assert torch.equal(Direct(backbone)(batch), expected)


def test_channel_independent_is_a_loop_over_channels() -> None:
    """Marks and phase must stay with their window when the channels are folded into the batch."""
    batch = batch_of(3, 48, 24, 5)
    torch.manual_seed(0)
    tide = TiDE(48, 24, marks=4, d_model=16, temporal_hidden=8).double().eval()
    cyclenet = CycleNet(48, 24, channels=1, cycle_length=24).double()
    torch.nn.init.normal_(cyclenet.cycle)
    for backbone in (tide, cyclenet):
        folded = Direct(backbone, channel_independent=True)(batch)
        assert folded.shape == (3, 24, 5)
        for channel in range(5):
            alone = Direct(backbone)(batch | {"history": batch["history"][..., channel : channel + 1]})
            torch.testing.assert_close(folded[..., channel : channel + 1], alone)


def test_context_may_be_absent() -> None:
    batch = {"history": torch.randn(2, 48, 3)}
    assert Direct(TiDE(48, 24, marks=0, d_model=16), channel_independent=True)(batch).shape == (2, 24, 3)
