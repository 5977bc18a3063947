"""Bounded reads and whole writes: text, CSV, Parquet, YAML that knows where everything stood."""
