"""Every command and every option as ``docs/commands.md``: ``python -m calibration.judge.pages commands -o FILE``.

The page is read off the program itself, so that it cannot differ from ``--help``; a test demands that it is current.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from calibration.judge.pages_tables import cell, left
from calibration.judge.report import table

HEAD = """\
# Commands

Made by `python -m calibration.judge.pages commands -o docs/commands.md` from the program itself; `prunesim COMMAND --help` says the same on the
screen. An option with "yes" under "several" may be repeated. Exit status: 0 done; 2 bad input, said in one line on standard error;
1 failed; 130 interrupted. Data goes to standard output, messages and progress to standard error.
"""


def commands() -> Iterator[tuple[str, Any]]:
    """Path of every command ("speedup", "hardware list", ...) and its parser, in the order of ``--help``."""
    import typer

    from calibration.cli import app

    def walk(command: Any, path: list[str]) -> Iterator[tuple[str, Any]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield " ".join(path), command
        else:
            for name, sub in inner.items():
                yield from walk(sub, [*path, name])

    return walk(typer.main.get_command(app), [])


def _default(p: Any) -> str:
    """Default of a parameter for people: nothing where there is none, or where an option is a switch."""
    if p.required:
        return "required"
    value = p.default() if callable(p.default) else p.default
    if value is None or value is False or value in ("", [], ()):
        return ""
    return f"`{' '.join(map(str, value)) if isinstance(value, list | tuple) else value}`"


def _name(p: Any) -> str:
    if p.param_type_name == "argument":
        return f"`{p.metavar or p.name.upper()}`"
    value = "" if p.is_flag else f" {p.metavar or p.type.name.upper()}"
    return f"`{', '.join([*p.opts, *p.secondary_opts])}{value}`"


def _parameters(command: Any) -> list[list[str]]:
    out = []
    for p in command.params:
        if getattr(p, "hidden", False) or p.name == "help":
            continue
        several = "yes" if p.multiple or p.nargs == -1 else ""
        out.append([cell(_name(p)), cell(_default(p)), several, cell(getattr(p, "help", None) or "")])
    return out


def _about(command: Any) -> str:
    """The help text, a paragraph a line."""
    return "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))


def page() -> str:
    """``docs/commands.md``: an index, and each command with its arguments and options."""
    found = list(commands())
    index = [
        [f"[`prunesim {path}`](#prunesim-{path.replace(' ', '-')})", cell(_about(c).split("\n\n")[0])]
        for path, c in found
    ]
    lines = [HEAD, left(table(["command", "what it does"], index), 1), ""]
    for path, command in found:
        lines += [f"## prunesim {path}", "", _about(command), ""]
        lines += [
            left(table(["argument or option", "default", "several", "meaning"], _parameters(command)), 1, 2, 3),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"
