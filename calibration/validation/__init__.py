"""Predictions next to measurements: one scorer, the verdict on a profile, benchmark files of the
user, and the taxonomy paper's table and claims."""
