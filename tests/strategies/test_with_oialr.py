"""OIALR under the strategies whose replicas differ between exchanges."""

from __future__ import annotations

import pytest
import torch

from callbacks.oialr import OIALR
from networks.low_rank import factored_weights
from strategies.ab_training import ABTrainingStrategy
from strategies.daso import DASO
from strategies.ddp import DDP
from strategies.diloco import DiLoCo
from tests.strategies import nets

STRATEGIES = {
    "ddp": lambda: DDP(local_size=2),
    "daso": lambda: DASO(0, 0, skip=3, wait=2, schedule="fixed", wire_dtype="fp32", local_size=2),
    "local_sgd": lambda: DASO(0, 0, skip=2, wait=0, schedule="fixed", wire_dtype="fp32", local_size=2),
    "diloco": lambda: DiLoCo(period=2, outer_lr=1.0, outer_momentum=0.0, local_size=2),
}


def square():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        layers = [torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)]
        return nets.Regression(torch.nn.Sequential(*layers).double(), lambda p: torch.optim.SGD(p, 0.05))


def trained(folder, name, frequency):
    """Full rank, square bases: plain gradient descent on Sigma is that on W, whatever the updates of the bases."""
    callback = OIALR(delay=4, frequency=frequency, beta=0.0, progressive=1.0, export="none")
    module, _ = nets.fit(STRATEGIES[name](), folder, module=square(), epochs=3, callbacks=(callback,))
    ranks = [weight.rank for weight in factored_weights(module)]
    return torch.cat([w.matrix().reshape(-1) for w in factored_weights(module)]).detach(), ranks


def both(folder, name):
    return trained(folder, name, 1000), trained(folder, name, 4)


@pytest.mark.parametrize("name", STRATEGIES)
def test_updates_of_the_bases_change_nothing_at_full_rank(ranks4, tmp_path, name):
    found = ranks4(both, str(tmp_path), name)
    for (never, ranks), (often, _) in found:
        assert ranks == [6, 6]
        assert torch.equal(often, found[0][1][0])
        if name != "daso":  # its exchanges fall differently; the others meet after every second step anyway
            torch.testing.assert_close(often, never, atol=1e-9, rtol=0)


def refused(folder):
    with pytest.raises(ValueError, match=r"callbacks\.oialr: ABTrainingStrategy replaces weights itself"):
        nets.fit(
            ABTrainingStrategy(warmup_steps=2, ab_steps=3, full_steps=3, local_size=2, min_dim=2),
            folder,
            module=square(),
            callbacks=(OIALR(delay=4),),
        )
    return True


def test_ab_training_and_oialr_cannot_take_turns(ranks4, tmp_path):
    assert all(ranks4(refused, str(tmp_path)))
