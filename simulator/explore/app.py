"""Serve the page as a Dash application, on this machine only.

Use :func:`make_app` for the application and :func:`server` for a server bound to 127.0.0.1. The address holds the
page's state: a control changes the query (``assets/explore.js``), and one callback returns all texts and figures of a
query, except the map, which may take longer and has a separate callback.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from simulator.errors import InputError, needs_extra
from simulator.explore.address import read_problems, to_query
from simulator.explore.charts import charts
from simulator.explore.dropped import Sent, read_profile, take
from simulator.explore.layout import PHONE, WIDE, message
from simulator.explore.map_chart import map_chart
from simulator.explore.markup import paragraphs, table_csv, texts
from simulator.explore.page import own_label, own_options, page_html, wide_cards
from simulator.explore.predictions import predictions
from simulator.explore.questions import Dropped, Selection, reject_others
from simulator.explore.state import MOST_MAP_PASSES, State

HOST = "127.0.0.1"
"""The only address on which the server listens."""

MOST_REQUEST_BYTES = 40_000_000
"""Largest request body: headers of a checkpoint and its index, within the page's limits, in JSON."""

POLICY = (
    "default-src 'none'; script-src 'self' {hashes}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""Content that the browser may load: nothing from other hosts, and no inline script except the start of Dash."""


# -- the application ---------------------------------------------------------------------------------------------------


def make_app(own: Sequence[str] = ()) -> Any:
    """Return the Dash application; ``own`` are paths of profiles that it may read. It needs Dash."""
    try:
        import dash
    except ImportError:
        raise needs_extra("the page", "explore", "dash") from None
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = dash.Dash(
        __name__,
        assets_folder=str(Path(__file__).with_name("assets")),
        serve_locally=True,
        compress=False,
        update_title="",
        title="prunesim explore",
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
    )
    app.enable_dev_tools(debug=False, dev_tools_disable_version_check=True)
    app.interpolate_index = _index
    _connect(app, dash)
    app.server.config["OWN"] = tuple(own)
    app.server.config["MAX_CONTENT_LENGTH"] = MOST_REQUEST_BYTES
    policy = POLICY.format(hashes=" ".join(app.csp_hashes()))
    app.server.after_request(lambda response: _guarded(response, policy))
    return app


def _index(**parts: str) -> str:
    from flask import current_app, request

    state, problems = _read(request.query_string.decode("latin-1"))
    return page_html(state, texts(state) | problems, parts, current_app.config["OWN"])


def _read(search: str) -> tuple[State, dict[str, str]]:
    """Return the state of a query, and its problems as HTML by element: those of the prunings are at their field."""
    from flask import current_app

    state, found = read_problems(search, current_app.config["OWN"])
    lines = {"problems": [p.line for p in found if p.key != "prune"], "note-prune": []}
    lines["note-prune"] = [p.reason for p in found if p.key == "prune"]
    return state, {name: paragraphs(some) for name, some in lines.items()}


def _guarded(response: Any, policy: str) -> Any:
    response.headers["Content-Security-Policy"] = policy
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    return response


def _connect(app: Any, dash: Any) -> None:
    """Create the stores that carry requests and answers (all visible content is in the page itself), and the callbacks
    between them: the address comes in, figures and texts go out; the page requests the map after the rest."""
    browser = {"begin": ("begun", "asked"), "show": ("answered", "shown")}
    browser |= {"showMap": ("map", "mapped"), "place": ("accepted", "placed")}
    server: dict[Any, tuple[str, str]] = {_answered: ("asked", "answered"), _mapped: ("wanted", "map")}
    server |= {_accepted: ("dropped", "accepted"), _csv: ("csv-asked", "csv")}
    names = {name: None for pair in (*browser.values(), *server.values()) for name in pair if name != "csv"}
    app.layout = dash.html.Div([dash.dcc.Download(id="csv"), *(dash.dcc.Store(id=name) for name in names)])

    def data(source: str, target: str) -> tuple[Any, Any]:
        return dash.Output(target, "data"), dash.Input(source, "data")

    for name, pair in browser.items():
        function = dash.ClientsideFunction("explore", name)
        app.clientside_callback(function, *data(*pair), prevent_initial_call=name != "begin")
    for answers, pair in server.items():
        app.callback(*data(*pair), prevent_initial_call=True)(answers)
    kinds = {answers: next(iter(get_type_hints(answers).values())) for answers in server}
    reject_others(app.server, {target: (source, kinds[answers]) for answers, (source, target) in server.items()})


def _answered(selection: Selection) -> dict[str, Any]:
    state, problems = _read(selection["search"])
    return {
        "html": texts(state) | problems,
        "figures": charts(state, PHONE if selection["narrow"] else WIDE),
        "query": to_query(state),
        "own": own_options(state),
        "wide": wide_cards(state),
        "detail": state.explained,
        "asked": selection,
    }


def _mapped(selection: Selection) -> dict[str, Any]:
    state, _ = _read(selection["search"])
    if state.map_passes > MOST_MAP_PASSES:
        limit = f"expected at most {MOST_MAP_PASSES:,} passes to compute, got {state.map_passes:,}"
        figure = message(f"map: {limit}; select fewer GPUs, families or new tokens, or use prunesim report")
    else:
        figure = map_chart(state, PHONE if selection["narrow"] else WIDE)
    return {"figure": figure, "asked": selection}


def _accepted(dropped: Dropped) -> dict[str, str]:
    """Return dropped files as a choice of the control that they were dropped on; a profile is always a GPU."""
    into = "pruned" if dropped["into"] == "pruned" else "model"
    try:
        kind, made = take([Sent(f["name"], f["text"], f["room"]) for f in dropped["files"]])
    except InputError as error:
        return {"into": dropped["into"], "error": str(error)}
    control = "gpu" if kind == "gpu" else into
    name = read_profile(made)[1].name if kind == "gpu" else ""
    return {"into": control, "token": made, "label": own_label(control, made), "replaces": name}


def _csv(selection: Selection) -> dict[str, Any]:
    state, _ = _read(selection["search"])
    content = table_csv(predictions(state).results)
    return {"content": content, "filename": "prunesim.csv", "type": "text/csv", "base64": False}


def server(port: int, own: Sequence[str] = ()) -> Any:
    """Return a server of the page on 127.0.0.1, not started; port 0 takes a free port (``server.port``).

    ``own`` are paths of profiles that it may read. InputError if the port is invalid or taken. It needs Dash.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"port {port}: expected a whole number from 0 to 65535")
    with _listening(port) as listening:
        app = make_app(own)
        from werkzeug.serving import make_server

        made = make_server(HOST, port, app.server, threaded=True, fd=listening.fileno())
    hosts = {f"{name}:{made.port}" for name in (HOST, "localhost")}
    app.server.before_request(lambda: _own(hosts))
    return made


def _listening(port: int) -> socket.socket:
    """Open a socket on the port. Werkzeug would print, exit, and look up this machine's name on the network."""
    listening = socket.socket()
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise InputError(f"port {port} {why}; choose another one with --port (0: any free one)") from None
    return listening


def _own(hosts: set[str]) -> Any:
    """Reject a request under another host name or from another page: no site can reach this server, not even by a name
    that resolves to it."""
    from flask import request

    headers = request.headers
    origin = headers.get("Origin")
    own = headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
    followed = headers.get("Sec-Fetch-Dest") == "document"  # a link is allowed
    if request.host in hosts and (own or followed) and (origin is None or origin.removeprefix("http://") in hosts):
        return None
    return "only the page on 127.0.0.1 may use this server", 403
