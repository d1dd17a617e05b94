"""Split arrays against NumPy: every operation, on one to four ranks that share a pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import parallel.array as pa
from parallel.array.chunks import balanced, offsets, receives, sends
from parallel.array.comm import Comm
from parallel.array.ordered import from_keys, to_keys
from parallel.array.rng import Generator, normal_at, philox, uniform_at
from tests.parallel.array_cases import CASES, run

SEEDS = (0, 1, 2, 3)


@pytest.mark.parametrize("name", CASES)
def test_is_what_numpy_says_on_one_process(name):
    assert run(name, 1, SEEDS) == []


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_is_what_numpy_says_on_ranks(name, size, ranks4):
    assert [wrong for rank in ranks4(run, name, size, SEEDS) for wrong in rank] == []


def test_enough_properties():
    assert len(CASES) * 4 >= 200


# -------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize(
    ("n", "size", "expected"), [(5, 4, (2, 1, 1, 1)), (2, 4, (1, 1, 0, 0)), (0, 3, (0, 0, 0)), (9, 3, (3, 3, 3))]
)
def test_balanced_map(n, size, expected):
    assert balanced(n, size) == expected
    assert offsets(expected) == tuple(r * (n // size) + min(r, n % size) for r in range(size))  # section 2.1


def test_what_is_sent_is_what_is_received():
    source, target = (4, 0, 3), (1, 5, 1)
    for rank in range(3):
        pieces = sends(source, target, rank)
        assert sum(p.end - p.begin for p in pieces) == source[rank]
        assert sum(receives(source, target, rank)) == target[rank]
    with pytest.raises(ValueError, match="rows"):
        sends((1, 2), (1, 1), 0)


# -------------------------------------------------------------------------------------------------------------- random


def test_philox_gives_the_published_words():
    """Known answers of Random123's kat_vectors for philox4x32-10."""
    assert [int(w[0]) for w in philox(np.array([0]), (0, 0))] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = np.array([0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    words = philox(ones, (0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF))
    assert [int(w[0]) for w in words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = np.array([0x85A308D3243F6A88], dtype=np.uint64)
    words = philox(pi, (0xA4093822, 0x299F31D0), (0x13198A2E, 0x03707344))
    assert [int(w[0]) for w in words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_random_numbers_have_their_distributions():
    from scipy import stats

    numbers = np.arange(20_000)
    assert stats.kstest(uniform_at(numbers, 1), "uniform").pvalue > 1e-3
    assert stats.kstest(normal_at(numbers, 1), "norm").pvalue > 1e-3
    u = uniform_at(numbers, 1)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03 and not np.array_equal(u, uniform_at(numbers, 2))
    assert not np.array_equal(u, uniform_at(numbers, 1, stream=1))


def test_choice_draws_different_numbers():
    chosen = Generator(3).choice(10, 10)
    assert sorted(chosen.tolist()) == list(range(10))
    with pytest.raises(ValueError, match="11 different numbers"):
        Generator(3).choice(10, 11)


# ---------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_keys_are_ordered_as_values(dtype):
    values = torch.tensor([-torch.inf, -3.0, -1e-3, -0.0, 0.0, 1e-3, 2.0, torch.inf, torch.nan], dtype=dtype)
    keys = to_keys(values)
    assert (keys.diff() >= 0).all() and keys[3] == keys[4] and (keys[[0, 2, 4, 6, 7]].diff() > 0).all()
    back = from_keys(keys, dtype)
    assert torch.equal(back[:-1], values[:-1]) and back[-1].isnan() and back.dtype == dtype
    assert to_keys(values, nan_last=False)[-1] < keys[0]


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda a: a + torch.zeros(7), r"do not broadcast: \(4, 3\) split=0 map=\(4,\), \(7,\)"),
        (lambda a: a @ a, r"matmul of \(4, 3\) \(split=0"),
        (lambda a: a[9], "index 9 is out of bounds for axis 0 with length 4"),
        (lambda a: pa.take(a, [7], 0), "index 7 is out of bounds"),
        (lambda a: a.resplit(5), "axis=5"),
        (lambda a: a.redistribute((3, 3)), "rows"),
        (lambda a: pa.reshape(a, (5, 5)), "12 elements"),
        (lambda a: pa.percentile(a, 101), "between 0 and 100"),
        (lambda a: pa.percentile(a, 5, method="fancy"), "choose linear"),
        (lambda a: pa.max(a[:0]), "no element"),
        (lambda a: pa.topk(a, 9, 0), "k=9"),
        (lambda a: pa.sort(a.astype(torch.complex64)), "no order"),
        (lambda a: pa.concatenate([a, a[:, :2]]), "differ elsewhere"),
        (lambda a: pa.histogram(a * torch.nan), "not finite"),
        (lambda a: pa.arange(0, 5, 0), "step=0"),
        (lambda a: a.__setitem__(slice(0, 2), torch.zeros(7)), "cannot be assigned"),
        (lambda a: bool(a), "12 elements, not one"),
    ],
)
def test_mistakes_are_named(mistake, message):
    a = pa.from_global(np.arange(12.0).reshape(4, 3), 0, Comm())
    with pytest.raises((ValueError, IndexError), match=message):
        mistake(a)


def _disagree() -> list[str]:
    import torch.distributed as dist

    from parallel.array.array import check_same_program

    found = []
    local = torch.zeros(2, 3 if dist.get_rank() else 4)
    for call in (
        lambda: pa.from_local(local, 0),
        lambda: check_same_program(pa.zeros((4, 3 + dist.get_rank()), split=0)),
    ):
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    return found


def test_ranks_that_disagree_are_told(ranks2):
    for found in ranks2(_disagree):
        assert "do not fit together" in found[0] and "disagree about an array" in found[1]


def _one_rank_asks_too_far() -> list[str]:
    comm = Comm.world(timeout_s=20)
    found = []
    a = pa.arange(6, split=0, comm=comm)
    for wrong in ([0, 1, 2, 6], [-7, 0, 1, 2]):  # of the second rank, of the first rank
        for call in (lambda i: a[i], lambda i: pa.take(a, i, 0)):
            try:
                call(pa.from_global(np.array(wrong), 0, comm))
            except IndexError as error:
                found.append(str(error))
    found.append(str(a[pa.from_global(np.array([5, -6]), 0, comm)].tolist()))
    return found


def test_an_index_out_of_bounds_on_one_rank_is_told_to_all(ranks2):
    """Else the others would wait for the rows of the one that raised until the time limit."""
    far, low = (f"index {i} is out of bounds for axis 0 with length 6" for i in (6, -7))
    for found in ranks2(_one_rank_asks_too_far):
        assert found == [far, far, low, low, "[5, 0]"]


def _dtensor() -> list[bool]:
    comm = Comm.world()
    found = []
    for n in (7, 2, 8):
        for split in (0, 1, None):
            a = pa.randn(n, 5, split=split, comm=comm)
            tensor = a.to_dtensor()
            back = pa.SplitArray.from_dtensor(tensor, comm)
            same = torch.equal(tensor.full_tensor(), torch.from_numpy(a.numpy())) and np.array_equal(
                back.numpy(), a.numpy()
            )
            found.append(same and (n != 8 or split != 0 or tensor.to_local().data_ptr() == a.local.data_ptr()))
    return found


def test_dtensors_share_memory(ranks2):
    for found in ranks2(_dtensor):
        assert all(found)


def test_array_namespace():
    a = pa.zeros((2, 2), comm=Comm())
    assert a.__array_namespace__().sum is pa.sum
    assert np.asarray(a).shape == (2, 2)
