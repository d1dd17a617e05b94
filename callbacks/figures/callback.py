"""FiguresCallback: step outputs in, images on disk and in every logger out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from callbacks.gathering import concatenate, gather_to_rank_zero, repeats_items

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Plot = Callable[[dict[str, Tensor], Any], Figure]


class FiguresCallback(pl.Callback):
    """Calls plot functions with the outputs of a stage and stores what they draw.

    A plot is a function ``(outputs, datamodule) -> matplotlib.figure.Figure``. ``outputs`` are the step outputs of all
    ranks on the CPU, joined along the batch and sorted by ``origin``; those of a second test loader, of images that the
    network cannot know (``data.ood``), have names that begin with ``unknown_``. At the end of the stage rank 0 writes
    ``<dirpath>/<name>.<format>`` and hands the PNG to every logger with ``log_image`` (W&B) or whose experiment has
    ``add_figure`` (TensorBoard). A plot that fails is reported and skipped: figures never cost a run its results.

    Args:
        plots: Plot functions or their dotted names; a mapping also names the files, otherwise the function does. Use
            ``_partial_: true`` to set options of a plot.
        dirpath: Folder of the images, made when the first one is written.
        stage: ``test`` or ``validate`` (then after every validation, each overwriting the last).
        max_batches: Batches kept per rank; null keeps all (figures about the whole test part).
        formats: File formats, e.g. ``[png, pdf]``.
        dpi: Resolution of the images.
    """

    def __init__(
        self,
        plots: Sequence[Plot | str] | Mapping[str, Plot | str],
        dirpath: str | Path,
        stage: Literal["test", "validate"] = "test",
        max_batches: int | None = None,
        formats: Sequence[str] = ("png",),
        dpi: int = 150,
    ) -> None:
        if stage not in ("test", "validate"):
            raise ValueError(f"callbacks.figures.stage={stage!r} is unknown; choose test or validate.")
        if max_batches is not None and max_batches < 1:
            raise ValueError(
                f"callbacks.figures.max_batches={max_batches} draws nothing; use at least 1, null for all."
            )
        if isinstance(plots, Mapping):
            self.plots = {name: _function(plot) for name, plot in plots.items()}
        else:
            functions = [_function(plot) for plot in plots]
            self.plots = {_name(function): function for function in functions}
            if len(self.plots) < len(functions):
                raise ValueError("callbacks.figures.plots names one function twice; use a mapping name -> function.")
        self.dirpath, self.stage, self.max_batches = Path(dirpath), stage, max_batches
        self.formats, self.dpi = tuple(formats), dpi
        self._outputs: list[dict[str, Tensor]] = []
        self._unknown: list[dict[str, Tensor]] = []

    def _start(self, stage: str) -> None:
        if stage == self.stage:
            self._outputs, self._unknown = [], []

    def _collect(self, stage: str, outputs: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if stage == self.stage and (self.max_batches is None or batch_idx < self.max_batches):
            tensors = {key: value for key, value in outputs.items() if isinstance(value, Tensor)}
            kept, prefix = (self._unknown, "unknown_") if dataloader_idx else (self._outputs, "")
            kept.append({prefix + key: value.detach().cpu() for key, value in tensors.items()})

    def _draw(self, trainer: pl.Trainer, stage: str) -> None:
        if stage != self.stage or trainer.sanity_checking:
            return
        parts = gather_to_rank_zero(([], []) if repeats_items(trainer) else (self._outputs, self._unknown))
        self._outputs, self._unknown = [], []
        known, unknown = ([out for part in parts or () for out in part[i]] for i in (0, 1))
        if not known:
            return
        outputs = concatenate(known) | (concatenate(unknown) if unknown else {})
        for name, plot in self.plots.items():
            try:
                figure = plot(outputs, trainer.datamodule)
                self.dirpath.mkdir(parents=True, exist_ok=True)
                paths = [self.dirpath / f"{name}.{extension}" for extension in self.formats]
                for path in paths:
                    figure.savefig(path, dpi=self.dpi)
                for logger in trainer.loggers:
                    hand_over(logger, f"figures/{name}", figure, paths, trainer.global_step)
            except Exception as error:
                rank_zero_warn(f"figure {name!r} was not drawn: {type(error).__name__}: {error}")

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start("test")

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start("validate")

    @override
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect("test", outputs, batch_idx, dataloader_idx)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect("validate", outputs, batch_idx)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, "test")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, "validate")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._outputs, self._unknown = [], []

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._outputs, self._unknown = [], []


def _function(plot: Plot | str) -> Plot:
    if not isinstance(plot, str):
        return plot
    module, _, name = plot.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"callbacks.figures.plots: there is no function {plot!r} ({error}).") from error


def _name(plot: Plot) -> str:
    return (plot.func if isinstance(plot, partial) else plot).__name__


def hand_over_files(logger: Any, paths: list[Path]) -> None:
    """Give images that lie on disk to a logger that takes images (W&B, TensorBoard)."""
    for path in paths:
        key = f"figures/{path.stem}"
        if hasattr(logger, "log_image"):
            logger.log_image(key=key, images=[str(path)])
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            from matplotlib.image import imread

            logger.experiment.add_image(key, imread(path), dataformats="HWC")


def hand_over(logger: Any, key: str, figure: Figure, paths: list[Path], step: int) -> None:
    """Give a figure to a logger that takes images (W&B) or figures (TensorBoard)."""
    images = [str(path) for path in paths if path.suffix == ".png"]
    if images and hasattr(logger, "log_image"):
        logger.log_image(key=key, images=images, step=step)
    elif hasattr(getattr(logger, "experiment", None), "add_figure"):
        logger.experiment.add_figure(key, figure, global_step=step)
