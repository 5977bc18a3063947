"""The generated pages of the documentation: ``python -m calibration.cli.pages PAGE -o FILE``.

*accuracy* fills the tables of the page with the rows of :mod:`calibration.judge.accuracy` (half an hour on one core),
*ablations* with those of :mod:`calibration.judge.ablations` (twenty minutes); ``--results`` keeps the rows. *constants*
fits every shipped table and tells what the data know of each constant (a few minutes); *published* are the comparisons
of :mod:`calibration.judge.published`; *commands* is read off the program itself. The prose of a page is that of
``docs``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.fit.core import bootstrap, fit_constants, free_constants
from calibration.fit.shipped import RECIPES, built, rtx_tables, shared_folder
from calibration.fit.solver import FittedPart
from calibration.judge import ablations, accuracy, published
from calibration.judge.accuracy import GEMMS, STACKS
from calibration.judge.protocol import Row
from calibration.judge.report import table
from simulator.errors import InputError
from simulator.files.write import check_target, write_whole
from simulator.hardware.constants import CONSTANTS
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import Fitted
from simulator.kernels.gemm_core import Machine

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def head(page: str) -> str:
    """What a page says before its first section or table."""
    return re.split(r"^(?=## |\|)", _read(page), maxsplit=1, flags=re.MULTILINE)[0]


def filled(page: str, tables: Sequence[str]) -> str:
    """A page with its tables, in their order, replaced by new ones."""
    prose = re.split(r"(?:^\|.*\n)+", _read(page), flags=re.MULTILINE)
    if len(prose) != len(tables) + 1:
        raise InputError(f"docs/{page}.md: expected {len(tables)} tables to fill, got {len(prose) - 1}")
    return prose[0] + "".join(f"{new}\n{text}" for new, text in zip(tables, prose[1:], strict=True))


def _read(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


BARS: Mapping[str, Mapping[str, float]] = {
    "a100": {"mape 400": 6.0, "prior 400": 4.8, "mape all": 4.2, "speedup median": 4.0, "speedup p95": 17.0},
    "h100": {"mape 400": 4.6, "prior 400": 4.4, "mape all": 3.7, "speedup median": 3.0, "speedup p95": 15.5},
    "h200": {"mape 400": 4.7, "mape all": 4.0},
    "l40s": {"mape 400": 11.0, "mape all": 8.5},
    "h100_fp8": {"mape 400": 4.4, "mape all": 4.0},
    "rtx_4090": {"mape all": 4.0, "speedup median": 2.5, "speedup p95": 16.0},
    "attention": {"mape 400": 5.0, "mape all": 3.8, "speedup median": 4.5, "speedup p95": 18.0},
    "elementwise": {"mape 400": 6.0, "mape all": 5.0},
    "sglang": {"as shipped": 9.0, "anchored": 6.0},
}
"""What was asked of each table, percent."""


def accuracy_tables(rows: Sequence[Row]) -> list[str]:
    """Tables of ``docs/accuracy.md`` of protocol rows: errors against the bars, then every table beside its
    baselines."""
    header = ["table", "MAPE at 400 rows", "with a prior", "MAPE, all rows", "speedup median", "speedup p95"]
    asked = [line for title in accuracy.titles(rows) for line in _against_bars(title, accuracy.means(rows, title))]
    out = [table([*header, "coverage of 90 %"], asked)]
    for title in accuracy.titles(rows):
        names, columns = zip(*accuracy.columns_of_table(rows, title), strict=True)
        out.append(table(names, list(zip(*columns, strict=True))))
    return out


def _cell(row: Row, score: str, bar: float | None = None, digits: int = 2) -> str:
    if score not in row:
        return "-"
    text = f"{row[score]:.{digits}f}" + (f" (≤ {bar:g})" if bar is not None else "")
    return f"**{text}**" if bar is not None and row[score] > bar else text


def _against_bars(name: str, found: Sequence[Row]) -> Iterator[list[str]]:
    """Lines of one table, whose means over seeds are given: name, three errors, two of speedups, coverage."""
    at = {(r["method"], r["rows"]): r for r in found}

    def line(label: str, bars: Mapping[str, float], few: Row, every: Row, prior: Row, score: str = "mape") -> list[str]:
        errors = (few, score, "mape 400"), (prior, "mape", "prior 400"), (every, score, "mape all")
        ratios = ((every, key, key) for key in ("speedup median", "speedup p95"))
        cells = [_cell(row, key, bars.get(bar)) for row, key, bar in (*errors, *ratios)]
        lowest = f", lowest {every['lowest coverage']:.1f}" if "lowest coverage" in every else ""
        return [label, *cells, _cell(every, "coverage", digits=1) + lowest]

    if name in STACKS:
        shipped, moved = at["as shipped", 0], at["re-anchored", 100]
        error = f"re-anchored on 100: {_cell(moved, 'mape', BARS['sglang']['anchored'])}"
        cells = ["-", error, _cell(moved, "speedup median"), _cell(moved, "speedup p95", digits=1)]
        covered = f"{moved['coverage']:.1f}, lowest {moved['lowest coverage']:.1f}"
        yield [f"{name} as shipped", _cell(shipped, "mape", BARS["sglang"]["as shipped"]), *cells, covered]
    elif name == "rtx_4090":
        yield from (line(f"rtx_4090, {r['method']}", BARS[name], {}, r, {}) for r in found)
    elif name.startswith("attention "):
        for method in dict.fromkeys(r["method"] for r in found):
            few, every = at.get((method, 400), {}), at.get((method, 0), {})
            yield line(f"{name}, {method}", BARS["attention"], few, every, {})
    elif name.startswith("elementwise "):
        few, every = at.get(("prunesim", 400), {}), at.get(("prunesim", 0), {})
        yield line(f"{name}, over 10 us", BARS["elementwise"], few, every, {}, "mape over 10us")
    elif name in BARS and found:
        few, every, prior = (at.get(key, {}) for key in (("prunesim", 400), ("prunesim", 0), ("prunesim + prior", 400)))
        cells = line(name, BARS[name], few, every, prior)
        yield [*cells[:-1], cells[-1] + (" (87-93, ≥ 82)" if every else "")]


def constants_page(shared: Path | None = None) -> str:
    """``docs/constants.md``: by device, each constant with its standard error, its bootstrap spread, and what it is
    confused with."""
    lines = ["## GEMM, bf16, side by side", ""]
    lines += ["As the profiles ship, with the relative standard error of the fit.", "", overview(tuple(RECIPES)), ""]
    for name, recipe in RECIPES.items():
        if recipe.tables or (name == "rtx_4090" and shared is not None):
            _say(name)
            fit = built(name, shared)
            lines += [f"## {fit.profile.title}", ""]
            for part in fit.parts:
                spread = _bootstrap(name, part, shared) if part.operator == "gemm" else {}
                lines += constants_of_part(part, spread)
    return head("constants") + "\n".join(lines).rstrip() + "\n"


def overview(names: Sequence[str]) -> str:
    """A table of the constants a dense bf16 fit may find, one column a GPU with a calibrated GEMM section, as its
    profile ships.

    >>> print(overview(["h100_sxm"]).split("\\n")[2])
    | `t0` | s | 2.68e-06 ± 0.3 % |
    """
    known, profiles = CONSTANTS["gemm"], [hw for hw in map(load_hardware, names) if "bf16" in hw.rates]
    sections = {hw: hw.section("gemm", "bf16") for hw in profiles}
    sections = {hw: section for hw, section in sections.items() if section.status == "calibrated"}
    shown = dict.fromkeys(name for hw in sections for name in free_constants(Machine.of(hw, "bf16")))
    rows = [[f"`{n}`", known[n].unit, *(_value(s.constants[n]) for s in sections.values())] for n in shown]
    return table(["constant", "unit", *(f"`{hw.name}`" for hw in sections)], rows, left=(0, 1))


def _value(c: Fitted) -> str:
    """A value with its relative standard error, or what it is instead of fitted."""
    return f"{c.value:.3g} " + (f"({c.status})" if c.std_error is None else f"± {_relative(c, '.1f')} %")


def _relative(c: Fitted, digits: str = ".2g") -> str:
    return "-" if c.std_error is None else f"{100 * c.std_error / abs(c.value):{digits}}"


def _bootstrap(name: str, part: FittedPart, shared: Path | None) -> Mapping[str, float]:
    hw = load_hardware(name)
    known = next((t for t in GEMMS.values() if t.hardware == name and t.dtype == part.dtype), None)
    if known is not None:
        data = known.load().data
    elif name == "rtx_4090" and shared is not None:
        data = accuracy.gemm_rows(rtx_tables(shared, hw), hw, part.dtype).data
    else:
        return {}
    constants, machine = part.section.constants, Machine.of(hw, part.dtype)
    free = [n for n, c in constants.items() if c.status == "fitted" and not n.startswith(("quant", "sparse"))]
    return bootstrap(data, machine, fit_constants(data, machine, {n: c.value for n, c in constants.items()}, free), 25)


def constants_of_part(part: FittedPart, spread: Mapping[str, float]) -> list[str]:
    """Lines of one fitted part: a table of its constants, and the pairs confused with one another; ``spread`` is the
    bootstrap's."""
    known, rows = CONSTANTS[part.operator], []
    for name, c in part.section.constants.items():
        if c.status != "default" or name in part.fixed:
            boot = f"{100 * spread[name]:.2g}" if name in spread else "-"
            status = c.status + (f" ({part.fixed[name]})" if name in part.fixed else "")
            value = [f"`{name}`", f"{c.value:.4g}", known[name].unit, _relative(c), boot, status]
            rows.append([*value, known[name].meaning])
    header = ["constant", "value", "unit", "std. error %", "bootstrap %", "status", "meaning"]
    heading = f"### {part.operator}, {part.dtype}: {part.rows:,} rows"
    lines = [heading, "", table(header, rows, left=(0, 2, 5, 6)), ""]
    strong = sorted((pair for pair in part.correlations.items() if abs(pair[1]) >= 0.5), key=lambda p: -abs(p[1]))
    if strong:
        pairs = ", ".join(f"`{a}` and `{b}` {r:+.2f}" for (a, b), r in strong[:12])
        lines += [f"Correlations of 0.5 and above: {pairs}.", ""]
    elif part.correlations:
        lines += ["No two constants are correlated by 0.5 or more.", ""]
    return lines


def commands() -> Iterator[tuple[str, Any]]:
    """Path of every command ("speedup", "hardware list", ...) and its parser, in the order of ``--help``."""
    import typer

    from calibration.cli import app

    def walk(command: Any, path: list[str]) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                yield from walk(inner, [*path, name])
        else:
            yield " ".join(path), command

    return walk(typer.main.get_command(app), [])


def _text(text: str) -> str:
    """Text as one table cell: on one line, its bars escaped.

    >>> _text("a |\\n b")
    'a \\\\| b'
    """
    return " ".join(text.split()).replace("|", "\\|")


def _parameter(p: Any) -> list[str]:
    """Name, default, "yes" where it may be repeated, and help of an argument or option."""
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
    """``docs/commands.md``: an index, and each command with its arguments and options."""
    index, lines = [], []
    for path, command in commands():
        paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
        index.append([f"[`prunesim {path}`](#prunesim-{path.replace(' ', '-')})", _text(paragraphs[0])])
        shown = [_parameter(p) for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
        parameters = table(["argument or option", "default", "several", "meaning"], shown, left=(0, 1, 2, 3))
        lines += [f"## prunesim {path}", "", "\n\n".join(paragraphs), "", parameters, ""]
    first = table(["command", "what it does"], index, left=(0, 1))
    return head("commands") + "\n".join([first, "", *lines]).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of the module's docstring; returns the exit status."""
    about = "Generate a page of the documentation."
    parser = argparse.ArgumentParser("python -m calibration.cli.pages", description=about)
    parser.add_argument("page", choices=("accuracy", "constants", "ablations", "published", "commands"))
    parser.add_argument("-o", "--output", required=True, help="Markdown file")
    kept = "accuracy, ablations: JSON file of the rows behind the page, read if it exists, else written"
    parser.add_argument("--results", type=Path, help=kept)
    parser.add_argument("--shared-data", help="folder of the RTX 4090 tables")
    given = parser.parse_args(arguments)

    def judged() -> list[Row]:
        return accuracy.run_protocol(progress=lambda done, total: _say(f"{done}/{total}"))

    made: Mapping[str, Callable[[], str]] = {
        "accuracy": lambda: filled("accuracy", accuracy_tables(_rows(given.results, judged))),
        "ablations": lambda: filled(
            "ablations", ablations.tables(_rows(given.results, lambda: ablations.run_all(_say)))
        ),
        "published": lambda: filled("published", published.tables()),
        "constants": lambda: constants_page(shared_folder(given.shared_data)),
        "commands": commands_page,
    }
    try:
        check_target(given.output)
        write_whole(given.output, made[given.page]().encode())
    except InputError as error:
        _say(f"calibration.cli.pages: {error}")
        return 2
    return 0


def _rows(path: Path | None, run: Callable[[], list[Row]]) -> list[Row]:
    """Rows kept before, else those of a run, which are kept."""
    if path is not None and path.exists():
        return list(json.loads(path.read_text(encoding="utf-8")))
    rows = run()
    if path is not None:
        write_whole(path, json.dumps(rows).encode())
    return rows


if __name__ == "__main__":
    sys.exit(main())
