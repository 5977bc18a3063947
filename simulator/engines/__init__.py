"""Serving engines, one YAML file each. Use :func:`simulator.engines.engine.load_engine`."""
