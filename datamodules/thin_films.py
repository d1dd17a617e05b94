"""Stacks of thin films with their spectra: generated, read from published files, or wanted spectra without a stack."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from datamodules.design_targets import Variants, design_targets
from datamodules.loading import make_loader, whole_batch
from datamodules.stack_set import Batch, Numbers, StackSet, TargetSet, fingerprints, take_unlike
from networks.bayes.noise import counter_normal
from physics.thin_film.generator import StackGenerator
from physics.thin_film.layout import Shard, read_layout, read_shard, write_layout, write_shard
from physics.thin_film.materials import MaterialCatalog
from physics.thin_film.robustness import restore_sum
from physics.thin_film.surroundings import Polarization, Surroundings
from physics.thin_film.token_tables import TokenTables
from physics.thin_film.tokens import Vocabulary

log = logging.getLogger(__name__)

Source = Literal["generator", "published"]
_SHARD = 100_000  # stacks of a file of the cache
_CHUNK = 8192  # stacks simulated at once
_NOISE = 7  # stream of random numbers


class ThinFilms(LightningDataModule):
    """Stacks of thin films with their spectra.

    A batch is a dictionary:

    ========= ============= ============================================================================================
    key       shape         meaning
    ========= ============= ============================================================================================
    spectrum  (B, 3, W)     float32: reflectance, absorptance, transmittance; their sum is 1
    tokens    (B, L)        int64: layers from the light side on, EOS, PAD; not where targets are predicted
    weight    (B, 3, W)     float32: how much an error counts; 0 where nothing is asked for
    index     (B,)          int64: number of the stack or target in its part
    variants  (B, K, 3, W)  float32, targets alone: what the network is shown, the spectrum itself first
    ========= ============= ============================================================================================

    Parts: generated stacks are numbered by (seed, index), so that a set, a part of it and a stream are the same; train,
    val and test have seeds of their own. No stack of the validation part is in the test part: those are left out by
    their fingerprints. With published files validation takes the last stacks of the training files.

    Args:
        source: ``generator``, or ``published``: files of the published layout in ``folder``.
        folder: Below ``data_dir``: ``tokens.json``, ``train/*.safetensors``, ``test/*.safetensors``, and optionally
            ``materials/*.csv``; null with the generator.
        data_dir: Folder of the data.
        materials: Names, of the generator.
        thickness_nm: First and last thickness of a layer and the step between, of the generator.
        max_layers: Most layers of a stack.
        mixture: Weights of kinds of generated stacks (``random``, ``dbr``, ``fabry_perot``, ``absorber``,
            ``antireflection``); null: random ones alone.
        wavelength_nm: First and last wavelength and the step between.
        material_folder: Tables ``<material>.csv`` (nm, n, k) that replace or extend those of the program.
        substrate: ``none`` (air on both sides), ``semi_infinite:<material or number>``, or
            ``incoherent:<material or number>:<mm>``, a thick plate.
        angle_deg: Angle of incidence.
        polarization: ``s``, ``p``, ``unpolarized``.
        num_train: Training stacks; of published files the first ones, null: all.
        num_val: Validation stacks.
        num_test: Test targets; of published files evenly spread ones, null: all.
        train_seed: Of generated stacks.
        val_seed: The same.
        test_seed: The same.
        stream: Generator: whether every epoch has new stacks, made on the device as they are needed.
        unseen_test: Whether test targets whose stack is in the training part are left out. Of few layers there are few
            stacks: without it some targets are known by heart.
        noise: Standard deviation of noise on R and T in training.
        cache_dir: Where generated training stacks are kept in the published layout; null: made anew, in seconds.
        export_dir: Write the parts in the published layout there; null: do not.
        targets: Prediction: names of `physics.thin_film.targets`, mappings of a name and options, or CSV and JSON
            files; null: the test part.
        interpolate: Whether spectra of files are interpolated to the grid.
        repair: Whether impossible values of files are corrected.
        roi_nm: First and last wavelength that counts for targets; null: all.
        variants: Further versions of a target that the network is shown; null: none.
        num_tokens: Checked: layer tokens and three special ones.
        length: Checked: ``max_layers`` and EOS.
        num_wavelengths: Checked.
        batch_size: Stacks of a training step over all devices.
        eval_batch_size: Of an evaluation step.
        drop_last: Drop the incomplete last batch of a training epoch.
        num_workers: Loader processes.
        pin_memory: Page-locked batches, for GPUs.
        seed: Of the order of the training stacks, noise and variants.

    Raises:
        ValueError: Names the argument, or the file, and the remedy.
        FileNotFoundError: Names the file.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("spectrum", "tokens", "weight", "index")
    input_files: ClassVar[tuple[str, ...]] = ("folder",)  # runner/check.py looks for them

    def __init__(
        self,
        source: Source = "generator",
        folder: str | None = None,
        data_dir: str = "data",
        materials: Sequence[str] = ("Ag", "SiO2", "TiO2", "Si", "Al2O3"),
        thickness_nm: Sequence[float] = (20, 200, 20),
        max_layers: int = 6,
        mixture: Mapping[str, float] | None = None,
        wavelength_nm: Sequence[float] = (300, 1980, 30),
        material_folder: str | None = None,
        substrate: str = "semi_infinite:1.5",
        angle_deg: float = 0.0,
        polarization: Polarization = "unpolarized",
        num_train: int | None = 100_000,
        num_val: int = 200,
        num_test: int | None = 150,
        train_seed: int = 1,
        val_seed: int = 500,
        test_seed: int = 999,
        stream: bool = False,
        unseen_test: bool = False,
        noise: float = 0.0,
        cache_dir: str | None = None,
        export_dir: str | None = None,
        targets: str | Sequence[str | Mapping[str, Any]] | None = None,
        interpolate: bool = False,
        repair: bool = False,
        roi_nm: Sequence[float] | None = None,
        variants: Variants | None = None,
        num_tokens: int = 53,
        length: int = 7,
        num_wavelengths: int = 57,
        batch_size: int = 256,
        eval_batch_size: int = 50,
        drop_last: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.source, self.folder, self.data_dir = source, folder, Path(data_dir)
        self.materials, self.thickness_nm, self.max_layers = tuple(materials), tuple(thickness_nm), max_layers
        self.mixture = None if mixture is None else dict(mixture)
        self.material_folder, self.substrate = material_folder, substrate
        self.angle_deg, self.polarization = angle_deg, polarization
        self.num = {"train": num_train, "val": num_val, "test": num_test}
        self.part_seeds = {"train": train_seed, "val": val_seed, "test": test_seed}
        self.stream, self.unseen_test, self.noise = stream, unseen_test, noise
        self.cache_dir, self.export_dir = cache_dir, export_dir
        self.targets = [targets] if isinstance(targets, str | Mapping) else None if targets is None else list(targets)
        self.interpolate, self.repair = interpolate, repair
        self.roi_nm = None if roi_nm is None else tuple(roi_nm)
        self.variants = variants or Variants()
        self.num_tokens, self.length, self.num_wavelengths = num_tokens, length, num_wavelengths
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
        self._check_arguments()
        self.wavelength_nm = _grid(wavelength_nm, "wavelength_nm")
        self._check_sizes()
        self._ready = False
        self._sets: dict[str, Dataset[Batch]] = {}

    def _check_arguments(self) -> None:
        if self.source not in get_args(Source):
            raise ValueError(f"data.source={self.source!r} is unknown; choose generator or published")
        if (self.source == "published") != (self.folder is not None):
            raise ValueError(
                f"data.folder={self.folder}: data.source=published needs a folder, data.source=generator has none"
            )
        counts = {f"num_{part}": count for part, count in self.num.items()}
        counts |= {"max_layers": self.max_layers, "batch_size": self.batch_size}
        for key, value in {**counts, "eval_batch_size": self.eval_batch_size}.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{key}={value}: must be at least 1")
        if self.source == "generator":
            for key in ("train", "test"):
                if self.num[key] is None:
                    raise ValueError(f"data.num_{key}=null: say how many the generator is to make")
            if len(set(self.part_seeds.values())) < 3:
                raise ValueError(
                    f"data.train_seed, data.val_seed, data.test_seed = {tuple(self.part_seeds.values())}: must differ, "
                    "or the parts share their stacks"
                )
        elif self.stream or self.cache_dir:
            raise ValueError("data.stream and data.cache_dir are for data.source=generator")
        if self.stream and self.unseen_test:
            raise ValueError("data.unseen_test=true needs a fixed training part: set data.stream=false")
        if self.noise < 0 or self.num_workers < 0:
            raise ValueError("data.noise and data.num_workers must not be negative")
        if not self.materials:
            raise ValueError("data.materials is empty; name at least two")
        if self.roi_nm is not None and not (len(self.roi_nm) == 2 and self.roi_nm[0] < self.roi_nm[1]):
            raise ValueError(f"data.roi_nm={list(self.roi_nm)}: give the first and the last wavelength")

    def _check_sizes(self) -> None:
        expected = {"length": self.max_layers + 1, "num_wavelengths": len(self.wavelength_nm)}
        if self.source == "generator":
            thicknesses = _grid(self.thickness_nm, "thickness_nm")
            expected["num_tokens"] = len(self.materials) * len(thicknesses) + 3
        for key, value in expected.items():
            if getattr(self, key) != value:
                raise ValueError(f"data.{key}={getattr(self, key)}, but the data have {value}: set data.{key}={value}")

    # -------------------------------------------------------------------------------------------------------- optics

    def _open(self) -> None:
        """Vocabulary, materials, surroundings and simulator."""
        if self._ready:
            return
        if self.folder is None:
            self.vocabulary = Vocabulary.build(self.materials, _grid(self.thickness_nm, "thickness_nm").tolist())
            self.catalog = MaterialCatalog.default()
        else:
            self._layout = read_layout(self.data_dir / self.folder)
            self.vocabulary, self.catalog = self._layout.vocabulary, self._layout.catalog
        if len(self.vocabulary) != self.num_tokens:
            count = len(self.vocabulary)
            raise ValueError(
                f"data.num_tokens={self.num_tokens}, but the data have {count}: set data.num_tokens={count}"
            )
        if self.material_folder is not None:
            if not Path(self.material_folder).expanduser().is_dir():
                raise FileNotFoundError(f"data.material_folder={self.material_folder}: there is no such folder")
            self.catalog = self.catalog.with_folder(Path(self.material_folder).expanduser())
        self.surroundings = Surroundings.parse(
            self.substrate, self.catalog, self.wavelength_nm, self.angle_deg, self.polarization
        )
        self.index = self.catalog.indices(self.vocabulary.materials, self.wavelength_nm)
        self._tables: dict[tuple[str, torch.dtype], TokenTables] = {}
        self._ready = True

    def simulate(self, tokens: Tensor, dtype: torch.dtype = torch.complex128) -> Tensor:
        """Spectra of sequences ``(..., L)``, ``(..., 3, W)``, on the device where they lie."""
        key = str(tokens.device), dtype
        if key not in self._tables:
            self._tables[key] = TokenTables(
                self.vocabulary, self.catalog, self.wavelength_nm, self.surroundings, dtype, tokens.device
            )
        flat = tokens.reshape(-1, tokens.shape[-1])
        spectra = torch.cat([self._tables[key](part) for part in flat.split(_CHUNK)])
        return spectra.view(*tokens.shape[:-1], *spectra.shape[1:])

    # --------------------------------------------------------------------------------------------------------- parts

    @override
    def setup(self, stage: str) -> None:
        """Make or read what the stage needs, so that mistakes are reported before anything starts."""
        self._open()
        for part in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            self.part(part)
        if stage == "predict":
            self.part("test" if self.targets is None else "targets")

    def part(self, name: str) -> Any:
        """The set ``train``, ``val``, ``test`` or ``targets``."""
        self._open()
        if name not in self._sets:
            if name == "targets":
                self._sets[name] = self._target_set()
            elif self.source == "published":
                self._sets |= self._published()
            elif name == "train" and self.stream:
                self._sets[name] = Numbers(self.num["train"])
            else:
                self._sets[name] = self._generated(name)
        return self._sets[name]

    def _generator(self, part: str) -> StackGenerator:
        seed = self.part_seeds[part]
        return StackGenerator(self.vocabulary, self.max_layers, seed=seed, mixture=self.mixture, catalog=self.catalog)

    def _generated(self, part: str) -> StackSet:
        if part == "train":
            return StackSet(self._cached(self.num["train"]))
        avoid = None
        if part == "val":
            avoid = fingerprints(self.part("test").tokens)
        elif self.unseen_test:
            avoid = fingerprints(self.part("train").tokens)
        tokens, _ = take_unlike(self._generator(part).tokens, self.num[part], avoid)
        return StackSet([Shard(self.simulate(tokens).float(), tokens)])

    def _make(self, first: int, last: int) -> Shard:
        """Training stacks with these numbers, spectra in half precision."""
        tokens = self._generator("train").tokens(torch.arange(first, last))
        # Half precision is 100 times coarser than single: what is stored gains nothing from double.
        return Shard(self.simulate(tokens, torch.complex64).half(), tokens.to(torch.int16))

    def _cached(self, count: int) -> list[Shard]:
        if self.cache_dir is None:
            return [self._make(0, count)]
        folder = Path(self.cache_dir).expanduser() / self._identity()
        shards = []
        for number, first in enumerate(range(0, count, _SHARD)):
            last, path = min(first + _SHARD, count), folder / f"train-{number}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                shard = read_shard(path) if path.is_file() else None
                if shard is None or len(shard.tokens) < last - first:
                    made = self._make(first, last)
                    unfinished = path.with_suffix(".unfinished")
                    write_shard(unfinished, made.spectra, made.tokens.long())
                    unfinished.replace(path)
                    shard = read_shard(path)
            shards.append(Shard(shard.spectra[: last - first], shard.tokens[: last - first]))
        return shards

    def _identity(self) -> str:
        """Name of what the generated training stacks and their spectra depend on."""
        digest = hashlib.sha256()
        for part in (self.vocabulary.tokens, self.max_layers, self.mixture, self.part_seeds["train"], self.substrate):
            digest.update(repr(part).encode())
        for part in (self.angle_deg, self.polarization, self.wavelength_nm.tolist(), self.index.tolist()):
            digest.update(repr(part).encode())
        return digest.hexdigest()[:16]

    def _published(self) -> dict[str, StackSet]:
        """All parts of files; validation is the end of the training files without the stacks of the test part."""
        if self._layout.test is None:
            raise FileNotFoundError(f"data.folder={self.folder}: there is no test/test.safetensors")
        files = {"train": self._layout.train, "test": (self._layout.test,)}
        shards = {part: [self._checked(path) for path in found] for part, found in files.items()}
        whole = {part: StackSet(own) for part, own in shards.items()}
        test = whole["test"]
        if self.num["test"] is not None and self.num["test"] < len(test):
            test = StackSet([test.gather(torch.arange(self.num["test"]) * (len(test) // self.num["test"]))])
        if self.unseen_test:
            known = fingerprints(whole["train"].tokens)
            test = StackSet([test.gather((~torch.isin(fingerprints(test.tokens), known)).nonzero()[:, 0])])
        count = len(whole["train"])
        if self.num["val"] >= count:
            raise ValueError(f"data.num_val={self.num['val']}: the training files hold {count} stacks")
        held_out = whole["train"].gather(torch.arange(count - self.num["val"], count))
        unlike = ~torch.isin(fingerprints(held_out.tokens), fingerprints(test.tokens))
        kept = count - self.num["val"] if self.num["train"] is None else self.num["train"]
        if kept > count - self.num["val"]:
            raise ValueError(f"data.num_train={kept}: without validation there are {count - self.num['val']} stacks")
        return {
            "train": StackSet(_first(shards["train"], kept)),
            "val": StackSet([Shard(held_out.spectra[unlike], held_out.tokens[unlike])]),
            "test": test,
        }

    def _checked(self, path: Path) -> Shard:
        shard = read_shard(path)
        if shard.tokens.shape[1] != self.length or shard.spectra.shape[1:] != (3, self.num_wavelengths):
            raise ValueError(
                f"{path}: stacks of {shard.tokens.shape[1]} tokens and spectra of {tuple(shard.spectra.shape[1:])}, "
                f"but data.length={self.length} and data.num_wavelengths={self.num_wavelengths}"
            )
        for first in range(0, len(shard.tokens), _SHARD):
            tokens = shard.tokens[first : first + _SHARD]
            if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.num_tokens:
                raise ValueError(f"{path}: ids outside of the {self.num_tokens} tokens of tokens.json")
            if not (well := self.vocabulary.well_formed(tokens)).all():
                number = first + int((~well).nonzero()[0])
                raise ValueError(f"{path}: stack {number} is not a sequence of layers, one <EOS>, and <PAD> behind it")
        return shard

    def library(self, count: int) -> Shard:
        """The first ``count`` training stacks: spectra ``(count, 3, W)`` float16, tokens ``(count, L)``.

        Raises:
            ValueError: If there are fewer.
        """
        if self.num["train"] is not None and count > self.num["train"]:
            raise ValueError(f"model.templates: {count} stacks, but data.num_train={self.num['train']}")
        if isinstance(found := self.part("train"), Numbers):
            return self._make(0, count)
        shard = found.gather(torch.arange(count))
        return Shard(shard.spectra.half(), shard.tokens)

    # ------------------------------------------------------------------------------------------------------- targets

    def _target_set(self) -> TargetSet:
        targets = design_targets(self.targets, self.wavelength_nm, self.interpolate, self.repair, self.roi_nm)
        return TargetSet(targets, [self.variants.of(t, self.seed + i) for i, t in enumerate(targets)])

    @property
    def target_names(self) -> list[str]:
        """Names of what is predicted, by ``index``."""
        if self.targets is None:
            return [f"test_{i}" for i in range(len(self.part("test")))]
        return [target.name for target in self.part("targets").targets]

    # ------------------------------------------------------------------------------------------------------- loaders

    def _loader(self, part: str, batch_size: int, shuffle: bool = False) -> DataLoader:
        layout = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        collate = None if part == "targets" else whole_batch
        return make_loader(
            self.part(part),
            batch_size,
            shuffle=shuffle,
            seed=self.seed,
            layout=layout,
            drop_last=self.drop_last and shuffle,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    @override
    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self.batch_size, shuffle=True)

    def _evaluation(self, part: str) -> DataLoader:
        layout = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        replicas = layout["num_replicas"] if layout else 1
        return self._loader(part, -(-self.eval_batch_size // replicas) * replicas)

    @override
    def val_dataloader(self) -> DataLoader:
        return self._evaluation("val")

    @override
    def test_dataloader(self) -> DataLoader:
        return self._evaluation("test")

    @override
    def predict_dataloader(self) -> DataLoader:
        return self._evaluation("test" if self.targets is None else "targets")

    @override
    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if "spectrum" not in batch:
            numbers = batch["index"].cpu() + self.trainer.current_epoch * self.num["train"]
            batch["tokens"] = self._generator("train").tokens(numbers).to(batch["index"].device)
            batch["spectrum"] = self.simulate(batch["tokens"], torch.complex64)
            batch["weight"] = torch.ones_like(batch["spectrum"])
        if self.noise and self.trainer is not None and self.trainer.training:
            batch["spectrum"] = self._noisy(batch["spectrum"], batch["index"])
        return batch

    def _noisy(self, spectrum: Tensor, index: Tensor) -> Tensor:
        key = (self.seed, _NOISE, self.trainer.current_epoch)
        noise = counter_normal(key, [0], index, (2, self.num_wavelengths))[0]
        changed = spectrum.clone()
        changed[:, [0, 2]] += self.noise * noise.to(spectrum.dtype)
        return restore_sum(changed)

    # -------------------------------------------------------------------------------------------------------- export

    @override
    def prepare_data(self) -> None:
        """Write the export, once for all processes of a machine."""
        if self.export_dir is not None:
            self.export(self.export_dir)

    def export(self, folder: str | Path) -> None:
        """Write vocabulary, materials and parts in the published layout, which the authors' program reads too.

        Args:
            folder: Where; made if it does not exist.
        """
        self._open()
        train, test, count = self.part("train"), self.part("test"), self.num["train"] or len(self.part("train"))

        def shards() -> Iterator[Shard]:
            for first in range(0, count, _SHARD):
                last = min(first + _SHARD, count)
                made = isinstance(train, Numbers)
                shard = self._make(first, last) if made else train.gather(torch.arange(first, last))
                yield Shard(shard.spectra.half(), shard.tokens.long())

        targets = test.gather(torch.arange(len(test)))
        folder = Path(folder).expanduser()
        write_layout(folder, self.vocabulary, self.catalog, self.wavelength_nm, shards(), targets)
        log.info("wrote %d training stacks and %d test targets to %s", count, len(test), folder)


def _grid(limits: Sequence[float], key: str) -> Tensor:
    """First, last, step as ``(n,)`` float64."""
    if len(limits) != 3 or limits[2] <= 0 or not 0 < limits[0] <= limits[1]:
        raise ValueError(f"data.{key}={list(limits)}: give the first value, the last one and the step between")
    count = (limits[1] - limits[0]) / limits[2]
    if abs(count - round(count)) > 1e-9:
        raise ValueError(f"data.{key}={list(limits)}: the step does not lead from {limits[0]:g} to {limits[1]:g}")
    return torch.from_numpy(limits[0] + limits[2] * np.arange(round(count) + 1, dtype=np.float64))


def _first(shards: Sequence[Shard], count: int) -> list[Shard]:
    """The first ``count`` stacks of several shards."""
    kept = []
    for shard in shards:
        if count > 0:
            kept.append(Shard(shard.spectra[:count], shard.tokens[:count]))
            count -= len(shard.tokens)
    return kept
