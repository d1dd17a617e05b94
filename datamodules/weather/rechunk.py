"""``python -m datamodules.weather.rechunk SOURCE TARGET``: a store whose chunks are the blocks of a grid of ranks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from datamodules.readers.weather_store import Channel, WeatherStore, rechunk
from datamodules.weather.origins import within


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
    parser.add_argument(
        "--period", nargs=2, metavar=("FIRST", "LAST"), help="first and last moment, as data.train; without it: all"
    )
    given = parser.parse_args(arguments)
    channels = [Channel.parse(name) for name in given.surface]
    channels += [Channel.parse(name, level) for name in given.pressure for level in given.levels]
    statics = [Channel.parse(name).variable for name in given.statics]
    if not channels:
        parser.error("name the channels: --surface, or --pressure and --levels")
    try:
        records = within(WeatherStore(given.source).times, given.period, "--period").tolist()
        rechunk(
            given.source, given.target, channels, given.token, given.channel, statics,
            sharded=given.sharded, records=records, height=given.height, progress=_tell,
        )  # fmt: skip
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"{error}\n")


def _tell(done: int, whole: int) -> None:
    """A line every twentieth of the way."""
    if done == whole or done % max(1, whole // 20) == 0:
        print(f"{done} of {whole} records", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
