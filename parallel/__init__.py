"""Distributed building blocks on torch.distributed alone: layouts, groups, collectives, an emulated slow network."""
