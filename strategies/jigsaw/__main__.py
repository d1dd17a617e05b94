"""``python -m strategies.jigsaw FROM.ckpt TO.ckpt``: one file that any strategy loads, of a checkpoint in parts."""

from __future__ import annotations

import argparse

from strategies.jigsaw.checkpoint import export_checkpoint

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m strategies.jigsaw", description=__doc__)
    parser.add_argument("source", help="checkpoint that strategy=jigsaw has saved; its parts lie beside it")
    parser.add_argument("target", help="file to write")
    given = parser.parse_args()
    export_checkpoint(given.source, given.target)
    print(f"wrote {given.target}")
