"""Networks that find coincidences: PETNet's perceptron with its window encoding, and a network of lines of response."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from networks.spiking import LIF, Events, LIFTrace, Reset, SpikingMLP, Surrogate, lif_scan
from physics.pet.scanner import make_scanner

WINDOW_VALUE = 0.1
"""What a hit adds to the channels of the crystals that face it."""


class PETNet(nn.Module):
    """The paper's network: crystals -> hidden -> crystals, LIF neurons after every layer (section 2.3).

    Args:
        scanner: Preset whose crystals are the channels (`physics.pet.scanner.PRESETS`).
        hidden: Neurons of the hidden layers; None: one layer as wide as the input.
        geometry: ``none``; ``window``: as many channels more, in which all crystals that can face a hit get 0.1.
        spread: Half width of that window, crystals.
        beta: Initial decay of the potentials in a step.
        learn_beta: Whether every layer learns its decay.
        threshold: Of all neurons.
        reset: ``subtract`` (snnTorch's) or ``paper``.
        surrogate: One of `networks.spiking.SURROGATES`.
        backend: One of `networks.spiking.BACKENDS`.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    def __init__(
        self,
        scanner: str = "clinical240",
        hidden: Sequence[int] | None = None,
        geometry: str = "none",
        spread: int = 2,
        beta: float = 0.95,
        learn_beta: bool = True,
        threshold: float = 1.0,
        reset: Reset = "subtract",
        surrogate: Surrogate = "arctan",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if geometry not in ("none", "window"):
            raise ValueError(f"model.net.geometry={geometry!r} is unknown; choose none, window")
        layout = make_scanner(scanner)
        self.num_crystals, self.layout = layout.num_crystals, None if geometry == "none" else layout
        window = torch.from_numpy(layout.opposite_window(spread)) if geometry == "window" else None
        self.register_buffer("window", window, persistent=False)
        inputs = self.num_crystals * (1 if window is None else 2)
        hidden = [self.num_crystals] if hidden is None else list(hidden)
        self.spiking = SpikingMLP(
            inputs, hidden, self.num_crystals, beta, learn_beta, threshold, reset, surrogate, backend
        )

    def encode(self, events: Events) -> Events:
        """Events with those of the window encoding, if there is one."""
        return events if self.window is None else window_encoding(events, self.window)

    def layers(self, events: Events) -> list[LIFTrace]:
        """Spikes and potentials of every layer."""
        return self.spiking.layers(self.encode(events))

    def forward(self, events: Events) -> Tensor:
        """Output spikes, (T, B, crystal)."""
        return self.layers(events)[-1].spikes

    def operations(self, events: Events, traces: list[LIFTrace]) -> Tensor:
        """Synaptic operations: every spike, inputs included, times the connections that leave it. Scalar."""
        fan_out = [linear.out_features for linear in self.spiking.linear]
        counts = [torch.as_tensor(float(len(self.encode(events).step)))]
        counts += [trace.spikes.detach().sum().cpu() for trace in traces[:-1]]
        return sum(count * fan for count, fan in zip(counts, fan_out, strict=True))


def window_encoding(events: Events, window: Tensor) -> Events:
    """Add, as C more channels, 0.1 for all crystals that may face a hit, at its step; several add up (section 2.2).

    Args:
        events: Of C channels.
        window: Crystals that face each crystal, (C, K), -1 for none (`Scanner.opposite_window`).
    """
    count, width = len(window), window.shape[1]
    facing = window[events.channel].reshape(-1)
    there = facing >= 0
    step, item = (values.repeat_interleave(width)[there] for values in (events.step, events.item))
    value = (events.value * WINDOW_VALUE).repeat_interleave(width)[there]
    return events._replace(
        step=torch.cat([events.step, step]),
        item=torch.cat([events.item, item]),
        channel=torch.cat([events.channel, count + facing[there]]),
        value=torch.cat([events.value, value]),
    )


def coincidence_beta(window: int, weight: float = 0.6) -> float:
    """Decay with which two inputs of ``weight`` make a neuron of threshold 1 fire up to ``window`` steps apart.

    ``weight (1 + beta^window) > 1 >= weight (1 + beta^(window + 1))``, in the middle of what that allows.
    """
    need = 1 / weight - 1
    if window < 0:
        raise ValueError(f"window={window}: must be at least 0 steps")
    if not 0 < need < 1:
        raise ValueError(f"weight={weight}: use a value between 0.5 and 1, so that two inputs fire and one does not")
    low = 0.0 if window == 0 else need ** (1 / window)
    return (low + need ** (1 / (window + 1))) / 2


class RingPETNet(nn.Module):
    """A spiking network that is the same all around the ring: one neuron for every crystal, one kernel for all of them.

    Neuron ``(ring, position)`` gets ``kernel[r' - ring, (p' - position) mod N]`` from a hit at ``(r', p')``. What a
    full layer must learn for every crystal anew is learned once; the kernel that comes out is the acceptance of the
    scanner. All crystals are alike only on times without delays.

    Args:
        scanner: Preset whose crystals are the channels.
        own: Initial weight of a neuron's own crystal.
        noise: Deviation of the other initial weights.
        beta: Initial decay of the potentials in a step.
        learn_beta: Whether the decay is learned.
        threshold: Of all neurons.
        reset: ``subtract`` or ``paper``.
        surrogate: One of `networks.spiking.SURROGATES`.
        backend: One of `networks.spiking.BACKENDS`.
    """

    def __init__(
        self,
        scanner: str = "clinical240",
        own: float = 0.5,
        noise: float = 0.02,
        beta: float = 0.3,
        learn_beta: bool = True,
        threshold: float = 1.0,
        reset: Reset = "subtract",
        surrogate: Surrogate = "arctan",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.layout = layout = make_scanner(scanner)
        self.num_crystals, self.per_ring, self.rings = layout.num_crystals, layout.crystals_per_ring, layout.num_rings
        kernel = noise * torch.randn(2 * self.rings - 1, self.per_ring)
        kernel[self.rings - 1, 0] = own
        self.kernel = nn.Parameter(kernel)
        self.bias = nn.Parameter(torch.zeros(()))
        self.neurons = LIF(beta, learn_beta, threshold, reset, surrogate, backend)
        neuron = torch.arange(self.num_crystals)
        self.register_buffer("ring", neuron // self.per_ring, persistent=False)
        self.register_buffer("position", neuron % self.per_ring, persistent=False)

    def currents(self, events: Events) -> Tensor:
        """Currents of the neurons, (T, B, crystal)."""
        row = self.ring[events.channel, None] - self.ring + self.rings - 1
        column = (self.position[events.channel, None] - self.position) % self.per_ring
        values = self.kernel.flatten()[row * self.per_ring + column] * events.value[:, None].to(self.kernel)
        at = events.step * events.num_items + events.item
        size = events.num_steps * events.num_items
        base = self.bias.expand(size, self.num_crystals).contiguous()
        return base.index_add(0, at, values).view(events.num_steps, events.num_items, self.num_crystals)

    def layers(self, events: Events) -> list[LIFTrace]:
        """Spikes and potentials of the one layer."""
        return [self.neurons(self.currents(events))]

    def forward(self, events: Events) -> Tensor:
        """Output spikes, (T, B, crystal)."""
        return self.layers(events)[-1].spikes

    def operations(self, events: Events, traces: list[LIFTrace]) -> Tensor:
        """Synaptic operations: every hit to all neurons. Scalar."""
        return torch.tensor(float(len(events.step) * self.num_crystals))


class LORNetwork(nn.Module):
    """A neuron for every line of response: it fires when both of its crystals are hit within a window (section 2.9).

    Hidden neurons get ``weight`` from each of their two crystals and have no bias; an output neuron fires where any
    line of its crystal does. Nothing needs to be trained; delays are taken off before.

    Args:
        scanner: Preset whose crystals are the channels.
        spread: Lines are pairs of crystals so far from facing each other, at most.
        window: Steps that two hits may be apart.
        weight: From a crystal to its lines; between 1/2 and 1, where the threshold is 1.
        learn: Whether weights and the decay are learned.
        surrogate: One of `networks.spiking.SURROGATES`.
        backend: One of `networks.spiking.BACKENDS`.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    OUTPUT_WEIGHT = 1.1

    def __init__(
        self,
        scanner: str = "clinical240",
        spread: int = 2,
        window: int = 0,
        weight: float = 0.6,
        learn: bool = False,
        surrogate: Surrogate = "arctan",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.layout = layout = make_scanner(scanner)
        lines = torch.from_numpy(layout.lines_of_response(spread))
        self.num_crystals, self.window, self.backend, self.surrogate = layout.num_crystals, window, backend, surrogate
        beta = coincidence_beta(window, weight)
        self.register_buffer("lines", lines, persistent=False)
        self.register_buffer("lines_of_crystal", lines_of_crystals(lines, layout.num_crystals), persistent=False)
        self.weight = nn.Parameter(torch.full((len(lines), 2), float(weight)), requires_grad=learn)
        self.beta = nn.Parameter(torch.tensor(float(beta)), requires_grad=learn)

    def currents(self, events: Events) -> Tensor:
        """Currents of the lines, (T, B, line); an input counts once however often a crystal is hit in a step."""
        seen = unique_events(events)
        lines = self.lines_of_crystal[seen.channel]
        row, column = (lines >= 0).nonzero(as_tuple=True)
        line = lines[row, column]
        side = (self.lines[line, 1] == seen.channel[row]).long()
        value = self.weight[line, side] * seen.value[row].to(self.weight)
        at = (seen.step[row] * events.num_items + seen.item[row]) * len(self.lines) + line
        flat = value.new_zeros(events.num_steps * events.num_items * len(self.lines))
        return flat.index_add(0, at, value).view(events.num_steps, events.num_items, len(self.lines))

    def layers(self, events: Events) -> list[LIFTrace]:
        """Spikes and potentials of lines and of crystals."""
        hidden = lif_scan(self.currents(events), self.beta, surrogate=self.surrogate, backend=self.backend)
        sums = hidden.spikes.new_zeros(events.num_steps, events.num_items, self.num_crystals)
        for side in (0, 1):
            sums = sums.index_add(2, self.lines[:, side], self.OUTPUT_WEIGHT * hidden.spikes)
        return [hidden, lif_scan(sums, 0.0, surrogate=self.surrogate, backend=self.backend)]

    def forward(self, events: Events) -> Tensor:
        """Output spikes, (T, B, crystal)."""
        return self.layers(events)[-1].spikes

    def operations(self, events: Events, traces: list[LIFTrace]) -> Tensor:
        """Synaptic operations: every hit to its lines, every spike of a line to its two crystals. Scalar."""
        lines = (self.lines_of_crystal >= 0).sum(1)[unique_events(events).channel].sum().cpu().float()
        return lines + 2 * traces[0].spikes.detach().sum().cpu()


def lines_of_crystals(lines: Tensor, num_crystals: int) -> Tensor:
    """Lines that end at each crystal: (crystal, most lines), filled up with -1."""
    ends = lines.reshape(-1)
    numbers = torch.arange(len(lines)).repeat_interleave(2)
    order = ends.argsort(stable=True)
    counts = torch.bincount(ends, minlength=num_crystals)
    place = torch.arange(len(ends)) - (counts.cumsum(0) - counts)[ends[order]]
    table = torch.full((num_crystals, int(counts.max())), -1)
    table[ends[order], place] = numbers[order]
    return table


def unique_events(events: Events) -> Events:
    """Each (step, item, channel) once, with the value 1: binary inputs."""
    channels = int(events.channel.max()) + 1 if len(events.channel) else 1
    key = (events.step * events.num_items + events.item) * channels + events.channel
    key = key.unique()
    at = key // channels
    value = torch.ones(len(key), dtype=events.value.dtype, device=key.device)
    return events._replace(step=at // events.num_items, item=at % events.num_items, channel=key % channels, value=value)


class PairNetwork(nn.Module):
    """Perceptrons that say how likely a pair of hits is a coincidence, in stages.

    The first stage sees the features of a pair. Every further one also sees what the stage before made of the pair and
    of its strongest rivals, the other pairs with one of its hits: whether a hit has a better partner is half of the
    answer.

    Args:
        num_features: Features of a pair (`physics.pet.pair_features.FEATURES`).
        hidden: Neurons of the hidden layers of a stage.
        stages: Number of stages.
    """

    def __init__(self, num_features: int = 19, hidden: Sequence[int] = (64, 64), stages: int = 2) -> None:
        super().__init__()
        if stages < 1 or num_features < 1:
            raise ValueError(f"model.net: {stages} stages of {num_features} features; at least one of each is needed")
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        self.stages = nn.ModuleList(self._stage(num_features + (3 if i else 0), hidden) for i in range(stages))

    @staticmethod
    def _stage(inputs: int, hidden: Sequence[int]) -> nn.Sequential:
        widths = [inputs, *hidden]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.SiLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def fit_scale(self, features: Tensor) -> None:
        """Take mean and deviation of the features from data, (pair, feature)."""
        if len(features) > 1:
            self.mean.copy_(features.mean(0))
            self.std.copy_(features.std(0).clamp_min(1e-3))

    def forward(self, features: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
        """Logits of all stages, (pair,) each.

        Args:
            features: (pair, feature).
            first: First hit of every pair, (pair,) int64.
            second: Second hit.
        """
        scaled = (features - self.mean) / self.std
        logits = [self.stages[0](scaled)[:, 0]]
        for stage in self.stages[1:]:
            own = logits[-1].detach()
            rivals = strongest_rivals(first, second, own) if len(own) else (own, own)
            logits.append(own + stage(torch.cat([scaled, torch.stack([own, *rivals], -1) / 4], -1))[:, 0])
        return logits


NO_RIVAL = -12.0
"""Logit of a rival that there is not."""


def strongest_rivals(first: Tensor, second: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit of the other pairs with the first hit of each pair, and with the second: (pair,) each."""
    ends = torch.cat([first, second])
    values = logits.repeat(2)
    size = int(ends.max()) + 1
    top = values.new_full((size,), NO_RIVAL).scatter_reduce(0, ends, values, "amax")
    is_top = values >= top[ends]
    ties = torch.zeros_like(top).index_add_(0, ends, is_top.to(values))
    below = torch.where(is_top, NO_RIVAL, values)
    second_best = values.new_full((size,), NO_RIVAL).scatter_reduce(0, ends, below, "amax")
    rival = torch.where(is_top & (ties[ends] < 2), second_best[ends], top[ends])
    return rival[: len(first)], rival[len(first) :]
