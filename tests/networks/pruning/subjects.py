"""Small forecasters to prune, with parameters that no initialisation makes equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from networks.series.autoformer import Autoformer
from networks.series.crossformer import Crossformer
from networks.series.fedformer import FEDformer
from networks.series.informer import Informer
from networks.series.itransformer import ITransformer
from networks.series.patchtst import PatchTST
from networks.series.transformer import Transformer
from tests.networks.series.contract import CHANNELS, HISTORY, HORIZON

SIZES = {"history_length": HISTORY, "horizon": HORIZON, "d_model": 16, "heads": 4, "feed_forward": 24}
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "transformer": lambda **sizes: Transformer(**SIZES | {"channels": CHANNELS} | sizes),
    "informer": lambda **sizes: Informer(**SIZES | {"channels": CHANNELS} | sizes),
    "autoformer": lambda **sizes: Autoformer(**SIZES | {"channels": CHANNELS} | sizes),
    "fedformer": lambda **sizes: FEDformer(**SIZES | {"channels": CHANNELS, "modes": 6} | sizes),
    "crossformer": lambda **sizes: Crossformer(**SIZES | {"channels": CHANNELS} | sizes),
    "patchtst": lambda **sizes: PatchTST(**SIZES | {"patch_length": 8, "stride": 4} | sizes),
    "itransformer": lambda **sizes: ITransformer(**SIZES | sizes),
}
STUDY = ("transformer", "informer", "autoformer", "fedformer", "crossformer")


def build(name: str, seed: int = 0, **sizes: int) -> nn.Module:
    """A network in evaluation mode whose norms, biases and statistics are random too."""
    torch.manual_seed(seed)
    network = NETWORKS[name](**sizes).eval()
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(0.5 + torch.rand_like(tensor))
    return network
