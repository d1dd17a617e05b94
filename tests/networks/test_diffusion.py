import itertools
import math

import pytest
import torch

from networks.diffusion import T_MIN, Sampler, Schedule, antithetic_times, denoising_loss, sample
from networks.token_choice import Constraints, SpecialTokens

V, L = 8, 5
SPECIAL = SpecialTokens.last(V)
NAMES = ("quadratic", "linear", "cosine")
KINDS = ("remask", "confidence", "ancestral", "greedy")


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stacks(number: int, seed: int = 0) -> torch.Tensor:
    """Sequences of 1 to L - 1 layers."""
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, L, (number, 1), generator=g)
    tokens = torch.randint(0, V - 3, (number, L), generator=g)
    place = torch.arange(L)
    return torch.where(place < length, tokens, torch.where(place == length, SPECIAL.eos, SPECIAL.pad))


# ------------------------------------------------------------------------------------------------- schedule and times


@pytest.mark.parametrize("name", NAMES)
def test_schedules_rise_from_0_to_the_last_position(name):
    schedule, t = Schedule(name), torch.linspace(0, 1, 1001, dtype=torch.float64)
    rate = schedule.rate(t)
    assert rate[0] == 0 and rate[-1] == pytest.approx(1 - T_MIN, abs=1e-12) and (rate.diff() >= 0).all()
    t = t[1:].requires_grad_()
    (slope,) = torch.autograd.grad(schedule.rate(t).sum(), t)
    torch.testing.assert_close(schedule.slope(t), slope)


def test_the_published_schedule_is_quadratic():
    t = torch.tensor([0.3, 0.7])
    torch.testing.assert_close(Schedule().rate(t), (1 - 1e-3) * t**2)


def test_antithetic_times_are_spread_over_the_batch():
    count = 64
    t = antithetic_times(numbers(0, count), torch.arange(count), count)
    assert t.min() >= T_MIN and t.max() <= 1
    cells = ((t - T_MIN) / (1 - T_MIN) * count).floor().long()
    assert sorted(cells.tolist()) == list(range(count))


# --------------------------------------------------------------------------------------------------------------- loss


def test_losses_count_what_they_should():
    tokens, logits = stacks(40), torch.randn(40, L, V, dtype=torch.float64)
    t = numbers(1, 40).clamp(min=T_MIN)
    schedule = Schedule("cosine")
    masked = numbers(2, 40, L) < schedule.rate(t)[:, None]
    nll = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    layer = tokens != SPECIAL.pad
    found = {k: denoising_loss(logits, tokens, masked, t, schedule, k, SPECIAL.pad) for k in ("all", "masked", "elbo")}
    torch.testing.assert_close(found["all"].total / found["all"].weight, nll[layer].mean())
    torch.testing.assert_close(found["masked"].total / found["masked"].weight, nll[layer & masked].mean())
    weights = (schedule.slope(t) / schedule.rate(t))[:, None].expand(-1, L)
    expected = (nll * weights)[layer & masked].sum() / layer.sum()
    torch.testing.assert_close(found["elbo"].total / found["elbo"].weight, expected)
    torch.testing.assert_close(found["all"].nll, nll)
    assert torch.equal(found["masked"].counted, layer & masked)


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_of_a_uniform_guess_is_log_v(name):
    """E over t and masks of the weighted sum is L log V (1 - mask rate that is left out at both ends)."""
    number = 200_000
    tokens = stacks(number)
    t = antithetic_times(numbers(3, number), torch.arange(number), number)
    schedule = Schedule(name)
    masked = numbers(4, number, L) < schedule.rate(t)[:, None]
    logits = torch.zeros(number, L, V, dtype=torch.float64)
    terms = denoising_loss(logits, tokens, masked, t, schedule, "elbo", None)
    expected = math.log(V) * (schedule.rate(torch.ones(1)) - schedule.rate(torch.full((1,), T_MIN))).item()
    assert (terms.total / terms.weight).item() == pytest.approx(expected, rel=0.02)


def test_the_bound_is_tight_for_a_factorised_distribution():
    """Independent positions whose exact marginals the denoiser knows: bound = entropy = -E log p, for any schedule."""
    number = 100_000
    p = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.04, 0.03, 0.02, 0.01], dtype=torch.float64)
    tokens = torch.multinomial(p.expand(number, -1), L, True, generator=torch.Generator().manual_seed(0))
    t = antithetic_times(numbers(5, number), torch.arange(number), number)
    entropy = -(p * p.log()).sum().item()
    for name in NAMES:
        schedule = Schedule(name)
        masked = numbers(6, number, L) < schedule.rate(t)[:, None]
        terms = denoising_loss(p.log().expand(number, L, -1), tokens, masked, t, schedule, "elbo", None)
        assert (terms.total / terms.weight).item() == pytest.approx(entropy, rel=0.02)


# ----------------------------------------------------------------------------------------------------------- samplers


def draw(denoise, sampler, shape=(3, 40), constraints=None, record=None, seed=0, schedule="quadratic"):
    def uniform(step, purpose):
        return numbers(1000 * seed + 2 * step + purpose, *shape, L)

    table = (constraints or Constraints()).table(V, L, SPECIAL)
    return sample(denoise, uniform, table, SPECIAL, Schedule(schedule), sampler, shape, record)


def well_formed(tokens):
    eos = tokens == SPECIAL.eos
    place = torch.arange(L)
    end = torch.where(eos, place, L).amin(-1, keepdim=True)
    layers = (tokens < V - 3) | (place >= end)
    return (end < L).all() and layers.all() and (tokens[place.expand_as(tokens) > end] == SPECIAL.pad).all()


@pytest.mark.parametrize(
    ("kind", "steps", "published", "redraw"),
    [*itertools.product(KINDS, (1, 2, 7), (False, True), ("all", "masked"))],
)
def test_a_perfect_denoiser_gives_the_stack(kind, steps, published, redraw):
    """Whatever the sampler and the number of steps: so all samplers agree."""
    truth = stacks(3, seed=9)[:, None].expand(3, 40, L)

    def oracle(tokens, t):
        return torch.full((*tokens.shape, V), -30.0).scatter(-1, truth[..., None], 30.0)

    sampler = Sampler(kind, steps, published_times=published, redraw=redraw)
    assert torch.equal(draw(oracle, sampler), truth)


@pytest.mark.parametrize("redraw", ["all", "masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_well_formed_whatever_the_denoiser_says(kind, redraw):
    """Also where it likes MSK and PAD best; under constraints they hold."""

    def contrary(tokens, t):
        logits = 3 * torch.randn(*tokens.shape, V, generator=torch.Generator().manual_seed(int(1e6 * t)))
        logits[..., [SPECIAL.mask, SPECIAL.pad]] = 20.0
        return logits

    allowed = torch.ones(V, dtype=torch.bool)
    allowed[[0, 3]] = False
    for steps in (1, 3, 20):
        sampler = Sampler(kind, steps, 1.0, 1.0, redraw=redraw)
        free = draw(contrary, sampler, (5, 200))
        assert well_formed(free) and set(free.unique().tolist()) > {0, 3}
        bound = draw(contrary, sampler, (5, 200), Constraints(allowed, max_layers=3))
        layers = (bound < V - 3).sum(-1)
        assert well_formed(bound) and not set(bound.unique().tolist()) & {0, 3}
        assert layers.max() <= 3 and layers.min() >= 1
        forced = draw(contrary, sampler, (5, 200), Constraints(max_layers=3, min_layers=3))
        assert well_formed(forced) and ((forced < V - 3).sum(-1) == 3).all()


def uninformed(p):
    def denoise(tokens, t):
        return p.log().expand(*tokens.shape, V)

    return denoise


LAYER = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0])
END = torch.tensor([0.0, 0.2, 0.3, 0.4, 0.1])  # chance that EOS stands at a position


def posterior(tokens, t):
    """What is known of every position, given the visible ones: independent layers, EOS as above."""
    place = torch.arange(L)
    inside = (tokens != SPECIAL.mask) & (tokens != SPECIAL.pad)
    pads = tokens == SPECIAL.pad
    first_pad = torch.where(pads, place, L).amin(-1, keepdim=True)
    last_inside = torch.where(inside, place, -1).amax(-1, keepdim=True)
    weight = END * (place < first_pad) * (place > last_inside)
    left = weight.flip(-1).cumsum(-1).flip(-1)
    hazard = torch.where(left > 0, weight / left.clamp(min=1e-12), 0.0)
    logits = torch.zeros(*tokens.shape, V)
    logits[..., : V - 3] = (1 - hazard)[..., None] * LAYER
    logits[..., SPECIAL.eos] = hazard
    seen = (tokens != SPECIAL.mask)[..., None]
    return torch.where(seen, torch.nn.functional.one_hot(tokens, V).float(), logits).log()


@pytest.mark.parametrize("schedule", ["quadratic", "linear"])
@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize(("kind", "redraw"), [("ancestral", "masked"), ("remask", "masked"), ("remask", "all")])
def test_samples_have_the_distribution_that_the_denoiser_knows(kind, redraw, steps, schedule):
    """With the exact posterior of every position the samplers are exact, for any number of steps."""
    if redraw == "all" and steps > 1:
        pytest.skip("PAD is drawn anew, which only EOS decides")
    tokens = draw(posterior, Sampler(kind, steps, 1.0, 1.0, redraw=redraw), (10, 2000), schedule=schedule)
    length = (tokens < V - 3).sum(-1).flatten().bincount(minlength=L) / 20_000
    assert (length - END).abs().max() < 4 * math.sqrt(0.25 / 20_000)
    for place in range(3):
        layers = tokens[..., place][tokens[..., place] < V - 3]
        share = layers.bincount(minlength=V - 3) / len(layers)
        assert (share - LAYER).abs().max() < 4 * math.sqrt(0.25 / len(layers))


def test_masks_have_the_rate_of_the_time_that_follows():
    """A step sees what training shows at its time; as published it sees what the step before saw."""
    seen = {}

    def denoise(tokens, t):
        seen[t] = (tokens == SPECIAL.mask).double().mean().item()
        return torch.zeros(*tokens.shape, V)

    draw(denoise, Sampler("remask", 10, 1.0, 1.0), (20, 2000))
    times = list(seen)
    assert times[0] == 1 and seen[1] == 1
    for t in times[1:]:
        assert seen[t] == pytest.approx((1 - T_MIN) * t**2, abs=4 * math.sqrt(0.25 / 200_000))
    seen.clear()
    draw(denoise, Sampler("remask", 10, 1.0, 1.0, published_times=True), (20, 2000))
    times = list(seen)
    assert seen[times[1]] == pytest.approx(1 - T_MIN, abs=1e-3)  # the first step is thrown away
    for before, t in itertools.pairwise(times):
        assert seen[t] == pytest.approx((1 - T_MIN) * before**2, abs=4 * math.sqrt(0.25 / 200_000))


@pytest.mark.parametrize("kind", ["confidence", "ancestral"])
def test_kept_tokens_stay(kind):
    states = []

    def denoise(tokens, t):
        states.append(tokens)
        return torch.randn(*tokens.shape, V, generator=torch.Generator().manual_seed(len(states)))

    drawn = draw(denoise, Sampler(kind, L, 1.0, 1.0), schedule="linear")
    hidden = [(s == SPECIAL.mask).sum(-1) for s in states]
    assert [int(h.max()) for h in hidden] == [5, 4, 3, 2, 1]
    for before, after in itertools.pairwise([*states, drawn]):
        kept = before != SPECIAL.mask
        assert torch.equal(before[kept], after[kept])


def test_confidence_keeps_the_surest_first():
    order = []

    def denoise(tokens, t):
        order.append((tokens == SPECIAL.mask)[0, 0].tolist())
        logits = torch.zeros(*tokens.shape, V)
        for place, sure in enumerate([1.0, 4.0, 2.0, 3.0]):
            logits[..., place, 0] = sure
        logits[..., 4, SPECIAL.eos] = 0.5
        return logits

    draw(denoise, Sampler("confidence", 5, 0.0), (1, 1), schedule="linear")
    # The last position can only be EOS: it is sure.
    assert order[1:] == [
        [True, True, True, True, False],
        [True, False, True, True, False],
        [True, False, True, False, False],
        [True, False, False, False, False],
    ]


def test_steps_are_recorded():
    record = []
    drawn = draw(uninformed(torch.ones(V) / V), Sampler(steps=6), record=record)
    assert len(record) == 6 and torch.equal(record[-1], drawn) and all(well_formed(r) for r in record)


def test_wrong_settings_are_refused():
    for arguments, key in (({"kind": "x"}, "kind"), ({"steps": 0}, "steps"), ({"redraw": "some"}, "redraw")):
        with pytest.raises(ValueError, match=f"sampler.{key}="):
            Sampler(**arguments)
    with pytest.raises(ValueError, match="schedule='x'"):
        Schedule("x")
