"""Factors of a weight against closed forms: split, combine, layers in every mode, optimizer state, speed, memory."""

from __future__ import annotations

import copy
import time
from functools import partial

import pytest
import torch
from torch import nn

from networks.ab_factors import (
    ABFactor,
    Factors,
    combine,
    decompose,
    divergence,
    num_kept,
    project_state,
    saves,
    scale_to,
    split,
    with_spectrum,
)
from networks.tall_view import tall_shape, to_tall

# Layer, input.
LAYERS = {
    "linear_tall": (partial(nn.Linear, 24, 40), (5, 24)),
    "linear_wide": (partial(nn.Linear, 40, 24), (2, 3, 40)),
    "linear_without_bias": (partial(nn.Linear, 24, 24, bias=False), (5, 24)),
    "conv1d": (partial(nn.Conv1d, 6, 30, 3, stride=2, padding=1), (2, 6, 11)),
    "conv2d_tall": (partial(nn.Conv2d, 3, 48, 3, padding=1), (2, 3, 7, 6)),
    "conv2d_wide": (partial(nn.Conv2d, 16, 20, (3, 2), stride=(1, 2), dilation=(2, 1)), (2, 16, 9, 8)),
    "conv2d_reflect": (partial(nn.Conv2d, 4, 40, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "conv2d_1x1": (partial(nn.Conv2d, 32, 20, 1), (2, 32, 4, 4)),
    "conv2d_grouped": (partial(nn.Conv2d, 16, 32, 3, groups=4), (2, 16, 6, 6)),
    "conv3d": (partial(nn.Conv3d, 4, 18, 3, padding=1, bias=False), (1, 4, 4, 5, 4)),
}


def _layer(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    make, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(1)
    layer = make().to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return layer, torch.randn(shape, generator=generator, dtype=dtype)


def _matrix(m: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------- acceptance 1: no cutoff


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_split_without_a_cutoff_changes_nothing(name, side):
    layer, x = _layer(name)
    weight, y = layer.weight.detach().clone(), layer(x).detach()
    parts = decompose(layer.weight)
    rank = num_kept(parts.sigma, cutoff=0.0)
    assert rank == min(tall_shape(weight.shape))
    ab = ABFactor(layer, "weight")
    ab.factorize(split(parts, rank), side)
    assert (layer.weight - weight).abs().max() < 1e-6
    assert (layer(x) - y).abs().max() < 1e-5
    ab.detach()
    assert (layer.weight - weight).abs().max() < 1e-6
    assert (layer(x) - y).abs().max() < 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_the_factored_forward_is_that_of_the_product(name):
    """At a rank where the layer computes with the factors, which the test above does not reach."""
    layer, x = _layer(name, torch.float64)
    plain = copy.deepcopy(layer)
    ab = ABFactor(layer, "weight")
    ab.factorize(split(decompose(layer.weight), 2), "a")
    assert saves(ab.shape, ab.rank)
    with torch.no_grad():
        plain.weight.copy_(ab.product())
    assert torch.allclose(layer(x), plain(x), atol=1e-12)


def test_linear_layers_do_not_build_the_weight(monkeypatch):
    layer, x = _layer("linear_tall")
    ab = ABFactor(layer, "weight")
    ab.factorize(split(decompose(layer.weight), 2), "a")
    monkeypatch.setattr(ABFactor, "product", lambda self: pytest.fail("the weight was built"))
    layer(x)
    conv, x = _layer("conv2d_wide")
    ABFactor(conv, "weight").factorize(Factors(torch.zeros(96, 2), torch.zeros(2, 20)), "b")
    conv(x)


def test_attention_and_embeddings_read_the_product():
    torch.manual_seed(0)
    attention, table = nn.MultiheadAttention(16, 4, batch_first=True), nn.Embedding(30, 16)
    tokens = torch.randint(30, (2, 5))
    before = attention(*[table(tokens)] * 3)[0].detach()
    abs_ = [ABFactor(attention, "in_proj_weight"), ABFactor(attention.out_proj, "weight"), ABFactor(table, "weight")]
    for ab in abs_:
        ab.factorize(split(decompose(ab.weight), 16), "b")
    after = attention(*[table(tokens)] * 3)[0]
    assert torch.allclose(after, before, atol=1e-5)
    after.square().sum().backward()
    assert all(ab.b.grad.abs().max() > 0 and ab.a.grad is None for ab in abs_)
    attention.eval(), table.eval()
    with torch.no_grad():  # torch's fast path reads the weights in its own way
        assert torch.allclose(attention(*[table(tokens)] * 3)[0], before, atol=1e-5)


def test_a_forward_of_ones_own_is_respected():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = Doubled(20, 30), torch.ones(1, 20)
    ab = ABFactor(layer, "weight")
    ab.factorize(split(decompose(layer.weight), 3), "a")
    assert torch.allclose(layer(x), 2 * nn.functional.linear(x, ab.product(), layer.bias))


# --------------------------------------------------------------------------------------------- acceptance 2: cutoff


@pytest.mark.parametrize("cutoff", [0.0, 0.15, 0.6, 0.99])
@pytest.mark.parametrize("name", ["linear_wide", "conv2d_tall", "conv2d_grouped"])
def test_the_error_of_a_cutoff_is_what_it_dropped(name, cutoff):
    weight = _layer(name, torch.float64)[0].weight
    sigma = torch.linalg.svdvals(to_tall(weight.detach())[0])
    parts = decompose(weight)
    rank = num_kept(parts.sigma, cutoff)
    assert rank == sum(s > cutoff * sigma[0] for s in sigma.tolist())
    a, b = split(parts, rank)
    error = (to_tall(weight)[0] - a @ b).square().sum()
    assert error.item() == pytest.approx(sigma[rank:].square().sum().item(), rel=1e-5, abs=1e-20)
    assert torch.allclose(a.T @ a, b @ b.T), "singular values are shared equally"


def test_ranks_fall_no_faster_than_allowed_and_a_zero_weight_keeps_its_rank():
    sigma = torch.tensor([1.0, 0.01, 0.01, 0.01])
    assert num_kept(sigma, 0.15) == 1
    assert num_kept(sigma, 0.15, max_drop=0.5) == 2
    assert num_kept(sigma, 0.15, before=2, max_drop=0.5) == 1
    assert num_kept(sigma, 0.15, before=3, max_drop=0.0) == 3
    assert num_kept(torch.zeros(4), 0.15) == 4


def test_a_weight_that_is_not_finite_is_named():
    weight = torch.eye(4)
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"net\.2\.weight holds values that are not finite"):
        decompose(weight, "net.2.weight")


def test_all_singular_values_for_the_trained_factor():
    parts = decompose(_matrix(9, 6, 0))
    root = parts.sigma[:4].sqrt()
    start = split(parts, 4)
    for trained, orthonormal in (("a", lambda f: f.b @ f.b.T), ("b", lambda f: f.a.T @ f.a)):
        scaled = scale_to(start, root, trained)
        assert torch.allclose(scaled.a @ scaled.b, start.a @ start.b)
        assert torch.allclose(orthonormal(scaled), torch.eye(4, dtype=torch.float64))


# ---------------------------------------------------------------------------------- acceptance 3: modes, serial part


def test_the_identities_of_the_combinations():
    m, n, r, copies = 12, 9, 4, 3
    start = Factors(_matrix(m, r, 0), _matrix(r, n, 1))
    of_a = [start.a + 0.3 * _matrix(m, r, 10 + i) for i in range(copies)]
    of_b = [start.b + 0.3 * _matrix(r, n, 20 + i) for i in range(copies)]
    a, b = sum(of_a) / copies, sum(of_b) / copies
    da, db, w0 = a - start.a, b - start.b, start.a @ start.b
    # The definitions, with every copy of every rank written out.
    every_a, every_b = of_a + [start.a] * copies, [start.b] * copies + of_b
    products = [*(x @ start.b for x in of_a), *(start.a @ y for y in of_b)]
    definitions = {
        "with-stale": (sum(every_a) / (2 * copies)) @ (sum(every_b) / (2 * copies)),
        "full": sum(products) / (2 * copies),
        "only-learned": a @ b,
        "only-b": start.a @ b,
    }
    got = {sync: combine(sync, start, a, b) for sync in definitions}
    for sync, expected in definitions.items():
        assert (got[sync] - expected).abs().max() < 1e-10, sync
    assert (got["with-stale"] - got["full"] - da @ db / 4).abs().max() < 1e-10
    assert (got["only-learned"] - w0 - da @ start.b - start.a @ db - da @ db).abs().max() < 1e-10
    assert (got["full"] - w0 - (da @ start.b + start.a @ db) / 2).abs().max() < 1e-10
    with pytest.raises(ValueError, match=r"strategy\.sync='mean'"):
        combine("mean", start, a, b)


def test_the_mean_of_a_is_the_mean_of_the_weights():
    """No error of federated low-rank averaging: groups that train the same factor share the other one."""
    start = Factors(_matrix(8, 3, 0), _matrix(3, 5, 1))
    copies = [start.a + _matrix(8, 3, 5 + i) for i in range(4)]
    mean_of_weights = sum(a @ start.b for a in copies) / 4
    assert (combine("only-learned", start, sum(copies) / 4, start.b) - mean_of_weights).abs().max() < 1e-12


def test_divergence_is_that_of_the_products():
    start = Factors(_matrix(12, 4, 0), _matrix(4, 9, 1))
    a, b = start.a + _matrix(12, 4, 2), start.b + _matrix(4, 9, 3)
    left, right = (a - start.a) @ start.b, start.a @ (b - start.b)
    expected = [(left * right).sum(), (left * left).sum(), (right * right).sum(), (start.a @ start.b).square().sum()]
    assert list(divergence(start, a, b)) == pytest.approx([e.item() for e in expected], rel=1e-10)


# ---------------------------------------------------------------------------------------- acceptance 4: gradients


@pytest.mark.parametrize("rank", [2, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_follow_the_chain_rule(name, rank):
    layer, x = _layer(name, torch.float64)
    ab = ABFactor(layer, "weight")
    rank = min(rank, min(tall_shape(ab.shape)))
    start = split(decompose(layer.weight), rank)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        matrix = start.a @ start.b
        plain.weight.copy_((matrix.T if ab.transposed else matrix).reshape(ab.shape))
    plain(x).square().sum().backward()
    gradient, _ = to_tall(plain.weight.grad)
    expected = {"a": gradient @ start.b.T, "b": start.a.T @ gradient}
    for side in ("a", "b"):
        ab.factorize(start, side)
        layer(x).square().sum().backward()
        assert torch.allclose(ab.trained.grad, expected[side], rtol=1e-5, atol=1e-10)
        assert (ab.b if side == "a" else ab.a).grad is None
        ab.detach()


# ------------------------------------------------------------------------------------------------ layers and modules


def test_a_module_is_the_same_before_and_after():
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20))
    names, weight, kind = [n for n, _ in net.named_parameters()], net[0].weight, type(net[0])
    ab = ABFactor(net[0], "weight", "0.weight")
    assert ab.mode == "full"
    ab.factorize(split(decompose(weight), 4), "b")
    assert ab.mode == "b" and isinstance(net[0], nn.Linear) and weight.numel() == 0
    factored = [n for n, _ in net.named_parameters()]
    assert factored == ["0.weight_a", "0.weight_b", *names[1:]], "in the place of the weight"
    assert [p.requires_grad for p in net[0].parameters()] == [False, True, True]
    a, b = ab.detach()
    assert [n for n, _ in net.named_parameters()] == names
    assert net[0].weight is weight and type(net[0]) is kind and "_ab_factors" not in net[0].__dict__
    ab.attach(a, b)
    assert net[0].weight_a is a and net[0].weight_b is b
    ab.detach(torch.zeros(30, 20))
    assert weight.abs().max() == 0 and weight.shape == (30, 20)


def test_two_weights_of_one_module_come_and_go_independently():
    attention = nn.MultiheadAttention(16, 4, kdim=20, vdim=24)
    names = [n for n, _ in attention.named_parameters()]
    first, second = (ABFactor(attention, name) for name in ("q_proj_weight", "v_proj_weight"))
    for ab in (first, second):
        ab.factorize(split(decompose(ab.weight), 3), "a")
    first.detach()
    assert attention.q_proj_weight is first.weight and attention.v_proj_weight.shape == (16, 24)
    second.detach()
    assert type(attention) is nn.MultiheadAttention and [n for n, _ in attention.named_parameters()] == names


def test_copies_of_a_factored_module_are_independent():
    layer, x = _layer("linear_tall")
    ABFactor(layer, "weight").factorize(split(decompose(layer.weight), 3), "a")
    other = copy.deepcopy(layer)
    before = layer(x).detach()
    with torch.no_grad():
        other.weight_a.zero_()
    assert torch.equal(layer(x), before) and torch.equal(other(x), other.bias.expand(5, -1))


# --------------------------------------------------------------------------------------------------------- beginnings


def test_spectra():
    weight = nn.Conv2d(4, 20, 3).weight.detach()
    sigma = torch.linalg.svdvals(weight.flatten(1))
    for init, expected in {
        "ortho-sigma": torch.ones(20),
        "sloped-sigma": 2 * sigma[0] * 0.1 ** torch.arange(20),
        "unified": sigma,
    }.items():
        new = with_spectrum(weight, init)
        assert new.shape == weight.shape
        assert torch.allclose(torch.linalg.svdvals(new.flatten(1)), expected, atol=1e-5)
    drawn = [with_spectrum(weight, "rand-sigma", torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.linalg.svdvals(drawn[0].flatten(1))[0] <= sigma[0] * (1 + 1e-5)
    with pytest.raises(ValueError, match=r"strategy\.init='ortho'"):
        with_spectrum(weight, "ortho")


# ----------------------------------------------------------------------------------------------------- optimizer state


@pytest.mark.parametrize("side", ["a", "b"])
def test_projected_first_moments_are_those_of_training_the_factor(side):
    """With frozen values, momentum of the factor's gradient equals the projected momentum of the weight's."""
    layer, _ = _layer("linear_wide", torch.float64)
    inputs = [torch.randn(6, 40, dtype=torch.float64) for _ in range(5)]
    ab = ABFactor(layer, "weight")
    start = split(decompose(layer.weight), 24)
    optimizer = torch.optim.Adam([layer.weight], lr=0.0)
    for x in inputs:
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    projected = project_state(optimizer.state[layer.weight], ab.shape, start, side)
    ab.factorize(start, side)
    optimizer = torch.optim.Adam([ab.trained], lr=0.0)
    for x in inputs:
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    own = optimizer.state[ab.trained]
    assert torch.allclose(projected["exp_avg"], own["exp_avg"], rtol=1e-9, atol=1e-12)
    assert projected["step"] == own["step"] == 5
    assert projected["exp_avg_sq"].shape == own["exp_avg_sq"].shape and projected["exp_avg_sq"].min() >= 0


def test_projected_second_moments_are_right_for_independent_entries():
    generator = torch.Generator().manual_seed(0)
    start = Factors(_matrix(6, 3, 1), _matrix(3, 5, 2))
    scale = _matrix(6, 5, 3).abs() + 0.1
    gradients = scale * torch.randn(20000, 6, 5, generator=generator, dtype=torch.float64)
    moved = project_state({"exp_avg_sq": scale.square()}, (6, 5), start, "a")["exp_avg_sq"]
    measured = (gradients @ start.b.T).square().mean(0)
    assert torch.allclose(moved, measured, rtol=0.1)


def test_a_state_of_unknown_meaning_is_refused():
    with pytest.raises(ValueError, match=r"'hessian': use hold or reset"):
        project_state({"hessian": torch.ones(6, 5)}, (6, 5), Factors(torch.ones(6, 1), torch.ones(1, 5)), "a")


# ---------------------------------------------------------------------------------------- acceptance 9, 10: cost


def test_a_factored_step_takes_less_than_half_the_time():
    """Linear 1024x1024, batch 512, r = 128: at most 0.4 of the dense layer's time, 0.35 of the built product's."""
    torch.manual_seed(0)
    x = torch.randn(512, 1024)
    factored, dense, built = nn.Linear(1024, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 1024)
    for layer in (factored, built):
        ABFactor(layer, "weight").factorize(split(decompose(layer.weight), 128), "a")

    def step(kind: str) -> float:
        inputs = x.detach().requires_grad_()
        begin = time.process_time()
        match kind:
            case "factored":
                y = factored(inputs)
            case "dense":
                y = dense(inputs)
            case "built":
                y = nn.functional.linear(inputs, built.weight, built.bias)
        y.sum().backward()
        return time.process_time() - begin

    times: dict[str, list[float]] = {"factored": [], "dense": [], "built": []}
    for _ in range(7):  # in turns, so that a busy machine is as busy for each
        for kind, seconds in times.items():
            seconds.append(step(kind))
    best = {kind: min(seconds) for kind, seconds in times.items()}
    assert best["factored"] <= 0.4 * best["dense"], best
    assert best["factored"] <= 0.35 * best["built"], best


def test_training_does_not_change_the_factors_at_the_split():
    layer, _x = _layer("linear_tall", torch.float64)
    ab = ABFactor(layer, "weight")
    start = split(decompose(layer.weight), 3)
    kept = [f.clone() for f in start]
    ab.factorize(start, "a")
    with torch.no_grad():
        ab.a.add_(1.0)
        ab.b.add_(1.0)
    assert all(torch.equal(f, k) for f, k in zip(start, kept, strict=True))
