"""Backbones for time series: ``backbone(history, history_marks, forecast_marks, origin)``."""
