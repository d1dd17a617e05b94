import functools

import pytest
import torch

from networks.diffusion import Sampler
from networks.optogpt import OptoGPT
from networks.optollama import MaskedDiffusionDenoiser
from networks.spectrum_encoders import ChannelTokens, DenseTokens, PatchTokens, Whitening
from networks.stack_generator import rotated
from networks.token_choice import Constraints

V, L, W = 17, 6, 11
SIZES = {"num_tokens": V, "length": L, "num_wavelengths": W, "width": 16, "depth": 2, "heads": 2, "hidden": 32}


def stacks(number, seed=0):
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, L, (number, 1), generator=g)
    tokens = torch.randint(0, V - 3, (number, L), generator=g)
    place = torch.arange(L)
    return torch.where(place < length, tokens, torch.where(place == length, V - 3, V - 2))


def spectra(number, seed=0):
    return torch.rand(number, 3, W, generator=torch.Generator().manual_seed(seed)).softmax(1)


ENCODERS = {
    "published": lambda: None,
    "channels": lambda: ChannelTokens(W, 16),
    "patches": lambda: PatchTokens(W, 16, patch=4, depth=1, heads=2),
    "dense": lambda: DenseTokens(W, 16, hidden=24, depth=1, count=5),
}
NETS = {
    "optollama": functools.partial(MaskedDiffusionDenoiser, **SIZES),
    "masked": functools.partial(
        MaskedDiffusionDenoiser, **SIZES, loss="masked", schedule="linear", sampler=Sampler(redraw="masked")
    ),
    "elbo": functools.partial(
        MaskedDiffusionDenoiser, **SIZES, loss="elbo", schedule="cosine", sampler=Sampler("ancestral"), final_norm=True
    ),
    "learned": functools.partial(MaskedDiffusionDenoiser, **SIZES, position="learned"),
    "rotary": functools.partial(MaskedDiffusionDenoiser, **SIZES, position="rotary"),
    "added": functools.partial(MaskedDiffusionDenoiser, **SIZES, condition="add"),
    "optogpt": functools.partial(OptoGPT, **SIZES),
    "optogpt_added": functools.partial(OptoGPT, **SIZES, ffn="silu", condition="add"),
    "optogpt_silu": functools.partial(OptoGPT, **SIZES, ffn="silu", label_smoothing=0.1),
}


def made(name, encoder="published"):
    torch.manual_seed(0)
    if "added" in name:  # a token of the spectrum for each place of the stack
        return NETS[name](encoder=DenseTokens(W, 16, hidden=24, depth=1, count=L)).eval()
    return NETS[name](encoder=ENCODERS[encoder]()).eval()


def terms(net, number=8, **kwargs):
    index = torch.arange(number)
    given = {"index": index, "key": (0, 1), "place": index, "count": number} | kwargs
    return net.loss_terms(spectra(number), stacks(number), **given)


# ------------------------------------------------------------------------------------------------------ architecture


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", NETS)
def test_every_weight_learns(name, encoder):
    net = made(name, encoder).train()
    found = terms(net, 32)
    (found.total / found.weight).backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    if "optogpt" in name and encoder == "published":  # attention to a single token does not depend on the query
        without = [n for n in without if not n.split(".", 2)[-1].startswith(("cross.query", "cross.key", "norms.1"))]
    # Keys have no use for a bias: it shifts all scores of a query alike.
    assert [n for n in without if not n.endswith("key.bias")] == []


@pytest.mark.parametrize("name", NETS)
def test_probabilities_sum_to_one(name):
    net = made(name)
    log_p = net.log_probs(spectra(4), stacks(4), torch.rand(4))
    assert log_p.shape == (4, L, V)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(4, L))


def test_the_denoiser_looks_both_ways_and_the_decoder_back():
    tokens, other = stacks(4), stacks(4)
    other[:, 3] = (other[:, 3] + 1) % (V - 3)
    for name, earlier_differ in (("optollama", True), ("rotary", True), ("optogpt", False)):
        net, t = made(name), torch.full((4,), 0.5)
        off = (net.log_probs(spectra(4), tokens, t) - net.log_probs(spectra(4), other, t)).abs().amax((0, 2))
        assert (off[:3].max() > 1e-6) == earlier_differ, name
        assert off[4:].min() > 1e-6
        if name == "optogpt":
            assert off[:4].max() == 0  # the token at a place is not seen there


def test_time_reaches_the_denoiser_only_if_it_is_scaled():
    """Frequencies of 1 and below hardly tell t = 0.50 from 0.52; this is why time_scale exists."""
    tokens = stacks(4)

    def change(scale):
        net = made("optollama")
        net.time_scale = scale
        a, b = (net.log_probs(spectra(4), tokens, torch.full((4,), t)) for t in (0.5, 0.52))
        return (a - b).abs().max()

    assert change(1000.0) > 10 * change(1.0) > 0


def test_the_spectrum_reaches_every_network():
    for name in NETS:
        net, t = made(name), torch.full((4,), 0.9)
        a, b = (net.log_probs(spectra(4, seed), stacks(4), t) for seed in (0, 1))
        assert (a - b).abs().max() > 1e-4, name


def test_turned_pairs_depend_on_distances_alone():
    x, y = torch.randn(2, 1, 1, 4, 8, dtype=torch.float64)
    near = rotated(x) @ rotated(y).mT
    far = rotated(x, first=7) @ rotated(y, first=7).mT
    torch.testing.assert_close(near, far, rtol=0, atol=1e-5)  # angles are single precision
    assert (rotated(x).norm(dim=-1) - x.norm(dim=-1)).abs().max() < 1e-6


def test_whitened_spectra_vary_alike():
    g = torch.Generator().manual_seed(0)
    smooth = torch.randn(4000, 2, W, generator=g, dtype=torch.float64).cumsum(-1)  # neighbours vary together
    spectra = torch.cat([smooth[:, :1], torch.full((4000, 1, W), torch.nan, dtype=torch.float64), smooth[:, 1:]], 1)
    whitening = Whitening(W, floor=1e-9).double()
    before = whitening(spectra)
    torch.testing.assert_close(before, 2 * smooth.flatten(1) - 1)
    whitening.fit(spectra)
    found = whitening(spectra)
    torch.testing.assert_close(torch.cov(found.T), torch.eye(2 * W, dtype=torch.float64), rtol=0, atol=1e-6)
    assert found.mean(0).abs().max() < 1e-9
    again = Whitening(W).double()
    again.load_state_dict(whitening.state_dict())
    assert torch.equal(again(spectra), found)
    coarse = Whitening(W, floor=100.0).double()
    coarse.fit(spectra)
    assert torch.cov(coarse(spectra).T).diagonal().max() < 0.6  # small directions stay small
    with pytest.raises(ValueError, match="floor=0"):
        Whitening(W, floor=0)


@pytest.mark.parametrize("ffn", ["linear", "silu"])
def test_the_published_feed_forward_layer_is_linear(ffn):
    torch.manual_seed(0)
    layer = OptoGPT(**SIZES, ffn=ffn).blocks[0].feed_forward.double()
    x, y = torch.randn(2, 5, 16, dtype=torch.float64)
    off = layer(x + y) - layer(x) - layer(y) + layer(torch.zeros_like(x))
    assert (off.abs().max() < 1e-12) == (ffn == "linear")


# ---------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("name", NETS)
def test_the_loss_of_an_item_does_not_depend_on_the_batch(name):
    net = made(name)
    whole = terms(net, 8)
    index = torch.tensor([5, 2])
    part = net.loss_terms(spectra(8)[index], stacks(8)[index], index, (0, 1), index, 8)
    torch.testing.assert_close(part.nll, whole.nll[index])
    assert torch.equal(part.counted, whole.counted[index])
    other = terms(net, 8, key=(0, 2))
    assert torch.equal(other.counted, whole.counted) == (name not in ("masked", "elbo"))


def test_pad_is_no_target():
    for name in NETS:
        assert not terms(made(name)).counted[stacks(8) == V - 2].any(), name


def test_the_decoder_s_loss_is_that_of_the_next_token():
    net, tokens = made("optogpt"), stacks(8)
    found = terms(net)
    log_p = net.log_probs(spectra(8), tokens)
    nll = -log_p.gather(-1, tokens[..., None])[..., 0]
    kept = tokens != V - 2
    torch.testing.assert_close(found.total / found.weight, nll[kept].mean())


# -------------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("name", NETS)
def test_draws_depend_on_target_and_number_alone(name):
    net, s = made(name), spectra(5)
    every = net.sample(s, range(4), torch.arange(5), seed=3)
    assert every.shape == (5, 4, L)
    again = net.sample(s[[4, 1]], [2, 0], torch.tensor([4, 1]), seed=3)
    assert torch.equal(again, every[[4, 1]][:, [2, 0]])
    assert not torch.equal(net.sample(s, range(4), torch.arange(5), seed=4), every)
    assert len(every.view(-1, L).unique(dim=0)) > 10


@pytest.mark.parametrize("name", NETS)
def test_draws_keep_to_constraints(name):
    net = made(name)
    allowed = torch.ones(V, dtype=torch.bool)
    allowed[:7] = False
    found = net.sample(spectra(20), range(50), torch.arange(20), constraints=Constraints(allowed, 3, 2)).view(-1, L)
    layers = (found < V - 3).sum(1)
    assert set(layers.tolist()) <= {2, 3} and not ((found < 7).any() or (found == V - 1).any())


@pytest.mark.parametrize("name", ["optogpt", "optogpt_silu", "optogpt_added"])
@pytest.mark.parametrize("encoder", ["published", "dense"])
def test_kept_keys_and_values_change_nothing(name, encoder):
    """Greedy writing with the cache equals writing anew from the beginning for every token."""
    net, s = made(name, encoder), spectra(6)
    found = net.sample(s, [0], torch.arange(6), sampler=Sampler(temperature=0.0))[:, 0]
    allowed = Constraints().table(V, L, net.special)
    tokens = torch.full((6, L), net.special.pad)
    for place in range(L):
        logits = net(s, tokens)[:, place].masked_fill(~allowed[place], -torch.inf)
        tokens[:, place] = logits.argmax(-1)
    ended = (tokens == net.special.eos).cumsum(1) - (tokens == net.special.eos).long() > 0
    assert torch.equal(found, tokens.masked_fill(ended, net.special.pad))


@pytest.mark.parametrize("name", ["optollama", "optogpt"])
def test_a_network_learns_what_spectra_say(name):
    """Spectra that name their stack: both networks draw it in the end."""
    torch.manual_seed(0)
    net = NETS[name]()
    tokens = stacks(16, seed=3)
    shown = torch.randn(16, 3, W, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    index = torch.arange(16)
    for step in range(350):
        found = net.loss_terms(shown, tokens, index, (0, step), torch.randperm(16), 16)  # else 0 is never masked
        optimizer.zero_grad()
        (found.total / found.weight).backward()
        optimizer.step()
    net.eval()
    drawn = net.sample(shown, range(5), index)
    assert (drawn == tokens[:, None]).all(-1).double().mean() > 0.9


def test_steps_are_recorded():
    for name, steps in (("optollama", 20), ("optogpt", L)):
        record = []
        net = made(name)
        drawn = net.sample(spectra(3), range(2), torch.arange(3), record=record)
        assert len(record) == steps and torch.equal(record[-1], drawn)


def test_wrong_settings_are_refused():
    for arguments, message in (
        ({"position": "x"}, "net.position='x'"),
        ({"loss": "x"}, "net.loss='x'"),
        ({"condition": "x"}, "net.condition='x'"),
        ({"schedule": "x"}, "net.schedule='x'"),
        ({"heads": 3}, "net.heads=3"),
        ({"loss": "masked"}, "set model.net.sampler.redraw=masked"),
        ({"num_tokens": 3}, "net.num_tokens=3"),
        ({"length": 1}, "net.length=1"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskedDiffusionDenoiser(**SIZES | arguments)
    with pytest.raises(ValueError, match=r"net.ffn='gelu'"):
        OptoGPT(**SIZES, ffn="gelu")
    with pytest.raises(ValueError, match="patch=12: must be 1 to 11"):
        PatchTokens(W, 16, patch=12)
    with pytest.raises(ValueError, match=r"set model\.net\.encoder\.count=6"):
        MaskedDiffusionDenoiser(**SIZES, condition="add").log_probs(spectra(1), stacks(1), torch.rand(1))
    with pytest.raises(ValueError, match=r"\(3, 10\).*num_wavelengths=11"):
        made("optollama").log_probs(torch.rand(1, 3, 10), stacks(1), torch.rand(1))
