"""DesignWriter: stacks designed for wanted spectra, with their spectra and errors, as files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from callbacks.gathering import gather_to_rank_zero

if TYPE_CHECKING:
    import pandas as pd

SOURCES = ("network", "template")
CHANNELS = ("R", "A", "T")


class DesignWriter(pl.Callback):
    """Writes what prediction of `lightning_modules.thin_film.InverseDesign` delivers.

    ``<dirpath>/<filename>``: a row per candidate: ``target``, ``rank`` (from 1), ``source`` (network or template),
    ``layers``, ``mae`` of the refined stack, ``raw_mae`` of the proposal, ``robust_mae`` and ``robust_mae_p95`` under
    errors of the thicknesses, ``stack`` (refined: material and nm from the light side on) and ``proposal``.
    ``designs.json`` has the same with numbers instead of text; ``spectra.csv`` the wanted spectra (``rank`` 0) and
    those of the candidates. ``figures/<target>.png`` beside ``dirpath`` shows them.

    Args:
        dirpath: Folder of the files, made if it does not exist.
        filename: Of the table of candidates.
        figures_dir: Folder of the figures; None: no figures.
        max_figures: Targets that are drawn.
    """

    def __init__(
        self,
        dirpath: str | Path,
        filename: str = "designs.csv",
        figures_dir: str | Path | None = None,
        max_figures: int = 6,
    ) -> None:
        self.dirpath, self.filename = Path(dirpath), filename
        self.figures_dir, self.max_figures = None if figures_dir is None else Path(figures_dir), max_figures
        self._outputs: list[dict[str, Tensor]] = []

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._outputs = []

    @override
    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._outputs.append({k: v.detach().cpu() for k, v in outputs.items() if isinstance(v, Tensor)})

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Here, and not in on_predict_end, which a rank without a target skips while the others wait for it.
        if stage == "predict":
            parts = gather_to_rank_zero(self._outputs)
            if parts is not None:
                targets = [one for part in parts for batch in part for one in _targets(batch)]
                self._write({int(t["index"]): t for t in targets}, trainer.datamodule)
        self._outputs = []

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._outputs = []

    def _write(self, targets: Mapping[int, dict[str, Tensor]], data: Any) -> None:
        if not targets:
            return
        names = data.target_names
        designs = [design(targets[i], names[i], data) for i in sorted(targets)]
        self.dirpath.mkdir(parents=True, exist_ok=True)
        _replace(self.dirpath / self.filename, table(designs).to_csv(index=False))
        _replace(self.dirpath / "designs.json", json.dumps(designs, indent=1))
        spectra = [_spectra(targets[i], names[i], data) for i in sorted(targets)]
        import pandas as pd

        _replace(self.dirpath / "spectra.csv", pd.concat(spectra).to_csv(index=False, float_format="%.6g"))
        for i in sorted(targets)[: self.max_figures if self.figures_dir else 0]:
            self._draw(targets[i], names[i], data)

    def _draw(self, target: dict[str, Tensor], name: str, data: Any) -> None:
        from callbacks.figures.thin_film import designs_for_target

        try:
            figure = designs_for_target(target, data, name)
            self.figures_dir.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.figures_dir / f"{_file_name(name)}.png", dpi=120)
        except Exception as error:
            rank_zero_warn(f"the figure of {name!r} was not drawn: {type(error).__name__}: {error}")


def _targets(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["index"]))]


def design(target: Mapping[str, Tensor], name: str, data: Any) -> dict[str, Any]:
    """The candidates for a target as plain data, best first."""
    materials, candidates = data.vocabulary.materials, []
    for k in range(len(target["mae"])):
        if not target["mae"][k].isfinite():  # there were fewer different ones
            continue
        layers = zip(target["material"][k].tolist(), target["thickness_nm"][k].tolist(), strict=True)
        numbers = {key: float(target[key][k]) for key in ("mae", "raw_mae", "robust_mae", "robust_mae_p95")}
        candidates.append(
            {
                "rank": len(candidates) + 1,
                "source": SOURCES[int(target["source"][k])],
                **numbers,
                "stack": [{"material": materials[m], "thickness_nm": round(d, 3)} for m, d in layers if m >= 0],
                "proposal": data.vocabulary.text(target["tokens"][k]),
            }
        )
    return {"target": name, "substrate": data.substrate, "candidates": candidates}


def table(designs: list[dict[str, Any]]) -> pd.DataFrame:
    """A row per candidate."""
    import pandas as pd

    rows = []
    for one in designs:
        for candidate in one["candidates"]:
            text = " | ".join(f"{layer['material']} {layer['thickness_nm']:.1f}" for layer in candidate["stack"])
            row = {"target": one["target"]} | candidate | {"layers": len(candidate["stack"]), "stack": text}
            rows.append(row)
    order = ["target", "rank", "source", "layers", "mae", "raw_mae", "robust_mae", "robust_mae_p95", "stack"]
    return pd.DataFrame(rows, columns=[*order, "proposal"])


def _spectra(target: Mapping[str, Tensor], name: str, data: Any) -> pd.DataFrame:
    import pandas as pd

    frames = []
    there = target["mae"].isfinite().nonzero()[:, 0].tolist()
    for rank, spectrum in enumerate([target["target"], *(target["spectrum"][k] for k in there)]):
        columns = {"target": name, "rank": rank, "nm": data.wavelength_nm.numpy()}
        frames.append(pd.DataFrame(columns | {c: spectrum[i].numpy() for i, c in enumerate(CHANNELS)}))
    return pd.concat(frames)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _replace(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never a part."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
