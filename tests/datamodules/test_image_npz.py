from __future__ import annotations

import hashlib

import numpy as np
import pytest

from datamodules.readers.image_npz import read_image_npz

X = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3)).astype(np.uint8)
Y = np.array([0, 1, 2, 0, 1, 2])


def test_what_was_written_is_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x_train=X, y_train=Y[:, None], x_test=X[:2, ..., 0], y_test=Y[:2])
    train = read_image_npz(tmp_path / "a.npz", "train", num_classes=None)
    np.testing.assert_array_equal(train.load(np.arange(6)), X)
    assert train.labels.tolist() == Y.tolist() and len(train.class_names) == 3
    test = read_image_npz(tmp_path / "a.npz", "test", num_classes=5)
    assert test.load(np.arange(2)).shape == (2, 4, 4, 1) and len(test.class_names) == 5
    np.savez(tmp_path / "b.npz", x_train=X, y_train=Y)
    assert read_image_npz(tmp_path / "b.npz", "test", num_classes=None) is None


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x_train": X}, r"no array y_train; it has x_train"),
        ({"images": X}, r"no array x_train, y_train; it has images"),
        ({"x_train": X / 255, "y_train": Y}, r"x_train: images are float64 of shape \(6, 4, 4, 3\); needed are uint8"),
        ({"x_train": X[:, :3], "y_train": Y}, r"images of 3 x 4 pixels; square ones are needed"),
        ({"x_train": X, "y_train": Y.astype(float)}, r"6 images, but labels are float64 of shape \(6,\)"),
        ({"x_train": X, "y_train": Y - 1}, r"label -1 of image 0 is outside 0\.\.1"),
    ],
)
def test_wrong_content_is_named(tmp_path, arrays, match):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"a\.npz.*{match}"):
        read_image_npz(tmp_path / "a.npz", "train", num_classes=None)


def test_wrong_files_are_named(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.npz: not a readable \.npz file"):
        read_image_npz(tmp_path / "a.npz", "train", num_classes=None)
    np.save(tmp_path / "b.npy", X)
    with pytest.raises(ValueError, match=r"b\.npy: a single array"):
        read_image_npz(tmp_path / "b.npy", "train", num_classes=None)
    np.savez(tmp_path / "c.npz", x_train=X, y_train=Y)
    md5 = hashlib.md5((tmp_path / "c.npz").read_bytes()).hexdigest()
    assert read_image_npz(tmp_path / "c.npz", "train", num_classes=None, md5=md5) is not None
    with pytest.raises(ValueError, match=r"c\.npz: MD5 .*, expected abc"):
        read_image_npz(tmp_path / "c.npz", "train", num_classes=None, md5="abc")


def test_pickled_arrays_are_refused(tmp_path):
    """Loading them would run whatever code they contain."""
    np.savez(tmp_path / "a.npz", x_train=np.array([object()]), y_train=Y)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_image_npz(tmp_path / "a.npz", "train", num_classes=None)
