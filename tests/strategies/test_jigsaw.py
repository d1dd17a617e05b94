"""strategy=jigsaw: the same training on every grid, checkpoints that any grid reads, mistakes that are named."""

from __future__ import annotations

import os
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lightning_modules.weather import WeatherMixerModule
from networks.weather_mixer import WeatherMixer
from parallel.sharding import JigsawGrid, make_grid
from parallel.sharding.blocks import whole
from strategies.jigsaw import JigsawStrategy, export_checkpoint, read_whole
from tests.strategies import mixers, nets

TWO = {"channel": 2}
FOUR = {"token": 2, "channel": 2}


def close(one, other, limit):
    assert len(one) == len(other) > 0
    assert max(abs(a / b - 1) for a, b in zip(one, other, strict=True)) < limit


def equal(one, other):
    assert set(one) == set(other) and one
    assert all(torch.equal(one[name], other[name]) for name in one)


def both(ranks, *args, **kwargs):
    """The result of rank 0, after a look at the others."""
    every = ranks(mixers.fit, *args, **kwargs) if not kwargs else ranks(_with, args, kwargs)
    for other in every[1:]:
        assert other["losses"] == every[0]["losses"] and other["norms"] == every[0]["norms"]
        equal(other["end"], every[0]["end"])
    return every[0]


def _with(args, kwargs):
    return mixers.fit(*args, **kwargs)


def test_a_training_does_not_depend_on_the_grid(ranks2, ranks4, tmp_path):
    """One process, two with half of the channels, two instances, two bands by two groups, with dropout and clipping."""
    folder = str(tmp_path)
    serial = both(ranks2, {}, folder, 8)  # two instances
    for found in (both(ranks2, TWO, folder, 8), both(ranks4, FOUR, folder, 8), both(ranks4, TWO, folder, 8)):
        equal(found["start"], serial["start"])
        close(found["losses"], serial["losses"], 1e-5)
        close(found["norms"], serial["norms"], 1e-5)
        assert found["draws"] == 8
    assert serial["losses"][-1] < serial["losses"][0]
    assert max(serial["norms"]) > 0.5  # clipping was at work


def test_checkpoints_go_on_at_any_grid(ranks2, ranks4, tmp_path):
    """From four processes to two, and to four others; weights and moments are those that were saved, bit for bit."""
    path = str(tmp_path / "part.ckpt")
    whole = both(ranks4, FOUR, str(tmp_path), 9, None, (5, path))
    weights, moments = whole["saved"]
    for pool, grid in ((ranks2, TWO), (ranks4, {"token": 4}), (ranks4, TWO), (ranks4, FOUR)):
        found = both(pool, grid, str(tmp_path), 9, path)
        equal(found["start"], weights)
        equal(found["moments_at_start"], moments)
        close(found["losses"], whole["losses"][5:], 1e-5)
        assert found["draws"] == 9
    torch.load(path, weights_only=True)
    assert len(list(tmp_path.glob("part.ckpt.shards-*"))) == 1


def test_one_file_for_everybody(ranks2, tmp_path):
    """`read_whole` and ``save_distributed_checkpoint=false`` give the same file, and any grid begins with it."""
    parts, one, exported = (str(tmp_path / name) for name in ("parts.ckpt", "one.ckpt", "exported.ckpt"))
    both(ranks2, TWO, str(tmp_path), 4, None, (3, parts))
    grid = TWO | {"save_distributed_checkpoint": False}
    whole = both(ranks2, grid, str(tmp_path), 6, None, (3, one))
    export_checkpoint(parts, exported)
    left, right = torch.load(one, weights_only=True), torch.load(exported, weights_only=True)
    equal(left["state_dict"], right["state_dict"])
    states = [content["optimizer_states"][0] for content in (left, right)]
    assert (
        states[0]["param_groups"] == states[1]["param_groups"]
        and states[0]["state"].keys() == states[1]["state"].keys()
    )
    for index, values in states[0]["state"].items():
        equal(values, states[1]["state"][index])
    bare = mixers.Forecast()
    bare.configure_model()
    bare.load_state_dict(left["state_dict"])
    equal(bare.weights(), whole["saved"][0])
    for grid in ({"token": 2}, {}):
        found = both(ranks2, grid, str(tmp_path), 6, exported)
        equal(found["start"], whole["saved"][0])
        equal(found["moments_at_start"], whole["saved"][1])
        close(found["losses"], whole["losses"][3:], 1e-5)


def test_a_new_training_begins_with_the_weights_of_any_grid(ranks2, ranks4, tmp_path):
    """``model.weights``, for instance for a fine-tuning on rollouts: parts or one file, on one process or several."""
    path, one = str(tmp_path / "part.ckpt"), str(tmp_path / "one.ckpt")
    weights, _ = both(ranks4, FOUR, str(tmp_path), 2, None, (2, path))["saved"]
    export_checkpoint(path, one)
    for file in (path, one):
        equal(_begun(None, file), weights)
        for pool, grid in ((ranks2, (2, 1)), (ranks4, (2, 2))):
            for found in pool(_begun, grid, file):
                equal(found, weights)
    for found in ranks2(_begun, (1, 2), path, 24):
        assert re.match(
            r"model\.weights=.*part\.ckpt: the checkpoint is of another architecture, .* embedding\.weight: "
            r"\(24, 12\) here, \(16, 12\) there", found,
        )  # fmt: skip
    torch.save({"weights": {}}, tmp_path / "other.pt")
    (tmp_path / "text.ckpt").write_text("nothing")
    assert _begun(None, str(tmp_path / "other.pt")).endswith("other.pt: it holds no state_dict")
    assert "text.ckpt: it is no checkpoint that can be read" in _begun(None, str(tmp_path / "text.ckpt"))


def _begun(sizes, path, dim=16):
    """Whole parameters of a module that begins with a checkpoint on a grid, or why it does not."""
    grid = make_grid(*sizes) if sizes else JigsawGrid()
    module = WeatherMixerModule(partial(WeatherMixer, **mixers.NET | {"dim": dim}, seed=9), weights=path)
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(grid=grid))
    try:
        module.configure_model()
        return {name: whole(p, module.net.layouts[name], grid) for name, p in module.net.named_parameters()}
    except ValueError as error:
        return str(error)
    finally:
        grid.close()


def test_saving_again_leaves_one_folder(ranks2, tmp_path):
    found = ranks2(_save_twice, str(tmp_path))
    assert found[0] == found[1] == 1
    assert read_whole(tmp_path / "last.ckpt")["global_step"] == 4
    assert not list(tmp_path.glob("*.part"))


def _save_twice(folder):
    path = f"{folder}/last.ckpt"
    mixers.fit(TWO, folder, 2, None, (2, path))
    mixers.fit(TWO, folder, 4, None, (4, path))
    return len([name for name in os.listdir(folder) if "shards" in name])


def test_gradients_of_several_batches_are_averaged_once(ranks2, tmp_path):
    """Two instances, two batches a step: the same as one process, in the same number of all-reduces as without."""
    options = {"accumulate_grad_batches": 2}
    two, one = (
        both(ranks2, {}, str(tmp_path), 4, trainer_options=options),
        both(ranks2, TWO, str(tmp_path), 4, trainer_options=options),
    )
    close(two["norms"], one["norms"], 1e-5)
    equal_steps = both(ranks2, {}, str(tmp_path), 4)
    assert len(two["losses"]) == 8 and len(equal_steps["losses"]) == 4


def test_every_parameter_of_a_bucket_of_its_own(ranks2, tmp_path, monkeypatch):
    """Small buckets, which leave while the backward pass goes on, average as one at its end."""
    small = ranks2(_small_buckets, str(tmp_path))[0]
    close(small["norms"], both(ranks2, {}, str(tmp_path), 3)["norms"], 1e-6)
    assert small["sent"]["intra_node_calls"] > 3 * 20


def _small_buckets(folder):
    before = JigsawStrategy.__init__

    def tiny(self, *args, **kwargs):
        before(self, *args, **kwargs)
        self.bucket_bytes = 64

    JigsawStrategy.__init__ = tiny
    try:
        return mixers.fit({}, folder, 3)
    finally:
        JigsawStrategy.__init__ = before


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token": 0}, "strategy.token=0: it counts ranks, 1 or more"),
        ({"channel": 1.5}, "strategy.channel=1.5: it counts ranks"),
        ({"data": -1}, "strategy.data=-1: it counts ranks, 1 or more, or auto"),
        ({"bucket_cap_mb": 0}, "strategy.bucket_cap_mb=0"),
        ({"timeout_s": 0}, "strategy.timeout_s=0"),
        ({"compute_ms": -1.0}, "cluster.compute_ms=-1.0"),
        ({"rate_mbit": 0.0}, "cluster.rate_mbit=0.0"),
    ],
)
def test_wrong_arguments(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        JigsawStrategy(**given)


def _refused(grid, net, folder):
    try:
        mixers.fit(grid, folder, 1, **net)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("grid", "net", "message"),
    [
        ({"token": 3}, {}, "trainer.devices x trainer.num_nodes = 2 is no multiple of it; use 3 processes"),
        ({"token": 2, "data": 2}, {}, "= 4 ranks, but trainer.devices x trainer.num_nodes = 2"),
        ({"token": 2}, {"patch": 16}, "strategy.token=2 does not divide the 1 patches .* the nearest that does is 1"),
        (TWO, {"patch": 5}, "model.net.patch=5 does not divide model.net.width=16"),
        (TWO, {"dim": 15}, "model.net.dim gives a width of 15, .* as a multiple of 2: use 14 or 16"),
        ({"token": 2}, {"token_hidden": 7}, "model.net.token_hidden gives a width of 7, .* use 6 or 8"),
        (TWO, {"num_inputs": 1, "num_outputs": 1}, "strategy.channel=2: there are only 1 input channels"),
        ({"local_size": 3}, {}, "cluster.local_size=3 does not divide"),
    ],
)
def test_mistakes_are_named_on_every_rank(ranks2, tmp_path, grid, net, message):
    for found in ranks2(_refused, grid, net, str(tmp_path)):
        assert re.search(message, found), found


def test_other_checkpoints_are_refused_with_the_differences(ranks2, tmp_path):
    path = str(tmp_path / "one.ckpt")
    both(ranks2, TWO, str(tmp_path), 1, None, (1, path))
    for found in ranks2(_other, path, str(tmp_path)):
        assert re.search(
            r"of another architecture, \d+ difference\(s\): net.embedding.weight: \(24, 12\) here, \(16, 12\) there",
            found,
        )


def _other(path, folder):
    try:
        mixers.fit(TWO, folder, 2, path, dim=24)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_other_modules_are_refused(ranks2, tmp_path):
    for found in ranks2(_regression, str(tmp_path)):
        assert "cuts networks of Jigsaw layers into blocks, and Regression has Sequential" in found
        assert "experiment=weather" in found


def _regression(folder):
    try:
        nets.fit(JigsawStrategy(channel=2), folder, epochs=1)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_scaled_losses_are_refused(ranks2, tmp_path):
    for found in ranks2(_scaled, str(tmp_path)):
        assert "use bf16-mixed" in found


def _scaled(folder):
    from lightning.pytorch.plugins import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    try:
        mixers.fit(TWO, folder, 1, trainer_options={"plugins": [plugin]})
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_a_rank_that_fails_does_not_leave_the_others_waiting(ranks2, tmp_path):
    """The other rank waits for a block that never comes, until the time is up."""
    found = ranks2(_fails_on_one, str(tmp_path))
    assert "injected" in found[1] and found[0] != "nothing was raised" and "injected" not in found[0]


def _fails_on_one(folder):
    def broken(self, batch, batch_idx):
        if torch.distributed.get_rank() == 1 and batch_idx == 1:
            raise RuntimeError("injected")
        return mixers.Forecast.training_step(self, batch, batch_idx)

    module = type("Broken", (mixers.Forecast,), {"training_step": broken})
    try:
        mixers.fit(TWO | {"timeout_s": 5}, folder, 3, kind=module)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"
