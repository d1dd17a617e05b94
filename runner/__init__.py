"""Composition, checking and launching of runs: the only code that knows Hydra."""
