"""Predict results for requests, prunings and devices, and derive advice, frontiers and sweeps from
them."""
