"""``prunesim explore``: serve the page to a browser on this machine."""

from __future__ import annotations

import signal
import sys
from typing import Annotated
from urllib.parse import quote

from simulator.cli import options, parsing, render
from simulator.cli.options import opt

Hardware = Annotated[str | None, opt("--hardware", "LIST", "Initial devices: names, aliases or YAML files.")]


def command(
    hardware: Hardware = None,
    prune: options.Prune = None,
    port: Annotated[int, opt("--port", "N", "Port on 127.0.0.1; 0 selects a free port.")] = 8050,
    no_browser: Annotated[bool, opt("--no-browser", None, "Do not open a browser.")] = False,
    as_json: options.Json = False,
) -> None:
    """Explore predictions in the browser.

    The page is served on 127.0.0.1 only and loads nothing from other hosts; its address contains its state. It reads
    only files given here or dropped on it. Needs the extra "explore". Ctrl-C stops it.
    """
    from simulator.explore.address import strict_query
    from simulator.explore.app import HOST, server
    from simulator.explore.state import State
    from simulator.hardware.library import reference, shipped_names

    gpus = [] if hardware is None else [reference(name) for name in parsing.names("--hardware", hardware)]
    if gpus:
        State(gpus=tuple(gpus))  # rejects two with one name
    texts = f"prune={quote(';'.join(prune))}" if prune else ""
    strict_query(texts)  # rejects mistakes, and plans: the page opens no files
    served = server(port, [gpu for gpu in gpus if gpu not in shipped_names()])
    query = "&".join(filter(None, (f"gpu={quote(','.join(gpus), safe=',/')}" if gpus else "", texts)))
    url = f"http://{HOST}:{served.port}/" + (f"?{query}" if query else "")
    if as_json:
        render.show_json({"url": url})
    else:
        print(url, flush=True)
    print("Ctrl-C stops it", file=sys.stderr)
    if not no_browser:
        import webbrowser

        webbrowser.open(url)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        served.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        served.server_close()
