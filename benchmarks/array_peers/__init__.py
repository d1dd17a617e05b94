"""The same tasks on the same files by several programs, each in processes of its own; see `benchmarks.arrays`."""
