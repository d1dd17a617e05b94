"""Any network turned Bayesian, or its dropout a matter of samples, and back."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn

from networks.bayes import (
    BayesConv2d,
    BayesLinear,
    Init,
    MCDropout,
    Members,
    Prior,
    SampleContext,
    bayesian_layers,
    to_bayesian,
    to_deterministic,
    to_ensemble,
    to_mc_dropout,
)
from networks.cnn import CNN
from networks.mlp import MLP
from networks.resnet import ResNet
from networks.simple_vit import SimpleViT
from networks.vgg import VGG
from networks.vit import ViT

KEEP = Init(sigma_scale=0.5, mu="keep")


def run(net, x, samples=3, **kwargs):
    """(sample, item, ...)."""
    with torch.no_grad(), SampleContext(range(samples), samples, batch=len(x), **kwargs):
        return net(x).unflatten(0, (samples, len(x)))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, (3, 1), stride=2, groups=2, dilation=(1, 2), padding="valid"), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(48, 5),
    )  # fmt: skip


def test_layers_keep_their_names_options_and_means():
    net, twin = convolutional(), convolutional()
    twin.load_state_dict(net.state_dict())
    made = to_bayesian(net, init=KEEP, prior=Prior(std=2.0))
    assert made is net
    kinds = {name: type(layer) for name, layer in bayesian_layers(net)}
    assert kinds == {"0": BayesConv2d, "3": BayesConv2d, "6": BayesLinear}
    assert type(net[1]) is nn.BatchNorm2d and type(net[5]) is nn.Dropout
    assert net[0].bias_mu is None and net[3].groups == 2 and net[3].prior.std == 2.0
    assert {"0.weight_mu", "0.weight_log_sigma", "1.weight", "6.bias_log_sigma"} <= net.state_dict().keys()
    x = torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(net.eval()(x), twin.eval()(x))
    assert (run(net, x)[0] != run(net, x)[1]).any()


def test_there_and_back():
    net, x = convolutional().double(), torch.randn(3, 2, 8, 8).double()
    names, expected = list(net.state_dict()), net.eval()(x)
    back = to_deterministic(to_mc_dropout(to_bayesian(net, init=KEEP)))
    assert not any(module.training for module in back.modules())
    assert list(back.state_dict()) == names and not list(bayesian_layers(back))
    assert type(back[0]) is nn.Conv2d and type(back[5]) is nn.Dropout and back[5].p == 0.3
    torch.testing.assert_close(back(x), expected)
    assert not back[6].training and back[6].weight.dtype == torch.float64


def test_pruned_weights_come_back_as_zeros():
    layer = to_bayesian(nn.Linear(4, 3), init=KEEP)
    assert isinstance(layer, BayesLinear)
    layer.weight_mask = torch.rand(3, 4) > 0.5
    back = to_deterministic(layer)
    assert torch.equal(back.weight, layer.weight_mu * layer.weight_mask) and torch.equal(back.bias, layer.bias_mu)


@pytest.mark.parametrize("mode", ["init", "prior"])
def test_other_initial_values_replace_those_of_the_network(mode):
    net = to_bayesian(nn.Sequential(nn.Linear(30, 20)), init=Init(mu=mode), prior=Prior(mean=0.25))
    if mode == "prior":
        assert (net[0].weight_mu == 0.25).all() and (net[0].weight_log_sigma == 0).all()
    else:
        assert net[0].weight_mu.abs().max() <= 30**-0.5 and net[0].weight_mu.unique().numel() > 500


def test_patterns_choose_layers():
    def chosen(**kwargs):
        return [name for name, _ in bayesian_layers(to_bayesian(MLP(hidden=[4, 4, 4]), **kwargs))]

    assert chosen() == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert chosen(include=["layers.[03]"]) == ["layers.0", "layers.3"]
    assert chosen(exclude=["layers.3"]) == ["layers.0", "layers.1", "layers.2"]
    assert chosen(include=["layers.*"], exclude=["layers.0", "*.2"]) == ["layers.1", "layers.3"]


@pytest.mark.parametrize(
    ("net", "kwargs", "text"),
    [
        (
            MLP(hidden=[4]),
            {"include": ["head"]},
            r"model\.include: 'head' fits none of .* layers\.0, layers\.1",
        ),
        (MLP(hidden=[4]), {"exclude": ["*.7"]}, r"model\.exclude: '\*\.7' fits none of the layers"),
        (MLP(hidden=[4]), {"exclude": ["*"]}, r"model\.net: no linear or convolutional layer is left to be Bayesian"),
        (nn.ReLU(), {}, r"model\.net: no linear or convolutional layer"),
    ],
)
def test_mistakes(net, kwargs, text):
    with pytest.raises(ValueError, match=text):
        to_bayesian(net, **kwargs)
    with pytest.raises(ValueError, match=r"model\.posterior=dropout: .* set model\.net\.dropout above 0"):
        to_mc_dropout(MLP(hidden=[4], dropout=0.0))


def test_a_network_with_bayesian_layers_of_its_own_is_taken():
    net = nn.Sequential(BayesLinear(4, 4), nn.ReLU())
    assert to_bayesian(net) is net


class Twice(nn.Module):
    """One layer under two names of one module, and once more below another."""

    def __init__(self):
        super().__init__()
        self.encoder = self.decoder = nn.Linear(4, 4)
        self.nested = nn.ModuleDict({"copy": self.encoder})
        self.nothing = None

    def forward(self, x):
        return self.nested["copy"](self.decoder(self.encoder(x)))


def test_a_layer_under_several_names_stays_one_layer():
    net, shared = Twice(), nn.Linear(3, 3)
    to_bayesian(net)
    assert isinstance(net.decoder, BayesLinear) and net.encoder is net.decoder is net.nested["copy"]
    sequence = to_bayesian(nn.Sequential(shared, nn.ReLU(), shared))
    assert isinstance(sequence[0], BayesLinear) and sequence[2] is sequence[0]
    to_deterministic(net)
    assert type(net.encoder) is nn.Linear and net.encoder is net.decoder is net.nested["copy"]
    to_ensemble(net, 2)
    assert isinstance(net.decoder, Members) and net.encoder is net.decoder is net.nested["copy"]
    dropout = nn.Dropout(0.5)
    masks = to_mc_dropout(nn.Sequential(dropout, nn.ReLU(), dropout))
    assert isinstance(masks[0], MCDropout) and masks[2] is masks[0]


def test_patterns_may_name_a_shared_layer_by_any_of_its_names():
    assert isinstance(to_bayesian(Twice(), include=["decoder"]).encoder, BayesLinear)
    with pytest.raises(ValueError, match="no linear or convolutional layer is left"):
        to_bayesian(Twice(), exclude=["nested.copy"])


class OwnLinear(nn.Linear):
    """Reads its weight itself."""


def test_layers_that_are_more_than_linear_are_left_alone():
    net = to_bayesian(nn.Sequential(OwnLinear(3, 3), nn.Linear(3, 3), nn.Embedding(3, 3), nn.ConvTranspose2d(1, 1, 2)))
    assert [name for name, _ in bayesian_layers(net)] == ["1"]


@pytest.mark.parametrize("layer", [nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)], ids=["lstm", "attention"])
def test_layers_with_tensors_of_their_own_are_named(layer):
    with pytest.warns(UserWarning, match=f"{type(layer).__name__} keep their weights in tensors of their own"):
        to_bayesian(nn.ModuleList([layer, nn.Linear(4, 4)]))


def test_dropout_layers_become_masks_of_samples():
    net = nn.Sequential(nn.Dropout(0.1), nn.Dropout1d(0.2), nn.Dropout2d(0.3), nn.Dropout3d(0.4), nn.Linear(2, 2))
    net.eval()
    to_mc_dropout(net, per_item=True)
    assert [(m.p, m.dimensions, m.per_item) for m in net[:4]] == [(p / 10, p - 1, True) for p in (1, 2, 3, 4)]
    assert type(net[4]) is nn.Linear
    assert [type(m) for m in to_deterministic(net)][:4] == [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d]
    with pytest.warns(UserWarning, match="LSTM have dropout of their own, which belongs to no sample"):
        to_mc_dropout(nn.ModuleList([nn.LSTM(4, 4, 2, dropout=0.5), nn.Dropout(0.5)]))


def encoder(dropout=0.3):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
    return nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()


@pytest.mark.filterwarnings("ignore:MultiheadAttention")
@pytest.mark.parametrize("posterior", ["gaussian", "dropout", "ensemble"])
def test_transformers_of_torch_are_random_in_evaluation_too(posterior):
    """Their fused kernel reads plain weights and skips dropout."""
    x = torch.randn(3, 5, 8)
    expected = encoder()(x)
    if posterior == "ensemble":
        net = to_ensemble(encoder(), 4)
    else:
        net = to_bayesian(encoder(), init=KEEP) if posterior == "gaussian" else to_mc_dropout(encoder())
        with torch.no_grad():
            torch.testing.assert_close(net(x), expected)
    with torch.no_grad(), SampleContext(range(4), 4, batch=3, expanded=True):
        found = net(x.repeat(4, 1, 1)).unflatten(0, (4, 3))
    assert found.shape == (4, 3, 5, 8)
    assert all((found[i] - found[0]).abs().min() > 0 for i in (1, 2, 3))


CLASSIFIERS = {
    "mlp": functools.partial(MLP, num_channels=3, image_size=16, hidden=[8], dropout=0.2),
    "cnn": functools.partial(CNN, num_channels=3, widths=(4, 8), dropout=0.2),
    "resnet": functools.partial(ResNet, 18, num_classes=10, stem="cifar", width=0.0625),
    "vgg": functools.partial(VGG, 11, 10, 3, width=0.0625, pool_stride=2, image_size=32),
    "vit": functools.partial(ViT, 10, 3, 16, 4, 16, 1, 2, dropout=0.2),
    "simple_vit": functools.partial(SimpleViT, image_size=16, width=16, depth=1, heads=2, dropout=0.2),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_every_classifier_of_the_program(kind):
    """Samples of the whole batch are those of single samples; training and evaluation work."""
    torch.manual_seed(0)
    net = to_bayesian(CLASSIFIERS[kind](), init=Init(sigma_scale=1.0)).eval()
    size = getattr(net, "image_size", 16) if kind != "vgg" else 32
    x = torch.randn(2, 3, size, size)
    found = run(net, x)
    assert found.shape == (3, 2, 10) and (found[0] != found[1]).any()
    with torch.no_grad(), SampleContext([1], 3, batch=2):
        torch.testing.assert_close(net(x), found[1], rtol=1e-4, atol=1e-5)
    with SampleContext(range(3), 3, batch=2):
        net.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("kind", ["mlp", "cnn", "vit", "simple_vit"])
def test_dropout_of_a_classifier_is_all_in_the_samples(kind):
    """Nothing is left to torch's global generator, in evaluation and, but for attention weights, in training."""
    torch.manual_seed(0)  # of other weights the few units may all be off
    net = to_mc_dropout(CLASSIFIERS[kind]())
    x = torch.randn(2, 3, 16, 16)
    if kind in ("vit", "simple_vit"):
        for block in net.blocks:
            block.attn.dropout = 0.0
    for mode in (True, False):
        net.train(mode)
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            with torch.no_grad(), SampleContext(range(3), 3, batch=2, expanded=True):
                found.append(net(x.repeat(3, 1, 1, 1)).unflatten(0, (3, 2)))
        assert torch.equal(*found) and (found[0][1:] != found[0][:1]).any()


def test_converting_warns_of_nothing_where_nothing_is_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_mc_dropout(to_bayesian(CLASSIFIERS["simple_vit"]()))
