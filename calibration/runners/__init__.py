"""Runs of dense and pruned models on a device: upper bounds, comparisons with predictions,
quality."""
