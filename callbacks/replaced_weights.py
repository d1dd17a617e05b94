"""Callbacks that change weights, under strategies that exchange them."""

from __future__ import annotations

import lightning.pytorch as pl


def refuse_replaced_weights(trainer: pl.Trainer, key: str) -> None:
    """Raise ValueError where the strategy puts other parameters in the place of weights, on one device as on many.

    Args:
        trainer: Whose strategy is asked.
        key: Name of the callback in configurations (``callbacks.<key>``).
    """
    if getattr(trainer.strategy, "replaces_weights", False):
        raise ValueError(
            f"callbacks.{key}: {type(trainer.strategy).__name__} replaces weights itself, the two cannot take turns; "
            "choose strategy=ddp, daso or local_sgd (on one device strategy=auto)."
        )
