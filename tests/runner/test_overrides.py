"""The command line before Hydra sees it."""

from __future__ import annotations

import pytest

from runner.overrides import prepare


def test_values_of_groups_become_add_or_change():
    kept, mistakes = prepare(["run.py", "experiment=recycle", "model.optimizer.lr=1", "seed=3", "trainer=cpu"])
    assert kept == ["run.py", "experiment=recycle", "++model.optimizer.lr=1", "seed=3", "trainer=cpu"]
    assert not mistakes


@pytest.mark.parametrize(
    "argument", ["+model.x=1", "++model.x=1", "~model.x", "--cfg=job", "-m", "hydra.run.dir=/x", "launch.retries=2"]
)
def test_left_alone(argument):
    assert prepare(["run.py", argument]) == (["run.py", argument], [])


@pytest.mark.parametrize("argument", ["data/part=x", "logger@other=csv", "hydra/launcher=joblib", "model=mlp"])
def test_choices_of_options_are_left_alone(argument):
    assert prepare(["run.py", argument]) == (["run.py", argument], [])


def test_unknown_keys_are_taken_out_with_a_suggestion():
    kept, mistakes = prepare(["run.py", "sed=3", "experimnt=recycle", "trainer.devices=2"])
    assert kept == ["run.py", "++trainer.devices=2"]
    assert mistakes == [
        "sed: no such key or group. Did you mean 'seed'?",
        "experimnt: no such key or group. Did you mean 'experiment'?",
    ]


@pytest.mark.parametrize("flag", ["--cfg", "--help", "-c", "--info"])
def test_where_nothing_runs_a_mistake_is_said_at_once(flag, capsys):
    with pytest.raises(SystemExit) as end:
        prepare(["run.py", "sed=3", flag, "job"])
    assert end.value.code == 2 and "Did you mean 'seed'?" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--config-dir", "{}"], ["--config-dir={}"], ["-cd", "{}"]])
def test_groups_of_a_user_are_known(tmp_path, flags):
    (tmp_path / "augmentation").mkdir()
    arguments = [flag.format(tmp_path) for flag in flags]
    assert prepare(["run.py", *arguments, "augmentation=crop"]) == (["run.py", *arguments, "augmentation=crop"], [])
    assert prepare(["run.py", "augmentation=crop"])[1]


def test_the_folder_of_a_run_is_that_of_hydra():
    """Else ``.hydra`` lies elsewhere, and ``resume=DIR``, which the run prints at its end, finds no run."""
    kept, mistakes = prepare(["run.py", "experiment=x", "run.dir=/a/b", "seed=1"])
    assert kept == ["run.py", "experiment=x", "hydra.run.dir=/a/b", "hydra.sweep.dir=/a/b", "seed=1"]
    assert not mistakes
