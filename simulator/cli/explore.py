"""``prunesim explore``: serve the page to browsers on this machine."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

from simulator.cli.options import opt
from simulator.errors import InputError, needs_extra

HOST = "127.0.0.1"

SERVER = {
    "server.address": HOST,
    "server.headless": "true",  # opens no browser, and asks for no e-mail address
    "server.enableXsrfProtection": "true",
    "server.enableCORS": "true",  # pages of other hosts cannot connect
    "server.fileWatcherType": "none",
    "browser.gatherUsageStats": "false",
    "client.showErrorDetails": "none",
    "client.toolbarMode": "minimal",
}
"""Settings of Streamlit, which override its configuration files and environment variables."""


def command(port: Annotated[int, opt("--port", "N", "Port on 127.0.0.1; 0 selects a free port.")] = 8501) -> None:
    """Explore predictions in the browser.

    Prints the address of a page, which is served on 127.0.0.1 only and loads nothing from other hosts. Its address
    contains its settings. Needs the extra "explore". Ctrl-C stops it.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise needs_extra("the page", "explore", "streamlit")
    if not 0 <= port < 65536:
        raise InputError(f"--port {port}: expected 0 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(f"--port {port}: {error.strerror}; expected a free port, such as --port 0") from None
        port = probe.getsockname()[1]
    page = Path(__file__).parents[1] / "explore" / "app.py"
    settings = [part for name, value in {**SERVER, "server.port": port}.items() for part in (f"--{name}", str(value))]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(page), *settings])
