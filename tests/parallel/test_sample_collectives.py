"""Reductions over samples of several processes: values, gradients after averaging, counts, batch normalisation."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel.collectives import Interconnect
from parallel.groups import destroy, make_group
from parallel.layout import global_groups, node_groups
from parallel.ledger import Ledger
from parallel.network_model import NetworkModel
from parallel.sample_collectives import gather_samples, log_mean_exp, mean_over_samples, moments
from parallel.sample_layout import SampleShare, mesh
from parallel.sample_norm import share_statistics
from tests.ranks import Ranks

ITEMS, INPUTS, CLASSES = 8, 5, 3
F64 = torch.float64


def share(size):
    """Of this process, and a function that ends its groups."""
    world, rank = dist.get_world_size(), dist.get_rank()
    place = mesh(rank, world, size)
    groups = make_group(node_groups(world, size)), make_group(global_groups(world, size))
    interconnect = Interconnect(size, NetworkModel(), Ledger(rank, size))
    return SampleShare(size, place.sample, *groups, interconnect), place, lambda: destroy(*groups)


def problem(samples, dtype=F64):
    """A mean-field linear classifier: parameters (mu, log sigma), noise of every sample, items, labels."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    mu, rho = draw(INPUTS, CLASSES), draw(INPUTS, CLASSES) * 0.3 - 0.5
    label = torch.arange(ITEMS) % CLASSES
    return mu.requires_grad_(), rho.requires_grad_(), draw(samples, INPUTS, CLASSES), draw(ITEMS, INPUTS), label


def log_likelihoods(mu, rho, noise, x, label):
    """(samples, items)."""
    logits = torch.einsum("bi,sic->sbc", x, mu + rho.exp() * noise)
    return logits.log_softmax(2).gather(2, label.expand(len(noise), -1)[..., None])[..., 0]


def loss_of(kind, likelihoods, samples, share):
    if kind == "elbo":
        return -share.weight(samples) * likelihoods.mean()
    if kind == "predictive":
        return -log_mean_exp(likelihoods, samples, share).mean()
    mean, variance = moments(likelihoods, samples, share)
    return (variance.log() + (mean + 1).square() / variance).mean()


def gradient(kind, samples, size, dtype=F64, local=False):
    """Loss, and the gradient as DDP would leave it, of this process."""
    mine, place, end = share(size)
    mu, rho, noise, x, label = problem(samples, dtype)
    items = slice(place.data, None, dist.get_world_size() // size)
    values = log_likelihoods(mu, rho, noise[list(mine.ids(samples))], x[items], label[items])
    if local:
        loss = -mine.weight(samples) * log_mean_exp(values, len(values), SampleShare()).mean()
    else:
        loss = loss_of(kind, values, samples, mine)
    flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, (mu, rho))])
    dist.all_reduce(flat)
    end()
    return float(loss.detach()), flat / dist.get_world_size()


def alone(kind, samples, dtype=F64):
    mu, rho, noise, x, label = problem(samples, dtype)
    values = log_likelihoods(mu, rho, noise, x, label)
    if kind == "elbo":
        loss = -values.mean()
    elif kind == "predictive":
        loss = -(values.exp().mean(0)).log().mean()
    else:
        variance, mean = torch.var_mean(values, 0)
        loss = (variance.log() + (mean + 1).square() / variance).mean()
    return float(loss.detach()), torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, (mu, rho))])


def difference(a, b):
    return float((a - b).norm() / b.norm())


def gradients(cases):
    return [gradient(*case) for case in cases]


KINDS = ("elbo", "predictive", "moments")
CASES = [(kind, samples, size) for kind in KINDS for samples in (4, 10) for size in (1, 2, 4)]


def test_gradients_are_exact_after_the_mean_over_ranks(ranks4):
    """Groups of 1, 2 and 4 of 4 ranks, also with unequal shares; sampling_parallelism.md, 2.4."""
    found = ranks4(gradients, CASES)
    for i, (kind, samples, size) in enumerate(CASES):
        loss, expected = alone(kind, samples)
        for rank in found:
            assert difference(rank[i][1], expected) < 1e-13, (kind, samples, size)
        if kind != "elbo" and size == 4:  # all ranks hold the same loss, of all samples
            assert {rank[i][0] for rank in found} == {found[0][i][0]}
            assert found[0][i][0] == pytest.approx(loss, abs=1e-13)


def test_in_single_precision_gradients_agree_to_rounding(ranks4):
    """Acceptance 2."""
    cases = [(kind, 12, 4, torch.float32) for kind in ("elbo", "predictive")]
    for rank in ranks4(gradients, cases):
        for case, (_, found) in zip(cases, rank, strict=True):
            assert difference(found, alone(case[0], 12, torch.float32)[1]) < 1e-6


@pytest.mark.slow  # a pool of five processes of its own
def test_twelve_samples_on_five_ranks():
    """Acceptance 3."""
    pool = Ranks(5)
    try:
        cases = [(kind, 12, 5) for kind in KINDS]
        for rank in pool(gradients, cases):
            for (kind, *_), (_, found) in zip(cases, rank, strict=True):
                assert difference(found, alone(kind, 12)[1]) < 1e-12
    finally:
        pool.close()


def test_samples_inside_the_logarithm_of_one_rank_alone_are_biased(ranks4):
    """Acceptance 4: the more ranks, the more; with one sample each, it is the gradient of the ELBO."""
    cases = [("predictive", samples, size, F64, True) for samples, size in [(12, 1), (12, 2), (12, 4), (4, 4)]]
    for rank in ranks4(gradients, cases):
        exact = alone("predictive", 12)[1]
        errors = [difference(rank[i][1], exact) for i in range(3)]
        assert errors[0] < 1e-13 and 1e-3 < errors[1] < errors[2]
        assert difference(rank[3][1], alone("elbo", 4)[1]) < 1e-13
        assert difference(rank[3][1], alone("predictive", 4)[1]) > 0.01


def extremes():
    mine, _, end = share(2)
    values = torch.tensor([[-800.0, -2000.0, 0.0, -math.inf], [-801.0, -2001.0, -1.0, -5.0]], dtype=F64)
    values = values.roll(mine.index, 0)[: 1 + mine.index].requires_grad_()  # 1 sample on one rank, 2 on the other
    values = values.detach()[:1] if mine.index == 0 else values.detach()
    result = log_mean_exp(values.requires_grad_(), 3, SampleShare(2, 1 - mine.index, mine.group))
    result.sum().backward()
    end()
    return values.detach(), result.detach(), values.grad


def test_likelihoods_may_be_very_small(ranks2):
    found = ranks2(extremes)
    everything = torch.cat([rank[0] for rank in found])
    assert len(everything) == 3
    for values, result, slope in found:
        torch.testing.assert_close(result, everything.logsumexp(0) - math.log(3))
        torch.testing.assert_close(slope, 2 * (values - everything.logsumexp(0)).exp())


def evaluation(samples, size):
    mine, place, end = share(size)
    everything = torch.randn(samples, 4, 3, generator=torch.Generator().manual_seed(place.data), dtype=F64)
    own = everything[list(mine.ids(samples))].requires_grad_()
    mean, gathered = mean_over_samples(own, samples, mine), gather_samples(own, samples, mine)
    half = mean_over_samples(own.detach().bfloat16(), samples, mine)
    with pytest.raises(ValueError, match=rf"1 samples on rank \d of {size}, which evaluates {len(own)} of"):
        mean_over_samples(everything[:1], samples, mine)
    end()
    torch.testing.assert_close(mean, everything.detach().mean(0), atol=1e-14, rtol=0)
    assert torch.equal(gathered, everything.detach()) and not gathered.requires_grad and not mean.requires_grad
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), mean, atol=2e-2, rtol=0)
    return mean, mine.interconnect.ledger.state_dict()["entries"]


def test_means_and_samples_of_all_ranks(ranks4):
    for samples in (10, 16):
        one, two, four = (ranks4(evaluation, samples, size) for size in (1, 2, 4))
        assert all(entries == {} for _, entries in one)
        for rank in range(4):
            assert torch.equal(two[rank][0], two[rank // 2 * 2][0])
            assert torch.equal(four[rank][0], four[0][0])
            torch.testing.assert_close(four[rank][0], one[0][0], atol=1e-14, rtol=0)
        # Counted on the first rank of a group: sums of 12 numbers, in 8 and in 4 bytes, and the gathered samples.
        longest = -(-samples // 4)
        assert four[0][1] == {
            "all_reduce/intra_node": [2, 12 * 12, 1.5 * 12 * 12 * 4],
            "all_gather/intra_node": [1, 4 * longest * 96, 0.75 * 4 * longest * 96 * 4],
        }
        assert four[1][1] == {} and two[2][1].keys() == four[0][1].keys()


def test_a_single_process_communicates_nothing():
    values = torch.randn(3, 4, dtype=F64, requires_grad=True)
    torch.testing.assert_close(log_mean_exp(values, 3, SampleShare()), values.exp().mean(0).log())
    variance, mean = torch.var_mean(values, 0)
    for found, expected in zip(moments(values, 3, SampleShare()), (mean, variance), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(gather_samples(values, 3, SampleShare()), values.detach())
    assert log_mean_exp(values.bfloat16(), 3, SampleShare()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"model\.num_samples=1: a variance over samples needs 2 or more"):
        moments(values[:1], 1, SampleShare())


# ------------------------------------------------------------------------------------------------ batch normalisation


def norm(dims, **kwargs):
    torch.manual_seed(3)
    layer = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[dims](4, **kwargs).double()
    if layer.affine:
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    return layer


def batch(dims):
    generator = torch.Generator().manual_seed(5)
    shape = (6, 4, *(3, 2)[:dims])  # six samples x items
    return [torch.randn(shape, generator=generator, dtype=F64) for _ in range(2)]


NORMS = [(0, {}), (1, {"momentum": None}), (2, {"affine": False}), (2, {"track_running_stats": False})]


def normalised():
    mine, _, end = share(2)
    found = []
    for dims, kwargs in NORMS:
        layer, (x, slope) = norm(dims, **kwargs), batch(dims)
        own = slice(0, 2) if mine.index == 0 else slice(2, 6)
        x = x[own].requires_grad_()
        undo = share_statistics(nn.Sequential(layer), lambda: mine)
        for _ in range(2):  # running statistics move twice
            y = layer(x)
        (2 * y * slope[own]).sum().backward()  # K times the gradient, as the losses here give it
        trained = [p.grad / 2 for p in layer.parameters()]
        for g in trained:
            dist.all_reduce(g)
        evaluated = layer.eval()(x)
        undo()
        assert "forward" not in layer.__dict__ and torch.equal(layer(x), evaluated)
        found.append((y.detach(), x.grad / 2, trained, {k: v.clone() for k, v in layer.state_dict().items()}))
    end()
    return found


def test_batch_norm_over_a_sample_group_is_that_of_all_its_samples(ranks2):
    ranks = ranks2(normalised)
    for i, (dims, kwargs) in enumerate(NORMS):
        layer, (x, slope) = norm(dims, **kwargs), batch(dims)
        x.requires_grad_()
        for _ in range(2):
            y = layer(x)
        (y * slope).sum().backward()
        first, second = (rank[i] for rank in ranks)
        torch.testing.assert_close(torch.cat([first[0], second[0]]), y.detach(), atol=1e-13, rtol=0)
        torch.testing.assert_close(torch.cat([first[1], second[1]]), x.grad, atol=1e-13, rtol=0)
        for found in (first, second):
            for g, p in zip(found[2], layer.parameters(), strict=True):
                torch.testing.assert_close(g, p.grad, atol=1e-13, rtol=0)
            for name, value in layer.state_dict().items():
                torch.testing.assert_close(found[3][name], value, atol=1e-13, rtol=0)
