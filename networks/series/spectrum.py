"""Fourier transform over time and complex weights, safe in reduced precision.

Half precision is raised to single: there is no bfloat16 FFT or complex number, and float16 takes powers of two only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spectrum_of(series: Tensor) -> Tensor:
    """Real FFT over time: (batch, time, ...) -> complex (batch, time // 2 + 1, ...)."""
    return torch.fft.rfft(_at_least_single(series), dim=1)


def complex_weights(pairs: Tensor) -> Tensor:
    """Complex view (...) of pairs (..., 2) of real and imaginary parts."""
    return torch.view_as_complex(_at_least_single(pairs))


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
