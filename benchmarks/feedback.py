"""F3: memory and time of a training step against backpropagation, and the joules of an epoch.

Claims (Flügel et al., arXiv 2304.13372): without a backward pass there is nothing to keep for it, and a block can be
updated right after its own forward pass. So memory should not grow with depth but for the weights, and a step of linear
layers has two products of matrices in the place of three, at best 1.5 times less. The paper's own program keeps the
whole graph and needs more memory than backpropagation; its direct feedback alignment computes the forward pass twice.

Networks are perceptrons with tanh of equal blocks. Memory is that of all tensors alive at the peak of one step
(`callbacks.step_cost.LiveTensors`): weights, optimizer, gradients, activations and batch; stochastic gradient descent
has no state. "checkpointed" is backpropagation that recomputes every block. Energy is what ``callbacks.energy`` records
of the same training; on machines without meters that is an estimate from time and the power of the processor.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import REPEATS, compare, interleave, median, ratio, ratio_row, single_thread, time_rows
from benchmarks.record import Result, Row
from callbacks.step_cost import LiveTensors
from networks.feedback import (
    BlockChain,
    ErrorStore,
    FeedbackWeights,
    Objective,
    Perceptron,
    RandomBackward,
    blocks_of,
    error,
    is_delayed,
    signal,
)
from networks.feedback.learning import Gradients, Surrogate
from networks.feedback.objectives import ErrorInfo
from networks.feedback.pipeline import Batch, BlockPipeline, shares

CLAIM: str = (
    "At 100 blocks a step of F3 needed 0.11 of the memory of backpropagation, flat in depth but for the weights; at 10 "
    "blocks of 1024 backpropagation took 1.40 times as long, and direct feedback alignment 0.81 of backpropagation."
)

Method = Literal["bp", "checkpointed", "fa", "dfa", "drtp", "f3", "one_shot"]
_OUTPUTS = 10


@dataclass(frozen=True)
class Peak:
    """Memory of a step in MiB: of all tensors at the peak, and of the weights among them."""

    peak_mib: float
    weights_mib: float


class Step:
    """A training step of one method on random numbers, as `lightning_modules.feedback_training` does it.

    Args:
        method: Which; ``one_shot`` is F3 with a graph of the whole forward pass.
        depth: Blocks in all, the last one included.
        width: Features of inputs and hidden blocks.
        batch: Samples.
        optimizer: Of the weights.
    """

    def __init__(
        self,
        method: Method,
        depth: int,
        width: int,
        batch: int,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    ) -> None:
        torch.manual_seed(0)
        self.method, self.net = method, Perceptron((width,), _OUTPUTS, depth - 1, width)
        self.objective = Objective("sigmoid_bce")
        self.chain = BlockChain(blocks_of(self.net), self.objective)
        self.x = torch.randn(batch, width)
        self.target = nn.functional.one_hot(torch.randint(_OUTPUTS, (batch,)), _OUTPUTS).float()
        self.index = torch.arange(batch)
        self.optimizer = optimizer(self.net.parameters(), lr=1e-4)
        sizes = [width] * (depth - 1)
        self.feedback = FeedbackWeights().draw(_OUTPUTS, sizes) if method in ("dfa", "drtp", "f3", "one_shot") else []
        self.backward_weights = RandomBackward(self.net, 0) if method == "fa" else None
        self.errors = ErrorStore(batch, _OUTPUTS)

    def tensors(self) -> list[Tensor]:
        """What is there before a step."""
        fixed = [b for matrix in self.feedback for b in matrix.buffers()]
        fixed += list(self.backward_weights.buffers()) if self.backward_weights is not None else []
        return [*self.net.parameters(), *fixed, self.x, self.target, self.errors.rows]

    def weights_mib(self) -> float:
        """Of parameters and feedback weights."""
        fixed = [b for matrix in self.feedback for b in matrix.buffers()]
        return sum(t.numel() * t.element_size() for t in [*self.net.parameters(), *fixed]) / 2**20

    def _surrogate(self, told: Tensor) -> Surrogate:
        return lambda block, h: self.feedback[block](told).view(h.shape)

    def _set(self, block: int, gradients: Gradients) -> None:
        for parameter, gradient in zip(self.chain.parameters[block], gradients, strict=True):
            parameter.grad = gradient

    def _step(self, block: int, gradients: Gradients) -> None:
        self._set(block, gradients)
        self.optimizer.step()
        self._set(block, [None] * len(gradients))

    def __call__(self) -> None:
        """Do it."""
        x, y = self.x, self.target
        if self.method == "f3":
            surrogate = self._surrogate(signal("delayed_error", y, self.errors.read(self.index, y)))
            raw, _ = self.chain.in_forward(x, y, surrogate, self._step)
            self.errors.write(self.index, error("delayed_error", self.objective, raw, y))
            self.errors.news()
            return
        if self.method == "drtp":
            self.chain.in_forward(x, y, self._surrogate(y), self._step)
            return
        if self.method == "bp":
            self.chain.backpropagate(x, y, self._set)
        elif self.method == "fa":
            with self.backward_weights.of(self.net):
                self.chain.backpropagate(x, y, self._set)
        elif self.method == "checkpointed":
            for block in self.chain.blocks[:-1]:
                x = checkpoint(block.forward, x, use_reentrant=False)
            self.objective.loss(self.chain.blocks[-1].forward(x), y).backward()
        elif self.method == "dfa":
            now = lambda raw: self._surrogate(error("current_error", self.objective, raw, y))  # noqa: E731
            self.chain.one_shot(x, y, now, self._set)
        else:
            told = self._surrogate(signal("delayed_error", y, self.errors.read(self.index, y)))
            self.chain.one_shot(x, y, lambda _: told, self._set)
        self.optimizer.step()
        self.optimizer.zero_grad()


def peak_tensors(method: Method, depth: int, width: int, batch: int) -> Peak:
    """Memory of the second step."""
    step = Step(method, depth, width, batch)
    step()
    with LiveTensors() as live:
        live.watch(*step.tensors())
        step()
    return Peak(live.peak_bytes / 2**20, step.weights_mib())


def steps(depth: int, width: int, batch: int) -> dict[str, Step]:
    """A step of every method that is timed."""
    methods: tuple[Method, ...] = ("bp", "f3", "drtp", "dfa", "fa", "one_shot", "checkpointed")
    return {method: Step(method, depth, width, batch) for method in methods}


class PipelineTraining:
    """A training of a perceptron on random numbers whose blocks may lie on several processes.

    Args:
        depth: Blocks in all.
        width: Features of inputs and hidden blocks.
        batch: Samples.
        told: What hidden blocks are told.
        optimizer: Name of a class of `torch.optim`.
    """

    def __init__(self, depth: int, width: int, batch: int, told: ErrorInfo, optimizer: str = "SGD") -> None:
        torch.manual_seed(0)
        self.batch, self.told, self.depth, self.width = batch, told, depth, width
        net = Perceptron((width,), _OUTPUTS, depth - 1, width)
        self.chain = BlockChain(blocks_of(net), Objective("sigmoid_bce"))
        self.matrices = FeedbackWeights().draw(_OUTPUTS, [width] * (depth - 1))
        self.optimizers = [getattr(torch.optim, optimizer)(group, lr=1e-3) for group in self.chain.parameters]
        self.errors = ErrorStore(1, _OUTPUTS)

    def batches(self, epoch: int, number: int) -> list[Batch]:
        """Batches of an epoch, the same samples in another order."""
        generator = torch.Generator().manual_seed(1)
        count = number * self.batch
        x = torch.randn(count, self.width, generator=generator)
        target = nn.functional.one_hot(torch.randint(_OUTPUTS, (count,), generator=generator), _OUTPUTS).float()
        if len(self.errors) != count:
            self.errors = ErrorStore(count, _OUTPUTS)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        return [(x[rows], target[rows], rows) for rows in order.split(self.batch)]

    def feedback(self, told: Tensor) -> Surrogate:
        """What hidden blocks take for their gradients."""
        return lambda block, h: self.matrices[block](told).view(h.shape)

    def step(self, block: int, gradients: Gradients) -> None:
        """Update a block."""
        for parameter, gradient in zip(self.chain.parameters[block], gradients, strict=True):
            parameter.grad = gradient
        self.optimizers[block].step()
        self.optimizers[block].zero_grad()

    def pipeline(self, mine: range, number: int = 10) -> BlockPipeline:
        """The part of a process in a training on ``number`` batches."""
        self.batches(0, number)
        sizes = [self.width] * (self.depth - 1)
        return BlockPipeline(self.chain, mine, self.told, self.feedback, self.errors, self.step, sizes)

    def serial_epoch(self, batches: list[Batch]) -> None:
        """An epoch of one process."""
        for x, target, index in batches:
            remembered = self.errors.read(index, target) if is_delayed(self.told) else None
            surrogate = self.feedback(signal(self.told, target, remembered))
            raw, _ = self.chain.in_forward(x, target, surrogate, self.step)
            if is_delayed(self.told):
                self.errors.write(index, error(self.told, self.chain.objective, raw, target))
                self.errors.news()


def _pipeline_worker(rank: int, size: int, store: str, settings: tuple[int, int, int, int], results: Any) -> None:
    """Seconds of an epoch with one thread each, after one to warm up."""
    depth, width, batch, number = settings
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    training = PipelineTraining(depth, width, batch, "delayed_error")
    part = training.pipeline(shares([1.0] * depth, size)[rank], number)
    batches = training.batches(0, number)
    seconds = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        begin = time.perf_counter()
        part.epoch(batches)
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    if rank == 0:
        results.put(seconds[1:])
    dist.destroy_process_group()


def pipeline_seconds(size: int, depth: int, width: int, batch: int, number: int) -> list[float]:
    """Seconds of epochs of ``number`` batches on ``size`` processes."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        settings = (depth, width, batch, number)
        workers = [
            context.Process(target=_pipeline_worker, args=(r, size, store, settings, results)) for r in range(size)
        ]
        for worker in workers:
            worker.start()
        seconds = results.get(timeout=300)
        for worker in workers:
            worker.join()
    return seconds


def _pipeline_rows(settings: tuple[int, int, int, int]) -> list[Row]:
    found = {size: pipeline_seconds(size, *settings) for size in (1, 2)}
    depth, width, batch, number = settings
    what = f"epoch of {number} batches of {batch}, {depth} blocks of {width}"
    rows: list[Row] = [
        {
            "what": what,
            "variant": f"{size} process{'es' if size > 1 else ''}",
            "value": median(seconds).value,
            "unit": "s",
        }
        for size, seconds in found.items()
    ]
    speedup = ratio(found[1], found[2])
    rows.append({"what": f"{what}, ratio", "variant": "1 process / 2 processes", "value": speedup.value,
                 "low": speedup.low, "high": speedup.high, "unit": "", "at_least": 1.4})  # fmt: skip
    return rows


def _memory_rows(width: int, batch: int, depths: tuple[int, ...]) -> list[Row]:
    methods: tuple[Method, ...] = ("bp", "checkpointed", "fa", "dfa", "one_shot", "drtp", "f3")
    rows: list[Row] = []
    peaks: dict[tuple[str, int], Peak] = {}
    for depth in depths:
        for method in methods:
            peaks[method, depth] = found = peak_tensors(method, depth, width, batch)
            what = f"tensors at the peak of a step, {depth} blocks of {width}, batch {batch}"
            note = f"{found.weights_mib:.2f} of them weights"
            rows.append({"what": what, "variant": method, "value": found.peak_mib, "unit": "MiB", "note": note})
    low, high = depths[0], depths[-1]
    share = peaks["f3", high].peak_mib / peaks["bp", high].peak_mib
    what = f"tensors at the peak, {high} blocks, ratio"
    rows.append({"what": what, "variant": "f3 / bp", "value": share, "unit": "", "at_most": 0.2})
    growth = peaks["f3", high].peak_mib - peaks["f3", low].peak_mib
    growth /= peaks["f3", high].weights_mib - peaks["f3", low].weights_mib
    what = f"growth of the peak over growth of the weights, {low} to {high} blocks"
    rows.append({"what": what, "variant": "f3", "value": growth, "unit": "", "at_most": 1.1})
    return rows


def _time_rows(repeats: int, sizes: tuple[tuple[int, int, int], ...]) -> list[Row]:
    rows: list[Row] = []
    for depth, width, batch in sizes:
        timings = compare(steps(depth, width, batch), repeats, warmup=2)
        what = f"step of {depth} blocks of {width}, batch {batch}"
        bounded = (depth, width, batch) == sizes[0]
        rows += time_rows(what, timings)
        rows.append(ratio_row(what, timings, "bp", "f3", **({"at_least": 1.15} if bounded else {})))
        rows.append(ratio_row(what, timings, "dfa", "bp", **({"at_most": 1.1} if bounded else {})))
    return rows


def _joules(algorithm: str, epochs: int) -> float:
    """Of an epoch of training on the digits, as the energy callback records it."""
    import json

    from benchmarks.trained import configuration
    from runner import job

    overrides = ("experiment=f3", f"model.algorithm={algorithm}", f"trainer.max_epochs={epochs}", "test=false")
    overrides += ("model.net.depth=4", "model.net.width=1000", "data.val_fraction=0.1", "callbacks.energy.figures=[]")
    lean = ("logger=none", "num_threads=1", "callbacks.energy.codecarbon=false", "callbacks.feedback_probe.every=null")
    with tempfile.TemporaryDirectory() as folder:
        result = job.run(configuration(folder, *overrides, lean=lean))
        if result["status"] != "completed":
            raise RuntimeError(f"{algorithm}: {result.get('error', result['status'])}")
        record = json.loads((Path(folder) / "results.json").read_text())
    return record["energy"]["stages"]["fit/train"]["it_j"] / epochs


def _energy_rows(repeats: int, epochs: int) -> list[Row]:
    methods = {name: lambda name=name: _joules(name, epochs) for name in ("bp", "f3")}
    found: dict[str, Any] = interleave(methods, repeats, warmup=0)
    what = "energy of an epoch, digits, 5 blocks of 1000"
    rows: list[Row] = [
        {"what": what, "variant": name, "value": sum(values) / len(values), "unit": "J"}
        for name, values in found.items()
    ]
    estimate = ratio(found["f3"], found["bp"])
    note = "estimated from time and the power of the processor where there are no meters"
    rows.append({"what": f"{what}, ratio", "variant": "f3 / bp", "value": estimate.value, "low": estimate.low,
                 "high": estimate.high, "unit": "", "note": note})  # fmt: skip
    return rows


def run(
    repeats: int = 10,
    memory: tuple[int, int, tuple[int, ...]] = (128, 2048, (10, 100)),
    sizes: tuple[tuple[int, int, int], ...] = ((10, 1024, 256), (20, 512, 512), (10, 512, 512)),
    energy_epochs: int = 3,
    pipeline: tuple[int, int, int, int] | None = (8, 1024, 256, 20),
) -> Result:
    """Measure memory, time, a pipeline of two processes, and energy.

    Args:
        repeats: Of timed steps.
        memory: Width, batch, and depths in ascending order.
        sizes: Depth, width and batch of timed networks; the first has the bounds.
        energy_epochs: Epochs of each of five pairs of trainings; 0: none.
        pipeline: Blocks, width, batch and batches of an epoch on one and on two processes; None: none.
    """
    width, batch, depths = memory
    with single_thread():
        rows = _memory_rows(width, batch, depths) + _time_rows(repeats, sizes)
        rows += _pipeline_rows(pipeline) if pipeline else []
        rows += _energy_rows(REPEATS, energy_epochs) if energy_epochs else []
    return Result(rows, {"threads": 1, "repeats": repeats, "optimizer": "SGD"})
