"""Evaluation of profiles and engines on data that their fits did not use."""
