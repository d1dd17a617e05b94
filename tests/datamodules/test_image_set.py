from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.image_set import ImageBatches, ImageSet, block_means, moments, stratified
from datamodules.loading import whole_batch
from datamodules.readers.stored_images import first_of_each_class


def images(number=20, size=6, channels=3, seed=0) -> ImageSet:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (2 * number, size, size, channels)).astype(np.uint8)
    rows = rng.permutation(2 * number)[:number]
    return ImageSet(pixels, rows, rng.integers(0, 4, number), [f"i{row}" for row in rows])


def test_a_batch_is_what_single_images_are():
    data = ImageBatches(images())
    batch = whole_batch(data.__getitems__([7, 0, 3]))
    assert batch["image"].shape == (3, 3, 6, 6) and batch["image"].dtype == torch.uint8
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    for place, i in enumerate([7, 0, 3]):
        single = data[i]
        assert {key: value[place].tolist() for key, value in batch.items()} == {
            k: v.tolist() for k, v in single.items()
        }
        stored = data.images.pixels[data.images.rows[i]]
        np.testing.assert_array_equal(single["image"].permute(1, 2, 0), stored)
        assert single["label"] == data.images.labels[i] and single["index"] == i


def test_block_means_are_rounded_means():
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 6, 6, 2)).astype(np.uint8)
    for size in (1, 2, 3, 6):
        block = 6 // size
        exact = pixels.reshape(1500, size, block, size, block, 2).mean((2, 4))
        found = block_means(pixels, size)
        assert found.dtype == np.uint8
        assert np.abs(found - exact).max() <= 0.5 + 1e-9
        np.testing.assert_array_equal(found, np.floor(exact + 0.5 + 1e-9))


def test_a_stratified_choice_takes_the_same_part_of_every_class():
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    chosen = stratified(labels, 0.1, 3)
    assert np.bincount(labels[chosen]).tolist() == [10, 5, 1]
    np.testing.assert_array_equal(chosen, stratified(labels, 0.1, 3))
    assert (chosen != stratified(labels, 0.1, 4)).any()
    assert not stratified(labels, 0.0, 0).any()


def test_a_choice_draws_nothing_from_the_global_state():
    before = torch.get_rng_state()
    stratified(np.arange(10) % 2, 0.5, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_moments_are_those_of_the_chosen_rows():
    chosen = images(number=2100)
    first, second = moments(chosen)
    values = chosen.pixels[chosen.rows].astype(np.float64)
    np.testing.assert_allclose(first, values.mean((1, 2)), rtol=1e-14)
    np.testing.assert_allclose(second, (values**2).mean((1, 2)), rtol=1e-14)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(6, [0, 1, 3, 4, 7, 8]), (3, [0, 3, 7]), (8, [0, 1, 2, 3, 4, 5, 7, 8]), (9, [0, 1, 2, 3, 4, 5, 6, 7, 8])],
)
def test_the_first_of_every_class(number, expected):
    """A class that has fewer images gives all of them, the others make up for it."""
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2])
    assert first_of_each_class(labels, number).tolist() == expected
