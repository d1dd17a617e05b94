"""Spiking networks against snnTorch and SpikingJelly, and all algorithms for coincidences on one stream of hits.

Layer: leaky integrate-and-fire neurons over T = 1000 steps, forward and backward, 240 neurons; few spikes with 16
items, many with 64. Network: the paper's 240-240-240 with 16 samples of about six hits, training step and inference of
dense inputs; ours also from the list of hits. snnTorch is its ``Leaky`` in a loop over steps, as the reference code has
it; SpikingJelly its ``LIFNode`` in multi-step mode with ``v_reset=None`` (it fires at the threshold too).

Stream: the same hits of the clinical-like toy for everybody, delays taken off, on one thread. The paper claims that its
network is up to 36 times as fast as the single window; the last table says what equal care for both gives.

Peers go into an environment of their own: ``pip install snntorch==1.0.0 numba`` and ``pip install --no-deps
spikingjelly==2.0.0``. Rows of peers that are not there are left out.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import REPEATS, compare, ratio_row, single_thread, time_rows
from benchmarks.record import Result, Row
from networks.event_driven import EventDrivenLines
from networks.petnet import LORNetwork, PETNet, RingPETNet, unique_events
from networks.spiking import Events, SpikingMLP, lif_scan
from physics.pet.coincidences import Good, gate_policy, single_window
from physics.pet.hits import Hits
from physics.pet.scanner import make_scanner
from physics.pet.toy import Toy, draw_delays, simulate_toy

CLAIM: str = (
    "A training step of the paper's network takes at most 1 / 3.5 of the time of snnTorch's loop over steps, inference "
    "1 / 4.5; a vectorised single window is the fastest of all algorithms on the same hits."
)
PEERS = {"snntorch": "snntorch", "spikingjelly": "spikingjelly"}
NEURONS, STEPS = 240, 1000
LAYERS = {"few spikes, 16 items": (16, 0.06), "many spikes, 64 items": (64, 0.5)}


def installed() -> list[str]:
    """Peers and numba, as far as they are at hand."""
    return [name for module, name in {**PEERS, "numba": "numba"}.items() if importlib.util.find_spec(module)]


def backends() -> list[str]:
    """Backends of the scan that run here."""
    return ["torch", *(["numba"] if "numba" in installed() else [])]


def snntorch_scan(x: Tensor, leaky: nn.Module) -> Tensor:
    """SnnTorch's neurons in a loop over steps."""
    memory, spikes = leaky.init_leaky(), []
    for current in x.unbind(0):
        spike, memory = leaky(current, memory)
        spikes.append(spike)
    return torch.stack(spikes)


def layer_variants(items: int, scale: float) -> dict[str, Callable[[], None]]:
    """Forward and backward of a layer of neurons."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, items, NEURONS, generator=generator) * scale
    x.requires_grad_()

    def both(call: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            x.grad = None
            call().sum().backward()

        return step

    variants = {}
    if "snntorch" in installed():
        import snntorch

        leaky = snntorch.Leaky(beta=0.95, learn_beta=True)
        variants["snnTorch"] = both(lambda: snntorch_scan(x, leaky))
    if "spikingjelly" in installed():
        from spikingjelly.activation_based import functional, neuron

        node = neuron.LIFNode(tau=20.0, decay_input=False, v_reset=None, step_mode="m")

        def jelly() -> Tensor:
            functional.reset_net(node)
            return node(x)

        variants["SpikingJelly"] = both(jelly)
    beta = torch.tensor(0.95, requires_grad=True)
    for backend in backends():
        variants[f"ours, {backend}"] = both(lambda b=backend: lif_scan(x, beta, backend=b).spikes)
    return variants


class StepLoop(nn.Module):
    """The reference's network: linear layers and snnTorch's neurons, one step after the other."""

    def __init__(self) -> None:
        import snntorch

        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(NEURONS, NEURONS) for _ in range(2))
        self.neurons = nn.ModuleList(snntorch.Leaky(beta=0.95, learn_beta=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Output spikes, (T, B, neuron)."""
        memories = [neurons.init_leaky() for neurons in self.neurons]
        spikes = []
        for spike in x.unbind(0):
            for i, (linear, neurons) in enumerate(zip(self.linear, self.neurons, strict=True)):
                spike, memories[i] = neurons(linear(spike), memories[i])
            spikes.append(spike)
        return torch.stack(spikes)


def sample_events(steps: int, items: int = 16, hits: int = 6) -> Events:
    """Inputs with so many hits in every sample."""
    generator = torch.Generator().manual_seed(0)
    item = torch.arange(items).repeat_interleave(hits)
    step, channel = (torch.randint(n, (len(item),), generator=generator) for n in (steps, NEURONS))
    return Events(step, item, channel, torch.ones(len(item)), steps, items)


def network_variants(steps: int = STEPS) -> dict[str, tuple[nn.Module, Any]]:
    """Networks with equal weights, and their inputs."""
    torch.manual_seed(0)
    events = sample_events(steps)
    dense = events.dense(NEURONS)
    ours = {backend: SpikingMLP(NEURONS, [NEURONS], NEURONS, backend=backend) for backend in backends()}
    variants: dict[str, tuple[nn.Module, Any]] = {}
    first = next(iter(ours.values()))
    if "snntorch" in installed():
        loop = StepLoop()
        loop.linear.load_state_dict(first.linear.state_dict())
        variants["snnTorch"] = loop, dense
    for backend, net in ours.items():
        net.load_state_dict(first.state_dict())
        variants[f"ours, {backend}"] = net, dense
    variants[f"ours, {backends()[-1]}, list of hits"] = ours[backends()[-1]], events
    return variants


def training(net: nn.Module, x: Any) -> Callable[[], None]:
    """Forward and backward of a network."""

    def step() -> None:
        net.zero_grad()
        net(x).sum().backward()

    return step


def inference(net: nn.Module, x: Any) -> Callable[[], None]:
    """Forward without a gradient."""

    def step() -> None:
        with torch.no_grad():
            net(x)

    return step


def network_ratios(repeats: int = REPEATS) -> dict[str, float]:
    """CPU time of snnTorch's loop over ours, and of ours for twice as many steps over once."""
    with single_thread():
        nets = network_variants()
        best = f"ours, {backends()[-1]}"
        out = {}
        for name, kind in (("training", training), ("inference", inference)):
            timings = compare({key: kind(*nets[key]) for key in ("snnTorch", best)}, repeats)
            out[name] = float(np.median(timings["snnTorch"].cpu) / np.median(timings[best].cpu))
        longer = network_variants(2 * STEPS)[best]
        timings = compare({"once": training(*nets[best]), "twice": training(*longer)}, repeats)
        out["doubling"] = float(np.median(timings["twice"].cpu) / np.median(timings["once"].cpu))
    return out


# -------------------------------------------------------------------------------------------- all on one stream of hits


def window_by_loop(step: list[int], sample: list[int], window: int) -> list[tuple[int, int]]:
    """The single window, hit after hit."""
    found, begin = [], 0
    for i in range(1, len(step) + 1):
        if i == len(step) or sample[i] != sample[i - 1] or step[i] - step[i - 1] > window:
            if i - begin == 2:
                found.append((begin, begin + 1))
            begin = i
    return found


def stream(samples: int) -> Hits:
    """Hits of the clinical-like toy without delays."""
    scanner = make_scanner("clinical240")
    delays = draw_delays(scanner.num_crystals, 20, 0.5, 0)
    return simulate_toy(scanner, Toy(), samples, delays, 1).shifted(delays)


def stream_speeds(samples: int = 2000, repeats: int = 3) -> list[dict[str, Any]]:
    """Hits per CPU second of every algorithm on the same hits; networks get samples in batches of 40.

    Returns:
        Rows with ``method``, ``hits`` and ``hits_per_s``.
    """
    hits = stream(samples)
    scanner = make_scanner("clinical240")
    step, sample = hits.step.tolist(), hits.sample.tolist()
    lines = EventDrivenLines(LORNetwork())
    full, ring = PETNet(beta=0.5), RingPETNet()
    batches = []
    for first in range(0, samples, 40):
        part = hits.samples(first, min(first + 40, samples))
        rows = (torch.from_numpy(v) for v in (part.step, part.sample, part.crystal))
        batches.append(unique_events(Events(*rows, torch.ones(len(part)), 1001, part.num_samples)))

    def dense(net: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for events in batches:
                    net(events)

        return run

    methods: dict[str, Callable[[], Any]] = {
        "single window, Python": lambda: window_by_loop(step, sample, 0),
        "single window, vectorised": lambda: single_window(hits, 0),
        "GATE policy": lambda: gate_policy(hits, scanner, 0, "take_winner_of_goods", Good.by_angle(scanner, 165)),
        "dense SNN": dense(full),
        "dense SNN, one kernel": dense(ring),
        "event-driven SNN": lambda: lines(hits.sample, hits.step, hits.crystal),
    }
    out = []
    with single_thread():
        for name, method in methods.items():
            method()  # what is compiled at the first call
            seconds = []
            for _ in range(repeats):
                begin, calls = time.process_time(), 0
                while calls == 0 or (time.process_time() - begin < 0.02 and calls < 1000):
                    method()
                    calls += 1
                seconds.append((time.process_time() - begin) / calls)
            out.append({"method": name, "hits": len(hits), "hits_per_s": len(hits) / float(np.median(seconds))})
    return out


def run(repeats: int = REPEATS, samples: int = 2000) -> Result:
    """Time layers, networks, and all algorithms."""
    rows: list[Row] = []
    with single_thread():
        for what, (items, scale) in LAYERS.items():
            timings = compare(layer_variants(items, scale), repeats)
            rows += time_rows(f"LIF layer, {what}", timings)
            for peer in ("snnTorch", "SpikingJelly"):
                if peer in timings:
                    rows.append(ratio_row(f"LIF layer, {what}", timings, peer, f"ours, {backends()[-1]}"))
        nets = network_variants()
        for name, kind, paper, bound in (("training step", training, "4.8", 3.5), ("inference", inference, "6.2", 4.5)):
            timings = compare({key: kind(*net) for key, net in nets.items()}, repeats)
            rows += time_rows(f"240-240-240, {name}", timings)
            for own in (key for key in timings if key != "snnTorch" and "snnTorch" in timings):
                limit = {"at_least": bound, "note": f"{paper} in the design study"} if own == "ours, numba" else {}
                rows.append(ratio_row(f"240-240-240, {name}", timings, "snnTorch", own, **limit))
        longer = network_variants(2 * STEPS)[f"ours, {backends()[-1]}"]
        timings = compare(
            {"T = 2000": training(*longer), "T = 1000": training(*nets[f"ours, {backends()[-1]}"])}, repeats
        )
        rows.append(ratio_row("240-240-240, training step", timings, "T = 2000", "T = 1000", at_most=2.4))
    for row in stream_speeds(samples):
        rows.append(
            {
                "what": "one stream of hits",
                "variant": row["method"],
                "value": row["hits_per_s"] / 1e6,
                "unit": "Mhits/s",
            }
        )
    missing = [name for name in PEERS.values() if name not in installed()]
    settings = {"T": STEPS, "neurons": NEURONS, "threads": 1, "repeats": repeats, "samples of the stream": samples}
    settings["not installed"] = ", ".join(missing) or "-"
    return Result(rows, settings, packages=tuple(installed()))
