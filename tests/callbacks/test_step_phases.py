from __future__ import annotations

import time

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from callbacks.run_record import RunRecord
from callbacks.step_phases import PHASES, StepPhases

LOADING, FORWARD, BACKWARD, UPDATE = 0.004, 0.012, 0.02, 0.008
TRANSFER = 0.016


class Slow(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        time.sleep(LOADING)
        return torch.ones(3)


class SlowSGD(torch.optim.SGD):
    def step(self, closure=None):
        loss = closure()
        time.sleep(UPDATE)
        return loss


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        time.sleep(TRANSFER)
        return batch

    def training_step(self, batch, batch_idx):
        time.sleep(FORWARD)
        loss = self.net(batch).sum()
        loss.register_hook(lambda _: time.sleep(BACKWARD))
        return loss

    def validation_step(self, batch, batch_idx):
        time.sleep(0.2)  # counts nowhere

    def configure_optimizers(self):
        return SlowSGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    record, phases = RunRecord(str(folder / "results.json"), {}), StepPhases()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[record, phases], num_sanity_val_steps=0, val_check_interval=6,
    )  # fmt: skip
    begin = time.perf_counter()
    trainer.fit(Module(), DataLoader(Slow(), 1), DataLoader(Slow(), 12))
    return record.record["phases"], time.perf_counter() - begin, trainer


def test_every_phase_has_the_time_that_was_spent_in_it(run):
    means, _, _ = run
    assert tuple(means) == PHASES
    slept = dict(zip(PHASES, (LOADING, TRANSFER, FORWARD, BACKWARD, UPDATE), strict=True))
    assert all(means[phase] >= seconds for phase, seconds in slept.items())
    assert sorted(means, key=means.get) == sorted(slept, key=slept.get), "what others on the machine add is less"


def test_evaluations_count_nowhere(run):
    means, wall, _ = run
    assert 24 * sum(means.values()) < wall - 4 * 0.2


def test_the_strategy_is_left_as_it_was(run):
    assert "batch_to_device" not in vars(run[2].strategy)


def test_means_go_on_where_a_run_was_killed():
    before, after = StepPhases(), StepPhases()
    before._sums, before._counted = {"forward": 3.0}, 6
    after.load_state_dict(before.state_dict())
    assert (after._sums, after._counted) == ({"forward": 3.0}, 6)
