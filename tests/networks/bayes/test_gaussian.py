"""Prior, initial values and divergence of Gaussian weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from networks.bayes import Init, Prior, gaussian_kl

F64 = torch.float64


def parameters(*shape, dtype=F64):
    generator = torch.Generator().manual_seed(1)
    mu, log_sigma = (torch.randn(*shape, generator=generator, dtype=F64).to(dtype) for _ in range(2))
    return mu.requires_grad_(), log_sigma.requires_grad_()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.3, 0.2)])
def test_divergence_is_that_of_torch_distributions(mean, std):
    mu, log_sigma = parameters(30, 7)
    expected = kl_divergence(Normal(mu, log_sigma.exp()), Normal(*torch.tensor([mean, std], dtype=F64))).sum()
    found = gaussian_kl(mu, log_sigma, mean, std)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    wanted = torch.autograd.grad(3 * expected, (mu, log_sigma))
    for gradient, other in zip(torch.autograd.grad(3 * found, (mu, log_sigma)), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda m, s: gaussian_kl(m, s, mean, std), (mu, log_sigma))


def test_a_posterior_that_is_the_prior_diverges_by_nothing():
    mu, log_sigma = torch.full((9,), 0.5, dtype=F64), torch.full((9,), math.log(2.0), dtype=F64)
    assert abs(gaussian_kl(mu, log_sigma, 0.5, 2.0).item()) < 1e-14


def test_pruned_weights_do_not_count_whatever_their_parameters_are():
    mu, log_sigma = parameters(6)
    mask = torch.tensor([True, False, True, False, True, False])
    with torch.no_grad():
        mu[1], log_sigma[3], log_sigma[5] = math.nan, -math.inf, 900.0
    found = gaussian_kl(mu, log_sigma, 0.0, 1.0, mask)
    expected = gaussian_kl(mu[mask], log_sigma[mask], 0.0, 1.0)
    scaled = gaussian_kl(mu, log_sigma, 0.0, 0.3, mask), gaussian_kl(mu[mask], log_sigma[mask], 0.0, 0.3)
    assert float(scaled[0] - scaled[1]) == pytest.approx(0, abs=1e-12 * float(scaled[1]))
    torch.testing.assert_close(found, expected)
    found.backward()
    assert mu.grad.isfinite().all() and log_sigma.grad.isfinite().all()
    assert (mu.grad[~mask] == 0).all() and (log_sigma.grad[~mask] == 0).all() and (mu.grad[mask] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_are_summed_in_32(dtype):
    mu, log_sigma = parameters(200, 200, dtype=dtype)
    found = gaussian_kl(mu, log_sigma, 0.0, 1.0)
    assert found.dtype == torch.float32
    expected = gaussian_kl(mu.detach().double(), log_sigma.detach().double(), 0.0, 1.0)
    assert abs(found.item() / expected.item() - 1) < 1e-5  # 4e-3 is the step of bfloat16
    found.backward()
    assert mu.grad.dtype == log_sigma.grad.dtype == dtype
    torch.testing.assert_close(mu.grad, mu.detach())  # (mu - m0) / s0^2


def test_the_prior_of_a_layer():
    assert Prior().of_layer(100) == (0.0, 1.0)
    mean, std = Prior(0.5, 2.0, rescale=True).of_layer(12)
    assert (mean, std) == pytest.approx((0.5 / 6, 2.0 / 6))  # 1 / sqrt(3 fan_in)


def test_initial_values():
    torch.manual_seed(0)
    for shape, spread in (((50, 100), 300), ((50,), 100)):
        mu, log_sigma = torch.empty(shape), torch.empty(shape)
        Init(sigma_scale=0.5).fill(mu, log_sigma, 100, Prior())
        assert mu.abs().max() <= 0.1 and mu.unique().numel() > 40  # 1 / sqrt(fan_in)
        torch.testing.assert_close(log_sigma.exp(), torch.full(shape, 0.5 / math.sqrt(spread)))
        before = mu.clone()
        Init(mu="keep").fill(mu, log_sigma, 100, Prior())
        assert torch.equal(mu, before) and log_sigma.exp().max() < 0.01
        Init(mu="prior").fill(mu, log_sigma, 100, Prior(0.2, 3.0))
        assert (mu == 0.2).all()
        torch.testing.assert_close(log_sigma.exp(), torch.full(shape, 3.0))
    wide = torch.empty(200, 100)
    Init().fill(wide, torch.empty(200, 100), 100, Prior())
    assert abs(wide.std().item() - 0.1 / math.sqrt(3)) < 0.001


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Prior(std=0.0), r"model\.prior\.std=0\.0: must be above 0"),
        (lambda: Init(sigma_scale=-1.0), r"model\.init\.sigma_scale=-1\.0: must be above 0"),
        (lambda: Init(mu="zero"), r"model\.init\.mu='zero' is unknown; choose one of init, keep, prior"),
    ],
)
def test_mistakes(make, text):
    with pytest.raises(ValueError, match=text):
        make()
