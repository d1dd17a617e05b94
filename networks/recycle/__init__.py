"""ReCycle: primary cycle compression and residual learning on recent historic profiles (arXiv 2405.03429)."""

from __future__ import annotations

from networks.recycle.compression import PrimaryCycleCompression
from networks.recycle.cycle_compressed import CycleCompressed
from networks.recycle.profile import RecentHistoricProfile, recent_historic_profile
from networks.recycle.residual import LinearSkip, QuantileHead, ResidualCycles
from networks.recycle.transformer import ReCycleTransformer

__all__ = [
    "CycleCompressed",
    "LinearSkip",
    "PrimaryCycleCompression",
    "QuantileHead",
    "ReCycleTransformer",
    "RecentHistoricProfile",
    "ResidualCycles",
    "recent_historic_profile",
]
