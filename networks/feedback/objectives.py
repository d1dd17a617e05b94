"""Objectives: what the last block's numbers mean, their loss, what is told to the other blocks (F3, section 2.3)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

ErrorInfo = Literal[
    "one_hot_target",
    "current_error",
    "delayed_error",
    "delayed_loss",
    "delayed_error_softmax",
    "delayed_loss_softmax",
    "delayed_error_one_hot",
    "delayed_loss_one_hot",
    "zeros",
]
ObjectiveName = Literal["sigmoid_bce", "softmax_nll", "mse"]


class Objective:
    """An output activation and a loss, means over the batch (and over the outputs, but for ``softmax_nll``).

    ``sigmoid_bce``: sigmoid and binary cross-entropy with one-hot targets. ``softmax_nll``: cross-entropy of raw
    numbers, which stay the output, as in the paper's Transformer. ``mse``: squared error of raw numbers.

    Args:
        name: One of these.

    Raises:
        ValueError: For another name.
    """

    def __init__(self, name: ObjectiveName) -> None:
        if name not in get_args(ObjectiveName):
            raise ValueError(f"model.objective={name!r} is unknown; choose one of {', '.join(get_args(ObjectiveName))}")
        self.name = name

    def output(self, raw: Tensor) -> Tensor:
        """The output of the network, what the targets are compared with: (batch, C) to the same shape."""
        return raw.sigmoid() if self.name == "sigmoid_bce" else raw

    def loss(self, raw: Tensor, target: Tensor) -> Tensor:
        """Loss of what the last block gave; targets (batch, C)."""
        if self.name == "sigmoid_bce":
            return F.binary_cross_entropy_with_logits(raw, target)
        return self.loss_of_output(raw, target)

    def loss_of_output(self, output: Tensor, target: Tensor) -> Tensor:
        """The same as a function of the output."""
        if self.name == "sigmoid_bce":
            return F.binary_cross_entropy(output, target)
        if self.name == "softmax_nll":
            return -(target * output.log_softmax(1)).sum(1).mean()
        return F.mse_loss(output, target)

    def class_logits(self, raw: Tensor) -> Tensor:
        """Numbers whose softmax are the probabilities of the classes (sigmoids over their sum)."""
        return F.logsigmoid(raw) if self.name == "sigmoid_bce" else raw

    def best_error_info(self) -> ErrorInfo:
        """The delayed signal that did best in the paper's kind of task with this objective."""
        return {
            "sigmoid_bce": "delayed_error_one_hot", "softmax_nll": "delayed_error_softmax", "mse": "delayed_error",
        }[self.name]  # fmt: skip


def is_delayed(info: ErrorInfo) -> bool:
    """Whether the signal is one of the sample's last visit: what the blocks need is known before the forward pass."""
    return info.startswith("delayed")


def signal(info: ErrorInfo, target: Tensor, remembered: Tensor | None = None) -> Tensor:
    """What multiplies the feedback weights, of signals that are known before the forward pass, (batch, C).

    Args:
        info: Which.
        target: One-hot classes or values, (batch, C).
        remembered: What was stored at the samples' last visit, for delayed signals.
    """
    if info == "zeros":
        return torch.zeros_like(target)
    if info == "one_hot_target":
        return target
    assert remembered is not None, f"{info} is not known before the forward pass"
    return target * remembered if info.endswith("_one_hot") else remembered


def error(info: ErrorInfo, objective: Objective, raw: Tensor, target: Tensor, replicas: int = 1) -> Tensor:
    """What is stored of a sample for its next visit, or used at once by ``current_error``; (batch, C), no graph.

    Args:
        info: Which.
        objective: Of the network.
        raw: What the last block gave, (batch, C), before its weights were updated.
        target: (batch, C).
        replicas: Processes with equal shares of the batch: the mean in the loss is that of all of them.
    """
    output = objective.output(raw.detach().to(target.dtype))
    if info in ("delayed_error", "delayed_error_one_hot", "current_error"):
        return target - output
    if info == "delayed_error_softmax":
        return target - output.softmax(1)
    assert info.startswith("delayed_loss")
    with torch.enable_grad():
        leaf = output.requires_grad_()
        given = leaf.softmax(1) if info == "delayed_loss_softmax" else leaf
        (gradient,) = torch.autograd.grad(objective.loss_of_output(given, target), leaf)
    return -gradient / replicas
