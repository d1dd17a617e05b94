"""Acceptance of Jigsaw and WeatherMixer, as numbered in the specification; what is not here is in test_weather.py.

6 is `benchmarks/jigsaw.py`, with the peer in the same processes.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import time

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.jigsaw import PEER, jigsaw, saved_bytes, variants
from datamodules.weather import ShallowWater
from lightning_modules.weather import WeatherMixerModule
from networks.weather_mixer import WeatherMixer
from parallel.sharding import JigsawGrid, make_grid
from parallel.sharding.memory import held_bytes
from strategies.jigsaw import JigsawStrategy, export_checkpoint
from tests.cli import run
from tests.composing import composed, plain
from tests.networks.reference_mixer import reference_of
from tests.networks.test_weather_mixer import randomized
from tests.parallel import jigsaw_runs as runs
from tests.parallel.test_sharding import errors
from tests.ranks import Ranks
from tests.strategies.test_jigsaw import both, close, equal

PAPER = {"height": 720, "width": 1440, "num_inputs": 72, "patch": 60, "dim": 4320, "blocks": 3, "dropout": 1e-3}
WIDE = {"num_inputs": 12, "num_outputs": 10, "patch": 2, "dim": 16, "height": 4, "width": 16}  # fits all grids
BLOCK = (2048, 256, 1024, 256)  # tokens, channels and the hidden widths of both


@pytest.fixture(scope="module")
def ranks8():
    pool = Ranks(8)
    yield pool
    pool.close()


# ------------------------------------------------------------------------------------------------------- 1 identity


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1), (2, 4)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_1_identity(ranks2, ranks4, ranks8, grid):
    pool = {2: ranks2, 4: ranks4, 8: ranks8}[grid[0] * grid[1]]
    for dtype, limit in (("float32", 1e-5), ("float64", 1e-11)):
        forms = itertools.product((1, 2), ("linear", "residual", "reference"), ("exact", "grouped"), ("concat", "add"))
        for steps, blend, norm, skip in forms:
            options = WIDE | {"blend": blend, "norm": norm, "skip": skip}
            wanted = runs.pass_of(1, 1, steps, 2, dtype, options)
            for found in pool(runs.pass_of, *grid, steps, 2, dtype, options):
                assert max(errors(found, wanted).values()) < limit, (options, steps, dtype)


# ----------------------------------------------------------------------------------------------------- 2 trajectory


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_2_trajectory(ranks2, ranks4, tmp_path):
    folder = str(tmp_path)
    alone = Ranks(1)
    try:
        serial = both(alone, {}, folder, 30)
    finally:
        alone.close()
    for pool, grid in ((ranks2, {"channel": 2}), (ranks4, {"token": 2, "channel": 2}), (ranks4, {"channel": 2})):
        found = both(pool, grid, folder, 30)
        equal(found["start"], serial["start"])
        close(found["losses"], serial["losses"], 1e-4)
    assert max(serial["norms"]) > 0.5 and serial["losses"][-1] < 0.9 * serial["losses"][0]


# ----------------------------------------------------------------------------------------------- 3 balance, 4 memory


def _flops(token, channel):
    grid = make_grid(token, channel)
    block = jigsaw(grid, (64, 32, 32, 32))
    x = torch.randn(2, 64 // token, 32 // channel, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        block(x).sum().backward()
    grid.close()
    return counted.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(2, 2), (2, 4)])
def test_3_balance(ranks4, ranks8, grid):
    found = (ranks4 if grid == (2, 2) else ranks8)(_flops, *grid)
    assert max(found) / (sum(found) / len(found)) <= 1.01
    with FlopCounterMode(display=False) as serial:
        jigsaw(JigsawGrid(), (64, 32, 32, 32))(torch.randn(2, 64, 32, requires_grad=True)).sum().backward()
    assert sum(found) == serial.get_total_flops()  # nothing is computed twice


def _bytes_of_training(block, x):
    optimizer = torch.optim.Adam(block.parameters())
    block(x).sum().backward()
    optimizer.step()
    return held_bytes(block.parameters(), [optimizer])


def _memory(world, sizes):
    found = {}
    for name, (block, x) in variants(world, sizes).items():
        found[name] = saved_bytes(block, x), _bytes_of_training(block, x)
    return found


@pytest.mark.slow
def test_4_no_redundancy(ranks4):
    serial = _memory(1, BLOCK)["one process, torch"]
    for found in ranks4(_memory, 4, BLOCK):
        saved, trained = found["2 x 2"]
        assert trained <= 0.26 * serial[1]
        assert saved <= 0.27 * serial[0]
        assert 0.6 * serial[0] < found[PEER][0] < 0.75 * serial[0]  # 0.679 in the design study
        assert saved <= 0.45 * found[PEER][0]  # of item 6


@pytest.mark.slow
def test_4_two_blocks_at_a_time(ranks4):
    for grid in ((2, 2), (4, 1)):
        for forward, backward, block, part in ranks4(runs.transient_bytes, *grid):
            assert forward <= 2 * (block + part)
            assert backward <= 2 * (block + block + part)  # of weights, of their gradients, of activations


# --------------------------------------------------------------------------------------------------- 5 communication


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_5_bytes_are_those_of_the_formulas(ranks2, ranks4, grid):
    pool = ranks2 if grid[0] * grid[1] == 2 else ranks4
    for counted, predicted, seen in pool(runs.traffic_of, *grid, {}):
        assert sum(counted.values()) == pytest.approx(sum(predicted.values()), rel=0.01)
        assert seen == pytest.approx(sum(predicted.values()), rel=0.01)  # whoever has sent it
    kinds = pool(_kinds, *grid)
    assert all("activation" not in forward for forward in kinds)  # where weights travel nothing is transposed


def _kinds(token, channel):
    grid = make_grid(token, channel)
    net = WeatherMixer(**runs.SMALL, variant="weights", grid=grid)
    net(grid.block(runs.field(1, net.num_inputs, 0, torch.float32)))
    grid.close()
    return {flow.kind for flow in grid.traffic.received}


def _costs(token, channel, shapes, message):
    """Received bytes, most of all ranks, of both variants of a layer on tokens, and the one that auto chooses.

    A message counts as so many elements of four bytes.
    """
    grid, found = make_grid(token, channel), []
    from networks.jigsaw_layers import TokenLinear, Width

    for batch, tokens, hidden, channels in shapes:
        cost = {}
        for variant in ("weights", "activations", "auto"):
            layer = TokenLinear(
                "layer", grid, Width(tokens, tokens // token), Width(hidden, hidden // token), 0,
                variant=variant, positions=batch * channels, message=message,
            )  # fmt: skip
            grid.traffic.clear()
            x = torch.randn(batch, tokens // token, channels // channel, requires_grad=True)
            layer(x).sum().backward()
            sent_home = 2 * (layer.plan.variant == "activations")  # there and back; all else is sent either way
            most = torch.tensor(grid.traffic.total() + 4 * message * sent_home, dtype=torch.float64)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            cost[variant] = float(most)
        found.append((cost, layer.plan.variant))
    grid.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(1, 2), (2, 2)])
@pytest.mark.parametrize("message", [0, 100])
def test_5_auto_takes_the_cheaper_variant(ranks2, ranks4, grid, message):
    draw = random.Random(0)
    shapes = [
        (draw.choice((1, 2, 4)), 8 * draw.randint(1, 12), 8 * draw.randint(1, 12), 8 * draw.randint(1, 12))
        for _ in range(20)
    ]
    chosen = set()
    for cost, variant in (ranks2 if grid == (1, 2) else ranks4)(_costs, *grid, shapes, message)[0]:
        assert cost["auto"] == min(cost.values()), cost
        chosen.add(variant)
    assert chosen == {"weights", "activations"}


# ------------------------------------------------------------------------------------------------------ 7 resharding


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_7_resharding(ranks2, ranks4, tmp_path):
    path, whole_file = str(tmp_path / "ten.ckpt"), str(tmp_path / "whole.ckpt")
    whole = both(ranks4, {"token": 2, "channel": 2}, str(tmp_path), 20, None, (10, path))
    weights, moments = whole["saved"]
    export_checkpoint(path, whole_file)
    alone = Ranks(1)
    try:
        again = [(alone, {}, path), (alone, {}, whole_file), (ranks2, {"channel": 2}, path)]
        again += [(ranks4, {"token": 4}, path), (ranks4, {"channel": 2}, path), (ranks4, {"token": 4}, whole_file)]
        for pool, grid, file in again:
            found = both(pool, grid, str(tmp_path), 20, file)
            equal(found["start"], weights)
            equal(found["moments_at_start"], moments)
            close(found["losses"], whole["losses"][10:], 1e-5)
            for name, wanted in whole["end"].items():
                scale = max(float(v.abs().max()) for v in whole["end"].values())
                assert float((found["end"][name] - wanted).abs().max()) < 1e-5 * scale
    finally:
        alone.close()


# ------------------------------------------------------------------------------------------------ 8 reference parity


@pytest.mark.parametrize("skip", ["concat", "add"])
@pytest.mark.parametrize(("norm", "groups"), [("exact", 1), ("grouped", 2)])
def test_8_reference(norm, groups, skip):
    """Outputs and the published loss, in which weights count twice (model.weight_power=2)."""
    sizes = {"height": 6, "width": 16, "num_inputs": 10, "num_outputs": 8, "patch": 4, "dim": 40, "blocks": 3}
    net = randomized(WeatherMixer(**sizes, blend="reference", norm=norm, norm_groups=2, skip=skip))
    ref = reference_of(net, groups)
    x, target = torch.randn(2, 6, 16, 10), torch.randn(2, 6, 16, 8)
    with torch.no_grad():
        ours, theirs = net(x), ref(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))
    weight = torch.rand(6, 1, 1) * torch.rand(8)
    published = torch.nn.functional.mse_loss(theirs * weight, target * weight)
    loss = (weight**2 * (ours - target).square()).mean()
    assert float(loss) == pytest.approx(float(published), rel=1e-5)


def test_8_counts_of_the_paper():
    """Parameters exactly; the logged work counts the targets with the padding that they have on two devices."""
    begin = time.process_time()
    with torch.device("meta"):
        net = WeatherMixer(**PAPER, num_outputs=69, blend="reference")
        two = WeatherMixer(**PAPER, num_outputs=69, blend="reference", grid=JigsawGrid(channel_size=2))
        with FlopCounterMode(display=False) as counted:
            net.eval()(torch.empty(1, 720, 1440, 72))
    assert net.num_parameters == two.num_parameters == 1_062_380_154
    assert sum(p.numel() for p in net.parameters()) == 1_062_380_154
    assert two.flops() == pytest.approx(13.5657e12, rel=1e-3)
    assert counted.get_total_flops() == net.flops() == pytest.approx(13.5657e12, rel=5e-3)  # 69 channels: 13.5104e12
    assert time.process_time() - begin < 5


# Million parameters and TFLOP of a forward pass with padded targets, section 3 of the specification.
FAMILY = {
    "wm_227m": (227, 0.25),
    "wm_232m": (232, 0.53),
    "wm_240m": (240, 0.99),
    "wm_260m": (260, 1.99),
    "wm_505m": (505, 3.96),
    "wm_980m": (981, 8.03),
    "wm_1b": (1062.4, 13.5657),
    "wm_1_1b": (1103, 15.96),
    "wm_2_1b": (2090, 32.1),
    "wm_2_6b": (2570, 64.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("option", FAMILY)
def test_8_family(option):
    """The sizes of the scaling study, by the configuration files."""
    net = plain(composed("experiment=weather", f"model={option}"))["model"]["net"]
    options = {key: value for key, value in net.items() if not key.startswith("_")}
    with torch.device("meta"):
        two = WeatherMixer(**options | {"blend": "reference", "grid": JigsawGrid(channel_size=2)})
    millions, tera = FAMILY[option]
    assert two.num_parameters / 1e6 == pytest.approx(millions, rel=2e-3)
    assert two.flops() / 1e12 == pytest.approx(tera, rel=1e-2)


# ------------------------------------------------------------------------------------------------- 13 smaller batches


def _trained(cache, folder, channel, batch_size, seed):
    """Validation loss after three epochs on two ranks, which are a model in parts or two models."""
    data = ShallowWater(
        cache, truncation=10, dt_s=900.0, spin_up_days=10.0, num_train=4, records=60, leads_h=[6], height=16, width=32,
        chunk_channel=2, eval_every=1, batch_size=batch_size, eval_batch_size=8, seed=seed,
    )  # fmt: skip
    net = functools.partial(
        WeatherMixer, height=16, width=32, num_inputs=6, num_outputs=4, patch=4, dim=32, blocks=2, seed=seed
    )
    module = WeatherMixerModule(net, functools.partial(torch.optim.Adam, lr=2e-3), None, linear_patterns=0)
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", devices=2, strategy=JigsawStrategy(channel=channel), default_root_dir=folder,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, gradient_clip_val=1.0, num_sanity_val_steps=0,
    )  # fmt: skip
    os.environ["WORLD_SIZE"] = "2"
    trainer.fit(module, data)
    trainer.strategy.grid.close()
    return float(trainer.callback_metrics["val/loss"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_13_a_model_in_parts_learns_more_in_an_epoch(ranks2, tmp_path):
    """The same ranks, epochs and samples of a rank's step; two instances make it half as many steps."""
    for seed in (0, 1):
        parts = ranks2(_trained, str(tmp_path), str(tmp_path), 2, 4, seed, timeout=400)[0]
        instances = ranks2(_trained, str(tmp_path), str(tmp_path), 1, 8, seed, timeout=400)[0]
        assert parts < instances, seed


# ------------------------------------------------------------------------------------------------------ 15 mistakes


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("strategy.token=3", "no multiple of it; use 3 processes"),
        ("strategy.token=2 strategy.data=2", "= 4 ranks, but trainer.devices x trainer.num_nodes = 2"),
        ("strategy.channel=0", "strategy.channel=0: it counts ranks, 1 or more"),
        ("strategy.token=2 model.net.patch=64", "strategy.token=2 does not divide the 1 patches"),
        ("strategy.token=2 model.net.dim=17", "model.net.dim gives a width of 17"),
        ("strategy.channel=2 model.net.token_hidden=9", "model.net.token_hidden gives a width of 9"),
        ("strategy.token=2 strategy.chanel=2", "Did you mean 'channel'?"),
        ("strategy.data=2 data.batch_size=5", "data.batch_size=5"),
        ("strategy.token=2 trainer.precision=16-mixed", "bf16-mixed"),
        (
            "strategy.token=2 model.net.blend=sum",
            "model.net.blend=sum: networks.weather_mixer.WeatherMixer expects 'linear'",
        ),
    ],
)
def test_15_mistakes_take_one_line(tmp_path, change, words):
    begin = time.perf_counter()
    done = run(
        "experiment=weather", "debug=fast", "logger=none", "callbacks=none", "strategy=jigsaw", "trainer=multi_cpu",
        "trainer.devices=2", "data.truncation=5", "data.height=8", "data.width=64", "data.records=6",
        "data.num_train=1", "data.spin_up_days=0.1", "data.leads_h=[6]", *change.split(" "), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode != 0 and time.perf_counter() - begin < 20
    assert words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_15_an_exception_on_one_rank_ends_the_others(ranks2, tmp_path):
    begin = time.monotonic()
    found = ranks2(_fails, str(tmp_path))
    assert "injected" in found[1] and "injected" not in found[0] and found[0] != "nothing was raised"
    assert time.monotonic() - begin < 60


def _fails(folder):
    from tests.strategies.test_jigsaw import _fails_on_one

    return _fails_on_one(folder)
