"""Distributed asynchronous and selective optimization (Coquelin et al., Journal of Big Data 2022)."""

from strategies.daso.strategy import DASO

__all__ = ["DASO"]
