"""Measure devices, keep the records, fit and validate profiles. Imports of torch, pandas and pyarrow happen only where they are used."""
