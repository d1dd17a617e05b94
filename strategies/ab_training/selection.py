"""Which weights of a module AB-training factorises, and what it cannot train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter

from networks.ab_factors import ABFactor
from networks.low_rank import factored_weights
from networks.tall_view import tall_shape

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Candidate(NamedTuple):
    """A weight that could be factorised.

    Attributes:
        path: Of the parameter.
        layer: Path of the layer that computes with it.
        plain: Name of the weight in the plain network; another one than ``path`` where a callback has made the weight
            low-rank, of which the square matrix is trained.
        owner: Module that holds the parameter.
        name: Of the parameter there.
    """

    path: str
    layer: str
    plain: str
    owner: nn.Module
    name: str

    def matches(self, pattern: str) -> bool:
        """Whether a pattern means this weight or its layer."""
        return any(fnmatchcase(name, pattern) for name in (self.path, self.layer, self.plain))


def select(
    module: nn.Module, keep_full: Sequence[str] | None, min_dim: int, factor_embeddings: bool = False
) -> list[ABFactor]:
    """The weights to factorise, in the order of registration.

    Args:
        module: Any module; linear and convolutional layers and attention count as layers. Of weights that are low-rank
            already (`networks.low_rank`) it is the trained matrix Sigma.
        keep_full: Names of layers or of their weights that stay whole, ``*`` and ``?`` match anything; None: the first
            and the last layer.
        min_dim: Weights with a shorter side of their tall view below this stay whole.
        factor_embeddings: Whether embeddings count as layers.

    Raises:
        ValueError: If a name matches nothing, nothing is left (unless weights are low-rank already: every Sigma may
            have become small since the training began), a selected weight belongs to two modules, or an embedding has
            sparse gradients.
    """
    found = list(_candidates(module, factor_embeddings))
    _refuse_sparse(module)
    if keep_full is None:
        whole = {found[0].path, found[-1].path} if found else set()
    else:
        whole = {candidate.path for candidate in found if any(map(candidate.matches, keep_full))}
        for pattern in keep_full:
            if not any(candidate.matches(pattern) for candidate in found):
                known = ", ".join(candidate.layer for candidate in found)
                raise ValueError(f"strategy.keep_full names {pattern!r}, which matches no layer; there are: {known}")
    if not found:
        raise ValueError(f"nothing can be factorised: {_strange_owners(module)}; use strategy=ddp, daso or local_sgd")
    layers = [
        ABFactor(c.owner, c.name, c.path)
        for c in found
        if c.path not in whole and min(tall_shape(c.owner._parameters[c.name].shape)) >= min_dim
    ]
    if not layers and not any(True for _ in factored_weights(module)):
        raise ValueError(
            f"nothing is left to factorise: of {len(found)} layers {len(whole)} are kept whole (strategy.keep_full) "
            f"and the others have a side shorter than strategy.min_dim={min_dim}; lower it, or use strategy=ddp"
        )
    _refuse_tied(module, layers)
    return layers


def _candidates(module: nn.Module, factor_embeddings: bool) -> Iterator[Candidate]:
    low_rank = list(factored_weights(module))
    for path, owner in module.named_modules():
        names: tuple[str, ...] = ()
        if isinstance(owner, _LAYERS) or (factor_embeddings and isinstance(owner, nn.Embedding)):
            names = ("weight",)
        elif isinstance(owner, nn.MultiheadAttention):
            names = _OF_ATTENTION
        for name in names:
            weight = owner._parameters.get(name)  # a parametrised weight is no parameter of its module
            if weight is None or isinstance(weight, UninitializedParameter) or not weight.requires_grad:
                continue
            plain = f"{path}.{name}" if path else name
            yield Candidate(plain, path, plain, owner, name)
        if isinstance(owner, nn.Embedding) and not factor_embeddings:
            continue
        for weight in low_rank:
            if weight.module is owner and weight.sigma.requires_grad:
                yield Candidate(weight.sigma_path, path, weight.name, *weight.sigma_place)


def _strange_owners(module: nn.Module) -> str:
    """Who has the matrices of a network without any layer that could be factorised."""
    kinds = sorted(
        {
            type(owner).__name__
            for owner in module.modules()
            for p in owner.parameters(recurse=False)
            if p.requires_grad and not isinstance(p, UninitializedParameter) and p.dim() > 1
        }
    )
    if not kinds:
        return "no trainable weight has two axes"
    return (
        f"the weights of {', '.join(kinds)} are none of linear, convolutional or attention layers (a distribution of "
        "weights, as Bayesian layers have, is no matrix with factors)"
    )


def _refuse_tied(module: nn.Module, layers: list[ABFactor]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for layer in layers:
        if len(names := owners[id(layer.weight)]) > 1:
            raise ValueError(
                f"{' and '.join(names)} are one weight, which cannot be factored in one place only: add it to "
                "strategy.keep_full"
            )


def _refuse_sparse(module: nn.Module) -> None:
    for path, owner in module.named_modules():
        if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and owner.sparse:
            raise ValueError(f"{path} has sparse gradients, which cannot be averaged over groups: set sparse=False")
