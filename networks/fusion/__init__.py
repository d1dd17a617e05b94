"""One network out of several: neuron transplantation (Öz et al., 2025) and what it is compared with.

`fuse` is the way in. Below it: `trace` finds the groups of channels of a network, `assemble` and `concat` build
networks of them, `transplant` chooses, `reconstruct` fits; `average`, `match_weights` and `match_layers` are rivals.
"""

from networks.fusion.alignment import average, match_layers, match_weights, permuted
from networks.fusion.assembly import assemble, concat, examined, output_scales
from networks.fusion.layout import Axis, ChannelGroups, Group, Part, Slot
from networks.fusion.methods import METHODS, FusionResult, MeanOfOutputs, fuse
from networks.fusion.reconstruction import recalibrate_bn, reconstruct
from networks.fusion.selection import importance, keep_best
from networks.fusion.tracing import UnsupportedNetworkError, register, register_module, trace
from networks.fusion.transplantation import RedundancyWarning, Transplant, transplant

__all__ = [
    "METHODS",
    "Axis",
    "ChannelGroups",
    "FusionResult",
    "Group",
    "MeanOfOutputs",
    "Part",
    "RedundancyWarning",
    "Slot",
    "Transplant",
    "UnsupportedNetworkError",
    "assemble",
    "average",
    "concat",
    "examined",
    "fuse",
    "importance",
    "keep_best",
    "match_layers",
    "match_weights",
    "output_scales",
    "permuted",
    "recalibrate_bn",
    "reconstruct",
    "register",
    "register_module",
    "trace",
    "transplant",
]
