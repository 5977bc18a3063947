"""``prunesim fit``: records and a datasheet to a calibrated profile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibration.cli.rows import load_rows
from simulator.cli import options, render
from simulator.errors import InputError

if TYPE_CHECKING:
    from calibration.fit.profile import ProfileFit
    from calibration.fit.solver import FittedPart

RecordsArgument = Annotated[
    list[str], typer.Argument(metavar="RECORDS...", help="Files, run folders, or names of shipped measurements.")
]
Output = Annotated[
    str,
    typer.Option(
        "--output", "-o", metavar="PROFILE.yaml", help="Profile to write; its arrays go to an .npz beside it."
    ),
]
Base = Annotated[str, typer.Option("--hardware", metavar="NAME", help="Profile with the device's datasheet.")]
DtypeOnly = Annotated[
    str | None, typer.Option("--dtype", metavar="NAME", help="Number format to fit; all if left out.")
]
Prior = Annotated[
    str | None,
    typer.Option("--prior", metavar="NAME", help="Calibrated profile of a sibling or another stack to lean on."),
]
Anchor = Annotated[
    bool,
    typer.Option("--anchor", help="Only move the calibrated GEMM section of --prior (or --hardware) to these records."),
]


def command(
    records: RecordsArgument,
    output: Output,
    hardware: Base,
    dtype: DtypeOnly = None,
    prior: Prior = None,
    anchor: Anchor = False,
    json: options.Json = False,
) -> None:
    """Calibrate a profile on records.

    Each operator and number format is fitted on its own; what the records say nothing of is kept as --hardware has it. Rows held out are
    left out. Prints what was fitted and how well it predicts shapes it did not see.
    """
    from calibration.fit.profile import fit_profile
    from simulator.files.write import check_target
    from simulator.hardware.library import load_hardware, save_hardware

    if not output.endswith((".yaml", ".yml")):
        raise InputError(f"{output}: expected a file name that ends in .yaml")
    check_target(output)
    base = load_hardware(hardware)
    sibling = load_hardware(prior) if prior else None
    rows, notes = load_rows(records, base)
    with render.progress("fitting") as report:
        fit = fit_profile(base, rows, dtype=dtype, prior=sibling, anchor=anchor, progress=report)
    save_hardware(fit.profile, output)
    if json:
        print(render.json_lines([part_row(part) for part in fit.parts]))
    else:
        show_fit(fit)
        print(f"\n{output}: {len(fit.parts)} sections of {fit.profile.name}")
    for line in (*notes, *fit.notes):
        render.note(line)


def part_row(part: FittedPart) -> dict[str, Any]:
    """A fitted section as plain data."""
    s = part.section
    return {
        "operator": part.operator,
        "dtype": part.dtype,
        "rows": part.rows,
        "status": s.status,
        "constants": {
            n: {"value": c.value, "std_error": c.std_error, "status": c.status} for n, c in s.constants.items()
        },
        "fixed": dict(part.fixed),
        "accuracy": {n: float(v) for n, v in s.accuracy.items()},
        "correlations": {f"{a} {b}": v for (a, b), v in part.correlations.items()},
    }


def show_fit(fit: ProfileFit) -> None:
    """Print the sections and, for each, the constants that could not be known."""

    def cell(part: FittedPart, name: str) -> str:
        value = part.section.accuracy.get(name)
        return "-" if value is None else f"{100 * value:.2f} %"

    parts = fit.parts
    render.show(
        [
            render.Column("fitted part", [p.operator for p in parts], right=False),
            render.Column("format", [p.dtype for p in parts], right=False),
            render.Column("rows", [f"{p.rows:,}" for p in parts]),
            render.Column("unseen MAPE", [cell(p, "mape") for p in parts]),
            render.Column("median", [cell(p, "median") for p in parts]),
            render.Column("p95", [cell(p, "p95") for p in parts]),
        ],
        fit.profile.title,
    )
    for p in parts:
        known = {name: why for name, why in p.fixed.items() if why != "structure"}
        if known:
            render.note(
                f"{p.operator} {p.dtype}: fixed, not fitted: {', '.join(f'{name} ({why})' for name, why in known.items())}"
            )
