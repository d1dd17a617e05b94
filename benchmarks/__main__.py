"""``python -m benchmarks [NAME ...] [--list] [--write]``."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
import textwrap
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import document, record

FOLDER = Path(__file__).parent


def claims(folder: Path = FOLDER) -> dict[str, str]:
    """Name and claim of every benchmark: the modules with a literal ``CLAIM``, read without importing them."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            if any(isinstance(target, ast.Name) and target.id == "CLAIM" for target in targets):
                found[path.stem] = ast.literal_eval(node.value)
    return found


def execute(name: str, claim: str, git: Mapping[str, Any]) -> dict[str, Any]:
    """Run one benchmark and return its result with everything that belongs to it."""
    module = importlib.import_module(f"benchmarks.{name}")
    begin = time.monotonic()
    result = module.run()
    return record.content_of(name, claim, result, git, time.monotonic() - begin)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the command line names, all without names; 1 if one failed or missed a bound."""
    known = claims()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="One benchmark per claim.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run; all without a name")
    parser.add_argument("--list", action="store_true", help="show names and claims and run nothing")
    parser.add_argument(
        "--write", action="store_true", help="store the results in benchmarks/results and renew docs/benchmarks.md"
    )
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    names = options.names or list(known)
    if options.list:
        for name in names:
            print(textwrap.fill(f"{name:20s} {known[name]}", 120, subsequent_indent=" " * 21))
        return 0
    return _run(names, known, options.write)


def _run(names: Sequence[str], known: Mapping[str, str], write: bool) -> int:
    from callbacks.run_record import git_state

    git = git_state(FOLDER)  # before the first result changes the working tree
    if write and git.get("dirty"):
        print("the working tree has uncommitted changes; the results will say so", file=sys.stderr)
    failed = []
    for name in names:
        print(f"{name}: {known[name]}", flush=True)
        try:
            content = execute(name, known[name], git)
        except ImportError as error:  # a peer that is not installed: its message names the extra
            print(f"{name} did not run: {error}", file=sys.stderr)
            failed.append(name)
            continue
        except Exception:  # the others run
            traceback.print_exc()
            failed.append(name)
            continue
        print("\n".join([f"\n{document.hardware_name(content)}", *document.table(content["rows"]), ""]), flush=True)
        if any(record.holds(row) is False for row in content["rows"]):
            failed.append(name)
        if write:
            print(f"wrote {record.store(content, record.RESULTS)}")
            document.write(document.PAGE, record.RESULTS)
    if failed:
        print(f"failed, or missed a bound: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
