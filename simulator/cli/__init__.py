"""The command line: ``prunesim``. A thin layer that reads options, calls one function of the library and prints what it
returns.

Data goes to standard output, messages and progress to standard error. Exit status: 0 done; 2 invalid input (one-line
message); 1 failed (a file that cannot be written, a program error). A command is imported when it is used.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from simulator._version import __version__
from simulator.errors import InputError, one_line
from simulator.start import INTERRUPTED, start

COMMANDS: dict[str, str] = {
    "hardware": "simulator.cli.hardware:app",
    "models": "simulator.cli.models:app",
    "engines": "simulator.cli.engines:app",
    "gemm": "simulator.cli.gemm:gemm",
    "speedup": "simulator.cli.speedup:speedup",
    "explain": "simulator.cli.explain:explain",
    "methods": "simulator.cli.methods:command",
    "advise": "simulator.cli.advise:command",
    "sweep": "simulator.cli.sweep:command",
    "figures": "simulator.cli.figures:figures",
    "pareto": "simulator.cli.pareto:pareto",
    "claims": "simulator.cli.claims:claims",
    "quality": "simulator.cli.quality:quality",
    "explore": "simulator.cli.explore:command",
    "report": "simulator.cli.report:command",
}
"""Commands by name, in the order of the help: the module and the function or group in it."""


class _Commands(Mapping[str, Any]):
    """The commands of :data:`COMMANDS`; each is imported when it is used."""

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = COMMANDS[name].partition(":")
        found, alone = (
            getattr(import_module(module), attribute),
            typer.Typer(rich_markup_mode=None, add_completion=False),
        )
        if isinstance(found, typer.Typer):
            alone.add_typer(found, name=name)
            return typer.main.get_group(alone).commands[name]
        alone.command(name)(found)
        return typer.main.get_command(alone)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Group(typer.core.TyperGroup):
    """A group that imports a command when it is used."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands()  # type: ignore[assignment]  # click only reads it


app = typer.Typer(
    name="prunesim",
    cls=_Group,
    help="How much faster will a pruned LLM really be? Predict it before implementing the pruning.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
