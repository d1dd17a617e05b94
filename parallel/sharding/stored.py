"""Checkpoints of models in parts as they lie on disk, and the blocks of a network that a rank takes from one.

A checkpoint in parts is a small file and a folder beside it, which `strategies.jigsaw.checkpoint` writes. One that is
whole is the file that every other strategy saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from parallel.sharding.blocks import Block, BlockLoadPlanner, fill
from parallel.sharding.grid import JigsawGrid

SHARDS = "shards"  # key of the file under which the name of the folder stands
MODEL = "model"  # begin of the names of the model's tensors in the folder


def _metadata(folder: Path) -> Mapping[str, Any]:
    return dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata


def stored_sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a folder, by name."""
    return {
        name: tuple(data.size) for name, data in _metadata(folder).items() if isinstance(data, TensorStorageMetadata)
    }


def stored_types(folder: Path) -> dict[str, torch.dtype]:
    """Types of the tensors of a folder, by name."""
    return {
        name: data.properties.dtype
        for name, data in _metadata(folder).items()
        if isinstance(data, TensorStorageMetadata)
    }


def model_sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors of a folder, by the names that they have in the module."""
    begin = f"{MODEL}."
    return {name.removeprefix(begin): size for name, size in stored_sizes(folder).items() if name.startswith(begin)}


def alone() -> bool:
    """Whether this process is the only one."""
    return not (dist.is_available() and dist.is_initialized())


def read_parts(parts: dict[str, Any], folder: Path) -> None:
    """Fill `Block` objects and tensors by their names in the folder; called on all ranks together."""
    dcp.load(parts, storage_reader=dcp.FileSystemReader(str(folder)), planner=BlockLoadPlanner(), no_dist=alone())


def folder_of(file: Path, content: Mapping[str, Any]) -> Path:
    """Where the parts of a checkpoint lie.

    Raises:
        ValueError: If they are not there.
    """
    folder = file.resolve().parent / content[SHARDS]
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{file} names its parts in {folder}, which is not there: copy both")
    return folder


def check_sizes(own: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a ValueError with the differences between the tensors of a model and those of a checkpoint."""
    found = [f"{name}: {own[name]} here, missing there" for name in own if name not in stored]
    found += [f"{name}: {stored[name]} there, missing here" for name in stored if name not in own]
    found += [
        f"{name}: {own[name]} here, {stored[name]} there"
        for name in own
        if name in stored and own[name] != tuple(stored[name])
    ]
    if found:
        shown = "; ".join(found[:8]) + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
        raise ValueError(f"the checkpoint is of another architecture, {len(found)} difference(s): {shown}")


def load_network(net: nn.Module, path: str | Path, prefix: str = "net.") -> None:
    """Take this rank's blocks of a network from a checkpoint, whole or in parts, of any grid.

    Args:
        net: With the ``grid`` and, where it is cut into blocks, the ``layouts`` of its parameters.
        path: File; of one in parts only the blocks of this rank are read, by all ranks together.
        prefix: Of the network's names in the checkpoint.

    Raises:
        ValueError: If the file is no checkpoint or of another architecture; lists the differences.
    """
    path, grid, layouts = Path(path), getattr(net, "grid", JigsawGrid()), getattr(net, "layouts", {})
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"it is no checkpoint that can be read ({type(error).__name__})") from error
    own = {name: layouts[name].sizes if name in layouts else tuple(t.shape) for name, t in net.state_dict().items()}
    if isinstance(content, dict) and SHARDS in content:
        folder = folder_of(path, content)
        sizes = model_sizes(folder)
        check_sizes(own, {name.removeprefix(prefix): s for name, s in sizes.items() if name.startswith(prefix)})
        read_parts(
            {
                f"{MODEL}.{prefix}{name}": Block(tensor, layouts[name], grid) if name in layouts else tensor.detach()
                for name, tensor in net.state_dict().items()
            },
            folder,
        )
        return
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError("it holds no state_dict")
    stored = {n.removeprefix(prefix): t for n, t in content["state_dict"].items() if n.startswith(prefix)}
    check_sizes(own, {name: tuple(tensor.shape) for name, tensor in stored.items()})
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name in layouts:
                fill(tensor, stored[name], layouts[name], grid)
            else:
                tensor.copy_(stored[name])
