"""Tensors that nobody needs for a while leave the memory that trains: from a device to the host, there to a file."""

from __future__ import annotations

import logging
import tempfile

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

_SMALLEST = 1 << 16  # bytes; below it a page of a file saves nothing


def put_aside(value: Tensor) -> Tensor:
    """The same numbers on the CPU, out of the way.

    From a device they come to host memory. On a machine without one they are written to a file without a name in the
    folder for temporary files (``TMPDIR``), which is gone when nothing refers to the tensor any more, and when the
    process ends however it ends. The tensor maps that file: pages are read when somebody looks, and writing to them
    changes neither the file nor ``value``. Where no file can be written (a full disk), they stay in memory.
    """
    value = value.detach()
    if value.device.type != "cpu":
        return value.cpu()
    if value.untyped_storage().nbytes() < _SMALLEST:
        return value
    data = value.contiguous().view(-1).view(torch.uint8).numpy()
    try:
        with tempfile.TemporaryFile(buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            pages = np.memmap(file, dtype=np.uint8, mode="c", shape=data.shape)
    except OSError as error:
        log.warning("the state of the optimizer waits in memory, not in %s: %s", tempfile.gettempdir(), error)
        return value
    return torch.from_numpy(pages).view(value.dtype).view(value.shape)


def bring_back(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of its own on a device."""
    return value.to(device, copy=True)
