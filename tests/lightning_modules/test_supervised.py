"""What supervised modules share: means of training that a restart does not change."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_modules.supervised import Supervised
from strategies.sampling_parallel import SamplingParallel
from tests.strategies import nets


class Mean(Supervised):
    """A regression whose training loss and bias are logged."""

    def __init__(self, interval="epoch"):
        super().__init__(nets.network(), lambda p: torch.optim.SGD(p, 0.05), None, "val/loss", interval)

    def training_step(self, batch, batch_idx):
        x, y = batch
        error = self.net(x) - y
        self._add_to_epoch("loss", error.detach().square().sum(), error.numel())
        self._add_to_epoch("bias", error.detach().sum(), error.numel())
        return error.square().mean()


class Save(nets.pl.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def restarted(folder, step, epochs):
    strategy = "ddp" if dist.is_initialized() else "auto"
    path = f"{folder}/{step}.ckpt"
    _, whole = nets.fit(strategy, folder, module=Mean(), epochs=epochs, callbacks=(Save(step, path),))
    _, again = nets.fit(strategy, folder, module=Mean(), epochs=epochs, ckpt_path=path)
    torch.load(path, weights_only=True)
    return [{k: float(v) for k, v in t.callback_metrics.items() if k.startswith("train/")} for t in (whole, again)]


@pytest.mark.parametrize("step", [11, 15, 16])
def test_means_of_an_epoch_do_not_notice_a_restart(tmp_path, step):
    """In the middle of the second epoch, before its last step, and at its end."""
    whole, again = restarted(str(tmp_path), step, 3 if step == 16 else 2)
    assert whole.keys() == {"train/loss", "train/bias"}
    assert whole == again


def test_nor_do_they_on_two_ranks(ranks2, tmp_path):
    for whole, again in ranks2(restarted, str(tmp_path), 11, 2):
        assert whole == again


def saved(folder):
    nets.fit("ddp", folder, module=Mean(), epochs=2, callbacks=(Save(11, f"{folder}/x.ckpt"),))


def test_other_ranks_go_on_with_the_sums_of_all(ranks2, tmp_path):
    ranks2(saved, str(tmp_path))
    _, again = nets.fit("auto", str(tmp_path), module=Mean(), epochs=2, ckpt_path=f"{tmp_path}/x.ckpt", devices=1)
    _, whole = nets.fit("auto", str(tmp_path), module=Mean(), epochs=2, devices=1)
    for name in ("train/loss", "train/bias"):
        torch.testing.assert_close(again.callback_metrics[name], whole.callback_metrics[name], atol=1e-9, rtol=0)


def saved_by_copies(folder):
    nets.fit(SamplingParallel(2), folder, module=Mean(), epochs=2, callbacks=(Save(11, f"{folder}/c.ckpt"),))


def other_mesh(folder):
    _, again = nets.fit(SamplingParallel(1), folder, module=Mean(), epochs=2, ckpt_path=f"{folder}/c.ckpt")
    return {name: float(again.callback_metrics[name]) for name in ("train/loss", "train/bias")}


def test_ranks_that_saw_the_same_items_do_not_count_them_twice_afterwards(ranks2, tmp_path):
    ranks2(saved_by_copies, str(tmp_path))
    _, whole = nets.fit("auto", str(tmp_path), module=Mean(), epochs=2, devices=1)
    _, again = nets.fit("auto", str(tmp_path), module=Mean(), epochs=2, ckpt_path=f"{tmp_path}/c.ckpt", devices=1)
    alone = {name: float(again.callback_metrics[name]) for name in ("train/loss", "train/bias")}
    for found in [alone, *ranks2(other_mesh, str(tmp_path))]:
        for name, value in found.items():
            assert value == pytest.approx(float(whole.callback_metrics[name]), abs=1e-9)


def test_an_unknown_interval_is_refused():
    with pytest.raises(ValueError, match=r"model\.scheduler_interval='batch' is unknown; choose epoch or step"):
        Mean("batch")


def test_settings_that_make_no_optimizer_are_refused():
    """What is left of model.optimizer with optimizer=none."""
    with pytest.raises(ValueError, match=r"model\.optimizer=\{'lr': 0\.1\} makes no optimizer .*optimizer=adamw"):
        Supervised(torch.nn.Linear(1, 1), {"lr": 0.1}, None, "val/loss", "epoch")


def test_frozen_parameters_are_not_given_to_the_optimizer():
    module = Mean()
    module.net[0].requires_grad_(False)
    given = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert given == {id(p) for p in module.net[2].parameters()}
