"""What a pruned network costs: multiplications, bytes, measured latency (pruning study, section 7)."""

from __future__ import annotations

import io
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from networks.masks import pack

Batch = Mapping[str, Tensor]


def _product_flops(a: Tensor, b: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Of a product of matrices, batched or not; a complex one is four real ones."""
    return 2 * math.prod(a.shape) * b.shape[-1] * (4 if a.is_complex() else 1)


_product_flops._get_raw = True  # the counter hands over tensors, not their shapes
_COMPLEX = {torch.ops.aten.bmm: _product_flops, torch.ops.aten.mm: _product_flops}


def macs(network: nn.Module, batch: Batch) -> int:
    """Multiplications and additions of matrix products and convolutions, per window of a batch.

    Complex products count as four. Fourier transforms, norms and activations are not counted. Zeros count: a dense
    kernel multiplies them.
    """
    training = network.training
    network.eval()
    counter = FlopCounterMode(display=False, custom_mapping=_COMPLEX)
    # With gradients, because torch's fused inference of encoder layers is closed to the counter; with the unfused
    # attention, because the counter does not know the fused kernel of the CPU.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(batch)
    network.train(training)
    return counter.get_total_flops() // 2 // len(batch["history"])


# ---------------------------------------------------------------------------------------------------------------- bytes


RECORD_BYTES = 4096
"""What a tensor must save: two records in place of one cost up to 2 kB in a file of torch, padding included."""


def saved_bytes(state: Any) -> int:
    """Size of the file that ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer().nbytes


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """What a deployed network needs: its ``state_dict`` without masks."""
    return {name: value for name, value in network.state_dict().items() if not name.endswith("_mask")}


def sparse_state(network: nn.Module) -> dict[str, Any]:
    """The same with zeros left out: of a tensor of which a part is zero, a bit per entry and the values that are not.

    `dense_state` restores it. Tensors that would save less than their second record in the file costs stay as they are.
    """
    found: dict[str, Any] = {}
    for name, value in plain_state(network).items():
        alive = value != 0
        saved = value.element_size() * (value.numel() - int(alive.sum())) - value.numel() // 8
        if value.ndim > 1 and value.is_floating_point() and saved > RECORD_BYTES:
            found[name] = {"shape": list(value.shape), "bits": pack(alive), "values": value[alive].detach().clone()}
        else:
            found[name] = value.detach().clone()
    return found


def dense_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The ``state_dict`` that `sparse_state` stored."""
    from networks.masks import unpack

    found = {}
    for name, entry in state.items():
        if isinstance(entry, Tensor):
            found[name] = entry
        else:
            alive = unpack(entry["bits"], entry["shape"])
            found[name] = torch.zeros(entry["shape"], dtype=entry["values"].dtype).masked_scatter(
                alive, entry["values"]
            )
    return found


def sizes(network: nn.Module) -> dict[str, int]:
    """Bytes of the file as it is (``dense``), without zeros (``sparse``), and deflated (``zip``)."""
    buffer = io.BytesIO()
    torch.save(plain_state(network), buffer)
    content = buffer.getvalue()
    return {
        "dense": len(content),
        "sparse": saved_bytes(sparse_state(network)),
        "zip": len(zlib.compress(content, 1)),
    }


# -------------------------------------------------------------------------------------------------------------- latency


@torch.no_grad()
def latencies(
    networks: Sequence[nn.Module], batch: Batch, repeats: int = 9, warm_up: int = 2, least_s: float = 0.0
) -> list[float]:
    """Seconds of a forward pass of every network, the minimum of interleaved repeats.

    Networks take turns, so that what else the machine does falls on all of them alike. On one thread of a CPU the
    seconds are those in which the thread ran: how long it waited for other processes is nothing of a network.

    Args:
        networks: In evaluation mode afterwards.
        batch: One batch, on the device of the networks.
        repeats: Rounds.
        warm_up: Rounds before, which do not count.
        least_s: A network is called several times per round until this many seconds have passed.
    """
    now = _clock(batch["history"].device)
    best = [math.inf] * len(networks)
    for network in networks:
        network.eval()
    calls = [1] * len(networks)
    for round_ in range(warm_up + repeats):
        for i, network in enumerate(networks):
            begin = now()
            for _ in range(calls[i]):
                network(batch)
            seconds = (now() - begin) / calls[i]
            if round_ < warm_up:
                calls[i] = max(1, math.ceil(least_s / max(seconds, 1e-9)))
            else:
                best[i] = min(best[i], seconds)
    return best


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.thread_time

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def resized(batch: Batch, size: int) -> dict[str, Tensor]:
    """A batch of another size, its windows repeated."""
    found = {}
    for name, value in batch.items():
        index = torch.arange(size, device=value.device) % len(value)
        found[name] = value[index]
    return found
