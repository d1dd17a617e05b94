"""Coincidences as PETSIRD, the open standard of raw data of PET: geometry of the scanner, list of prompts.

A coincidence is a prompt event of the millisecond in which it happened, which is as exact as the standard is about
coincidences. Its two hits are stored as single events too, in the same order, whose times are in picoseconds.
"""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from physics.pet.scanner import Scanner

BLOCK_NS = 1_000_000


class CoincidenceList(NamedTuple):
    """Crystals and times in ns of coincidences, (coincidence,) each."""

    a: np.ndarray
    b: np.ndarray
    time_ns: np.ndarray


def _petsird() -> Any:
    try:
        import petsird
    except ImportError as error:
        raise ImportError("PETSIRD files need the package petsird: pip install petsird==0.12.0") from error
    return petsird


def scanner_information(scanner: Scanner) -> Any:
    """Description of a scanner: one module, whose elements are the crystals in our numbering, one energy window."""
    p = _petsird()
    wide = 2 * np.pi * scanner.radius_mm / scanner.crystals_per_ring
    corners = [
        p.Coordinate(c=np.array([x, y, z], dtype=np.float32))
        for x in (0.0, scanner.crystal_depth_mm)
        for y in (-wide / 2, wide / 2)
        for z in (-scanner.axial_pitch_mm / 2, scanner.axial_pitch_mm / 2)
    ]
    transforms = []
    for centre in scanner.centres_mm():
        c, s = centre[0] / scanner.radius_mm, centre[1] / scanner.radius_mm
        matrix = np.array([[c, -s, 0, centre[0]], [s, c, 0, centre[1]], [0, 0, 1, centre[2]]], dtype=np.float32)
        transforms.append(p.RigidTransformation(matrix=matrix))
    box = p.BoxSolidVolume(shape=p.BoxShape(corners=corners), material_id=1)
    module = p.DetectorModule(detecting_elements=p.ReplicatedBoxSolidVolume(object=box, transforms=transforms))
    here = p.RigidTransformation(matrix=np.eye(3, 4, dtype=np.float32))
    window_mm = scanner.time_resolution_ns * 299.792458
    return p.ScannerInformation(
        model_name=scanner.name,
        scanner_geometry=p.ScannerGeometry(
            replicated_modules=[p.ReplicatedDetectorModule(object=module, transforms=[here])]
        ),
        bulk_materials=[p.BulkMaterial(id=1, name="LYSO", density=7.1)],
        tof_bin_edges=[[p.BinEdges(edges=np.array([-window_mm, window_mm], dtype=np.float32))]],
        tof_resolution=[[scanner.time_resolution_ns * 299.792458 / 2]],
        event_energy_bin_edges=[p.BinEdges(edges=np.array(scanner.energy_window_kev, dtype=np.float32))],
        energy_resolution_at_511=[scanner.energy_resolution],
        collimator_type="NONE",
        single_event_policy=p.SingleEventPolicy.REJECT_IF_NOT_IN_COINCIDENCE,
        prompt_event_policy=p.CoincidencePolicy.OTHER,
    )


def write_coincidences(path: str | Path, scanner: Scanner, a: np.ndarray, b: np.ndarray, time_ns: np.ndarray) -> None:
    """Write coincidences in the order of time; the file appears when it is complete.

    Args:
        path: Of the file.
        scanner: Its geometry goes along.
        a: First crystals.
        b: Second crystals.
        time_ns: Times, at least 0; kept to a picosecond.

    Raises:
        ImportError: Without petsird.
        ValueError: For times that are negative or not in order, or crystals that there are not.
    """
    p = _petsird()
    if len(time_ns) and (time_ns.min() < 0 or (np.diff(time_ns) < 0).any()):
        raise ValueError("times of coincidences must be at least 0 and in order; sort them first")
    for crystals in (a, b):
        if len(crystals) and not (crystals.min() >= 0 and crystals.max() < scanner.num_crystals):
            raise ValueError(f"crystals of coincidences must be 0 to {scanner.num_crystals - 1}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    picoseconds = np.rint(np.asarray(time_ns, dtype=float) * 1000).astype(np.int64)
    rows = zip(np.asarray(a).tolist(), np.asarray(b).tolist(), picoseconds.tolist(), strict=True)

    def blocks() -> Any:
        for number, some in groupby(rows, key=lambda row: row[2] // (1000 * BLOCK_NS)):
            singles, prompts = [], []
            for first, second, when in some:
                offset = when - number * 1000 * BLOCK_NS
                singles += [p.SingleEvent(detection_bin=c, time_offset_in_time_block=offset) for c in (first, second)]
                prompts.append(p.CoincidenceEvent(detection_bins=[max(first, second), min(first, second)], tof_idx=0))
            yield p.TimeBlock.EventTimeBlock(
                p.EventTimeBlock(
                    time_interval=p.TimeInterval(start=number, stop=number + 1),
                    single_events=[singles],
                    prompt_events=[[prompts]],
                )
            )

    try:
        with p.BinaryPETSIRDWriter(str(unfinished)) as writer:
            writer.write_header(p.Header(scanner=scanner_information(scanner)))
            writer.write_time_blocks(blocks())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_coincidences(path: str | Path) -> CoincidenceList:
    """Read prompts of scanners with one type of module; without single events times are those of their blocks.

    Raises:
        ImportError: Without petsird.
        FileNotFoundError: Names the file.
    """
    p = _petsird()
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    a, b, when = [], [], []
    with p.BinaryPETSIRDReader(str(path)) as reader:
        reader.read_header()
        for block in reader.read_time_blocks():
            if not isinstance(block, p.TimeBlock.EventTimeBlock):
                continue
            events = block.value
            start = events.time_interval.start * BLOCK_NS
            prompts = events.prompt_events[0][0] if events.prompt_events else []
            singles = events.single_events[0] if events.single_events else []
            if len(singles) == 2 * len(prompts):
                a += [s.detection_bin for s in singles[::2]]
                b += [s.detection_bin for s in singles[1::2]]
                when += [start + s.time_offset_in_time_block / 1000 for s in singles[::2]]
            else:
                a += [e.detection_bins[0] for e in prompts]
                b += [e.detection_bins[1] for e in prompts]
                when += [start] * len(prompts)
    return CoincidenceList(np.array(a, dtype=np.int64), np.array(b, dtype=np.int64), np.array(when, dtype=float))
