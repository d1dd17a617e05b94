"""Neural networks as plain PyTorch modules and functions: no Lightning, no Hydra."""
