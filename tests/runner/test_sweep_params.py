"""Swept keys of the command line replace those of the configuration."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from runner.sweep_params import CommandLineWins
from tests import cli

SWEPT = {"callbacks.iterative_pruning.score": "snr,mu", "strategy": "ddp,daso", "model.num_samples": "8,16"}


@pytest.mark.parametrize(
    ("typed", "left"),
    [
        ([], set(SWEPT)),
        (["seed=1,2", "++model.num_samples_of=3"], set(SWEPT)),
        (["++callbacks.iterative_pruning.score=snr,square"], {"strategy", "model.num_samples"}),
        (["strategy=ddp", "++model.num_samples=4"], {"callbacks.iterative_pruning.score"}),
        (["~strategy"], {"callbacks.iterative_pruning.score", "model.num_samples"}),
    ],
)
def test_the_command_line_wins(typed, left):
    config = OmegaConf.create({"hydra": {"sweeper": {"params": SWEPT}, "overrides": {"task": typed}}})
    OmegaConf.set_struct(config, True)
    CommandLineWins().on_multirun_start(config)
    assert set(config.hydra.sweeper.params) == left


def test_a_configuration_without_parameters():
    config = OmegaConf.create({"hydra": {"sweeper": {"params": None}, "overrides": {"task": ["a=1,2"]}}})
    CommandLineWins().on_multirun_start(config)
    assert config.hydra.sweeper.params is None


def test_jobs_are_not_multiplied(tmp_path):
    """Two scores on the command line in place of the five of the experiment: two jobs, not ten."""
    swept = "callbacks.iterative_pruning.score=snr,square"
    done = cli.ok("experiment=bayesian_lottery/digits_mlp", swept, "check=true", "-m", cwd=tmp_path)
    assert done.stdout.count("the configuration is sound") == 2
