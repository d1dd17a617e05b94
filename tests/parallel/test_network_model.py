"""The emulated network on a clock that the test turns."""

import time

import pytest
import torch

from parallel.ledger import Ledger
from parallel.network_model import Delay, NetworkModel, sleep_until


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_transfers_take_bytes_over_bandwidth_and_latency_and_queue_up():
    clock = Clock()
    network = NetworkModel(rate_mbit=8, latency_ms=10, clock=clock)  # 1 MB/s
    # Two ranks on two nodes: an all-reduce sends its vector once in each direction, in two rounds.
    assert network.seconds("all_reduce", [0, 1], 1e6, local_size=1) == pytest.approx(1.02)
    assert network.seconds("all_reduce", [0, 1], 1e6, local_size=2) == 0
    assert network.seconds("all_reduce", range(4), 1e6, local_size=2) == pytest.approx(1.5 + 0.06)
    assert network.seconds("all_reduce", [0, 2], 1e6, local_size=2, sharing=2) == pytest.approx(2.02)
    assert network.book("broadcast", [0, 1], 1e6, local_size=1) == pytest.approx(1.01)
    clock.now = 0.5
    assert network.book("broadcast", [0, 1], 1e6, local_size=1) == pytest.approx(2.02)  # behind the first
    clock.now = 5.0
    assert network.book("broadcast", [0, 1], 1e6, local_size=1) == pytest.approx(6.01)
    assert network.book("broadcast", [0, 1], 1e6, local_size=2) == 0.0


def test_without_a_rate_nothing_is_slow():
    assert NetworkModel().book("all_reduce", range(4), 1e9, local_size=1) == 0.0
    assert not NetworkModel().active
    assert NetworkModel(latency_ms=5).seconds("all_reduce", [0, 1], 1e9, 1) == pytest.approx(0.01)


@pytest.mark.parametrize("kwargs", [{"rate_mbit": 0}, {"rate_mbit": -1}, {"latency_ms": -1}])
def test_impossible_networks(kwargs):
    with pytest.raises(ValueError, match=r"cluster\.(rate_mbit|latency_ms)="):
        NetworkModel(**kwargs)


def test_delayed_futures_keep_value_and_error():
    delay = Delay()
    first, second = torch.futures.Future(), torch.futures.Future()
    begin = time.perf_counter()
    late = delay.until(first, begin + 0.1, torch.device("cpu"))
    broken = delay.until(second, 0.0, torch.device("cpu"))
    first.set_result(torch.ones(2))
    assert torch.equal(late.wait(), torch.ones(2))
    assert time.perf_counter() - begin >= 0.1
    second.set_exception(RuntimeError("the peer is gone"))
    with pytest.raises(RuntimeError, match="the peer is gone"):
        broken.wait()
    delay.close()
    delay.close()
    assert sleep_until(0.0) == 0.0


def test_a_ledger_counts_a_group_on_its_first_rank_only():
    first, other = Ledger(0, local_size=2), Ledger(1, local_size=2)
    for ledger in (first, other):
        ledger.record("all_reduce", range(4), 100)
        ledger.record("broadcast", [0, 1], 10)
    assert other.totals() == {name: 0 for name in first.totals()}
    assert first.totals() == {
        "inter_node_bytes": 300, "inter_node_calls": 1, "inter_node_payload_bytes": 100,
        "intra_node_bytes": 320, "intra_node_calls": 1, "intra_node_payload_bytes": 10,
    }  # fmt: skip
    again = Ledger(0, 2)
    again.load_state_dict(first.state_dict())
    assert again.totals() == first.totals()
