"""Measure devices, keep the records, fit and validate profiles; torch, pandas and pyarrow are
imported where used."""
