from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from datamodules.readers.image_table import read_grey, read_labels
from tests.datamodules.files import write_images


def test_labels(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("image,label\na.png,positive\nb.png,negative\n\nc.jpg,positive\n")
    names, labels = read_labels(path)
    assert names == ["a.png", "b.png", "c.jpg"] and labels.tolist() == [1, 0, 1] and labels.dtype == torch.int64
    names, labels = read_labels(path, positive="negative")
    assert labels.tolist() == [0, 1, 0]
    path.write_text("image\na.png\n")
    assert read_labels(path) == (["a.png"], None)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "the file is empty"),
        ("image,label\n", "lists no images"),
        ("file,label\na,positive\n", r"no column 'image'; the header has 'file', 'label'.*data\.image_column"),
        ("image,label\na,positive\nb,\n", r"column 'label', line 3: empty"),
        ("image,label\na,positive\n\n,negative\n", r"column 'image', line 4: empty"),
        ("image,label\na,positive\nb,no\nc,yes\n", r"labels 'no', 'positive', 'yes'; two classes.*data\.positive"),
        ("image,label\na,1\nb,0\n", r"labels '0', '1'.*data\.positive='positive'"),
    ],
)
def test_mistakes_in_tables_are_named(tmp_path, text, match):
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"train\.csv.*{match}"):
        read_labels(path)


def test_images_of_any_size_and_kind(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 90), (60, 1))
    files = write_images(tmp_path, {"grey.png": ramp, "photo.jpg": ramp, "colour.png": np.stack([ramp] * 3, 2)})
    from PIL import Image

    Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / "deep.png")
    for path in (*files, tmp_path / "deep.png"):
        grey = read_grey(path, 24)
        assert grey.shape == (1, 24, 24) and grey.dtype == torch.uint8
        expected = np.interp((np.arange(24) + 0.5) * 90 / 24 - 0.5, np.arange(90), ramp[0])
        np.testing.assert_allclose(grey[0, 12], expected, atol=4), path


def test_resizing_is_that_of_pillow(tmp_path):
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 255, (77, 103)).astype(np.uint8)
    (path,) = write_images(tmp_path, {"noise.png": image})
    for size in (32, 200):
        expected = np.asarray(Image.open(path).resize((size, size), Image.Resampling.BILINEAR), dtype=int)
        assert np.abs(read_grey(path, size)[0].numpy().astype(int) - expected).max() <= 1


def test_files_that_are_no_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.png: not a readable image"):
        read_grey(tmp_path / "text.png", 8)
    (path,) = write_images(tmp_path, {"cut.png": np.random.default_rng(0).integers(0, 255, (64, 64))})
    path.write_bytes(path.read_bytes()[:800])
    with pytest.raises(ValueError, match=r"cut\.png: not a readable image"):
        read_grey(path, 8)
    with pytest.raises(ValueError, match=r"none\.png: no such image; .*data\.image_folder"):
        read_grey(tmp_path / "none.png", 8)


def test_a_missing_pillow_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"needs Pillow: pip install -c constraints\.txt pillow"):
        read_grey(tmp_path / "x.png", 8)
