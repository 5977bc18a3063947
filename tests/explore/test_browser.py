"""The served page and the report in a real browser, at the widths of a phone and of a desktop."""

from __future__ import annotations

import http.client
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from simulator.cli import run

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

NEEDED = {"streamlit": "explore", "playwright": "browser"}
ABSENT = [
    f'no module {m}: pip install -e ".[{NEEDED[m]}]"'
    for m in NEEDED
    if importlib.util.find_spec(m) is None
]
ABSENT += (
    [] if PROGRAM else ["no chromium on the search path: install the system's package chromium"]
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ABSENT), reason="; ".join(ABSENT) or "all there"),
]

WIDTHS = [390, 1400]


def explore(*options: str) -> subprocess.Popen[str]:
    """The command as a process."""
    words = [sys.executable, "-m", "simulator.cli", "explore", *options]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a served page; the server ends with status 0 when it is interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMLIT_SERVER_ADDRESS", "0.0.0.0")  # the command overrides it
        patch.setenv(
            "PYTHONPATH",
            os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        )
        served = explore("--port", "0")
    found = None
    while found is None and (line := served.stdout.readline()):
        found = re.search(r"URL: (http://127\.0\.0\.1:\d+)", line)
    assert found, "no address was printed"
    yield found[1]
    served.send_signal(signal.SIGINT)
    served.communicate(timeout=30)
    assert served.returncode == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(
            executable_path=PROGRAM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield found
        found.close()


@pytest.fixture(params=WIDTHS)
def tab(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A tab of one width, which loads nothing from elsewhere and reports no error."""
    context = browser.new_context(
        viewport={"width": request.param, "height": 900}, accept_downloads=True
    )
    context.set_default_timeout(30_000)
    made, hosts, errors = context.new_page(), set[str | None](), list[str]()
    made.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    made.on("pageerror", lambda error: errors.append(str(error)))
    yield made
    context.close()
    assert hosts <= {"127.0.0.1", None}
    assert errors == []


def fits(tab: Any) -> bool:
    """Whether nothing makes the page wider than the screen."""
    return bool(tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


def settle(tab: Any) -> None:
    """Wait until the page's program has run: until then it shows elements of the run before."""
    state = "document.querySelector('[data-testid=stApp]')?.getAttribute('data-test-script-state')"
    tab.wait_for_function(
        f"{state} === 'notRunning' && document.querySelector('[data-testid=stCode]') !== null"
    )
    tab.wait_for_function(
        "[...document.querySelectorAll('figure img')].every(e => e.complete && e.naturalWidth > 0)"
    )


def drawn(tab: Any, selector: str) -> list[Any]:
    """Widths of figures as drawn, which are also those of their names."""
    return list(
        tab.evaluate(
            f"[...document.querySelectorAll('{selector}')].map(e =>"
            " e.getBoundingClientRect().width)"
        )
    )


def test_the_page_answers_changes_and_downloads(
    tab: Any, url: str, tmp_path: Path, cli: Any
) -> None:
    tab.goto(f"{url}/?sparsity={quote('25%')}&evil={quote('<img src=x onerror=alert(1)>')}")
    tab.get_by_text("Settings of the address that were ignored: evil").wait_for()
    settle(tab)
    assert len(drawn(tab, "figure img")) == 3
    main, *others = drawn(tab, "figure img")
    # the main figure takes the whole width, and scrolls on a phone
    assert main >= max(640, 0.6 * tab.viewport_size["width"])
    assert all(300 <= width <= 600 for width in others)
    assert fits(tab)
    if tab.viewport_size["width"] < 700:
        tab.get_by_test_id("stExpandSidebarButton").click()
    batch = tab.get_by_label("Batch", exact=True)
    batch.fill("64")
    batch.press("Enter")
    tab.wait_for_url("**batch=64**")
    tab.get_by_text("(decode, batch 64, seq 2048)").first.wait_for()
    settle(tab)
    assert fits(tab)
    line = tab.get_by_test_id("stCode").inner_text().splitlines()[0]
    with tab.expect_download() as download:
        tab.get_by_role("button", name="All columns as CSV").dispatch_event("click")
    shown = cli.out(f"{line.removeprefix('prunesim ')} --csv -")
    assert Path(download.value.path()).read_text() == shown
    tab.reload()
    tab.get_by_text("(decode, batch 64, seq 2048)").first.wait_for()


def test_a_report_is_readable_and_wide_figures_scroll(tab: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    words = (
        "report llama-3.1-8b --hardware h100,a100,4090 --family depth --sparsity 0.25,0.5 --phase"
        " decode"
    )
    assert run([*words.split(), "-o", str(path)]) == 0
    tab.goto(path.as_uri())
    assert fits(tab)
    assert tab.locator("svg").count() == 3
    assert min(drawn(tab, "svg")) >= 640
    assert tab.locator(".answer").first.bounding_box()["y"] < 300


def test_a_port_in_use_is_one_line(url: str) -> None:
    again = explore("--port", str(urlsplit(url).port))
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 2
    assert out.startswith(f"prunesim: --port {urlsplit(url).port}: ")
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("", "", 101),
        ("", "http://example.com", 403),
        # a name that resolves to this machine (DNS rebinding)
        ("example.com:{port}", "http://example.com:{port}", 403),
    ],
)
def test_pages_of_other_hosts_cannot_connect(url: str, host: str, origin: str, status: int) -> None:
    at = urlsplit(url)
    host, origin = (text.format(port=at.port) for text in (host or at.netloc, origin or url))
    connection = http.client.HTTPConnection(at.netloc, timeout=30)
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    headers |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Origin": origin, "Host": host}
    connection.request("GET", "/_stcore/stream", headers=headers)
    assert connection.getresponse().status == status
    connection.close()
