"""Primary cycle compression (PCC): the same Transformer on day tokens instead of hourly tokens.

Claim of the paper (ReCycle, IEEE CAI 2024, abstract): run time and energy lower by more than an order of magnitude.
A window of 504 hours and a horizon of 168 hours are 21 + 7 tokens of 24 values, or 504 + 168 tokens of one value.
Nothing else differs: width, heads, layers, feed-forward, batch, loss and optimizer are equal, dropout is off.

Two networks are compared with themselves: ReCycle's (torch's Transformer, ``networks.recycle``; a cycle of one step
makes every hour a token) and the backbone of ``networks.series.transformer``, once under ``Direct`` and once under
``CycleCompressed``.

The optimizer is Adam in its fused form. The usual one is a loop over some forty parameters, which costs the day-token
network up to half of its forward and backward pass and the hourly one next to nothing; its step is recorded as well,
under the same bound. The bounds hold for ReCycle's network; the backbone, whose day-token step is dominated by fixed
costs at small width, is recorded beside it.

Floating-point operations are counted with gradients enabled, since torch's inference kernel for encoder layers is
opaque to the counter, and with the unfused attention, since the counter does not know the fused CPU kernel and would
leave the attention itself out, which is most of the hourly network. ("without attention" is that lower count.)

Energy is read by the meters of ``callbacks.energy`` while training steps go on, with what the machine offers; where
that is a model of the processor the note says so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import REPEATS, compare, memory_rows, peak_memory, ratio_row, single_thread, time_rows
from benchmarks.record import Result, Row
from callbacks.energy.recorder import Recorder
from callbacks.energy.selection import describe, select
from networks.recycle import CycleCompressed, ReCycleTransformer
from networks.series.direct import Direct
from networks.series.transformer import Transformer

CLAIM: str = (
    "Day tokens instead of hourly tokens make a training step of ReCycle's Transformer at least 15 times faster and "
    "its forward pass at least 20 times cheaper in floating-point operations."
)

HISTORY, HORIZON, DAY, BATCH = 504, 168, 24, 32
HOURLY, DAILY = "hourly tokens", "day tokens"
STEPS_PER_TOKEN = {HOURLY: 1, DAILY: DAY}
MIN_TIME_RATIO, MIN_FLOP_RATIO, MIN_ENERGY_RATIO = 15, 20, 10
ENERGY_S = 5.0  # training steps of each variant while the meters run

Network = Literal["ReCycle", "backbone"]


class Width(NamedTuple):
    """Width of the residual stream, heads, hidden width of the feed-forward blocks."""

    d_model: int
    heads: int
    feed_forward: int

    def __str__(self) -> str:
        return f"d={self.d_model}, {self.heads} head{'s' if self.heads > 1 else ''}"


WIDTHS = (Width(32, 1, 96), Width(128, 4, 256))
# Ratios that the authors of this program measured before it existed, on two shared cores: training step, inference.
EARLIER = {WIDTHS[0]: ("27", "45"), WIDTHS[1]: ("35", "61")}


def network(kind: Network, width: Width, steps_per_token: int) -> nn.Module:
    """A forecaster of ``HORIZON`` hours whose tokens hold ``steps_per_token`` hours each; one layer per stack."""
    d_model, heads, feed_forward = width
    if kind == "ReCycle":
        return ReCycleTransformer(
            HISTORY, HORIZON, steps_per_token, d_model=d_model // heads, heads=heads, feed_forward=feed_forward
        )
    backbone = Transformer(
        HISTORY // steps_per_token,
        HORIZON // steps_per_token,
        channels=steps_per_token,
        marks=4 if steps_per_token == 1 else 9,
        label_length=0,
        d_model=d_model,
        heads=heads,
        feed_forward=feed_forward,
        encoder_layers=1,
        decoder_layers=1,
        dropout=0.0,
    )
    return Direct(backbone) if steps_per_token == 1 else CycleCompressed(backbone, HISTORY, HORIZON, DAY)


def windows(batch: int, steps_per_token: int) -> dict[str, Tensor]:
    """Random windows of one series with every key that the networks read."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "history": normal(batch, HISTORY, 1),
        "target": normal(batch, HORIZON, 1),
        "history_profile": normal(batch, HISTORY, 1),
        "forecast_profile": normal(batch, HORIZON, 1),
        "history_calendar": normal(batch, HISTORY // steps_per_token, 1, 9),
        "forecast_calendar": normal(batch, HORIZON // steps_per_token, 1, 9),
        "history_marks": normal(batch, HISTORY, 4),
        "forecast_marks": normal(batch, HORIZON, 4),
        "origin": torch.arange(batch) * DAY,
    }


class Workload:
    """One network with its optimizer and a batch."""

    def __init__(
        self, kind: Network, width: Width, steps_per_token: int, batch: int = BATCH, fused: bool = True
    ) -> None:
        torch.manual_seed(0)
        self.network = network(kind, width, steps_per_token)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3, fused=fused)
        self.batch = windows(batch, steps_per_token)

    def train(self) -> None:
        """A training step."""
        self.network.train()
        loss = nn.functional.l1_loss(self.network(self.batch), self.batch["target"])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def infer(self) -> None:
        """A forecast of the batch."""
        self.network.eval()
        with torch.inference_mode():
            self.network(self.batch)

    def forward_flops(self, attention: bool = True) -> int:
        """Floating-point operations of a forward pass, with or without the products inside the attention."""
        counter = FlopCounterMode(display=False)
        # The fused kernel is opaque to the counter; the backbones' attention and torch's own both go through it.
        kernel = sdpa_kernel(SDPBackend.MATH) if attention else nullcontext()
        with kernel, counter:
            self.network.train()(self.batch)
        return counter.get_total_flops()


def train_once(kind: Network, width: Width, steps_per_token: int, batch: int) -> None:
    """Build a network and train it for two steps: what `peak_memory` runs in a fresh process."""
    torch.set_num_threads(1)
    workload = Workload(kind, width, steps_per_token, batch)
    for _ in range(2):  # the second step has the optimizer's state
        workload.train()


def run(
    repeats: int = REPEATS,
    batch: int = BATCH,
    widths: Sequence[Width] = WIDTHS,
    kinds: Sequence[Network] = get_args(Network),
    memory: bool = True,
) -> Result:
    """Compare hourly and day tokens for every network and width; time, operations, energy, memory."""
    rows: list[Row] = []
    with single_thread():
        for kind in kinds:
            for width in widths:
                rows += _compared(kind, width, repeats, batch, memory)
    settings = {
        "history": HISTORY,
        "horizon": HORIZON,
        "batch": batch,
        "encoder and decoder layers": "1 + 1",
        "feed-forward": ", ".join(f"{w.feed_forward} (d={w.d_model})" for w in widths),
        "optimizer": "Adam, fused",
        "threads": 1,
        "repeats": repeats,
    }
    return Result(rows, settings)


def _compared(kind: Network, width: Width, repeats: int, batch: int, memory: bool) -> list[Row]:
    def workloads(fused: bool = True) -> dict[str, Workload]:
        return {name: Workload(kind, width, steps, batch, fused) for name, steps in STEPS_PER_TOKEN.items()}

    rows: list[Row] = []
    fused, unfused = workloads(), workloads(fused=False)
    training_earlier, inference_earlier = EARLIER.get(width, (None, None))
    for what, functions, extra in (
        ("training step", {n: w.train for n, w in fused.items()}, _bound(kind, MIN_TIME_RATIO)),
        (
            "training step, Adam not fused",
            {n: w.train for n, w in unfused.items()},
            _bound(kind, MIN_TIME_RATIO) | _note(kind, training_earlier),
        ),
        ("inference", {n: w.infer for n, w in fused.items()}, _note(kind, inference_earlier)),
    ):
        what = f"{kind}, {width}: {what}"
        timings = compare(functions, repeats, calls={HOURLY: 1, DAILY: 10})  # a round of either lasts about as long
        rows += [*time_rows(what, timings), ratio_row(what, timings, HOURLY, DAILY, **extra)]

    for what, attention, extra in (
        ("forward", True, _bound(kind, MIN_FLOP_RATIO)),
        ("forward without attention", False, {}),
    ):
        flops = {name: workload.forward_flops(attention) for name, workload in fused.items()}
        what = f"{kind}, {width}: {what}"
        rows += [
            {"what": what, "variant": name, "value": count / 1e6, "unit": "MFLOP"} for name, count in flops.items()
        ]
        row = {"what": f"{what}, ratio", "variant": f"{HOURLY} / {DAILY}", "value": flops[HOURLY] / flops[DAILY]}
        rows.append(row | {"unit": "", **extra})

    rows += _energy(kind, width, fused)

    if memory:
        memories = {name: peak_memory(train_once, kind, width, steps, batch) for name, steps in STEPS_PER_TOKEN.items()}
        rows += memory_rows(f"{kind}, {width}: memory of training", memories)
    return rows


def _energy(kind: Network, width: Width, workloads: Mapping[str, Workload]) -> list[Row]:
    """Energy of a training step, from steps that go on for ``ENERGY_S`` seconds each."""
    selection = select("auto", {}, {})
    recorder = Recorder(selection.meters, period_s=0.1)
    recorder.start("pause")
    joules = {}
    for name, workload in workloads.items():
        workload.train()
        recorder.switch(name)
        steps, end = 0, time.perf_counter() + ENERGY_S
        while time.perf_counter() < end or not steps:
            workload.train()
            steps += 1
        recorder.switch("pause")
        joules[name] = recorder.tallies()[name].total_j / steps
    recorder.stop()
    measured = all(channel.measured for channel in recorder.channels)
    note = {"note": "measured" if measured else describe(recorder.channels, {})}
    what = f"{kind}, {width}: energy of a training step"
    ratio: Row = {"what": f"{what}, ratio", "variant": f"{HOURLY} / {DAILY}", "unit": ""}
    ratio |= {"value": joules[HOURLY] / joules[DAILY], **note, **_bound(kind, MIN_ENERGY_RATIO)}
    return [*({"what": what, "variant": n, "value": j, "unit": "J"} for n, j in joules.items()), ratio]


def _note(kind: Network, earlier: str | None) -> Row:
    return {"note": f"{earlier} in the design study"} if kind == "ReCycle" and earlier else {}


def _bound(kind: Network, least: float) -> Row:
    """The claim is about ReCycle's own network; the backbone's ratios stand beside it."""
    return {"at_least": least} if kind == "ReCycle" else {}
