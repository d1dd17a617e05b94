"""Shortened tracebacks keep the user's frames, the last frame and the message."""

from __future__ import annotations

from runner.traces import shorten

TRACE = """Traceback (most recent call last):
  File "/home/me/wattlight/runner/job.py", line 10, in run
    return _run(config)
  File "/x/lib/python3.11/site-packages/lightning/trainer.py", line 20, in fit
    call(self)
    ^^^^^^^^^^
  File "/x/lib/python3.11/site-packages/lightning/call.py", line 30, in call
    fn()
  File "/home/me/mine.py", line 40, in training_step
    loss(x)
  File "/x/lib/python3.11/site-packages/torch/nn/functional.py", line 50, in loss
    raise ValueError("first line\\n  File is not a frame")
ValueError: sizes differ
"""


def test_library_frames_are_counted():
    lines = shorten(TRACE).split("\n")
    assert [line for line in lines if "frames of libraries" in line] == ["  (2 frames of libraries)"]
    assert not any("lightning" in line for line in lines)
    assert any("mine.py" in line for line in lines) and "    loss(x)" in lines
    assert any("functional.py" in line for line in lines), "the last frame stays"
    assert lines[-1] == "ValueError: sizes differ"


def test_nothing_to_shorten():
    assert shorten("ValueError: alone") == "ValueError: alone"
    own = 'Traceback (most recent call last):\n  File "/home/me/a.py", line 1, in f\n    g()\nKeyError: 1'
    assert shorten(own) == own
