"""Feedback weights: their patterns, statistics and storage."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from networks.feedback import FeedbackWeights


def drawn(kind: str, rows: int = 3, columns: int = 7, **options) -> torch.Tensor:
    (matrix,) = FeedbackWeights(kind=kind, **options).draw(rows, [columns])
    assert not list(matrix.parameters()) and matrix.matrix().shape == (rows, columns)
    return matrix.matrix()


@pytest.mark.parametrize(("kind", "values"), [("trinomial", (-1, 0, 1)), ("binomial", (0, 1))])
def test_discrete_kinds_are_uniform(kind, values):
    b = drawn(kind, 10, 4000)
    number = b.numel()
    for value in values:
        share, expected = float((b == value).float().mean()), 1 / len(values)
        assert abs(share - expected) < 3 * math.sqrt(expected * (1 - expected) / number)
    assert b.unique().tolist() == list(values)
    half = drawn(kind, 10, 4000, scalar=0.5)
    assert torch.equal(half, b / 2)
    same = drawn("discrete_uniform", 10, 4000, values=[float(v) for v in values])
    assert torch.equal(same, b)


def test_named_scalars():
    assert torch.equal(drawn("constant", 4, 5, scalar="1/C"), torch.full((4, 5), 0.25))
    assert not drawn("trinomial", scalar="zeros").any()
    assert torch.equal(drawn("constant", scalar="ones"), torch.ones(3, 7))


def test_kaiming_is_bounded_by_the_number_of_features():
    b = drawn("kaiming_uniform", 10, 2500)
    bound = 1 / math.sqrt(2500)
    assert b.abs().max() <= bound and b.abs().max() > 0.99 * bound
    # Kaiming with a = sqrt(5) is what torch gives a linear layer with these inputs.
    torch.manual_seed(0)
    assert float(b.std()) == pytest.approx(float(torch.nn.Linear(2500, 10).weight.detach().std()), rel=0.02)
    line = drawn("kaiming_uniform_repeat_line", 10, 2500)
    assert torch.equal(line, line[:, :1].expand(10, 2500)) and line[:, 0].unique().numel() == 10


def test_identities():
    eye = torch.eye(3)
    pm = torch.cat([eye, -eye, eye], 1)[:, :7]
    assert torch.equal(drawn("identity_repeat_pm"), pm)
    assert torch.equal(drawn("identity_repeat"), torch.cat([eye, eye, eye], 1)[:, :7])
    assert torch.equal(drawn("identity_fill_zero"), torch.cat([eye, torch.zeros(3, 4)], 1))
    for kind in ("identity_repeat_pm", "identity_repeat", "identity_fill_zero"):
        with pytest.raises(ValueError, match="hear nothing of 1 of the 3 outputs"):
            drawn(kind, 3, 2)


def test_signs_of_columns():
    assert torch.equal(drawn("alternate_negative", 2, 5, scalar=2.0)[0], torch.tensor([-2.0, 2, -2, 2, -2]))
    assert torch.equal(drawn("chunked_negative", 2, 5)[1], torch.tensor([1.0, 1, -1, -1, -1]))


def test_cartesian_product_has_every_combination_once():
    b = drawn("cartesian_product", 3, 8, values=[-1.0, 1.0])
    assert sorted(map(tuple, b.T.tolist())) == sorted(itertools.product([-1.0, 1.0], repeat=3))
    with pytest.raises(ValueError, match="have 8 combinations, but a block has 7 features"):
        drawn("cartesian_product", 3, 7, values=[-1.0, 1.0])


def test_small_integers_take_a_byte():
    (small,) = FeedbackWeights(scalar=0.1).draw(10, [50])
    (large,) = FeedbackWeights(scalar=0.1, storage="float32").draw(10, [50])
    assert small.entries.dtype == torch.int8 and large.entries.dtype == torch.float32
    e = torch.randn(4, 10)
    torch.testing.assert_close(small(e), large(e))
    torch.testing.assert_close(small(e.double()), e.double() @ (small.entries.double() * 0.1))
    (real,) = FeedbackWeights(kind="kaiming_uniform").draw(10, [50])
    assert real.entries.dtype == torch.float32
    (fractions,) = FeedbackWeights(kind="discrete_uniform", values=[0.5, 1.0]).draw(10, [50])
    assert fractions.entries.dtype == torch.float32


def test_they_depend_on_their_seed_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = [m.matrix() for m in FeedbackWeights(seed=3).draw(4, [6, 8])]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = [m.matrix() for m in FeedbackWeights(seed=3).draw(4, [6, 8])]
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], drawn("trinomial", 4, 6, seed=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "gauss"}, r"model\.feedback\.kind='gauss' is unknown"),
        ({"scalar": "half"}, r"model\.feedback\.scalar='half'"),
        ({"kind": "discrete_uniform"}, r"needs model\.feedback\.values"),
        ({"values": [1.0]}, r"trinomial has none"),
        ({"kind": "kaiming_uniform", "storage": "int8"}, r"storage=int8: the entries of kaiming_uniform"),
        ({"storage": "int4"}, r"model\.feedback\.storage='int4' is unknown"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FeedbackWeights(**options)
