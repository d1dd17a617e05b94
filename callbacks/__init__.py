"""Callbacks that work with every experiment."""
