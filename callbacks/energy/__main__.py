"""Energy of finished runs: ``python -m callbacks.energy {merge,report,study}``.

``merge RUN_DIR``: the energy of a run from its files, however it ended. ``report RUN_DIR``: a page about one run.
``study DIR [DIR ...]``: training against inference by node type, from the runs below some folders.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from callbacks.energy.node import read_profiles
from callbacks.energy.report import (
    STUDY_TITLE,
    headlines,
    markdown,
    merge,
    page,
    run_page,
    study_figures,
    study_sections,
)  # fmt: skip
from callbacks.energy.study import Assumptions, build, to_json
from callbacks.energy.summary import Facility

PROFILES = Path(__file__).parents[2] / "conf" / "node"


def report(run_dir: Path, out: Path | None) -> Path:
    """Write the page of a run; returns its path."""
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is no folder; name the folder of a run, logs/<name>/<time>.")
    content = run_page(run_dir)
    path = out or run_dir / "energy_report.html"
    _write({path: content.encode()})
    return path


def study(folders: list[Path], profiles: Path, out: Path | None, assumptions: Assumptions) -> tuple[str, list[Path]]:
    """Write the files of a study; returns its Markdown and their paths."""
    found = build(folders, read_profiles(profiles), assumptions)
    folder = out or folders[0] / "energy_study"
    text = markdown(STUDY_TITLE, study_sections(found))
    images = study_figures(found)
    captions = [(name.replace("_", " "), image) for name, image in images.items()]
    files = {
        folder / "study.md": text.encode(),
        folder / "study.json": to_json(found).encode(),
        folder / "study.html": page(STUDY_TITLE, study_sections(found, captions)).encode(),
        **{folder / f"{name}.png": image for name, image in images.items()},
    }
    _write(files)
    return text, list(files)


def sweep_study(folder: Path) -> str:
    """What to print below the table of a sweep: the findings, and where the pages of the study are."""
    try:
        _, paths = study([folder], PROFILES, None, Assumptions())
        found = json.loads((folder / "energy_study" / "study.json").read_text())
    except (ValueError, OSError) as error:
        return f"no energy study: {error}"
    page_path = next(path for path in paths if path.suffix == ".html")
    return f"{headlines(found)}\n\nstudy  {page_path}\nagain  {_command()} study {folder}"


def _command() -> str:
    """This program from the present working directory."""
    program = Path(__file__).parents[2]
    return f"{'' if Path.cwd() == program else f'PYTHONPATH={program} '}python -m callbacks.energy"


def _write(files: Mapping[Path, bytes]) -> None:
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _facility(options: argparse.Namespace) -> Facility | None:
    """What the command line says of the building; None: what the run says."""
    if options.pue is None and options.carbon_intensity is None:
        return None
    return Facility(options.pue or 1.0, options.carbon_intensity or 0.0, "command line")


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m callbacks.energy", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("merge", help="sum of all machines and parts of a run, as JSON")
    command.add_argument("run_dir", type=Path)
    command.add_argument("--pue", type=float, help="in place of the run's own")
    command.add_argument("--carbon-intensity", type=float, help="g/kWh, in place of the run's own")
    command = commands.add_parser("report", help="one HTML page about a run")
    command.add_argument("run_dir", type=Path)
    command.add_argument("--out", type=Path, help="file; default: RUN_DIR/energy_report.html")
    command = commands.add_parser("study", help="training against inference by node type: tables, findings, figures")
    command.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folder of a run or of a sweep")
    command.add_argument("--profiles", type=Path, default=PROFILES, help="node profiles: YAML file or folder of them")
    command.add_argument("--out", type=Path, help="folder; default: DIR/energy_study")
    given = Assumptions()
    command.add_argument("--cpu-load", type=float, default=given.cpu_load, help="of modelled nodes, 0 to 1")
    command.add_argument(
        "--gpu-utilisation", type=float, default=given.gpu_utilisation, help="of the GPUs that compute, 0 to 1"
    )
    command.add_argument("--tdp", type=float, help="W of the machine of the runs, for the error of TDP x time")
    options = parser.parse_args(arguments)
    try:
        if options.command == "merge":
            print(json.dumps(merge(options.run_dir, _facility(options)), indent=2))
        elif options.command == "report":
            print(f"page  {report(options.run_dir, options.out)}")
        else:
            assumptions = Assumptions(options.cpu_load, options.gpu_utilisation, options.tdp)
            text, paths = study(options.folders, options.profiles, options.out, assumptions)
            print(text)
            print("\n".join(f"{path.suffix[1:]:<5} {path}" for path in paths))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
