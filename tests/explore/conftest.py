"""A served page and a browser for all tests that need them, and tabs: one that all share, and new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from explore_browser import LAPTOP, Tab, chromium, serving


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    with serving() as found:
        yield found


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def _made(url: str, browser: Any, **options: Any) -> Tab:
    context = browser.new_context(**{"viewport": LAPTOP, "accept_downloads": True, **options})
    context.set_default_timeout(15_000)
    return Tab(context.new_page(), url)


@pytest.fixture
def new_tab(url: str, browser: Any) -> Iterator[Callable[..., Tab]]:
    """Makes tabs. Afterwards none may have asked for anything elsewhere or complained, unless a test cleared that."""
    tabs = []

    def make(**options: Any) -> Tab:
        tabs.append(_made(url, browser, **options))
        return tabs[-1]

    yield make
    for tab in tabs:
        tab.page.context.close()
    assert [line for tab in tabs for line in (*tab.elsewhere, *tab.complaints)] == []


@pytest.fixture(scope="session")
def shared(url: str, browser: Any) -> Tab:
    return _made(url, browser, permissions=["clipboard-read", "clipboard-write"])


@pytest.fixture
def tab(shared: Tab) -> Iterator[Tab]:
    """The tab that tests use one after the other: what one loaded the next need not load anew."""
    shared.requests.clear()
    yield shared
    found = [*shared.elsewhere, *shared.complaints]
    shared.complaints.clear()
    assert found == []
