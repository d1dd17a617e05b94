"""Two nodes on one machine with a real, shaped link between them: network namespaces joined by a veth pair.

Needs root, iproute2 and a kernel with the token bucket filter. What the emulation of `parallel.network_model` claims
can be checked against the bytes that the kernel counts here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

NODES = ("wattlight-a", "wattlight-b")
DEVICES = ("wl-veth-a", "wl-veth-b")
ADDRESSES = ("10.231.7.1", "10.231.7.2")


def missing() -> str | None:
    """Why namespaces cannot be made here; None: they can."""
    if os.geteuid() != 0:
        return "needs root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"needs {tool} (iproute2)"
    try:
        with link(100):
            return None
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.decode().strip()}"


@contextlib.contextmanager
def link(rate_mbit: float | None) -> Iterator[None]:
    """Two namespaces with a link of this bandwidth in each direction; None: as fast as the kernel."""
    _remove()
    try:
        for node in NODES:
            _ip("netns", "add", node)
        _ip("link", "add", DEVICES[0], "type", "veth", "peer", "name", DEVICES[1])
        for node, device, address in zip(NODES, DEVICES, ADDRESSES, strict=True):
            _ip("link", "set", device, "netns", node)
            _ip("-n", node, "addr", "add", f"{address}/24", "dev", device)
            _ip("-n", node, "link", "set", device, "up")
            _ip("-n", node, "link", "set", "lo", "up")
            if rate_mbit is not None:
                shape = f"tc qdisc add dev {device} root tbf rate {rate_mbit}mbit burst 128k latency 400ms"
                _run("ip", "netns", "exec", node, *shape.split())
        yield
    finally:
        _remove()


def sent_bytes() -> tuple[int, int]:
    """Bytes that each node has sent to the other, as the kernel counts them."""
    found = []
    for node, device in zip(NODES, DEVICES, strict=True):
        path = f"/sys/class/net/{device}/statistics/tx_bytes"
        found.append(int(_run("ip", "netns", "exec", node, "cat", path).decode()))
    return found[0], found[1]


def run_ranks(module: str, args: Sequence[str], local_size: int, timeout_s: float = 300.0) -> str:
    """Run ``python -m module args`` as ``local_size`` ranks in each namespace; what rank 0 printed.

    Raises:
        RuntimeError: With the output of a rank that failed.
    """
    world = len(NODES) * local_size
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(world)]
        processes = []
        for rank in range(world):
            node = rank // local_size
            env = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "NODE_RANK": "0",
                "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29571",
                "GLOO_SOCKET_IFNAME": DEVICES[node], "OMP_NUM_THREADS": "1",
                "TORCHELASTIC_RUN_ID": "namespaces", "GROUP_RANK": "0", "LOCAL_SIZE": str(local_size),
            }  # fmt: skip
            command = ["ip", "netns", "exec", NODES[node], sys.executable, "-m", module, *args]
            with logs[rank].open("wb") as out:
                processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT))
        try:
            for rank, process in enumerate(processes):
                if process.wait(timeout_s):
                    raise RuntimeError(f"rank {rank}: {logs[rank].read_text()[-4000:]}")
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return logs[0].read_text()


def _remove() -> None:
    for node in NODES:
        subprocess.run(["ip", "netns", "del", node], capture_output=True, check=False)


def _ip(*args: str) -> None:
    _run("ip", *args)


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout
