"""Every kind of mistake is found, named by its key, and a sound configuration passes."""

from __future__ import annotations

import pytest
import torch

from runner import check as checking
from runner.check import ConfigMistakes, check
from tests.composing import composed


def found(*overrides: str, more: list[str] | None = None, typed: list[str] | None = None) -> list[str]:
    with pytest.raises(ConfigMistakes) as error:
        check(composed("experiment=tiny", *overrides, user=True), more, typed)
    assert str(error.value).startswith("the configuration has ")
    return error.value.found


def test_a_sound_configuration_passes():
    check(composed("experiment=tiny", user=True))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("++model.widht=3", "model.widht: tiny_model.TinyModule takes no 'widht'. Did you mean 'width'?"),
        ("++model.optimizer.learning=1", "model.optimizer.learning: torch.optim.Adam takes no 'learning'"),
        ("++trainer.max_epoch=3", "trainer.max_epoch: lightning.pytorch.Trainer takes no 'max_epoch'. Did you mean"),
        ("++trainer.strategy=ddp", "trainer.strategy: lightning.pytorch.Trainer takes no 'strategy'"),
        (
            "model._target_=tiny_model.TinyModul",
            "model._target_: 'tiny_model' has no 'TinyModul'. Did you mean 'TinyMo",
        ),
        ("model.width=???", "model.width: needs a value (it is '???')"),
        ("model.width=${nothing.here}", "model.width: Interpolation key 'nothing.here' not found"),
        ("++callbacks.more._target_=callbacks.interrupt.Interrupt", "callbacks.more.dirpath: callbacks.interrupt.Int"),
        ("trainer.devices=0", "trainer.devices=0: on CPU it is a number of processes, 1 or more"),
        ("trainer.devices=3", "data.batch_size=8: cannot be split over trainer.devices x trainer.num_nodes = 3"),
        ("trainer.num_nodes=2", "trainer.num_nodes=2: start one process per device with srun or torchrun"),
        (
            "++callbacks.consol.every_s=3",
            "callbacks.consol: not part of the chosen callbacks option. Did you mean 'con",
        ),
        ("++tags=[a,${b}]", "tags[1]: Interpolation key 'b' not found"),
    ],
)
def test_mistake(override, message):
    lines = found(override)
    assert len(lines) == 1 and message in lines[0], lines


@pytest.mark.parametrize("devices", ["auto", "-1"])
@pytest.mark.parametrize("experiment", ["energy_scaling", "energy_scaling/afno_pretrain", "weather/weak_scaling"])
def test_devices_that_batches_and_rates_are_multiples_of(experiment, devices):
    with pytest.raises(ConfigMistakes) as error:
        check(composed(f"experiment={experiment}", f"trainer.devices={devices}"))
    lines = [line for line in error.value.found if "set trainer.devices to their number" in line]
    assert lines and all(f"{devices} is no number to multiply by" in line for line in lines), error.value.found


@pytest.mark.parametrize(
    ("devices", "nodes", "expected"), [("4", 1, 4), ("[0,2]", 1, 2), ("'0,1,3'", 1, 3), ("'2'", 3, 6), ("2", 4, 8)]
)
def test_products_of_devices_and_nodes(devices, nodes, expected):
    overrides = (f"trainer.devices={devices}", f"trainer.num_nodes={nodes}")
    images = composed("experiment=energy_scaling", *overrides, "data.local_batch_size=32")
    assert images.model.optimizer.lr == pytest.approx(0.1 * 32 * expected / 256)
    assert composed("experiment=energy_scaling/afno_pretrain", *overrides).data.batch_size == 4 * expected
    paper = composed("experiment=energy_scaling/paper", *overrides)
    assert paper.model.optimizer.lr == pytest.approx(0.1 * expected)


def test_all_at_once_with_those_of_the_command_line():
    lines = found("++model.widht=3", "++trainer.max_epoch=3", more=["sed: no such key or group."])
    assert [line.split(":")[0] for line in lines] == ["sed", "model.widht", "trainer.max_epoch"]


def test_nothing_is_chosen():
    with pytest.raises(ConfigMistakes) as error:
        check(composed("optimizer=none"))
    assert [line.split(":")[0] for line in error.value.found] == ["data", "model"]
    assert "experiment=recycle" in error.value.found[0]


def test_a_value_for_what_the_option_lacks():
    """An experiment may hold it, who types it is told."""
    override = "++callbacks.early_stopping.patience=3"
    check(composed("experiment=tiny", override, user=True))
    (line,) = found(override, typed=[override])
    assert line.startswith("callbacks.early_stopping: not part of the chosen callbacks option.")


def test_batch_keys_that_the_data_lack(tmp_path, monkeypatch):
    (tmp_path / "picture_data.py").write_text(
        "from tiny_model import TinyData\n"
        "class Pictures(TinyData):\n    batch_keys = ('x', 'label')\n"
        "class Everything(TinyData):\n    batch_keys = ('x', 'label', 'y')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = found("data._target_=picture_data.Pictures")
    assert "tiny_model.TinyModule needs the batch keys ['y']" in line and "it gives ['x', 'label']" in line
    check(composed("experiment=tiny", "data._target_=picture_data.Everything", user=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("strategy.sample_parallel_size=2",), None),
        (("strategy.sample_parallel_size=4", "data.batch_size=7"), None),  # all processes see the same items
        (("data.batch_size=7",), None),  # auto: the processes of the machine
        (
            ("strategy.sample_parallel_size=3",),
            "strategy.sample_parallel_size=3 does not divide trainer.devices x trainer.num_nodes = 4 processes; use",
        ),
        (
            ("strategy.sample_parallel_size=2", "data.batch_size=7"),
            "data.batch_size=7: cannot be split over 2 shares of the data (trainer.devices x trainer.num_nodes = 4 pro",
        ),
        (("cluster.local_size=2", "data.batch_size=7"), "cannot be split over 2 shares of the data"),
        (("cluster.local_size=3",), "cluster.local_size=3: does not divide"),
        (("model.num_samples=3",), "model.num_samples=3 leaves 1 of strategy.sample_parallel_size=4 ranks without"),
        (("model.num_eval_samples=2",), "model.num_eval_samples=2 leaves 2 of strategy.sample_parallel_size=4 ranks"),
        (("model.antithetic=true", "model.num_samples=12"), "model.num_samples=12: an antithetic pair would be split"),
        (("model.antithetic=true", "model.num_eval_samples=7"), None),  # pairs are for training
        (("strategy.sync_bn=off",), "strategy.sync_bn=off: strategies.sampling_parallel.SamplingParallel expects 'sam"),
    ],
)
def test_samples_that_processes_share(tmp_path, monkeypatch, options, message):
    (tmp_path / "sampled_model.py").write_text(
        "from tiny_model import TinyModule\n"
        "class Sampled(TinyModule):\n"
        "    def __init__(self, num_samples: int = 8, num_eval_samples: int = 8, antithetic: bool = False, **rest):\n"
        "        super().__init__(**rest)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = {"num_samples": 8, "num_eval_samples": 8, "antithetic": False}
    common = ["strategy=sampling_parallel", "trainer=multi_cpu", "trainer.devices=4"]
    common += ["model._target_=sampled_model.Sampled", *(f"++model.{key}={value}" for key, value in given.items())]
    if message is None:
        check(composed("experiment=tiny", *common, *options, user=True))
    else:
        (line,) = found(*common, *options)
        assert message in line


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (("experiment=recycle/etth1",), ["ETTh1.csv"]),
        (("experiment=classification/mnist",), ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]),
        (("experiment=energy_measurement/xray_paper",), ["train.csv"]),
    ],
)
def test_files_that_are_not_there(tmp_path, options, missing):
    config = composed(*options, f"data_dir={tmp_path}")
    check(config)  # where nothing is read, nothing is looked for
    with pytest.raises(ConfigMistakes) as error:
        check(config, files=True)
    for name in missing:
        (line,) = [line for line in error.value.found if name in line]
        assert str(tmp_path) in line and "set data_dir" in line


def test_files_that_are_there_and_data_that_need_none(tmp_path):
    (tmp_path / "ETTh1.csv").touch()
    check(composed("experiment=recycle/etth1", f"data_dir={tmp_path}"), files=True)
    check(composed("experiment=recycle", "data_dir=/no/such/folder"), files=True)
    check(composed("experiment=classification", "data_dir=/no/such/folder"), files=True)
    (tmp_path / "mnist").mkdir()
    for name in ("train-images", "train-labels", "t10k-images", "t10k-labels"):  # one of them compressed
        kind = "idx3" if "images" in name else "idx1"
        (tmp_path / "mnist" / f"{name}-{kind}-ubyte{'.gz' if name == 'train-labels' else ''}").touch()
    check(composed("experiment=classification/mnist", f"data_dir={tmp_path}"), files=True)


def test_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (line,) = found("trainer=gpu")
    assert "no CUDA device found" in line and "trainer=multi_cpu" in line
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check(composed("experiment=tiny", "trainer=multi_gpu", user=True))
    (line,) = found("trainer=multi_gpu", "trainer.devices=4")
    assert line == "trainer.devices=4: this machine has 2 CUDA device(s)"
    (line,) = found("trainer=multi_gpu", "data.batch_size=7")
    assert "use a multiple of 2" in line


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(checking.importlib.util, "find_spec", lambda name: None)
    (line,) = found("logger=tensorboard")
    assert line.startswith("logger.tensorboard: needs the package tensorboard") and "'.[tensorboard]'" in line
