from __future__ import annotations

import numpy as np

from datamodules.synthetic_images import synthetic_images

KIND = {"num_classes": 10, "num_channels": 1, "size": 16}


def test_images_are_repeatable_and_of_the_wanted_kind():
    stored = synthetic_images(40, **KIND | {"num_channels": 3}, part="train", seed=1)
    pixels = stored.load(np.arange(40))
    assert pixels.shape == (40, 16, 16, 3) and pixels.dtype == np.uint8
    assert np.bincount(stored.labels).tolist() == [4] * 10
    again = synthetic_images(40, **KIND | {"num_channels": 3}, part="train", seed=1)
    np.testing.assert_array_equal(again.load(np.arange(40)), pixels)
    for other in ({"part": "test", "seed": 1}, {"part": "train", "seed": 2}):
        assert (synthetic_images(40, **KIND | {"num_channels": 3}, **other).load(np.arange(40)) != pixels).mean() > 0.9


def test_who_knows_the_templates_makes_no_mistake():
    """Correlation with every shift of the class means of other images: as good as Bayes here."""
    train = synthetic_images(4000, **KIND, part="train")
    test = synthetic_images(300, **KIND, part="test")
    known = train.load(np.arange(4000))[..., 0].astype(float) - 128
    # Templates up to a shift: the shifted images of a class, averaged after they are moved onto the first of them.
    spectra = np.fft.fft2(known)
    templates = []
    for c in range(10):
        mine = spectra[train.labels == c]
        reference = mine[0]
        for _ in range(3):
            correlation = np.fft.ifft2(reference[None] * mine.conj()).real
            moves = np.array([np.unravel_index(r.argmax(), r.shape) for r in correlation])
            k = np.fft.fftfreq(16)
            phase = np.exp(-2j * np.pi * (moves[:, 0, None, None] * k[:, None] + moves[:, 1, None, None] * k))
            reference = (mine * phase).mean(0)
        templates.append(reference)
    unknown = np.fft.fft2(test.load(np.arange(300))[..., 0].astype(float) - 128)
    scores = np.stack([np.fft.ifft2(t[None] * unknown.conj()).real.max((1, 2)) / np.abs(t).std() for t in templates], 1)
    assert (scores.argmax(1) == test.labels).mean() == 1.0
