"""Write a plan as one HTML file that loads nothing: its figure, its layers, what other rules choose, and its frontier.

Use :func:`plan_html` for the text and :func:`write_plan_report` for the file.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from html import escape
from pathlib import Path

from simulator._version import __version__
from simulator.display import items_html, table_html
from simulator.figures.plan import plan_figure
from simulator.figures.style import paper_style
from simulator.files.write import write_whole
from simulator.plans.compared import PlanPoint
from simulator.plans.search import Plan
from simulator.plans.solve import NAMES, target_text
from simulator.prediction.conclusions import speedup_text
from simulator.units import parameters, percent, ratio, seconds

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content that a browser may load for the page: nothing."""

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
main { max-width: 960px; margin: 0 auto; padding: 20px 12px 40px; }
h1 { font-size: 22px; } h2 { font-size: 16px; margin: 28px 0 6px; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 12px; }
th, td { padding: 2px 8px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
.table { overflow-x: auto; }
@page { size: A4; margin: 12mm; }
"""


def plan_html(plan: Plan) -> str:
    """Return a plan as HTML.

    >>> import simulator
    >>> text = plan_html(simulator.search("llama-2-7b", "h100", 1.3, batch=8))
    >>> text.startswith("<!doctype html>"), text.count("<h2>"), "<script" in text
    (True, 5, False)
    """
    first = plan.results[0]
    kept = percent(plan.pruned.parameters / plan.dense_parameters)
    lead = f"{speedup_text(first)} on {first.request}; {plan.metric} {plan.score:.4g}; {kept} of the parameters."
    targets = [
        {
            "device": f"{t.hardware}, {t.engine}",
            "request": f"{t.phase}, {t.batch} x {t.seq}",
            "target": NAMES[t.target],
            "wanted": target_text(t.target, t.wanted),
            "reached": target_text(t.target, t.reached),
            "probability": percent(t.probability),
        }
        for t in plan.targets
    ]
    chosen = next(point for point in plan.frontier if point.chosen)
    rules = [{"chosen by": "time, this search", **_row(plan, chosen), "targets": "met"}]
    rules += [
        {"chosen by": a.rule, **_row(plan, a.point), "targets": "met" if a.meets else "missed"}
        for a in plan.alternatives
    ]
    frontier = [{**_row(plan, point), "": "chosen" if point.chosen else ""} for point in plan.frontier]
    sections = {
        "Layers and frontier": _svg(plan),
        "Targets": _table(targets),
        "What other rules choose, predicted in the first setting": _table(rules),
        "Frontier of score against time": _table(frontier),
        "Layers": _table(asdict(row) | {"score": f"{row.score:.4g}"} for row in plan.layers),
    }
    body = "".join(f"<h2>{escape(title)}</h2>\n{content}\n" for title, content in sections.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>prunesim plan: {escape(plan.model)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>Which layer of {escape(plan.model)} gets what?</h1>
<p>{escape(lead)}</p>
{body}{items_html(plan.notes)}
<p>prunesim {__version__}. Speedups have {plan.results[0].level:.0%} intervals.</p>
</main>
</body>
</html>
"""


def write_plan_report(plan: Plan, path: str | Path) -> None:
    """Write a plan whole as one HTML file."""
    write_whole(path, plan_html(plan).encode("utf-8"))


def _row(plan: Plan, point: PlanPoint) -> dict[str, str]:
    """Return the cells of a plan in a table."""
    return {
        plan.metric: f"{point.score:.4g}",
        "speedup": f"{ratio(point.speedup)} ({ratio(point.speedup_lower)}-{ratio(point.speedup_upper)})",
        "time": seconds(point.pruned_s),
        "parameters": parameters(point.parameters),
    }


def _table(rows: Iterable[Mapping[str, object]]) -> str:
    listed = list(rows)
    columns = {name: [row[name] for row in listed] for name in listed[0]}
    return f'<div class="table">{table_html(columns, most=len(listed))}</div>'


def _svg(plan: Plan) -> str:
    """Return the figure of a plan as an SVG element."""
    import matplotlib.pyplot

    figure, out = plan_figure(plan), io.StringIO()
    with paper_style():  # the same bytes for the same plan
        figure.savefig(out, format="svg", metadata={"Date": None})
    matplotlib.pyplot.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]
