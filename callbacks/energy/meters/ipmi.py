"""Power of the whole machine from its board controller, over IPMI."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from typing_extensions import override

from callbacks.energy.meters.base import Availability, Channel, MeterError
from callbacks.energy.meters.polled import PolledCommand

DEVICES = (Path("/dev/ipmi0"), Path("/dev/ipmi/0"), Path("/dev/ipmidev/0"))
DCMI = ("ipmitool", "dcmi", "power", "reading")
INSTANTANEOUS = r"Instantaneous power reading:\s*(\d+(?:\.\d+)?)\s*Watts"


class IpmiMeter(PolledCommand):
    r"""One number that a program prints, as ``node``; by default the DCMI power reading.

    Lenovo's controllers (XCC) keep an energy record, which is finer (`xcc` of SLURM reads the same):

    ```yaml
    options:
      ipmi:
        command: [ipmitool, raw, "0x3a", "0x32", "4", "2", "0", "0", "0"]
        pattern: '^\s*(?:\w\w\s+){2}((?:\w\w\s+){3}\w\w)'   # bytes 3 to 6 of the answer
        encoding: hex                                          # little-endian
        kind: counter
        modulus_j: 4294967296
    ```

    Args:
        command: Program and arguments; ``[sudo, -n, ipmitool, dcmi, power, reading]`` where sudo allows it.
        pattern: Regular expression; its first group is the number.
        kind: ``gauge``: power, ``counter``: cumulative energy.
        unit: W or J in one unit of the number (1e-3 for mW or mJ).
        encoding: ``decimal``, or ``hex``: bytes as ``ipmitool raw`` prints them, the lowest first.
        modulus_j: J at which a counter starts again from zero; None: it never does.
        max_power_w: Power that the machine cannot exceed, W; None: unknown.
        poll_s: Time between two calls, s.
        timeout_s: A call that takes longer has failed, s.
    """

    def __init__(
        self,
        command: Sequence[str] = DCMI,
        pattern: str = INSTANTANEOUS,
        kind: Literal["gauge", "counter"] = "gauge",
        unit: float = 1.0,
        encoding: Literal["decimal", "hex"] = "decimal",
        modulus_j: float | None = None,
        max_power_w: float | None = None,
        poll_s: float = 1.0,
        timeout_s: float = 10.0,
    ) -> None:
        super().__init__(command, poll_s, timeout_s)
        where = "callbacks.energy.options.ipmi"
        if kind not in ("gauge", "counter"):
            raise ValueError(f"{where}.kind={kind!r} is unknown; choose gauge (power) or counter (energy).")
        if encoding not in ("decimal", "hex"):
            raise ValueError(f"{where}.encoding={encoding!r} is unknown; choose decimal or hex.")
        try:
            self.pattern = re.compile(pattern, re.MULTILINE)
        except re.error as error:
            raise ValueError(f"{where}.pattern={pattern!r} is no regular expression: {error}.") from error
        if not self.pattern.groups:
            raise ValueError(f"{where}.pattern={pattern!r} has no group; put parentheses around the number.")
        self.kind, self.unit, self.encoding = kind, unit, encoding
        self.modulus_j, self.max_power_w = modulus_j, max_power_w

    @override
    def probe(self) -> Availability:
        device = next((path for path in DEVICES if path.exists()), None)
        if not self.installed:
            return Availability(False, f"{self.command[0]} is not installed")
        try:
            value = self.poll()[0]
        except MeterError as error:
            if device is not None and not os.access(device, os.R_OK | os.W_OK):
                return Availability(
                    False,
                    f"{device} may be used by root only; an administrator can allow it with a line of "
                    '/etc/udev/rules.d/70-ipmi.rules: KERNEL=="ipmi*", MODE="0666"; or let sudo run it: '
                    f"callbacks.energy.options.ipmi.command=[sudo,-n,{','.join(self.command)}]",
                    present=True,
                )
            return Availability(False, str(error), present=device is not None)
        if self.kind == "gauge" and not value > 0:
            return Availability(
                False, f"{' '.join(self.command)} says {value:g} W: the board does not measure its power"
            )
        return Availability(True)

    @override
    def describe(self) -> list[Channel]:
        source = f"ipmi ({' '.join(self.command)})"
        return [Channel("node", "node", self.kind, True, source, self.modulus_j, self.max_power_w)]

    @override
    def poll(self) -> list[float]:
        out = self.output()
        if (match := self.pattern.search(out)) is None:
            raise MeterError(
                f"{' '.join(self.command)}: nothing in the output fits callbacks.energy.options.ipmi.pattern="
                f"{self.pattern.pattern!r}; it begins with {out.strip()[:80]!r}"
            )
        try:
            raw = int.from_bytes(bytes.fromhex(match[1]), "little") if self.encoding == "hex" else float(match[1])
        except ValueError as error:
            raise MeterError(f"{' '.join(self.command)}: {match[1]!r} is no {self.encoding} number") from error
        return [raw * self.unit]
