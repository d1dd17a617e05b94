"""Every command that README and docs show exists and composes; every file that they link to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import open_dict

from runner import check, overrides
from tests.composing import ROOT, composed

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What stands for something of the reader's own.
PLACEHOLDERS = ("experiment=x", "experiment=tiny", "experiment=nope", "experiment=NAME", "...", "model.lr")


def commands(document: Path) -> list[str]:
    """Command lines with run.py in fenced blocks, continuation lines joined, comments taken off."""
    found = []
    for block in re.findall(r"```(?:bash|text)?\n(.*?)```", document.read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"^(srun |torchrun |PYTHONPATH=\S+ )?(\.venv/bin/)?(python|srun|torchrun)\b.*\brun\.py ", line):
                found.append(line.split("  #")[0].strip())
    return found


CASES = [(doc, command) for doc in DOCUMENTS for command in commands(doc)]


def test_there_are_commands():
    assert sum(doc.name == "README.md" for doc, _ in CASES) >= 10


@pytest.mark.parametrize(("document", "command"), CASES, ids=lambda v: v.name if isinstance(v, Path) else v[-60:])
def test_command_composes(document, command, monkeypatch):
    arguments = shlex.split(command.split("run.py ", 1)[1])
    if "--help" in arguments or any(a.startswith("resume=") for a in arguments):
        return  # run by tests/test_run.py
    if any(a in PLACEHOLDERS or a.startswith("experiment=glob") for a in arguments):
        return
    if any("optuna" in a for a in arguments):
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    if "hydra=slurm" in arguments:
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    arguments = [a for a in arguments if not a.startswith("-")]
    # A sweep over alternatives: its first job.
    single = [
        a if a.startswith("hydra") or "(" in a or "[" in a else a.split(",")[0]
        for a in arguments
        if not a.startswith("hydra.") and "interval(" not in a
    ]
    argv, unknown = overrides.prepare(["run.py", *single])
    assert not unknown
    config = composed(*argv[1:])
    with open_dict(config):
        config.trainer.accelerator = "cpu"  # no GPU is needed to check the rest
        if config.trainer.devices == "auto":
            config.trainer.devices = 1
        config.trainer.num_nodes = 1
    if any(a in ("logger=tensorboard", "logger=mlflow", "logger=many") for a in arguments):
        return
    check.check(config)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


def test_index_of_papers_names_existing_files():
    text = (ROOT / "docs" / "experiments" / "README.md").read_text()
    named = re.findall(r"`([\w/]+\.(?:py|yaml))`", text)
    assert len(named) >= 6
    assert [name for name in named if not (ROOT / name).is_file()] == []
