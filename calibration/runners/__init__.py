"""Decoders really pruned and really run: upper bounds, comparisons, quality."""
