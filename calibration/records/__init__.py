"""Measured times as tables: imported, stored while they are measured, screened."""
