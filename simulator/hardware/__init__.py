"""Devices as data: datasheet facts, fitted sections, and the YAML and array files of both."""
