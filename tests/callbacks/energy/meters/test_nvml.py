"""NVML with a module in place of the driver: no GPU is needed."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest

from callbacks.energy.meters import nvml
from callbacks.energy.meters.base import MeterError
from callbacks.energy.meters.nvml import NvmlMeter, job_devices

PASCAL, VOLTA, AMPERE, HOPPER = 4, 5, 7, 9


class Board:
    """A GPU whose answers the test sets; an exception is raised, a missing answer is "not supported"."""

    def __init__(self, uuid, name="NVIDIA H100", architecture=HOPPER, mig=None, **answers):
        self.answers = {"uuid": uuid, "name": name, "architecture": architecture, **answers}
        if mig is not None:
            self.answers["mig"] = [mig, mig]


class Nvml(ModuleType):
    """What `NvmlMeter` uses of pynvml."""

    NVML_SUCCESS = 0
    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_DEVICE_ARCH_AMPERE = AMPERE
    NVML_DEVICE_ARCH_UNKNOWN = 0xFFFFFFFF
    NVML_DEVICE_MIG_ENABLE = 1

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    class NVMLError_NoPermission(NVMLError):
        pass

    class NVMLError_GpuIsLost(NVMLError):
        pass

    def __init__(self, boards, instances=None, start_error=None):
        super().__init__("pynvml")
        self.boards, self.instances, self.start_error = boards, instances or {}, start_error
        self.users = 0
        self.calls = []
        for function, key in {
            "UUID": "uuid",
            "Name": "name",
            "Architecture": "architecture",
            "TotalEnergyConsumption": "energy",
            "PowerUsage": "power",
            "EnforcedPowerLimit": "limit",
            "PowerManagementLimitConstraints": "limits",
            "MigMode": "mig",
        }.items():
            setattr(self, f"nvmlDeviceGet{function}", lambda handle, key=key: self._answer(handle, key))

    def _answer(self, board, key):
        self.calls.append(key)
        value = board.answers.get(key, self.NVMLError_NotSupported("Not Supported"))
        if isinstance(value, Exception):
            raise value
        return value

    def nvmlInit(self):
        if self.start_error:
            raise self.start_error
        self.users += 1

    def nvmlShutdown(self):
        assert self.users
        self.users -= 1

    def nvmlDeviceGetCount(self):
        return len(self.boards)

    def nvmlDeviceGetHandleByIndex(self, index):
        if isinstance(self.boards[index], Exception):
            raise self.boards[index]
        return self.boards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.instances:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle):
        return self.boards[self.instances[handle]]

    def nvmlDeviceGetFieldValues(self, board, fields):
        assert fields == [self.NVML_FI_DEV_POWER_INSTANT]
        value = board.answers.get("instant")
        code = 0 if value is not None else 3
        return [SimpleNamespace(nvmlReturn=code, value=SimpleNamespace(uiVal=value))]


@pytest.fixture
def install(monkeypatch):
    """Puts boards into the machine; afterwards, everybody who started NVML must have ended it."""
    modules = []

    def put(*boards, **options):
        module = Nvml(list(boards), **options)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        modules.append(module)
        return module

    yield put
    assert all(module.users == 0 for module in modules)


def gpus(count, **answers):
    return [Board(f"GPU-{i}{i}{i}{i}-abc", energy=1000 * (i + 1), **answers) for i in range(count)]


def test_the_energy_counter(install):
    module = install(
        Board("GPU-a", "NVIDIA A100-SXM4-40GB", AMPERE, energy=5_000_123, limit=400_000, limits=[100_000, 400_000]),
        Board(b"GPU-b", b"NVIDIA H100", limit=350_000, limits=[200_000, 700_000], energy=7_000_000),
        Board("GPU-c", "Tesla V100", VOLTA, energy=1),
    )
    meter = NvmlMeter()
    assert meter.probe().ok and module.users == 0
    channels = meter.open()
    assert [(c.name, c.component, c.kind, c.measured, c.device) for c in channels] == [
        ("gpu0", "gpu", "counter", True, "GPU-a"),
        ("gpu1", "gpu", "counter", True, "GPU-b"),
        ("gpu2", "gpu", "counter", True, "GPU-c"),
    ]
    assert [c.max_power_w for c in channels] == [400, 700, None]
    assert channels[0].source == "nvml (NVIDIA A100-SXM4-40GB)" and channels[0].modulus_j is None
    assert meter.read() == pytest.approx([5000.123, 7000, 0.001])
    module.boards[0].answers["energy"] += 250_000
    module.calls.clear()
    assert meter.read()[0] == pytest.approx(5250.123)
    assert module.calls == ["energy"] * 3, "one call per board and reading"
    meter.close()
    meter.close()


def test_power_where_there_is_no_counter(install):
    """The instantaneous field where the plain value is a mean over a second."""
    install(
        Board("GPU-a", "Tesla P100", PASCAL, power=150_000, instant=1),
        Board("GPU-b", "NVIDIA A100 80GB PCIe", AMPERE, power=250_000, instant=1),
        Board("GPU-c", "NVIDIA A40", AMPERE, power=200_000, instant=210_000),
        Board("GPU-d", "NVIDIA L4", 8, power=60_000),
    )
    meter = NvmlMeter()
    channels = meter.open()
    assert [c.kind for c in channels] == ["gauge"] * 4
    assert meter.read() == [150, 250, 210, 60]
    assert [c.source for c in channels] == [
        "nvml (Tesla P100, power)",
        "nvml (NVIDIA A100 80GB PCIe, power)",
        "nvml (NVIDIA A40, power)",
        "nvml (NVIDIA L4, power averaged over 1 s)",
    ]
    meter.close()


def test_devices_are_chosen_by_index_uuid_or_instance(install, caplog):
    install(*gpus(4), instances={"MIG-77": 3})
    for devices, expected in (
        ([2, 0], ["gpu2", "gpu0"]),
        (["1"], ["gpu1"]),
        (["GPU-2222"], ["gpu2"]),
        (["MIG-77", "MIG-GPU-0000-abc/1/0", "MIG-GPU-0000-abc/2/0"], ["gpu3", "gpu0"]),
    ):
        meter = NvmlMeter(devices)
        assert [c.name for c in meter.open()] == expected
        meter.close()
    for unknown in (9, "GPU-", "GPU-9", "MIG-9"):  # GPU- fits them all
        meter = NvmlMeter([unknown])
        assert not meter.probe().ok
        with pytest.raises(MeterError, match=r"no GPU .*there are: 0 \(GPU-0000-abc\)"):
            meter.open()


def test_mig_is_mentioned_once(install, caplog):
    install(*gpus(2, mig=1))
    meter = NvmlMeter()
    meter.open()
    meter.close()
    assert caplog.text.count("whole board") == 1 and "GPU 0, 1" in caplog.text


def test_no_driver_no_package_no_gpu(install, monkeypatch):
    module = install()
    module.start_error = module.NVMLError("NVML Shared Library Not Found")
    found = NvmlMeter().probe()
    assert not found.ok and "Shared Library" in found.reason
    module.start_error = module.NVMLError("RM has detected an NVML/RM version mismatch.")
    assert "reboot" in NvmlMeter().probe().reason
    with pytest.raises(MeterError, match="mismatch"):
        NvmlMeter().open()
    module.start_error = None
    assert "no GPU" in NvmlMeter().probe().reason
    with pytest.raises(MeterError, match="no GPU"):
        NvmlMeter().open()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in NvmlMeter().probe().reason
    assert not NvmlMeter([]).probe().ok
    with pytest.raises(MeterError, match="this job has no GPU"):
        NvmlMeter([]).open()


def test_the_hardware_is_there_but_the_driver_does_not_answer(install, monkeypatch, tmp_path):
    module = install()
    module.start_error = module.NVMLError("Driver Not Loaded")
    monkeypatch.setattr(nvml, "DRIVER", tmp_path / "version")
    assert not NvmlMeter().probe().present
    (tmp_path / "version").touch()
    assert NvmlMeter().probe().present


def test_a_board_that_is_lost_during_the_run(install, caplog):
    module = install(*gpus(2))
    meter = NvmlMeter()
    meter.open()
    module.boards[0].answers["energy"] = module.NVMLError_GpuIsLost("GPU is lost")
    for _ in range(3):
        lost, well = meter.read()
        assert math.isnan(lost) and well == 2
    meter.close()
    assert caplog.text.count("gpu0 cannot be read any more: GPU is lost") == 1


def test_a_board_that_is_lost_before(install, caplog):
    module = install(*gpus(2))
    module.boards[0] = module.NVMLError_GpuIsLost("GPU is lost")
    meter = NvmlMeter()
    assert [c.name for c in meter.open()] == ["gpu1"]
    meter.close()
    assert "GPU 0 does not answer" in caplog.text


def test_permission(install, caplog):
    module = install(*gpus(2))
    denied = module.NVMLError_NoPermission("Insufficient Permissions")
    module.boards[0].answers.update(energy=denied, power=denied)
    meter = NvmlMeter()
    assert meter.probe().ok, "the other board answers"
    assert [c.name for c in meter.open()] == ["gpu1"]
    meter.close()
    assert "it is not counted" in caplog.text
    found = NvmlMeter([0]).probe()
    assert not found.ok and found.present and "Permissions" in found.reason and "administrators" in found.reason
    with pytest.raises(MeterError, match="neither energy nor power"):
        NvmlMeter([0]).open()


ALL = ["GPU-0000-abc", "GPU-1111-abc", "GPU-2222-abc", "GPU-3333-abc"]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, [ALL[2], ALL[0]]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-111,GPU-3333-abc"}, [ALL[1], ALL[3]]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-77,MIG-GPU-0000-abc/1/0"}, [ALL[2], ALL[0]]),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, [ALL[1]]),  # CUDA ignores what follows
        ({"CUDA_VISIBLE_DEVICES": "1,8,2"}, [ALL[1]]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, []),
        # A task of srun sees one of the job's two GPUs; the numbers are the node's.
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_GPUS": "2,3"}, [ALL[2], ALL[3]]),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_GPUS": "0-3"}, ALL),
        ({"SLURM_STEP_GPUS": "1", "SLURM_JOB_GPUS": "0,1,2,3"}, [ALL[1]]),
        # The node's other GPUs are hidden, and so the four that NVML shows are the job's, whatever their numbers.
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_GPUS": "4,5,6,7"}, ALL),
        # A job that hides its GPUs (a forced CPU run) still feeds them.
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "0,1"}, ALL[:2]),
        ({"CUDA_VISIBLE_DEVICES": "1", "SLURM_JOB_GPUS": "junk"}, [ALL[1]]),
    ],
)
def test_devices_of_a_job(install, environ, expected):
    install(*gpus(4), instances={"MIG-77": 2})
    assert job_devices("job", environ) == expected
    assert job_devices("auto", environ) == expected
    assert job_devices("node", environ) is None


def test_an_exclusive_job_has_the_node(install):
    install(*gpus(4))
    environ = {"CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_ID": "5", "SLURM_JOB_EXCLUSIVE": "NODE"}
    assert job_devices("auto", environ) is None
    assert job_devices("job", environ) == ALL[:1]
    assert job_devices("auto", {**environ, "SLURM_JOB_EXCLUSIVE": "NO"}) == ALL[:1]


def test_devices_without_a_driver_are_left_to_the_probe(install):
    module = install()
    module.start_error = module.NVMLError("NVML Shared Library Not Found")
    assert job_devices("job", {"CUDA_VISIBLE_DEVICES": "0"}) is None
    with pytest.raises(ValueError, match=r"gpu_scope='mine'.*auto, job, node"):
        job_devices("mine", {})


def test_different_gpus_in_an_order_that_may_differ(install, caplog):
    install(*gpus(1), Board("GPU-x", "NVIDIA T4", 6, energy=1))
    assert job_devices("job", {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == ALL[:1]
    assert not caplog.text
    job_devices("job", {"CUDA_VISIBLE_DEVICES": "0"})
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in caplog.text


def test_the_real_package_has_all_names():
    pynvml = pytest.importorskip("pynvml")
    for name in (
        "NVMLError",
        "NVMLError_NoPermission",
        "NVML_SUCCESS",
        "NVML_FI_DEV_POWER_INSTANT",
        "NVML_DEVICE_ARCH_AMPERE",
        "NVML_DEVICE_ARCH_UNKNOWN",
        "NVML_DEVICE_MIG_ENABLE",
        *(name for name in vars(Nvml) if name.startswith("nvml")),
        *(name for name in vars(Nvml([])) if name.startswith("nvml")),
    ):
        assert hasattr(pynvml, name), name
