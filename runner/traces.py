"""Tracebacks without the frames of libraries: the user's own lines are what helps."""

from __future__ import annotations

import re

_FRAME = re.compile(r'^  File "([^"]+)", line \d+')
_LIBRARY = re.compile(r"[/\\](site-packages|dist-packages|lib[/\\]python3\.\d+)[/\\]")


def shorten(trace: str) -> str:
    """Replace runs of library frames by one line that counts them; the last frame always stays."""
    lines = trace.rstrip("\n").split("\n")
    starts = [i for i, line in enumerate(lines) if _FRAME.match(line)]
    if not starts:
        return trace
    kept, hidden, i = [], 0, 0
    while i < len(lines):
        match = _FRAME.match(lines[i])
        if match is None:
            kept.append(lines[i])
            i += 1
            continue
        end = i + 1
        while end < len(lines) and lines[end].startswith("    "):
            end += 1
        if _LIBRARY.search(match[1]) and i != starts[-1]:
            hidden += 1
        else:
            if hidden:
                kept.append(f"  ({hidden} frames of libraries)")
                hidden = 0
            kept += lines[i:end]
        i = end
    return "\n".join(kept)
