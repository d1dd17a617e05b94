"""Two runs never share a folder."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runner.lock import FolderInUse, exclusive
from tests.composing import ROOT


def test_a_second_run_is_refused_while_the_first_lasts(tmp_path):
    code = f"from runner.lock import exclusive\nwith exclusive({str(tmp_path)!r}): print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=-1, stdout=-1, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FolderInUse, match="RUN_STAMP"), exclusive(tmp_path):
            pass
    finally:
        other.kill()
        other.communicate()
    with exclusive(tmp_path):  # a killed process holds nothing
        pass
