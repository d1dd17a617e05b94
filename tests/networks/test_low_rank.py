"""Bases, layers, choice, optimizer state and export of low-rank weights, in closed form where there is one."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest
import torch
from torch import nn

from networks.low_rank import (
    ForwardOrder,
    LayerChoice,
    common_threshold,
    convert,
    decompose,
    dense_size,
    dense_state,
    exported,
    factored_is_cheaper,
    factored_weights,
    fold,
    folded_state,
    fractions,
    kept_rank,
    mixing,
    mixing_similarity,
    num_treated,
    parameter_names,
    polar_factor,
    polar_newton_schulz,
    rebuild,
    regroup,
    scaled_steps,
    stability,
    structure,
    update_basis,
    weight_of,
)
from networks.low_rank.layers import LowRankConv2d, LowRankLinear
from networks.tall_view import from_tall, tall_shape, to_tall

ALL = LayerChoice(min_ratio=0.0, keep_last=False, embeddings=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def basis_stability(first: torch.Tensor, second: torch.Tensor) -> float:
    return stability(polar_factor(to_tall(first)[0]), polar_factor(to_tall(second)[0]))


def factor(network: nn.Module, rank: int | None = None, choice: LayerChoice = ALL) -> nn.Module:
    for weight in choice(network):
        if not weight.converted:
            convert(weight, decompose(weight.matrix()), rank=rank and min(rank, weight.n))
    return network


# ------------------------------------------------------------------------------------------------------------ tall view


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (4, 4), (8, 2, 3), (2, 3, 3, 3), (5, 2, 2, 2, 2)])
def test_tall_view_goes_back(shape):
    weight = gaussian(*shape)
    matrix, transposed = to_tall(weight)
    assert matrix.shape == tall_shape(shape) and matrix.shape[0] >= matrix.shape[1]
    assert transposed == (shape[0] < math.prod(shape[1:]))
    assert torch.equal(from_tall(matrix, shape, transposed), weight)


def test_a_vector_has_no_tall_view():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        to_tall(torch.zeros(3))


# ------------------------------------------------------------------------------- stability (acceptance 1, closed forms)


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (24, 3, 3, 3), (3, 24, 3, 3), (16, 4, 5)])
def test_stability_of_scaled_and_opposite_weights(shape):
    weight = gaussian(*shape)
    assert basis_stability(weight, weight) == pytest.approx(1, abs=1e-6)
    assert basis_stability(weight, 3.7 * weight) == pytest.approx(1, abs=1e-6)
    assert basis_stability(weight, -weight) == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (24, 3, 3, 3)])
def test_other_singular_values_do_not_turn_a_basis(shape):
    weight = gaussian(*shape)
    matrix, transposed = to_tall(weight)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    other = from_tall(u * (0.1 + torch.rand_like(s)) @ vh, shape, transposed)
    assert basis_stability(weight, other) == pytest.approx(1, abs=1e-6)


def test_a_plane_rotation_has_its_closed_form():
    n, theta = 32, 0.3
    basis = torch.linalg.qr(gaussian(64, n)).Q
    turn = torch.eye(n, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    assert basis_stability(basis, basis @ turn) == pytest.approx(1 - 2 * (1 - math.cos(theta)) / n, abs=1e-6)
    assert basis_stability(basis, basis @ turn) == pytest.approx(0.997209, abs=1e-6)


def test_independent_weights_have_none():
    assert abs(basis_stability(gaussian(64, 32), gaussian(64, 32))) < 0.1


def test_the_polar_factor_does_not_depend_on_the_svd():
    """Signs and order of singular vectors are arbitrary; with equal singular values so are the vectors themselves."""
    u, s, v = decompose(gaussian(20, 8))
    signs = torch.tensor([1.0, -1, 1, -1, -1, 1, 1, -1], dtype=torch.float64)
    order = torch.randperm(8)
    flipped = (u * signs)[:, order] @ torch.diag(s[order]) @ (v * signs)[:, order].mT
    torch.testing.assert_close(polar_factor(flipped), u @ v.mT)
    turn = torch.linalg.qr(gaussian(8, 8)).Q
    torch.testing.assert_close(polar_factor((u @ turn) @ (v @ turn).mT), u @ v.mT)


def test_stability_of_a_deficient_weight_is_undefined():
    flat = gaussian(8, 2) @ gaussian(2, 4)
    assert math.isnan(basis_stability(flat, flat))
    small = torch.linalg.qr(torch.randn(64, 64)).Q * torch.logspace(0, -5, 64)  # badly conditioned is not deficient
    assert basis_stability(small, small) == pytest.approx(1, abs=1e-6)
    assert math.isnan(basis_stability(torch.full((4, 3), math.nan), gaussian(4, 3)))


def test_a_basis_that_only_lost_directions_has_not_turned():
    u, _, v = decompose(gaussian(20, 8))
    cut = u[:, :3] @ v[:, :3].mT
    assert stability(u @ v.mT, cut, (8, 3)) == stability(cut, u @ v.mT, (3, 8)) == pytest.approx(1, abs=1e-6)
    assert stability(u @ v.mT, cut) < 0.7


def test_newton_schulz_estimates_stability():
    """Within 0.02 of the exact measure for weights as networks have them, and of 1 for a basis that stays."""
    for distance in (0.0, 0.3, 1.0):
        first = torch.randn(256, 128)
        second = first + distance * torch.randn(256, 128)
        exact = basis_stability(first, second)
        assert stability(polar_newton_schulz(first), polar_newton_schulz(second)) == pytest.approx(exact, abs=0.02)
    well = decompose(torch.randn(64, 32))
    spread = well[0] * torch.linspace(1, 0.05, 32) @ well[2].mT
    torch.testing.assert_close(polar_newton_schulz(spread), polar_factor(spread), rtol=0, atol=0.01)


def test_mixing_is_that_of_a_unique_qr():
    weight = gaussian(20, 8)
    r = mixing(weight)
    assert (r.diagonal() > 0).all() and torch.equal(r, r.triu())
    torch.testing.assert_close(r.mT @ r, weight.mT @ weight)
    turned = torch.linalg.qr(gaussian(20, 20)).Q @ weight  # another basis, the same mixing
    torch.testing.assert_close(mixing(turned), r)
    assert mixing_similarity(r, r) == 1
    assert mixing_similarity(r, -r) == pytest.approx(0)
    assert mixing_similarity(r, 3 * r) == pytest.approx(0.5)


# -------------------------------------------------------------------------------------------- truncation (acceptance 4)


@pytest.mark.parametrize(
    ("values", "short_side", "beta", "kept"),
    [
        ([1.0, 0.5, 0.2, 0.15, 0.1], 5, 0.15, 4),  # the plain rule; equal to the bound stays
        ([1.0, 0.5, 0.2, 0.15, 0.1], 5, 0.0, 5),
        ([1.0, 0.01, 0.01, 0.01], 4, 0.1, 2),  # never more than half at once
        ([1.0, 0.01, 0.01, 0.01, 0.01], 5, 0.1, 2),  # of an odd rank the half rounds down
        ([1.0, 0.01], 2, 0.9, 1),
        ([1.0] + [0.01] * 7, 1000, 0.1, 8),  # never below 1 % of n, nor above what there is
        ([1.0] + [0.01] * 24, 1000, 0.1, 12),
        ([1.0] + [0.01] * 15, 1000, 0.1, 10),
        ([0.0, 0.0, 0.0], 3, 0.1, 3),  # a zero matrix has no largest value to compare with
        ([5.0], 1, 0.9, 1),
    ],
)
def test_rank_after_truncation(values, short_side, beta, kept):
    """The ranks that the published program's rule gives; it was evaluated by hand for these spectra."""
    assert kept_rank(torch.tensor(values), short_side, beta) == kept


@pytest.mark.parametrize(("beta", "wanted"), [(0.1, [20, 17, 17]), (0.15, [20, 14, 14]), (0.3, [20, 10, 9])])
def test_ranks_of_a_frozen_matrix(beta, wanted):
    """A Sigma with ``s_k / s_1 = exp(-k / 7)`` in random bases, cut again and again: half, then what beta asks for."""
    values = torch.exp(-torch.arange(40, dtype=torch.float64) / 7)
    left, right = (torch.linalg.qr(gaussian(40, 40)).Q for _ in range(2))
    sigma, found = left * values @ right.mT, []
    for _ in range(3):
        _, s, _ = decompose(sigma)
        found.append(kept_rank(s, 40, beta))
        sigma = torch.diag(s[: found[-1]])
    assert found == wanted


def test_energy_criterion_drops_no_more_than_its_share():
    values = torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0])  # squares 9 4 1 1 1, sum 16
    assert kept_rank(values, 5, 1 / 16, "energy") == 4
    assert kept_rank(values, 5, 2.5 / 16, "energy") == 3
    assert kept_rank(values, 5, 0.0, "energy") == 5
    assert kept_rank(values, 5, 0.9, "energy", max_drop=0.0) == 5
    assert kept_rank(values, 5, 0.9, "energy", max_drop=1.0) == 1


@pytest.mark.parametrize(
    ("step", "layers", "counts"),
    [(0.1, 10, [1, 2, 3]), (0.1, 3, [1, 1, 1, 2]), (0.34, 3, [2, 3, 3]), (1.0, 7, [7, 7]), (0.1, 48, [5, 10, 15])],
)
def test_progressive_counts(step, layers, counts):
    assert [num_treated(q, step, layers) for q in range(1, len(counts) + 1)] == counts


def test_common_threshold_meets_the_share_and_wastes_little():
    spectra = [torch.rand(n).sort(descending=True).values * scale for n, scale in ((64, 1.0), (256, 5.0), (32, 0.2))]
    sizes = [(256, 64), (256, 256), (40, 32)]
    dense = 100_000
    elsewhere = dense - sum(m * n for m, n in sizes)

    def stored(ranks: list[int]) -> float:
        return (elsewhere + sum(r * (m + n) + r * r for r, (m, n) in zip(ranks, sizes, strict=True))) / dense

    for share in (0.3, 0.5, 0.9):
        ranks = common_threshold(spectra, sizes, dense, share)
        assert stored(ranks) <= share
        lowest = min(float(s[r - 1] / s[0]) for s, r in zip(spectra, ranks, strict=True))
        more = [int((s / s[0] >= lowest - 1e-2).sum()) for s in spectra]
        assert stored(more) > share or share - stored(ranks) < 0.02
        for s, r in zip(spectra, ranks, strict=True):  # one threshold for all layers
            assert r == len(s) or float(s[r] / s[0]) <= lowest
    with pytest.raises(ValueError, match=r"stored_fraction=0\.1 is below"):
        common_threshold(spectra, sizes, dense, 0.1)


# --------------------------------------------------------------------------------------- equal functions (acceptance 2)


class Attention(nn.Module):
    """Self-attention, or attention to keys and values of other widths."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self.kdim, self.vdim = self.attention.kdim, self.attention.vdim

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        key, value = inputs[..., : self.kdim], inputs[..., : self.vdim]
        return self.attention(inputs, key, value, need_weights=False)[0]


LAYERS = {
    "linear, tall": (nn.Linear(12, 40), (7, 12)),
    "linear, wide": (nn.Linear(40, 12, bias=False), (2, 3, 40)),
    "linear, square": (nn.Linear(16, 16), (30, 16)),
    "conv1d": (nn.Conv1d(8, 20, 3, stride=2, padding=1), (3, 8, 21)),
    "conv1d, circular": (nn.Conv1d(20, 8, 5, padding=2, padding_mode="circular"), (3, 20, 21)),
    "conv2d, strided": (nn.Conv2d(4, 50, 3, stride=2, padding=1), (2, 4, 11, 12)),
    "conv2d, dilated": (nn.Conv2d(16, 8, 3, dilation=2, padding="same"), (2, 16, 11, 12)),
    "conv2d, reflected": (nn.Conv2d(4, 8, (3, 5), padding=(1, 2), padding_mode="reflect"), (2, 4, 11, 12)),
    "conv2d, grouped": (nn.Conv2d(8, 16, 3, groups=4), (2, 8, 9, 9)),
    "conv2d, depthwise": (nn.Conv2d(12, 12, 3, groups=12, padding=1), (2, 12, 9, 9)),
    "conv3d": (nn.Conv3d(3, 10, 3, padding=1), (2, 3, 5, 6, 7)),
    "attention": (Attention(), (3, 5, 16)),
    "attention, other widths": (Attention(kdim=12, vdim=10), (3, 5, 16)),
    "encoder layer": (nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0), (3, 5, 16)),
    "embedding": (nn.Embedding(30, 8, padding_idx=2), (4, 6)),
    "embedding, wide": (nn.Embedding(5, 8), (4, 6)),
}


def case(name: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    layer, shape = LAYERS[name]
    inputs = torch.randint(5, shape) if "embedding" in name else torch.randn(shape, dtype=dtype)
    return nn.Sequential(copy.deepcopy(layer).to(dtype)), inputs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", LAYERS)
def test_conversion_and_update_leave_the_function(name, dtype, tolerance):
    network, inputs = case(name, dtype)
    before = network(inputs)
    weights = ALL(network)
    for weight in weights:
        convert(weight, decompose(weight.matrix()))
    assert all(w.converted and w.rank == w.n for w in weights)
    torch.testing.assert_close(network(inputs), before, rtol=0, atol=tolerance)
    with torch.no_grad():
        for weight in weights:  # an update of a Sigma that has been trained
            weight.sigma.add_(0.05 * torch.randn_like(weight.sigma))
    trained = network(inputs)
    assert (trained - before).abs().max() > 1e-3
    for weight in weights:
        update_basis(weight, decompose(weight.sigma), weight.n)
        assert torch.equal(weight.sigma, torch.diag(weight.sigma.diagonal()))
        eye = torch.eye(weight.n, dtype=dtype)
        for basis in (weight.u, weight.v):
            torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=tolerance)
    torch.testing.assert_close(network(inputs), trained, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rank", [1, 2, 6])
@pytest.mark.parametrize("name", LAYERS)
def test_factored_and_dense_forms_are_one_function(name, rank):
    """Both ways to compute, in training and evaluation, and gradients of Sigma, inputs and bias."""
    network, inputs = case(name, torch.float64)
    factor(network, rank)
    for weight in factored_weights(network):  # not diagonal, so that a transposed Sigma would be seen
        weight.sigma.data.add_(0.1 * torch.randn_like(weight.sigma))
    dense = copy.deepcopy(network)
    for weight in list(factored_weights(dense)):
        weight.restore()
    assert not list(factored_weights(dense))
    for training in (True, False):
        ours, theirs = network.train(training)(inputs), dense.train(training)(inputs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    for net in (network, dense):
        net.train()(inputs).square().sum().backward()
    for weight in factored_weights(network):
        gradient = to_tall(weight_of(dense, weight.name).trained.grad)[0]
        expected = weight.u.mT @ gradient @ weight.v
        torch.testing.assert_close(weight.sigma.grad, expected, rtol=0, atol=1e-9)
        assert weight.u.grad is None and weight.v.grad is None
    named = dict(dense.named_parameters())
    for key, parameter in network.named_parameters():
        if key.endswith("bias"):
            torch.testing.assert_close(parameter.grad, named[key].grad, rtol=0, atol=1e-9)


def test_the_cheaper_way_is_taken(monkeypatch):
    """By FLOPs; many rows fold Sigma into a factor first, few do not."""
    assert factored_is_cheaper(1024, 1024, 128) and not factored_is_cheaper(1024, 1024, 512)
    seen: list[int] = []
    dense = LowRankLinear.weight.fget
    monkeypatch.setattr(LowRankLinear, "weight", property(lambda self: (seen.append(1), dense(self))[1]))
    network = factor(nn.Sequential(nn.Linear(64, 64)))
    network(torch.randn(2, 64))
    assert len(seen) == 1
    network = factor(nn.Sequential(nn.Linear(64, 64)), rank=8)
    few, many = network(torch.randn(2, 64)), network(torch.randn(200, 64))
    assert few.shape == (2, 64) and many.shape == (200, 64) and len(seen) == 1


def test_the_encoder_layer_keeps_its_fast_path():
    """In evaluation PyTorch hands dense weights to one fused kernel."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()
    network = factor(nn.Sequential(layer), 5)
    inputs = torch.randn(3, 5, 16)
    slow = network(inputs)  # with gradients
    with torch.no_grad():
        torch.testing.assert_close(network(inputs), slow.detach(), rtol=0, atol=1e-5)


def test_a_converted_module_is_the_same_object_with_its_hooks_and_bias():
    layer = nn.Linear(8, 8)
    network, alias, bias, calls = nn.Sequential(layer), layer, layer.bias, []
    layer.register_forward_hook(lambda *_: calls.append(1))
    factor(network, 3)
    assert network[0] is alias and isinstance(alias, LowRankLinear) and isinstance(alias, nn.Linear)
    assert alias.bias is bias
    network(torch.randn(1, 8))
    assert calls == [1]
    assert list(network.state_dict()) == ["0.u", "0.sigma", "0.v", "0.bias"]
    next(iter(factored_weights(network))).restore()
    assert type(alias) is nn.Linear and list(network.state_dict()) == ["0.weight", "0.bias"]


def test_networks_with_factors_can_be_copied_pickled_and_moved():
    network = factor(nn.Sequential(nn.Linear(8, 8), nn.Conv2d(3, 8, 3)), 2)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), copy.deepcopy(network).double()):
        assert [w.rank for w in factored_weights(other)] == [2, 2]
        torch.testing.assert_close(other[0].weight.float(), network[0].weight)
    assert isinstance(network[1], LowRankConv2d) and "rank=2" in repr(network[1])


@pytest.mark.parametrize("options", [{}, {"kdim": 12, "vdim": 10}])
def test_copies_of_attention_are_independent(options):
    """Copies share a class that PyTorch makes; conversion and restoration of one must not reach the other."""
    network = nn.Sequential(Attention(**options))
    inputs = torch.randn(2, 5, 16)
    weights = ALL(network)
    convert(weights[0], decompose(weights[0].matrix()), rank=3)
    early, expected = copy.deepcopy(network), network(inputs)
    factor(network, 2)
    late, other = copy.deepcopy(network), network(inputs)
    for weight in list(factored_weights(network)):
        weight.restore()
    torch.testing.assert_close(network(inputs), other, rtol=0, atol=1e-5)
    torch.testing.assert_close(late(inputs), other, rtol=0, atol=1e-5)
    torch.testing.assert_close(early(inputs), expected, rtol=0, atol=1e-5)
    assert [w.rank for w in factored_weights(early)] == [3]
    assert not nn.utils.parametrize.is_parametrized(network[0].attention)
    assert type(network[0].attention) is nn.MultiheadAttention


def test_somebodys_own_tensor():
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(6, 4, 5))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,oik->bok", inputs, self.kernel)

    network = nn.Sequential(Mixer())
    with pytest.raises(ValueError, match="names other tensors with two axes"):
        ALL(network)
    choice = LayerChoice(include=["0.kernel"], min_ratio=0, keep_last=False)
    inputs, before = torch.randn(2, 4), network[0].kernel.detach().clone()
    expected = network(inputs)
    factor(network, choice=choice)
    torch.testing.assert_close(network(inputs), expected, rtol=0, atol=1e-5)
    (weight,) = choice(network)
    assert weight.converted and weight.label == "0.kernel" and weight.sigma.shape == (6, 6)
    weight.restore()
    torch.testing.assert_close(network[0].kernel.detach(), before, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- choice of layers


class Crossed(nn.Module):
    """Defines its layers in another order than it calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 8)
        self.stem = nn.Conv2d(4, 16, 3)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.narrow = nn.Linear(16, 1)
        self.norm = nn.LayerNorm(16)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(image).mean((2, 3))
        for block in self.blocks:
            hidden = self.norm(block(hidden))
        return self.head(hidden) * self.narrow(hidden)


def order_of(network: nn.Module) -> list[str]:
    recorder = ForwardOrder(network)
    network(torch.randn(2, 4, 5, 5))
    return recorder.stop()


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"keep_last": False}, "stem blocks.0 blocks.1 blocks.2 head"),
        ({"keep_last": False, "min_ratio": 0.0}, "stem blocks.0 blocks.1 blocks.2 head narrow"),
        ({"keep_first": True, "keep_last": False}, "blocks.0 blocks.1 blocks.2 head"),
        ({}, "stem blocks.0 blocks.1 blocks.2 head"),  # the last one, narrow, is out anyway
        ({"include": ["blocks.*"]}, "blocks.0 blocks.1 blocks.2"),
        ({"include": ["blocks.*", "head.weight"], "exclude": ["blocks.1"]}, "blocks.0 blocks.2 head"),
        ({"min_ratio": 0.4}, "stem blocks.0 blocks.1 blocks.2 head"),
        ({"min_ratio": 0.5}, "blocks.0 blocks.1 blocks.2"),
    ],
)
def test_which_weights_are_chosen(options, chosen):
    network = Crossed()
    assert [w.label for w in LayerChoice(**options)(network, order_of(network))] == chosen.split()


def test_a_choice_is_the_same_after_the_conversion():
    network = Crossed()
    order = order_of(network)
    before = [w.name for w in LayerChoice()(network, order)]
    factor(network, 3, LayerChoice())
    assert [w.name for w in LayerChoice()(network, order)] == before


def test_attention_goes_where_its_module_is_called():
    """The output projection is never called as a module."""
    network = nn.ModuleDict(
        {"last": nn.Linear(16, 16), "attention": nn.MultiheadAttention(16, 2), "inner": Attention()}
    )
    recorder = ForwardOrder(network)
    network["inner"](torch.randn(1, 2, 16))
    network["last"](torch.randn(1, 16))
    names = [w.name for w in LayerChoice(exclude=["attention*"], keep_last=False)(network, recorder.stop())]
    assert names == ["inner.attention.in_proj_weight", "inner.attention.out_proj.weight", "last.weight"]
    assert not network["last"]._forward_pre_hooks


def tied() -> nn.Module:
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    network[1].weight = network[0].weight
    return network


def normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))


def quantised() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), torch.ao.nn.quantized.Linear(8, 8))


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8)), {}, r"no weight is left.*'0\.weight'.*min_ratio=0\.1"),
        (lambda: nn.Sequential(nn.LayerNorm(8), nn.LSTM(8, 8)), {}, "has no trainable linear, convolutional or"),
        (Crossed, {"include": ["block.*"]}, r"layers\.include: 'block\.\*' matches no weight.*Did you mean 'blocks"),
        (Crossed, {"exclude": ["stump"]}, r"layers\.exclude: 'stump' matches no weight"),
        (tied, {"keep_last": False}, r"0\.weight and 1\.weight are one tensor.*layers\.exclude"),
        (normed, {"keep_last": False}, r"0\.weight has a parametrization already.*exclude"),
        (quantised, {"keep_last": False}, "1 is quantised"),
        (lambda: nn.Sequential(nn.LSTM(8, 8), nn.Linear(8, 8)), {"include": ["0.weight_ih_l0"]}, "one flat buffer"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_networks_that_cannot_be_are_refused(network, options, message):
    with pytest.raises(ValueError, match=message):
        LayerChoice(**options)(network())


@pytest.mark.parametrize(("options", "message"), [({"min_ratio": 1.0}, "min_ratio=1"), ({"include": "a"}, "a list")])
def test_options_of_the_choice_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        LayerChoice(**options)


def test_what_may_stay_dense_does_not_matter():
    """Tied and parametrised weights are refused only where they were chosen; frozen ones never are."""
    assert [w.label for w in LayerChoice(exclude=["0"], keep_last=False)(normed())] == ["1"]
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    network[0].requires_grad_(False)
    assert [w.label for w in LayerChoice(keep_last=False)(network)] == ["1"]


# ----------------------------------------------------------------------------------------------------------- optimizers


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(network.parameters()).dtype
    losses = []
    for _ in range(steps):
        inputs = torch.randn(32, 12, generator=generator).to(dtype)
        target = torch.sin(inputs.cumsum(1))
        loss = (network(inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def small(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).to(dtype)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_full_rank_training_of_square_layers_is_dense_training(momentum):
    """Acceptance 3: dL/dSigma = U^T G V, so gradient descent is the same in any pair of orthogonal bases."""
    dense, ours = small(), small()
    make = functools.partial(torch.optim.SGD, lr=0.1, momentum=momentum, weight_decay=0.01)
    theirs, mine = make(dense.parameters()), make(ours.parameters())
    train(dense, theirs, 10)
    train(ours, mine, 10)
    for weight in ALL(ours):
        convert(weight, decompose(weight.matrix()), [mine])
    for round_ in range(5):
        train(dense, theirs, 10, seed=round_)
        train(ours, mine, 10, seed=round_)
        for weight in factored_weights(ours):  # moments turn with the bases
            update_basis(weight, decompose(weight.sigma), weight.n, [mine])
    for layer, other in zip(ours[::2], dense[::2], strict=True):
        torch.testing.assert_close(layer.weight, other.weight, rtol=0, atol=1e-9)
        torch.testing.assert_close(layer.bias, other.bias, rtol=0, atol=1e-9)


OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05),
    "momentum": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adam": functools.partial(torch.optim.Adam, lr=1e-3),
    "adamw, amsgrad": functools.partial(torch.optim.AdamW, lr=1e-3, amsgrad=True),
    "adamw, not foreach": functools.partial(torch.optim.AdamW, lr=1e-3, foreach=False),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=1e-3, centered=True, momentum=0.9),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=1e-2),
    "nadam": functools.partial(torch.optim.NAdam, lr=1e-3),
}


@pytest.mark.parametrize("mode", ["rotate", "reset", "zero"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on(name, mode):
    """Acceptance 6: two groups and a scheduler; nothing orphaned, doubled or regrouped; training improves."""
    network = small(torch.float32)
    groups = [
        {"params": [network[0].weight, network[2].weight], "weight_decay": 0.01},
        {"params": [network[0].bias, network[2].bias], "lr": 0.003},
    ]
    optimizer = OPTIMIZERS[name](groups)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    before = train(network, optimizer, 30)
    scheduler.step()
    for event in range(3):
        for weight in ALL(network):
            if weight.converted:
                update_basis(weight, decompose(weight.sigma), weight.rank - 3, [optimizer], mode)
            else:
                convert(weight, decompose(weight.matrix()), [optimizer], mode)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        trained = {id(p) for p in network.parameters() if p.requires_grad}
        assert len(held) == len(set(held)) and set(held) == trained
        assert {id(p) for p in optimizer.state} <= trained
        assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
        for weight in factored_weights(network):
            for value in optimizer.state.get(weight.sigma, {}).values():
                assert value.numel() == 1 or value.shape == weight.sigma.shape
        losses = train(network, optimizer, 30, seed=event)
        scheduler.step()
    assert all(map(math.isfinite, losses)) and losses[-1] < before[0]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [0.01, OPTIMIZERS[name](groups[1]["params"]).defaults["weight_decay"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([OPTIMIZERS[name].keywords["lr"] * 0.9**4, 0.003 * 0.9**4])


def test_moments_are_moved_as_written():
    network = small()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, amsgrad=True)
    train(network, optimizer, 5)
    weight = ALL(network)[0]
    state = {key: value.clone() for key, value in optimizer.state[weight.trained].items()}
    u, s, v = decompose(weight.matrix())
    convert(weight, (u, s, v), [optimizer])
    moved = optimizer.state[weight.sigma]
    assert moved["step"] == state["step"] == 5
    torch.testing.assert_close(moved["exp_avg"], u.mT @ state["exp_avg"] @ v)
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        torch.testing.assert_close(moved[key], (u * u).mT @ state[key] @ (v * v))
    weight.sigma.data.add_(torch.randn_like(weight.sigma))
    state = {key: value.clone() for key, value in moved.items()}
    left, s, right = decompose(weight.sigma)
    update_basis(weight, (left, s, right), 4, [optimizer])
    moved = optimizer.state[weight.sigma]
    torch.testing.assert_close(moved["exp_avg"], (left.mT @ state["exp_avg"] @ right)[:4, :4])
    torch.testing.assert_close(moved["exp_avg_sq"], ((left**2).mT @ state["exp_avg_sq"] @ right**2)[:4, :4])


def test_reset_and_zero_differ_in_the_counter():
    for mode, step in (("reset", None), ("zero", 5)):
        network = small()
        optimizer = torch.optim.Adam(network.parameters())
        train(network, optimizer, 5)
        weight = ALL(network)[0]
        convert(weight, decompose(weight.matrix()), [optimizer], mode)
        state = optimizer.state.get(weight.sigma, {})
        assert state.get("step") == step
        assert all(not value.any() for key, value in state.items() if key != "step")


def test_a_state_that_nobody_knows_starts_afresh_with_one_warning():
    class Strange(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["curvature"] = torch.ones_like(p)

    network = small()
    optimizer = Strange(network.parameters(), lr=0.01)
    train(network, optimizer, 2)
    first, second = ALL(network)
    with pytest.warns(UserWarning, match=r"'curvature'.*Strange is unknown") as caught:
        convert(first, decompose(first.matrix()), [optimizer])
        convert(second, decompose(second.matrix()), [optimizer])
    assert len(caught) == 1
    assert first.sigma not in optimizer.state
    train(network, optimizer, 2)


def test_bases_can_be_trained_as_well():
    network = small()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    (weight, *_) = ALL(network)
    convert(weight, decompose(weight.matrix()), [optimizer], rank=5, train_bases=True)
    before = [t.detach().clone() for t in (weight.u, weight.sigma, weight.v)]
    train(network, optimizer, 3)
    for old, new in zip(before, (weight.u, weight.sigma, weight.v), strict=True):
        assert not torch.equal(old, new)
    assert parameter_names(network, [optimizer])[0][0][:3] == ["0.sigma", "0.u", "0.v"]


def test_groups_are_restored_by_name():
    """A rebuilt network lists parameters in another order, U and V among them."""
    network = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    optimizer = torch.optim.Adam(network.parameters())
    factor(network)  # the optimizer is not told
    names = [["1.sigma", "1.bias", "0.parametrizations.in_proj_weight.original"]]
    regroup(network, [optimizer], [names])
    assert parameter_names(network, [optimizer]) == [names]
    with pytest.raises(ValueError, match=r"trains \['2\.weight'\]"):
        regroup(network, [optimizer], [[["2.weight"]]])
    with pytest.raises(ValueError, match="parameter groups"):
        regroup(network, [optimizer], [[["1.bias"], ["1.sigma"]]])


def test_scaled_steps_are_seen_by_nobody():
    network, factors = small(), iter([0.5, 1.0, 0.25])
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    hooks = scaled_steps(optimizer, lambda: next(factors))
    for factor_ in (0.5, 1.0, 0.25):
        before = network[0].bias.detach().clone()
        network(torch.ones(1, 12, dtype=torch.float64)).sum().backward()
        gradient = network[0].bias.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(network[0].bias.detach(), before - factor_ * gradient)
        assert optimizer.param_groups[0]["lr"] == 1.0
    for hook in hooks:
        hook.remove()


# ---------------------------------------------------------------------------------------- counting, checkpoints, export


def test_fractions_count_everything():
    network = nn.Sequential(nn.Linear(20, 20), nn.LayerNorm(20), nn.Linear(20, 2))
    dense = sum(p.numel() for p in network.parameters())
    assert fractions(network) == (1.0, 1.0)
    factor(network, 3, LayerChoice())
    rest = 20 + 40 + 42
    assert fractions(network) == ((9 + rest) / dense, (3 * 40 + 9 + rest) / dense)
    assert dense_size(network) == dense


def everything() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Embedding(30, 16),
        nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0),
        nn.Linear(16, 12),
        nn.Unflatten(-1, (12, 1)),
        nn.Conv2d(5, 10, 3, padding=1),
        nn.Conv2d(10, 8, 3, groups=2, padding=1),
    )


TOKENS = torch.arange(20).reshape(4, 5) % 30


def test_a_checkpoint_of_any_ranks_loads_into_a_network_of_any_other():
    source = factor(everything(), 3)
    assert len(structure(source)) == 8
    for target in (everything(), factor(everything(), 5), factor(everything())):
        rebuild(target, structure(source))
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target(TOKENS), source(TOKENS), rtol=0, atol=0)
    target = factor(everything(), 2)
    rebuild(target, [])  # a dense checkpoint
    target.load_state_dict(everything().state_dict())
    assert not list(factored_weights(target))


def test_a_checkpoint_of_another_network_is_refused():
    layers = structure(factor(nn.Sequential(nn.Linear(8, 8)), 2))
    with pytest.raises(ValueError, match=r"low-rank weight 0\.weight, which this network lacks"):
        rebuild(nn.Sequential(nn.ReLU()), layers)
    with pytest.raises(ValueError, match=r"shape \[8, 8\], this network with \[9, 8\]"):
        rebuild(nn.Sequential(nn.Linear(8, 9)), layers)


def test_exports_are_one_function_in_three_forms():
    network = factor(everything(), 3).eval()
    expected = network(TOKENS)
    checkpoint = {
        "state_dict": network.state_dict(),
        "low_rank": {"layers": structure(network)},
        "optimizer_states": [1],
        "config": {"a": 1},
    }
    dense = everything().eval()
    content = exported(checkpoint, "dense")
    assert set(content) == {"state_dict", "config"}
    dense.load_state_dict(content["state_dict"], strict=True)
    torch.testing.assert_close(dense(TOKENS), expected, rtol=0, atol=1e-5)
    assert content["state_dict"].keys() == dense_state(network.state_dict(), structure(network)).keys()

    folded = fold(network)
    torch.testing.assert_close(folded(TOKENS), expected, rtol=0, atol=1e-5)
    kinds = {type(m).__name__ for m in folded.modules()}
    assert not any(kind.startswith("LowRank") for kind in kinds)
    content = exported(checkpoint, "folded")
    fresh = everything().eval()
    rebuild(fresh, content["low_rank"]["layers"])
    fresh = fold(fresh).eval()
    fresh.load_state_dict(content["state_dict"], strict=True)
    torch.testing.assert_close(fresh(TOKENS), expected, rtol=0, atol=1e-5)
    assert folded_state(network.state_dict(), structure(network)).keys() == folded.state_dict().keys()
    pair = folded[2]
    assert pair.down.weight.shape == (3, 16) and pair.up.weight.shape == (12, 3)

    fresh = everything().eval()
    content = exported(checkpoint, "factored")
    rebuild(fresh, content["low_rank"]["layers"])
    fresh.load_state_dict(content["state_dict"], strict=True)
    torch.testing.assert_close(fresh(TOKENS), expected, rtol=0, atol=0)


def test_a_fold_that_would_be_larger_is_dense():
    folded = fold(factor(nn.Sequential(nn.Linear(8, 8)), 6))
    assert type(folded[0]) is nn.Linear
