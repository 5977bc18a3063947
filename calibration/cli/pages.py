"""Generate pages of the documentation: ``python -m calibration.cli.pages PAGE -o FILE``.

*accuracy* has the rows of :mod:`calibration.validation.accuracy` (ten minutes on two cores), *ablations* those of
:mod:`calibration.validation.ablations` (twenty minutes); ``--results`` keeps the rows. *constants* has the constants of
the shipped profiles, *engines* the comparisons of :mod:`calibration.validation.engines`, *transformers* those of
:mod:`calibration.runners.recorded`, *commands* the help of the program. The prose is taken from the page in ``docs``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.runners import recorded
from calibration.validation import ablations, accuracy, accuracy_tables, engines
from calibration.validation.acceptance import against_targets
from calibration.validation.protocol import Row
from calibration.validation.report import table
from simulator.errors import InputError
from simulator.files.write import check_target, write_whole
from simulator.hardware.constants import CONSTANTS
from simulator.hardware.library import list_hardware, load_hardware
from simulator.hardware.sections import Fitted, Section
from simulator.uncertainty.factors import ERROR_FACTORS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "generated"


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def head(page: str) -> str:
    """Return the text of a page before its first section or table."""
    return re.split(r"^(?=## |\|)", _read(page), maxsplit=1, flags=re.MULTILINE)[0]


def filled(page: str, tables: Sequence[str]) -> str:
    """Return a page with its tables replaced by new tables, in order."""
    prose = re.split(r"(?:^\|.*\n)+", _read(page), flags=re.MULTILINE)
    if len(prose) != len(tables) + 1:
        raise InputError(f"docs/generated/{page}.md: expected {len(tables)} tables to fill, got {len(prose) - 1}")
    return prose[0] + "".join(f"{new}\n{text}" for new, text in zip(tables, prose[1:], strict=True))


def _read(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def accuracy_page(rows: Sequence[Row]) -> str:
    """Return ``docs/generated/accuracy.md`` from protocol rows: targets and measured accuracy, then every table."""
    criteria = [
        [c.criterion, c.target, c.measured if c.met is not False else f"**{c.measured}**"]
        for c in against_targets(rows)
    ]
    lines = ["## Acceptance targets", "", table(["criterion, %", "target", "measured"], criteria), ""]
    for title in accuracy_tables.titles(rows):
        names, columns = zip(*accuracy_tables.columns_of_table(rows, title), strict=True)
        lines += [f"## {title.replace('_', ' ')}", "", table(names, list(zip(*columns, strict=True))), ""]
    return head("accuracy") + "\n".join(lines).rstrip() + "\n"


def constants_page() -> str:
    """Return ``docs/generated/constants.md``: the error factors, then by device and operator the shipped constants of
    every stack and number format."""
    rows = [[name, f"{sd:g}"] for name, sd in ERROR_FACTORS.items()]
    lines = ["## The error model", "", table(["error factor", "prior standard deviation of the log"], rows), ""]
    for name in list_hardware():
        hw = load_hardware(name)
        sections = {(stack, *key): s for stack, by_key in hw.stacks.items() for key, s in by_key.items()}
        fitted = {key: s for key, s in sections.items() if s.status == "calibrated"}
        if fitted:
            lines += [f"## {hw.title}", ""]
        for operator in dict.fromkeys(operator for _, operator, _ in fitted):
            lines += [f"### {operator}", "", constants_of(operator, fitted), ""]
    return head("constants") + "\n".join(lines).rstrip() + "\n"


def constants_of(operator: str, fitted: Mapping[tuple[str, str, str], Section]) -> str:
    """Return a table of the fitted constants of an operator, one column per stack and number format; the keys of
    ``fitted`` are stack, operator and format.
    """
    sections = {f"{stack} {dtype}".strip(): s for (stack, kind, dtype), s in fitted.items() if kind == operator}
    known = CONSTANTS[operator]
    shown = [n for n in known if any(s.constants[n].status != "default" for s in sections.values() if n in s.constants)]
    rows = [
        [f"`{n}`", known[n].unit, *(_value(s.constants.get(n)) for s in sections.values()), known[n].meaning]
        for n in shown
    ]
    return table(["constant", "unit", *sections, "meaning"], rows, left=(0, 1, 2 + len(sections)))


def _value(c: Fitted | None) -> str:
    """Return a value with its relative standard error, or its status if it was not fitted."""
    if c is None:
        return "-"
    error = f"({c.status})" if c.std_error is None else f"± {100 * c.std_error / abs(c.value):.1f} %"
    return f"{c.value:.3g} {error}"


def commands() -> Iterator[tuple[str, Any]]:
    """Yield the path of every command ("speedup", "hardware list", ...) and its parser, in the order of ``--help``."""
    import typer

    from simulator.cli.program import program

    def walk(command: Any, path: list[str]) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                yield from walk(inner, [*path, name])
        else:
            yield " ".join(path), command

    return walk(typer.main.get_command(program()), [])


def _text(text: str) -> str:
    """Return text as one table cell: on one line, with escaped bars."""
    return " ".join(text.split()).replace("|", "\\|")


def _parameter(p: Any) -> list[str]:
    """Return name, default, "yes" if it may be repeated, and help of an argument or option."""
    name = p.metavar or p.name.upper()
    if p.param_type_name != "argument":
        name = ", ".join([*p.opts, *p.secondary_opts])
        name += "" if p.is_flag else f" {p.metavar or p.type.name.upper()}"
    value = p.default() if callable(p.default) else p.default
    default = "required"
    if not p.required:
        shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
        default = "" if value is None or value is False or value in ("", [], ()) else f"`{shown}`"
    several = "yes" if p.multiple or p.nargs == -1 else ""
    return [_text(f"`{name}`"), _text(default), several, _text(getattr(p, "help", None) or "")]


def commands_page() -> str:
    """Return ``docs/generated/commands.md``: an index, and each command with its arguments and options."""
    index, lines = [], []
    for path, command in commands():
        paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
        index.append([f"[`prunesim {path}`](#prunesim-{path.replace(' ', '-')})", _text(paragraphs[0])])
        shown = [_parameter(p) for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
        parameters = table(["argument or option", "default", "several", "meaning"], shown, left=(0, 1, 2, 3))
        lines += [f"## prunesim {path}", "", "\n\n".join(paragraphs), "", parameters, ""]
    first = table(["command", "purpose"], index, left=(0, 1))
    return head("commands") + "\n".join([first, "", *lines]).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of the module's docstring and return the exit status."""
    about = "Generate a page of the documentation."
    parser = argparse.ArgumentParser("python -m calibration.cli.pages", description=about)
    parser.add_argument("page", choices=("accuracy", "constants", "ablations", "engines", "commands", "transformers"))
    parser.add_argument("-o", "--output", required=True, help="Markdown file")
    results = "accuracy, ablations: JSON file of the rows of the page; read if it exists, else written"
    parser.add_argument("--results", type=Path, help=results)
    parser.add_argument("--wheel", type=Path, help="accuracy: the wheel, for tables of experts and latent attention")
    given = parser.parse_args(arguments)

    def protocol_rows() -> list[Row]:
        def progress(done: int, total: int) -> None:
            _report(f"{done}/{total}")

        rows = accuracy.run_protocol(jobs=2, progress=progress)
        if given.wheel is None:
            return rows
        in_wheel = accuracy.run_protocol(("unlisted", "mla", "experts"), wheel=given.wheel, jobs=2, progress=progress)
        again = {r["table"] for r in in_wheel}
        return [r for r in rows if r["table"] not in again] + in_wheel

    pages: Mapping[str, Callable[[], str]] = {
        "accuracy": lambda: accuracy_page(_rows(given.results, protocol_rows)),
        "ablations": lambda: filled(
            "ablations", ablations.tables(_rows(given.results, lambda: ablations.run_all(_report)))
        ),
        "engines": lambda: filled("engines", engines.tables()),
        "constants": constants_page,
        "commands": commands_page,
        "transformers": lambda: filled("transformers", recorded.tables()),
    }
    try:
        check_target(given.output)
        write_whole(given.output, pages[given.page]().encode())
    except InputError as error:
        _report(f"calibration.cli.pages: {error}")
        return 2
    return 0


def _rows(path: Path | None, run: Callable[[], list[Row]]) -> list[Row]:
    """Return the rows of the file, else the rows of a run, which are written to it."""
    if path is not None and path.exists():
        return list(json.loads(path.read_text(encoding="utf-8")))
    rows = run()
    if path is not None:
        write_whole(path, json.dumps(rows).encode())
    return rows


if __name__ == "__main__":
    sys.exit(main())
