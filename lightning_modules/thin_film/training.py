"""Training and validation of networks that write stacks of thin films."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.metrics.spectra import RateBuckets, SampleTable, summary
from lightning_modules.supervised import Supervised
from lightning_modules.thin_film.candidates import Limits, Refinement, errors, take
from networks.diffusion import Sampler
from networks.stack_generator import StackGenerator
from networks.token_choice import Constraints, SpecialTokens
from physics.thin_film.refine import Refiner

Batch = dict[str, Tensor]
_TRAIN, _EVALUATE = 11, 12  # streams of random numbers
_FITTED = 20_000  # training spectra that encoders see before training


class StackTraining(Supervised):
    """Trains a network and its baselines on the same batches, and validates the network by stacks that it draws.

    The arguments are those of `lightning_modules.thin_film.InverseDesign`, which sets the attributes.
    """

    net: StackGenerator
    ema: StackGenerator | None
    baselines: nn.ModuleDict
    ema_decay: float | None
    refinement: Refinement
    limits: Limits
    val_sampler: Sampler | None
    val_tokens: RateBuckets
    test_tokens: RateBuckets
    val_table: SampleTable
    val_draws: int
    max_sequences: int
    evaluation_seed: int
    seed: int
    _refiner: tuple[torch.device, Refiner] | None = None
    _trained = False  # here, or before the checkpoint was written

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

    @property
    def refiner(self) -> Refiner:
        """Refines on the device of the module, which is known after `setup`."""
        if self._refiner is None or self._refiner[0] != self.device:
            self._refiner = self.device, self.refinement.refiner(self.data, self.device)
        return self._refiner[1]

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
        self._refiner = None
        if stage in ("test", "predict"):
            _ = self.refiner  # reports wrong settings before anything starts

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

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            mine = self.state_dict().keys()
            odd = [*sorted(mine - state_dict.keys()), *sorted(state_dict.keys() - mine)] or ["sizes differ"]
            raise ValueError(
                f"the checkpoint holds other networks than model ({odd[0]}, {len(odd)} in all): take the model and the "
                "baselines of the run that wrote it (model=optollama for experiment=thin_film/published; "
                "model.baselines.optogpt=null where no baseline was trained)"
            ) from error

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
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the average follow: before any callback sees the end of the batch, and may save it."""
        super().optimizer_step(*args, **kwargs)
        self._trained = True
        if self.ema is None:
            return
        step = self.global_step + 1  # this one is counted later
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            averages, weights = zip(*self._averaged(), strict=True)
            torch._foreach_lerp_(averages, weights, 1 - decay)

    def _averaged(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Averages beside what they follow: the weights in use, of which a strategy or a callback may train factors."""
        owners = dict(self.net.named_modules())
        for name, average in self.ema.named_parameters():
            owner, _, own = name.rpartition(".")
            yield average, getattr(owners[owner], own)

    def weight_averages(self) -> list[Tensor]:
        """What strategies whose replicas differ average with them (`strategies.cluster.running_state`)."""
        return [] if self.ema is None else [*self.ema.parameters()]

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
