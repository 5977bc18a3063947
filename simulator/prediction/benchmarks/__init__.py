"""Readers of result files of serving benchmarks: :func:`simulator.prediction.benchmarks.read.read_bench`."""
