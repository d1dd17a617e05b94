from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from datamodules.images import Images
from lightning_modules.classification import Classifier
from lightning_modules.schedules import WarmupCosine
from networks.mlp import MLP
from tests.lightning_modules.tiny_series import quiet_trainer


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def curve(steps: int, rate: float = 0.1, **options) -> list[float]:
    """The rate of every step."""
    sgd = optimizer(rate)
    schedule, seen = WarmupCosine(sgd, **options), []
    for _ in range(steps):
        seen.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    return seen


def test_without_warm_up_it_is_the_cosine_of_torch():
    sgd = optimizer(0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=20, eta_min=0.01)
    expected = []
    for _ in range(20):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        theirs.step()
    assert curve(20, total_epochs=20, min_lr=0.01) == pytest.approx(expected, rel=1e-9)


def test_every_phase_in_closed_form():
    seen = curve(14, total_epochs=3, warmup=1, cooldown=0.5, steps_per_epoch=4, warmup_lr=0.02, min_lr=0.001)
    warm = [0.02 + 0.08 * i / 4 for i in range(4)]
    cosine = [0.001 + 0.099 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert seen == pytest.approx([*warm, *cosine, 0.001, 0.001, 0.001, 0.001], rel=1e-12)


def test_sizes_in_steps():
    options = {"warmup_lr": 0.02, "min_lr": 0.001, "total_epochs": 3, "steps_per_epoch": 4}
    assert curve(12, warmup=4, cooldown=2, unit="steps", **options) == curve(12, warmup=1, cooldown=0.5, **options)


def test_a_small_exponent_of_time_lowers_the_rate_earlier():
    early, plain = curve(10, total_epochs=10, k_decay=0.34), curve(10, total_epochs=10)
    assert early[0] == plain[0] == 0.1
    assert all(a < b for a, b in zip(early[1:], plain[1:], strict=True))
    assert early[4] == pytest.approx(0.05 * (1 + math.cos(math.pi * 0.4**0.34)))


def test_groups_keep_their_own_rates():
    sgd = optimizer(0.1, 0.4)
    schedule = WarmupCosine(sgd, total_epochs=10, warmup=2)
    for _ in range(5):
        sgd.step()
        schedule.step()
    low, high = (group["lr"] for group in sgd.param_groups)
    assert high == pytest.approx(4 * low) and 0 < low < 0.1


def test_it_resumes_exactly():
    options = {"total_epochs": 10, "warmup": 3, "min_lr": 1e-4}
    whole = curve(10, **options)
    sgd = optimizer(0.1)
    schedule = WarmupCosine(sgd, **options)
    for _ in range(4):
        sgd.step()
        schedule.step()
    other = optimizer(0.1)
    resumed = WarmupCosine(other, **options)
    other.load_state_dict(sgd.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    seen = []
    for _ in range(6):
        seen.append(other.param_groups[0]["lr"])
        other.step()
        resumed.step()
    assert seen == whole[4:]


@pytest.mark.parametrize(("total", "warmup", "cooldown"), [(10, 3, 2), (1, 0, 0)])
def test_short_trials_get_a_shorter_warm_up(total, warmup, cooldown):
    match = rf"6 steps of warm-up and 4 of cool-down leave nothing of a training of {total}; they are shortened"
    with pytest.warns(UserWarning, match=match):
        seen = curve(total, total_epochs=total, warmup=6, cooldown=4, min_lr=0.001)
    assert seen == curve(total, total_epochs=total, warmup=warmup, cooldown=cooldown, min_lr=0.001)


class Rates(nn.Module):
    """A network that notes the rate of its optimizer at every training step."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen, self.optimizer = MLP(hidden=[4]), [], None

    def forward(self, image):
        if self.training:
            self.seen.append(self.optimizer.param_groups[0]["lr"])
        return self.net(image)


@pytest.mark.parametrize(
    ("interval", "trainer", "total", "expected_length"),
    [
        ("step", {"max_epochs": 4}, 4, 36),
        ("step", {"max_epochs": 4, "accumulate_grad_batches": 2}, 4, 20),
        ("step", {"max_epochs": -1, "max_steps": 15}, None, 15),
        ("step", {"max_epochs": 4, "max_steps": 15}, 4, 15),
        ("step", {"max_epochs": 2}, 4, 36),
        ("epoch", {"max_epochs": 4}, 4, 4),
    ],
)
def test_the_trainer_tells_how_long_it_is(interval, trainer, total, expected_length):
    """180 images in batches of 20: nine steps of an epoch."""
    data = Images(test_size=360, normalize="none", max_train=200, batch_size=20)
    net = Rates()

    def sgd(parameters):
        net.optimizer = torch.optim.SGD(parameters, lr=0.1)
        return net.optimizer

    schedule = functools.partial(WarmupCosine, total_epochs=total)
    module = Classifier(net, sgd, schedule, scheduler_interval=interval)
    quiet_trainer(limit_val_batches=0, **trainer).fit(module, datamodule=data)
    every = {"step": trainer.get("accumulate_grad_batches", 1), "epoch": 9}[interval]
    seen = [rate for i, rate in enumerate(net.seen) if (i % 9) % every == 0]
    expected = [0.05 * (1 + math.cos(math.pi * i / expected_length)) for i in range(len(seen))]
    assert len(seen) >= min(expected_length, 15) and seen == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"unit": "days"}, r"model\.scheduler\.unit='days' is unknown"),
        ({"warmup": -1}, r"model\.scheduler\.warmup=-1"),
        ({"k_decay": 0}, r"model\.scheduler\.k_decay=0"),
        ({"total_epochs": None}, r"model\.scheduler\.total_epochs=None: set trainer\.max_epochs"),
        ({"total_epochs": -1}, r"model\.scheduler\.total_epochs=-1"),
    ],
)
def test_wrong_values_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        WarmupCosine(optimizer(0.1), **{"total_epochs": 10} | options)
