"""Write a state as one HTML file that loads nothing: figures, table, notes, settings and commands.

Use :func:`report_html` for the text and :func:`write_report` for the file. The figures are those of the page; the file
contains the script that draws them, about 5 MB.
"""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from html import escape
from importlib.metadata import version
from pathlib import Path

import numpy as np

from simulator._version import __version__
from simulator.errors import InputError, needs_extra
from simulator.explore.address import read_query, to_query
from simulator.explore.charts import CARDS, charts
from simulator.explore.commands import commands
from simulator.explore.layout import PAGE, PHONE
from simulator.explore.map_chart import map_chart
from simulator.explore.markup import commands_html, texts
from simulator.explore.page import own_label
from simulator.explore.predictions import predictions
from simulator.explore.state import EXISTING, State
from simulator.files.write import write_whole
from simulator.units import percent

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""Content that a browser may load for the report: nothing."""

_DRAW = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const narrow = window.matchMedia("screen and (max-width: 720px)");
function draw() {
  for (const [name, figure] of Object.entries(figures[narrow.matches ? "phone" : "page"])) {
    document.getElementById(name).style.height = `${figure.layout.height}px`;
    Plotly.react(name, figure.data, figure.layout, {displayModeBar: false, responsive: true});
  }
}
narrow.addEventListener("change", draw);
draw();
"""

_STYLE = """
body.report { background: #fff; }
.report main { max-width: 704px; margin: 0 auto; padding: 20px 0 40px; }
.report h1 { font-size: 22px; }
.report .card { margin-top: 16px; break-inside: avoid; }
.report .card.long { break-inside: auto; }
.report .table { max-height: none; overflow: visible; }
.report table { font-size: 9.5px; }
.report th, .report td { padding: 2px 3px; position: static; }
.report tr { break-inside: avoid; }
.report dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 8px 0; font-size: 13px; }
.report dt { color: var(--soft); } .report dd { margin: 0; overflow-wrap: anywhere; }
.report .command { grid-template-columns: 130px minmax(0, 1fr); }
.report .notes { max-height: none; }
@page { size: A4; margin: 12mm; }
@media print { .report main { padding: 0; } body { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
@media screen and (max-width: 720px) { .report main { padding: 12px 8px; } .report .table { overflow-x: auto; } }
"""


def plotly_js() -> str:
    """Return the script that draws the figures. It needs Plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise needs_extra("the report", "explore", "plotly") from None
    return str(get_plotlyjs())


def report_html(state: State) -> str:
    """Return the report as HTML; InputError if the state cannot be predicted. It needs Plotly."""
    found = predictions(state)
    if found.problem:
        raise InputError(found.problem)
    script = plotly_js()
    figures = {
        name: {**charts(state, most), "crossover": map_chart(state, most)}
        for name, most in (("page", PAGE), ("phone", PHONE))
    }
    content, cards = texts(state), ""
    pinned = f'<section class="card">{content["pinned"]}</section>' if state.pin is not None else ""
    for name, title in CARDS.items():
        height = figures["page"][name]["layout"]["height"]
        cards += (
            f'<section class="card" id="card-{name}"><div class="head"><h2>{content.get(f"h-{name}", title)}</h2></div>'
            f'<div id="{name}" style="height:{height}px" role="img" aria-label="{title}"></div>'
            f'<div class="about">{content[f"about-{name}"]}</div></section>'
        )
    embedded = json.dumps(figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    css = Path(__file__).with_name("assets").joinpath("explore.css").read_text(encoding="utf-8")
    table = f'<div class="table" id="table">{content["table"]}</div>'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>prunesim report: {content["title"]}</title>
<style>{css}{_STYLE}</style>
</head>
<body class="report" data-phase="{state.phase}">
<main>
<h1>How much faster will a pruned model be?</h1>
<p class="title">{content["title"]}</p>
{_settings(state)}
{content["facts"]}
{content["notes"]}
{pinned}
<noscript><p class="error">The figures need the script in this file; the table below does not.</p></noscript>
{cards}
<section class="card long"><div class="head"><h2>Table</h2></div>{table}</section>
<section class="card"><div class="head"><h2>The same numbers from the command line</h2></div>
{commands_html(commands(state, found), copy=False)}</section>
</main>
<script type="application/json" id="figures">{embedded}</script>
<script>{script}</script>
<script>{_DRAW}</script>
</body>
</html>
"""


def write_report(state: State, path: str | Path) -> int:
    """Write the report whole; return its number of bytes."""
    content = report_html(state).encode("utf-8")
    write_whole(path, content)
    return len(content)


def _settings(state: State) -> str:
    """Return settings, date and versions."""
    at = f" at {percent(state.at)}" if state.explained in state.drawn else ""
    python, plotly = platform.python_version(), version("plotly")
    rows = {
        "Model": own_label("model", state.model),
        **({"Pruned model": own_label("pruned", state.pruned)} if state.pruned else {}),
        "GPUs": ", ".join(profile.label for profile in state.profiles),
        "Families": ", ".join(state.drawn),
        "Sparsities": ", ".join(percent(s) for s in state.fractions),
        **({"Prunings": "; ".join(state.texts)} if state.texts else {}),
        "In detail": "the pruned model" if state.explained == EXISTING else f"{state.explained}{at}",
        "Created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "Versions": f"prunesim {__version__}, Python {python}, NumPy {np.__version__}, Plotly {plotly}",
        "Page": _address(state),
    }
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in rows.items())}</dl>"


def _address(state: State) -> str:
    """Return the address of the same page; none if the state names files, because the page opens no files."""
    query = to_query(state)
    if read_query(query) == (state, ()):
        return f"prunesim explore, address ?{query}"
    return "none: the page accepts only shipped names and limits its work; use the commands"
