"""The generated pages of the documentation: ``python -m calibration.judge.pages accuracy|constants|ablations|commands -o FILE``.

*accuracy* runs the protocol of :mod:`calibration.judge.accuracy` over everything that ships (about half an hour on one core; ``--results``
keeps its rows as JSON, or makes the page of rows kept before). *constants* fits every shipped table and tells what the data know of each
constant (a few minutes). *ablations* is :mod:`calibration.judge.pages_ablations`, *commands* :mod:`calibration.judge.pages_commands`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.fit.core import bootstrap, fit_constants, machine_of, shapes
from calibration.fit.kernels import weight_copies
from calibration.fit.shipped import RECIPES, built, rtx_tables, shared_folder
from calibration.fit.solver import FittedPart
from calibration.judge import pages_ablations, pages_commands
from calibration.judge.accuracy import GEMMS, Row, columns_of_table, gemm_shapes, means, run_protocol, titles
from calibration.judge.pages_overview import overview
from calibration.judge.pages_tables import left
from calibration.judge.report import table
from simulator.errors import InputError
from simulator.files.write import check_target, write_whole
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import constants_of

BARS: Mapping[str, Mapping[str, float]] = {
    "a100": {"mape 400": 6.0, "prior 400": 4.8, "mape all": 4.2, "speedup median": 4.0, "speedup p95": 17.0},
    "h100": {"mape 400": 4.6, "prior 400": 4.4, "mape all": 3.7, "speedup median": 3.0, "speedup p95": 15.5},
    "h200": {"mape 400": 4.7, "mape all": 4.0},
    "l40s": {"mape 400": 11.0, "mape all": 8.5},
    "h100_fp8": {"mape 400": 4.4, "mape all": 4.0},
}
"""What was asked of each table, percent."""

ATTENTION_BARS: Mapping[int, float] = {400: 5.0, 0: 3.8}


ACCURACY_HEAD = """\
# Accuracy

Made by `python -m calibration.judge.pages accuracy -o docs/accuracy.md`; the same numbers print with `prunesim validate --protocol`.

Each shipped table is split 70/30 by (n, k) pairs; a fit sees some rows of the 70 %, and every row of the 30 % is scored: no test shape
shares its weight matrix with a training shape. Numbers are percent and means over seeds 0, 1 and 2. A speedup is the ratio of two test
rows that differ in one of m, n, k by a factor in [0.25, 1). Coverage is of the 90 % interval, "lowest" that of the worst range of m
(attention: regime), "width" its full width over the prediction.

## Against what was asked

A number with its bar in parentheses; **bold** where the bar is missed.
"""

CONSTANTS_HEAD = """\
# Constants

Made by `python -m calibration.judge.pages constants -o docs/constants.md`. The standard error is that of the least-squares fit; the bootstrap
spread is the standard deviation over {repeats} samples of (n, k) pairs drawn with replacement (at most 2,000 rows each), so that it
includes what the form gets wrong. "fixed" constants were free and could not be known from the rows, for the reason given; constants no row
says anything about are left out. Correlations are of the logarithms; a pair near 1 or -1 is known only as a ratio or product.
"""


def accuracy_page(rows: Sequence[Row]) -> str:
    """``docs/accuracy.md`` of protocol rows: first against the bars, then every table beside its baselines."""
    lines = [ACCURACY_HEAD, _bars(rows), ""]
    for title in titles(rows):
        columns = columns_of_table(rows, title)
        cells = list(zip(*(c for _, c in columns), strict=True))
        lines += [
            f"## {title.replace('_', ' ')}",
            "",
            _about(title),
            "",
            table([name for name, _ in columns], cells),
            "",
        ]
    return "\n".join(lines)


def _about(title: str) -> str:
    if title in GEMMS:
        t = GEMMS[title]
        lent = f" The prior is a fit to all of `{t.sibling}`, the same GPU under another stack." if t.sibling else ""
        return f"GEMM, {t.dtype}, `{t.measurement}`.{lent}"
    if title.endswith("_sglang"):
        device = title.removesuffix("_sglang")
        fitted = GEMMS[device].measurement
        return f"Fitted on `{fitted}`, judged on the sglang table of the same GPU: as shipped, and re-anchored on a few of its shapes."
    if title == "h200_from_h100":
        return "No measurement of the H200 used: constants and residual of the H100, datasheet of the H200; scored on all rows of its table."
    if title == "rtx_4090":
        return "344 GEMMs of three projections (kernel times of a profiler); fitted on two, judged on the third. The prior is the L40S."
    if title.startswith("elementwise"):
        return "Norms, rotary embedding, activation and embedding of a Llama-3.1-8B layer; tensor sizes never seen. Means of seeds 0, 1 and 2."
    return "One collection and kernel path, head dimension 128; fewer KV groups or a shorter length for the speedup."


def _of(row: Row | None, score: str) -> float | None:
    return None if row is None else float(row[score])


def _bars(rows: Sequence[Row]) -> str:
    out = []

    def cell(value: float | None, bar: float | None) -> str:
        if value is None:
            return "-"
        text = f"{value:.2f}" + (f" (≤ {bar:g})" if bar is not None else "")
        return f"**{text}**" if bar is not None and value > bar else text

    for name, bars in BARS.items():
        found = means(rows, name)
        at = {(r["method"], r["rows"]): r for r in found}
        own400, prior400, every = at.get(("prunesim", 400)), at.get(("prunesim + prior", 400)), at.get(("prunesim", 0))
        if not found:
            continue
        out.append(
            [
                name,
                cell(_of(own400, "mape"), bars.get("mape 400")),
                cell(_of(prior400, "mape"), bars.get("prior 400")),
                cell(_of(every, "mape"), bars.get("mape all")),
                cell(_of(every, "speedup median"), bars.get("speedup median")),
                cell(_of(every, "speedup p95"), bars.get("speedup p95")),
                "-" if not every else f"{every['coverage']:.1f}, lowest {every['lowest coverage']:.1f} (87-93, ≥ 82)",
            ]
        )
    for title in titles(rows):
        if title.endswith("_sglang"):
            at = {(r["method"], r["rows"]): r for r in means(rows, title)}
            shipped, moved = at.get(("as shipped", 0)), at.get(("re-anchored", 100))
            if shipped and moved:
                anchored = f"re-anchored on 100: {cell(moved['mape'], 6.0)}"
                out.append(
                    [
                        f"{title} as shipped",
                        cell(shipped["mape"], 9.0),
                        "-",
                        anchored,
                        f"{moved['speedup median']:.2f}",
                        f"{moved['speedup p95']:.1f}",
                        f"{moved['coverage']:.1f}, lowest {moved['lowest coverage']:.1f}",
                    ]
                )
        if title == "rtx_4090":
            for r in means(rows, title):
                median, p95 = cell(r["speedup median"], 2.5), cell(r["speedup p95"], 16.0)
                out.append(
                    [f"rtx_4090, {r['method']}", "-", "-", cell(r["mape"], 4.0), median, p95, f"{r['coverage']:.1f}"]
                )
        if title.startswith("attention"):
            found = means(rows, title)
            for method in dict.fromkeys(r["method"] for r in found):
                by_rows = {r["rows"]: r for r in found if r["method"] == method}
                few, every = by_rows.get(400), by_rows.get(0)
                out.append(
                    [
                        f"{title}, {method}",
                        cell(_of(few, "mape"), ATTENTION_BARS[400]),
                        "-",
                        cell(_of(every, "mape"), ATTENTION_BARS[0]),
                        cell(_of(every, "speedup median"), 4.5),
                        cell(_of(every, "speedup p95"), 18.0),
                        "-" if not every else f"{every['coverage']:.1f}, lowest {every['lowest coverage']:.1f}",
                    ]
                )
        if title.startswith("elementwise"):
            by_rows = {r["rows"]: r for r in means(rows, title)}
            few, every = by_rows.get(400), by_rows.get(0)
            out.append(
                [
                    f"{title}, over 10 us",
                    cell(_of(few, "mape over 10us"), 6.0),
                    "-",
                    cell(_of(every, "mape over 10us"), 5.0),
                    "-",
                    "-",
                    "-" if not every else f"{every['coverage']:.1f}",
                ]
            )
    return table(
        [
            "table",
            "MAPE at 400 rows",
            "with a prior",
            "MAPE, all rows",
            "speedup median",
            "speedup p95",
            "coverage of 90 %",
        ],
        out,
    )


def constants_page(
    names: Sequence[str] = tuple(RECIPES),
    shared: Path | None = None,
    repeats: int = 25,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """``docs/constants.md``: by device, each constant with its standard error, its bootstrap spread, and what it is confused with."""
    lines = [CONSTANTS_HEAD.format(repeats=repeats), "## GEMM, bf16, side by side", ""]
    lines += ["As the profiles ship, with the relative standard error of the fit.", "", overview(names), ""]
    for name in names:
        if RECIPES[name].tables or (name == "rtx_4090" and shared is not None):
            say(name)
            fit = built(name, shared)
            lines += [f"## {fit.profile.title}", ""]
            for part in fit.parts:
                spread = _bootstrap(name, part, repeats, shared) if part.operator == "gemm" else {}
                lines += constants_of_part(part, spread)
    return "\n".join(lines).rstrip() + "\n"


def _bootstrap(name: str, part: FittedPart, repeats: int, shared: Path | None) -> Mapping[str, float]:
    machine = machine_of(load_hardware(name), part.dtype)
    measured = next((t for t in GEMMS.values() if t.hardware == name and t.dtype == part.dtype), None)
    if measured is not None:
        data = gemm_shapes(measured.measurement, name, part.dtype)
    elif name == "rtx_4090" and shared is not None:
        r = rtx_tables(shared, load_hardware(name))
        r = r.select(r.is_operator("gemm"))
        data = shapes(r.m, r.n, r.k, r.seconds, machine, weight_copies(r))
    else:
        return {}
    start = {n: c.value for n, c in part.section.constants.items()}
    free = [
        n for n, c in part.section.constants.items() if c.status == "fitted" and not n.startswith(("quant", "sparse"))
    ]
    return bootstrap(data, machine, fit_constants(data, machine, start, free), repeats)


def constants_of_part(part: FittedPart, spread: Mapping[str, float]) -> list[str]:
    """Lines of one fitted part: a table of its constants, and the pairs confused with one another; ``spread`` is the bootstrap's."""
    known = constants_of(part.operator)
    rows = []
    for name, c in part.section.constants.items():
        if c.status == "default" and name not in part.fixed:
            continue
        error = "-" if c.std_error is None else f"{100 * c.std_error / abs(c.value):.2g}"
        boot = f"{100 * spread[name]:.2g}" if name in spread else "-"
        status = c.status + (f" ({part.fixed[name]})" if name in part.fixed else "")
        rows.append([f"`{name}`", f"{c.value:.4g}", known[name].unit, error, boot, status, known[name].meaning])
    header = ["constant", "value", "unit", "std. error %", "bootstrap %", "status", "meaning"]
    lines = [f"### {part.operator}, {part.dtype}: {part.rows:,} rows", "", left(table(header, rows), 2, 5, 6), ""]
    strong = sorted(((a, b, r) for (a, b), r in part.correlations.items() if abs(r) >= 0.5), key=lambda p: -abs(p[2]))
    if strong:
        lines += [
            "Correlations of 0.5 and above: " + ", ".join(f"`{a}` and `{b}` {r:+.2f}" for a, b, r in strong[:12]) + ".",
            "",
        ]
    elif part.correlations:
        lines += ["No two constants are correlated by 0.5 or more.", ""]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of the module's docstring; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m calibration.judge.pages", description="Generate a page of the documentation."
    )
    parser.add_argument("page", choices=("accuracy", "constants", "ablations", "commands"))
    parser.add_argument("-o", "--output", required=True, help="Markdown file")
    kept = "accuracy, ablations: JSON file of the rows behind the page, read if it exists, else written; ablations go on from it"
    parser.add_argument("--results", type=Path, help=kept)
    parser.add_argument("--shared-data", help="folder of the RTX 4090 tables")
    given = parser.parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        check_target(given.output)
        if given.page == "constants":
            text = constants_page(shared=shared_folder(given.shared_data), say=say)
        elif given.page == "ablations":
            text = pages_ablations.page(_ablated(given.results, say))
        elif given.page == "commands":
            text = pages_commands.page()
        else:
            text = accuracy_page(_results(given.results, say))
        write_whole(given.output, text.encode())
    except InputError as error:
        print(f"calibration.judge.pages: {error}", file=sys.stderr)
        return 2
    return 0


def _kept(path: Path | None) -> list[Row]:
    rows: list[dict[str, Any]] = (
        json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else []
    )
    return rows


def _results(path: Path | None, say: Callable[[str], None]) -> list[Row]:
    if found := _kept(path):
        return found
    found = run_protocol(progress=lambda done, total: say(f"{done}/{total}"))
    if path is not None:
        write_whole(path, json.dumps(found).encode())
    return found


def _ablated(path: Path | None, say: Callable[[str], None]) -> list[Row]:
    """Rows of every ablation, those kept before not run again."""
    units = list(pages_ablations.units())
    rows = {pages_ablations.key(row): row for row in _kept(path)}
    for done, unit in enumerate(units):
        if pages_ablations.unit_key(unit) not in rows:
            row = pages_ablations.run(unit)
            rows[pages_ablations.key(row)] = row
            say(f"{done + 1}/{len(units)} {unit[0]}, {unit[1].name}, split {unit[2]}: {row['mape']:.2f} %")
            if path is not None:
                write_whole(path, json.dumps(list(rows.values())).encode())
    return [rows[pages_ablations.unit_key(unit)] for unit in units]


if __name__ == "__main__":
    sys.exit(main())
