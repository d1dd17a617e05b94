"""Checkpoints of models in parts: every rank writes its blocks, and any other grid reads what it needs of them.

A checkpoint is a file, which holds all that is small and the name of a folder beside it, and that folder, in which the
blocks of weights and of the optimizers' tensors lie without padding (torch.distributed.checkpoint). The file is
replaced after the folder is complete, so that a crash leaves the checkpoint before whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from parallel.sharding.blocks import Block, BlockSavePlanner, fill, whole
from parallel.sharding.grid import JigsawGrid
from parallel.sharding.layout import Layout
from parallel.sharding.stored import (
    MODEL,
    SHARDS,
    alone,
    check_sizes,
    folder_of,
    model_sizes,
    read_parts,
    stored_sizes,
    stored_types,
)


def module_layouts(module: nn.Module, net: nn.Module, prefix: str = "net.") -> dict[str, Layout]:
    """Layouts by the names that parameters have in the module."""
    known = net.layouts
    return {prefix + name: layout for name, layout in known.items() if prefix + name in dict(module.named_parameters())}


class States:
    """Tensors of a module and its optimizers by name, with the block of each that this rank holds.

    Args:
        module: Lightning's.
        optimizers: In their order.
        layouts: Of the parameters, by name.
        grid: Ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        layouts: Mapping[str, Layout],
        grid: JigsawGrid,
    ) -> None:
        self.module, self.optimizers, self.layouts, self.grid = module, list(optimizers), layouts, grid
        self.names = {id(parameter): name for name, parameter in module.named_parameters()}

    # ---------------------------------------------------------------------------------------------------- optimizers

    def order(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Names of the parameters in the order in which an optimizer numbers them."""
        return [self.names[id(p)] for group in optimizer.param_groups for p in group["params"]]

    def is_block(self, name: str, tensor: Any) -> bool:
        """Whether a value of an optimizer is cut like its parameter ``name``."""
        parameter = self.module.get_parameter(name)
        return isinstance(tensor, Tensor) and name in self.layouts and tensor.shape == parameter.shape

    def groups(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """Settings of the groups, plain."""
        return optimizer.state_dict()["param_groups"]

    # ------------------------------------------------------------------------------------------------------- tensors

    def tensors(self) -> dict[str, Any]:
        """What is written in parts: `Block` objects and tensors that all ranks have."""
        found: dict[str, Any] = {}
        for name, tensor in self.module.state_dict().items():
            found[f"{MODEL}.{name}"] = self._part(name, tensor, name in self.layouts)
        for number, optimizer in enumerate(self.optimizers):
            order = self.order(optimizer)
            for index, values in optimizer.state_dict()["state"].items():
                name = order[index]
                for key, value in values.items():
                    if isinstance(value, Tensor):
                        full = f"optimizer_{number}.{name}.{key}"
                        found[full] = self._part(name, value, self.is_block(name, value))
        return found

    def _part(self, name: str, tensor: Tensor, is_block: bool) -> Any:
        return Block(tensor, self.layouts[name], self.grid) if is_block else tensor.detach()

    def plain(self) -> list[dict[str, Any]]:
        """What the file holds of the optimizers: settings, names of parameters, values that are no tensors."""
        found = []
        for optimizer in self.optimizers:
            order = self.order(optimizer)
            state = {
                order[index]: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
                for index, values in optimizer.state_dict()["state"].items()
            }
            found.append({"param_groups": self.groups(optimizer), "order": order, "values": state})
        return found

    def whole_model(self) -> dict[str, Tensor]:
        """The model's tensors without cuts, on the CPU; a collective call."""
        return {
            name: self._whole(name, tensor, name in self.layouts) for name, tensor in self.module.state_dict().items()
        }

    def whole_optimizer(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """State of an optimizer without cuts, as torch's own; a collective call."""
        order, state = self.order(optimizer), optimizer.state_dict()
        values = {
            index: {
                key: self._whole(order[index], value, self.is_block(order[index], value))
                if isinstance(value, Tensor)
                else value
                for key, value in of_parameter.items()
            }
            for index, of_parameter in state["state"].items()
        }
        return {"state": values, "param_groups": state["param_groups"]}

    def _whole(self, name: str, tensor: Tensor, is_block: bool) -> Tensor:
        found = whole(tensor, self.layouts[name], self.grid) if is_block else tensor.detach().clone()
        return found.cpu()

    # ------------------------------------------------------------------------------------------------------- loading

    def load_whole_model(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's blocks from tensors without cuts.

        Raises:
            ValueError: If names or shapes differ; lists the differences.
        """
        own = self.module.state_dict()
        self._compare({name: tuple(tensor.shape) for name, tensor in state.items()})
        for name, tensor in own.items():
            if name in self.layouts:
                fill(tensor, state[name], self.layouts[name], self.grid)
            else:
                tensor.copy_(state[name])

    def _compare(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        own = {
            name: self.layouts[name].sizes if name in self.layouts else tuple(tensor.shape)
            for name, tensor in self.module.state_dict().items()
        }
        check_sizes(own, sizes)

    def load_whole_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Take this rank's blocks of an optimizer's state without cuts, as `whole_optimizer` gives it."""
        order = self.order(optimizer)
        local = {}
        for index, values in state["state"].items():
            name = order[int(index)]
            local[int(index)] = {key: self._cut(name, key, value) for key, value in values.items()}
        optimizer.load_state_dict({"state": local, "param_groups": state["param_groups"]})

    def _cut(self, name: str, key: str, value: Any) -> Any:
        layout = self.layouts.get(name)
        if not isinstance(value, Tensor) or layout is None or tuple(value.shape) != layout.sizes or key == "step":
            return value
        mine = torch.zeros_like(self.module.get_parameter(name), memory_format=torch.contiguous_format)
        fill(mine, value, layout, self.grid)
        return mine.detach()

    def load_parts(self, folder: Path, with_model: bool) -> None:
        """Read this rank's blocks of the model.

        Raises:
            ValueError: If the folder holds another architecture; lists the differences.
        """
        self._compare(model_sizes(folder))
        if with_model:
            state = self.module.state_dict()
            parts = {f"{MODEL}.{name}": self._part(name, value, name in self.layouts) for name, value in state.items()}
            read_parts(parts, folder)

    def load_optimizer_parts(
        self, number: int, optimizer: torch.optim.Optimizer, plain: Mapping[str, Any], folder: Path
    ) -> None:
        """Read this rank's blocks of an optimizer's state."""
        sizes, order = stored_sizes(folder), self.order(optimizer)
        if set(order) != set(plain["order"]):
            raise ValueError("the checkpoint is of an optimizer over other parameters")
        state: dict[int, dict[str, Any]] = {}
        parts: dict[str, Any] = {}
        for index, name in enumerate(order):
            prefix = f"optimizer_{number}.{name}."
            values = dict(plain["values"].get(name, {}))
            for full in (full for full in sizes if full.startswith(prefix) and "." not in full[len(prefix) :]):
                parameter = self.module.get_parameter(name)
                is_block = name in self.layouts and tuple(sizes[full]) == self.layouts[name].sizes and sizes[full] != ()
                if is_block:
                    value: Tensor = torch.zeros_like(parameter, memory_format=torch.contiguous_format).detach()
                else:
                    value = torch.zeros(sizes[full], dtype=stored_types(folder)[full])
                parts[full] = self._part(name, value, is_block)
                values[full[len(prefix) :]] = value
            if values:
                state[index] = values
        read_parts(parts, folder)
        optimizer.load_state_dict({"state": state, "param_groups": _renumbered(plain, order)})


def _renumbered(plain: Mapping[str, Any], order: list[str]) -> list[dict[str, Any]]:
    """Groups of the checkpoint with the numbers that this run's optimizer gives to the parameters."""
    numbers = {name: index for index, name in enumerate(order)}
    return [
        group | {"params": [numbers[plain["order"][index]] for index in group["params"]]}
        for group in plain["param_groups"]
    ]


def write_parts(parts: dict[str, Any], folder: Path) -> None:
    """Write what all ranks hold; a collective call."""
    dcp.save(parts, storage_writer=dcp.FileSystemWriter(str(folder)), planner=BlockSavePlanner(), no_dist=alone())


def folders(file: Path) -> list[Path]:
    """Folders that were written for a checkpoint of this name."""
    return sorted(file.parent.glob(f"{file.name}.{SHARDS}-*"))


def remove(file: Path, but: Path | None = None) -> None:
    """Remove the folders of a checkpoint, or all but one."""
    for folder in folders(file):
        if folder != but:
            shutil.rmtree(folder, ignore_errors=True)


def write_file(content: Mapping[str, Any], file: Path) -> None:
    """Write a file at once: it is there as it was or as it shall be, never half."""
    beside = file.with_name(file.name + ".part")
    torch.save(dict(content), beside)
    os.replace(beside, file)


def read_whole(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint with all tensors whole, as any other strategy would have saved it; in one process.

    Args:
        path: File that strategy=jigsaw saved; one that is whole already is returned as it is.
    """
    path = Path(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    if SHARDS not in content:
        return content
    folder = folder_of(path, content)
    types, tensors = stored_types(folder), {}
    for name, size in stored_sizes(folder).items():
        tensors[name] = torch.zeros(size, dtype=types[name])
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(str(folder)), no_dist=True)
    del content[SHARDS]
    content["state_dict"] = {name: tensors[f"{MODEL}.{name}"] for name in model_sizes(folder)}
    found = []
    for number, plain in enumerate(content.get("optimizer_states", [])):
        state: dict[int, dict[str, Any]] = {}
        for index, name in enumerate(plain["order"]):
            prefix = f"optimizer_{number}.{name}."
            values = plain["values"].get(name, {}) | {
                full[len(prefix) :]: tensor
                for full, tensor in tensors.items()
                if full.startswith(prefix) and "." not in full[len(prefix) :]
            }
            if values:
                state[index] = values
        found.append({"state": state, "param_groups": plain["param_groups"]})
    if "optimizer_states" in content:
        content["optimizer_states"] = found
    return content


def export_checkpoint(source: str | Path, target: str | Path) -> None:
    """Write a checkpoint that lies in parts as one file, which every strategy loads (``ckpt_path=TARGET``)."""
    write_file(read_whole(source), Path(target))
