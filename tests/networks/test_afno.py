from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from networks.afno import AFNOFilter, AFNONet


def published(layer: AFNOFilter, x: Tensor) -> Tensor:
    """The layer written out as its equations stand: sums over channels, real and imaginary parts apart."""
    batch, h, w, dim = x.shape
    size = dim // layer.num_blocks
    z = torch.fft.rfft2(x, dim=(1, 2), norm="ortho").reshape(batch, h, w // 2 + 1, layer.num_blocks, size)
    total = h // 2 + 1
    kept = int(total * layer.kept_modes)
    rows, columns = slice(total - kept, total + kept), slice(None, kept)
    re, im = z[:, rows, columns].real, z[:, rows, columns].imag

    def product(re, im, w, b):
        times = lambda a, m: torch.einsum("...ki,kio->...ko", a, m)  # noqa: E731
        return times(re, w[0]) - times(im, w[1]) + b[0], times(im, w[0]) + times(re, w[1]) + b[1]

    re, im = product(re, im, layer.w1, layer.b1)
    re, im = product(F.relu(re), F.relu(im), layer.w2, layer.b2)
    out = torch.zeros_like(z)
    out[:, rows, columns] = torch.complex(F.softshrink(re, layer.shrinkage), F.softshrink(im, layer.shrinkage))
    return torch.fft.irfft2(out.reshape(batch, h, w // 2 + 1, dim), s=(h, w), dim=(1, 2), norm="ortho") + x


@pytest.mark.parametrize("kept", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(16, 16), (8, 16)])
def test_the_published_layer(shape, kept):
    torch.manual_seed(0)
    layer = AFNOFilter(32, 4, kept_modes=kept, compat="nvlabs").double()
    x = torch.randn(2, *shape, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), published(layer, x), atol=1e-12, rtol=0)


def passed(layer: AFNOFilter, h: int, w: int) -> Tensor:
    """Which frequencies of a random field the filter lets through."""
    layer.shrinkage = 0.0
    x = torch.randn(1, h, w, layer.dim)
    return torch.fft.rfft2(layer(x) - x, dim=(1, 2), norm="ortho").abs().amax((0, 3)) > 1e-5


def test_all_zonal_modes_pass_on_a_grid_of_two_to_one():
    torch.manual_seed(0)
    assert passed(AFNOFilter(16, 2), 16, 32).sum(1).tolist() == [17] * 16
    half = passed(AFNOFilter(16, 2, compat="nvlabs"), 16, 32)
    assert half.any(0).sum() == 9  # of 17


def test_a_share_keeps_the_lowest_frequencies():
    torch.manual_seed(0)
    found = passed(AFNOFilter(16, 2, kept_modes=0.5), 16, 32)
    rows = torch.nonzero(found.any(1)).flatten().tolist()
    assert sorted(min(row, 16 - row) for row in rows) == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert torch.nonzero(found.any(0)).flatten().tolist() == list(range(9))
    highest = torch.nonzero(passed(AFNOFilter(16, 2, kept_modes=0.5, compat="nvlabs"), 16, 32).any(1)).flatten()
    assert highest.min() >= 4


def test_half_precision_is_computed_in_single():
    torch.manual_seed(0)
    layer, x = AFNOFilter(16, 2), torch.randn(1, 8, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(x.bfloat16())
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), layer(x), atol=0.03, rtol=0.03)


def test_parameters_of_the_published_network():
    with torch.device("meta"):
        assert sum(p.numel() for p in AFNONet(720, 1440, 20).parameters()) == 74_690_304
        assert sum(p.numel() for p in AFNONet(720, 1440, 20, compat="nvlabs").parameters()) == 74_691_840


def test_what_is_trained_of_the_published_network_is_used():
    """Several processes wait for the gradient of every trained parameter; the final norm has none."""
    net = AFNONet(16, 32, 3, patch_size=4, dim=16, depth=2, num_blocks=2, compat="nvlabs")
    net(torch.randn(1, 3, 16, 32)).square().sum().backward()
    assert {name for name, p in net.named_parameters() if p.grad is None} == {"norm.weight", "norm.bias"}
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {"norm.weight", "norm.bias"}


def test_every_parameter_is_used_and_every_patch_comes_home():
    torch.manual_seed(0)
    net = AFNONet(16, 32, 3, 2, patch_size=4, dim=16, depth=2, num_blocks=2)
    out = net(torch.randn(2, 3, 16, 32))
    assert out.shape == (2, 2, 16, 32)
    out.square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]
    # A head that repeats channel 0 of a token in its patch: the pixel (i, j) shows the token (i // 4, j // 4).
    net.blocks, net.position.data = torch.nn.Sequential(), torch.zeros_like(net.position)
    with torch.no_grad():
        net.patch_embedding.weight.zero_()
        net.patch_embedding.bias.zero_()
        net.patch_embedding.weight[0, 0, 0, 0] = 1.0  # the upper left pixel of channel 0
        net.head.weight.zero_()
        net.head.weight[:, 0] = 1.0
    field = torch.randn(1, 3, 16, 32)
    expected = field[:, :1, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3).expand(1, 2, 16, 32)
    torch.testing.assert_close(net(field), expected)


def test_wrong_sizes():
    with pytest.raises(ValueError, match="patch_size=5"):
        AFNONet(16, 32, 3, patch_size=5)
    with pytest.raises(ValueError, match="num_blocks=3"):
        AFNOFilter(16, 3)
    with pytest.raises(ValueError, match="kept_modes=0"):
        AFNOFilter(16, 2, kept_modes=0)
    with pytest.raises(ValueError, match="compat='other'"):
        AFNOFilter(16, 2, compat="other")
