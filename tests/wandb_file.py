"""Reads the binary log that W&B writes offline (`run-<id>.wandb`), to assert what was logged without a server.

The file has a header of 7 bytes and then LevelDB-style blocks of 32 KiB: records of ``crc, length, type, data``, where
one that does not fit a block is continued in the next (types: 1 whole, 2 first, 3 middle, 4 last part).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32 * 1024, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class WandbRun:
    """What a file holds, in the order of logging."""

    run: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    files: list[str] = field(default_factory=list)

    def last(self) -> dict[str, Any]:
        """The last value of every key."""
        return {key: value for row in self.history for key, value in row.items()}


def payloads(content: bytes) -> Iterator[bytes]:
    """The records of a file, joined from their parts.

    Raises:
        ValueError: If this is no such file, or if its end is missing in the middle of a record.
    """
    if content[:4] != b":W&B":
        raise ValueError(f"not a W&B file: it begins with {content[:4]!r}")
    position, parts = 7, []
    while position < len(content):
        if (left := BLOCK - position % BLOCK) < HEADER.size:  # padding at the end of a block
            position += left
            continue
        _, length, kind = HEADER.unpack_from(content, position)
        position += HEADER.size
        parts.append(content[position : position + length])
        position += length
        if kind in (WHOLE, LAST):
            yield b"".join(parts)
            parts = []
        elif kind not in (FIRST, MIDDLE):
            raise ValueError(f"unknown record type {kind} at {position}")
    if parts:
        raise ValueError("the file ends in the middle of a record")


def read(path: Path) -> WandbRun:
    """Everything that tests look at."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = WandbRun()
    for payload in payloads(path.read_bytes()):
        record = Record()
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found.run |= {name: getattr(run, name) for name in ("run_id", "project", "entity", "display_name")}
            found.run |= {"group": run.run_group, "job_type": run.job_type, "notes": run.notes, "tags": list(run.tags)}
            _update(found.config, run.config.update)
        elif kind == "config":
            _update(found.config, record.config.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _update(row, record.history.item)
            found.history.append(row)
        elif kind == "summary":
            _update(found.summary, record.summary.update)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
        elif kind == "files":
            found.files += [file.path for file in record.files.files]
    return found


def _update(target: dict[str, Any], items: Any) -> None:
    for item in items:
        target["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
