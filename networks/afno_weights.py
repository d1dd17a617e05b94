"""Published weights of FourCastNet's network under the names that `networks.afno` has.

``python -m networks.afno_weights FROM TO [--compat nvlabs]`` writes a file for ``model.weights`` of ``model=afno``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

import torch
from torch import Tensor

_NAMES = {
    r"patch_embed\.proj\.(weight|bias)": r"patch_embedding.\1",
    r"pos_embed": "position",
    r"blocks\.(\d+)\.norm([12])\.(weight|bias)": r"blocks.\1.norm\2.\3",
    r"blocks\.(\d+)\.filter\.([wb][12])": r"blocks.\1.filter.\2",
    r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)": r"blocks.\1.mlp.0.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)": r"blocks.\1.mlp.2.\2",
    r"norm\.(weight|bias)": r"norm.\1",  # of a layer that is in no forward pass
    r"head\.weight": "head.weight",
}
_WRAPPED = "module."  # what DistributedDataParallel puts in front


def from_published(state: Mapping[str, Tensor], grid: tuple[int, int], compat: str | None = None) -> dict[str, Tensor]:
    """State of an `networks.afno.AFNONet` from that of the published network.

    The rows of the head are in the same order, (row, column, channel) of a patch with the channel fastest, and the
    filters have the same shapes: names change, and the position embedding gets its grid.

    Args:
        state: By published name, with or without ``module.`` in front.
        grid: h, w: tokens along latitude and longitude.
        compat: Of the network that is to have the weights; ``nvlabs`` keeps the norm that nothing uses.

    Raises:
        ValueError: For a name that the published network does not have, or another number of tokens.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix(_WRAPPED)
        for pattern, ours in _NAMES.items():
            if match := re.fullmatch(pattern, name):
                if ours.startswith("norm.") and compat != "nvlabs":
                    break
                found[match.expand(ours)] = value
                break
        else:
            raise ValueError(f"{key} is no parameter of the published AFNO network")
    tokens, (h, w) = found["position"], grid
    if tokens.shape[1] != h * w:
        raise ValueError(f"pos_embed has {tokens.shape[1]} tokens, not {h} x {w}: give the grid of the file")
    found["position"] = tokens.reshape(1, h, w, -1)
    return found


def published_grid(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """h, w of a network on a grid of 2:1, without the south pole."""
    tokens = next(value for key, value in state.items() if key.removeprefix(_WRAPPED) == "pos_embed").shape[1]
    h = round((tokens / 2) ** 0.5)
    if 2 * h * h != tokens:
        raise ValueError(f"pos_embed has {tokens} tokens, no grid of 2:1: give --grid H W")
    return h, 2 * h


def convert(source: str, target: str, compat: str | None = None, grid: tuple[int, int] | None = None) -> None:
    """Write a checkpoint that ``model.weights`` reads.

    Args:
        source: Published file: a state, or a dictionary with it under ``model_state``.
        target: File to write.
        compat: Of the network that will read it.
        grid: See `from_published`; None: of 2:1.

    Raises:
        ValueError: See `from_published`.
    """
    stored = torch.load(source, map_location="cpu", weights_only=True)
    state = stored.get("model_state", stored)
    ours = from_published(state, grid or published_grid(state), compat)
    torch.save({"state_dict": {f"net.net.{name}": value for name, value in ours.items()}}, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m networks.afno_weights", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="published file")
    parser.add_argument("target", help="file to write, for model.weights")
    parser.add_argument("--compat", choices=["nvlabs"], help="as model.net.compat of the network that will read it")
    parser.add_argument("--grid", type=int, nargs=2, metavar=("H", "W"), help="tokens; left out: a grid of 2:1")
    given = parser.parse_args()
    convert(given.source, given.target, given.compat, None if given.grid is None else tuple(given.grid))
    print(f"wrote {given.target}")
