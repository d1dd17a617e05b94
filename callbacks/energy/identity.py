"""Which machine this is."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path


def hostname() -> str:
    """Name of this machine."""
    return platform.node() or "localhost"


def host_id() -> str:
    """Eight characters that differ between machines (and boots): containers may share a name, ranks share a machine.

    ``WATTLIGHT_HOST_ID`` overrides it where a machine runs several isolated nodes.
    """
    if given := os.environ.get("WATTLIGHT_HOST_ID"):
        return given
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return hashlib.sha256(f"{hostname()} {boot}".encode()).hexdigest()[:8]
