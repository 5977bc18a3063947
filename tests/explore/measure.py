"""How fast the page is: ``python tests/explore/measure.py`` prints the first paint and, for every control, how long it is answered.

A change is timed in the page: from the browser's own time stamp of the input event until the texts, the table and the first three figures
are painted (``answer``), and until the map is painted too (``map``), which the page asks for when it has the rest. Every change asks for
a state that was never asked before, so nothing is answered from memory. Times hold for one machine at one moment; nothing asserts them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from explore_browser import LAPTOP, Tab, absent, chromium, serving

WATCH = """() => {
  const root = document.documentElement, marks = root.dataset;
  const watch = window.watched = {};
  const names = ["speedup", "roofline", "waterfall", "crossover"];
  const next = (f) => requestAnimationFrame(() => setTimeout(f, 0));
  const now = () => performance.now();
  for (const name of names) {
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

PARTS = ("answer", "map")


# -- one change of each control ---------------------------------------------------------------------------------------------------------


def _fresh(tab: Tab, seq: Iterator[int]) -> None:
    """Another sequence in the form, unnoticed by the page, so that the state that the next change asks for is a new one."""
    tab.page.evaluate("(value) => { document.getElementById('seq').value = value; }", str(next(seq)))


def _cycle(selector: str, values: list[str]) -> Callable[[Tab, int], None]:
    return lambda tab, i: tab.page.select_option(selector, values[i % len(values)])


def _fill(selector: str, value: Callable[[int], str], *, leave: bool = False) -> Callable[[Tab, int], None]:
    def act(tab: Tab, i: int) -> None:
        tab.page.fill(selector, value(i))
        if leave:
            tab.page.press(selector, "Enter")

    return act


def _click(name: str, values: list[str]) -> Callable[[Tab, int], None]:
    return lambda tab, i: tab.page.locator(f"input[name={name}][value={values[i % len(values)]}]").click(force=True)


CONTROLS: dict[str, tuple[str, Callable[[Tab, int], None]]] = {
    "model": ("", _cycle("#model", ["qwen3-8b", "llama-3.1-8b", "mistral-7b-v0.3", "llama-2-13b"])),
    "GPUs (one to three)": ("", _click("gpu", ["a100_sxm_80gb", "rtx_4090", "rtx_4090", "a100_sxm_80gb"])),
    "phase": ("", _click("phase", ["decode", "generate", "prefill"])),
    "batch": ("", _fill("#batch", lambda i: str(2 + i))),
    "sequence": ("", _fill("#seq", lambda i: str(100 + i))),
    "new tokens": ("?phase=generate", _fill("#new", lambda i: str(129 + i))),
    "number format": ("?family=depth,width,low_rank", _cycle("#dtype", ["fp16", "bf16"])),
    "runtime": ("", _click("runtime", ["eager", "cuda_graph"])),
    "families": ("", _click("family", ["token", "kv_cache", "unstructured", "sparse_attention"])),
    "sparsities": ("", _fill("#sparsity", lambda i: f"0.1,0.3,0.{50 + i}", leave=True)),
    "family in detail": ("", _cycle("#detail", ["depth", "low_rank", "dynamic_depth", "width"])),
    "sparsity in detail": ("", _fill("#at", lambda i: f"0.{20 + i}")),
}
"""Controls, the address they are tried at, and one change of each."""


def first_paints(browser: Any, url: str, times: int) -> dict[str, list[float]]:
    """First contentful paint of fresh contexts, and when all figures stand there, milliseconds."""
    out: dict[str, list[float]] = {"first paint": [], "all figures": []}
    for _ in range(times):
        context = browser.new_context(viewport=LAPTOP)
        tab = Tab(context.new_page(), url)
        tab.open()
        out["all figures"].append(tab.page.evaluate("performance.now()"))
        out["first paint"].append(
            tab.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        )
        context.close()
    return out


def changes(browser: Any, url: str, times: int) -> dict[str, dict[str, list[float]]]:
    """Times of changes of every control, milliseconds."""
    out: dict[str, dict[str, list[float]]] = {}
    seq = count(300)
    context = browser.new_context(viewport=LAPTOP)
    for name, (query, act) in CONTROLS.items():
        tab = Tab(context.new_page(), url).open(query)
        tab.page.evaluate(WATCH)
        found: dict[str, list[float]] = {part: [] for part in PARTS}
        for i in range(times):
            if name != "sequence":
                _fresh(tab, seq)
            act(tab, i)
            for part, value in zip(PARTS, tab.page.evaluate(READ)):
                found[part].append(value)
        out[name] = found
        tab.page.close()
    context.close()
    return out


def p95(values: list[float]) -> float:
    """The value that one in twenty exceeds."""
    return sorted(values)[max(-(-95 * len(values) // 100) - 1, 0)]


def report(paints: dict[str, list[float]], times: dict[str, dict[str, list[float]]]) -> str:
    """A small table: medians and 95th percentiles."""
    lines = [
        f"{name:20} median {statistics.median(v):5.0f} ms  p95 {p95(v):5.0f} ms  of {len(v)}"
        for name, v in paints.items()
    ]
    lines += ["", f"{'change of':20}" + "".join(f"{part + ' median':>16} {'p95':>6}" for part in PARTS) + "   ms"]
    for name, found in times.items():
        lines.append(f"{name:20}" + "".join(f"{statistics.median(found[p]):16.0f} {p95(found[p]):6.0f}" for p in PARTS))
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, metavar="N", help="changes of each control")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times, milliseconds")
    options = parser.parse_args()
    if reason := absent():
        parser.exit(2, f"{reason}\n")
    with serving() as url, chromium() as browser:
        paints = first_paints(browser, url, options.times)
        times = changes(browser, url, options.times)
    print(report(paints, times))
    if options.json:
        options.json.write_text(json.dumps({"paints": paints, "changes": times}))


if __name__ == "__main__":
    main()
