"""Reads the command line before Hydra, so that a mistyped key becomes one of the mistakes that are reported together.

Hydra stops at the first key that does not exist and advises to append it with ``+``. Here values of the groups are
passed as add-or-change (``++key=value``); `runner.check` then finds those that no target takes, all of them at once and
with suggestions.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from runner.resume import GROUPS
from runner.schema import Config
from runner.signatures import hint

FIELDS = {field.name for field in dataclasses.fields(Config)}
# Nodes that hold constructor arguments: any key may be written, signatures decide.
OPEN = {field.name for field in dataclasses.fields(Config) if str(field.type).startswith("dict")}
# Flags after which nothing is run: a mistake must be said at once.
SHOWING = ("--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--resolve")


def prepare(argv: list[str]) -> tuple[list[str], list[str]]:
    """Prefix overrides of the open groups with ``++`` and take out unknown top-level keys.

    ``run.dir=DIR`` names the folder of the run, or of the sweep: Hydra's own keys for these take its place.

    Returns:
        The arguments for Hydra, and one line for each unknown top-level key.

    Raises:
        SystemExit: With code 2 for unknown keys where the configuration would only be shown.
    """
    groups = set(GROUPS) | _user_groups(argv)
    kept, mistakes = argv[:1], []
    for argument in argv[1:]:
        key, equals, value = argument.partition("=")
        if key == "run.dir" and equals:  # the folder is Hydra's, which also keeps there what resume=DIR reads
            kept += [f"hydra.run.dir={value}", f"hydra.sweep.dir={value}"]
            continue
        if not equals or key.startswith(("-", "+", "~")):
            kept.append(argument)
            continue
        first = key.split(".")[0].split("/")[0].split("@")[0]
        if first in OPEN and "." in key:
            kept.append("++" + argument)
        elif first in FIELDS | groups | {"hydra"}:
            kept.append(argument)
        else:
            mistakes.append(f"{key}: no such key or group.{hint(first, sorted(FIELDS | groups))}")
    if mistakes and any(argument.split("=")[0] in SHOWING for argument in argv[1:]):
        raise SystemExit(_exit(mistakes))
    return kept, mistakes


def _user_groups(argv: list[str]) -> set[str]:
    """Groups in the folder of ``--config-dir``."""
    folders = [b for a, b in itertools.pairwise(argv) if a in ("--config-dir", "-cd")]
    folders += [a.split("=", 1)[1] for a in argv if a.startswith("--config-dir=")]
    return {p.name for folder in folders if Path(folder).is_dir() for p in Path(folder).iterdir() if p.is_dir()}


def _exit(mistakes: list[str]) -> int:
    import sys

    print("\n".join(mistakes), file=sys.stderr)
    return 2
