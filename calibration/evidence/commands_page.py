"""The page ``docs/generated/commands.md``: the help of every command."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from calibration.evidence.pages import head
from calibration.validation.scoring import table


def commands() -> Iterator[tuple[str, Any]]:
    """Yield the path of every command ("speedup", "hardware list", ...) and its parser, in the
    order of ``--help``."""
    import typer

    from simulator.cli.program import program

    for name, command in typer.main.get_command(program()).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        yield from (
            [(name, command)]
            if inner is None
            else [(f"{name} {sub}", one) for sub, one in inner.items()]
        )


def _parameter(p: Any) -> list[str]:
    """Return name, default, "yes" if it may be repeated, and help of an argument or option."""
    name = p.metavar or p.name.upper()
    value = p.default() if callable(p.default) else p.default
    if p.param_type_name != "argument":
        name = ", ".join([*p.opts, *p.secondary_opts]) + (
            "" if p.is_flag else f" {p.metavar or p.type.name.upper()}"
        )
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
    default = (
        "required" if p.required else "" if text in (None, "") or value is False else f"`{text}`"
    )
    return [f"`{name}`", default, "yes" if p.multiple or p.nargs == -1 else "", p.help or ""]


def commands_page() -> str:
    index = []
    lines = []
    for path, command in commands():
        paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
        index.append([f"[`prunesim {path}`](#prunesim-{path.replace(' ', '-')})", paragraphs[0]])
        shown = [
            _parameter(p)
            for p in command.params
            if not getattr(p, "hidden", False) and p.name != "help"
        ]
        parameters = table(
            ["argument or option", "default", "several", "meaning"], shown, left=(0, 1, 2, 3)
        )
        lines += [f"## prunesim {path}", "", "\n\n".join(paragraphs), "", parameters, ""]
    first = table(["command", "purpose"], index, left=(0, 1))
    return head("commands") + "\n".join([first, "", *lines]).rstrip() + "\n"
