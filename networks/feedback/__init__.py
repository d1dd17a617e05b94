"""Training of feed-forward networks without a backward pass through them (F3 and its relatives); plain PyTorch.

Flügel et al., "Feed-Forward Optimization With Delayed Feedback for Neural Network Training", arXiv 2304.13372.
"""

from networks.feedback.alignment import RandomBackward
from networks.feedback.blocks import Block, blocks_of, chain, join
from networks.feedback.error_store import ErrorStore
from networks.feedback.learning import BlockChain
from networks.feedback.objectives import Objective, error, is_delayed, signal
from networks.feedback.perceptron import Perceptron
from networks.feedback.token_network import TokenNetwork
from networks.feedback.weights import FeedbackMatrix, FeedbackWeights

__all__ = [
    "Block", "BlockChain", "ErrorStore", "FeedbackMatrix", "FeedbackWeights", "Objective", "Perceptron",
    "RandomBackward", "TokenNetwork", "blocks_of", "chain", "error", "is_delayed", "join", "signal",
]  # fmt: skip
