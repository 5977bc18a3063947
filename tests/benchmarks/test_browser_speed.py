"""How long the page takes to answer each change: the server (texts and the first three figures), and the browser from
the input event until all are painted (``answer``), and the map too (``map``)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from explore_browser import LAPTOP, Tab, chromium, needs_browser, serving
from test_browser import CHANGES

from simulator.explore.address import read_query, to_query
from simulator.explore.charts import charts
from simulator.explore.layout import WIDE
from simulator.explore.markup import texts
from simulator.explore.state import State

FIRST_PAINT_MS, CHANGE_MS = 2000.0, 300.0
TIMES = 2
Floor = Callable[..., None]

MEASURED = [(act, change) for act, change in CHANGES if "seq" not in change]
"""Changes, each on top of those before; the length stays, so that each state is one that nobody asked for before."""

WATCH = """() => {
  const root = document.documentElement, marks = root.dataset, watch = window.watched = {};
  const next = (f) => requestAnimationFrame(() => setTimeout(f, 0));
  const now = () => performance.now();
  for (const name of ["speedup", "roofline", "waterfall", "crossover"]) {
    document.querySelector(`#${name}`).on("plotly_afterplot", () => {
      if (watch.begun) next(() => (watch[name] = now()));
    });
  }
  const begin = (event) => {
    if (!event.target.form || event.target.form.id !== "controls") return;
    Object.keys(watch).forEach((k) => delete watch[k]);
    watch.begun = event.timeStamp;
  };
  document.addEventListener("input", begin, true);
  document.addEventListener("change", (event) => { if (event.target.type === "text") begin(event); }, true);
  new MutationObserver(() => {
    const asked = location.search || "?";
    if (marks.shown === asked && !watch.shown) next(() => (watch.shown = now()));
    if (marks.mapped === asked && !watch.mapped) next(() => (watch.mapped = now()));
  }).observe(root, { attributes: true });
}"""

READ = """async () => {
  const w = window.watched, keys = ["shown", "mapped", "speedup", "roofline", "waterfall", "crossover"];
  for (let i = 0; i < 4000 && !keys.every((k) => w[k]); i++) await new Promise((r) => setTimeout(r, 5));
  const since = (...k) => Math.max(...k.map((x) => w[x])) - w.begun;
  return [since("shown", "speedup", "roofline", "waterfall"), since(...keys)];
}"""


def _print(times: dict[str, list[float]]) -> None:
    for name, values in times.items():
        print(f"{name[:60]:60} min {min(values):5.0f} ms  median {statistics.median(values):5.0f} ms  of {len(values)}")


def test_the_server(floor: Floor) -> None:
    """In processor time, which nothing else on the machine adds to."""
    times: dict[str, list[float]] = {}
    for seq in range(700, 700 + TIMES):
        state = State(seq=seq)
        for _, change in MEASURED:
            state = replace(state, **change)
            query, begin = to_query(state), time.thread_time()
            asked, _ = read_query(query)
            texts(asked), charts(asked, WIDE)
            took = 1000 * (time.thread_time() - begin)
            ((name, value),) = change.items()
            times.setdefault(f"{name} {value}, server", []).append(took)
    _print(times)
    slowest = max(statistics.median(values) for values in times.values())
    floor("milliseconds of the server for the slowest change", slowest, CHANGE_MS, False)


@needs_browser
def test_the_browser(floor: Floor) -> None:
    with serving() as url, chromium() as browser:
        tab = Tab(browser.new_context(viewport=LAPTOP).new_page(), url).open(f"?{to_query(State(seq=300))}")
        paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        times = {"all figures": [tab.page.evaluate("performance.now()")], "first paint": [tab.page.evaluate(paint)]}
        tab.page.evaluate(WATCH)
        for act, change in MEASURED:
            act(tab.page)
            ((name, value),) = change.items()
            for part, found in zip(("answer", "map"), tab.page.evaluate(READ)):
                times[f"{name} {value}, {part}"] = [found]
        tab.page.context.close()
    _print(times)
    answers = [values[0] for name, values in times.items() if name.endswith("answer")]
    floor("milliseconds to the first paint", times["first paint"][0], FIRST_PAINT_MS, False)
    floor("milliseconds to answer a change, median", statistics.median(answers), CHANGE_MS, False)
    floor("milliseconds to answer a change, slowest", max(answers), 3 * CHANGE_MS, False)
