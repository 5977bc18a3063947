"""Serving engines, one YAML file each. Use :func:`simulator.engines.engine.load_engine`."""

DEFAULT_ENGINE = "vllm"
"""The engine that most users deploy."""
