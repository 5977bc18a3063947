"""A served page and a browser for all tests of a run that need them, and a tab for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from explore_browser import LAPTOP, Tab, absent, chromium, serving


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Address of the page, served by the command as a process of its own."""
    if reason := absent():
        pytest.skip(reason)
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium."""
    if reason := absent():
        pytest.skip(reason)
    with chromium() as found:
        yield found


@pytest.fixture
def new_tab(url: str, browser: Any) -> Iterator[Callable[..., Tab]]:
    """Makes tabs. Afterwards none of them may have asked for anything elsewhere or complained, unless a test cleared its complaints."""
    contexts, tabs = [], []

    def make(**options: Any) -> Tab:
        context = browser.new_context(**{"viewport": LAPTOP, "accept_downloads": True, **options})
        context.set_default_timeout(15_000)
        contexts.append(context)
        tab = Tab(context.new_page(), url)
        tab.listen()
        tabs.append(tab)
        return tab

    yield make
    for context in contexts:
        context.close()
    assert [line for tab in tabs for line in (*tab.elsewhere, *tab.complaints)] == []


@pytest.fixture
def tab(new_tab: Callable[..., Tab]) -> Tab:
    """One tab on a laptop."""
    return new_tab()
