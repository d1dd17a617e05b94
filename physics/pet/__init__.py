"""Positron emission tomography: scanners, simulated hits, classical sorters of coincidences, and how good they are."""
