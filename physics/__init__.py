"""Simulators and solvers in plain PyTorch: float64 by default, units in names."""
