"""One step of a study: a dense or already pruned network in, masks or removed channels of a density out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from networks.pruning.budget import Budget, keep_for
from networks.pruning.groups import Allocation, Granularity, Keep, dim_groups
from networks.pruning.unstructured import Scope, loss_gradients, masks_for, norms_of_inputs, num_kept, scores
from networks.pruning.weights import Masks, PrunableWeight, density, prunable_weights

Method = Literal["l1", "random", "taylor", "wanda", "lottery", "structured"]
DensityOf = Literal["prunable", "model"]
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Pruner:
    """How a network is pruned; the arguments are those of `callbacks.pruning.Pruning`.

    Attributes:
        channels: Series of the data, by which output layers are known.

    Raises:
        ValueError: Names the argument.
    """

    method: Method = "l1"
    scope: Scope = "global"
    include_complex: bool = False
    density_of: DensityOf = "prunable"
    exclude_output: bool = True
    granularity: Sequence[Granularity] = ("ff", "qk", "v", "stream")
    allocation: Allocation = "uniform"
    budget: Budget = "parameters"
    seed: int = 0
    channels: int = 1

    def __post_init__(self) -> None:
        for name, kind in (
            ("method", Method),
            ("scope", Scope),
            ("density_of", DensityOf),
            ("allocation", Allocation),
            ("budget", Budget),
        ):
            if getattr(self, name) not in get_args(kind):
                choice = ", ".join(get_args(kind))
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {choice}")
        if wrong := [name for name in self.granularity if name not in get_args(Granularity)]:
            raise ValueError(f"granularity={wrong[0]!r} is unknown; choose among {', '.join(get_args(Granularity))}")
        if self.method == "structured" and not self.granularity:
            raise ValueError("granularity is empty, so nothing could go; name at least one of ff, qk, v, heads, stream")

    @property
    def structured(self) -> bool:
        """Whether channels go, not single weights."""
        return self.method == "structured"

    def check(self, network: nn.Module) -> None:
        """Refuse a network of which nothing can go.

        Raises:
            ValueError: It has no weights of S, no groups, or none of the kinds that are to go.
        """
        if not self.structured:
            self.weights(network)
            return
        try:
            kinds = {group.kind for group in dim_groups(network)}
        except ValueError as error:
            raise ValueError(f"method='structured': {error}") from None
        if not kinds & {kind.replace("heads", "qk") for kind in self.granularity}:
            raise ValueError(f"granularity={list(self.granularity)}: the network has {', '.join(sorted(kinds))} only")

    def uncovered(self, network: nn.Module) -> float | None:
        """Part of the numbers of a network that no mask reaches; None where its complex kernels are reached too."""
        whole = prunable_weights(network, self.channels, True, self.exclude_output)
        if self.structured or self.include_complex or not any(weight.paired for weight in whole):
            return None
        return 1 - density(network, [weight for weight in whole if not weight.paired]).covered

    def weights(self, network: nn.Module) -> list[PrunableWeight]:
        """The set S of a network."""
        return prunable_weights(network, self.channels, self.include_complex, self.exclude_output)

    def reached(self, network: nn.Module, rho: float) -> bool:
        """Whether the masks of a network leave a density, or less."""
        found = density(network, self.weights(network))
        return (found.model if self.density_of == "model" else found.prunable) <= rho + 1e-3

    def masks(
        self, network: nn.Module, rho: float, batches: Callable[[], Iterable[Batch]], loss: Callable[[Batch], Tensor]
    ) -> Masks:
        """Masks of single weights.

        Args:
            network: With masks perhaps; what is gone stays so.
            rho: Density.
            batches: Gives training batches, for ``taylor`` and ``wanda``.
            loss: Of a batch, for ``taylor``.

        Raises:
            ValueError: The density cannot be reached.
        """
        weights, method = self.weights(network), "l1" if self.method == "lottery" else self.method
        gradients = norms = None
        training = network.training
        network.eval()
        if method == "taylor":
            gradients = loss_gradients(network, weights, batches(), loss)
        elif method == "wanda":
            norms = norms_of_inputs(network, weights, batches())
        network.train(training)
        values = scores(method, weights, torch.Generator().manual_seed(self.seed), gradients, norms)
        kept = None
        if self.density_of == "model":
            found = density(network, weights)
            kept = num_kept(rho, found.total) - (found.total - round(found.covered * found.total))
            if kept < 1:
                raise ValueError(
                    f"densities: {rho:.3g} of the model is out of reach, {1 - found.covered:.1%} of it is not pruned; "
                    "choose density_of=prunable, or include_complex=true"
                )
        return masks_for(weights, values, rho, self.scope, kept)

    def keep(self, network: nn.Module, part: float, batch: Batch) -> Keep:
        """Channels that stay, of a part of the cost of this network."""
        return keep_for(network, part, self.budget, self.granularity, self.allocation, batch)
