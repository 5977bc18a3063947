"""The command line: ``prunesim``. A thin layer that reads options, calls one function of the library and prints what it
returns.

Data goes to standard output, messages and progress to standard error. Exit status: 0 done; 2 bad input, said in one
line; 1 failed (a file that cannot be written, a program error). Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from simulator._version import __version__
from simulator.cli import (
    advise,
    engines,
    explain,
    explore,
    figures,
    gemm,
    hardware,
    methods,
    models,
    pareto,
    report,
    speedup,
    sweep,
)
from simulator.errors import InputError, one_line
from simulator.start import INTERRUPTED, start

app = typer.Typer(
    name="prunesim",
    help="How much faster will a pruned LLM really be? Predict it before implementing the pruning.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(hardware.app, name="hardware")
app.add_typer(models.app, name="models")
app.add_typer(engines.app, name="engines")
app.command("gemm")(gemm.gemm)
app.command("speedup")(speedup.speedup)
app.command("explain")(explain.explain)
app.command("methods")(methods.command)
app.command("advise")(advise.command)
app.command("sweep")(sweep.command)
app.command("figures")(figures.figures)
app.command("pareto")(pareto.pareto)
app.command("explore")(explore.command)
app.command("report")(report.command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"prunesim {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Parameters
    ----------
    arguments : sequence of str
        What follows the name of the program.

    Returns
    -------
    int
        The exit status: 0, 2 for bad input, 1 for a failure, 130 when interrupted.
    """
    try:
        code = typer.main.get_command(app).main(
            list(arguments) or ["--help"], prog_name="prunesim", standalone_mode=False
        )
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer makes a status of Ctrl-C, and says nothing
            return _fail("interrupted", INTERRUPTED)
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:
        _drop_output()  # the reader (head, less) has seen enough
        return 1
    except OSError as error:
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except typer.Exit as stop:
        return int(stop.exit_code)
    except SystemExit as stop:  # once a shell's question is answered
        return int(stop.code or 0)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except MemoryError:
        return _fail("there is not enough memory for this; ask for fewer settings at a time", 1)
    except Exception as error:
        # usage errors of the option parser; its class is not public in every version of typer, its method is
        if hasattr(error, "format_message"):
            context = getattr(error, "ctx", None)
            return _fail(f"{error.format_message()} See '{context.command_path if context else 'prunesim'} --help'", 2)
        if os.environ.get("PRUNESIM_DEBUG"):
            raise
        return _fail(
            f"program error, please report it: {type(error).__name__}: {error} (PRUNESIM_DEBUG=1 shows where)", 1
        )


def _fail(message: str, status: int) -> int:
    """Print one line to standard error."""
    print(one_line(f"prunesim: {' '.join(message.split())}"), file=sys.stderr)
    return status


def _drop_output() -> None:
    """Send what standard output could not take nowhere, or the interpreter would complain of it on its way out."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry point of ``python -m simulator.cli``."""
    start("simulator.cli")
