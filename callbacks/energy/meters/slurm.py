"""Energy of the node as SLURM accounts it, and whether SLURM gives the job whole nodes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping

from typing_extensions import override

from callbacks.energy.meters.base import Availability, Channel, MeterError
from callbacks.energy.meters.polled import PolledCommand

UNKNOWN = 2**63  # SLURM writes "no value" as a number close to 2**64


def exclusive_allocation(environ: Mapping[str, str]) -> tuple[bool, str]:
    """Whether the job has its nodes for itself, and how that is known.

    Asks, in this order: ``SLURM_JOB_EXCLUSIVE``, ``SLURM_JOB_OVERSUBSCRIBE``, whether all processors of the machine
    belong to the job, and ``scontrol``.
    """
    job = environ.get("SLURM_JOB_ID")
    if not job:
        return False, "this is no SLURM job (SLURM_JOB_ID is not set)"
    for name, exclusive in (
        ("SLURM_JOB_EXCLUSIVE", ("NODE", "TOPO", "YES", "TRUE", "1")),
        ("SLURM_JOB_OVERSUBSCRIBE", ("NO", "TOPO", "EXCLUSIVE")),
    ):
        if (value := environ.get(name, "").upper()) and value != "OK":
            return value in exclusive, f"{name}={value}"
    if environ.get("SLURM_CPUS_ON_NODE") == str(os.cpu_count()):
        return True, f"the job has all {os.cpu_count()} processors of the machine"
    if shutil.which("scontrol") is None:
        return False, "SLURM does not say that the job is alone on its nodes"
    try:
        command = ["scontrol", "show", "job", job, "--oneliner"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return False, f"scontrol show job {job} failed: {error}"
    # Newer versions have a field of its own; there, OverSubscribe=NO no longer means that the job is alone.
    field = re.search(r"\bExclusive=(\w+)", out) or re.search(r"\bOverSubscribe=(\w+)", out)
    if field is None:
        return False, f"scontrol show job {job} does not say whether the job is alone"
    alone = ("NODE", "TOPO") if field[0].startswith("Exclusive") else ("NO", "TOPO")
    return field[1] in alone, f"scontrol: {field[0]}"


class SlurmMeter(PolledCommand):
    """``ConsumedEnergyRaw`` of the own job step (``node``): whatever sensor the site has given SLURM.

    The figure is that of the whole node, neighbours included, so it is read only on exclusive allocations; and it is
    the sum over the nodes of the step, so only for steps of one node (the batch script is one).

    Args:
        exclusive: Whether the job is alone on its node; None: ask SLURM.
        job: Number of the job; None: that of the environment.
        step: Name of the step; None: that of the environment, ``batch`` outside of ``srun``.
        poll_s: Time between two calls, s; each asks the node's daemon.
        timeout_s: A call that takes longer has failed, s.
        environ: Variables of the job; None: those of the process.
    """

    def __init__(
        self,
        exclusive: bool | None = None,
        job: str | None = None,
        step: str | None = None,
        poll_s: float = 5.0,
        timeout_s: float = 10.0,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.environ = os.environ if environ is None else environ
        self.exclusive = exclusive
        self.job = str(job) if job is not None else self.environ.get("SLURM_JOB_ID", "")
        self.step = str(step) if step is not None else self.environ.get("SLURM_STEP_ID", "batch")
        arguments = ["--noheader", "--parsable2", "--format", "ConsumedEnergyRaw", "-j", f"{self.job}.{self.step}"]
        super().__init__(["sstat", *arguments], poll_s, timeout_s)

    @override
    def probe(self) -> Availability:
        if not self.job:
            return Availability(False, "this is no SLURM job (SLURM_JOB_ID is not set)")
        if not self.installed:
            return Availability(False, "sstat is not on the PATH of this SLURM job", present=True)
        alone, why = (True, "") if self.exclusive is None else (self.exclusive, "exclusive: false")
        if self.exclusive is None:
            alone, why = exclusive_allocation(self.environ)
        if not alone:
            return Availability(
                False,
                f"SLURM counts the whole node, neighbours included, and this job may have some ({why}); submit with "
                "--exclusive, or say callbacks.energy.options.slurm.exclusive=true if it is alone",
            )
        nodes = self.environ.get("SLURM_STEP_NUM_NODES", "1")
        if self.step != "batch" and nodes != "1":
            return Availability(
                False,
                f"sstat sums over the {nodes} nodes of step {self.job}.{self.step}: there is no figure for one machine",
            )
        try:
            value = self.poll()[0]
        except MeterError as error:
            return Availability(False, str(error))
        if not value > 0:
            return Availability(False, "SLURM has counted 0 J so far: this site does not account energy")
        return Availability(True)

    @override
    def describe(self) -> list[Channel]:
        return [Channel("node", "node", "counter", True, f"slurm (step {self.job}.{self.step})")]

    @override
    def poll(self) -> list[float]:
        out = self.output().strip()
        first = out.splitlines()[0].strip().strip("|") if out else ""
        try:
            value = float(first)
        except ValueError:
            raise MeterError(
                f"sstat has no energy of step {self.job}.{self.step} ({first or 'no output'!r}): this site does not "
                "account energy (AcctGatherEnergyType)"
            ) from None
        if value >= UNKNOWN:
            raise MeterError(f"sstat does not know the energy of step {self.job}.{self.step} ({first})")
        return [value]
