"""InverseDesign: a network that writes stacks for spectra, trained and tested beside the baselines it must beat."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.metrics.spectra import RateBuckets, SampleTable, summary
from lightning_modules.supervised import Supervised
from lightning_modules.thin_film.candidates import (
    Chosen,
    Limits,
    Refinement,
    alike,
    best_distinct,
    diversity,
    errors,
    refine,
    sizes,
    take,
)
from networks.diffusion import Sampler
from networks.optollama import StackGenerator
from networks.template_library import TemplateLibrary
from networks.token_choice import Constraints, SpecialTokens

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
_TRAIN, _EVALUATE = 11, 12  # streams of random numbers
SOURCES = ("network", "template")
_FITTED = 20_000  # training spectra that encoders see before training


class InverseDesign(Supervised):
    """Stacks of thin films for wanted spectra: sampled, simulated, ranked and refined.

    Batches are those of `datamodules.thin_films.ThinFilms`. Baselines are networks of the same kind as ``net``: they
    are trained on the same batches by the same optimizer, each with its own gradient and clipping, so that one run
    compares them on the same data. Template libraries answer with the nearest training spectra.

    A test follows one protocol for all methods (paper, section 2.8): ``num_draws`` stacks per target, simulated; error
    of the first draw and of the best of the first n; the best ``refine_top`` distinct ones refined by gradients through
    the simulator. `results_table` has it as rows, `callbacks.design_table` writes them. Everything that is drawn is a
    function of (seed, target, draw): results do not depend on batches and ranks.

    Steps of validation return ``loss``, ``prediction`` (spectrum of the best draw), ``target`` (B, 3, W) and ``index``;
    steps of test further what figures show: ``weight``, ``tokens`` (best draw), ``material`` and ``thickness_nm`` of
    the refined stack, ``prediction`` its spectrum, ``draws_mae_<network>`` (B, N) for the label and every baseline,
    ours first, ``refined_mae``, ``refined_mae_<method>``, ``trajectory`` (B, steps, L) and ``trajectory_mae`` of the
    first draw. Steps of predict return ``index``, ``target``, ``weight`` and K candidates, best first: ``tokens``
    (B, K, L), ``material`` and ``thickness_nm`` (B, K, L - 1) refined, ``spectrum`` (B, K, 3, W), ``mae``,
    ``raw_mae``, ``source`` (see `SOURCES`), ``robust_mae`` and ``robust_mae_p95`` (B, K).

    Logged: ``train/loss``; ``val/loss`` and ``val/accuracy`` of tokens, also by mask rate; ``val/mae`` of the first and
    ``val/best_mae`` of the best of ``val_draws`` draws; what a test finds as ``test/...``, of other methods as
    ``test/<method>/...``.

    Args:
        net: The network.
        optimizer: Partial that takes the parameters. None: the module can only be evaluated.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        label: What tables and figures call the network.
        baselines: Further networks by name, trained along; None for one leaves it out.
        ema_decay: Of the moving average of the weights of ``net`` that is evaluated; None: the weights themselves.
        num_draws: Stacks per target in a test.
        report_draws: Numbers of draws after which the best is reported, each at most ``num_draws``.
        refine_top: Distinct candidates per target that are refined.
        refinement: How; None: `Refinement` as it is.
        templates: Sizes of template libraries that a test compares with; ``equal``: as many bytes as the weights of the
            network in single precision.
        hybrid: Draws of the network, and as many hits of the template library of ``equal`` size, that are refined
            together; 0: not tested.
        diversity_draws: Draws among which different answers are counted.
        val_draws: Stacks per target in validation.
        val_sampler: How they are drawn; None: as in a test.
        limits: What stacks may be made of in prediction; None: anything.
        predict_templates: Template hits beside the ``num_draws`` draws in prediction.
        num_candidates: Candidates per target that prediction delivers.
        thickness_error: Relative standard deviation of thicknesses for the robustness of a candidate.
        max_sequences: Sequences that are sampled at once.
        evaluation_seed: Of draws.
        seed: Of the masks of training.
        scheduler_monitor: Metric given to schedulers that watch one.
        scheduler_interval: When the scheduler steps, after each ``epoch`` or each ``step``.

    Raises:
        ValueError: Names the argument and the remedy, also where network and data do not fit.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("spectrum", "tokens", "weight", "index")
    objects: ClassVar[tuple[str, ...]] = (
        *("net", "optimizer", "scheduler", "baselines", "refinement", "val_sampler", "limits"),
    )

    def __init__(
        self,
        net: StackGenerator,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        label: str = "OptoLlama",
        baselines: Mapping[str, StackGenerator | None] | None = None,
        ema_decay: float | None = None,
        num_draws: int = 50,
        report_draws: Sequence[int] = (10, 50),
        refine_top: int = 5,
        refinement: Refinement | None = None,
        templates: Sequence[int | str] = (1000, "equal", 100_000),
        hybrid: int = 25,
        diversity_draws: int = 10,
        val_draws: int = 4,
        val_sampler: Sampler | None = None,
        limits: Limits | None = None,
        predict_templates: int = 50,
        num_candidates: int = 5,
        thickness_error: float = 0.01,
        max_sequences: int = 1024,
        evaluation_seed: int = 0,
        seed: int = 0,
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "step",
    ) -> None:
        counts = {"num_draws": num_draws, "refine_top": refine_top, "val_draws": val_draws}
        counts |= {"num_candidates": num_candidates, "max_sequences": max_sequences}
        for key, value in counts.items():
            if value < 1:
                raise ValueError(f"model.{key}={value}: must be at least 1")
        if wrong := [n for n in report_draws if not 1 <= n <= num_draws]:
            raise ValueError(f"model.report_draws: {wrong[0]} must be between 1 and model.num_draws={num_draws}")
        for key, value in {"hybrid": hybrid, "diversity_draws": diversity_draws}.items():
            if not 0 <= value <= num_draws:
                raise ValueError(f"model.{key}={value}: must be between 0 and model.num_draws={num_draws}")
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"model.ema_decay={ema_decay}: must be at least 0 and below 1, or null")
        sizes(templates, 1)
        super().__init__(net, optimizer, scheduler, scheduler_monitor, scheduler_interval)
        self.save_hyperparameters(ignore=list(self.objects))
        self.label = label
        self.baselines = nn.ModuleDict({k: v for k, v in (baselines or {}).items() if v is not None})
        self.ema = None if ema_decay is None else copy.deepcopy(net).requires_grad_(False)
        self.ema_decay = ema_decay
        self.num_draws, self.report_draws, self.refine_top = num_draws, sorted(set(report_draws)), refine_top
        self.refinement, self.templates, self.hybrid = refinement or Refinement(), list(templates), hybrid
        self.diversity_draws, self.val_draws, self.val_sampler = diversity_draws, val_draws, val_sampler
        self.limits, self.predict_templates = limits or Limits(), predict_templates
        self.num_candidates, self.thickness_error = num_candidates, thickness_error
        self.max_sequences, self.evaluation_seed, self.seed = max_sequences, evaluation_seed, seed
        self.val_tokens, self.test_tokens = RateBuckets(), RateBuckets()
        self.val_table = SampleTable(("first", "best", "valid"))
        self.test_table: SampleTable | None = None
        self.libraries: dict[str, TemplateLibrary] = {}  # of a test, by method
        self.proposers: list[TemplateLibrary] = []  # of a prediction
        self.sampled: dict[str, list[float]] = {}  # by method: stacks of a test, and the seconds they took
        self._updated_at = -1
        self._trained = False  # here, or before the checkpoint was written

    # ----------------------------------------------------------------------------------------------- network and data

    @property
    def designer(self) -> StackGenerator:
        """The network that is evaluated."""
        return self.net if self.ema is None else self.ema

    def nets(self) -> Iterator[tuple[str, StackGenerator]]:
        """Networks that are trained, with the prefix of what is logged of them."""
        yield "", self.net
        for name, net in self.baselines.items():
            yield f"{name}/", net

    @property
    def data(self) -> Any:
        """The DataModule of the run: `datamodules.thin_films.ThinFilms`, or one with its attributes."""
        return self.trainer.datamodule

    @override
    def setup(self, stage: str) -> None:
        """Compare networks and data, and take the special tokens from the vocabulary."""
        vocabulary = self.data.vocabulary
        sizes_of_data = {
            "num_tokens": len(vocabulary),
            "length": self.data.length,
            "num_wavelengths": self.data.num_wavelengths,
        }
        every = {"net": self.net, **{f"baselines.{name}": net for name, net in self.baselines.items()}}
        for where, net in every.items():
            for key, value in sizes_of_data.items():
                if getattr(net, key) != value:
                    raise ValueError(f"model.{where}.{key}={getattr(net, key)}, but the data have {value}")
        special = SpecialTokens(vocabulary.eos, vocabulary.pad, vocabulary.msk)
        for net in (*every.values(), self.designer):
            net.special = special
            if stage == "fit" and hasattr(net.encoder, "fit"):  # what a checkpoint holds is read after this
                net.encoder.fit(self.data.library(min(_FITTED, self.data.num["train"] or _FITTED)).spectra.float())
        if stage in ("test", "predict"):
            self.refiner = self.refinement.refiner(self.data, self.device)
        if stage == "test":
            self._prepare_test()
        if stage == "predict":
            self.constraints = self.limits.constraints(vocabulary)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["thin_film"] = {
            "tokens": list(self.data.vocabulary.tokens),
            "wavelength_nm": self.data.wavelength_nm.tolist(),
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._trained = True
        stored = checkpoint.get("thin_film")
        if self._trainer is None or stored is None:
            return
        if stored["tokens"] != list(self.data.vocabulary.tokens):
            raise ValueError("the checkpoint was trained with other tokens: take its data.materials, data.thickness_nm")
        if stored["wavelength_nm"] != self.data.wavelength_nm.tolist():
            raise ValueError("the checkpoint was trained with other wavelengths: take its data.wavelength_nm")

    # ------------------------------------------------------------------------------------------------------- training

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        rank, ranks = self._share()
        place = torch.arange(len(batch["index"]), device=self.device) * ranks + rank
        key = (self.seed, _TRAIN, self.trainer.current_epoch)
        loss = torch.zeros((), device=self.device)
        for prefix, net in self.nets():
            terms = net.loss_terms(
                batch["spectrum"], batch["tokens"], batch["index"], key, place, ranks * len(batch["index"])
            )
            loss = loss + terms.total / self._mean_over_ranks(terms.weight, ranks)
            self._add_to_epoch(f"{prefix}loss", terms.total.detach().double(), terms.weight.double())
        return {"loss": loss}

    def _share(self) -> tuple[int, int]:
        """Number of this process among those that share the data, and how many these are."""
        layout = self.trainer.distributed_sampler_kwargs or {}
        return layout.get("rank", 0), layout.get("num_replicas", 1)

    def _mean_over_ranks(self, weight: Tensor, ranks: int) -> Tensor:
        """Number of terms per rank: gradients are averaged over ranks, and the loss is a mean over all terms."""
        if ranks > 1:
            weight = weight.clone()
            dist.all_reduce(weight)
            weight = weight / dist.get_world_size()
        return weight.clamp(min=1)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient of each network by its own norm: baselines must not disturb each other."""
        if gradient_clip_val is None or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for _, net in self.nets():
            nn.utils.clip_grad_norm_(net.parameters(), gradient_clip_val)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._trained = True
        if self.ema is None or self.global_step == self._updated_at:  # accumulated batches make one step
            return
        self._updated_at = self.global_step
        decay = min(self.ema_decay, (1 + self.global_step) / (10 + self.global_step))
        with torch.no_grad():
            torch._foreach_lerp_([*self.ema.parameters()], [*self.net.parameters()], 1 - decay)

    # ----------------------------------------------------------------------------------------------------- evaluation

    def draw(
        self,
        net: StackGenerator,
        batch: Batch,
        draws: Sequence[int],
        sampler: Sampler | None = None,
        constraints: Constraints | None = None,
        spectrum: Tensor | None = None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """Stacks that a network writes for a batch, ``(B, N, L)``, no more at once than `max_sequences`."""
        net.eval()
        spectrum = batch["spectrum"] if spectrum is None else spectrum
        together = max(1, self.max_sequences // len(draws)) if record is None else len(spectrum)
        parts = zip(spectrum.split(together), batch["index"].split(together), strict=True)
        return torch.cat(
            [
                net.sample(part, draws, index, self.evaluation_seed, sampler, constraints, record)
                for part, index in parts
            ]
        )

    def _token_loss(self, batch: Batch, buckets: RateBuckets, part: str) -> Tensor:
        """Loss with masks that depend on the item alone; its mean over the batch."""
        net, index = self.designer.eval(), batch["index"]
        key = (self.evaluation_seed, _EVALUATE)
        terms = net.loss_terms(batch["spectrum"], batch["tokens"], index, key, index, len(self.data.part(part)))
        buckets.update(terms.nll, terms.correct, terms.counted, terms.rate)
        return terms.total / terms.weight.clamp(min=1)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        loss = self._token_loss(batch, self.val_tokens, "val")
        tokens = self.draw(self.designer, batch, range(self.val_draws), self.val_sampler)
        spectra = self.data.simulate(tokens)
        mae = errors(spectra, batch["spectrum"], batch["weight"])
        best, place = mae.min(1)
        valid = self.data.vocabulary.well_formed(tokens).double().mean(1)
        self.val_table.update(batch["index"], {"first": mae[:, 0], "best": best, "valid": valid})
        prediction = take(spectra, place[:, None])[:, 0]
        return {"loss": loss, "prediction": prediction, "target": batch["spectrum"], "index": batch["index"]}

    @override
    def on_validation_epoch_start(self) -> None:
        self.val_tokens.reset()
        self.val_table.reset()

    @override
    def on_validation_epoch_end(self) -> None:
        table, tokens = self.val_table.compute(), self.val_tokens.compute()
        values = {"loss": tokens.pop("loss"), "mae": summary(table["first"])["mean"]}
        values["best_mae"] = summary(table["best"])["mean"]
        self._log_exact({f"val/{name}": value for name, value in values.items()}, prog_bar=True)
        values = {"valid": summary(table["valid"])["mean"], **tokens}
        self._log_exact({f"val/{name}": value for name, value in values.items()})

    # ----------------------------------------------------------------------------------------------------------- test

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
        return TemplateLibrary(stored.spectra.to(self.device), stored.tokens.to(self.device))

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
            yield from (f"{name}/{what}" for what in ("first", "valid", "distinct", "distinct_orders"))
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
        for name, net in self.methods().items():
            outputs |= self._test_network(name, net, batch, row, stacks)
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
        self, name: str, net: StackGenerator, batch: Batch, row: dict[str, Tensor], stacks: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Draw from a network: fills a row of the table and the candidates to refine; what figures show."""
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
        few = slice(0, self.diversity_draws or 1)
        row[f"{name}/distinct"], row[f"{name}/distinct_orders"] = diversity(tokens[:, few], mae[:, few], vocabulary)
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
        recipes = self._recipes(chosen[last], stacks[last])
        spectrum = take(recipes["spectrum"], best)[:, 0]
        outputs |= {"prediction": spectrum}
        outputs |= {name: take(recipes[name], best)[:, 0] for name in ("material", "thickness_nm")}
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

    # ----------------------------------------------------------------------------------------------------- prediction

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
            stored = self.data.library(self.data.num["train"] or len(self.data.part("train")))
            kept = self.limits.obeyed(stored.tokens.long(), self.data.vocabulary).nonzero()[:, 0]
            if len(kept):
                spectra, tokens = stored.spectra[kept].to(self.device), stored.tokens[kept].to(self.device)
                self.proposers.append(TemplateLibrary(spectra, tokens))
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
        recipe = self._recipes(found, stacks)
        again = alike(recipe["material"], recipe["thickness_nm"])
        order = recipe["mae"].masked_fill(again, torch.inf).sort(dim=1, stable=True).indices[:, : self.num_candidates]
        out = {name: take(value, order) for name, value in recipe.items()}
        out["mae"] = out["mae"].masked_fill(take(again, order), torch.inf)
        out |= {"tokens": take(stacks, order), "raw_mae": take(take(mae, places), order)}
        out["source"] = take(source.expand(len(target), -1), take(places, order))
        out |= self._robustness(out, target, weight)
        return out | {"index": batch["index"], "target": target, "weight": weight, "prediction": out["spectrum"][:, 0]}

    def _recipes(self, found: Chosen, stacks: Tensor) -> dict[str, Tensor]:
        """Refined stacks, or the stacks themselves where refinement did not help."""
        refined = found.refined
        material, thickness = self.data.vocabulary.layers(stacks.clamp(min=0))
        spectra = self.data.simulate(stacks.clamp(min=0))
        better = refined.mae <= refined.start_mae
        return {
            "material": torch.where(better[..., None], refined.material, material[..., :-1]),
            "thickness_nm": torch.where(better[..., None], refined.thickness_nm, thickness[..., :-1]),
            "spectrum": torch.where(better[..., None, None], refined.spectrum, spectra),
            "mae": found.mae,
        }

    def _robustness(self, recipes: Mapping[str, Tensor], target: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Mean and 95th percentile of the error when every layer is off by a random part of its thickness."""
        candidates = recipes["mae"].shape[1]
        wanted = [x.double().repeat_interleave(candidates, 0) for x in (target, weight)]
        material, thickness = recipes["material"].flatten(0, 1), recipes["thickness_nm"].flatten(0, 1)
        off = self.refiner.robustness(
            material, thickness, *wanted, relative=self.thickness_error, seed=self.evaluation_seed
        ).view(*recipes["mae"].shape, -1)
        return {"robust_mae": off.mean(-1), "robust_mae_p95": off.quantile(0.95, -1)}
