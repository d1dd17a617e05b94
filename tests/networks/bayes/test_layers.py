"""Bayesian layers against plain ones with the sampled weights, estimators, masks, dropout by samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from networks.bayes import (
    BayesConv1d,
    BayesConv2d,
    BayesConv3d,
    BayesLinear,
    Init,
    MCDropout,
    Prior,
    SampleContext,
    gaussian_kl,
    kl_divergence,
    layers,
)

F64, S, B = torch.float64, 3, 4
WIDE = Init(sigma_scale=1.0)
CONV2D = {
    "plain": {},
    "strided": {"stride": 2, "padding": (1, 2)},
    "same": {"padding": "same", "dilation": 2},
    "grouped": {"groups": 2, "padding": 1},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": "same", "padding_mode": "circular"},
    "no_bias": {"bias": False},
}
CASES = {
    "linear": lambda: (BayesLinear(6, 5, init=WIDE, dtype=F64), (6,)),
    "linear_no_bias": lambda: (BayesLinear(6, 5, bias=False, init=WIDE, dtype=F64), (6,)),
    "linear_on_tokens": lambda: (BayesLinear(6, 5, init=WIDE, dtype=F64), (2, 3, 6)),
    "linear_to_one": lambda: (BayesLinear(6, 1, init=WIDE, dtype=F64), (6,)),
    "linear_large": lambda: (BayesLinear(96, 90, init=WIDE, dtype=F64), (96,)),  # gradients sample by sample
    "conv1d": lambda: (BayesConv1d(4, 6, 3, padding=1, init=WIDE, dtype=F64), (4, 7)),
    "conv3d": lambda: (BayesConv3d(2, 3, (1, 2, 3), init=WIDE, dtype=F64), (2, 3, 4, 5)),
} | {
    f"conv2d_{name}": lambda options=options: (BayesConv2d(4, 6, 3, init=WIDE, dtype=F64, **options), (4, 8, 7))
    for name, options in CONV2D.items()
}


def case(name):
    """A layer, inputs of B items, and of S samples of them."""
    torch.manual_seed(1)
    layer, shape = CASES[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer, torch.randn(B, *shape, dtype=F64), torch.randn(S * B, *shape, dtype=F64)


def context(samples=S, items=B, **kwargs):
    return SampleContext(range(samples), samples, batch=items, **kwargs)


def plain(layer, x, weight, bias):
    """The map of the layer with one weight, by torch's module."""
    if isinstance(layer, BayesLinear):
        return F.linear(x, weight, bias)
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[layer.dimensions]
    module = kind(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        layer.groups, bias is not None, layer.padding_mode, dtype=F64,
    )  # fmt: skip
    parameters = {"weight": weight} | ({} if bias is None else {"bias": bias})
    return torch.func.functional_call(module, parameters, x)


def noise_of(layer, samples=S):
    """Noise of the layer's weight and bias as a single draw gives it."""
    with context(samples) as drawn:
        return layer._noise(drawn)


# ------------------------------------------------------------------------------------------------- explicit weights


@pytest.mark.parametrize("folded", [False, True], ids=["shared", "folded"])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_the_plain_one_with_the_weights_of_each_sample(name, folded):
    layer, shared, by_sample = case(name)
    x = (by_sample if folded else shared).requires_grad_()
    with context():
        found = layer(x)
    noise, bias_noise = noise_of(layer)
    outputs = []
    for s in range(S):
        weight = layer.weight_mu + layer.weight_log_sigma.exp() * noise[s]
        bias = None if layer.bias_mu is None else layer.bias_mu + layer.bias_log_sigma.exp() * bias_noise[s]
        outputs.append(plain(layer, x[s * B : (s + 1) * B] if folded else x, weight, bias))
    expected = torch.cat(outputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, *layer.parameters()], slope)
    for gradient, other in zip(torch.autograd.grad(found, [x, *layer.parameters()], slope), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-11, atol=1e-11)


def test_the_weights_of_samples_have_the_means_and_deviations_of_the_layer():
    layer, *_ = case("linear")
    with context(4000) as drawn, torch.no_grad():
        for sampled, mu, log_sigma in zip(
            layer.sample(drawn), (layer.weight_mu, layer.bias_mu), (layer.weight_log_sigma, layer.bias_log_sigma),
            strict=True,
        ):  # fmt: skip
            sigma = log_sigma.exp()
            assert ((sampled.mean(0) - mu).abs() < 4.5 * sigma / math.sqrt(4000)).all()
            assert ((sampled.var(0) / sigma.square() - 1).abs() < 4.5 * math.sqrt(2 / 4000)).all()


def test_both_ways_to_sum_gradients_agree(monkeypatch):
    layer, x, _ = case("linear_large")
    found = []
    for limit in (0, 1 << 30):
        monkeypatch.setattr(layers, "_LARGE", limit)
        with context():
            found.append(torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["linear", "conv2d_plain"])
def test_without_samples_the_means_are_used_in_evaluation_alone(name):
    layer, x, _ = case(name)
    with pytest.raises(RuntimeError, match=rf"{type(layer).__name__} was called in training without weight samples"):
        layer(x)
    torch.testing.assert_close(layer.eval()(x), plain(layer, x, layer.weight_mu, layer.bias_mu))


def test_layers_draw_in_the_order_of_their_calls():
    torch.manual_seed(0)
    net = nn.Sequential(BayesLinear(6, 6, init=WIDE), BayesLinear(6, 6, init=WIDE))
    net[1].load_state_dict(net[0].state_dict())
    with context() as drawn:
        first, second = (layer.sample(drawn)[0] for layer in net)
    assert (first != second).all()


def test_initial_values_follow_the_layer():
    layer = BayesConv2d(4, 6, 3, groups=2, init=Init(sigma_scale=0.5))
    assert layer.fan_in == 18 and layer.weight_mu.abs().max() <= 1 / math.sqrt(18)
    torch.testing.assert_close(layer.weight_sigma(), torch.full((6, 2, 3, 3), 0.5 / math.sqrt(54)))
    torch.testing.assert_close(layer.bias_log_sigma.exp(), torch.full((6,), 0.5 / math.sqrt(18)))
    before = layer.weight_mu.clone()
    layer.reset_parameters(Init(mu="keep"))  # nothing to keep: drawn anew
    assert (layer.weight_mu != before).all() and layer.weight_sigma().max() < 0.01


@pytest.mark.parametrize("rescale", [False, True])
def test_divergence_of_a_layer(rescale):
    prior = Prior(0.1, 0.7, rescale)
    layer, other = (BayesLinear(6, 5, prior=p, init=WIDE) for p in (prior, Prior()))
    other.load_state_dict(layer.state_dict())
    factor = 1 / math.sqrt(18) if rescale else 1.0
    tensors = ((layer.weight_mu, layer.weight_log_sigma), (layer.bias_mu, layer.bias_log_sigma))
    expected = sum(gaussian_kl(*t, 0.1 * factor, 0.7 * factor) for t in tensors)
    torch.testing.assert_close(layer.kl(), expected)
    torch.testing.assert_close(other.kl(prior), expected)
    assert not torch.allclose(other.kl(), expected)


# ------------------------------------------------------------------------------------------------------- estimators


def outputs(layer, x, estimator, samples, **kwargs):
    """(sample, item, ...) of many samples."""
    with torch.no_grad(), SampleContext(range(samples), samples, batch=len(x), estimator=estimator, **kwargs):
        return layer(x).unflatten(0, (samples, len(x)))


@pytest.mark.parametrize("estimator", ["weight", "flipout", "lrt"])
@pytest.mark.parametrize("name", ["linear", "linear_on_tokens", "conv2d_strided", "conv2d_grouped"])
def test_estimators_have_the_same_means_and_variances(name, estimator):
    """Acceptance 8: against closed forms, for every output of every item, within 4 standard errors.

    There are up to 480 outputs: of six seeds, two have an outlier beyond 4.4 among some 6,000 scores, as chance would.
    """
    number = 2500
    layer, x, _ = case(name)
    found = outputs(layer, x, estimator, number, allow_shared_lrt=True, seed=1).flatten(1)
    mean = plain(layer, x, layer.weight_mu, layer.bias_mu).flatten()
    variance = plain(layer, x**2, layer.weight_sigma() ** 2, (2 * layer.bias_log_sigma).exp()).flatten().detach()
    scores = (found.mean(0) - mean) / (variance / number).sqrt()
    spread = (found.var(0) / variance - 1) / math.sqrt(2 / number)
    assert scores.abs().max() < 4 and spread.abs().max() < 4
    assert abs(scores.mean()) < 1.0 and 0.3 < scores.std() < 1.7


def test_items_of_a_sample_are_correlated_by_explicit_weights_alone():
    layer, x, _ = case("linear")
    x = x[:1].repeat(2, 1)  # twice the same item
    correlation = {}
    for estimator in ("weight", "flipout", "lrt"):
        found = outputs(layer, x, estimator, 4000)[:, :, 0]
        correlation[estimator] = torch.corrcoef(found.T)[0, 1].item()
    assert correlation["weight"] == pytest.approx(1.0)
    # What flipout leaves is the bias, whose sign does not flip.
    of_bias = (2 * layer.bias_log_sigma[0]).exp() / (
        (2 * layer.bias_log_sigma[0]).exp() + x[0] ** 2 @ layer.weight_sigma()[0] ** 2
    )
    assert correlation["flipout"] == pytest.approx(of_bias.item(), abs=0.07)
    assert abs(correlation["lrt"]) < 0.07


@pytest.mark.parametrize("name", ["linear", "linear_on_tokens", "conv2d_plain"])
@pytest.mark.parametrize("estimator", ["weight", "flipout", "lrt"])
def test_estimators_keep_samples_apart(name, estimator):
    """Outputs of a sample do not depend on what other samples are fed, or on whether they are here at all."""
    layer, shared, folded = case(name)
    options = {"estimator": estimator, "allow_shared_lrt": True}
    with context(**options):
        whole = layer(folded)
        from_shared = layer.eval()(shared)
    with SampleContext([1], S, batch=B, **options):
        torch.testing.assert_close(layer(folded[B : 2 * B]), whole[B : 2 * B])
    with context(**options):
        layer(folded)
        torch.testing.assert_close(layer(shared.repeat(S, *(1,) * (shared.ndim - 1))), from_shared)


@pytest.mark.parametrize("estimator", ["flipout", "lrt"])
def test_antithetic_pairs_mirror_each_other(estimator):
    layer, x, _ = case("linear")
    found = outputs(layer, x, estimator, 4, antithetic=True)
    mean = F.linear(x, layer.weight_mu, layer.bias_mu)
    torch.testing.assert_close(found[0::2] - mean, mean - found[1::2])
    assert (found[0] - mean).abs().min() > 0


@pytest.mark.parametrize("estimator", ["flipout", "lrt"])
def test_gradients_of_estimators(estimator):
    torch.manual_seed(2)
    layer, x = BayesLinear(3, 2, init=WIDE, dtype=F64), torch.randn(2, 3, dtype=F64, requires_grad=True)

    def run(x, *_):
        with SampleContext(range(2), 2, batch=2, estimator=estimator):
            return layer(x)

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@pytest.mark.parametrize("name", ["linear_on_tokens", "conv2d_plain"])
def test_random_outputs_are_refused_where_weights_are_shared(name):
    """Acceptance 16."""
    layer, shared, folded = case(name)
    for x in (shared, folded):
        with (
            context(estimator="lrt"),
            pytest.raises(ValueError, match=r"model\.estimator=lrt: Bayes.*allow_shared_lrt"),
        ):
            layer(x)
        with context(estimator="lrt", allow_shared_lrt=True):
            assert len(layer(x)) == S * B


def test_channels_folded_into_the_batch_share_weights_too():
    layer, _, folded = case("linear")
    with SampleContext(range(S), S, batch=2, expanded=True, estimator="lrt"), pytest.raises(ValueError, match="lrt"):
        layer(folded)  # 4 rows of each sample, 2 items
    one = BayesConv2d(6, 5, 1)
    with context(estimator="lrt"):
        assert one(torch.randn(B, 6, 1, 1)).shape == (S * B, 5, 1, 1)  # used once for each item


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["weight", "flipout", "lrt"])
def test_autocast_keeps_deviations_and_gradients(dtype, estimator):
    """Squares of small deviations are below what 16 bits hold."""
    torch.manual_seed(0)
    layer = BayesLinear(64, 32, init=Init(sigma_scale=1e-3))
    x = torch.randn(16, 64)
    with torch.autocast("cpu", dtype), SampleContext(range(8), 8, batch=16, estimator=estimator):
        out = layer(x)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    exact = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    with SampleContext(range(8), 8, batch=16, estimator=estimator):
        layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        assert exact[name].isfinite().all() and exact[name].dtype == torch.float32
        if name.endswith("_mu"):
            assert (exact[name] - p.grad).norm() / p.grad.norm() < 0.02, name
    if estimator == "lrt":
        variance = layer._output_variance(x.to(dtype))
        assert variance.dtype == torch.float32
        torch.testing.assert_close(variance, layer._output_variance(x), rtol=0.02, atol=0)


@pytest.mark.parametrize("estimator", ["weight", "flipout", "lrt"])
def test_parameters_of_16_bits(estimator):
    layer = BayesLinear(8, 4, init=WIDE, dtype=torch.bfloat16)
    with context(estimator=estimator):
        out = layer(torch.randn(B, 8, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.shape == (S * B, 4)
    out.float().sum().backward()
    assert layer.weight_log_sigma.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("estimator", ["weight", "flipout", "lrt"])
@pytest.mark.parametrize("name", ["linear", "conv2d_plain"])
def test_pruned_weights_are_zero_in_every_sample(name, estimator):
    layer, x, _ = case(name)
    options = {"estimator": estimator, "allow_shared_lrt": True}
    with torch.no_grad():
        layer.weight_mu[0], layer.weight_log_sigma[0] = math.nan, math.inf  # whatever they are
    layer.weight_mask = torch.ones_like(layer.weight_mu, dtype=torch.bool)
    layer.weight_mask[0] = False
    with context(**options):
        out = layer(x)
    rest = out.unflatten(0, (S, B))
    bias_only = rest[:, :, 0]
    if estimator == "weight":
        assert (bias_only.flatten(1) == bias_only.flatten(1)[:, :1]).all()  # the bias of the sample, nothing else
    assert out.isfinite().all()
    (out.sum() + layer.kl()).backward()
    for parameter in (layer.weight_mu, layer.weight_log_sigma):
        assert (parameter.grad[0] == 0).all() and (parameter.grad[1:] != 0).any() and parameter.grad.isfinite().all()
    assert (layer.mean_weight()[0] == 0).all() and (layer.weight_sigma()[0] == 0).all()
    alive = ((layer.weight_mu[1:], layer.weight_log_sigma[1:]), (layer.bias_mu, layer.bias_log_sigma))
    expected = sum(gaussian_kl(*t, 0.0, 1.0) for t in alive)
    torch.testing.assert_close(kl_divergence(layer), expected)


def test_weights_that_are_alive_keep_their_noise_when_others_are_pruned():
    layer, *_ = case("linear")
    with context() as drawn:
        before = layer.sample(drawn)[0]
    layer.weight_mask = torch.rand(5, 6) > 0.5
    with context() as drawn:
        after = layer.sample(drawn)[0]
    assert torch.equal(after[:, layer.weight_mask], before[:, layer.weight_mask])
    assert (after[:, ~layer.weight_mask] == 0).all()


def test_masks_can_change_after_an_evaluation():
    """A state that was loaded in inference mode leaves no tensors of that mode behind."""
    layer = BayesLinear(6, 5)
    layer.weight_mask = torch.ones(5, 6, dtype=torch.bool)
    with torch.inference_mode():
        layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()})
        other = BayesLinear(6, 5)
        other.load_state_dict(layer.state_dict())
    layer.weight_mask.copy_(torch.zeros(5, 6, dtype=torch.bool))
    assert not layer.weight_mask.any() and not other.weight_mask.is_inference()


def test_masks_are_part_of_the_state():
    layer, *_ = case("linear")
    dense = {name: value.clone() for name, value in layer.state_dict().items()}
    assert "weight_mask" not in dense
    layer.weight_mask = torch.rand(5, 6) > 0.5
    other = BayesLinear(6, 5, dtype=F64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight_mask, layer.weight_mask) and torch.equal(other.weight_mu, layer.weight_mu)
    other.load_state_dict(dense)
    assert other.weight_mask is None
    holder = nn.Sequential(nn.ReLU(), BayesLinear(6, 5, dtype=F64))
    holder.load_state_dict({f"1.{name}": value for name, value in layer.state_dict().items()})
    assert torch.equal(holder[1].weight_mask, layer.weight_mask)


# ----------------------------------------------------------------------------------------------------------- dropout


def dropped(layer, x, samples=S, items=B, **kwargs):
    with SampleContext(range(samples), samples, batch=items, **kwargs):
        return layer(x).unflatten(0, (samples, -1))


def test_a_sample_is_one_mask():
    layer, x = MCDropout(0.4), torch.ones(B, 50)
    for layer_ in (layer.train(), layer.eval()):
        found = dropped(layer_, x)
        assert (found == found[:, :1]).all() and (found[0] != found[1]).any()
        torch.testing.assert_close(found.unique(), torch.tensor([0.0, 1 / 0.6]))
    assert torch.equal(dropped(layer, x.repeat(S, 1)), dropped(layer, x))


def test_items_may_have_masks_of_their_own_in_training():
    layer, x = MCDropout(0.4, per_item=True), torch.ones(B, 50)
    found = dropped(layer, x)
    assert (found[:, 0] != found[:, 1]).any() and (found[0] != found[1]).any()
    part = dropped(layer, x[:2], items=2, rows=(1, 2))
    assert torch.equal(part, found[:, 1::2])
    evaluated = dropped(layer.eval(), x)
    assert (evaluated == evaluated[:, :1]).all()


@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize(("dimensions", "shape"), [(0, (3, 4)), (1, (6, 4)), (2, (6, 4, 4)), (3, (6, 2, 4, 4))])
def test_trailing_dimensions_share_a_mask(dimensions, shape, per_item):
    found = dropped(MCDropout(0.5, dimensions, per_item), torch.ones(B, *shape))
    assert found.shape == (S, B, *shape)
    by_unit = found.flatten(2 + len(shape) - dimensions) if dimensions else found.unsqueeze(-1)
    assert (by_unit == by_unit[..., :1]).all() and by_unit[..., 0].unique().numel() == 2


def test_masks_of_training_alone():
    layer, x = MCDropout(0.4, in_evaluation=False), torch.ones(B, 50)
    assert (dropped(layer, x) == 0).any()
    with context():
        assert layer.eval()(x) is x


def test_dropout_keeps_the_mean():
    x, number = torch.linspace(-1, 1, 40), 1500
    found = dropped(MCDropout(0.25), x[None], number, 1)[:, 0]
    error = x.abs() * math.sqrt(0.25 / 0.75 / number)
    assert ((found.mean(0) - x).abs() <= 4 * error + 1e-7).all()
    kept = (found != 0).double().mean().item()
    assert abs(kept - 0.75) < 4 * math.sqrt(0.25 * 0.75 / found.numel())


def test_dropout_without_samples():
    x = torch.randn(B, 5)
    with pytest.raises(RuntimeError, match="MCDropout was called in training without samples"):
        MCDropout(0.5)(x)
    assert MCDropout(0.5).eval()(x) is x and MCDropout(0.0)(x) is x
    with context():
        assert MCDropout(0.0)(x) is x
    for p in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"dropout={p}: must be at least 0 and below 1"):
            MCDropout(p)


def test_layers_say_what_they_are():
    assert "in_features=6, out_features=5, bias=True" in repr(BayesLinear(6, 5))
    assert "4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), groups=2" in repr(BayesConv2d(4, 6, 3, groups=2))
    assert "p=0.5" in repr(MCDropout(0.5))
