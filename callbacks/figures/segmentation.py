"""Figures of a class for every pixel: pure functions ``(outputs, datamodule) -> Figure`` for `FiguresCallback`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from callbacks.figures.axes import make_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito, which colour-blind readers tell apart; further classes begin anew.
COLOURS = ("#56B4E9", "#999999", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#0072B2", "#D55E00")
MISSED = "#000000"


def scenes(outputs: dict[str, Tensor], datamodule: Any, *, number: int = 6) -> Figure:
    """The first test images with their true and found classes, and in the last row the pixels that are wrong.

    Args:
        outputs: ``index``, ``prediction`` and ``target`` of all test images.
        datamodule: Has ``part("test")`` with images, and ``class_names``.
        number: Images.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    order = outputs["index"].argsort()[:number]
    index, found, truth = (outputs[key][order].numpy() for key in ("index", "prediction", "target"))
    image = datamodule.part("test").image[index].numpy()
    colours = np.array([to_rgb(COLOURS[i % len(COLOURS)]) for i in range(len(datamodule.class_names))])
    rows = (
        ("image", np.clip(image.transpose(0, 2, 3, 1) + 0.5, 0, 1)),
        ("truth", colours[truth]),
        ("found", colours[found]),
        ("wrong", np.where((found != truth)[..., None], to_rgb(MISSED), 1.0)),
    )
    figure, panels = make_figure(1.3 * len(index) + 0.5, 1.3 * len(rows) + 0.6, rows=len(rows), columns=len(index))
    for r, (name, pictures) in enumerate(rows):
        for c, picture in enumerate(pictures):
            panel = panels[r * len(index) + c]
            panel.imshow(picture, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.grid(visible=False)
            panel.spines[:].set_visible(True)
            if c == 0:
                panel.set_ylabel(name)
    patches = [Patch(color=c, label=n) for c, n in zip(colours, datamodule.class_names, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 6), frameon=False)
    return figure
