"""Families that change a model, one file each."""
