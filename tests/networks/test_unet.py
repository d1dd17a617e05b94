"""U-Net: shapes, what it sees, wrong sizes."""

from __future__ import annotations

import pytest
import torch

from networks.unet import UNet


@pytest.mark.parametrize(("depth", "height", "width"), [(1, 6, 4), (3, 32, 64)])
def test_logits_have_the_size_of_the_image(depth, height, width):
    net = UNet(5, 2, width=4, depth=depth)
    assert net(torch.randn(2, 2, height, width)).shape == (2, 5, height, width)


def test_number_of_parameters():
    """Twice 3 x 3 a stage, two numbers a channel of batch normalisation; the sizes of the experiment."""
    widths, count, before = (8, 16, 32, 64), 0, 3
    for width in widths:
        count += 9 * before * width + 9 * width * width + 4 * width
        before = width
    for coarse, fine in ((64, 32), (32, 16), (16, 8)):
        count += 9 * (coarse + fine) * fine + 9 * fine * fine + 4 * fine
    count += 8 * 4 + 4
    assert sum(p.numel() for p in UNet(4, 3, width=8, depth=3).parameters()) == count == 122_492


def test_fine_details_reach_the_output_past_the_coarse_stages():
    """The gradient of a pixel's logits with respect to its neighbours, with the coarsest features taken away."""
    net = UNet(3, 1, width=4, depth=2).eval()
    image = torch.randn(1, 1, 16, 16, requires_grad=True)
    net.down[-1].register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    net(image)[0, :, 8, 8].square().sum().backward()
    assert image.grad[0, 0, 7:10, 7:10].abs().min() > 0


def test_an_unfit_size_is_named():
    with pytest.raises(ValueError, match=r"data\.image_size: sides of 12 and 20 pixels are no multiples of 8"):
        UNet(3, depth=3)(torch.randn(1, 3, 12, 20))
    with pytest.raises(ValueError, match=r"model\.net\.depth=0"):
        UNet(3, depth=0)
