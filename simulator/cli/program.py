"""Find a command by name, run it, and convert errors to one line and an exit status.

A command is a function or a ``typer.Typer`` with subcommands. Commands of the simulator are in
:data:`COMMANDS`; other packages register commands as entry points of the group :data:`GROUP`. Only
the requested command is imported; help and completion of the program import all commands.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any, cast

import typer

from simulator._version import __version__
from simulator.errors import InputError, one_line
from simulator.start import INTERRUPTED

GROUP = "prunesim.commands"  # entry points that add commands: name = package.module:command

# commands of the simulator in the order of --help, and their places in this package
COMMANDS: tuple[tuple[str, str], ...] = (
    ("hardware", "catalogue:hardware"),
    ("models", "catalogue:models"),
    ("engines", "catalogue:engines"),
    ("gemm", "gemm:gemm"),
    ("speedup", "speedup:speedup"),
    ("serve", "serve:command"),
    ("draft", "draft:command"),
    ("explain", "speedup:explain"),
    ("claims", "claims:claims"),
    ("methods", "methods:methods"),
    ("advise", "search:advise"),
    ("costs", "search:costs"),
    ("search", "search:search"),
    ("sweep", "report:sweep"),
    ("pareto", "pareto:pareto"),
    ("explore", "report:explore"),
    ("report", "report:report"),
)


# commands that check further options themselves
_FURTHER = {"serve": {"ignore_unknown_options": True, "allow_extra_args": True}}


def program(only: str = "") -> typer.Typer:
    """Return the program with one command, or with all if the command does not exist."""
    app = typer.Typer(
        name="prunesim",
        help=(
            "How much faster will a pruned LLM really be? Predict it before implementing the"
            " pruning."
        ),
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    own = dict(COMMANDS)
    if only in own:
        _add(app, only, _load(own[only]))
        return app
    from importlib.metadata import entry_points  # reads the metadata of every installed package

    registered = {point.name: point for point in entry_points(group=GROUP) if point.name not in own}
    if only in registered:
        _add(app, only, registered[only].load())
        return app
    for name, place in COMMANDS:
        _add(app, name, _load(place))
    for name in sorted(registered):
        _add(app, name, registered[name].load())
    return app


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(f"simulator.cli.{module}"), name)


def _add(app: typer.Typer, name: str, command: Any) -> None:
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name, context_settings=_FURTHER.get(name))(command)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"prunesim {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and stop.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status; see :func:`simulator.cli.run`."""
    stdout = sys.stdout
    sys.stdout = output = cast(Any, _Output(stdout))
    try:
        app = program(arguments[0] if arguments else "")
        words = list(arguments) or ["--help"]
        code = typer.main.get_command(app).main(words, prog_name="prunesim", standalone_mode=False)
        sys.stdout.flush()
        if output.ended:
            return 1
        if code == INTERRUPTED:  # typer converts Ctrl-C to a status without a message
            return _fail("interrupted", INTERRUPTED)
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _fail(str(error), 2)
    except OSError as error:
        _drop_output(stdout)
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except typer.Exit as stop:
        return int(stop.exit_code)
    except SystemExit as stop:  # after shell completion
        return int(stop.code or 0)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except MemoryError:
        return _fail("not enough memory; request fewer combinations at once", 1)
    except Exception as error:
        # usage errors of the option parser: their class is not public in every version of typer,
        # this method is
        if hasattr(error, "format_message"):
            return _fail(_usage(error, arguments), 2)
        if isinstance(error, ImportError) and isinstance(error.__cause__, KeyboardInterrupt):
            return _fail("interrupted", INTERRUPTED)  # Ctrl-C while a module in C++ is imported
        if os.environ.get("PRUNESIM_DEBUG"):
            raise
        return _fail(
            f"program error, please report it: {type(error).__name__}: {error} (PRUNESIM_DEBUG=1"
            " shows where)",
            1,
        )
    finally:
        sys.stdout = stdout


class _Output:
    """Standard output that discards what its reader (head, less) no longer takes, so that the
    command still writes its files."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.ended = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._taken(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._taken(self.stream.flush)

    def _taken(self, act: Callable[..., Any], *text: str) -> None:
        try:
            act(*text)
        except BrokenPipeError:
            self.ended = True
            _drop_output(self.stream)


def _usage(error: Any, arguments: Sequence[str]) -> str:
    """Return a usage error of the option parser as a message."""
    context, param = getattr(error, "ctx", None), getattr(error, "param", None)
    text = error.format_message()
    # the text of a bad value is that of a library
    if type(error).__name__ == "BadParameter" and param is not None:
        words = [word for argument in arguments for word in argument.split("=", 1)]
        option = next((name for name in param.opts if name in words[:-1]), param.opts[0])
        kind = "a whole number" if "integer" in text else "a number"
        value = f", got {words[words.index(option) + 1]!r}" if option in words[:-1] else ""
        text = f"{option}: expected {kind}{value}."
    return f"{text} See '{context.command_path if context else 'prunesim'} --help'"


def _fail(message: str, status: int) -> int:
    print(one_line(f"prunesim: {' '.join(message.split())}"), file=sys.stderr)
    return status


def _drop_output(stream: Any) -> None:
    """Discard unwritten output, which would cause an error message when the interpreter exits."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
