"""Benchmarks: ``pytest --override-ini addopts= -s tests/benchmarks``; busy:
``--benchmark-timer=time.process_time``.

A rate is judged against its floor only with ``PRUNESIM_FLOORS=1``: absolute figures mean nothing on
a busy machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest


@pytest.fixture
def floor() -> Callable[[str, float, float, bool], None]:
    """A check of a number against its floor (or ceiling), which always prints it."""

    def check(what: str, value: float, limit: float, least: bool = True) -> None:
        print(f"{what}: {value:.4g} ({'at least' if least else 'at most'} {limit:.4g} wanted)")
        if os.environ.get("PRUNESIM_FLOORS"):
            assert value >= limit if least else value <= limit, what

    return check
