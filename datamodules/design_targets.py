"""Wanted spectra by name or from files, and the variants of them that a network is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.readers.target_spectra import on_grid, read_target_spectra
from physics.thin_film.robustness import variants
from physics.thin_film.targets import Target, make_target


@dataclass(frozen=True)
class Variants:
    """Which variants of a wanted spectrum a network is shown beside the spectrum itself (paper, section 2.5).

    Args:
        number: Spectra shown in all, the clean one first; draws are shared among them.
        absolute: Deviation of the noise on channels with 1 in ``channels``.
        relative: The same, as a part of the value.
        channels: Factors of the noise on R, A, T.
        window: Wavelengths of the smoothing window.
        sigma: Of the Gaussian in it, in steps of the grid.
        fill: Random values where nothing is asked for: ``flat_random``, ``tilted_random``, ``smooth_random`` or
            ``prior_plus_noise``; None: as the target has it.
        strength: Of the filling.
        kernel: Wavelengths over which the filling is smooth.
        priority: Channels in the order in which they take the residue of R + A + T = 1.
    """

    number: int = 1
    absolute: float = 0.01
    relative: float = 0.0
    channels: Sequence[float] = (1.0, 0.0, 1.0)
    window: int = 25
    sigma: float = 1.5
    fill: str | None = None
    strength: float = 0.95
    kernel: int = 50
    priority: str = "R>T>A"

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(f"data.variants.number={self.number}: must be at least 1, the target itself")

    def of(self, target: Target, seed: int) -> Tensor:
        """``(number, 3, W)``."""
        return variants(
            target.spectrum,
            target.weight,
            self.number,
            seed,
            absolute=self.absolute,
            relative=self.relative,
            channels=tuple(self.channels),
            window=self.window,
            sigma=self.sigma,
            mode=self.fill,
            strength=self.strength,
            kernel=self.kernel,
            priority=self.priority,
        )


def design_targets(
    entries: Sequence[str | Mapping[str, Any]],
    wavelength_nm: Tensor,
    interpolate: bool = False,
    repair: bool = False,
    roi_nm: Sequence[float] | None = None,
) -> list[Target]:
    """Targets of ``data.targets``.

    Args:
        entries: Names of `physics.thin_film.targets`, mappings of a name, options and optionally a ``label`` for
            tables and figures, CSV or JSON files.
        wavelength_nm: ``(W,)``.
        interpolate: Whether spectra of files are interpolated to these.
        repair: Whether impossible values of files are corrected.
        roi_nm: First and last wavelength that counts; None: all.

    Raises:
        ValueError: Names the target, or the file, and the remedy.
        FileNotFoundError: Names the file.
    """
    targets = [target for entry in entries for target in _targets_of(entry, wavelength_nm, interpolate, repair)]
    names = [target.name for target in targets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"data.targets: the name {twice[0]!r} occurs more than once; give one a label, {{name: {twice[0]}, label: "
            "...}, or rename the file"
        )
    return targets if roi_nm is None else [_within(target, wavelength_nm, roi_nm) for target in targets]


def _targets_of(entry: str | Mapping[str, Any], wavelength_nm: Tensor, interpolate: bool, repair: bool) -> list[Target]:
    if isinstance(entry, Mapping):
        if "name" not in entry:
            raise ValueError(f"data.targets: {dict(entry)} has no name; write {{name: dbr, centre_nm: 700}}")
        options = {key: value for key, value in entry.items() if key not in ("name", "label")}
        found = _named(entry["name"], wavelength_nm, **options)
        return [Target(str(entry.get("label", found.name)), found.spectrum, found.weight)]
    path = Path(entry.removeprefix("file:")).expanduser()
    if path.suffix.lower() not in (".csv", ".json"):
        return [_named(entry, wavelength_nm)]
    if not path.is_file():
        raise FileNotFoundError(f"data.targets: there is no file {path}")
    return [on_grid(table, wavelength_nm.numpy(), interpolate, repair) for table in read_target_spectra(path)]


def _named(name: str, wavelength_nm: Tensor, **options: Any) -> Target:
    try:
        return make_target(name, wavelength_nm, **options)
    except ValueError as error:
        raise ValueError(f"data.targets: {error}") from None


def _within(target: Target, wavelength_nm: Tensor, roi_nm: Sequence[float]) -> Target:
    weight = target.weight * ((wavelength_nm >= roi_nm[0]) & (wavelength_nm <= roi_nm[1]))
    if not weight.any():
        raise ValueError(f"data.roi_nm={list(roi_nm)} leaves nothing of the target {target.name}")
    return Target(target.name, target.spectrum, weight)
