"""AB-training: groups of ranks that train one factor of every weight each (Coquelin et al., arXiv 2405.01067)."""

from strategies.ab_training.strategy import ABTrainingStrategy

__all__ = ["ABTrainingStrategy"]
