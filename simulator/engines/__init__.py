"""How a serving stack runs a decoder: one YAML file an engine. Use :func:`simulator.engines.engine.load_engine`."""

DEFAULT_ENGINE = "vllm"
"""What most who deploy a model run."""
