"""Layers cut over a grid of ranks: the same numbers as on one rank, with the traffic that the formulas say."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from networks.weather_mixer import WeatherMixer
from parallel.sharding import JigsawGrid, NormPlan, Plan, grid_of, sharded_layer_norm
from parallel.sharding.cost import Shapes, can_move_activations, cheaper, received
from parallel.sharding.counter import keep_mask, key_of, uniform_
from parallel.sharding.grid import check_sizes
from parallel.sharding.layout import Layout, pieces
from parallel.sharding.linear import rows_of
from parallel.sharding.traffic import Flow, Traffic
from tests.parallel import jigsaw_runs as runs

GRIDS = [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)]


def places(token, channel):
    return [{"token": t, "channel": c} for t in range(token) for c in range(channel)]


# ----------------------------------------------------------------------------------------------------- pure functions


@pytest.mark.parametrize(("gather", "reduce", "features"), list(itertools.product((1, 2, 3, 4), (1, 3, 4), (1, 3, 12))))
def test_pieces_cover_every_output_feature_once(gather, reduce, features):
    rows = rows_of(features, gather, reduce)
    found = [piece for block in pieces(gather, rows, reduce, features) for piece in block]
    stored = [piece.block * rows + row for piece in found for row in range(piece.rows.start, piece.rows.stop)]
    owned = [piece.owner * features + f for piece in found for f in range(piece.features.start, piece.features.stop)]
    assert stored == owned == list(range(reduce * features))


@pytest.mark.parametrize(("token", "channel"), GRIDS)
def test_initial_weights_do_not_depend_on_the_grid(token, channel):
    """Also where the sizes do not divide, and in float64."""
    key = key_of(0, "weight")
    for dtype in (torch.float32, torch.float64):
        whole = uniform_(torch.empty(10, 7, dtype=dtype), Layout((10, 7), (None, None), (10, 7)), {}, key, 0.5)
        rows, columns = -(-10 // token), -(-7 // channel)
        layout = Layout((10, 7), ("token", "channel"), (rows, columns))
        padded = torch.zeros(token * rows, channel * columns, dtype=dtype)
        for place in places(token, channel):
            block = uniform_(torch.full((rows, columns), 9.0, dtype=dtype), layout, place, key, 0.5)
            first, left = place["token"] * rows, place["channel"] * columns
            padded[first : first + rows, left : left + columns] = block
        assert torch.equal(padded[:10, :7], whole)
        assert not padded[10:].any() and not padded[:, 7:].any()


def test_initial_weights_are_uniform_and_differ_by_name():
    layout = Layout((200, 500), (None, None), (200, 500))
    one, other = (uniform_(torch.empty(200, 500), layout, {}, key_of(0, name), 0.1) for name in ("a", "b"))
    assert one.abs().max() <= 0.1 and one.abs().max() > 0.0999
    assert abs(float(one.mean())) < 5 * 0.1 / 3**0.5 / 100_000**0.5
    assert abs(float(one.var()) / (0.01 / 3) - 1) < 0.02
    counts = torch.histc(one, 20)
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 45  # chi square of 19 degrees of freedom
    for shifted in (other, one.roll(1, 1), one.roll(1, 0)):
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), shifted.flatten()]))[0, 1])) < 0.015


def test_masks_are_random_and_do_not_depend_on_the_cut():
    samples, rows, columns = torch.arange(3), torch.arange(64), torch.arange(96)
    mask = keep_mask(5, samples, rows, columns, 0.1)
    part = keep_mask(5, samples[1::2], rows[16:32], columns[48:], 0.1)
    assert torch.equal(part, mask[1::2, 16:32, 48:])
    assert abs(float(mask.double().mean()) - 0.9) < 5 * 0.3 / mask.numel() ** 0.5
    assert not torch.equal(mask, keep_mask(6, samples, rows, columns, 0.1))
    dropped = (~mask).double() - 0.1  # neighbours, and the corners of rectangles, are independent
    for dim in (0, 1, 2):
        assert abs(float((dropped * dropped.roll(1, dim)).mean())) < 5 * 0.09 / mask.numel() ** 0.5
    corners = dropped * dropped.roll(1, 1) * dropped.roll(1, 2) * dropped.roll((1, 1), (1, 2))
    assert abs(float(corners.mean())) < 5 * 0.09**2 / mask.numel() ** 0.5
    for rate in (0.0, 0.5, 0.999):
        kept = float(keep_mask(7, samples, rows, columns, rate).double().mean())
        assert abs(kept - (1 - rate)) < 5 * (rate * (1 - rate) / mask.numel()) ** 0.5 + 1e-12


def test_blocks_of_a_field():
    """Five variables and two static fields over two bands and two groups: four channels each, the last one padding."""
    field = torch.arange(2 * 3 * 8 * 7).view(2, 3, 8, 7).float()
    for t, c in itertools.product(range(2), range(2)):
        grid = JigsawGrid(2, 2, t, c)
        assert grid.longitudes(8, 2) == slice(4 * t, 4 * t + 4)
        assert grid.channels(7) == (slice(0, 4), slice(4, 7))[c]
        assert grid.channels(5, 7) == (slice(0, 4), slice(4, 5))[c]
        assert grid.local_channels(7) == grid.local_channels(5, 7) == 4
        block = grid.block(field)
        assert block.shape == (2, 3, 4, 4)
        assert torch.equal(block[..., : 4 - c], field[:, :, 4 * t : 4 * t + 4, 4 * c : 4 * c + 4 - c])
        assert not block[..., 4 - c :].any()
        assert torch.equal(grid.block(field[..., :5], 7)[..., : (4, 1)[c]], block[..., : (4, 1)[c]])
    serial = JigsawGrid()
    assert torch.equal(serial.block(field), field) and serial.local_channels(5, 7) == 5 and serial.is_serial
    assert torch.equal(serial.gather(field, 7), field) and torch.equal(serial.sum_over_instance(field), field)


def test_more_groups_than_variables():
    """A group may have static fields only: nothing of the output is its."""
    grid = JigsawGrid(1, 4, 0, 3)
    assert grid.channels(2, 8) == slice(2, 2) and grid.local_channels(2, 8) == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 2, "auto", 6), "no multiple of it; use 8 processes"),
        ((2, 2, 2, 4), "= 8 ranks, but trainer.devices x trainer.num_nodes = 4"),
        ((0, 1, "auto", 1), "strategy.token=0"),
        ((True, 1, "auto", 1), "strategy.token=True"),
        ((1, 1, "all", 1), "strategy.data='all': it counts ranks, 1 or more, or auto"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_sizes(*sizes)


def test_sizes_that_fit():
    assert check_sizes(2, 2, "auto", 8) == 2 and check_sizes(1, 1, 3, 3) == 3


def test_other_strategies_have_whole_models():
    class Trainer:
        strategy, world_size, global_rank = object(), 3, 2

    grid = grid_of(Trainer())
    assert grid.is_serial and (grid.data_size, grid.data) == (3, 2) and grid_of(None) == JigsawGrid()


# ------------------------------------------------------------------------------------------------------- exactness


CASES = [
    {},
    {"pipelined": False},
    {"variant": "activations"},
    {"norm": "grouped", "norm_groups": 3, "blend": "reference", "positional": "sinusoidal"},
]


def errors(found, wanted):
    """Largest error of each kind, over the largest magnitude (of all gradients of weights together)."""
    weights = max(float(v.abs().max()) for name, v in wanted.items() if name not in ("output", "input"))
    return {
        name: float((found[name] - value).abs().max())
        / (float(value.abs().max()) if name in ("output", "input") else weights)
        for name, value in wanted.items()
    }


@pytest.mark.parametrize(("token", "channel"), GRIDS)
def test_every_grid_computes_what_one_rank_does(ranks2, ranks4, token, channel):
    """Outputs and all gradients, in float64, with dropout, two repetitions and channels that need padding."""
    pool = ranks2 if token * channel == 2 else ranks4
    for options in CASES:
        wanted = runs.pass_of(1, 1, 2, 2, "float64", options)
        for found in pool(runs.pass_of, token, channel, 2, 2, "float64", options):
            assert max(errors(found, wanted).values()) < 1e-11


@pytest.mark.parametrize(("token", "channel"), [(1, 2), (2, 2)])
def test_mixed_precision_stays_close(ranks2, ranks4, token, channel):
    """bfloat16 products of the same numbers, summed in another order: the error is that of one rank."""
    pool = ranks2 if token * channel == 2 else ranks4
    exact = runs.pass_of(1, 1, 1, 2, "float32", {})
    alone = errors(runs.mixed_pass(1, 1, {}), exact)
    for found in pool(runs.mixed_pass, token, channel, {}):
        assert found["output"].dtype == torch.float32 or found["output"].dtype == torch.bfloat16
        many = errors(found, exact)
        assert max(many.values()) < max(2 * max(alone.values()), 2**-6)  # a few roundings of bfloat16


def test_layer_norm_against_torch():
    """Exact statistics, groups of statistics, and parts that are normalised together; closed forms with torch's own."""
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    gamma, beta = (torch.randn(12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    plan = NormPlan("", JigsawGrid(), (12,), (12,))
    ours, theirs = sharded_layer_norm(x, gamma, beta, plan), F.layer_norm(x, (12,), gamma, beta)
    torch.testing.assert_close(ours, theirs)
    grouped = sharded_layer_norm(x, gamma, beta, NormPlan("", JigsawGrid(), (12,), (12,), 3))
    torch.testing.assert_close(grouped, F.layer_norm(x.unflatten(-1, (3, 4)), (4,)).flatten(-2) * gamma + beta)
    two = sharded_layer_norm(x, gamma, beta, NormPlan("", JigsawGrid(), (8, 4), (8, 4), 2))
    order = [0, 1, 2, 3, 8, 9, 4, 5, 6, 7, 10, 11]  # halves of both parts together
    alike = F.layer_norm(x[..., order].unflatten(-1, (2, 6)), (6,)).flatten(-2)
    back = torch.tensor(order).argsort()
    torch.testing.assert_close(two, alike[..., back] * gamma + beta)
    small = (x[:1, :2].detach().requires_grad_(), gamma, beta)
    for sizes, local, groups in (((12,), (12,), 1), ((12,), (12,), 3), ((7, 4), (8, 4), 2)):
        plan = NormPlan("", JigsawGrid(), sizes, local, groups)
        assert torch.autograd.gradcheck(lambda *a, plan=plan: sharded_layer_norm(*a, plan), small)


def test_layer_norm_of_large_means_keeps_its_accuracy(ranks2):
    """Sums of squares would lose all digits at a mean of 1e4; moments that are merged do not."""
    for found in ranks2(runs.norm_of_large_means):
        assert found < 2e-3


# --------------------------------------------------------------------------------------------------------- traffic


@pytest.mark.parametrize(("token", "channel"), GRIDS)
def test_what_is_received_is_what_the_formulas_say(ranks2, ranks4, token, channel):
    pool = ranks2 if token * channel == 2 else ranks4
    for options in CASES[:3]:
        for counted, predicted, seen in pool(runs.traffic_of, token, channel, options):
            assert counted.keys() <= predicted.keys()
            for key, expected in predicted.items():
                assert counted.get(key, 0.0) == pytest.approx(expected, rel=1e-9), key
            assert seen == pytest.approx(sum(counted.values()), rel=1e-9)  # by torch's dispatcher


def test_the_sum_of_everything_is_that_of_the_flows():
    traffic = Traffic()
    for number, (layer, direction) in enumerate(itertools.product("abc", ("forward", "backward"))):
        traffic.add(Flow(layer, direction, "weight"), 10.0**number)
    with traffic.paused():
        traffic.add(Flow("a", "forward", "weight"), 5.0)
    assert traffic.total() == sum(traffic.received.values()) == 111111.0
    assert traffic.total("a") == 11.0 and traffic.total(direction="backward") == 101010.0
    traffic.clear()
    assert traffic.total() == 0


def test_the_cheaper_variant_is_chosen():
    """The published case: 149 M weights of token mixing against 75 M activations; with four samples weights travel."""
    grid = JigsawGrid(1, 2)
    tokens, hidden, dim = 17280, 8640, 4320
    for batch, wanted in ((1, "activations"), (4, "weights")):
        plan = Plan("token_in", grid, "channel", hidden, rows_of(hidden, 2, 1))
        shapes = Shapes(tokens * hidden, batch * tokens * dim, batch * hidden * dim)
        assert can_move_activations(plan) and cheaper(plan, shapes) == wanted
        cost = {variant: sum(received(plan, shapes, variant)) for variant in ("weights", "activations")}
        assert min(cost, key=cost.get) == wanted
    assert cheaper(Plan("token_in", JigsawGrid(2, 1), "channel", hidden // 2, hidden // 2), shapes) == "weights"


def test_small_layers_send_fewer_messages():
    """Of 1024 tokens of 256 channels activations are fewer bytes, and take longer: a message more in each direction."""
    for grid in (JigsawGrid(1, 2), JigsawGrid(2, 2)):
        hidden = 512 // grid.token_size
        plan = Plan("token_in", grid, "channel", hidden, rows_of(hidden, grid.channel_size, grid.token_size))
        shapes = Shapes(1024 * 512, 1024 * 256, 512 * 256)
        assert cheaper(plan, shapes, message=0) == "activations" and cheaper(plan, shapes) == "weights"


def test_activations_stay_where_features_do_not_divide():
    plan = Plan("recovery", JigsawGrid(2, 2), "token", 7, rows_of(7, 2, 2))
    assert not can_move_activations(plan) and cheaper(plan, Shapes(10**9, 1, 1)) == "weights"
    with torch.device("meta"):
        net = WeatherMixer(**runs.SMALL | {"patch": 1}, variant="activations", grid=JigsawGrid(4, 1))
    assert net.variants["recovery"] == "weights" and net.variants["blocks.0.channel_in"] == "activations"


def test_blocks_walk_and_nothing_is_whole(ranks4):
    """The pipelined layer keeps two blocks of the weight, of its gradient and of partial results beside its output."""
    for grid in ((4, 1), (2, 2), (1, 4)):
        for forward, backward, block, part in ranks4(runs.transient_bytes, *grid):
            assert forward <= 2 * block * (grid[0] > 1) + 3 * part
            assert backward <= 4 * block * (grid[0] > 1) + 2 * part


class Dispatched(TorchDispatchMode):
    """Names of the operations that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_one_rank_speaks_to_nobody():
    with Dispatched() as seen:
        runs.pass_of(1, 1, 1, 1, "float32", {})
    assert not [name for name in seen.names if "c10d" in name]
