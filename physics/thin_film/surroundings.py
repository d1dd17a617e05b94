"""What lies before and behind a stack, and how light comes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from physics.thin_film.materials import MaterialCatalog

Polarization = Literal["s", "p", "unpolarized"]


@dataclass(frozen=True)
class Surroundings:
    """Half-spaces around a stack, an optional thick plate behind it, and the incoming light.

    The plate is so thick that its faces do not interfere: intensities are added in it, amplitudes in the stack
    (paper, section 2.3).

    Attributes:
        incident: Real refractive index on the light side, a number or ``(W,)``.
        exit: Index n + ik behind the stack, or behind the plate, a number or ``(W,)``.
        plate: Index of the plate, a number or ``(W,)``; None: there is none.
        plate_mm: Its thickness in mm.
        angle_rad: Angle of incidence in the medium on the light side.
        polarization: ``unpolarized`` is the mean of s and p.
    """

    incident: float | Tensor = 1.0
    exit: complex | Tensor = 1.0
    plate: complex | Tensor | None = None
    plate_mm: float = 0.0
    angle_rad: float = 0.0
    polarization: Polarization = "unpolarized"

    def __post_init__(self) -> None:
        if self.polarization not in ("s", "p", "unpolarized"):
            raise ValueError(f"polarization={self.polarization!r} is unknown; choose one of s, p, unpolarized")
        if not 0 <= self.angle_rad < torch.pi / 2:
            raise ValueError(f"angle_rad={self.angle_rad}: must be in [0, pi/2)")
        incident = torch.as_tensor(self.incident)
        if incident.is_complex() or not bool((incident > 0).all()):
            raise ValueError("incident: the medium on the light side must have a real, positive refractive index")
        if (self.plate is None) != (self.plate_mm == 0) or self.plate_mm < 0:
            raise ValueError(f"plate_mm={self.plate_mm}: must be above 0 with a plate, 0 without one")

    @classmethod
    def parse(
        cls,
        substrate: str,
        catalog: MaterialCatalog,
        wavelength_nm: Tensor,
        angle_deg: float = 0.0,
        polarization: Polarization = "unpolarized",
    ) -> Surroundings:
        """From the text of a configuration; air on the light side.

        Args:
            substrate: ``none``: air behind the stack too, the paper's mode. ``semi_infinite:<material or number>``:
                that medium without end. ``incoherent:<material or number>:<mm>``: a plate, then air.
            catalog: Where materials are looked up.
            wavelength_nm: ``(W,)``.
            angle_deg: Angle of incidence in degrees.
            polarization: ``s``, ``p`` or ``unpolarized``.

        Raises:
            ValueError: For a text that is none of these.
        """
        light = {"angle_rad": angle_deg * torch.pi / 180, "polarization": polarization}
        kind, *rest = substrate.split(":")

        def index(name: str) -> complex | Tensor:
            try:
                value = complex(name.replace("i", "j"))
            except ValueError:
                return catalog.index(name, wavelength_nm)
            if not (0 < value.real < float("inf") and 0 <= value.imag < float("inf")):
                raise ValueError(f"substrate={substrate!r}: an index needs n above 0 and k not below 0, both finite")
            return value

        if kind == "none" and not rest:
            return cls(**light)
        if kind == "semi_infinite" and len(rest) == 1:
            return cls(exit=index(rest[0]), **light)
        if kind == "incoherent" and len(rest) == 2:
            try:
                thickness = float(rest[1])
            except ValueError:
                thickness = float("nan")
            if not 0 < thickness < float("inf"):
                raise ValueError(f"substrate={substrate!r}: the thickness must be a positive number of mm")
            return cls(plate=index(rest[0]), plate_mm=thickness, **light)
        choices = "none, semi_infinite:<material or number>, incoherent:<material or number>:<mm>"
        raise ValueError(f"substrate={substrate!r} is unknown; choose one of {choices}")
