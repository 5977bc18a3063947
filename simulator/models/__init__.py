"""Decoders: shapes from a configuration, and the table of operators a request becomes."""
