"""LightningDataModules; every batch is a ``dict[str, Tensor]`` with documented keys."""
