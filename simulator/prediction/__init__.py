"""Predict results for scenarios, prunings and devices, and derive advice, frontiers and sweeps from them."""
