from __future__ import annotations

import itertools
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import yaml

from callbacks.energy.findings import forced_cpu_ratio
from callbacks.energy.node import NodeProfile, profile_of, read_profiles
from callbacks.energy.study import Assumptions
from tests.composing import composed, plain

CONF = Path(__file__).parents[3] / "conf" / "node"
SHIPPED = {profile.name: profile for profile in read_profiles(CONF)}
CPU, GPU, FORCED = (SHIPPED[name] for name in ("horeka_cpu", "horeka_gpu", "haicore_gpu_forced_cpu"))
GIVEN = Assumptions()
ANY = NodeProfile("any", 2, 64, 100.0, 0.1, 20.0, 30.0, 4, 1, 50.0, 300.0, 32.0, 320.0)


def test_power_is_the_sum_of_its_parts():
    assert ANY.host_w(0.0) == 30 + 20 + 2 * 100 * 0.1
    assert ANY.host_w(1.0) == 30 + 20 + 2 * 100
    assert ANY.host_w(0.5) == pytest.approx(50 + 200 * (0.1 + 0.9 / 8))
    assert ANY.power_w(1.0, 0) == 250 + 4 * 50
    assert ANY.power_w(1.0, 2, 0.4) == 250 + 2 * 50 + 2 * (50 + 0.4 * 250)
    assert ANY.power_w(0.5) == ANY.power_w(0.5, ANY.gpus_used, 1.0)
    assert ANY.energy_j(60.0, 0.5, 3, 0.7) == 60 * ANY.power_w(0.5, 3, 0.7)
    assert ANY.energy_j(0.0) == 0
    assert ANY.idle_gpus_w() == 150 and ANY.idle_gpus_w(0) == 200 and ANY.idle_gpus_w(4) == 0
    assert ANY.nameplate_w() == 500 and ANY.nameplate_w(0) == 200
    assert ANY.speed() == 320 and ANY.speed(0) == 32 and ANY.speed(4) == 1280


def test_load_from_power():
    for load in (0.0, 0.3, 0.65, 1.0):
        assert ANY.load_at(ANY.host_w(load)) == pytest.approx(load, abs=1e-9)
    with pytest.raises(ValueError, match="draws 70 to 250 W, never 300 W"):
        ANY.load_at(300.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sockets": 0}, r"node\.sockets=0 \(any\): use a whole number, at least 1"),
        ({"num_gpus": -1, "gpus_used": 0}, r"num_gpus=-1"),
        ({"num_gpus": 1.5}, r"num_gpus=1\.5"),
        ({"cpu_tdp_w": 0.0}, r"cpu_tdp_w=0\.0"),
        ({"cpu_tdp_w": "270"}, r"cpu_tdp_w='270'"),
        ({"dram_w": -1.0}, r"dram_w=-1\.0"),
        ({"base_w": float("nan")}, r"base_w=nan"),
        ({"cpu_idle_fraction": 1.2}, r"cpu_idle_fraction=1\.2"),
        ({"gpus_used": 5}, r"gpus_used=5 \(any\): the machine has num_gpus=4"),
        ({"gpu_max_w": 10.0}, r"gpu_max_w=10\.0 \(any\): less than gpu_idle_w=50\.0"),
        ({"gpu_speed": 0.0}, r"gpu_speed=0\.0 .*gpus_used=0"),
        ({"cpu_speed": 0.0}, r"cpu_speed=0\.0"),
    ],
)
def test_impossible_machines(change, message):
    with pytest.raises(ValueError, match=message):
        replace(ANY, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cpu_load": 1.1}, r"cpu_load=1\.1"),
        ({"cpu_load": float("nan")}, "cpu_load=nan"),
        ({"gpu_utilisation": -0.1}, r"gpu_utilisation=-0\.1"),
        ({"gpus_busy": 5}, "gpus_busy=5: any has 4 GPUs"),
    ],
)
def test_impossible_loads(arguments, message):
    with pytest.raises(ValueError, match=message):
        ANY.power_w(**arguments)
    with pytest.raises(ValueError, match="seconds=-1"):
        ANY.energy_j(-1.0)


# ------------------------------------------------------------------------------------------------- shipped profiles


def test_shipped_profiles_list_every_argument():
    names = {field.name for field in fields(NodeProfile)}
    files = sorted(CONF.glob("*.yaml"))
    assert [file.stem for file in files] == ["auto", "haicore_gpu_forced_cpu", "horeka_cpu", "horeka_gpu"]
    for file in files:
        assert file.read_text().startswith("# @package callbacks.energy\n")
        node = yaml.safe_load(file.read_text())["node"]
        if file.stem == "auto":
            assert node is None
        else:
            assert set(node) == names | {"_target_"} and node["name"] == file.stem


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_profiles_reach_the_callback(name):
    from runner.job import instantiate

    node = plain(composed("experiment=recycle", f"node={name}"))["callbacks"]["energy"]["node"]
    assert instantiate("node", node) == SHIPPED[name] == profile_of(node)
    assert plain(composed("experiment=recycle"))["callbacks"]["energy"]["node"] is None


def test_published_powers_are_met():
    """215 W of sockets and memory, 69 W of an idle A100, 289 W of the one that worked (energy measurement paper, 3)."""
    assert CPU.host_w(GIVEN.cpu_load) == pytest.approx(215.3, rel=0.01)
    assert CPU.load_at(215.3) == pytest.approx(GIVEN.cpu_load, abs=0.01)
    assert FORCED.idle_gpus_w() == 4 * 69
    alone = replace(GPU, num_gpus=1)
    assert alone.power_w(0.5, 1, GIVEN.gpu_utilisation) - alone.host_w(0.5) == pytest.approx(289, rel=0.01)
    assert CPU.nameplate_w() == 2 * 270


def test_finding_1_energy_over_time_differs_between_node_types():
    powers = [p.power_w(GIVEN.cpu_load, None, GIVEN.gpu_utilisation) for p in SHIPPED.values()]
    for one, other in itertools.combinations(powers, 2):
        assert max(one, other) > 1.2 * min(one, other)


def test_finding_2_idle_accelerators_cost():
    ratio = forced_cpu_ratio(FORCED, CPU, GIVEN.cpu_load)
    assert ratio >= 1.5
    assert ratio == pytest.approx((215 + 276) / 215, rel=0.01)
    # The busier the processors, the less the idle GPUs weigh; at full load it is no longer 1.5.
    ratios = [forced_cpu_ratio(FORCED, CPU, load) for load in (0.0, 0.3, 0.65, 0.9, 1.0)]
    assert ratios == sorted(ratios, reverse=True) and 1.4 < ratios[-1] < 1.5


# ---------------------------------------------------------------------------------------------------------- reading


def test_a_profile_from_plain_data():
    assert profile_of(None) is None and profile_of(ANY) is ANY
    assert profile_of(asdict(ANY)) == ANY
    for node, message in (
        ({**asdict(ANY), "gpus": 4}, "takes no gpus; it takes name, sockets"),
        ({"name": "a", "sockets": 1}, "lacks threads, cpu_tdp_w"),
        ({"_target_": "my.Node"}, "'my.Node' is not callbacks.energy.node.NodeProfile"),
        ("horeka", "'horeka' describes no machine"),
    ):
        with pytest.raises(ValueError, match=message):
            profile_of(node)


def test_profiles_of_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no YAML files"):
        read_profiles(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_profiles(tmp_path / "nothing.yaml")
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({"node": asdict(replace(ANY, name="b"))}))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"node": asdict(ANY)}))
    (tmp_path / "c.yaml").write_text("node: null\n")
    assert [profile.name for profile in read_profiles(tmp_path)] == ["any", "b"]
    assert [profile.name for profile in read_profiles(tmp_path / "b.yaml")] == ["b"]
    (tmp_path / "d.yaml").write_text(yaml.safe_dump({"node": asdict(ANY)}))
    with pytest.raises(ValueError, match=r"d\.yaml: another file has the profile 'any'"):
        read_profiles(tmp_path)
    for content, message in (("other: 1\n", "no key 'node'"), ("node: {sockets: 0}", "lacks name"), ("a: [", "d.yaml")):
        (tmp_path / "d.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_profiles(tmp_path)
