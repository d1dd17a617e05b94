"""Scores of single weights, and the masks that keep the best of them (pruning study, sections 2.1 and 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from networks.pruning.weights import Masks, PrunableWeight

Method = Literal["l1", "random", "taylor", "wanda"]
Scope = Literal["global", "layer", "row", "2:4"]
Batch = Mapping[str, Tensor]


def scores(
    method: Method,
    weights: Sequence[PrunableWeight],
    generator: torch.Generator | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    input_norms: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Score of every entry of S by name, higher is kept.

    Args:
        method: ``l1``: abs(w). ``random``: uniform. ``taylor``: abs(w dL/dw), the change of the loss to first order.
            ``wanda``: abs(w) times the norm of the input that it multiplies.
        weights: S.
        generator: Of ``random``.
        gradients: For ``taylor``, by name; see `loss_gradients`.
        input_norms: For ``wanda``, by name; see `norms_of_inputs`.

    Raises:
        ValueError: The method is unknown, or a weight has no input norm.
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(get_args(Method))}")
    found = {}
    for weight in weights:
        if method == "random":
            drawn = torch.rand(weight.mask.shape, generator=generator, device="cpu")
            found[weight.name] = drawn.to(weight.tensor.device)
        elif method == "taylor":
            product = weight.tensor.detach() * gradients[weight.name]
            found[weight.name] = (product.sum(-1) if weight.paired else product).abs()
        elif method == "wanda":
            if weight.name not in input_norms:
                raise ValueError(
                    f"method='wanda' needs the inputs of {weight.name}, which is no linear layer or convolution with a "
                    "forward pass of its own; choose l1 or taylor"
                )
            norm = input_norms[weight.name]
            found[weight.name] = weight.magnitude() * norm.view(-1, *[1] * (weight.tensor.ndim - 2))
        else:
            found[weight.name] = weight.magnitude()
    return found


def loss_gradients(
    network: nn.Module, weights: Sequence[PrunableWeight], batches: Iterable[Batch], loss: Callable[[Batch], Tensor]
) -> dict[str, Tensor]:
    """Gradient of the mean loss of some batches by every weight of S; the network's own gradients are cleared."""
    network.zero_grad(set_to_none=True)
    number = 0
    with torch.enable_grad():
        for batch in batches:
            loss(batch).backward()
            number += 1
    found = {}
    for weight in weights:
        gradient = weight.tensor.grad
        found[weight.name] = torch.zeros_like(weight.tensor) if gradient is None else gradient / max(number, 1)
    network.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def norms_of_inputs(
    network: nn.Module, weights: Sequence[PrunableWeight], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """Root of the sum of squares of every input of the linear layers and convolutions of S, over some batches."""
    sums: dict[str, Tensor] = {}

    def listen(weight: PrunableWeight) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            axis = 1 if isinstance(module, nn.Conv1d) else -1
            squares = inputs[0].detach().float().square().movedim(axis, -1).flatten(0, -2).sum(0)
            sums[weight.name] = sums.get(weight.name, 0) + squares

        return hook

    layers = [weight for weight in weights if isinstance(weight.module, nn.Linear | nn.Conv1d)]
    handles = [weight.module.register_forward_pre_hook(listen(weight)) for weight in layers]
    try:
        for batch in batches:
            network(batch)
    finally:
        for handle in handles:
            handle.remove()
    # A layer that nothing calls (FEDformer's unused projections) has seen no input: nothing of it is needed.
    zero = {weight.name: weight.tensor.new_zeros(weight.tensor.shape[1]) for weight in layers}
    return zero | {name: total.sqrt() for name, total in sums.items()}


# ---------------------------------------------------------------------------------------------------------------- masks


def num_kept(density: float, total: int) -> int:
    """How many of them stay: ``round(density * total)``.

    Raises:
        ValueError: The density does not lie in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density} must lie in (0, 1]: the part of the prunable weights that stays")
    return round(density * total)


def masks_for(
    weights: Sequence[PrunableWeight],
    values: Mapping[str, Tensor],
    density: float,
    scope: Scope = "global",
    kept_reals: int | None = None,
) -> Masks:
    """Keep the entries of the highest scores; what is masked already stays so as long as anything else is left to go.

    Args:
        weights: S.
        values: Scores, by name.
        density: Part of S that stays, in (0, 1].
        scope: ``global``: of all tensors together, exactly ``round(density |S|)`` entries. ``layer``: of every tensor.
            ``row``: of every output. ``2:4``: two of four neighbouring inputs, whatever the scores (density 0.5).
        kept_reals: Real numbers of S that are to stay, in place of ``density``; in ``global`` scope. Complex entries
            are two, so that one number may be missing.

    Raises:
        ValueError: An unknown scope, or a density that it cannot meet.
    """
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r} is unknown; choose one of {', '.join(get_args(Scope))}")
    if scope == "2:4" and abs(density - 0.5) > 1e-9:
        raise ValueError(f"density={density}: scope=2:4 keeps two of four weights, a density of 0.5; choose that")
    ordered = {w.name: values[w.name].masked_fill(~w.mask.to(values[w.name].device), -1.0) for w in weights}
    if scope == "global":
        return _global(weights, ordered, density, kept_reals)
    found = {}
    for weight in weights:
        value = ordered[weight.name]
        if scope == "layer":
            found[weight.name] = _top(value.flatten(), num_kept(density, value.numel())).view_as(value)
        elif scope == "row":
            table = value.flatten(1)
            number = num_kept(density, table.shape[1])
            found[weight.name] = torch.stack([_top(row, number) for row in table]).view_as(value)
        else:
            found[weight.name] = _two_of_four(value)
    return found


def _top(values: Tensor, number: int) -> Tensor:
    """True at the ``number`` highest of (n,), exactly so many also where scores are equal."""
    mask = torch.ones(len(values), dtype=torch.bool, device=values.device)
    if number < len(values):
        # The call that torch.nn.utils.prune makes, so that equal scores are resolved alike.
        mask[values.topk(len(values) - number, largest=False).indices] = False
    return mask


def _global(
    weights: Sequence[PrunableWeight], values: Mapping[str, Tensor], density: float, kept_reals: int | None
) -> Masks:
    flat = torch.cat([values[w.name].flatten().float() for w in weights])
    if kept_reals is None and not any(w.paired for w in weights):
        mask = _top(flat, num_kept(density, len(flat)))
    else:
        reals = torch.cat([torch.full((w.numel,), w.reals) for w in weights])
        kept = num_kept(density, int(reals.sum())) if kept_reals is None else kept_reals
        order = flat.cpu().sort(stable=True).indices
        gone = reals[order].cumsum(0) <= int(reals.sum()) - kept
        mask = torch.ones(len(flat), dtype=torch.bool)
        mask[order[gone]] = False
    parts = mask.to(flat.device).split([w.numel for w in weights])
    return {w.name: part.view_as(w.mask) for w, part in zip(weights, parts, strict=True)}


def _two_of_four(values: Tensor) -> Tensor:
    """Two of every four neighbours along the inputs stay; up to three inputs that are left over stay as well."""
    table = values.flatten(1)
    mask = torch.ones_like(table, dtype=torch.bool)
    whole = table.shape[1] // 4 * 4
    fours = table[:, :whole].unflatten(1, (-1, 4))
    lowest = fours.topk(2, dim=-1, largest=False).indices
    mask[:, :whole] = torch.ones_like(fours, dtype=torch.bool).scatter(-1, lowest, False).flatten(1)
    return mask.view_as(values)


def cubic_density(final: float, progress: float) -> float:
    """Density after a part of a gradual pruning: rho_f + (1 - rho_f)(1 - t)^3 (Zhu and Gupta, 2017)."""
    return final + (1 - final) * (1 - min(max(progress, 0.0), 1.0)) ** 3
