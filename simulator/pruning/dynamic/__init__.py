"""Families that decide per token at inference, one file each."""
