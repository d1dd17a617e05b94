from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

from networks.pruning.groups import (
    TrimmedLayerNorm,
    choose,
    dim_groups,
    importance,
    shrink,
    widths,
    zero_removed,
)
from networks.series.direct import Direct
from networks.series.dlinear import DLinear
from networks.series.fedformer import FEDformer
from networks.series.informer import Informer
from networks.series.transformer import Transformer
from tests.networks.pruning.subjects import NETWORKS, STUDY, build
from tests.networks.series.contract import inputs, real_numbers


@pytest.mark.parametrize("granularity", ["ff", "qk", "v", "heads", "stream"])
@pytest.mark.parametrize("name", NETWORKS)
def test_without_what_is_zero_the_forecast_is_the_same(name: str, granularity: str) -> None:
    network = build(name).double()
    keep = choose(network, 0.5, [granularity])
    assert {group.kind for group in dim_groups(network) if group.name in keep} == (
        {"qk", "v"} if granularity == "heads" else {granularity}
    )
    masked, small = copy.deepcopy(network), shrink(network, keep)
    zero_removed(masked, keep)
    assert real_numbers(small) < real_numbers(network)
    batch = inputs(dtype=torch.float64)
    with torch.no_grad():
        whole, expected, found = network(*batch), masked(*batch), small(*batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert not torch.allclose(expected, whole, atol=1e-6), "nothing was removed that matters"


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("name", NETWORKS)
def test_everything_at_once(name: str, allocation: str) -> None:
    network = build(name)
    keep = choose(network, 0.6, ["ff", "qk", "v", "heads", "stream"], allocation)
    masked, small = copy.deepcopy(network), shrink(network, keep)
    zero_removed(masked, keep)
    with torch.no_grad():
        torch.testing.assert_close(small(*inputs()), masked(*inputs()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_smaller_network_trains_and_shrinks_again(name: str) -> None:
    small = shrink(build(name), choose(build(name), 0.5))
    again = shrink(small, choose(small, 0.5)).train()
    batch = inputs()
    target = batch[0][:, -12:]
    optimizer = torch.optim.Adam([p for p in again.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(25):
        loss = (again(*batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert real_numbers(again) < real_numbers(small)


@pytest.mark.parametrize("name", NETWORKS)
def test_keeping_everything_changes_nothing(name: str) -> None:
    network = build(name)
    assert choose(network, 0.0) == {}
    same = shrink(network, {group.name: torch.arange(group.size) for group in dim_groups(network)})
    assert torch.equal(same(*inputs()), network(*inputs()))
    assert not any(isinstance(module, TrimmedLayerNorm) for module in same.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_matrix_of_the_hidden_part_belongs_to_groups(name: str) -> None:
    """What no group holds is an end of the network: values, marks and segments in, channels or steps out."""
    network = build(name)
    held = {(id(part.module), part.name, part.axis) for group in dim_groups(network) for part in group.slices}
    ends = 0
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d) and "gate" not in path:
            for axis in (0, 1):
                if (id(module), "weight", axis) not in held:
                    ends += 1
                    assert path.endswith(("value", "calendar", "projection", "embedding", "prediction", "head.2")) or (
                        path in ("embedding.0", "head", "trend_projection")
                    ), f"axis {axis} of {path} is in no group"
    assert ends >= 2


def test_counts_of_the_study() -> None:
    """Section 8, line 4: a uniform half and three quarters of the Transformer at d = 512."""
    network = Transformer(96, 96, 7, label_length=48)
    assert real_numbers(network) == 10_540_039
    assert real_numbers(shrink(network, choose(network, 0.5))) == 2_648_583
    small = shrink(network, choose(network, 0.75))
    assert real_numbers(small) == 668_935 == real_numbers(Transformer(96, 96, 7, 4, 48, 128, 8, 512))


def test_a_shared_fourier_block_is_cut_once() -> None:
    network = build("fedformer")
    small = shrink(network, choose(network, 0.5, ["qk", "heads"]))
    blocks = {id(layer.attention.block) for layer in small.encoder.layers}
    assert len(blocks) == 1
    assert small.encoder.layers[0].attention.block.kernel.shape == (2, 6, 2, 4, 2)
    assert small.encoder.layers[1].attention.heads == 2


def test_importance_is_that_of_the_coupled_weights() -> None:
    network = build("transformer")
    group = next(group for group in dim_groups(network) if group.name == "encoder.0.ff")
    layer = network.encoder.layers[0].feed_forward
    expected = (layer.expand.weight.square().sum(1) + layer.contract.weight.square().sum(0)) / 2
    torch.testing.assert_close(importance(group).float(), expected / expected.mean())
    with torch.no_grad():
        layer.expand.weight[5] = 0
        layer.contract.weight[:, 5] = 0
    assert 5 not in choose(network, 1 / 24, ["ff"])["encoder.0.ff"]


def test_global_ranking_follows_the_weights_and_spares_the_last_channel() -> None:
    network = build("transformer")
    with torch.no_grad():
        small = network.decoder.layers[0].feed_forward
        small.expand.weight[3:] *= 1e-3
        small.contract.weight[:, 3:] *= 1e-3
    keep = choose(network, 0.25, ["ff"], "global")
    assert keep["decoder.0.ff"].tolist() == [0, 1, 2] or len(keep["decoder.0.ff"]) < 8
    total = sum(24 for _ in range(3))
    assert sum(len(keep.get(f"{name}.ff", range(24))) for name in ("encoder.0", "encoder.1", "decoder.0")) == round(
        0.75 * total
    )
    everything = choose(network, 1 - 3 / 72, ["ff"], "global")
    assert all(len(positions) == 1 for positions in everything.values())
    with pytest.raises(ValueError, match="at most"):
        choose(network, 0.99, ["ff"], "global")


def test_heads_keep_equally_many_channels() -> None:
    network = build("transformer")
    keep = choose(network, 0.5, ["qk"])["encoder.0.attention.qk"]
    assert torch.equal((keep // 4).bincount(), torch.full((4,), 2))
    assert widths(shrink(network, {"encoder.0.attention.qk": keep}))["encoder.0.attention.qk"] == "4 x 2"


def test_wrong_input() -> None:
    network = build("transformer")
    for ratio in (-0.1, 1.0):
        with pytest.raises(ValueError, match="ratio="):
            choose(network, ratio)
    with pytest.raises(ValueError, match="granularity='rows'"):
        choose(network, 0.5, ["rows"])
    with pytest.raises(ValueError, match="allocation='best'"):
        choose(network, 0.5, allocation="best")
    with pytest.raises(ValueError, match="no group 'ff'"):
        shrink(network, {"ff": torch.arange(2)})
    with pytest.raises(ValueError, match="would be empty"):
        shrink(network, {"encoder.0.ff": torch.arange(0)})
    with pytest.raises(ValueError, match="equally many"):
        shrink(network, {"encoder.0.attention.qk": torch.tensor([0, 1, 4, 8, 12])})
    with pytest.raises(ValueError, match="same heads"):
        shrink(network, {"encoder.0.attention.qk": torch.tensor([0, 4, 8])})
    with pytest.raises(ValueError, match="ascend"):
        shrink(network, {"encoder.0.ff": torch.tensor([3, 1])})
    with pytest.raises(ValueError, match="declares no groups"):
        dim_groups(Direct(DLinear(24, 12, 5)))


@pytest.mark.parametrize("network", [Informer, FEDformer])
def test_networks_that_mix_steps_and_heads_are_refused(network: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="reference_layout"):
        dim_groups(network(24, 12, 5, d_model=16, heads=4, feed_forward=24, reference_layout=True))


def test_groups_and_shrinking_take_no_time() -> None:
    """Section 8, line 9: at d = 64 less than two seconds each."""
    for name in STUDY:
        network = build(name, d_model=64, feed_forward=128, history_length=96, horizon=96)
        begin = time.process_time()
        shrink(network, choose(network, 0.5, ["ff", "qk", "v", "heads", "stream"], "global"))
        assert time.process_time() - begin < 2
