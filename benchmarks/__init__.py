"""One benchmark per published claim: ``python -m benchmarks --list``."""
