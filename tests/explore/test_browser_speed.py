"""First paint and answers to changes, measured in the browser and written to the test's log. The bounds are ten times what is promised:
machines are noisy, and a test that fails when they are says nothing. ``python tests/explore/measure.py`` measures alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
from explore_browser import absent
from measure import changes, first_paints, report

pytestmark = pytest.mark.skipif(bool(absent()), reason=absent() or "all there")

PROMISED_MS = {"first paint": 2000, "change": 300}


@pytest.mark.slow
def test_the_page_is_quick(
    url: str, browser: Any, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    paints, times = first_paints(browser, url, 20), changes(browser, url, 20)
    with capsys.disabled():
        print(f"\n{report(paints, times)}")
    medians = {name: statistics.median(found["answer"]) for name, found in times.items()}
    for name, median in {"first paint": statistics.median(paints["first paint"]), **medians}.items():
        record_property(f"{name}, median of 20, ms", round(median, 1))
    assert statistics.median(paints["first paint"]) < 10 * PROMISED_MS["first paint"]
    assert max(medians.values()) < 10 * PROMISED_MS["change"]
