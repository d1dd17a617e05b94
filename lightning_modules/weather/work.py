"""What a training step needs of a rank: work, time, bytes that are read, received and held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.sharding.memory import SavedBytes


class Work:
    """Counts over an epoch of training; without its validations, and without waiting for the device at any step.

    Logged after every epoch, means over its steps and over all ranks unless it says otherwise:

    =================== ================================================================================================
    ``flops/rank``      TFLOP of a step
    ``tflops/s``        of a rank, over the time of the epoch, reading included
    ``samples/s``       of all ranks together, over the same time; ranks that share a sample count it once
    ``comm_bytes/rank`` bytes that the layers of the model receive from other ranks in a step, forward and backward, for
                        whatever steps its rollout has; means of gradients over instances are in ``comm/...``
    ``io_bytes/rank``   bytes that are fetched from the store for a step
    ``io_gb/s``         1e9 bytes fetched per second of a reading process that it spends reading; 0: nothing is read
    ``mem/params``      bytes of parameters, gradients and state of the optimizer, on the rank that holds most, counted
                        after the first step of a training
    ``mem/activations`` bytes that autograd saves in a step, on the rank that saves most: of the longest rollout yet,
                        counted when it first occurs in a training; casts and gathered copies of parameters included,
                        parameters not
    =================== ================================================================================================

    Args:
        first_step: Steps of the optimizer before this training.

    Attributes:
        held: Bytes of parameters, gradients and state of the optimizer of this rank; 0: nobody has counted them.
        steps: Of the epoch so far.
    """

    def __init__(self, first_step: int = 0) -> None:
        self.first_step, self.held = first_step, 0
        self._saved_bytes, self._longest = 0, 0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Count from zero, but for what is counted once in a training."""
        self.steps = 0
        self._flops = self._received = 0.0
        self._samples = 0
        self._io: tuple[Tensor | float, Tensor | float] = 0, 0.0  # bytes, seconds; on the device
        self._elsewhere_s, self._since = 0.0, perf_counter()

    @contextmanager
    def saving(self, rollout: int, net: nn.Module) -> Iterator[None]:
        """The forward pass of a step; of the first one that rolls out so far what autograd saves is counted.

        Args:
            rollout: Steps of the rollout.
            net: Whose parameters do not count.
        """
        if rollout <= self._longest:
            yield
            return
        with SavedBytes(net.parameters()) as saved:
            yield
        self._longest, self._saved_bytes = rollout, saved.total

    def add(self, flops: float, samples: int, io_bytes: Tensor, io_s: Tensor) -> None:
        """Count a step.

        Args:
            flops: Of this rank.
            samples: That no other rank counts.
            io_bytes: Fetched for it, ().
            io_s: Seconds that this took, ().
        """
        self.steps += 1
        self._flops += flops
        self._samples += samples
        self._io = self._io[0] + io_bytes, self._io[1] + io_s

    def begin_step(self, received: float) -> None:
        """Note what the model had received before a step."""
        self._received_before = received

    def end_step(self, received: float) -> None:
        """Note what it has received after its backward pass."""
        self._received += received - self._received_before

    def pause(self) -> None:
        """The clock stops."""
        self._paused = perf_counter()

    def resume(self) -> None:
        """The clock goes on."""
        self._elsewhere_s += perf_counter() - self._paused

    def of_epoch(self, device: torch.device) -> dict[str, float]:
        """What is logged, equal on all ranks; all of them call it together.

        Args:
            device: Of a tensor that all ranks exchange.
        """
        io = [float(value) for value in self._io]  # the device has come this far
        seconds = max(perf_counter() - self._since - self._elsewhere_s, 1e-9)
        own = [self.steps, seconds, self._flops, self._samples, self._received, *io, self.held, self._saved_bytes]
        every = torch.tensor([own], dtype=torch.float64)
        if dist.is_initialized() and dist.get_world_size() > 1:
            every = every.to(device)  # one device alone may know no double precision
            rows = [torch.empty_like(every) for _ in range(dist.get_world_size())]
            dist.all_gather(rows, every)
            every = torch.cat(rows)
        steps, seconds, flops, samples, received, io_bytes, io_s, *_ = every.sum(0).tolist()
        held, saved = every[:, -2:].amax(0).tolist()
        return {
            "flops/rank": flops / steps / 1e12,
            "tflops/s": flops / seconds / 1e12,
            "samples/s": samples * len(every) / seconds,
            "comm_bytes/rank": received / steps,
            "io_bytes/rank": io_bytes / steps,
            "io_gb/s": io_bytes / io_s / 1e9 if io_s else 0.0,
            "mem/params": held,
            "mem/activations": saved,
        }
