"""Pruning of forecasting networks: masks on single weights, removal of coupled channels, what either costs.

Kiefer et al., "A comparative study of pruning methods in Transformer-based time-series forecasting", arXiv 2412.12883.
"""
