"""Random numbers of samples: the same for any layout, pairs, items of several ranks; which rows belong to a sample."""

from __future__ import annotations

import threading

import pytest
import torch

from networks.bayes import SampleContext, Stream, current

X = torch.zeros(1)
KINDS = ("noise", "uniform", "item_noise", "item_uniform", "item_signs")


def draw(kind="noise", ids=range(6), shape=(5, 2), like=X, draws=2, items=3, rows_of_sample=None, **kwargs):
    """Numbers (draw, sample, ...) of a context."""
    more = {} if rows_of_sample is None else {"rows": rows_of_sample}
    with SampleContext(ids, 12, batch=items, **kwargs) as context:
        return torch.stack([getattr(context, kind)(shape, like, **more) for _ in range(draws)])


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_do_not_depend_on_who_holds_a_sample(kind):
    whole = draw(kind)
    assert torch.equal(torch.cat([draw(kind, range(0, 4)), draw(kind, [4]), draw(kind, [5])], 1), whole)
    assert torch.equal(draw(kind, [3, 1]), whole[:, [3, 1]])
    assert (whole[0] != whole[1]).any()  # draws follow one another


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_belong_to_seed_step_and_stream(kind):
    first, shape = draw(kind), (40,)
    assert torch.equal(draw(kind), first)
    first = draw(kind, shape=shape)
    for other in ({"seed": 1}, {"step": 1}, {"stream": Stream.EVALUATION}):
        assert not torch.equal(draw(kind, shape=shape, **other), first)


def test_entering_again_gives_the_same_numbers():
    context = SampleContext(range(2), 2, batch=1)
    with context:
        first = context.noise((3,), X)
        assert not torch.equal(context.noise((3,), X), first)
    with context:
        assert torch.equal(context.noise((3,), X), first)


def test_numbers_have_the_right_distribution():
    normal = draw("noise", shape=(40_000,), draws=1)
    uniform = draw("uniform", shape=(40_000,), draws=1)
    signs = draw("item_signs", shape=(40_000,), draws=1)
    n = normal.numel()
    assert abs(normal.mean()) < 4 / n**0.5 and abs(normal.var() - 1) < 4 * (2 / n) ** 0.5
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5 and abs(uniform.var() - 1 / 12) < 0.001
    assert signs.abs().eq(1).all() and abs(signs.mean()) < 4 / signs.numel() ** 0.5
    assert torch.corrcoef(normal[0]).fill_diagonal_(0).abs().max() < 5 / 40_000**0.5
    # Masks are no function of the noise of the weights.
    together = torch.stack([normal.flatten(), uniform.flatten()])
    assert abs(torch.corrcoef(together)[0, 1]) < 4 / n**0.5


def test_antithetic_samples_come_in_pairs():
    pairs = {kind: draw(kind, antithetic=True, draws=1)[0] for kind in KINDS}
    for kind in ("noise", "item_noise"):
        assert torch.equal(pairs[kind][0::2], -pairs[kind][1::2]) and (pairs[kind][0] != pairs[kind][2]).any()
    for kind in ("uniform", "item_uniform"):
        torch.testing.assert_close(pairs[kind][0::2], 1 - pairs[kind][1::2])
    assert torch.equal(pairs["item_signs"][0::2], pairs["item_signs"][1::2])
    assert torch.equal(draw(ids=[4, 5], antithetic=True, draws=1)[0], pairs["noise"][4:])
    for noise in ("counter", "rank"):
        two = draw(ids=[2, 3], antithetic=True, noise=noise, draws=1)[0]
        assert torch.equal(two[0], -two[1])


def test_one_generator_for_all_samples_of_a_rank():
    first = draw(noise="rank", shape=(1000,))
    assert torch.equal(draw(noise="rank", shape=(1000,)), first)
    for other in ({"rank": 1}, {"ids": range(6, 12)}, {"step": 1}):
        assert (draw(noise="rank", shape=(1000,), **other) != first).float().mean() > 0.99
    assert abs(first.mean()) < 0.05 and abs(first.std() - 1) < 0.05
    assert torch.corrcoef(first[0]).fill_diagonal_(0).abs().max() < 0.15
    pairs = draw(noise="rank", antithetic=True, draws=1)[0]
    assert torch.equal(pairs[0::2], -pairs[1::2])


@pytest.mark.parametrize("kind", ["item_noise", "item_uniform", "item_signs"])
@pytest.mark.parametrize("each", [1, 4])
def test_numbers_of_items_do_not_depend_on_who_holds_them(kind, each):
    """Item i of rank d is item d + i D of all; an item may be several rows of a sample."""
    whole = draw(kind, shape=(50,), items=6, rows_of_sample=6 * each)
    assert whole.shape == (2, 6, 6 * each, 50)
    by_item = whole.unflatten(2, (6, each))
    for place in range(3):
        part = draw(kind, shape=(50,), items=2, rows_of_sample=2 * each, rows=(place, 3))
        assert torch.equal(part.unflatten(2, (2, each)), by_item[:, :, place::3])
    assert (by_item[:, :, 0] != by_item[:, :, 1]).any()
    with pytest.raises(ValueError, match="7 rows of each sample are no multiple of the 3 items"):
        draw(kind, rows_of_sample=7)


def test_parts_of_an_accumulated_step_share_weights_and_not_items():
    assert torch.equal(draw("noise", part=1), draw("noise"))
    assert not torch.equal(draw("item_noise", part=1), draw("item_noise"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_what_single_precision_draws(dtype):
    single, double = draw(), draw(like=X.double())
    assert torch.equal(draw(like=X.to(dtype)), single.to(dtype))
    assert double.dtype == torch.float64 and double.unique().numel() == double.numel()


def test_the_innermost_context_of_the_thread_counts():
    assert current() is None
    found = []
    with SampleContext([0], 1, batch=1) as outer:
        with SampleContext([1], 2, batch=1) as inner:
            assert current() is inner
            thread = threading.Thread(target=lambda: found.append(current()))
            thread.start()
            thread.join()
        assert current() is outer and found == [None]
        with pytest.raises(RuntimeError, match="x"), SampleContext([0], 1, batch=1):
            raise RuntimeError("x")
        assert current() is outer
    assert current() is None


def test_rows_of_a_layer():
    context = SampleContext(range(4), 4, batch=3)
    assert context.samples == 4
    assert not context.is_folded(torch.zeros(3, 2)) and context.is_folded(torch.zeros(12, 2))
    folded = torch.arange(24.0).view(12, 2)
    assert torch.equal(context.by_sample(folded)[1], folded[3:6])
    text = r"an input of 6 rows is neither the batch of 3 items nor 4 samples of it.*set model\.expand_input=true"
    with pytest.raises(ValueError, match=text):
        context.is_folded(torch.zeros(6, 2))
    expanded = SampleContext(range(4), 4, batch=3, expanded=True)
    assert expanded.is_folded(torch.zeros(60, 2)) and expanded.by_sample(torch.zeros(60, 2)).shape == (4, 15, 2)
    with pytest.raises(ValueError, match="an input of 3 rows"):
        expanded.is_folded(torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"estimator": "exact"}, r"model\.estimator='exact' is unknown; choose one of weight, lrt, flipout"),
        ({"noise": "global"}, r"model\.noise='global' is unknown; choose counter or rank"),
        ({"ids": []}, "at least one weight sample"),
        ({"antithetic": True, "ids": range(3)}, r"\[0, 1, 2\] are no whole pairs .* even model\.num_samples"),
        ({"antithetic": True, "ids": [1, 2]}, r"\[1, 2\] are no whole pairs"),
    ],
)
def test_mistakes(kwargs, text):
    with pytest.raises(ValueError, match=text):
        draw(**kwargs)
