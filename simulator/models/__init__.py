"""Decoders: shapes from a configuration or checkpoint, and lowering of a request to operators."""
