"""The Fourier layer of FourCastNet as one real matrix product, against its equations written out in eight sums.

The published layer multiplies real and imaginary parts by real and imaginary weights one by one, on slices of the
spectrum; ours multiplies [re | im] by a 2 x 2 matrix of blocks. The same weights, the same results (tested to 1e-12),
forward and backward, one thread. Ratios are those of CPU time. The design study measured 6.2 on 16 x 16 tokens of 64
channels and 1.26 on 32 x 32 of 256, best of six on a busy machine.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import compare, ratio_row, single_thread, time_rows
from benchmarks.record import Result
from networks.afno import AFNOFilter

CLAIM: str = (
    "Forward and backward passes of the AFNO layer are at least 1.2 times as fast as with sums over real parts."
)

SIZES = ((16, 16, 64), (32, 32, 256))
PAPER = {64: "6.2", 256: "1.26"}


def sums(layer: AFNOFilter, x: Tensor) -> Tensor:
    """The layer as published, with the weights of ours; all frequencies of a square grid."""
    batch, h, w, dim = x.shape
    k = layer.num_blocks
    z = torch.fft.rfft2(x, dim=(1, 2), norm="ortho").reshape(batch, h, w // 2 + 1, k, dim // k)
    o1r, o1i, o2r, o2i = (torch.zeros(z.shape) for _ in range(4))
    kept = slice(0, h // 2 + 1)
    at = (slice(None), slice(None), kept)

    def times(a: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("...bi,bio->...bo", a, weight)

    w1, b1, w2, b2 = layer.w1, layer.b1, layer.w2, layer.b2
    o1r[at] = F.relu(times(z[at].real, w1[0]) - times(z[at].imag, w1[1]) + b1[0])
    o1i[at] = F.relu(times(z[at].imag, w1[0]) + times(z[at].real, w1[1]) + b1[1])
    o2r[at] = times(o1r[at], w2[0]) - times(o1i[at], w2[1]) + b2[0]
    o2i[at] = times(o1i[at], w2[0]) + times(o1r[at], w2[1]) + b2[1]
    out = F.softshrink(torch.stack([o2r, o2i], dim=-1), layer.shrinkage)
    spectrum = torch.view_as_complex(out).reshape(batch, h, w // 2 + 1, dim)
    return torch.fft.irfft2(spectrum, s=(h, w), dim=(1, 2), norm="ortho") + x


def run(repeats: int = 9, calls: int = 3, batch: int = 4) -> Result:
    """Time both."""
    rows = []
    for h, w, dim in SIZES:
        torch.manual_seed(0)
        layer, x = AFNOFilter(dim, 8), torch.randn(batch, h, w, dim, requires_grad=True)
        variants = {
            "sums": lambda layer=layer, x=x: sums(layer, x).sum().backward(),
            "Wattlight": lambda layer=layer, x=x: layer(x).sum().backward(),
        }
        what = f"forward and backward, {h} x {w} tokens of {dim}"
        with single_thread():
            timings = compare(variants, repeats=repeats, calls=calls)
        rows += time_rows(what, timings, unit="ms")
        rows.append(ratio_row(what, timings, "sums", "Wattlight", paper=PAPER[dim], at_least=1.2))
    return Result(rows, settings={"batch": batch, "threads": 1, "repeats": repeats, "calls": calls})
