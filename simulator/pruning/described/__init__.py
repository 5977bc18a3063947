"""Pruning methods that a file describes by what they do to M, N and K."""
