from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from datamodules.readers.idx import IMAGES_MAGIC, LABELS_MAGIC, read_idx, read_idx_pair
from tests.composing import SERIES, composed
from tests.datamodules.files import write_idx

DATA = Path(os.environ.get("WATTLIGHT_DATA", SERIES.parent))
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4))
LABELS = np.array([0, 2, 1, 2, 0])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_what_was_written_is_read(tmp_path, suffix):
    images = write_idx(tmp_path / f"images{suffix}", IMAGES)
    labels = write_idx(tmp_path / f"labels{suffix}", LABELS)
    np.testing.assert_array_equal(read_idx(images, IMAGES_MAGIC), IMAGES)
    stored = read_idx_pair(images, labels, part="train", num_classes=None)
    np.testing.assert_array_equal(stored.load(np.array([4, 1]))[..., 0], IMAGES[[4, 1]])
    assert stored.labels.tolist() == LABELS.tolist() and stored.class_names == ["0", "1", "2"]
    assert stored.names[3] == "train_00003" and stored.peak == 255


def test_the_header_is_the_one_of_the_format(tmp_path):
    """Big endian: the bytes 0, 0, 8 (uint8), 3 (dimensions), then the sizes."""
    content = bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2, 7, 8, 9, 10])
    (tmp_path / "x").write_bytes(content)
    assert read_idx(tmp_path / "x", IMAGES_MAGIC).tolist() == [[[7, 8], [9, 10]]]


def test_the_checksum_is_that_of_the_uncompressed_content(tmp_path):
    path = write_idx(tmp_path / "images.gz", IMAGES)
    md5 = hashlib.md5(gzip.decompress(path.read_bytes())).hexdigest()
    assert len(read_idx(path, IMAGES_MAGIC, md5.upper())) == 5
    with pytest.raises(ValueError, match=rf"images\.gz: MD5 {md5}, expected 0000: .*fetch it again.*data\.md5=null"):
        read_idx(path, IMAGES_MAGIC, "0000")


def test_wrong_files_are_named(tmp_path):
    images = write_idx(tmp_path / "images", IMAGES)
    with pytest.raises(
        ValueError, match=r"images: an IDX file of labels begins with the number 2049, this one with .*2051"
    ):
        read_idx(images, LABELS_MAGIC)
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"images: 95 bytes, but its header announces 96: it is incomplete"):
        read_idx(images, IMAGES_MAGIC)
    images.write_bytes(b"")
    with pytest.raises(ValueError, match=r"images: .*this one with nothing"):
        read_idx(images, IMAGES_MAGIC)
    (tmp_path / "x.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"x\.gz: not a readable gzip file"):
        read_idx(tmp_path / "x.gz", IMAGES_MAGIC)
    whole = write_idx(tmp_path / "whole.gz", IMAGES)
    (tmp_path / "cut.gz").write_bytes(whole.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"cut\.gz: not a readable gzip file"):
        read_idx(tmp_path / "cut.gz", IMAGES_MAGIC)


def test_labels_that_do_not_fit_are_named(tmp_path):
    images = write_idx(tmp_path / "images", IMAGES)
    with pytest.raises(ValueError, match=r"label 2 of image 1 is outside 0\.\.1; .*data\.num_classes"):
        read_idx_pair(images, write_idx(tmp_path / "a", LABELS), part="train", num_classes=2)
    with pytest.raises(ValueError, match=r"5 images, but labels are int64 of shape \(4,\)"):
        read_idx_pair(images, write_idx(tmp_path / "b", LABELS[:4]), part="train", num_classes=3)


@pytest.mark.skipif(not (DATA / "mnist").is_dir(), reason=f"no mnist in WATTLIGHT_DATA ({DATA})")
def test_the_real_mnist():
    """Sizes and checksums of the original files, and the mean and deviation that everybody uses."""
    config = composed("experiment=classification/mnist").data
    paths, sums = [DATA / name for name in config.file], list(config.md5)
    train = read_idx_pair(*paths[:2], part="train", num_classes=10, md5=tuple(sums[:2]))
    test = read_idx_pair(*paths[2:], part="test", num_classes=10, md5=tuple(sums[2:]))
    assert len(train.labels) == 60_000 and len(test.labels) == 10_000
    assert np.bincount(train.labels).tolist()[:3] == [5923, 6742, 5958]
    pixels = train.load(np.arange(60_000)) / np.float32(255)
    assert pixels.mean() == pytest.approx(0.1307, abs=5e-5) and pixels.std() == pytest.approx(0.3081, abs=5e-5)
