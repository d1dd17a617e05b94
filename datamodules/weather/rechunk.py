"""``python -m datamodules.weather.rechunk SOURCE TARGET``: a store whose chunks are the blocks of a grid of ranks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from datamodules.readers.weather_store import Channel, rechunk


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and write the store."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.weather.rechunk", description=__doc__)
    parser.add_argument("source", help="zarr folder or address, or NetCDF file")
    parser.add_argument("target", help="folder of the new store (zarr v3)")
    parser.add_argument("--surface", nargs="*", default=[], help="channels at the surface")
    parser.add_argument("--pressure", nargs="*", default=[], help="variables on pressure levels")
    parser.add_argument("--levels", nargs="*", type=float, default=[], help="hPa")
    parser.add_argument("--statics", nargs="*", default=[], help="fields that do not change")
    parser.add_argument("--token", type=int, default=1, help="longitude bands (strategy.token)")
    parser.add_argument("--channel", type=int, default=1, help="channel groups (strategy.channel)")
    parser.add_argument("--sharded", action="store_true", help="one file per record")
    parser.add_argument("--height", type=int, default=None, help="rows kept, from the north")
    given = parser.parse_args(arguments)
    channels = [Channel.parse(name) for name in given.surface]
    channels += [Channel.parse(name, level) for name in given.pressure for level in given.levels]
    statics = [Channel.parse(name).variable for name in given.statics]
    try:
        rechunk(
            given.source, given.target, channels, given.token, given.channel, statics,
            sharded=given.sharded, height=given.height,
        )  # fmt: skip
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
