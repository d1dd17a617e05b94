import pytest
import torch

from networks.template_library import TemplateLibrary


def spectra(number, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(number, 3, 9, generator=g).div_(0.5).softmax(1).half().float()


def brute(library, target, weight):
    off = (library[None] - target[:, None]).abs() * weight[:, None]
    return off.sum((2, 3)) / weight.sum((1, 2))[:, None]


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_the_nearest_ones_are_found_exactly(chunk):
    stored, target = spectra(200, 0), spectra(6, 1)
    weight = torch.rand(6, 3, 9, generator=torch.Generator().manual_seed(2))
    tokens = torch.arange(200)[:, None].repeat(1, 4)
    library = TemplateLibrary(stored, tokens, chunk)
    index, distance = library.nearest(target, weight, 5)
    stored_twice = torch.stack([stored[:, 0], 1 - stored[:, 0] - stored[:, 2], stored[:, 2]], 1)
    expected, order = brute(stored_twice, target, weight).sort(dim=1)
    torch.testing.assert_close(distance, expected[:, :5])
    assert torch.equal(index, order[:, :5])
    assert torch.equal(library.stacks(index), tokens[index])


def test_what_has_no_weight_does_not_count():
    stored = spectra(50, 0)
    target, weight = stored[[13]].clone(), torch.ones(1, 3, 9)
    target[..., 5:] = 0.9
    weight[..., 5:] = 0
    index, distance = TemplateLibrary(stored, torch.zeros(50, 2)).nearest(target, weight, 1)
    assert index.item() == 13 and distance.item() < 1e-3


def test_a_stored_spectrum_finds_itself():
    stored = spectra(300, 4)
    index, distance = TemplateLibrary(stored, torch.zeros(300, 2)).nearest(stored, torch.ones(300, 3, 9), 1)
    assert torch.equal(index[:, 0], torch.arange(300)) and distance.max() < 1e-3


def test_storage_counts_two_channels_and_the_ids():
    assert TemplateLibrary.bytes_per_stack(53, 7, 57) == 2 * 2 * 57 + 7
    assert TemplateLibrary.bytes_per_stack(903, 21, 171) == 2 * 2 * 171 + 2 * 21


def test_an_empty_library_is_refused():
    with pytest.raises(ValueError, match="0 spectra"):
        TemplateLibrary(spectra(0, 0), torch.zeros(0, 2))
