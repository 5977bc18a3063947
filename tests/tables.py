"""Tables in texts of tests, a row per line and bars between its cells, and in YAML files."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of each line."""
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


@cache
def tables_of(file: str) -> Any:
    """Return the tables in a file of the folder of tests by name."""
    return yaml.safe_load((Path(__file__).parent / file).read_text(encoding="utf-8"))
