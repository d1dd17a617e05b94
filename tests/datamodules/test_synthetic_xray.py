from __future__ import annotations

import pytest
import torch

from datamodules.synthetic_xray import SyntheticXrayDataModule, synthetic_xrays


def test_images_repeat_with_their_seed():
    one, again, other = (
        synthetic_xrays(20, 32, seed=1),
        synthetic_xrays(20, 32, seed=1),
        synthetic_xrays(20, 32, seed=2),
    )
    assert one.images.shape == one.lungs.shape == (20, 1, 32, 32) and one.images.dtype == torch.uint8
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)
    before = torch.get_rng_state()
    synthetic_xrays(2, 16)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_of_them_have_three_to_twelve_opacities():
    xrays = synthetic_xrays(300, 16)
    assert xrays.labels.sum() == 150
    assert (xrays.num_opacities[xrays.labels == 0] == 0).all()
    positive = xrays.num_opacities[xrays.labels == 1]
    assert positive.min() == 3 and positive.max() == 12


def test_the_same_chests_at_every_size():
    small, large = synthetic_xrays(8, 32, seed=3), synthetic_xrays(8, 96, seed=3)
    assert torch.equal(small.labels, large.labels) and torch.equal(small.num_opacities, large.num_opacities)
    shrunk = torch.nn.functional.avg_pool2d(large.images.float(), 3)
    assert (shrunk - small.images).abs().mean() < 3


def test_it_is_a_chest():
    """Dark lungs left and right of a bright spine, the heart below; few pixels beyond black and white."""
    xrays = synthetic_xrays(400, 64)
    image = xrays.images.float() / 255
    lungs = xrays.lungs.float()
    inside = (image * lungs).sum((1, 2, 3)) / lungs.sum((1, 2, 3))
    spine = image[:, 0, 20:50, 30:34].mean((1, 2))
    assert (spine > inside + 0.1).all()
    assert 0.1 < lungs.mean() < 0.3
    assert ((image == 0) | (image == 1)).float().mean() < 0.001
    data = SyntheticXrayDataModule()
    assert image.mean() == pytest.approx(data.mean, abs=0.01) and image.std() == pytest.approx(data.std, abs=0.01)


def test_opacities_are_bright_in_the_outer_thirds_of_the_lungs():
    with_, without = (synthetic_xrays(200, 64, contrast=contrast, seed=5) for contrast in (1.0, 0.0))
    change = (with_.images.float() - without.images.float()).mean((0, 1))
    positive = with_.labels == 1
    assert (change * 1.0).mean() > 0
    middle = change[:, 24:40].abs().mean()
    assert change[12:46, 6:20].mean() > 3 * middle and change[12:46, 44:58].mean() > 3 * middle
    # 5 to 15 % of the light: the brightest changes are of that order on the scale of 3.5 optical depths.
    most = (with_.images.float() - without.images.float())[positive].amax((1, 2, 3)) / 255 * 3.5
    assert 0.05 < most.median() < 0.5


def test_photons_are_noisy():
    """Two thirds of the noise follow from the counts: 1e4 photons per pixel."""
    outside = synthetic_xrays(40, 64).images[:, 0, :3, :3].float() / 255 * 3.5
    noise = (outside - outside.mean((1, 2), keepdim=True)).std()
    assert 0.005 < noise < 0.02


def accuracy_of_logistic_regression(features, labels, test_features, test_labels) -> float:
    mean, std = features.mean(0), features.std(0)
    design, test_design = (
        torch.cat([(f - mean) / std, torch.ones(len(f), 1)], 1).double() for f in (features, test_features)
    )
    weights = torch.zeros(design.shape[1], dtype=torch.float64)
    for _ in range(30):  # Newton's method
        p = torch.sigmoid(design @ weights)
        curvature = (design.T * (p * (1 - p))) @ design
        weights -= torch.linalg.solve(curvature + 1e-6 * torch.eye(len(weights)), design.T @ (p - labels))
    return ((test_design @ weights > 0) == (test_labels == 1)).double().mean().item()


@pytest.mark.parametrize("contrast", [1.0, 2.0])
def test_brightness_does_not_tell(contrast):
    """The task is texture: a logistic model on the mean lung intensity stays below 75 %, by far."""
    train, test = (synthetic_xrays(1000, 64, contrast=contrast, seed=seed) for seed in (0, 1))

    def mean_lung(xrays):
        lungs = xrays.lungs.float()
        return ((xrays.images * lungs).sum((1, 2, 3)) / lungs.sum((1, 2, 3)))[:, None]

    def more(xrays):
        lungs, mean = xrays.lungs.float(), mean_lung(xrays)
        spread = ((xrays.images - mean.view(-1, 1, 1, 1)) ** 2 * lungs).sum((1, 2, 3)) / lungs.sum((1, 2, 3))
        whole = xrays.images.float()
        return torch.stack([mean[:, 0], spread.sqrt(), whole.mean((1, 2, 3)), whole.std((1, 2, 3))], 1)

    for features in (mean_lung, more):
        assert accuracy_of_logistic_regression(features(train), train.labels, features(test), test.labels) < 0.7
    # The regression itself works: with the number of opacities it knows the answer.
    counted = accuracy_of_logistic_regression(
        train.num_opacities[:, None].float(), train.labels, test.num_opacities[:, None].float(), test.labels
    )
    assert counted == 1


def test_parts_and_sizes_of_the_data():
    data = SyntheticXrayDataModule(num_train=40, num_val=10, num_test=12, batch_size=8)
    data.setup("fit")
    data.setup("test")
    assert len(data.train_dataloader().dataset) == 40 and len(data.test_dataloader().dataset) == 12
    assert data.train_dataloader().dataset[0]["image"].shape == (1, 68, 68)
    assert data.images("val", 64).names[:2] == ["val_00000", "val_00001"]
    val, test = data.images("val", 64), data.images("test", 64)
    assert not torch.equal(val.read(range(10)), test.read(range(10)))
    other = SyntheticXrayDataModule(num_train=40, num_val=10, num_test=12, data_seed=1)
    assert not torch.equal(other.images("val", 64).read(range(10)), val.read(range(10)))


@pytest.mark.parametrize(("key", "value"), [("num_val", 1), ("contrast", -1)])
def test_wrong_arguments_are_named(key, value):
    with pytest.raises(ValueError, match=rf"data\.{key}={value}"):
        SyntheticXrayDataModule(**{key: value})
