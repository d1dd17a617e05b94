"""Collectives between real processes: values, counts, emulated time; and the trace that sees everybody's."""

import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import Interconnect, Transfer, gather_objects
from parallel.flat import FlatTensors
from parallel.groups import Group, destroy, make_cluster_groups, make_group
from parallel.ledger import Ledger
from parallel.network_model import NetworkModel
from parallel.tracing import CollectiveTrace
from strategies.exchange import Exchange, FullMean, NarrowMean


def test_flat_tensors_go_both_ways():
    tensors = [torch.randn(2, 3), torch.randn(4, dtype=torch.bfloat16), torch.tensor(1.5)]
    before = [t.clone() for t in tensors]
    flat = FlatTensors(tensors)
    vector = flat.pack()
    assert vector.shape == (11,) and vector.dtype == torch.float32
    flat.unpack(2 * vector)
    for tensor, old in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, 2 * old)
    assert flat.holds(tensors) and not flat.holds(before)
    assert FlatTensors([torch.ones(1), torch.ones(1, dtype=torch.float64)]).pack().dtype == torch.float64
    assert len(FlatTensors([])) == 0 and FlatTensors([]).pack().numel() == 0


def means(local_size, numel):
    """Mean over nodes of vectors that depend on the node, by every way there is."""
    groups = make_cluster_groups(local_size)
    interconnect = Interconnect(local_size, NetworkModel(), Ledger(dist.get_rank(), local_size))
    generator = torch.Generator().manual_seed(groups.place.node)
    vector = torch.randn(numel, generator=generator)
    found = {}
    for variant in ("rotate", "sharded"):
        exchange = Exchange(groups, interconnect, numel, variant)
        for turn in range(3):
            for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
                part = exchange.part(vector, turn)
                if part is not None:
                    mean = exchange.start(part, dtype)
                    mean.advance()
                    assert isinstance(mean, FullMean if dtype is None else NarrowMean)
                    part = mean.result()
                found[variant, turn, name] = exchange.distribute(part, turn, vector)
    destroy(groups.node, groups.across)
    return found


@pytest.mark.parametrize("local_size", [1, 2])
@pytest.mark.parametrize("numel", [1, 10, 37])
def test_every_exchange_gives_all_ranks_the_mean_over_nodes(ranks4, local_size, numel):
    nodes = 4 // local_size
    vectors = [torch.randn(numel, generator=torch.Generator().manual_seed(node)) for node in range(nodes)]
    exact = torch.stack(vectors).mean(0)
    rounded = torch.stack([v.bfloat16().float() for v in vectors]).mean(0).bfloat16().float()
    found = ranks4(means, local_size, numel)
    for key, mean in found[0].items():
        assert all(torch.equal(other[key], mean) for other in found), key  # the same bits everywhere
        torch.testing.assert_close(mean, exact if key[2] == "fp32" else rounded, atol=1e-6, rtol=1e-6)


def slow(rate):
    groups = make_cluster_groups(2)
    ledger = Ledger(dist.get_rank(), 2)
    interconnect = Interconnect(2, NetworkModel(rate_mbit=rate), ledger)
    vector = torch.ones(25_000)  # 0.1 MB, and 0.15 MB on every edge between the nodes
    dist.barrier()
    begin = time.perf_counter()
    transfer = interconnect.all_reduce(vector, groups.world)
    issued = time.perf_counter() - begin
    blocked = transfer.wait()
    taken = time.perf_counter() - begin
    assert transfer.wait() == 0.0
    destroy(groups.node, groups.across)
    return issued, blocked, taken, ledger.blocked_s, float(vector[0])


def test_an_emulated_link_delays_the_end_and_not_the_begin(ranks4):
    for issued, blocked, taken, counted, value in ranks4(slow, 8):
        assert value == 4
        assert taken >= 0.15
        assert issued < 0.1
        assert counted == pytest.approx(blocked)
        assert blocked <= taken


def gathered():
    """A small and a large object, in pieces of ten bytes and at once; the most that was sent in a round."""
    group, rank = make_group([range(4)]), dist.get_rank()
    mine = {"rank": rank, "numbers": torch.arange(100.0 if rank == 2 else 3.0, dtype=torch.float64)}
    rounds, gather = [], dist.gather

    def noted(sent, *args, **kwargs):
        rounds.append(len(sent))
        gather(sent, *args, **kwargs)

    with mock.patch.object(dist, "gather", noted):
        found = [gather_objects(mine, group, torch.device("cpu"), size) for size in (40, 1 << 26)]
    alone = gather_objects(mine, Group((rank,), None), torch.device("cpu"))
    return found, rounds, alone[0]["rank"]


def test_objects_of_all_ranks_travel_in_pieces(ranks4):
    results = ranks4(gathered)
    assert [alone for *_, alone in results] == [0, 1, 2, 3]
    assert all(found == [None, None] for found, *_ in results[1:])
    found, rounds, _ = results[0]
    for objects in found:
        assert [one["rank"] for one in objects] == [0, 1, 2, 3]
        assert [len(one["numbers"]) for one in objects] == [3, 3, 100, 3]
        assert torch.equal(objects[2]["numbers"], torch.arange(100.0, dtype=torch.float64))
    assert len(rounds) > 50 and set(rounds[:-1]) == {10} and rounds[-1] > 800


class FakeStream:
    """Stands for a CUDA stream and its events: the work that is queued takes time, queueing it takes none."""

    def __init__(self):
        self.now = 0.0

    def event(self, enable_timing):
        assert enable_timing
        return FakeEvent(self)

    def run(self, milliseconds):
        self.now += milliseconds


class FakeEvent:
    def __init__(self, stream):
        self.stream, self.waited_for = stream, False

    def record(self):
        self.moment = self.stream.now

    def synchronize(self):
        self.waited_for = True

    def elapsed_time(self, end):
        assert end.waited_for, "read before the device had come so far"
        return end.moment - self.moment


def test_on_a_device_the_stream_says_how_long_it_stood_still(monkeypatch):
    stream, ledger = FakeStream(), Ledger(0, 1)
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    on_device = SimpleNamespace(is_cuda=True)
    work = SimpleNamespace(wait=lambda: stream.run(30.0))  # the stream waits, the process does not
    transfer = Transfer(work, 0.0, ledger, (on_device,))
    stream.run(50.0)  # computes while it travels
    assert transfer.wait() == 0.0 and transfer.done and transfer.wait() == 0.0
    assert (ledger.blocked_s, ledger.transfer_s) == (0.0, 0.0)
    assert ledger.sums()["blocked_s"] == pytest.approx(0.030)
    assert ledger.state_dict()["transfer_s"] == pytest.approx(0.080)
    assert not ledger.pending


def test_times_that_nobody_reads_do_not_pile_up(monkeypatch):
    """An epoch may have any number of transfers; three events of each would live to its end."""
    stream, ledger = FakeStream(), Ledger(0, 1)
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    most = 0
    for _ in range(5000):
        transfer = Transfer(
            SimpleNamespace(wait=lambda: stream.run(2.0)), 0.0, ledger, (SimpleNamespace(is_cuda=True),)
        )
        stream.run(1.0)
        transfer.wait()
        most = max(most, len(ledger.pending))
    assert most <= 1024
    assert ledger.sums()["blocked_s"] == pytest.approx(10.0) and ledger.transfer_s == pytest.approx(15.0)


def trace():
    ledger = Ledger(dist.get_rank(), 2)
    nodes = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = nodes[dist.get_rank() // 2]
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 4))
    x = torch.ones(3, 8)
    for _ in range(2):  # the second step rebuilds buckets
        net(x).sum().backward()
    with CollectiveTrace(ledger):
        net(x).sum().backward()
        dist.all_reduce(torch.ones(5, dtype=torch.float16), group=mine)
        dist.broadcast(torch.ones(2), 0)
        out = torch.empty(8)
        dist.all_gather_into_tensor(out, torch.ones(2))
        dist.barrier()
    for group in nodes:
        dist.destroy_process_group(group)
    return {key: (e.calls, e.payload_bytes) for key, e in ledger.entries.items() if e.calls}


def test_a_trace_sees_ddp_and_everybody_else(ranks4):
    found = ranks4(trace)
    assert found[0] == {
        ("all_reduce", "inter_node"): (1, 4 * 36),
        ("all_reduce", "intra_node"): (1, 10),
        ("broadcast", "inter_node"): (1, 8),
        ("all_gather", "inter_node"): (1, 32),
    }
    assert found[2] == {("all_reduce", "intra_node"): (1, 10)}
    assert found[1] == found[3] == {}


def messages(together):
    """A ring of four ranks, nodes of two on an emulated network; and one way only, from rank 0 to rank 3."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = Group(tuple(range(size)), dist.group.WORLD)
    interconnect = Interconnect(2, NetworkModel(rate_mbit=8.0), Ledger(rank, 2))  # a kilobyte takes a millisecond
    mine, other = torch.full((25_000,), float(rank)), torch.empty(25_000)
    begin = time.perf_counter()
    sends, receives = [(mine, (rank + 1) % size)], [(other, (rank - 1) % size)]
    transfers = interconnect.exchange(sends, receives, world, together)
    for transfer in transfers:
        transfer.wait()
    seconds = time.perf_counter() - begin
    ring = other.clone()
    one_way = interconnect.exchange(
        [(mine, 3)] if rank == 0 else [], [(other, 0)] if rank == 3 else [], world, together
    )
    for transfer in one_way:
        transfer.wait()
    return ring, other, seconds, len(transfers), interconnect.ledger.totals()


@pytest.mark.parametrize("together", [False, True])
def test_messages_arrive_are_counted_once_and_take_the_emulated_time(ranks4, together):
    found = ranks4(messages, together)
    for rank, (ring, last, seconds, number, _) in enumerate(found):
        assert number == 2 and bool((ring == (rank - 1) % 4).all())
        assert bool((last == (0 if rank == 3 else (rank - 1) % 4)).all())
        assert seconds > (0.095 if rank in (1, 3) else 0.0)  # those that send to the other node
    sums = {key: sum(totals[key] for *_, totals in found) for key in found[0][4]}
    assert sums["inter_node_calls"] == 3 and sums["intra_node_calls"] == 2
    assert sums["inter_node_bytes"] == 3 * 100_000 and sums["intra_node_bytes"] == 2 * 100_000


def scattered():
    rank, size = dist.get_rank(), dist.get_world_size()
    interconnect = Interconnect(size, NetworkModel(), Ledger(rank, size))
    parts, out = torch.arange(8.0) + rank, torch.empty(4)
    interconnect.reduce_scatter(out, parts, Group((0, 1), dist.group.WORLD)).wait()
    alone = torch.empty(8)
    interconnect.reduce_scatter(alone, parts, Group((rank,), None)).wait()
    return out, torch.equal(alone, parts), interconnect.ledger.totals()["intra_node_payload_bytes"]


def test_a_sum_is_scattered(ranks2):
    first, second = ranks2(scattered)
    assert torch.equal(torch.cat([first[0], second[0]]), 2 * torch.arange(8.0) + 1)
    assert first[1] and second[1] and (first[2], second[2]) == (32, 0)
