"""Physics of the experiments: plain PyTorch, no Lightning and no Hydra."""
