"""AB-training in one process, written out step by step: one set of weights per group, every average a plain mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.loading import RankSampler
from networks.ab_factors import Factors, combine, decompose, num_kept, split
from networks.tall_view import from_tall, is_transposed
from tests.strategies import nets

FACTORED = ("net.2.weight", "net.4.weight")
RANKS, LR, MOMENTUM = 4, 0.05, 0.9


def network(norm: bool = False, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Four linear layers, 6-24-32-24-2; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = nn.BatchNorm1d(24) if norm else nn.Tanh()
        layers = [nn.Linear(6, 24), first, nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 2)]
        return nn.Sequential(*layers).to(dtype)


class Group:
    """One group of ranks: its parameters by name, their momenta, the factor it trains."""

    def __init__(self, side: str) -> None:
        self.side = side
        self.params = {n: p.detach().clone() for n, p in nets.Regression(network()).named_parameters()}
        self.momenta: dict[str, Tensor] = {}

    def step(self, x: Tensor, y: Tensor, shapes: dict[str, torch.Size]) -> None:
        """Momentum SGD on everything but the factor that is not trained."""
        leaves = {n: p.clone().requires_grad_() for n, p in self.params.items()}
        hidden = x
        for i in (0, 2, 4, 6):
            name = f"net.{i}.weight"
            if name in leaves:
                weight = leaves[name]
            else:
                weight = from_tall(leaves[f"{name}_a"] @ leaves[f"{name}_b"], shapes[name], is_transposed(shapes[name]))
            hidden = F.linear(hidden, weight, leaves[f"net.{i}.bias"])
            hidden = hidden if i == 6 else torch.tanh(hidden)
        F.mse_loss(hidden, y).backward()
        frozen = "_b" if self.side == "a" else "_a"
        for name, leaf in leaves.items():
            if not name.endswith(frozen):
                before = self.momenta.get(name)
                self.momenta[name] = leaf.grad if before is None else MOMENTUM * before + leaf.grad
                self.params[name] = self.params[name] - LR * self.momenta[name]


def simulate(phases: list[str], sync: str, num_groups: int, cutoff: float, sigma_split: str) -> list[dict[str, Tensor]]:
    """Parameters of the first group after every step, the switch that follows the step included.

    Args:
        phases: Of every step; a full-rank phase must come last.
        sync: Rule of combination.
        num_groups: Groups.
        cutoff: Of singular values.
        sigma_split: ``both`` or ``trained``.
    """
    x, y = nets.samples()
    half = num_groups // 2
    groups = [Group("a") for _ in range(half)] + [Group("b") for _ in range(num_groups - half)]
    shapes = {n: groups[0].params[n].shape for n in FACTORED}
    starts: dict[str, Factors] = {}
    roots: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}
    history = []
    for t, batch in enumerate(_batches(len(phases))):
        shares = [batch[r::RANKS] for r in range(RANKS)]
        for g, group in enumerate(groups):
            size = RANKS // num_groups
            mine = torch.cat(shares[g * size : (g + 1) * size]) if phases[t] == "ab" else batch
            group.step(x[mine], y[mine], shapes)
        following = phases[t + 1] if t + 1 < len(phases) else phases[t]
        if following == "ab" != phases[t]:
            for n in FACTORED:
                parts = decompose(groups[0].params[n])
                rank = num_kept(parts.sigma, cutoff)
                starts[n], roots[n] = split(parts, rank), parts.sigma[:rank].sqrt()
                held[n] = groups[0].momenta[n]
                for group in groups:
                    a, b = starts[n]
                    if sigma_split == "trained":
                        a, b = (a * roots[n], b / roots[n][:, None]) if group.side == "a" else (
                            a / roots[n], b * roots[n][:, None])  # fmt: skip
                    del group.params[n], group.momenta[n]
                    group.params |= {f"{n}_a": a, f"{n}_b": b}
        elif phases[t] == "ab" != following:
            for n in FACTORED:
                means = {}
                for side in "ab":
                    trained = [g.params[f"{n}_{side}"] for g in groups if g.side == side]
                    mean = sum(trained) / len(trained) if trained else getattr(starts[n], side)
                    if sigma_split == "trained":
                        mean = mean / (roots[n] if side == "a" else roots[n][:, None])
                    means[side] = mean
                weight = from_tall(combine(sync, starts[n], **means), shapes[n], is_transposed(shapes[n]))
                for group in groups:
                    for side in "ab":
                        del group.params[f"{n}_{side}"]
                        group.momenta.pop(f"{n}_{side}", None)
                    group.params[n], group.momenta[n] = weight, held[n]
            for n in groups[0].params.keys() - set(FACTORED):
                param = sum(g.params[n] for g in groups) / num_groups
                momentum = sum(g.momenta[n] for g in groups) / num_groups
                for group in groups:
                    group.params[n], group.momenta[n] = param, momentum
        history.append(dict(groups[0].params))
    return history


def _batches(count: int) -> list[Tensor]:
    """Indices of the samples of every global batch; rank r of R has the positions r, r + R, ... of each."""
    found: list[Tensor] = []
    sampler = RankSampler(range(nets.SAMPLES), shuffle=True, seed=3, multiple_of=nets.BATCH)
    while len(found) < count:
        sampler.set_epoch(len(found) * nets.BATCH // nets.SAMPLES)
        found += torch.tensor(list(sampler)).view(-1, nets.BATCH)
    return found[:count]
