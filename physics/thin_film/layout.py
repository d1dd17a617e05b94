"""The layout in which the authors publish their data (paper, section 3).

``tokens.json`` (a list, index = id), ``materials/<name>.csv`` (nm,n,k), ``train/train-<i>.safetensors`` and
``test/test.safetensors`` with ``spectra`` (N, 3, W) float16 and ``thin_films`` (N, S) int64. The container is simple
enough to be read and written here: 8 bytes with the length of a JSON header (little endian), the header, the numbers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from physics.thin_film.materials import MaterialCatalog, Table, write_table
from physics.thin_film.tokens import Vocabulary

# The authors' simulator wants a table of this name, which stands for what fills up a sequence at zero thickness.
FILLER = "EVA"
_FILLER_INDEX = 1.49
_MOST_HEADER = 100_000_000
_TYPES = {"F16": np.dtype("<f2"), "I64": np.dtype("<i8")}


class Shard(NamedTuple):
    """One file: ``spectra`` (N, 3, W) float16 and ``tokens`` (N, S) int64, called ``thin_films`` in the file."""

    spectra: Tensor
    tokens: Tensor


class Layout(NamedTuple):
    """A folder in the published layout; shards are read with `read_shard`."""

    vocabulary: Vocabulary
    catalog: MaterialCatalog
    train: tuple[Path, ...]
    test: Path | None


def write_shard(path: str | Path, spectra: Tensor, tokens: Tensor) -> None:
    """Write a file; spectra are rounded to float16.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if spectra.ndim != 3 or spectra.shape[1] != 3 or tokens.ndim != 2 or len(spectra) != len(tokens):
        shapes = f"{tuple(spectra.shape)} and {tuple(tokens.shape)}"
        raise ValueError(f"spectra and tokens have shapes {shapes}; must be (N, 3, W) and (N, S)")
    arrays = {
        "spectra": ("F16", spectra.to(torch.float16).cpu().contiguous().numpy().astype("<f2")),
        "thin_films": ("I64", tokens.to(torch.int64).cpu().contiguous().numpy().astype("<i8")),
    }
    header, end = {}, 0
    for name, (kind, array) in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8 bytes
    with Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in arrays.values():
            file.write(array.tobytes())


def read_shard(path: str | Path) -> Shard:
    """Read a file; its numbers are mapped into memory and read when they are used.

    Raises:
        ValueError: For a file that is no safetensors file, lacks a tensor, or has one of another shape or type.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _MOST_HEADER):
            raise ValueError(f"{path}: no safetensors file, or one that was cut off in its header")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: no safetensors file: its header is no JSON") from error
    spectra = _mapped(path, header, "spectra", "F16", 3, 8 + length, size)
    tokens = _mapped(path, header, "thin_films", "I64", 2, 8 + length, size)
    if spectra.shape[1] != 3 or len(spectra) != len(tokens):
        shapes = f"spectra {spectra.shape}, thin_films {tokens.shape}"
        raise ValueError(f"{path}: {shapes}; must be (N, 3, W) and (N, S) of the same stacks")
    return Shard(torch.from_numpy(spectra), torch.from_numpy(tokens))


def _mapped(path: Path, header: object, name: str, kind: str, dims: int, start: int, size: int) -> np.ndarray:
    if not isinstance(header, dict) or name not in header:
        found = ", ".join(key for key in header if key != "__metadata__") if isinstance(header, dict) else "nothing"
        raise ValueError(f"{path}: has no tensor {name!r}, only {found}")
    entry = header[name]
    try:
        found, shape, (begin, end) = entry["dtype"], tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the entry of {name!r} in the header is broken") from error
    if found != kind or len(shape) != dims:
        raise ValueError(f"{path}: {name} is {found} {shape}, must be {kind} with {dims} dimensions")
    if end - begin != int(np.prod(shape)) * _TYPES[kind].itemsize or not 0 <= begin <= end <= size - start:
        raise ValueError(f"{path}: {name} of shape {shape} does not fit into the file; it may have been cut off")
    if begin == end:
        return np.zeros(shape, dtype=_TYPES[kind])
    return np.memmap(path, dtype=_TYPES[kind], mode="c", offset=start + begin, shape=shape)


def write_layout(
    folder: str | Path,
    vocabulary: Vocabulary,
    catalog: MaterialCatalog,
    wavelength_nm: Tensor,
    train: Iterable[Shard],
    test: Shard,
) -> None:
    """Write a folder that the authors' code can train on.

    Args:
        folder: Made where it is missing.
        vocabulary: Of the tokens.
        catalog: Indices of its materials, written at the wavelengths of the spectra.
        wavelength_nm: ``(W,)``.
        train: Written one by one.
        test: One shard.
    """
    folder = Path(folder)
    for name in ("materials", "train", "test"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    vocabulary.save(folder / "tokens.json")
    at = wavelength_nm.double().cpu()
    for name in vocabulary.materials:
        index = catalog.index(name, at)
        write_table(folder / "materials" / f"{name}.csv", Table(at.numpy(), index.real.numpy(), index.imag.numpy()))
    if FILLER not in vocabulary.materials:
        constant = Table(at.numpy(), np.full(len(at), _FILLER_INDEX), np.zeros(len(at)))
        write_table(folder / "materials" / f"{FILLER}.csv", constant)
    for number, shard in enumerate(train):
        write_shard(folder / "train" / f"train-{number}.safetensors", *shard)
    write_shard(folder / "test" / "test.safetensors", *test)


def read_layout(folder: str | Path) -> Layout:
    """What is in a folder in the published layout; its materials replace those that ship with the program.

    Raises:
        ValueError: If ``tokens.json`` or the training shards are missing, or a table is broken.
    """
    folder = Path(folder)
    if not (folder / "tokens.json").is_file():
        raise ValueError(f"{folder}: has no tokens.json; expected the published layout (tokens.json, train/, test/)")
    train = tuple(sorted((folder / "train").glob("*.safetensors"), key=_shard_number))
    if not train:
        raise ValueError(f"{folder / 'train'}: has no *.safetensors")
    materials = folder / "materials"
    catalog = MaterialCatalog.default(materials if any(materials.glob("*.csv")) else None)
    test = folder / "test" / "test.safetensors"
    return Layout(Vocabulary.load(folder / "tokens.json"), catalog, train, test if test.is_file() else None)


def _shard_number(path: Path) -> tuple[int, str]:
    digits = path.stem.rpartition("-")[2]
    return (int(digits) if digits.isdigit() else -1, path.name)
