"""What is told to hidden blocks, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from networks.feedback import ErrorStore, Objective, error, signal

N, C = 6, 4


@pytest.fixture
def raw():
    return torch.randn(N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def target():
    labels = torch.randint(C, (N,), generator=torch.Generator().manual_seed(1))
    return F.one_hot(labels, C).double()


def test_losses_are_torchs(raw, target):
    bce, nll, mse = (Objective(name) for name in ("sigmoid_bce", "softmax_nll", "mse"))
    torch.testing.assert_close(bce.loss(raw, target), F.binary_cross_entropy(raw.sigmoid(), target))
    torch.testing.assert_close(bce.loss_of_output(raw.sigmoid(), target), bce.loss(raw, target))
    torch.testing.assert_close(nll.loss(raw, target), F.cross_entropy(raw, target.argmax(1)))
    torch.testing.assert_close(mse.loss(raw, target), F.mse_loss(raw, target))
    # Probabilities of classes: sigmoids over their sum.
    s = raw.sigmoid()
    torch.testing.assert_close(bce.class_logits(raw).softmax(1), s / s.sum(1, keepdim=True))
    with pytest.raises(ValueError, match=r"model\.objective='hinge' is unknown"):
        Objective("hinge")


def test_errors(raw, target):
    bce, nll, mse = (Objective(name) for name in ("sigmoid_bce", "softmax_nll", "mse"))
    y, z, s = target, raw, raw.sigmoid()
    torch.testing.assert_close(error("delayed_error", bce, z, y), y - s)
    torch.testing.assert_close(error("current_error", mse, z, y), y - z)
    torch.testing.assert_close(error("delayed_error_one_hot", bce, z, y), y - s)
    torch.testing.assert_close(error("delayed_error_softmax", nll, z, y), y - z.softmax(1))
    torch.testing.assert_close(error("delayed_error", nll, z, y), y - z)  # raw numbers are the output there


def test_losses_carry_the_mean(raw, target):
    bce, nll, mse = (Objective(name) for name in ("sigmoid_bce", "softmax_nll", "mse"))
    y, z, s = target, raw, raw.sigmoid()
    torch.testing.assert_close(error("delayed_loss", bce, z, y), (y - s) / (s * (1 - s)) / (N * C))
    torch.testing.assert_close(error("delayed_loss", mse, z, y), 2 * (y - z) / (N * C))
    torch.testing.assert_close(error("delayed_loss", nll, z, y), (y - z.softmax(1)) / N)
    torch.testing.assert_close(error("delayed_loss", mse, z, y, replicas=2), (y - z) / (N * C))
    # The softmax is part of the function: its Jacobian is diag(q) - q q^T.
    q = s.softmax(1)
    outer = (y - q) / (q * (1 - q)) / (N * C)
    torch.testing.assert_close(error("delayed_loss_softmax", bce, z, y), q * (outer - (q * outer).sum(1, keepdim=True)))


def test_no_graph_and_no_change(raw, target):
    z = raw.clone().requires_grad_()
    for info in ("delayed_error", "delayed_loss", "delayed_loss_softmax"):
        assert not error(info, Objective("mse"), z, target).requires_grad
    assert torch.equal(z.detach(), raw)


def test_signals(target):
    remembered = torch.randn(N, C, dtype=torch.float64)
    assert not signal("zeros", target).any()
    assert torch.equal(signal("one_hot_target", target), target)
    for info in ("delayed_error", "delayed_loss", "delayed_error_softmax", "delayed_loss_softmax"):
        assert torch.equal(signal(info, target, remembered), remembered)
    kept = signal("delayed_error_one_hot", target, remembered)
    assert torch.equal(kept, torch.where(target == 1, remembered, 0.0))


class TestErrorStore:
    def test_a_sample_that_was_not_visited_has_its_target(self, target):
        store = ErrorStore(10, C)
        index = torch.tensor([3, 9, 0, 4, 5, 7])
        assert torch.equal(store.read(index, target), target)
        rows = torch.arange(3 * C, dtype=torch.float64).view(3, C)
        store.write(index[:3], rows)
        found = store.read(index, target)
        assert torch.equal(found[:3], rows) and torch.equal(found[3:], target[3:])
        assert found.dtype == torch.float64 and store.rows.dtype == torch.float32

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_the_bytes(self, dtype, target):
        store = ErrorStore(10, C, dtype)
        store.write(torch.arange(6), target / 3)
        assert store.rows.element_size() == 2
        torch.testing.assert_close(store.read(torch.arange(6), target), target / 3, rtol=1e-2, atol=1e-3)
        store.to(torch.float64)
        assert store.rows.element_size() == 2  # the type is chosen, not that of the network

    def test_its_rows_are_in_the_state_and_no_buffers(self, target):
        store = ErrorStore(10, C)
        store.write(torch.arange(6), target)
        assert not list(store.buffers()) and not list(store.parameters())
        twin = ErrorStore(10, C)
        twin.load_state_dict(store.state_dict())
        assert torch.equal(twin.rows, store.rows) and torch.equal(twin.visited, store.visited)
        empty = ErrorStore(0, C)  # a module without its data
        empty.load_state_dict(store.state_dict())
        assert torch.equal(empty.rows, store.rows)
        with pytest.raises(ValueError, match="errors of 10 training samples with 4 outputs, the data have 7"):
            ErrorStore(7, C).load_state_dict(store.state_dict())

    def test_merge_gives_everybody_what_anybody_has_written(self):
        stores = [ErrorStore(8, 2) for _ in range(3)]
        for rank, store in enumerate(stores):
            store.write(torch.tensor([rank, rank + 3]), torch.full((2, 2), rank + 1.0))
        stores[2].write(torch.tensor([0]), torch.full((1, 2), 9.0))  # of two that wrote a row the last one counts
        news = [store.news() for store in stores]
        for rank, store in enumerate(stores):
            store._written = [news[rank][0]]
            gathered = iter([[n[0] for n in news], [n[1] for n in news]])
            store.merge(lambda mine, gathered=gathered: next(gathered))
        for store in stores:
            assert store.rows[:, 0].tolist() == [9, 2, 3, 1, 2, 3, 0, 0]
            assert store.visited.tolist() == [True] * 6 + [False] * 2

    def test_numbers_beyond_the_rows_are_refused(self):
        with pytest.raises(ValueError, match="a sample has the number 10, the error store has 10 rows"):
            ErrorStore(10, C).check(torch.tensor([3, 10]))
        with pytest.raises(ValueError, match=r"model\.store_dtype='int8'"):
            ErrorStore(10, C, "int8")
