from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from datamodules.readers import image_folder
from datamodules.readers.image_folder import list_image_files, read_image_folder
from tests.composing import SERIES
from tests.datamodules.files import write_images, zip_folder

DATA = Path(os.environ.get("WATTLIGHT_DATA", SERIES.parent))
CIFAR = DATA / "cifar10-imagefolder.zip"


@pytest.fixture
def folder(tmp_path):
    """Two classes of three grey PNG files; the grey value tells which: 10, 20, 30 cats and 110, 120, 130 dogs."""
    for base, name in ((0, "cat"), (100, "dog")):
        images = {f"{i}.png": np.full((6, 6), base + 10 * (i + 1)) for i in (2, 0, 1)}
        write_images(tmp_path / "set" / "train" / name, images)
    (tmp_path / "set" / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "set" / "train" / "cat" / ".hidden.png").write_bytes(b"")
    return tmp_path / "set"


def values(stored, rows=None) -> list[int]:
    rows = np.arange(len(stored.labels)) if rows is None else np.array(rows)
    return stored.load(rows)[:, 3, 3, 0].tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_images_come_in_the_order_of_their_names(folder, tmp_path, packed):
    root = zip_folder(folder, tmp_path / "set.zip") if packed else folder
    stored = read_image_folder(root, "train", cache_dir=tmp_path / "cache")
    assert stored.class_names == ["cat", "dog"] and stored.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert stored.names[:2] == ["train/cat/0.png", "train/cat/1.png"]
    assert values(stored) == [10, 20, 30, 110, 120, 130]
    pixels = stored.load(np.arange(6))
    assert pixels.shape == (6, 6, 6, 1) and pixels.dtype == np.uint8 and isinstance(pixels, np.memmap)


def test_decoded_images_are_kept(folder, tmp_path, monkeypatch):
    stored = read_image_folder(folder, "train", cache_dir=tmp_path / "cache")
    decoded = []
    decode = image_folder._decode
    monkeypatch.setattr(image_folder, "_decode", lambda member, *a: decoded.append(member) or decode(member, *a))
    assert values(stored) == values(stored)
    assert len(decoded) == 7  # the first one for the shape too
    assert values(stored, [0, 4]) == [10, 120] and len(decoded) == 7 + 3  # another choice is another array
    again = read_image_folder(folder, "train", cache_dir=tmp_path / "cache")
    assert values(again) == [10, 20, 30, 110, 120, 130] and len(decoded) == 10
    write_images(folder / "train" / "dog", {"0.png": np.full((6, 6), 99)})  # changed on disk: decoded anew
    assert values(read_image_folder(folder, "train", cache_dir=tmp_path / "cache"))[3] == 99
    assert not [p.name for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")]


def _load(root: Path, cache: Path, gate, outbox) -> None:
    decoded = []
    decode = image_folder._decode

    def counted(member, *arguments):
        decoded.append(member)
        return decode(member, *arguments)

    image_folder._decode = counted
    stored = read_image_folder(root, "train", cache_dir=cache)
    gate.wait()
    outbox.put((stored.load(np.arange(len(stored.labels))).tobytes(), len(decoded)))


def test_two_processes_that_start_together_decode_once(tmp_path):
    rng = np.random.default_rng(0)
    images = {f"{i:03d}.png": rng.integers(0, 256, (32, 32, 3)) for i in range(300)}
    write_images(tmp_path / "set" / "train" / "noise", images)
    context = multiprocessing.get_context("spawn")
    gate, outbox = context.Barrier(2), context.Queue()
    arguments = (tmp_path / "set", tmp_path / "cache", gate, outbox)
    processes = [context.Process(target=_load, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    results = [outbox.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(20)
    expected = np.stack(list(images.values())).astype(np.uint8).tobytes()
    assert [content == expected for content, _ in results] == [True, True]
    assert sorted(number for _, number in results) == [0, 301]


def test_a_decoding_that_fails_leaves_nothing_behind(folder, tmp_path):
    (folder / "train" / "dog" / "1.png").write_bytes(b"broken")
    stored = read_image_folder(folder, "train", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"train/dog/1\.png: not a readable image"):
        values(stored)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]
    assert values(stored, [0, 1]) == [10, 20]


def test_colours_and_grey(folder, tmp_path):
    assert read_image_folder(folder, "train", cache_dir=tmp_path, num_channels=3).load(np.arange(2)).shape[3] == 3
    colours = np.zeros((6, 6, 3))
    colours[..., 0] = 200
    write_images(folder / "train" / "bird", {"0.png": colours})
    pixels = read_image_folder(folder, "train", cache_dir=tmp_path).load(np.arange(7))  # the first one has colours
    assert pixels.shape == (7, 6, 6, 3)
    assert pixels[0, 0, 0].tolist() == [200, 0, 0] and pixels[1, 0, 0].tolist() == [10, 10, 10]


def test_images_of_many_sizes_are_cut_to_squares(tmp_path):
    """The shorter side is resized, then the middle is taken."""
    wide = np.zeros((10, 40))
    wide[:, 15:25] = 200
    tall = np.zeros((40, 20))
    tall[10:30] = 100
    write_images(tmp_path / "train" / "a", {"0.png": wide, "1.png": tall, "2.png": np.full((10, 10), 50)})
    stored = read_image_folder(tmp_path, "train", cache_dir=tmp_path / "cache", stored_size=10)
    pixels = stored.load(np.arange(3))[..., 0]
    assert pixels.shape == (3, 10, 10)
    assert (pixels[0] == 200).all() and (pixels[1, 2:8] == 100).all() and (pixels[2] == 50).all()
    with pytest.raises(ValueError, match=r"a/0\.png: images of 10 x 40 pixels; square .*data\.stored_size"):
        read_image_folder(tmp_path, "train", cache_dir=tmp_path / "cache").load(np.arange(3))
    write_images(tmp_path / "train" / "a", {"0.png": np.zeros((8, 8)), "1.png": np.zeros((9, 9))})
    with pytest.raises(ValueError, match=r"a/1\.png has 9 x 9 pixels, .*a/0\.png has 8 x 8; set data\.stored_size"):
        read_image_folder(tmp_path, "train", cache_dir=tmp_path / "cache").load(np.arange(3))


def test_sixteen_bits_are_refused(tmp_path):
    from PIL import Image

    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(np.full((6, 6), 40_000, dtype=np.uint16)).save(tmp_path / "train" / "a" / "0.png")
    with pytest.raises(ValueError, match=r"a/0\.png: more than 8 bits"):
        read_image_folder(tmp_path, "train", cache_dir=tmp_path / "cache").load(np.arange(1))


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"no images .* below 'test/'; it has train, train/cat, train/dog\. Set data\.train_folder"
    ):
        list_image_files(folder, "test")
    write_images(folder / "test" / "fish", {"0.png": np.zeros((6, 6))})
    with pytest.raises(ValueError, match=r"test has the class 'fish', which the training part has not \(cat, dog\)"):
        read_image_folder(folder, "test", cache_dir=tmp_path, class_names=["cat", "dog"])
    (tmp_path / "x.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"x\.zip: neither a folder nor a readable zip archive"):
        list_image_files(tmp_path / "x.zip", "train")


@pytest.mark.skipif(not CIFAR.is_file(), reason=f"no {CIFAR.name} in WATTLIGHT_DATA ({DATA})")
def test_the_real_cifar10(tmp_path):
    """Names and classes of all 60,000 images; the pixels of some."""
    train, test = (read_image_folder(CIFAR, f"cifar10/{part}", cache_dir=tmp_path) for part in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [5000] * 10 and np.bincount(test.labels).tolist() == [1000] * 10
    # The alphabetical order of the folders is that of the official labels.
    official = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert train.class_names == official == test.class_names
    pixels = train.load(np.arange(0, 50_000, 50)) / 255
    assert pixels.shape == (1000, 32, 32, 3)
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), (0.49125, 0.48209, 0.44652), atol=0.02)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), (0.24523, 0.24278, 0.26063), atol=0.02)
