"""The test of networks that write stacks: one protocol for all methods, one table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_modules.metrics.spectra import SampleTable, summary
from lightning_modules.thin_film.candidates import (
    Chosen,
    best_distinct,
    diversity,
    errors,
    recipes,
    refine,
    sizes,
    take,
)
from lightning_modules.thin_film.training import Batch, StackTraining
from networks.stack_generator import StackGenerator
from networks.template_library import TemplateLibrary


class Comparison(StackTraining):
    """Tests a network beside its baselines and template libraries (paper, section 2.8).

    The arguments are those of `lightning_modules.thin_film.InverseDesign`.
    """

    label: str
    num_draws: int
    report_draws: list[int]
    refine_top: int
    templates: list[int | str]
    hybrid: int
    diversity_draws: int
    test_table: SampleTable | None
    libraries: dict[str, TemplateLibrary]  # by method
    sampled: dict[str, list[float]]  # by method: stacks that were drawn, and the seconds it took

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "test":
            self._prepare_test()

    def methods(self) -> dict[str, StackGenerator]:
        """Networks of a test by name; the first one is ours."""
        return {"net": self.designer, **self.baselines}

    def equal_storage(self) -> int:
        """Stacks that a library holds in as many bytes as the weights of the network have in single precision."""
        weights = 4 * sum(p.numel() for p in self.net.parameters())
        net = self.net
        return weights // TemplateLibrary.bytes_per_stack(net.num_tokens, net.length, net.num_wavelengths)

    def _library(self, count: int) -> TemplateLibrary:
        stored = self.data.library(count)
        return TemplateLibrary(stored.spectra, stored.tokens)  # where there is room; parts are moved as they are needed

    def _prepare_test(self) -> None:
        most = self.data.num["train"] or len(self.data.part("train"))
        wanted = sizes(self.templates, self.equal_storage())
        if self.hybrid:
            wanted.setdefault("template_equal", self.equal_storage())
        self.libraries = {}
        for name, count in wanted.items():
            if count > most:
                rank_zero_warn(f"{name}: a library of {count} stacks, but there are {most} in training; all are taken")
            self.libraries[name] = self._library(min(count, most))
        self.test_table = SampleTable(list(self._columns())).to(self.device)
        self.sampled = {name: [0.0, 0.0] for name in self.methods()}

    def _columns(self) -> Iterator[str]:
        """Columns of the table of a test, ``<method>/<quantity>``."""
        for name in self.methods():
            yield from (f"{name}/{what}" for what in ("first", "valid", "distinct", "distinct_orders", "alternatives"))
            for n in self.report_draws:
                yield from (f"{name}/{what}_of_{n}" for what in ("best", "refined_top1", "refined"))
        for name in self.libraries:
            yield from (f"{name}/{what}" for what in ("best", "refined_top1", "refined"))
        if self.hybrid:
            yield from (f"hybrid/{what}" for what in ("refined", "refined_net_alone", "refined_template_alone"))
        yield from (f"net/refined_{channel}" for channel in "RAT")

    @override
    def on_test_epoch_start(self) -> None:
        self.test_tokens.reset()
        self.test_table.reset()

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        target, weight = batch["spectrum"], batch["weight"]
        loss = self._token_loss(batch, self.test_tokens, "test")
        row: dict[str, Tensor] = {}
        outputs = {"loss": loss, "target": target, "weight": weight, "index": batch["index"]}
        outputs["origin"] = batch["index"]  # by which figures sort
        stacks: dict[str, Tensor] = {}
        few: dict[str, tuple[Tensor, Tensor]] = {}
        for name, net in self.methods().items():
            outputs |= self._test_network(name, net, batch, row, stacks, few)
        self._test_diversity(few, row)
        for name, library in self.libraries.items():
            found, _ = library.nearest(target, weight, max(self.refine_top, self.hybrid if "equal" in name else 0))
            hits = library.stacks(found)
            mae = errors(self.data.simulate(hits[:, : self.refine_top]), target, weight)
            row[f"{name}/best"] = mae[:, 0]  # the nearest one by the stored spectra
            stacks[name] = hits[:, : self.refine_top]
            if self.hybrid and name == "template_equal":
                stacks["hybrid/template"] = self._best(hits, errors(self.data.simulate(hits), target, weight))
        chosen = refine(self.refiner, self.data.vocabulary, stacks, target, weight)
        self._test_refined(chosen, stacks, batch, row, outputs)
        self.test_table.update(batch["index"], row)
        return outputs

    def _best(self, tokens: Tensor, mae: Tensor) -> Tensor:
        """The best distinct stacks of each target, ``(B, K, L)``; -1 where there are no more."""
        places = best_distinct(tokens, mae, self.refine_top)
        return take(tokens, places).masked_fill(places[..., None] < 0, -1)

    def _test_network(
        self,
        name: str,
        net: StackGenerator,
        batch: Batch,
        row: dict[str, Tensor],
        stacks: dict[str, Tensor],
        few: dict[str, tuple[Tensor, Tensor]],
    ) -> dict[str, Tensor]:
        """Draw from a network: fills a row of the table, candidates to refine and a few draws; what figures show."""
        target, weight, vocabulary = batch["spectrum"], batch["weight"], self.data.vocabulary
        begin = time.perf_counter()
        tokens = self.draw(net, batch, range(self.num_draws))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.sampled[name][0] += tokens.shape[0] * tokens.shape[1]
        self.sampled[name][1] += time.perf_counter() - begin
        spectra = self.data.simulate(tokens)
        mae = errors(spectra, target, weight)
        row[f"{name}/first"] = mae[:, 0]
        row[f"{name}/valid"] = (vocabulary.well_formed(tokens) & mae.isfinite()).double().mean(1)
        first = slice(0, self.diversity_draws or 1)
        few[name] = tokens[:, first], mae[:, first]
        for n in self.report_draws:
            row[f"{name}/best_of_{n}"] = mae[:, :n].amin(1)
            stacks[f"{name}/{n}"] = self._best(tokens[:, :n], mae[:, :n])
        if name != "net":
            return {f"draws_mae_{name}": mae}
        shown = {f"draws_mae_{self.label}": mae}
        if self.hybrid:
            stacks["hybrid/net"] = self._best(tokens[:, : self.hybrid], mae[:, : self.hybrid])
        steps: list[Tensor] = []
        self.draw(net, batch, range(1), record=steps)
        trajectory = torch.cat(steps, 1)  # each (B, 1, L)
        best = mae.argmin(1, keepdim=True)
        return shown | {
            "tokens": take(tokens, best)[:, 0],
            "drawn": take(spectra, best)[:, 0],
            "trajectory": trajectory,
            "trajectory_mae": errors(self.data.simulate(trajectory), target, weight),
        }

    def _test_diversity(self, few: Mapping[str, tuple[Tensor, Tensor]], row: dict[str, Tensor]) -> None:
        """Different answers near the best of each network, and near the best of all of them (``alternatives``)."""
        best = torch.stack([mae.amin(1) for _, mae in few.values()]).amin(0)
        for name, (tokens, mae) in few.items():
            vocabulary = self.data.vocabulary
            row[f"{name}/distinct"], row[f"{name}/distinct_orders"] = diversity(tokens, mae, vocabulary)
            row[f"{name}/alternatives"] = diversity(tokens, mae, vocabulary, best)[0]

    def _test_refined(
        self,
        chosen: Mapping[str, Chosen],
        stacks: Mapping[str, Tensor],
        batch: Batch,
        row: dict[str, Tensor],
        outputs: dict[str, Tensor],
    ) -> None:
        """Fill in what refinement gave."""
        for name in self.methods():
            for n in self.report_draws:
                mae = chosen[f"{name}/{n}"].mae
                row[f"{name}/refined_top1_of_{n}"], row[f"{name}/refined_of_{n}"] = mae[:, 0], mae.amin(1)
            outputs[f"refined_mae_{self.label if name == 'net' else name}"] = mae.amin(1)
            if name == "net":
                outputs["refined_mae"] = mae.amin(1)
        for name in self.libraries:
            mae = chosen[name].mae
            row[f"{name}/refined_top1"], row[f"{name}/refined"] = mae[:, 0], mae.amin(1)
            outputs[f"best_mae_{name}"], outputs[f"refined_mae_{name}"] = row[f"{name}/best"], mae.amin(1)
        if self.hybrid:
            net, template = (chosen[f"hybrid/{part}"].mae.amin(1) for part in ("net", "template"))
            row["hybrid/refined_net_alone"], row["hybrid/refined_template_alone"] = net, template
            row["hybrid/refined"] = torch.minimum(net, template)
        last = f"net/{self.report_draws[-1]}"
        best = chosen[last].mae.argmin(1, keepdim=True)
        recipe = recipes(chosen[last], stacks[last], self.data)
        spectrum = take(recipe["spectrum"], best)[:, 0]
        outputs |= {"prediction": spectrum}
        outputs |= {name: take(recipe[name], best)[:, 0] for name in ("material", "thickness_nm")}
        off = (spectrum - batch["spectrum"]).abs()
        for c, channel in enumerate("RAT"):
            own = batch["weight"][:, c].double()
            row[f"net/refined_{channel}"] = (off[:, c] * own).sum(1) / own.sum(1).clamp(min=1e-12)

    @override
    def on_test_epoch_end(self) -> None:
        table = self.test_table.compute()
        tokens = self.test_tokens.compute()
        last = self.report_draws[-1]
        values = {"loss": tokens["loss"], "token_accuracy": tokens["accuracy"]}
        main = {"first": "first_mae", f"best_of_{last}": "best_mae", f"refined_of_{last}": "mae"}
        for column, name in main.items():
            found = summary(table[f"net/{column}"])
            values |= {name: found["mean"], f"{name}_median": found["median"], f"{name}_p90": found["p90"]}
        for column, values_of in table.items():
            if column == "index":
                continue
            name, _, what = column.rpartition("/")
            prefix = "" if name == "net" else f"{name}/"
            if not (name == "net" and what in main):
                values[f"{prefix}{what}"] = summary(values_of)["mean"]
        self._log_exact({f"test/{name}": value for name, value in values.items()})

    def results_table(self) -> list[dict[str, Any]]:
        """Rows of the comparison of a test: ``method``, ``N``, and mean / median of the errors, after `test`."""
        table = {name: summary(values) for name, values in self.test_table.compute().items() if name != "index"}
        rows = []
        for name, library in self.libraries.items():
            label = f"template, {len(library)} stacks" + (" (equal storage)" if name == "template_equal" else "")
            cells = {"best": "best", "refined_top1": "refined_top1", "refined": "refined"}
            rows.append({"method": label} | {k: table[f"{name}/{v}"] for k, v in cells.items()})
        for name in [*self.baselines, "net"]:
            for n in self.report_draws:
                cells = {"first": "first", "best": f"best_of_{n}"}
                cells |= {"refined_top1": f"refined_top1_of_{n}", "refined": f"refined_of_{n}"}
                label = self.label if name == "net" else name
                rows.append({"method": label, "N": n} | {k: table[f"{name}/{v}"] for k, v in cells.items()})
        if self.hybrid:
            label = f"hybrid, {self.hybrid} draws and {self.hybrid} templates"
            rows.append({"method": label, "N": 2 * self.hybrid, "refined": table["hybrid/refined"]})
        return rows
