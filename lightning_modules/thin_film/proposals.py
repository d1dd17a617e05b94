"""Prediction: stacks for wanted spectra, proposed by a network and a template library, refined and ranked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_modules.thin_film.candidates import alike, best_distinct, errors, recipes, refine, take
from lightning_modules.thin_film.training import Batch, StackTraining
from networks.template_library import TemplateLibrary

SOURCES = ("network", "template")


class Proposals(StackTraining):
    """Designs stacks for targets within the limits that are set.

    The arguments are those of `lightning_modules.thin_film.InverseDesign`.
    """

    num_draws: int
    refine_top: int
    predict_templates: int
    predict_library: int
    num_candidates: int
    thickness_error: float
    proposers: list[TemplateLibrary]

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "predict":
            self.constraints = self.limits.constraints(self.data.vocabulary)

    @override
    def on_predict_start(self) -> None:
        """Open the sources of proposals; a checkpoint has been read by now."""
        self.draws = self.num_draws if self._trained else 0
        if not self._trained:
            if not self.predict_templates:
                raise ValueError(
                    "nothing proposes stacks: give ckpt_path=<run>/checkpoints/best.ckpt, or set "
                    "model.predict_templates above 0"
                )
            rank_zero_warn(
                "no checkpoint: proposals come from the template library alone; ckpt_path=<run>/checkpoints/best.ckpt "
                "adds those of a network"
            )
        self.proposers = []
        if self.predict_templates:
            stored = self.data.library(
                min(self.predict_library, self.data.num["train"] or len(self.data.part("train")))
            )
            kept = self.limits.obeyed(stored.tokens.long(), self.data.vocabulary).nonzero()[:, 0]
            if len(kept):
                self.proposers.append(TemplateLibrary(stored.spectra[kept], stored.tokens[kept]))
            elif not self._trained:
                raise ValueError("model.limits leave no stack of the template library, and there is no checkpoint")

    def _proposals(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Stacks of all sources ``(B, N, L)`` and their sources ``(N,)``."""
        parts, source = [], []
        if self.draws:
            shown = batch.get("variants", batch["spectrum"][:, None])
            kinds = min(shown.shape[1], self.draws)
            for v in range(kinds):
                own = range(v, self.draws, kinds)
                parts.append(self.draw(self.designer, batch, own, None, self.constraints, shown[:, v]))
                source += [0] * len(own)
        for library in self.proposers:
            count = min(self.predict_templates, len(library))
            parts.append(library.stacks(library.nearest(batch["spectrum"], batch["weight"], count)[0]))
            source += [1] * count
        return torch.cat(parts, 1), torch.tensor(source, device=self.device)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        target, weight = batch["spectrum"], batch["weight"]
        tokens, source = self._proposals(batch)
        mae = errors(self.data.simulate(tokens), target, weight)
        # Of each source its best, so that the answers differ.
        places = [
            torch.where(
                (own := best_distinct(tokens[:, source == s], mae[:, source == s], self.refine_top)) >= 0,
                own + int((source < s).sum()),
                -1,
            )
            for s in source.unique().tolist()
        ]
        places = torch.cat(places, 1)
        stacks = take(tokens, places).masked_fill(places[..., None] < 0, -1)
        found = refine(self.refiner, self.data.vocabulary, {"all": stacks}, target, weight)["all"]
        recipe = recipes(found, stacks, self.data)
        again = alike(recipe["material"], recipe["thickness_nm"])
        order = recipe["mae"].masked_fill(again, torch.inf).sort(dim=1, stable=True).indices[:, : self.num_candidates]
        out = {name: take(value, order) for name, value in recipe.items()}
        out["mae"] = out["mae"].masked_fill(take(again, order), torch.inf)
        out |= {"tokens": take(stacks, order), "raw_mae": take(take(mae, places), order)}
        out["source"] = take(source.expand(len(target), -1), take(places, order))
        out |= self._robustness(out, target, weight)
        return out | {"index": batch["index"], "target": target, "weight": weight, "prediction": out["spectrum"][:, 0]}

    def _robustness(self, recipes: Mapping[str, Tensor], target: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Mean and 95th percentile of the error when every layer is off by a random part of its thickness."""
        candidates = recipes["mae"].shape[1]
        wanted = [x.double().repeat_interleave(candidates, 0) for x in (target, weight)]
        material, thickness = recipes["material"].flatten(0, 1), recipes["thickness_nm"].flatten(0, 1)
        off = self.refiner.robustness(
            material, thickness, *wanted, relative=self.thickness_error, seed=self.evaluation_seed
        ).view(*recipes["mae"].shape, -1)
        return {"robust_mae": off.mean(-1), "robust_mae_p95": off.quantile(0.95, -1)}
