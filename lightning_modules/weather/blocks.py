"""Blocks of fields: which one a rank has, and what the ranks of an instance make of theirs together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.metrics.weather import zonal_coefficients, zonal_power
from parallel.sharding import JigsawGrid


@dataclass(frozen=True)
class Blocks:
    """How the fields of an instance lie on its ranks: bands of longitudes, groups of channels.

    Attributes:
        grid: Where this rank is, 1 x 1 where there is one rank.
        num_outputs: Channels of a forecast.
        num_inputs: Channels of an input; those of a forecast come first.
        width: Longitudes of a whole field.
    """

    grid: JigsawGrid
    num_outputs: int
    num_inputs: int
    width: int

    @property
    def own(self) -> slice:
        """Which channels of a forecast are this rank's."""
        return self.grid.channels(self.num_outputs, self.num_inputs)

    @property
    def own_count(self) -> int:
        """How many these are."""
        return len(range(self.num_outputs)[self.own])

    @property
    def first_of_instance(self) -> bool:
        """Whether this rank counts the samples of its instance."""
        return self.grid.token == 0 and self.grid.channel == 0

    def all_channels(self, own: Tensor, dim: int = -1) -> Tensor:
        """Values (..., V) of all channels, of which each rank has its own."""
        if self.grid.channel_size == 1:
            return own
        shape = list(own.shape)
        shape[dim] = self.num_outputs
        whole = own.new_zeros(shape)
        whole.movedim(dim, -1)[..., self.own] = own.movedim(dim, -1)
        return self.grid.sum_over_channels(whole)

    def gather(self, block: Tensor) -> Tensor:
        """Whole fields (..., H, W, V) of the blocks (..., H, W, own channels) of an instance."""
        grid = self.grid
        if grid.is_serial:
            return block
        if not len(block):
            return block.new_zeros(0, *block.shape[1:-2], self.width, self.num_outputs)
        padded = grid.pad_channels(block, self.num_outputs, self.num_inputs).contiguous()
        return grid.gather(padded, self.num_outputs, self.num_inputs)

    def zonal_power(self, fields: Tensor, latitude: Tensor) -> Tensor:
        """Zonal power (..., V, M) of whole longitudes, from fields (..., H, W, V) of this rank.

        Args:
            fields: Own bands and channels.
            latitude: Weights, (H,).
        """
        grid = self.grid
        first = grid.longitudes(self.width).start or 0
        coefficients = zonal_coefficients(fields, self.width, first)
        if grid.token_size > 1:
            coefficients = torch.view_as_complex(grid.sum_over_tokens(torch.view_as_real(coefficients).contiguous()))
        return zonal_power(coefficients, latitude, self.width)
