"""Compact and sparse tickets compute what the masked dense network computes, with less."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from networks.bayes import BayesConv2d, BayesLinear, Init, SampleContext, to_bayesian
from networks.cifar_resnet import CifarResNet
from networks.lottery.channels import channels
from networks.lottery.compact import compact, costs, executed, sparse
from networks.lottery.sparse_layers import SparseBayesConv2d, SparseBayesLinear, SparseConv2d, SparseLinear
from networks.masks import PruneChoice, install_masks
from networks.mlp import MLP
from networks.resnet import ResNet
from networks.vgg import VGG
from networks.vit import ViT


def ticket(density: float, bayesian: bool, hidden=(40, 30), seed: int = 0, dead: bool = True) -> MLP:
    """A perceptron in evaluation, with random masks, some units without incoming or outgoing weights."""
    torch.manual_seed(seed)
    net = MLP(hidden=hidden)
    if bayesian:
        to_bayesian(net)
    for weight in install_masks(net):
        mask = torch.rand(weight.mu.shape) < density
        if dead:
            mask[3] = False  # no incoming weights
            mask[:, 5] = False  # a unit before has no outgoing weights
        weight.set_mask(mask)
        if bayesian:
            with torch.no_grad():
                weight.log_sigma.normal_(-2.0, 0.5)
    return net.eval()


def samples(number: int, batch: int, **options) -> SampleContext:
    return SampleContext(range(number), number, batch=batch, seed=3, **options)


@pytest.mark.parametrize("density", [0.5, 0.08, 0.01, 0.0])
@pytest.mark.parametrize("bayesian", [False, True])
def test_the_function_is_the_same(density, bayesian):
    net = ticket(density, bayesian)
    image = torch.randn(7, 1, 8, 8)
    for smaller in (compact(net, noise="dense"), sparse(net, max_density=0.6, noise="dense")):
        with torch.no_grad():
            torch.testing.assert_close(smaller(image), net(image), rtol=0, atol=1e-5)
            if bayesian:
                with samples(5, 7):
                    expected = net(image)
                with samples(5, 7):
                    found = smaller(image)
                assert found.shape == (35, 10)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_dead_units_go():
    net = ticket(0.3, bayesian=False)
    smaller = compact(net)
    first, second, _ = smaller.layers
    # Row 3 of the first layer is constant, its unit 5 unused; the same in the second: 3 is constant, nobody lost.
    used = net.layers[1].weight_mask.any(0)
    varies = net.layers[0].weight_mask.any(1)
    assert first.out_features == int((used & varies).sum()) <= 38
    assert second.in_features == first.out_features and second.out_features == 29
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in net.parameters())


def test_constants_travel_through_several_layers():
    """The first layer is empty: everything is constant, and only biases are left of it."""
    net = ticket(0.9, bayesian=False, dead=False)
    net.layers[0].weight_mask[:] = False
    smaller = compact(net)
    image = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(smaller(image), net(image), rtol=0, atol=1e-5)
    assert len(smaller.layers[0].pattern.rows) == 0


def test_random_biases_keep_their_units():
    """A Gaussian unit without incoming weights stays; one without outgoing weights goes."""
    net = ticket(0.3, bayesian=True)
    smaller = compact(net, noise="dense")
    assert 3 in smaller.layers[0].pattern.rows and 5 not in smaller.layers[0].pattern.rows


def test_only_weights_alive_draw_noise():
    net = ticket(0.05, bayesian=True, dead=False)
    layer = sparse(net).layers[0]
    assert isinstance(layer, SparseBayesLinear)
    drawn = []
    context = samples(4, 7)
    original = context.noise
    context.noise = lambda shape, like: drawn.append(tuple(shape)) or original(shape, like)
    with context, torch.no_grad():
        layer(torch.randn(7, 64))
    assert drawn == [(int(net.layers[0].weight_mask.sum()) + 40,)]  # and the biases


def test_sparse_layers_are_made_of_what_is_alive_alone():
    """No allocation and no draw beyond the values: the global generator stays where it is."""
    net = ticket(0.05, bayesian=True, hidden=(200, 150), dead=False)
    allocated: list[int] = []
    before = torch.get_rng_state()
    with Allocations(allocated):
        small = sparse(net, max_density=0.2)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(small.layers[1], SparseBayesLinear)
    largest = max(m.numel() for m in (net.layers[0].weight_mask, net.layers[1].weight_mask))
    assert max(allocated) <= largest  # nnz x in_features would be 7 times as many


class Allocations(TorchFunctionMode):
    """Notes the numbers of entries of what functions of torch return."""

    def __init__(self, found: list[int]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.found.append(out.numel())
        return out


def test_samples_have_the_right_moments():
    """Noise of weights alive alone: mean and variance over samples are those of the masked dense layer."""
    net = ticket(0.05, bayesian=True, dead=False)
    layer = sparse(net).layers[0]
    x = torch.randn(1, 64)
    with SampleContext(range(60), 60, batch=1, seed=0), torch.no_grad():
        out = torch.cat([layer(x), *(_again(layer, x, seed) for seed in range(1, 40))])
    dense = net.layers[0]
    mean = x @ dense.mean_weight().mT + dense.bias_mu
    variance = x.square() @ dense.weight_sigma().square().mT + dense.bias_log_sigma.exp().square()
    error = variance.sqrt() / len(out) ** 0.5
    assert ((out.mean(0) - mean).abs() < 4.5 * error).all()
    torch.testing.assert_close(out.var(0), variance[0].detach(), rtol=0.15, atol=0)


def _again(layer: nn.Module, x: torch.Tensor, seed: int) -> torch.Tensor:
    with SampleContext(range(60), 60, batch=1, seed=seed):
        return layer(x)


def test_divergence_is_that_of_the_weights_alive():
    net = ticket(0.05, bayesian=True, dead=False).double()
    small = sparse(net, max_density=0.2)
    for i in (0, 1):
        torch.testing.assert_close(small.layers[i].kl(), net.layers[i].kl(), rtol=1e-12, atol=0)
        assert small.layers[i].fan_in == net.layers[i].fan_in


@pytest.mark.parametrize("bayesian", [False, True])
def test_gradients_are_those_of_the_masked_layer(bayesian):
    net = ticket(0.08, bayesian, dead=False).double()
    small = sparse(net, noise="dense")
    image = torch.randn(7, 1, 8, 8, dtype=torch.float64)
    for network in (net, small):
        if bayesian:
            with samples(3, 7):
                network(image).square().sum().backward()
        else:
            network(image).square().sum().backward()
    for i in (0, 1):
        dense, few = net.layers[i], small.layers[i]
        alive = dense.weight_mask
        if bayesian:
            torch.testing.assert_close(few.weight_mu.grad, dense.weight_mu.grad[alive])
            torch.testing.assert_close(few.weight_log_sigma.grad, dense.weight_log_sigma.grad[alive])
        else:
            assert isinstance(few, SparseLinear)
            torch.testing.assert_close(few.values.grad, dense.weight.grad[alive])


def test_tokens_and_folded_rows():
    torch.manual_seed(0)
    net = to_bayesian(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))).eval()
    for weight in install_masks(net):
        weight.set_mask(torch.rand(weight.mu.shape) < 0.4)
    small = sparse(net, max_density=1.0, noise="dense")
    x = torch.randn(2, 7, 6)
    with torch.no_grad():
        with samples(3, 2):
            expected = net(x)
        with samples(3, 2):
            torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(small(x), net(x), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- convolutions

IMAGES = {
    "CifarResNet": (functools.partial(CifarResNet, depth=14, width=0.5), (3, 16)),
    "ResNet, bottlenecks": (functools.partial(ResNet, 50, 10, width=0.125), (3, 64)),
    "VGG": (functools.partial(VGG, 11, 10, 3, width=0.125, pool_stride=2, image_size=32), (3, 32)),
    "VGG, three layers": (
        functools.partial(VGG, 11, 10, 3, width=0.0625, pool_stride=2, image_size=32, head="original"),
        (3, 32),
    ),
    "ViT": (functools.partial(ViT, 10, 3, image_size=16, patch_size=4, width=16, depth=2, heads=2), (3, 16)),
}


def images(kind: str, bayesian: bool, density: float = 0.3, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A network in evaluation and float64, of which channels are dead; normalisations as after some training."""
    make, (channel, size) = IMAGES[kind]
    torch.manual_seed(seed)
    net = make()
    if bayesian:
        to_bayesian(net, init=Init(0.3))
    for weight in install_masks(net):
        mask = torch.rand(weight.mu.shape) < density
        out, into = mask.shape[:2]
        mask[torch.randperm(out)[: out // 4]] = False
        mask[:, torch.randperm(into)[: into // 4 if into > 3 else 0]] = False
        weight.set_mask(mask)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.double().eval(), torch.randn(3, channel, size, size, dtype=torch.float64)


@pytest.mark.parametrize("bayesian", [False, True])
@pytest.mark.parametrize("kind", IMAGES)
def test_networks_of_images_compute_the_same(kind, bayesian):
    """Through normalisation, pooling, shortcuts and attention; sparse and compact, of samples and of means."""
    net, image = images(kind, bayesian)
    with torch.no_grad():
        expected = net(image)
        if bayesian:
            with samples(2, 3):
                sampled = net(image)
        same_noise = (sparse(net, 1.0, "dense"), compact(net, noise="dense"))
        for small in (*same_noise, compact(net), compact(net, 1.0)):
            torch.testing.assert_close(small(image), expected, rtol=0, atol=1e-9)
            if bayesian and small in same_noise:
                with samples(2, 3):
                    torch.testing.assert_close(small(image), sampled, rtol=0, atol=1e-9)
    assert sum(p.numel() for p in compact(net).parameters()) < sum(p.numel() for p in net.parameters())
    if bayesian:
        assert not any(isinstance(m, BayesConv2d | BayesLinear) for m in same_noise[1].modules())


@pytest.mark.parametrize("kind", [kind for kind in IMAGES if kind != "ViT"])
def test_every_convolution_is_known(kind):
    """Each makes channels and each reads some, but for the image and the classes."""
    net, _ = images(kind, False)
    layers = [path for path, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    made = [path for one in channels(net) for path in one.makers]
    read = [path for one in channels(net) for path in one.readers]
    assert sorted(made) == sorted(set(layers) - {layers[-1]}) and sorted(read) == sorted(set(layers) - {layers[0]})


def test_channels_of_the_residual_stream_go_together():
    """Unread by all blocks and shortcuts behind: gone from the stem, from the ends of the blocks and their norms."""
    net, image = images("CifarResNet", False)
    readers = ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0")
    for path in readers:
        net.get_submodule(path).weight_mask[:, [1, 4]] = False
    net.get_submodule("layer2.0.downsample.0").weight_mask[:, 2] = True
    small = compact(net, 0.0)
    assert small.conv1.out_channels == small.bn1.num_features == small.layer1[1].conv2.out_channels <= 6
    assert small.layer1[0].conv1.in_channels == small.layer2[0].downsample[0].in_channels == small.conv1.out_channels
    with torch.no_grad():
        torch.testing.assert_close(small(image), net(image), rtol=0, atol=1e-9)


@pytest.mark.parametrize("bayesian", [False, True])
def test_constants_behind_a_normalisation(bayesian):
    """Zero behind the ReLU: gone. Above zero: kept, since padding makes no constant of it."""
    net, image = images("CifarResNet", bayesian)
    block = net.layer1[0]
    block.conv1.weight_mask[:] = True
    block.conv2.weight_mask[:] = True
    block.conv1.weight_mask[:4] = False
    with torch.no_grad():
        block.bn1.running_mean.zero_()
        block.bn1.bias[:4] = torch.tensor([-1.0, 0.0, 0.5, 2.0])
        small = compact(net, 0.0)
        torch.testing.assert_close(small(image), net(image), rtol=0, atol=1e-9)
    assert small.layer1[0].bn1.num_features == 6 and small.layer1[0].bn1.bias[:2].tolist() == [0.5, 2.0]


def test_one_channel_stays():
    """Nothing alive in a convolution: the network computes what it did."""
    for density in (0.0, 0.02):
        net, image = images("VGG", False, density)
        with torch.no_grad():
            torch.testing.assert_close(compact(net)(image), net(image), rtol=0, atol=1e-9)


@pytest.mark.parametrize("bayesian", [False, True])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3), {"padding": 1}),
        ((1, 1), {"stride": 2}),
        ((3, 3), {"stride": 2, "padding": 1}),
        ((5, 2), {"stride": (3, 1), "padding": (0, 2), "dilation": (2, 1)}),
        ((4, 4), {"stride": 4, "bias": False}),
        ((3, 3), {"stride": 3, "dilation": 3, "padding": 4}),
    ],
)
def test_sparse_convolutions(bayesian, kernel, options):
    """Any stride, padding and dilation: outputs and gradients of the masked layer."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(4, 6, kernel, **options)).double()
    if bayesian:
        to_bayesian(layer, init=Init(0.3))
    (weight,) = install_masks(layer, PruneChoice(keep_last=False))
    weight.set_mask(torch.rand(weight.mu.shape) < 0.3)
    small = sparse(layer, 1.0, "dense")
    assert type(small[0]) is (SparseBayesConv2d if bayesian else SparseConv2d)
    image = torch.randn(3, 4, 13, 11, dtype=torch.float64, requires_grad=True)
    found = []
    for network in (layer, small):
        outputs = []
        for folded in (False, True):
            x = torch.cat([image, 2 * image]) if folded else image
            if bayesian:
                with samples(2, 3):
                    outputs.append(network(x))
            else:
                outputs.append(network(x))
        image.grad = None
        sum(out.square().sum() for out in outputs).backward()
        found.append((outputs, image.grad))
        with torch.no_grad():  # another path
            if not bayesian:
                torch.testing.assert_close(network(image), outputs[0])
    torch.testing.assert_close(found[1], found[0])
    ours = small[0].weight_mu.grad if bayesian else small[0].values.grad
    theirs = (layer[0].weight_mu if bayesian else layer[0].weight).grad.flatten()[small[0].pattern.flat]
    torch.testing.assert_close(ours, theirs)


def test_the_size_of_the_images_decides_which_convolutions_are_sparse():
    """Few pixels are mostly padding, wide layers have more to leave out; without an example the density decides."""
    layers = [BayesConv2d(64, 64, 3, padding=1), BayesConv2d(8, 8, 3, padding=1), BayesConv2d(256, 256, 3, stride=2)]
    for layer in layers:
        layer.weight_mask = torch.rand(layer.weight_mu.shape) < 0.03
    wide = costs(layers[0], layers[0].weight_mask, torch.Size((64, 64, 8, 8)))
    tiny = costs(layers[0], layers[0].weight_mask, torch.Size((256, 64, 2, 2)))
    narrow = costs(layers[1], layers[1].weight_mask, torch.Size((32, 8, 32, 32)))
    assert wide[1] < wide[0] and tiny[1] > tiny[0] and narrow[1] > narrow[0]
    strided = costs(layers[2], layers[2].weight_mask, torch.Size((16, 256, 9, 9)))
    outputs, alive = 16 * 4 * 4, int(layers[2].weight_mask.sum())
    assert strided[0] == pytest.approx((0.023 * outputs + 6.4) * 256 * 256 * 9)
    assert strided[1] == pytest.approx((0.092 * 16 * 25 + 19) * alive + 512 * 16 * 25 + 7e5)
    net, _ = images("CifarResNet", True, 0.03)
    chosen = [
        sum(isinstance(m, SparseBayesConv2d) for m in executed(net.float(), "sparse", "alive", example).modules())
        for example in (None, torch.zeros(2, 3, 16, 16))
    ]
    assert chosen[0] > 10 and chosen[1] == 0


@pytest.mark.parametrize("how", ["sparse", "compact"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_everything_lies_on_the_device_of_the_network(how, device):
    """Also where another one is the default; buffers with indices are made on the network's."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for kind in ("CifarResNet", "VGG"):
        net, image = images(kind, True, 0.05)
        net, image = net.float().to(device), image.float().to(device)
        with torch.device("meta"):
            small = executed(net, how, "dense")
        assert {t.device.type for t in (*small.parameters(), *small.buffers())} == {device}
        with torch.no_grad(), samples(2, 3):
            found = small(image)
        with torch.no_grad(), samples(2, 3):
            torch.testing.assert_close(found, net(image), rtol=1e-4, atol=1e-4)
    net = ticket(0.05, bayesian=True).to(device)
    with torch.device("meta"):
        small = executed(net, how)
    assert {t.device.type for t in (*small.parameters(), *small.buffers())} == {device}


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"MLP is in training, .* call network\.eval\(\) first"):
        compact(MLP())
    with pytest.raises(ValueError, match="execution='fast' is unknown; choose one of masked, sparse, compact"):
        executed(MLP(), "fast")
    layer = sparse(ticket(0.05, bayesian=True)).layers[0]
    with pytest.raises(ValueError, match="noise='some' is unknown"):
        SparseBayesLinear(ticket(0.05, bayesian=True).layers[0], noise="some")
    with samples(2, 3, estimator="lrt"), pytest.raises(ValueError, match=r"use model\.estimator=weight"):
        layer(torch.randn(3, 64))
    with pytest.raises(RuntimeError, match="in training without weight samples"):
        layer.train()(torch.randn(3, 64))
    assert "alive=" in repr(layer)
