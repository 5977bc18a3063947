"""``prunesim explore``: the page in a browser, served by this machine to itself."""

from __future__ import annotations

import json
import sys
from typing import Annotated

from simulator.cli import options
from simulator.cli.options import opt


def command(
    port: Annotated[int, opt("--port", "N", "Port on 127.0.0.1; 0 takes a free one.")] = 8050,
    no_browser: Annotated[bool, opt("--no-browser", None, "Do not open a browser.")] = False,
    as_json: options.Json = False,
) -> None:
    """Explore predictions in the browser.

    The page is served on 127.0.0.1 only and loads nothing from elsewhere; its state is its address. Needs the extra
    "explore". Ctrl-C stops it.
    """
    from simulator.explore.app import HOST, server

    served = server(port)
    url = f"http://{HOST}:{served.port}/"
    print(json.dumps({"url": url}) if as_json else url, flush=True)
    print("Ctrl-C stops it", file=sys.stderr)
    if not no_browser:
        import webbrowser

        webbrowser.open(url)
    try:
        served.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        served.server_close()
