from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from datamodules.random_views import NUM_DRAWS, SIZE_DRAWS, cut_out, random_views, resized_views, uniform_per_sample


def draws(flip=0.9, angle=0.5, row=0.0, column=0.0, n=1) -> torch.Tensor:
    return torch.tensor([[flip, angle, row, column]], dtype=torch.float64).expand(n, -1)


def test_numbers_depend_on_seed_epoch_stream_and_sample_alone():
    index = np.arange(100)
    whole = uniform_per_sample(3, 5, index)
    assert whole.shape == (100, NUM_DRAWS)
    np.testing.assert_array_equal(uniform_per_sample(3, 5, index[[7, 99, 0]]), whole[[7, 99, 0]])
    for seed, epoch, stream in ((4, 5, 0), (3, 6, 0), (5, 3, 0), (3, 5, 1), (3, 5, 2)):
        assert not np.isin(uniform_per_sample(seed, epoch, index, stream=stream), whole).any()
    np.testing.assert_array_equal(uniform_per_sample(3, 5, index, stream=0), whole)


def test_numbers_are_uniform_and_unrelated():
    numbers = uniform_per_sample(0, 0, np.arange(20_000))
    assert numbers.min() >= 0 and numbers.max() < 1 and len(np.unique(numbers)) == numbers.size
    counts = np.stack([np.histogram(column, 10, (0, 1))[0] for column in numbers.T])
    assert (np.abs(counts - 2000) < 200).all()  # 4.7 standard deviations
    correlation = np.corrcoef(np.concatenate([numbers[:-1], numbers[1:]], 1).T) - np.eye(2 * NUM_DRAWS)
    assert np.abs(correlation).max() < 0.04


def test_nothing_is_drawn_from_the_global_state():
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    random_views(torch.rand(2, 1, 12, 12, generator=torch.Generator()), draws(n=2), size=8)
    uniform_per_sample(0, 0, np.arange(4))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize(("stored", "size", "padding"), [(12, 9, 2), (11, 9, 2), (12, 12, 0), (9, 12, 3)])
def test_every_cut_of_the_padded_image(stored, size, padding):
    """Without a rotation the view is a plain cut, to the pixel."""
    image = torch.rand(1, 1, stored, stored, dtype=torch.float64)
    padded = F.pad(image, (padding,) * 4)
    places = stored + 2 * padding - size + 1
    seen = set()
    for row in range(places):
        for column in range(places):
            at = draws(row=(row + 0.5) / places, column=(column + 0.5) / places)
            view = random_views(image, at, size=size, padding=padding)
            cut = padded[:, :, row : row + size, column : column + size]
            torch.testing.assert_close(view, cut, rtol=0, atol=1e-12)
            seen.add((row, column))
    assert len(seen) == places**2


def test_flip_comes_before_the_cut():
    image = torch.rand(1, 1, 12, 12, dtype=torch.float64)
    view = random_views(image, draws(flip=0.2, row=0.3, column=0.1), size=9, padding=2)
    same = random_views(image.flip(-1), draws(flip=0.7, row=0.3, column=0.1), size=9, padding=2)
    torch.testing.assert_close(view, same, rtol=0, atol=1e-12)


@pytest.mark.parametrize("flip", [0.1, 0.9])
def test_quarter_turns_are_exact(flip):
    """At 90 degrees no pixel has to be interpolated."""
    image = torch.rand(1, 1, 12, 12, dtype=torch.float64)
    expected = image.flip(-1) if flip < 0.5 else image
    for angle, turns in ((0.0, -1), (1.0, 1)):
        view = random_views(image, draws(flip, angle, 0.3, 0.3), size=10, rotation_degrees=90, padding=1)
        at = int(0.3 * 5)
        cuts = [F.pad(expected.rot90(k, (2, 3)), (1,) * 4)[:, :, at : at + 10, at : at + 10] for k in (turns, -turns)]
        assert min((view - cut).abs().max() for cut in cuts) < 1e-9


def test_a_rotated_disc_is_the_same_disc():
    axis = torch.arange(40, dtype=torch.float64) - 19.5
    disc = torch.sigmoid(12 - (axis[:, None] ** 2 + axis**2).sqrt())[None, None]
    for angle in (0.1, 0.4, 0.8):
        view = random_views(disc, draws(angle=angle), size=40, rotation_degrees=30, padding=0)
        assert (view - disc).abs().max() < 0.05


def test_batches_are_treated_sample_by_sample():
    images = torch.rand(6, 1, 20, 20)
    numbers = torch.from_numpy(uniform_per_sample(0, 0, np.arange(6)))
    views = random_views(images, numbers, size=16, padding=2)
    one_by_one = torch.cat([random_views(images[i : i + 1], numbers[i : i + 1], size=16, padding=2) for i in range(6)])
    torch.testing.assert_close(views, one_by_one, rtol=0, atol=1e-6)


def sized(flip=0.9, row=0.0, column=0.0, area=0.0, shape=0.5) -> torch.Tensor:
    return torch.tensor([[flip, 0.5, row, column, area, shape]], dtype=torch.float64)


@pytest.mark.parametrize("flip", [0.1, 0.9])
def test_the_whole_image_is_a_plain_resizing(flip):
    image = torch.rand(1, 3, 12, 12, dtype=torch.float64)
    expected = image.flip(-1) if flip < 0.5 else image
    for size in (12, 18, 24):
        view = resized_views(image, sized(flip), size=size, scale=(1.0, 1.0), ratio=(1.0, 1.0))
        wanted = F.interpolate(expected, size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(view, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (6, 6), (2, 5), (6, 1)])
def test_a_cut_of_some_of_the_area_at_every_place(row, column):
    """A quarter of 12 x 12 pixels are 6 x 6, at offsets 0 to 6."""
    image = torch.rand(1, 1, 12, 12, dtype=torch.float64)
    at = sized(row=row / 6, column=column / 6)
    cut = image[:, :, row : row + 6, column : column + 6]
    view = resized_views(image, at, size=6, scale=(0.25, 0.25), ratio=(1.0, 1.0))
    torch.testing.assert_close(view, cut, rtol=0, atol=1e-12)
    # Enlarged it is the same but at its edge, where the view sees what lies beyond the cut.
    larger = resized_views(image, at, size=12, scale=(0.25, 0.25), ratio=(1.0, 1.0))
    wanted = F.interpolate(cut, 12, mode="bilinear", align_corners=False)
    torch.testing.assert_close(larger[..., 1:-1, 1:-1], wanted[..., 1:-1, 1:-1], rtol=0, atol=1e-12)


def test_sizes_and_shapes_of_the_cuts():
    """Of images whose values are their coordinates, so that a view tells where it was cut."""
    stored, size, number = 64, 32, 4000
    axis = torch.arange(stored, dtype=torch.float64) + 0.5
    image = torch.stack([axis.expand(stored, stored), axis[:, None].expand(stored, stored)])[None]
    numbers = torch.from_numpy(uniform_per_sample(0, 0, np.arange(number), NUM_DRAWS + SIZE_DRAWS))
    options = {"size": size, "scale": (0.1, 0.5), "ratio": (0.5, 2.0), "flip_probability": 0.0}
    views = resized_views(image.expand(number, -1, -1, -1), numbers, **options)
    inner = slice(8, 24)
    width = (views[:, 0, 16, inner].diff().mean(1)) * size / stored
    height = (views[:, 1, inner, 16].diff().mean(1)) * size / stored
    fits = (numbers[:, 4] * 0.4 + 0.1) * 2 <= 1  # the longest side of the others may not
    area, shape = (width * height)[fits], (width / height)[fits]
    torch.testing.assert_close(area, (0.1 + 0.4 * numbers[:, 4])[fits], rtol=1e-9, atol=0)
    torch.testing.assert_close(shape.log2(), (2 * numbers[:, 5] - 1)[fits], rtol=0, atol=1e-9)
    assert width.max() <= 1 + 1e-9 and height.max() <= 1 + 1e-9
    left, top = (
        views[:, 0, 16, 15:17].mean(1) / stored - width / 2,
        views[:, 1, 15:17, 16].mean(1) / stored - height / 2,
    )
    assert min(left.min(), top.min()) > -1e-9 and max((left + width).max(), (top + height).max()) < 1 + 1e-9
    torch.testing.assert_close(left, numbers[:, 3] * (1 - width), rtol=0, atol=1e-9)
    torch.testing.assert_close(top, numbers[:, 2] * (1 - height), rtol=0, atol=1e-9)


def test_resized_views_turn_as_the_others_do():
    image = torch.rand(2, 1, 12, 12, dtype=torch.float64)
    for angle in (0.1, 0.8):
        common = {"size": 12, "rotation_degrees": 40.0}
        whole = sized().expand(2, -1).clone()
        whole[:, 1] = angle
        ours = resized_views(image, whole, scale=(1.0, 1.0), ratio=(1.0, 1.0), **common)
        torch.testing.assert_close(ours, random_views(image, draws(0.9, angle, n=2), padding=0, **common))


@pytest.mark.parametrize("size", [1, 4, 5])
def test_squares_are_cut_out_at_the_drawn_places(size):
    images = torch.ones(200, 2, 12, 16)
    numbers = torch.from_numpy(uniform_per_sample(0, 0, np.arange(200), 2))
    cut = cut_out(images, numbers, size)
    assert torch.equal(images, torch.ones_like(images))
    for view, (row, column) in zip(cut, numbers, strict=True):
        top, left = int(row * 12) - size // 2, int(column * 16) - size // 2
        expected = torch.ones(2, 12, 16)
        expected[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
        assert torch.equal(view, expected)
