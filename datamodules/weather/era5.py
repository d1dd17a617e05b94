"""Reference values of ERA5 for the normalisation: mean and standard deviation of 69 channels (6-hourly, 1980-2016)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datamodules.readers.weather_store import Channel

LEVELS = (1000, 925, 850, 700, 600, 500, 400, 300, 250, 200, 150, 100, 50)

_SURFACE = {
    "msl": (100950.0, 1320.70),
    "u10": (-0.02368, 5.52298),
    "v10": (0.19394, 4.70972),
    "t2m": (278.251, 21.3722),
}
_PRESSURE = {
    "z": (
        (730.8, 7003.3, 13733.5, 28902.5, 40614.1, 54072.6, 69926.5, 89347.2, 101149, 115250, 133055, 157565, 199360),
        (1063.9, 1225.9, 1471.4, 2141.6, 2702.9, 3362.2, 4160.7, 5099.8, 5542.4, 5825.1, 5835.4, 5547.5, 5949.6),
    ),
    "q": (
        (6.97634e-3, 5.98124e-3, 4.55299e-3, 2.41007e-3, 1.52452e-3, 8.37775e-4, 3.78484e-4, 1.24707e-4, 5.67175e-5,
         1.92187e-5, 5.34941e-6, 2.76921e-6, 2.791e-6),
        (5.8886e-3, 5.04001e-3, 4.08407e-3, 2.51703e-3, 1.75412e-3, 1.06319e-3, 5.01267e-4, 1.65208e-4, 7.26554e-5,
         2.20421e-5, 3.71653e-6, 6.34241e-7, 4.06568e-7),
    ),
    "t": (
        (280.788, 277.154, 274.360, 267.214, 260.970, 252.783, 241.965, 228.722, 222.649, 217.974, 213.280, 208.622,
         212.789),
        (17.2744, 16.1995, 15.6647, 14.8108, 13.4403, 13.0801, 12.6759, 10.6697, 8.49054, 7.23732, 9.00220, 12.4970,
         10.2725),
    ),
    "u": (
        (-0.00121, 0.64927, 1.45173, 3.36753, 4.82171, 6.55813, 8.79586, 11.7457, 13.2571, 14.0853, 13.4026, 10.1471,
         5.38089),
        (6.11116, 7.92343, 8.17015, 9.16199, 10.3359, 11.9896, 14.3206, 17.0567, 17.8968, 17.6188, 16.0190, 13.6226,
         15.5953),
    ),
    "v": (
        (0.18888, 0.20766, 0.14157, 0.01943, -0.03354, -0.03021, -0.01651, -0.01927, -0.04580, -0.05872, -0.02691,
         0.01382, 0.00566),
        (5.23961, 6.37865, 6.17716, 6.80277, 7.73702, 9.10656, 11.1269, 13.1966, 13.2268, 11.7596, 9.50931, 7.39256,
         6.77794),
    ),
}  # fmt: skip


def era5_statistics(channels: Sequence[Channel]) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of channels, in the units of ERA5.

    Raises:
        ValueError: Names the first channel without a reference value.
    """
    values = []
    for channel in channels:
        if channel.level is None and channel.variable in _SURFACE:
            values.append(_SURFACE[channel.variable])
        elif channel.variable in _PRESSURE and channel.level in LEVELS:
            mean, std = _PRESSURE[channel.variable]
            values.append((mean[LEVELS.index(channel.level)], std[LEVELS.index(channel.level)]))
        else:
            raise ValueError(
                f"data.normalization=era5 has no values for {channel.name}; it has {', '.join(_SURFACE)} and "
                f"{', '.join(_PRESSURE)} at {', '.join(map(str, LEVELS))} hPa; use data.normalization=store"
            )
    mean, std = np.array(values, dtype=np.float64).T
    return mean, std
