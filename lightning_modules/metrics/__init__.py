"""Metrics as torchmetrics objects, one field of science a file."""
