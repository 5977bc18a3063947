"""A real browser on the real page: the command as a process, Chromium without a screen, and what a person does with both.

Use :func:`absent` for the reason why there is no browser here, :func:`serving` for the command, :func:`chromium` for the browser and
:class:`Tab` for one page in it, :func:`check` to compare what it shows with what is predicted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

import simulator
from simulator.explore.state import State, read_query
from simulator.figures.style import label
from simulator.predict.rows import Record
from simulator.predict.settings import Setting
from simulator.units import percent, ratio, seconds

PRUNESIM = (sys.executable, "-c", "import sys; sys.argv[0] = 'prunesim'; from calibration.cli import main; main()")
"""The command, of this environment whatever the search path says."""

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
"""The browser calls nobody on its own account."""

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


# -- the command --------------------------------------------------------------------------------------------------------------------


def start(*options: str, **more: Any) -> subprocess.Popen[str]:
    """``prunesim explore`` with options, as a process."""
    command = (*PRUNESIM, "explore", "--no-browser", "--json", *options)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """The address of a served page; the process ends with the block."""
    with start(*(options or ("--port", "0"))) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)


def prunesim(*arguments: str, cwd: str | os.PathLike[str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command that ends."""
    return subprocess.run((*PRUNESIM, *arguments), capture_output=True, text=True, check=False, timeout=120, cwd=cwd)


# -- the browser --------------------------------------------------------------------------------------------------------------------


@contextmanager
def chromium() -> Iterator[Any]:
    """The system's Chromium, without a screen, in a home of its own."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        environment: dict[str, str | float | bool] = {
            **os.environ,
            "HOME": home,
            "XDG_CONFIG_HOME": home,
            "XDG_CACHE_HOME": home,
        }
        browser = playwright.chromium.launch(executable_path=program(), args=list(QUIET), env=environment)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Tab:
    """One page in a context of its own, with all it asked for and all it complained of.

    Attributes
    ----------
    page : playwright.sync_api.Page
    url : str
        Address of the server.
    requests : list of str
        Every address that was asked for.
    complaints : list of str
        Errors and warnings of the console, exceptions nobody caught, requests that failed.
    """

    page: Any
    url: str = ""
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def listen(self) -> None:
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on(
            "console",
            lambda m: self.complaints.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None,
        )
        self.page.on("pageerror", lambda e: self.complaints.append(f"exception: {e}"))
        self.page.on("dialog", self._dialogue)
        self.page.on("response", lambda r: self.complaints.append(f"{r.status}: {r.url}") if r.status >= 400 else None)

    def _dialogue(self, dialogue: Any) -> None:
        self.complaints.append(f"dialogue: {dialogue.message}")
        dialogue.dismiss()

    @property
    def elsewhere(self) -> list[str]:
        """Requests that left this machine."""
        local = {"127.0.0.1", None}
        return [
            r
            for r in self.requests
            if urlsplit(r).hostname not in local or not r.startswith(("http://", "blob:", "data:", "file:"))
        ]

    # -- going ----------------------------------------------------------------------------------------------------------------------

    def open(self, query: str = "") -> Tab:
        self.page.goto(self.url + query)
        self.settle()
        return self

    def settle(self) -> None:
        """Wait until page, figures and map show what the address says."""
        self.page.evaluate(SETTLE)

    @property
    def query(self) -> str:
        """The query of the address."""
        return str(urlsplit(self.page.url).query)

    # -- seeing ---------------------------------------------------------------------------------------------------------------------

    def figure(self, name: str) -> dict[str, Any]:
        """The Plotly figure that an element draws: ``data`` and ``layout`` as Plotly holds them."""
        found: dict[str, Any] = self.page.evaluate(FIGURE, name)
        return found

    def table(self) -> list[list[str]]:
        """Cells of the table, its header first."""
        rows: list[list[str]] = self.page.evaluate(
            "[...document.querySelectorAll('#table tr')].map((r) => [...r.children].map((c) => c.innerText.trim()))"
        )
        return rows

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).inner_text())


# -- what is shown and what is predicted ------------------------------------------------------------------------------------------


def predicted(state: State) -> tuple[Record, ...]:
    """The table of a state, asked from the Python interface."""
    setting = Setting(new_tokens=state.new_tokens, runtime=state.runtime, dtype=state.dtype)
    model = state.load()
    table = simulator.table(
        [model], state.gpus, state.drawn, state.fractions, [state.phase], [state.batch], [state.seq], setting=setting
    )
    return table.records


def check(tab: Tab, state: State) -> None:
    """Address, controls, table, curves and waterfall show the state as the Python interface predicts it."""
    assert read_query(tab.query) == (state, ())
    controls = tab.page.evaluate("Object.fromEntries(new FormData(document.getElementById('controls')))")
    assert {name: controls[name] for name in ("model", "phase", "runtime", "dtype", "detail")} == {
        "model": state.model,
        "phase": state.phase,
        "runtime": state.runtime,
        "dtype": state.dtype,
        "detail": state.detail,
    }
    assert [int(controls[name]) for name in ("batch", "seq", "new")] == [state.batch, state.seq, state.new_tokens]
    checked = "(name) => [...document.querySelectorAll(`[name=${name}]:checked`)].map((e) => e.value)"
    assert set(tab.page.evaluate(checked, "gpu")) == set(state.gpus)
    assert set(tab.page.evaluate(checked, "family")) == set(state.families)
    records = predicted(state)
    assert tab.text("#title").startswith(f"{records[0].model}, {state.phase}, batch {state.batch}, seq {state.seq}")
    rows = {(row[0], row[1], row[3]): row for row in tab.table()[1:]}
    assert len(rows) == len(records)
    curves = [t for t in tab.figure("speedup")["data"] if "markers" in t["mode"]]
    gpus = list(dict.fromkeys(r.hardware for r in records))
    for r in records:
        row = rows[(label(r.family), percent(r.sparsity), r.hardware)]
        assert row[4:6] == [ratio(r.speedup), f"{ratio(r.speedup_lower)} to {ratio(r.speedup_upper)}"]
        assert row[6:11] == [
            ratio(r.flop_bound),
            ratio(r.byte_bound),
            ratio(r.roofline_bound),
            seconds(r.pruned_s),
            r.limit,
        ]
        axis = ("", *map(str, range(2, 20)))[gpus.index(r.hardware)]
        (curve,) = [t for t in curves if t["name"] == label(r.family) and t.get("xaxis", "x") == f"x{axis}"]
        assert curve["y"][curve["x"].index(100 * r.sparsity)] == r.speedup
    bars = [t for t in tab.figure("waterfall")["data"] if t["type"] == "bar"]
    chosen = [r for r in records if r.family == state.detail and r.sparsity == state.at]
    assert [t["base"][-1] + t["x"][-1] for t in bars] == pytest.approx([r.speedup for r in chosen], rel=1e-9)


# -- scripts -----------------------------------------------------------------------------------------------------------------------

CLASHES = """() => {
  // texts of figures that lie on one another or outside their figure
  const found = [];
  for (const chart of document.querySelectorAll(".js-plotly-plot")) {
    const frame = chart.getBoundingClientRect();
    const texts = [...chart.querySelectorAll("svg text")].filter((t) => t.textContent.trim())
      .map((t) => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([a, r], i) => {
      const across = r.left < frame.left - 1 || r.right > frame.right + 1, down = r.top < frame.top - 1 || r.bottom > frame.bottom + 1;
      if (across || down) found.push(`${chart.id}: ${a} is cut`);
      for (const [b, q] of texts.slice(i + 1)) {
        const across = Math.min(r.right, q.right) - Math.max(r.left, q.left), down = Math.min(r.bottom, q.bottom) - Math.max(r.top, q.top);
        if (across > 2 && down > 3) found.push(`${chart.id}: ${a} on ${b}`);
      }
    });
  }
  return found;
}"""

OUTSIDE = """() => {
  // elements that stick out of the window, or whose text is cut, unless they can be scrolled to
  const width = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > width) found.push(`the page scrolls to ${document.documentElement.scrollWidth}`);
  const scrolls = (e) => e && (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  for (const e of document.querySelectorAll("header *, form *, main *, summary")) {
    if (e.closest("svg, .skip") || scrolls(e)) continue;
    const r = e.getBoundingClientRect();
    const name = `${e.tagName} ${e.id || e.className}`, text = !e.children.length && !["INPUT", "SELECT", "OPTION"].includes(e.tagName);
    if (r.width && (r.right > width + 1 || r.left < -1)) found.push(`${name} reaches from ${r.left} to ${r.right}`);
    if (text && e.clientWidth && e.scrollWidth > e.clientWidth + 1) found.push(`${name} is cut: ${e.textContent}`);
  }
  return found;
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
