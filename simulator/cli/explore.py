"""``prunesim explore``: the page in a browser, served by this machine to itself."""

from __future__ import annotations

import signal
import sys
from typing import Annotated
from urllib.parse import quote

from simulator.cli import options, render
from simulator.cli.options import opt

Hardware = Annotated[str | None, opt("--hardware", "LIST", "Devices to begin with: names, aliases or YAML files.")]


def command(
    hardware: Hardware = None,
    port: Annotated[int, opt("--port", "N", "Port on 127.0.0.1; 0 takes a free one.")] = 8050,
    no_browser: Annotated[bool, opt("--no-browser", None, "Do not open a browser.")] = False,
    as_json: options.Json = False,
) -> None:
    """Explore predictions in the browser.

    The page is served on 127.0.0.1 only and loads nothing from elsewhere; its state is its address. Of files of one's
    own it reads those given here, and what is dropped on it. Needs the extra "explore". Ctrl-C stops it.
    """
    from simulator.explore.app import HOST, server
    from simulator.explore.state import State
    from simulator.hardware.library import reference, shipped_names

    gpus = [] if hardware is None else [reference(name) for name in options.names("--hardware", hardware)]
    if gpus:
        State(gpus=tuple(gpus))  # refuses two of one name
    served = server(port, [gpu for gpu in gpus if gpu not in shipped_names()])
    url = f"http://{HOST}:{served.port}/" + (f"?gpu={quote(','.join(gpus), safe=',/')}" if gpus else "")
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
