"""A served page and a browser for all tests of a module that need them, and a tab for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from explore_browser import LAPTOP, Tab, chromium, serving


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def new_tab(url: str, browser: Any) -> Iterator[Callable[..., Tab]]:
    """Makes tabs. Afterwards none may have asked for anything elsewhere or complained, unless a test cleared that."""
    tabs = []

    def make(**options: Any) -> Tab:
        context = browser.new_context(**{"viewport": LAPTOP, "accept_downloads": True, **options})
        context.set_default_timeout(15_000)
        tabs.append(Tab(context.new_page(), url))
        return tabs[-1]

    yield make
    for tab in tabs:
        tab.page.context.close()
    assert [line for tab in tabs for line in (*tab.elsewhere, *tab.complaints)] == []


@pytest.fixture
def tab(new_tab: Callable[..., Tab]) -> Tab:
    return new_tab()
