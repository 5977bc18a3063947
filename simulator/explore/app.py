"""The page as a Dash application, served on this machine only.

Use :func:`make_app` for the application and :func:`server` for a server bound to 127.0.0.1. The page's state is its address: a change of a
control changes the query (``assets/explore.js``), and one callback answers the query with all figures but the map, which is computed in a
callback of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulator._version import __version__
from simulator.errors import InputError
from simulator.explore import markup, needs_extra
from simulator.explore.answer import answer
from simulator.explore.chart import PHONE, WIDE
from simulator.explore.charts import CARDS, charts, map_chart, texts
from simulator.explore.dropped import token
from simulator.explore.page import dropped_label, page_html
from simulator.explore.state import read_query

HOST = "127.0.0.1"
"""The only address that is listened on."""

MOST_REQUEST_BYTES = 4_000_000
"""Largest request body: a dropped file has at most a megabyte, which JSON may double."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""What the browser may load: nothing from elsewhere."""


def load_dash() -> Any:
    """The module ``dash``, or one line that says what to install."""
    try:
        import dash
    except ImportError:
        raise needs_extra("the page") from None
    return dash


_BLANK = {"data": [], "layout": {"xaxis": {"visible": False}, "yaxis": {"visible": False}, "height": 300}}


# -- the application ----------------------------------------------------------------------------------------------------------------


def make_app() -> Any:
    """The Dash application.

    Raises
    ------
    InputError
        When Dash is not installed.
    """
    dash = load_dash()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = dash.Dash(
        __name__, assets_folder=str(Path(__file__).with_name("assets")), serve_locally=True, compress=False, update_title="",
        title="prunesim explore", meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
    )  # fmt: skip
    app.enable_dev_tools(debug=False, dev_tools_disable_version_check=True)
    app.layout = _layout(dash)
    app.interpolate_index = _index
    _connect(app, dash)
    app.server.config["MAX_CONTENT_LENGTH"] = MOST_REQUEST_BYTES
    app.server.after_request(_guarded)
    return app


def _index(**parts: str) -> str:
    from flask import request

    state, problems = read_query(request.query_string.decode("latin-1"))
    return page_html(state, problems, parts)


def _guarded(response: Any) -> Any:
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    return response


def _layout(dash: Any) -> Any:
    html, dcc = dash.html, dash.dcc
    graph = {"displayModeBar": False, "responsive": True}
    cards = [
        html.Section(
            [
                html.Div(
                    [html.H2(title, id=f"h-{name}"), *[
                        html.Button(kind.upper(), className="save", type="button", title=f"Download the figure as {kind.upper()}",
                                    **{"data-save": name, "data-kind": kind, "aria-label": f"Download {title} as {kind.upper()}"})
                        for kind in ("svg", "png")
                    ]],
                    className="head",
                ),
                html.Div(dcc.Graph(id=name, config=graph, figure=_BLANK, style={"height": "300px"}), role="img", className="chart",
                         **{"aria-labelledby": f"h-{name} about-{name}"}),
                html.Div(id=f"about-{name}", className="about"),
            ],
            className="card", id=f"card-{name}",
        )
        for name, title in CARDS
    ]  # fmt: skip
    table = html.Section(
        [
            html.Div([
                html.H2("Table", id="h-table"),
                html.Button("CSV", id="csv-button", type="button", n_clicks=0, **{"aria-label": "Download the table as CSV"}),
            ], className="head"),
            html.Div(id="table", className="table", tabIndex="0", role="region", **{"aria-labelledby": "h-table"}),
        ],
        className="card whole",
    )  # fmt: skip
    lines = html.Section(
        [html.Div(html.H2("The same numbers from the command line"), className="head"), html.Div(id="commands")], className="card whole"
    )
    stores = [dcc.Location(id="url", refresh=False), dcc.Download(id="csv")]
    stores += [dcc.Store(id=name) for name in ("asked", "width", "parts", "shown", "dropped", "accepted", "placed")]
    head = html.Div([html.P(id="title", className="title"), html.Div(id="facts"), html.Div(id="notes")], className="summary")
    grid = html.Div([*cards, table, lines], className="grid", id="grid")
    return html.Div([head, grid, *stores, html.P(f"prunesim {__version__}", className="version")])


def _connect(app: Any, dash: Any) -> None:
    """Callbacks: the address and the page's width come in, figures and texts go out."""
    out, given, state = dash.Output, dash.Input, dash.State
    client = dash.ClientsideFunction
    app.clientside_callback(client("explore", "ask"), out("asked", "data"), given("url", "search"), given("width", "data"))
    drawn = [out(name, prop) for name in ("speedup", "roofline", "waterfall") for prop in ("figure", "style")]
    app.callback(*drawn, out("parts", "data"), given("asked", "data"), prevent_initial_call=True)(_answered)
    app.callback(out("crossover", "figure"), out("crossover", "style"), given("asked", "data"), prevent_initial_call=True)(_mapped)
    app.clientside_callback(client("explore", "show"), out("shown", "data"), given("parts", "data"), prevent_initial_call=True)
    app.callback(out("accepted", "data"), given("dropped", "data"), prevent_initial_call=True)(_accepted)
    app.clientside_callback(client("explore", "place"), out("placed", "data"), given("accepted", "data"), prevent_initial_call=True)
    app.callback(out("csv", "data"), given("csv-button", "n_clicks"), state("url", "search"), prevent_initial_call=True)(_csv)


def _answered(asked: Mapping[str, Any]) -> tuple[Any, ...]:
    state, problems = read_query(str(asked["search"] or ""))
    found = charts(state, PHONE if asked["narrow"] else WIDE)
    parts: dict[str, Any] = {
        "html": texts(state) | {"problems": markup.problems_html(problems)},
        "gpus": len(state.gpus),
        "search": asked["search"],
    }
    return (*(part for name in ("speedup", "roofline", "waterfall") for part in _sized(found[name])), parts)


def _sized(chart: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A figure, and the room it takes: kept free for it, so that nothing on the page moves while it is drawn."""
    return chart, {"height": f"{chart['layout']['height']}px"}


def _mapped(asked: Mapping[str, Any]) -> tuple[Any, ...]:
    state, _ = read_query(str(asked["search"] or ""))
    return _sized(map_chart(state, PHONE if asked["narrow"] else WIDE))


def _accepted(dropped: Mapping[str, Any]) -> dict[str, str]:
    try:
        made = token(str(dropped["text"]), str(dropped["name"]))
    except InputError as error:
        return {"error": str(error)}
    return {"token": made, "label": dropped_label(made)}


def _csv(_: int, search: str) -> dict[str, Any]:
    state, _problems = read_query(search or "")
    return {"content": markup.table_csv(answer(state).table.records), "filename": "prunesim.csv", "type": "text/csv", "base64": False}


def server(port: int) -> Any:
    """A server of the page on 127.0.0.1, not started yet; port 0 takes a free one (``server.server_port``).

    Raises
    ------
    InputError
        When Dash is not installed, the port is no port, or it is taken.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"port {port}: expected a whole number from 0 to 65535")
    app = make_app()
    from werkzeug.serving import make_server

    try:
        made = make_server(HOST, port, app.server, threaded=True)
    except SystemExit:  # werkzeug prints and exits where a port is taken
        raise InputError(f"port {port} is taken; choose another one with --port (0: any free one)") from None
    except OSError as error:
        raise InputError(f"port {port} cannot be used ({error.strerror}); choose another one with --port") from None
    hosts = {f"{name}:{made.server_port}" for name in (HOST, "localhost")}
    app.server.before_request(lambda: _own_host(hosts))
    return made


def _own_host(hosts: set[str]) -> Any:
    """Refuse requests under another name: a page elsewhere cannot reach this server by renaming itself."""
    from flask import request

    return None if request.host in hosts else ("this server answers to 127.0.0.1 only", 403)
