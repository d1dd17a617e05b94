"""``trainer.sync_batchnorm`` on CPU processes: one process with the whole batch, weights and running statistics."""

from __future__ import annotations

import pytest
import torch

from strategies.daso import DASO
from strategies.ddp import DDP
from tests.strategies import nets


def state(module):
    return torch.cat([value.double().reshape(-1) for value in module.state_dict().values()])


def trained(folder, local_size, sync, accumulate=1):
    module = nets.Regression(nets.network(norm=True))
    strategy = DDP(local_size=local_size)
    names = list(module.state_dict())
    nets.fit(strategy, folder, module=module, sync_batchnorm=sync, accumulate_grad_batches=accumulate)
    assert list(module.state_dict()) == names
    assert not any("forward" in part.__dict__ for part in module.net), "the modules are what they were"
    return state(module), strategy.ledger.totals()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_shared_statistics_are_those_of_one_process(ranks4, tmp_path, accumulate):
    alone = nets.Regression(nets.network(norm=True))
    nets.fit("auto", str(tmp_path), devices=1, module=alone, accumulate_grad_batches=accumulate)
    own = ranks4(trained, str(tmp_path), 2, False, accumulate)
    shared = ranks4(trained, str(tmp_path), 2, True, accumulate)
    for weights, _ in shared:
        torch.testing.assert_close(weights, state(alone), atol=1e-12, rtol=0)
    for weights, _ in own:  # two samples a process: quite another training
        assert (weights - state(alone)).abs().max() > 1e-2
    # Counted: in each of 24 batches eight means, eight squares and a count of every rank, and 16 sums in the backward
    # pass; a ring of four ranks has two edges between two nodes, and sends (p - 1) / p of a gather, 2 (p - 1) / p of a
    # sum over each of them.
    more = sum(totals["inter_node_bytes"] for _, totals in shared) - sum(t["inter_node_bytes"] for _, t in own)
    assert more == 24 * 8 * 2 * 2 * (0.75 * 4 * 17 + 2 * 0.75 * 16) / 2


class Groups(nets.pl.Callback):
    def on_train_batch_start(self, trainer, *_):
        self.ranks = trainer.strategy._statistics_share().group.ranks


def on_nodes(folder):
    seen, module = Groups(), nets.Regression(nets.network(norm=True))
    strategy = DASO(warmup_epochs=0, cooldown_epochs=0, local_size=2)
    nets.fit(strategy, folder, module=module, sync_batchnorm=True, callbacks=(seen,), epochs=2)
    return seen.ranks, nets.error(module.eval())


def test_statistics_stay_within_a_node_where_gradients_do(ranks4, tmp_path):
    begin = nets.error(nets.Regression(nets.network(norm=True)).eval())
    for rank, (group, error) in enumerate(ranks4(on_nodes, str(tmp_path))):
        assert group == ((0, 1) if rank < 2 else (2, 3))
        assert error < begin
