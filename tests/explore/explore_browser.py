"""A real browser on the real page, served by this process or by the command, and a comparison of what is shown and
predicted."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

import simulator
from simulator.explore.address import KEYS, read_query
from simulator.explore.charts import CARDS, charts
from simulator.explore.layout import WIDE
from simulator.explore.map_chart import map_chart
from simulator.explore.predictions import predictions
from simulator.explore.state import State, typed
from simulator.prediction.result import Result
from simulator.prediction.scenario import batch_name
from simulator.units import percent, ratio, seconds

PRUNESIM = (sys.executable, "-c", "import sys; sys.argv[0] = 'prunesim'; from simulator.cli import main; main()")

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-component-update", "--disable-sync")
"""With what Playwright passes itself: the browser calls nobody on its own account."""

LAPTOP, PHONE = {"width": 1366, "height": 768}, {"width": 390, "height": 844}


def program() -> str | None:
    """Chromium as the system has it; none is ever downloaded."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def absent() -> str:
    """Why nothing can be tested in a browser here; empty when it can."""
    for module, extra in (("dash", "explore"), ("plotly", "explore"), ("playwright", "browser")):
        if importlib.util.find_spec(module) is None:
            return f'no module {module}: pip install -e ".[{extra}]"'
    return "" if program() else "no chromium on the search path: install the system's package chromium"


needs_browser = pytest.mark.skipif(bool(absent()), reason=absent() or "all there")


def start(*options: str, interrupt: signal.Handlers = signal.SIG_DFL) -> subprocess.Popen[str]:
    """The command as a process, and how it finds SIGINT: what a shell starts in the background finds it ignored."""
    command = (*PRUNESIM, "explore", "--no-browser", "--json", *options)
    before = signal.signal(signal.SIGINT, interrupt)  # what is ignored here, or by default, a child inherits
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def serving() -> Iterator[str]:
    """The address of a served page."""
    from simulator.explore.app import server

    served = server(0)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{served.port}/"
    finally:
        served.shutdown()
        thread.join()
        served.server_close()


@contextmanager
def chromium() -> Iterator[Any]:
    """The system's Chromium, without a screen, in a home of its own."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        environment: Any = {**os.environ, **dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), home)}
        browser = playwright.chromium.launch(executable_path=program(), args=list(QUIET), env=environment)
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """One page in a context of its own, with every address it asked for and all it complained of: errors and warnings
    of the console, exceptions nobody caught, requests that failed."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda r: self.requests.append(r.url))
        page.on("console", lambda m: self._complain(m.type in ("error", "warning"), f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: self._complain(True, f"exception: {e}"))
        page.on("dialog", lambda d: (self._complain(True, f"dialogue: {d.message}"), d.dismiss()))
        page.on("response", lambda r: self._complain(r.status >= 400, f"{r.status}: {r.url}"))

    def _complain(self, bad: bool, line: str) -> None:
        self.complaints += [line] if bad else []

    @property
    def elsewhere(self) -> list[str]:
        """Requests that left this machine."""
        here = ("http://", "blob:", "data:", "file:")
        return [r for r in self.requests if urlsplit(r).hostname not in {"127.0.0.1", None} or not r.startswith(here)]

    def open(self, query: str = "") -> Tab:
        self.page.goto(self.url + query)
        self.wait_until_shown()
        return self

    def go(self, query: str = "") -> Tab:
        """Another state of the page, as a step back leads to it: quicker than loading it anew, which is done only where
        another page is open."""
        if self.page.url.startswith(self.url):
            self.page.evaluate(GO, query or "?")
            self.wait_until_shown()
            return self
        return self.open(query)

    def wait_until_shown(self) -> None:
        """Wait until page, figures and map show what the address says."""
        self.page.evaluate(SETTLE)

    def fill(self, **values: object) -> None:
        for name, value in values.items():
            self.page.fill(f"#{name}", str(value))
        self.wait_until_shown()

    @property
    def query(self) -> str:
        return str(urlsplit(self.page.url).query)

    def figure(self, name: str) -> Any:
        """The Plotly figure that an element draws: ``data`` and ``layout`` as Plotly holds them."""
        return self.page.evaluate(FIGURE, name)

    def figures(self) -> list[Any]:
        return [self.figure(name) for name in CARDS]

    def table(self) -> Any:
        cells = "[...document.querySelectorAll('#table tr')].map((r) => [...r.children].map((c) => c.innerText.trim()))"
        return self.page.evaluate(cells)

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).inner_text())


def predicted(state: State) -> tuple[Result, ...]:
    case: Any = ([state.phase], [state.batch], [state.seq])
    families, sparsities = state.drawn, state.fractions
    return simulator.table([state.load()], state.profiles, families, sparsities, *case, scenario=state.scenario).rows


def check(tab: Tab, state: State) -> None:
    """Address, controls, table and figures show the state as the Python interface predicts it."""
    assert read_query(tab.query, [gpu for gpu in state.gpus if "/" in gpu]) == (state, ())
    controls = tab.page.evaluate("Object.fromEntries(new FormData(document.getElementById('controls')))")
    for name in {*KEYS} - {"gpu", "family", "sparsity", "at", "new", "dense", "ttft", "tpot", "price", "prune", "pin"}:
        assert controls[name] == str(getattr(state, name))
    assert read_query(f"prune={quote(controls['prune'])}")[0].prune == state.prune
    assert read_query(controls["pin"])[0] == (state.pin or State())
    assert controls["new"] == str(state.new_tokens)
    assert [controls[n] for n in ("dense", "ttft", "tpot", "price")] == [
        typed(n) for n in (state.dense_ms, state.ttft_ms, state.tpot_ms, state.price)
    ]
    checked = "(name) => [...document.querySelectorAll(`[name=${name}]:checked`)].map((e) => e.value)"
    assert set(tab.page.evaluate(checked, "gpu")) == set(state.gpus)
    assert set(tab.page.evaluate(checked, "family")) == set(state.families)
    records, gpus = predictions(state).candidates, [profile.label for profile in state.profiles]
    families = predicted(state)
    assert [c.result.speedup for c in records[: len(families)]] == [r.speedup for r in families]
    assert {c.result.hardware for c in records} == {*gpus}
    assert tab.text("#title").startswith(
        f"{records[0].result.model}, {state.phase}, {batch_name(state.phase)} {state.batch}, seq {state.seq}"
    )
    rows = {(row[0], row[1], row[3]): row[4:11] for row in tab.table()[1:]}
    assert len(rows) == len(records)
    for c in records:
        r = c.result
        interval = f"{ratio(r.speedup_lower)} to {ratio(r.speedup_upper)}"
        bounds = map(ratio, (r.flop_bound, r.byte_bound, r.roofline_bound))
        shown = [ratio(r.speedup), interval, *bounds, seconds(r.pruned_s), r.bottleneck]
        assert rows[c.title, percent(r.sparsity), r.hardware] == shown
    for name, chart in {**charts(state, WIDE), "crossover": map_chart(state, WIDE)}.items():
        assert tab.figure(name)["data"] == json.loads(json.dumps(chart["data"])), name


CLASHES = """() => {
  // texts of figures that lie on one another or outside their figure
  const found = [];
  for (const chart of document.querySelectorAll(".js-plotly-plot")) {
    const frame = chart.getBoundingClientRect();
    const texts = [...chart.querySelectorAll("svg text")].filter((t) => t.textContent.trim())
      .map((t) => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([a, r], i) => {
      const across = r.left < frame.left - 1 || r.right > frame.right + 1;
      if (across || r.top < frame.top - 1 || r.bottom > frame.bottom + 1) found.push(`${chart.id}: ${a} is cut`);
      for (const [b, q] of texts.slice(i + 1)) {
        const across = Math.min(r.right, q.right) - Math.max(r.left, q.left);
        const down = Math.min(r.bottom, q.bottom) - Math.max(r.top, q.top);
        if (across > 2 && down > 3) found.push(`${chart.id}: ${a} on ${b}`);
      }
    });
  }
  return found;
}"""

OUTSIDE = """() => {
  // elements that stick out of the window, or whose text is cut, unless they can be scrolled to
  const width = document.documentElement.clientWidth, found = [];
  const whole = document.documentElement.scrollWidth;
  if (whole > width) found.push(`the page scrolls to ${whole}`);
  const scrolls = (e) => e && (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  for (const e of document.querySelectorAll("header *, form *, main *, summary")) {
    if (e.closest("svg, .skip") || scrolls(e)) continue;
    const r = e.getBoundingClientRect();
    const name = `${e.tagName} ${e.id || e.className}`;
    const text = !e.children.length && !["INPUT", "SELECT", "OPTION"].includes(e.tagName);
    if (r.width && (r.right > width + 1 || r.left < -1)) found.push(`${name} reaches from ${r.left} to ${r.right}`);
    if (text && e.clientWidth && e.scrollWidth > e.clientWidth + 1) found.push(`${name} is cut: ${e.textContent}`);
  }
  return found;
}"""

GO = """(query) => {
  history.pushState(null, "", query);
  dispatchEvent(new PopStateEvent("popstate"));
}"""

FIGURE = """(name) => {
  const gd = document.querySelector(`#${name}`);
  const plain = (v) => JSON.parse(JSON.stringify(v, (k, x) => (ArrayBuffer.isView(x) ? [...x] : x)));
  return {data: plain(gd.data), layout: plain(gd.layout), drawn: gd.querySelectorAll("svg.main-svg").length > 0};
}"""

SETTLE = """() => new Promise((done) => {
  const marks = document.documentElement.dataset;
  const wait = () => {
    const asked = location.search || "?";
    if (marks.shown !== asked || marks.mapped !== asked) return setTimeout(wait, 5);
    requestAnimationFrame(() => requestAnimationFrame(done));
  };
  setTimeout(wait, 0);
})"""
