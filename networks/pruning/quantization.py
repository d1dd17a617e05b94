"""Dynamic quantisation to 8 bits: the cheaper way to a small file, as a column beside pruning."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from networks.pruning.weights import remove_masks


def quantized(network: nn.Module) -> nn.Module:
    """A copy whose linear layers hold their weights as int8 and quantise their inputs on the fly, for CPUs.

    Layers without a forward pass of their own (torch's attention) and convolutions stay as they are.
    """
    plain = copy.deepcopy(network).cpu().eval()
    remove_masks(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that the function will move to torchao
        return torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
