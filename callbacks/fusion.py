"""FusionCallback: the best checkpoints of any run as one network, at the end of its fit."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from typing_extensions import override

from networks.fusion.methods import METHODS, fuse

log = logging.getLogger(__name__)


class FusionCallback(pl.Callback):
    """Fuses checkpoints of a module's ``net`` when a fit is over, and writes the result as a checkpoint of the run.

    The file differs from the last of its sources in the weights alone, so that everything reads it:
    ``python run.py resume=RUN train=false ckpt_path=RUN/checkpoints/fused.ckpt`` tests it. What the network was called
    with in the last training steps tells how its layers are connected, and is what layers are fitted to
    (``nt_r``, ``rebasin_r``) and statistics of normalisations are estimated on.

    Checkpoints of one training are no ensemble of strangers: their channels are in one order, so that their average is
    the method to begin with; ``checkpoints`` of other runs may be.

    Args:
        dirpath: Folder of the fused checkpoint.
        checkpoints: Files to fuse; None: those that the run has kept (the best and the last, for example), the first
            ``num`` of them, better ones before others.
        num: How many of these.
        method: One of `networks.fusion.methods.METHODS` that needs no score: average, ot, rebasin, rebasin_r, nt, nt_r.
        num_batches: Batches of inputs that are remembered.

    Raises:
        ValueError: An argument is wrong, or there are less than two checkpoints, or the network has a module that is
            not known (the message names it).
    """

    def __init__(
        self,
        dirpath: str | Path,
        checkpoints: Sequence[str] | None = None,
        num: int = 2,
        method: str = "average",
        num_batches: int = 8,
    ) -> None:
        known = [name for name in METHODS if name not in ("best", "soup", "ensemble")]
        if method not in known:
            raise ValueError(f"callbacks.fusion.method={method!r} is unknown; choose one of {', '.join(known)}")
        if num < 2 or num_batches < 1:
            raise ValueError(
                f"callbacks.fusion.num={num}, callbacks.fusion.num_batches={num_batches}: at least 2 checkpoints, at "
                "least 1 batch"
            )
        self.dirpath, self.method, self.num, self.num_batches = Path(dirpath), method, num, num_batches
        self.checkpoints = None if checkpoints is None else [Path(file) for file in checkpoints]
        self._inputs: list[tuple[Any, ...]] = []
        self._hook: Any = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(getattr(pl_module, "net", None), nn.Module):
            raise ValueError(f"callbacks.fusion: {type(pl_module).__name__} has no network called net")
        self._remove()
        self._hook = pl_module.net.register_forward_pre_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training:
            self._inputs = [*self._inputs[1 - self.num_batches :], inputs] if self.num_batches > 1 else [inputs]

    def _remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._inputs = None, []

    def _found(self, trainer: pl.Trainer) -> list[Path]:
        if self.checkpoints is not None:
            return self.checkpoints
        found: list[Path] = []
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                sign = -1 if callback.mode == "max" else 1
                kept = sorted(callback.best_k_models, key=_rank(callback.best_k_models, sign))
                found += [Path(path) for path in (*kept, callback.best_model_path) if path]
        files = [path for path in dict.fromkeys(found) if path.is_file()][: self.num]
        if len(files) > 1:
            return files
        raise ValueError(
            "callbacks.fusion: the run has kept less than two checkpoints; it needs callbacks.checkpoint and "
            "callbacks.last_checkpoint, or callbacks.fusion.checkpoints"
        )

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            files = self._found(trainer)
            if trainer.is_global_zero:
                self._fuse(files, pl_module)
        finally:
            self._remove()
        trainer.strategy.barrier("fusion")

    def _fuse(self, files: Sequence[Path], pl_module: pl.LightningModule) -> None:
        contents = [torch.load(file, map_location=pl_module.device, weights_only=True) for file in files]
        members = []
        for content in contents:
            member = copy.deepcopy(pl_module.net)
            member.load_state_dict(
                {k.removeprefix("net."): v for k, v in content["state_dict"].items() if k.startswith("net.")}
            )
            members.append(member)
        if any(len(inputs) != 1 or not isinstance(inputs[0], Tensor) for inputs in self._inputs):
            batches: list[Tensor] = []  # networks of several inputs: connected by an example, not fitted
        else:
            batches = [inputs[0].detach() for inputs in self._inputs]
        example = _first_items(self._inputs[-1])
        result = fuse(members, self.method, example, batches, recalibrate=bool(batches))
        fused = contents[-1]
        fused["state_dict"] |= {f"net.{key}": value for key, value in result.model.state_dict().items()}
        self.dirpath.mkdir(parents=True, exist_ok=True)
        torch.save(fused, self.dirpath / "fused.ckpt")
        log.info(
            "fused %s by %s in %.2f s: %s",
            ", ".join(file.name for file in files),
            self.method,
            result.seconds,
            self.dirpath / "fused.ckpt",
        )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove()


def _rank(values: dict[str, Tensor], sign: int) -> Callable[[str], float]:
    return lambda path: sign * float(values[path])


def _first_items(value: Any) -> Any:
    """Two items of what a network was called with."""
    if isinstance(value, Tensor):
        return value[:2].detach()
    if isinstance(value, dict):
        return {key: _first_items(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_first_items(one) for one in value)
    return value
