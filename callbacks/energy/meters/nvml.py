"""NVIDIA GPUs through NVML: energy counters (Volta and newer) or power."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from typing_extensions import override

from callbacks.energy.meters.base import Availability, Channel, Meter, MeterError
from callbacks.energy.meters.slurm import exclusive_allocation

log = logging.getLogger(__name__)

SCOPES = ("auto", "job", "node")
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class _Gpu:
    index: int
    uuid: str
    name: str
    handle: Any


class NvmlMeter(Meter):
    """GPUs as ``gpu<NVML index>``, with their UUID as identity.

    The driver's energy counter is read where there is one. Older boards have a power reading; where the plain one is a
    mean over a second (Ampere and newer, except GA100) the instantaneous field is taken instead. A board that is lost
    during the run has no value from then on. With MIG, energy is that of the board, whoever uses its other instances.

    Args:
        devices: NVML indices (those of ``nvidia-smi``), UUIDs or unique beginnings of them, or ids of MIG instances;
            None: all boards that NVML shows. See `job_devices`.
    """

    def __init__(self, devices: Sequence[int | str] | None = None) -> None:
        self.devices = None if devices is None else list(devices)
        self._nvml: ModuleType | None = None
        self._readers: list[tuple[str, Callable[[], float]]] = []
        self._lost: set[str] = set()

    @override
    def probe(self) -> Availability:
        if self.devices == []:
            return Availability(False, "this job has no GPU (CUDA_VISIBLE_DEVICES or SLURM gives it none)")
        try:
            nvml = _start()
        except MeterError as error:
            return Availability(False, str(error), present=DRIVER.exists())
        try:
            gpus = _resolve(nvml, _boards(nvml), self.devices)
            if not gpus:
                return Availability(False, "NVML shows no GPU")
            reasons = [_reader(nvml, gpu)[1] for gpu in gpus]
            if all(isinstance(reason, MeterError) for reason in reasons):
                return Availability(False, str(reasons[0]), present=True)
        except MeterError as error:
            return Availability(False, str(error), present=True)
        finally:
            _end(nvml)
        return Availability(True)

    @override
    def open(self) -> list[Channel]:
        if self.devices == []:
            raise MeterError("this job has no GPU (CUDA_VISIBLE_DEVICES or SLURM gives it none)")
        nvml = _start()
        try:
            gpus = _resolve(nvml, _boards(nvml, warn=True), self.devices)
            channels, readers, failures = [], [], []
            for gpu in gpus:
                channel, reader = _reader(nvml, gpu)
                if isinstance(reader, MeterError):
                    failures.append(reader)
                    continue
                channels.append(channel)
                readers.append((channel.name, reader))
            if not channels:
                raise failures[0] if failures else MeterError("NVML shows no GPU")
            for failure in failures:
                log.warning("energy: %s; it is not counted", failure)
            shared = [gpu.index for gpu in gpus if _has_mig(nvml, gpu)]
            if shared:
                log.warning(
                    "energy: MIG is on for GPU %s; energy is that of the whole board, other instances included",
                    ", ".join(map(str, shared)),
                )
        except BaseException:
            _end(nvml)
            raise
        self._nvml, self._readers, self._lost = nvml, readers, set()
        return channels

    @override
    def read(self) -> list[float]:
        out = []
        for name, reader in self._readers:
            try:
                out.append(reader())
            except self._nvml.NVMLError as error:
                if name not in self._lost:
                    self._lost.add(name)
                    log.warning("energy: %s cannot be read any more: %s", name, error)
                out.append(math.nan)
        return out

    @override
    def close(self) -> None:
        if self._nvml is not None:
            _end(self._nvml)
            self._nvml, self._readers = None, []


def job_devices(scope: str, environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """GPUs that count for this job on this machine, as UUIDs; None: all.

    A job's GPUs are those of ``CUDA_VISIBLE_DEVICES``, or of SLURM's list (``SLURM_STEP_GPUS``, ``SLURM_JOB_GPUS``)
    where that has more: a task of ``srun`` may see one GPU of the four that the job has on the node, and the first task
    measures for all. SLURM numbers the node's GPUs, also where the job sees only its own; where NVML shows no more of
    them than the job has, they are the job's.

    Args:
        scope: ``job``; ``node``: all GPUs, because idle ones are fed as well; ``auto``: ``node`` where SLURM says that
            the job has the machine for itself.
        environ: Variables of the process.
    """
    if scope not in SCOPES:
        raise ValueError(f"callbacks.energy.gpu_scope={scope!r} is unknown; choose {', '.join(SCOPES)}.")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    granted = _numbers(environ.get("SLURM_STEP_GPUS") or environ.get("SLURM_JOB_GPUS") or "")
    if scope == "node" or (visible is None and not granted):
        return None
    if scope == "auto" and exclusive_allocation(environ)[0]:
        return None
    wanted = _visible(visible or "")
    if not wanted and not granted:
        return []
    try:
        nvml = _start()
    except MeterError:
        return None  # the meter's own probe says why
    try:
        boards = _boards(nvml)
        if len(granted) > len(wanted):
            if len(boards) <= len(granted):
                return [gpu.uuid for gpu in boards]
            chosen = [gpu.uuid for gpu in boards if gpu.index in granted]
            return chosen or [gpu.uuid for gpu in _known(nvml, boards, wanted)]
        chosen = _known(nvml, boards, wanted)
        if (
            any(item.isdigit() for item in wanted)
            and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
            and len({gpu.name for gpu in boards}) > 1
            and len(chosen) < len(boards)
        ):
            log.warning(
                "energy: this machine has different GPUs and CUDA counts the fastest first, NVML by position: "
                "CUDA_VISIBLE_DEVICES=%s may name others than those measured; set CUDA_DEVICE_ORDER=PCI_BUS_ID",
                visible,
            )
        return [gpu.uuid for gpu in chosen]
    finally:
        _end(nvml)


def _visible(value: str) -> list[str]:
    """Entries of ``CUDA_VISIBLE_DEVICES``; CUDA ignores what follows an invalid one (-1)."""
    out: list[str] = []
    for item in (part.strip() for part in value.split(",")):
        if not re.fullmatch(r"\d+|(?:GPU|MIG)-[\w/-]+", item):
            break
        out.append(item)
    return out


def _known(nvml: ModuleType, boards: list[_Gpu], wanted: list[str]) -> list[_Gpu]:
    """Boards of the entries up to the first that does not exist, as CUDA does it; each board once."""
    out: list[_Gpu] = []
    for item in wanted:
        gpu = _find(nvml, boards, item)
        if gpu is None:
            break
        if gpu not in out:
            out.append(gpu)
    return out


def _numbers(value: str) -> list[int]:
    """``0,2`` or ``0-3`` as numbers; empty if it is something else."""
    out: list[int] = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            return []
        out += range(int(match[1]), int(match[2] or match[1]) + 1)
    return out


def _start() -> ModuleType:
    """The NVML module, initialised; `_end` undoes it (NVML counts)."""
    try:
        import pynvml
    except ImportError as error:
        raise MeterError("the package nvidia-ml-py is not installed: pip install nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        remedy = "; the driver was updated, reboot" if "mismatch" in str(error).lower() else ""
        raise MeterError(f"NVML does not start: {error}{remedy}") from error
    return pynvml


def _end(nvml: ModuleType) -> None:
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlShutdown()


def _boards(nvml: ModuleType, warn: bool = False) -> list[_Gpu]:
    """All boards that answer."""
    out = []
    try:
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        raise MeterError(f"NVML does not count GPUs: {error}") from error
    for index in range(count):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid, name = _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle))
        except nvml.NVMLError as error:
            if warn:
                log.warning("energy: GPU %d does not answer and is not counted: %s", index, error)
            continue
        out.append(_Gpu(index, uuid, name, handle))
    return out


def _resolve(nvml: ModuleType, boards: list[_Gpu], devices: Sequence[int | str] | None) -> list[_Gpu]:
    if devices is None:
        return boards
    out: list[_Gpu] = []
    for device in devices:
        gpu = _find(nvml, boards, str(device))
        if gpu is None:
            there = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in boards) or "none"
            raise MeterError(f"callbacks.energy.options.nvml.devices: no GPU {device!r}; there are: {there}")
        if gpu not in out:
            out.append(gpu)
    return out


def _find(nvml: ModuleType, boards: list[_Gpu], wanted: str) -> _Gpu | None:
    if wanted.isdigit():
        return next((gpu for gpu in boards if gpu.index == int(wanted)), None)
    if wanted.startswith("MIG-"):
        wanted = _board_of(nvml, wanted)
    matches = [gpu for gpu in boards if wanted and gpu.uuid.startswith(wanted)]
    return matches[0] if len(matches) == 1 else None


def _board_of(nvml: ModuleType, instance: str) -> str:
    """UUID of the board of a MIG instance; empty if it is unknown."""
    if match := re.match(r"MIG-(GPU-[\w-]+)", instance):  # of drivers before 470: MIG-GPU-<uuid>/<instance>/<instance>
        return match[1]
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(instance)
        return _text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)))
    except nvml.NVMLError:
        return ""


def _reader(nvml: ModuleType, gpu: _Gpu) -> tuple[Channel | None, Callable[[], float] | MeterError]:
    """Channel and reader of the first source that answers; the error of the last one if none does."""
    handle = gpu.handle

    def energy() -> float:
        return nvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1e-3

    def instant() -> float:
        value = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])[0]
        if value.nvmlReturn != nvml.NVML_SUCCESS:
            raise nvml.NVMLError(value.nvmlReturn)
        return value.value.uiVal * 1e-3

    def power() -> float:
        return nvml.nvmlDeviceGetPowerUsage(handle) * 1e-3

    averaged = _averages_power(nvml, gpu)
    sources = [("counter", gpu.name, energy)]
    if averaged:
        sources.append(("gauge", f"{gpu.name}, power", instant))
    sources.append(("gauge", f"{gpu.name}, power averaged over 1 s" if averaged else f"{gpu.name}, power", power))
    failure: Exception | None = None
    for kind, source, reader in sources:
        try:
            reader()
        except nvml.NVMLError as error:
            failure = error
            continue
        limit = _limit_w(nvml, handle)
        channel = Channel(f"gpu{gpu.index}", "gpu", kind, True, f"nvml ({source})", max_power_w=limit, device=gpu.uuid)
        return channel, reader
    remedy = ""
    if isinstance(failure, getattr(nvml, "NVMLError_NoPermission", ())):
        remedy = "; the driver lets only administrators read it, ask them for access to /dev/nvidia*"
    return None, MeterError(f"GPU {gpu.index} ({gpu.name}) tells neither energy nor power: {failure}{remedy}")


def _averages_power(nvml: ModuleType, gpu: _Gpu) -> bool:
    """Whether the plain power reading is a mean over a second."""
    try:
        architecture = nvml.nvmlDeviceGetArchitecture(gpu.handle)
    except nvml.NVMLError:
        return False
    if architecture == nvml.NVML_DEVICE_ARCH_AMPERE:
        return re.search(r"\b(A100|A800|A30)\b", gpu.name) is None  # the GA100 chip
    return nvml.NVML_DEVICE_ARCH_AMPERE < architecture < nvml.NVML_DEVICE_ARCH_UNKNOWN


def _limit_w(nvml: ModuleType, handle: Any) -> float | None:
    """The highest limit that the board could be set to, which holds if somebody raises the present one."""
    limits = []
    with contextlib.suppress(nvml.NVMLError):
        limits.append(nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    with contextlib.suppress(nvml.NVMLError):
        limits.append(nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)[1])
    return max(limits) * 1e-3 if limits and max(limits) > 0 else None


def _has_mig(nvml: ModuleType, gpu: _Gpu) -> bool:
    with contextlib.suppress(nvml.NVMLError):
        return nvml.nvmlDeviceGetMigMode(gpu.handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    return False


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
