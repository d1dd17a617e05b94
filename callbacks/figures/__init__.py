"""Figures as pure functions ``(outputs, datamodule) -> Figure``, and the callback that saves them."""
