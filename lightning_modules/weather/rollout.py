"""Forecasts of several steps from a network that makes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.weather.blocks import Blocks

Kind = Literal["autoregressive", "latent"]


@dataclass(frozen=True)
class Rollouts:
    """Applies a network as often as a forecast needs.

    Attributes:
        network: Normalised channels after some steps, (B, H, W, V), from an input (B, H, W, V_in) and their number.
        blocks: Which channels of the input are forecast, and which of them this rank has.
        step_input: Whether the last channel of the input tells the length of the coming step.
    """

    network: Callable[..., Tensor]
    blocks: Blocks
    step_input: bool

    def __call__(self, x: Tensor, lengths: Tensor, steps: Sequence[int], kind: Kind) -> list[Tensor]:
        """Forecasts after some numbers of steps.

        Args:
            x: The input, (B, H, W, V_in).
            lengths: Of the steps as the network is told, (B, steps).
            steps: In increasing order.
            kind: ``autoregressive``, every step from the forecast before, or ``latent``, all within the network.
        """
        x, found = self._told(x, lengths[:, 0]), []
        if kind == "latent":
            return [self.network(x, step) for step in steps]
        for step in range(1, steps[-1] + 1):
            output = self.network(x)
            if step in steps:
                found.append(output)
            if step < steps[-1]:
                x = self._advance(x, output, lengths[:, step])
        return found

    def _advance(self, x: Tensor, output: Tensor, step: Tensor) -> Tensor:
        """The input after a step: forecast channels of this rank, then what does not change."""
        own = self.blocks.own_count
        return self._told(torch.cat([output[..., :own], x[..., own:]], -1), step)

    def _told(self, x: Tensor, step: Tensor) -> Tensor:
        """The input with the length of the coming step in the last of its channels, if this rank has that."""
        num_inputs = self.blocks.num_inputs
        own = self.blocks.grid.channels(num_inputs)
        if not self.step_input or num_inputs - 1 not in range(num_inputs)[own]:
            return x
        at = num_inputs - 1 - own.start
        filled = step.to(x)[:, None, None, None].expand(*x.shape[:-1], 1)
        return torch.cat([x[..., :at], filled, x[..., at + 1 :]], -1)
