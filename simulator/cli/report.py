"""``prunesim sweep``, ``report`` and ``explore``: write a grid of predictions as Parquet files, or
predictions as one HTML file; serve the page on this machine."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from simulator.cli import options, render
from simulator.cli.options import arg, opt, option
from simulator.cli.serve import Rate, Tpot, Ttft, limits
from simulator.errors import InputError, needs_extra

HOST = "127.0.0.1"

# settings of Streamlit, which override its configuration files and environment variables
SERVER = (
    ("server.address", HOST),
    ("server.headless", "true"),  # opens no browser, and asks for no e-mail address
    ("server.enableXsrfProtection", "true"),
    ("server.enableCORS", "true"),  # pages of other hosts cannot connect
    # nor pages of a name that resolves to this machine
    ("server.allowedHosts", HOST),
    ("server.allowedHosts", "localhost"),
    ("server.fileWatcherType", "none"),
    ("browser.gatherUsageStats", "false"),
    ("client.showErrorDetails", "none"),
    ("client.toolbarMode", "minimal"),
)


@options.expanded()
def sweep(
    grid: Annotated[
        str,
        arg(
            "GRID.yaml", "Axes: models, hardware, families, sparsities, phases, batches, seqs, ..."
        ),
    ],
    output: Annotated[str, opt("--output -o", "FOLDER", "Folder for Parquet files: one dataset.")],
    jobs: int | None = option("N", "Processes on this machine. Default: one per core."),
    most: int = option(
        "N", "Largest number of configurations to accept.", 100_000_000, flags="--max"
    ),
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Predict every combination of a grid.

    Run the command again to resume a sweep that was stopped or killed. Prints the number of rows of
    the dataset.
    """
    from simulator.prediction.sweep import write_sweep

    if jobs is None:
        jobs = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    with render.progress("predicting") as report:
        done = write_sweep(grid, output, jobs=jobs, progress=report, most=most)
    if options.Output(json).write([vars(done)]):
        again = (
            f", {done.resumed_parts} of {done.parts} parts from an earlier run"
            if done.resumed_parts
            else ""
        )
        counts = f"{done.rows:,} rows of {done.configurations:,} configurations"
        print(f"{done.folder}: {counts} in {render.seconds(done.seconds)}{again}")
        render.notes(done.notes, verbose)


@dataclass(frozen=True)
class Arrivals:
    rate: Rate = None
    ttft: Ttft = None
    tpot: Tpot = None


@options.expanded()
def report(
    model: options.Model,
    output: Annotated[str, opt("-o --output", "FILE", "HTML file to write.")],
    devices: options.Devices = options.DEVICES,
    prunings: options.Prunings = options.PRUNINGS,
    run: options.Run = options.RUN,
    arrivals: Arrivals = Arrivals(),
    metered: options.Metered = options.METERED,
    as_json: options.Json = False,
) -> None:
    """Write predictions as one HTML file.

    The file begins with the answer and the table of prunesim speedup, then has figures, where the
    pruning farthest below its roofline bound loses its nominal speedup, notes, and the commands
    that print the same numbers. With --phase serve --rate it has the answer, the
    table and the figure of prunesim serve --rate. It has no scripts and loads nothing.
    """
    from simulator.files.write import check_target, write_whole

    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{output}: expected a name that ends in .html")
    check_target(output)
    from simulator.explore.content import command as line
    from simulator.explore.content import commands, content, report_html

    asked = run.asked(model, devices, prunings)
    found = content(
        {
            "models": model,
            "hardware": devices.profiles,
            **({"rate": arrivals.rate} if arrivals.rate is not None else {}),
            **limits(arrivals.ttft, arrivals.tpot),
            **({"tariff": metered.tariff} if metered.tariff else {}),
            **prunings.parsed(),
            **asked.settings,
        }
    )
    given = {**asdict(devices), **asdict(prunings), **run.given, **asdict(arrivals)}
    given |= asdict(metered)
    lines = [*commands(model, given, found), line("report", model, {**given, "output": output})]
    text = report_html(found, lines).encode()
    write_whole(output, text)
    if as_json:
        render.show_json({"file": output, "bytes": len(text)})
    else:
        print(output)
    render.notes(asked.notes)


@options.expanded()
def explore(
    port: int = option("N", "Port on 127.0.0.1; 0 selects a free port.", 8501),
) -> None:
    """Explore predictions in the browser.

    Prints the address of a page, which is served on 127.0.0.1 only and loads nothing from other
    hosts. Its address contains its settings. Needs the extra "explore". Ctrl-C stops it.
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
            raise InputError(
                f"--port {port}: {error.strerror}; expected a free port, such as --port 0"
            ) from None
        port = probe.getsockname()[1]
    page = Path(__file__).parents[1] / "explore" / "app.py"
    settings = [f"--{name}={value}" for name, value in (*SERVER, ("server.port", port))]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(page), *settings])
