from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.pruning.budget import keep_for
from networks.pruning.cost import dense_state, latencies, macs, plain_state, resized, saved_bytes, sizes, sparse_state
from networks.pruning.groups import choose, shrink
from networks.pruning.quantization import quantized
from networks.pruning.unstructured import masks_for, scores
from networks.pruning.weights import apply_masks, num_real, prunable_weights
from networks.series.direct import Direct
from networks.series.fedformer import FourierBlock
from tests.networks.pruning.subjects import STUDY, build
from tests.networks.series.contract import CHANNELS, inputs


def batch(size: int = 3) -> dict[str, torch.Tensor]:
    return dict(zip(("history", "history_marks", "forecast_marks"), inputs(size), strict=True))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 7)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.layer(batch["history"])


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = FourierBlock(torch.tensor([1, 3, 4]), heads=1, width=5)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.block(batch["history"].unsqueeze(2))


def test_multiplications_by_hand() -> None:
    assert macs(Linear(), batch()) == 24 * 5 * 7
    assert macs(Fourier(), batch()) == 4 * 3 * 5 * 5, "a complex product is four real ones"


@pytest.mark.parametrize("name", STUDY)
def test_multiplications_shrink(name: str) -> None:
    network = Direct(build(name))
    small = shrink(network, choose(network, 0.5))
    assert 0 < macs(small, batch()) < 0.7 * macs(network, batch())
    # Crossformer's routers are projected once per batch.
    assert name == "crossformer" or macs(network, batch(5)) == macs(network, batch(2))


def test_sparse_file_is_smaller_and_complete() -> None:
    network = build("transformer", d_model=64, feed_forward=128)
    weights = prunable_weights(network, CHANNELS)
    dense = sizes(network)
    apply_masks(weights, masks_for(weights, scores("l1", weights), 0.1))
    found = sizes(network)
    assert found["dense"] == pytest.approx(dense["dense"], rel=0.01), "zeros in a dense file save nothing"
    assert found["sparse"] < 0.35 * found["dense"] and found["zip"] < 0.5 * dense["zip"]
    restored = dense_state(sparse_state(network))
    assert restored.keys() == plain_state(network).keys()
    assert all(torch.equal(restored[name], value) for name, value in plain_state(network).items())


@pytest.mark.parametrize(("budget", "part"), [("parameters", 0.3), ("macs", 0.4), ("channels", 0.5)])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_budgets_are_met(budget: str, part: float, allocation: str) -> None:
    network = Direct(build("transformer", d_model=64, feed_forward=128))
    small = shrink(network, keep_for(network, part, budget, allocation=allocation, batch=batch()))
    found = {
        "parameters": num_real(small) / num_real(network),
        "macs": macs(small, batch()) / macs(network, batch()),
        "channels": part,
    }
    assert found[budget] == pytest.approx(part, abs=0.04)


def test_budgets_out_of_reach_are_refused() -> None:
    network = build("transformer")
    with pytest.raises(ValueError, match="cannot be reached"):
        keep_for(network, 0.1, "parameters", ["ff"])
    with pytest.raises(ValueError, match="budget='bytes'"):
        keep_for(network, 0.5, "bytes")
    with pytest.raises(ValueError, match="part=0"):
        keep_for(network, 0, "parameters")
    with pytest.raises(ValueError, match="give one"):
        keep_for(network, 0.5, "latency")
    assert keep_for(network, 1.0, "parameters") == {}


def test_latencies_tell_the_slow_network() -> None:
    class Slow(Linear):
        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            for _ in range(50):
                super().forward(batch)
            return super().forward(batch)

    fast, slow = latencies([Linear(), Slow()], resized(batch(), 8), repeats=5)
    assert 0 < 5 * fast < slow


def test_quantised_network() -> None:
    network = build("transformer", d_model=64, feed_forward=128)
    weights = prunable_weights(network, CHANNELS)
    apply_masks(weights, masks_for(weights, scores("l1", weights), 0.5))
    small = quantized(network)
    assert saved_bytes(small.state_dict()) < 0.5 * sizes(network)["dense"]
    with torch.no_grad():
        expected, found = network(*inputs()), small(*inputs())
    assert (found - expected).square().mean() < 1e-3 * expected.var()
