"""Jigsaw (Kieckhefen et al., SC25): weights, activations and inputs of a model cut over several processes."""

from strategies.jigsaw.checkpoint import export_checkpoint, read_whole
from strategies.jigsaw.strategy import JigsawStrategy

__all__ = ["JigsawStrategy", "export_checkpoint", "read_whole"]
