"""Fixtures of tests of the program: an empty folder, a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from program import cli, run_python

__all__ = ["cli"]


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_wish_for_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def python() -> Callable[..., tuple[int, bytes, list[str]]]:
    return run_python
