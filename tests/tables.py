"""Tables in texts of tests: a row per line, and bars between its cells."""

from __future__ import annotations


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of each line."""
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]
