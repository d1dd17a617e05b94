"""The harness with fake clocks, the page of results, and short runs of the benchmarks of the platform and of PCC."""

from __future__ import annotations

import ast
import json
import platform
import socket
import statistics
import subprocess
import sys
import types

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import document, record
from benchmarks.measure import (
    Clock,
    Lap,
    Memory,
    Timing,
    compare,
    difference,
    difference_row,
    interleave,
    median,
    memory_rows,
    peak_memory,
    ratio,
    ratio_row,
    threads,
    time_rows,
)
from tests.composing import ROOT


class FakeTime:
    """Time passes only when a variant says so."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.calls: list[str] = []

    def clock(self) -> Clock:
        return Clock(wall=lambda: self.wall, cpu=lambda: self.cpu)

    def variant(self, name: str, walls, cpu_share: float = 1.0):
        """A function that takes the next of ``walls`` seconds, the last one again and again."""
        left = list(walls)

        def call() -> None:
            self.calls.append(name)
            seconds = left.pop(0) if len(left) > 1 else left[0]
            self.wall += seconds
            self.cpu += seconds * cpu_share

        return call


# ---------------------------------------------------------------------------------------------------------- measure


def test_variants_take_turns_after_the_warm_up():
    fake = FakeTime()
    timings = compare(
        {"a": fake.variant("a", [9, 1, 2, 3]), "b": fake.variant("b", [9, 4])}, repeats=3, warmup=1, clock=fake.clock()
    )
    assert fake.calls == ["a", "b"] * 4
    assert timings["a"].wall == (1, 2, 3)  # the 9 seconds of the warm-up are not among them
    assert timings["b"].wall == (4, 4, 4)


def test_times_are_per_call_and_cpu_seconds_are_their_own():
    fake = FakeTime()
    timings = compare(
        {"a": fake.variant("a", [1, 3, 5, 7], cpu_share=0.5), "b": fake.variant("b", [2])},
        repeats=2,
        warmup=0,
        calls={"a": 2, "b": 3},
        clock=fake.clock(),
    )
    assert fake.calls == [*"aabbb"] * 2
    assert timings["a"] == Timing(wall=(2, 6), cpu=(1, 3))
    assert timings["b"] == Timing(wall=(2, 2), cpu=(2, 2))


def test_interleave_keeps_what_variants_return():
    counter = iter(range(10))
    assert interleave({"a": lambda: next(counter), "b": lambda: -next(counter)}, repeats=2, warmup=1) == {
        "a": [2, 4],
        "b": [-3, -5],
    }
    with pytest.raises(ValueError, match="repeats=0"):
        interleave({}, repeats=0)


def test_common_drift_cancels_in_the_interval_of_a_ratio():
    speeds = np.random.default_rng(1).uniform(0.5, 5.0, size=9)  # the machine is ten times slower in some rounds
    estimate = ratio(3 * speeds, speeds)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((3, 3, 3))
    alone = median(speeds)
    assert alone.low < alone.value < alone.high


def test_interval_covers_the_true_ratio_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        a, b = 2 + 0.2 * generator.standard_normal(15), 1 + 0.1 * generator.standard_normal(15)
        estimate = ratio(a, b)
        hits += estimate.low <= 2 <= estimate.high
    assert 85 <= hits <= 100


def test_difference_and_unequal_rounds():
    assert difference([5, 6, 7], [1, 2, 3]).value == 4
    with pytest.raises(ValueError):
        ratio([1, 2, 3], [1, 2])


def test_rows():
    timings = {"slow": Timing((0.4, 0.2, 0.3), (0.2, 0.2, 0.2)), "fast": Timing((0.1, 0.1, 0.1), (0.1, 0.1, 0.1))}
    slow, fast = time_rows("step", timings, unit="ms")
    assert (slow["value"], slow["cpu"], slow["unit"]) == (pytest.approx(300), pytest.approx(200), "ms")
    assert slow["low"] <= slow["value"] <= slow["high"]
    assert fast["variant"] == "fast"
    row = ratio_row("step", timings, "slow", "fast", paper="27", at_least=2)
    assert (row["value"], row["cpu"]) == (pytest.approx(3), pytest.approx(2))
    assert (row["what"], row["variant"], row["paper"]) == ("step, ratio", "slow / fast", "27")
    row = difference_row("step", timings, "slow", "fast", unit="µs")
    assert (row["value"], row["cpu"]) == (pytest.approx(2e5), pytest.approx(1e5))
    on_gpu, on_cpu = memory_rows("memory", {"gpu": Memory(900, 500, 40), "cpu": Memory(900, 500)})
    assert (on_gpu["value"], on_cpu["value"]) == (40, 500)
    record.Result([slow, fast, row, on_gpu])  # rows of the harness are valid rows


def test_threads_are_restored():
    import torch

    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    assert torch.get_num_threads() == before


def _fill(mib: int) -> None:
    np.ones(mib * 2**17).sum()


def _fail() -> None:
    raise LookupError("no such thing")


def test_peak_memory_is_that_of_a_fresh_process():
    ballast = np.ones(2**26)  # 512 MiB here, which ru_maxrss of a child would show
    memory = peak_memory(_fill, 64)
    assert 60 <= memory.added_mib <= 90
    assert memory.peak_mib < 400
    assert peak_memory(_fill, 256).added_mib >= memory.added_mib + 180
    assert ballast.all()


def test_an_error_in_the_fresh_process_arrives():
    with pytest.raises(LookupError, match="no such thing"):
        peak_memory(_fail)


# ----------------------------------------------------------------------------------------------------------- record

MACHINE = {"cpu": "AMD EPYC", "cores": 2, "cuda": ["NVIDIA H100 80GB HBM3"], "threads": 1}


@pytest.mark.parametrize(
    ("cpu", "slug"),
    [
        ("AMD EPYC", "cpu-amd-epyc-2-cores"),
        ("AMD EPYC 7B13 64-Core Processor", "cpu-amd-epyc-7b13-2-cores"),
        ("Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz", "cpu-intel-xeon-platinum-8480-2-cores"),
    ],
)
def test_hardware_has_a_generic_name(cpu, slug):
    assert record.hardware_slug({**MACHINE, "cpu": cpu}) == slug
    assert record.hardware_slug({**MACHINE, "cpu": cpu}, "cuda:0") == "gpu-nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": None}, None),
        ({"value": float("nan")}, "not finite in value"),
        ({"low": float("inf")}, "not finite in low"),
        ({"valeu": 1.0}, "unknown keys: valeu"),
    ],
)
def test_rows_are_checked(change, message):
    row = {"what": "a", "variant": "b", "value": 1.0, "unit": ""} | change
    if message is None:
        del row["unit"]
        message = "lacks unit"
    with pytest.raises(ValueError, match=message):
        record.Result([row])


def test_bounds():
    assert record.holds({"value": 1}) is None
    assert record.holds({"value": 15, "at_least": 15})
    assert record.holds({"value": 14.9, "at_least": 15}) is False
    assert record.holds({"value": 0.2, "at_least": 0.1, "at_most": 0.19}) is False


def _content(name: str = "fast", **hardware) -> dict:
    rows = [
        {"what": "step", "variant": "a|b", "value": 12345.6, "unit": "ms", "low": 1, "high": 2.0, "cpu": 3},
        {"what": "ratio", "variant": "x / y", "value": 0.123456, "unit": "", "at_least": 1, "note": "remark"},
        {"what": "count", "variant": "x", "value": 2, "unit": "", "at_most": 3},
    ]
    content = record.content_of(name, "It is fast.", record.Result(rows, {"batch": 4}, ["pytest"]), {"commit": "c0"}, 1)
    content["hardware"] |= hardware
    return content


def test_a_result_survives_the_disk_and_names_no_machine(tmp_path, monkeypatch):
    for module, name in ((platform, "node"), (socket, "gethostname"), (socket, "getfqdn")):
        monkeypatch.setattr(module, name, lambda: "name-of-this-machine")
    content = _content()
    path = record.store(content, tmp_path)
    assert path.name == f"fast_{content['hardware']['slug']}.json"
    assert record.stored(tmp_path) == [content]
    assert content["versions"].keys() >= {"python", "torch", "pytest"}
    assert content["rows"][0]["cpu"] == 3.0 and isinstance(content["rows"][0]["cpu"], float)
    assert "name-of-this-machine" not in path.read_text() and str(ROOT) not in path.read_text()
    record.store(content | {"claim": "It is faster."}, tmp_path)
    assert [c["claim"] for c in record.stored(tmp_path)] == ["It is faster."]


# --------------------------------------------------------------------------------------------------------- document


def test_page(tmp_path):
    assert "No result is stored yet" in document.page(tmp_path)
    record.store(_content(slug="cpu-one-1-cores", cpu="One", cores=1), tmp_path)
    record.store(_content(slug="gpu-two", cuda=["Two"]), tmp_path)
    record.store(_content("other", slug="cpu-one-1-cores", cpu="One", cores=1), tmp_path)
    page = document.page(tmp_path)
    assert page.index("## fast") < page.index("### One, 1 cores") < page.index("### Two") < page.index("## other")
    assert page.count("It is fast.") == 2
    assert "| step | a\\|b | 12346 ms | 1 .. 2 | 3 |  |  |" in page
    assert "| ratio | x / y | 0.1235 |  |  | ≥ 1 **missed** | remark |" in page
    assert "| count | x | 2 |  |  | ≤ 3 holds |  |" in page
    assert "paper" not in page.split("## fast")[1]  # no row has that column
    assert "1 of 2 bounds hold" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12345.6, "12346"), (0.000123456, "0.0001235"), (1.5e-7, "1.500e-07"), (-2.5, "-2.5")],
)
def test_numbers(value, text):
    assert document.number(value) == text


def test_the_page_is_what_the_stored_results_give():
    assert document.PAGE.read_text(encoding="utf-8") == document.page(), "run: python -m benchmarks.document"


def test_stored_results_belong_to_benchmarks():
    known = command.claims()
    for path in sorted(record.RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["name"] in known
        assert path.name == f"{content['name']}_{content['hardware']['slug']}.json"
        assert content["claim"] == known[content["name"]], f"{path.name} was recorded for another claim: run it again"
        record.Result(content["rows"])


# ---------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize("name", sorted(command.claims()))
def test_every_benchmark_states_its_claim_and_runs_without_arguments(name):
    tree = ast.parse((command.FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert command.claims()[name].endswith(".")
    run = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run")
    assert len(run.args.defaults) == len(run.args.args)
    assert None not in run.args.kw_defaults
    assert ast.unparse(run.returns).endswith("Result")


def test_list_imports_no_torch():
    code = "import sys; from benchmarks.__main__ import main; main(['--list']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "False"
    assert {"pcc_gain", "platform_overhead"} <= {line.split()[0] for line in lines if not line.startswith(" ")}


def test_unknown_benchmark(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["pcc_gian"])
    assert stop.value.code == 2
    assert "no benchmark pcc_gian; there are" in capsys.readouterr().err


@pytest.fixture
def benchmarks(monkeypatch, tmp_path):
    """Make up benchmarks: ``benchmarks(name=run)``; results and page go to a temporary folder."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(document, "PAGE", tmp_path / "docs" / "benchmarks.md")

    def make(**runs) -> None:
        for name, run in runs.items():
            module = types.ModuleType(f"benchmarks.{name}")
            module.run = run
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(command, "claims", lambda: {name: f"{name} works." for name in runs})

    return make


def _result(value: float = 1.0, **row) -> record.Result:
    return record.Result([{"what": "size", "variant": "all", "value": value, "unit": "m"} | row])


def test_write_stores_results_and_renews_the_page(benchmarks, capsys):
    benchmarks(one=lambda: _result(1.0), two=lambda: _result(2.0))
    assert command.main([]) == 0
    assert not record.RESULTS.exists()
    assert "| size | all | 2 m |" in capsys.readouterr().out
    assert command.main(["two", "--write"]) == 0
    (content,) = record.stored(record.RESULTS)
    assert (content["name"], content["claim"], content["rows"][0]["value"]) == ("two", "two works.", 2.0)
    assert document.PAGE.read_text(encoding="utf-8") == document.page(record.RESULTS)
    assert "two works." in document.PAGE.read_text(encoding="utf-8")


def test_a_failure_stops_no_other_benchmark(benchmarks, capsys):
    def no_peer():
        raise ImportError("needs neuralforecast: pip install -c constraints.txt -e '.[peers]'")

    def broken():
        raise ArithmeticError("boom")

    benchmarks(broken=broken, no_peer=no_peer, missed=lambda: _result(1.0, at_least=2), sound=lambda: _result(3.0))
    assert command.main(["--write"]) == 1
    error = capsys.readouterr().err
    assert "boom" in error
    assert "no_peer did not run: needs neuralforecast" in error
    assert "failed, or missed a bound: broken, no_peer, missed" in error
    assert [content["name"] for content in record.stored(record.RESULTS)] == ["missed", "sound"]


# ------------------------------------------------------------------------------------------------ platform_overhead


def test_step_clock():
    from benchmarks.platform_overhead import SKIPPED, StepClock

    readings = FakeTime()
    clock = StepClock(readings.clock())
    for epoch in range(3):
        for step in range(SKIPPED + 4):
            clock.tick()
            # The first epoch and the first steps of every epoch are slow and must not count.
            seconds = 50.0 if epoch == 0 or step < SKIPPED else 2.0
            readings.wall, readings.cpu = readings.wall + seconds, readings.cpu + 1.0
        readings.wall, readings.cpu = readings.wall + 30.0, readings.cpu + 10.0
    assert clock.per_step(SKIPPED + 4) == Lap(2.0, 1.0)
    gap = statistics.fmean([50.0 + 30.0, 2.0 + 30.0]) - 2.0  # the slow last step of the first epoch is in its gap
    assert clock.between_epochs(SKIPPED + 4) == Lap(gap, 10.0)
    with pytest.raises(ValueError, match="21 steps were taken; at least two epochs of 20"):
        clock.per_step(20)


def test_all_variants_train_the_same_network(tmp_path):
    import torch

    from benchmarks import platform_overhead as overhead

    overhead.TimedRegression.running = overhead.StepClock()
    size = overhead.Size(8, 4, 10)
    config = overhead.configuration(size, str(tmp_path / "run"), epochs=2)
    with threads(1), overhead._quiet():
        bare = overhead.train_bare(config)
        overhead.train_platform(config)
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, parameter in bare.named_parameters():
        assert torch.equal(checkpoint[f"net.{name}"], parameter)
    assert len(overhead.TimedRegression.running.laps) == 2 * 2 * 10


def test_platform_overhead_runs():
    from benchmarks import platform_overhead as overhead

    result = overhead.run(repeats=1, sizes=(overhead.Size(8, 4, 12),), epochs=2)
    steps = {row["variant"]: row["value"] for row in result.rows if row["what"].endswith(": training step")}
    assert steps.keys() == overhead.VARIANTS.keys()
    assert min(steps.values()) > 0
    assert sum(record.holds(row) is not None for row in result.rows) == 1


# --------------------------------------------------------------------------------------------------------- pcc_gain


@pytest.mark.parametrize("kind", ["ReCycle", "backbone"])
@pytest.mark.parametrize("width", [0, 1])
def test_day_tokens_save_floating_point_operations(kind, width):
    from benchmarks import pcc_gain

    width = pcc_gain.WIDTHS[width]
    with threads(1):
        counts = {}
        for steps in (1, pcc_gain.DAY):
            workload = pcc_gain.Workload(kind, width, steps, batch=1)
            whole, rest = workload.forward_flops(), workload.forward_flops(attention=False)
            history, horizon = pcc_gain.HISTORY // steps, pcc_gain.HORIZON // steps
            pairs = history**2 + horizon**2 + horizon * history  # encoder, decoder, decoder to encoder
            assert whole - rest == 2 * 2 * pairs * width.d_model  # scores and weighted sum, a product and a sum each
            counts[steps] = whole
    assert counts[1] / counts[pcc_gain.DAY] >= pcc_gain.MIN_FLOP_RATIO


def test_networks_of_both_token_lengths_have_the_same_width_and_depth():
    from benchmarks import pcc_gain

    for width in pcc_gain.WIDTHS:
        hourly, daily = (
            dict(pcc_gain.network("ReCycle", width, steps).transformer.named_parameters())
            for steps in (1, pcc_gain.DAY)
        )
        assert {n: p.shape for n, p in hourly.items()} == {n: p.shape for n, p in daily.items()}


def test_pcc_gain_runs(monkeypatch):
    from benchmarks import pcc_gain

    monkeypatch.setattr(pcc_gain, "ENERGY_S", 1.0)
    result = pcc_gain.run(repeats=1, batch=8, widths=(pcc_gain.Width(32, 1, 96),), kinds=("ReCycle",), memory=False)
    rows = {row["what"].partition(": ")[2]: row for row in result.rows if "ratio" in row["what"]}
    assert rows.keys() == {
        "training step, ratio",
        "training step, Adam not fused, ratio",
        "inference, ratio",
        "energy of a training step, ratio",
        "forward, ratio",
        "forward without attention, ratio",
    }
    assert rows["training step, ratio"]["cpu"] > 4  # 15 and more at the full batch; a margin for a busy machine
    assert rows["training step, ratio"]["at_least"] == 15
    assert rows["energy of a training step, ratio"]["value"] > 3
    assert rows["energy of a training step, ratio"]["at_least"] == 10


# ---------------------------------------------------------------------------------------------------------- lottery


def test_searches_controls_and_transplants_of_a_seed_run(tmp_path, monkeypatch):
    from benchmarks import bayesian_lottery

    monkeypatch.setattr(bayesian_lottery, "DRAWS", (0, 1))
    monkeypatch.setattr(bayesian_lottery, "LONGER", (1,))
    found = {}
    short = ("trainer.max_epochs=1", "model.scheduler.milestones=[1]", "data.max_train=128")
    bayesian_lottery._one_seed(tmp_path, 0, 1, [0, 1], found, short)
    searches = {(name, level) for name in bayesian_lottery.SEARCHES for level in (0, 1)}
    assert searches | {(name, 1) for name in bayesian_lottery.CONTROLS} < found.keys()
    for (each,) in found.values():
        assert 0 <= each["accuracy"] <= 1 and each["nll"] > 0 and 0 <= each["ece"] <= 1
    rows = {row["variant"]: row["value"] for row in bayesian_lottery._bounded(found, [0, 1])}
    assert len(rows) == 2 and "transplanted, init - ticket" in rows


# --------------------------------------------------------------------------------------------- sampling parallelism


def test_steps_of_all_peers_are_timed_and_bounds_stand_on_cpu_time(monkeypatch):
    from benchmarks import sampling_parallelism as sampling

    # Two processes need half of the CPU time and a tenth of an epoch; no process is started here.
    monkeypatch.setattr(sampling, "cpu_per_epoch", lambda world, *_: 1 / world + 0.1 * (world - 1))
    result = sampling.run(repeats=2, sizes=((128, 8),), calls=1, networks=("64-256-256-10",))
    ratios = {row["variant"]: row for row in result.rows if row["what"].endswith("ratio")}
    assert ratios["2 / 1"]["value"] == pytest.approx(0.6) and ratios["2 / 1"]["at_most"] == 0.62
    steps = {row["variant"] for row in result.rows if row["unit"] == "ms" and row["what"].startswith("step")}
    assert steps >= {"explicit weights", "lrt", "flipout"}
    compared = ratios.keys() & {f"explicit weights / {sampling.PAPER_LOSS}", f"lrt / {sampling.CLOSED_FORM}"}
    assert len(compared) == (2 if "torch-blue" in sampling.installed() else 0)
    assert all("at_most" in ratios[name] and ratios[name]["value"] == ratios[name]["cpu"] for name in compared)


@pytest.mark.parametrize("peer", ["ours", "lrt", "sampled", "closed", "bayesian_torch", "blitz"])
def test_a_step_of_a_peer_moves_all_of_the_same_network(peer, monkeypatch):
    import torch

    from benchmarks import sampling_parallelism as sampling

    modules = {"sampled": "torch_blue", "closed": "torch_blue", "bayesian_torch": "bayesian_torch", "blitz": "blitz"}
    if peer in modules:
        pytest.importorskip(modules[peer])
    made = {
        "ours": lambda: sampling.ours(16, 4), "lrt": lambda: sampling.ours(16, 4, "lrt"),
        "sampled": lambda: sampling.torch_blue(16, 4, False), "closed": lambda: sampling.torch_blue(16, 4, True),
        "bayesian_torch": lambda: sampling.bayesian_torch(16, 4), "blitz": lambda: sampling.blitz(16, 4),
    }  # fmt: skip
    seen = []

    def keep(net, loss):
        seen.extend([net, loss])
        return stepping(net, loss)

    stepping = sampling.stepping
    monkeypatch.setattr(sampling, "stepping", keep)
    step = made[peer]()
    net, loss = seen
    # A mean and a deviation of 64 x 16 + 16 x 16 + 16 x 10 weights and 42 biases; blitz registers them twice.
    parameters = {p.data_ptr(): p for p in net.parameters()}.values()
    assert sum(p.numel() for p in parameters) == 2 * (64 * 16 + 16 * 16 + 16 * 10 + 42)
    before = [p.detach().clone() for p in parameters]
    with threads(1):
        step()
    assert torch.isfinite(loss())
    assert all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


# ---------------------------------------------------------------------------------------------------- energy_scaling


def test_steps_of_the_scaling_study_run():
    from benchmarks import energy_scaling

    result = energy_scaling.run(repeats=1, calls=1)
    assert [row["what"].split(",")[0] for row in result.rows] == [
        "a training step of ResNet-50",
        "a training step of AFNO",
    ]
    assert all(row["value"] > 0 and record.holds(row) is not None for row in result.rows)
