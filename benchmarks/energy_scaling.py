"""Training steps of the networks of the scaling study, one thread: ResNet-50 on small images and the small AFNO.

A step is a forward pass, the loss, a backward pass and an update (SGD with momentum, Adam). The design study measured
80 ms per sample with ResNet-50 at 32 x 32 pixels, that is 1.3 s for 16, and 149 ms with the AFNO, on a loaded core.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import compare, single_thread, time_rows
from benchmarks.record import Result
from networks.afno import AFNONet
from networks.resnet import ResNet

CLAIM: str = (
    "A step of ResNet-50 on 16 images of 32 x 32 pixels takes about 1.3 s on one core, one of the small AFNO 149 ms."
)

IMAGES, PIXELS = 16, 32
SAMPLES, CHANNELS, HEIGHT, WIDTH = 8, 4, 32, 64
RESNET_S, AFNO_S = 1.3, 0.149


def _step(
    net: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor], x: Tensor
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(net(x)).backward()
        optimizer.step()

    return step


def resnet_step() -> Callable[[], None]:
    """One step of ResNet-50 with 1,000 classes, settings of the paper."""
    torch.manual_seed(0)
    net = ResNet(50)
    optimizer = torch.optim.SGD(net.parameters(), 0.1 * IMAGES / 256, momentum=0.9, weight_decay=1e-4)
    label = torch.randint(1000, (IMAGES,))
    return _step(net, optimizer, lambda y: F.cross_entropy(y, label), torch.randn(IMAGES, 3, PIXELS, PIXELS))


def afno_step() -> Callable[[], None]:
    """One step of the AFNO of ``model=afno``: patches of 4 x 4, four blocks of 64 channels."""
    torch.manual_seed(0)
    net = AFNONet(HEIGHT, WIDTH, CHANNELS, patch_size=4, dim=64, depth=4)
    optimizer = torch.optim.Adam(net.parameters(), 5e-4)
    x, target = torch.randn(2, SAMPLES, CHANNELS, HEIGHT, WIDTH)
    return _step(net, optimizer, lambda y: F.mse_loss(y, target), x)


def run(repeats: int = 7, calls: int = 2) -> Result:
    """Time a step of each."""
    resnet, afno = (
        f"ResNet-50, {IMAGES} images of {PIXELS} x {PIXELS}",
        f"AFNO, {SAMPLES} x {CHANNELS} x {HEIGHT} x {WIDTH}",
    )
    with single_thread():
        rows = time_rows(
            f"a training step of {resnet}",
            compare({"Wattlight": resnet_step()}, repeats=repeats, calls=calls),
            unit="s",
            paper=f"{RESNET_S} s",
            at_most=RESNET_S,
        )
        rows += time_rows(
            f"a training step of {afno}",
            compare({"Wattlight": afno_step()}, repeats=repeats, calls=3 * calls),
            unit="ms",
            paper=f"{1e3 * AFNO_S:.0f} ms",
            at_most=1e3 * AFNO_S,
        )
    return Result(rows, settings={"threads": 1, "repeats": repeats, "calls": calls})
