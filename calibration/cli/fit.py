"""``prunesim fit``: fit a profile to records and a datasheet; read records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.cli import options, parsing, render
from simulator.cli.options import arg, opt, option
from simulator.errors import InputError

if TYPE_CHECKING:
    from calibration.fit.profile import ProfileFit
    from calibration.fit.solver import FittedPart
    from calibration.records.timing_table import Records
    from calibration.validation.validate import Judgement
    from simulator.hardware.profile import HardwareProfile

Map = Annotated[
    list[str] | None,
    opt("--map", "NAME=COLUMN", "For a CSV: name here = name in the file (latency_us=time)."),
]


@dataclass(frozen=True)
class Csv:
    column_map: Map = None
    device: str = option("TEXT", "For a CSV: the measured device.", "")


@options.expanded("csv", "figure")
def command(
    records: Annotated[
        list[str], arg("RECORDS...", "Files, run folders or names of shipped measurements.")
    ],
    output: Annotated[
        str,
        opt(
            "--output -o",
            "PROFILE.yaml",
            "Profile to write; its arrays go to an .npz file in the same folder.",
        ),
    ],
    hardware: Annotated[
        str, opt("--hardware", "NAME", "Profile with the datasheet of the device.")
    ],
    table: Csv = Csv(),
    dtype: str | None = option("NAME", "Number format to fit. Default: all."),
    prior: str | None = option(
        "NAME", "Calibrated profile of a related GPU or other stack, used as prior."
    ),
    out: options.Output = options.OUTPUT,
) -> None:
    """Calibrate a profile on records.

    Begins with whether to use the profile: the errors on held-out shapes. The exit status is 1 if
    its errors are larger than a datasheet roofline's, if there are too few rows, or if the machine
    was busy. Each operator and number format is fitted separately; operators without records keep
    their section of --hardware. RECORDS are run folders and tables: .parquet of aiconfigurator or
    of this program, .jsonl, .csv. Rows without a time, or faster than the datasheet allows, are
    refused and counted by reason.
    """
    from calibration.fit.profile import fit_profile
    from calibration.records.screening import without_exact
    from calibration.validation.validate import disturbed_share, of_fit, validate
    from simulator.files.write import check_target
    from simulator.hardware.library import load_hardware
    from simulator.hardware.save import save_hardware

    if not output.endswith((".yaml", ".yml")):
        raise InputError(f"{output}: expected a file name that ends in .yaml")
    check_target(output)
    base = load_hardware(hardware)
    rows, notes = load_rows(records, base, **vars(table))
    prior_profile = load_hardware(prior) if prior else None
    try:
        with render.progress("fitting") as report:
            fit = fit_profile(base, rows, dtype=dtype, prior=prior_profile, progress=report)
    except InputError:
        render.notes(notes, out.verbose)  # refused rows may be the reason
        raise
    save_hardware(fit.profile, output)
    held_out = validate(without_exact(fit.profile), rows)
    judged = of_fit(fit, held_out, output, disturbed_share(rows))
    record_verdict(judged, output)
    found = [part_row(part) for part in fit.parts]
    conclude(judged, found, lambda: show_fitted(fit), notes + fit.notes, out)


def record_verdict(judged: Judgement, file: str | Path) -> None:
    """Write the reasons against a profile into its file, for the commands that load it."""
    from simulator.hardware.library import load_hardware
    from simulator.hardware.save import save_hardware

    hw, verdict = load_hardware(file), "; ".join(judged.reasons) if judged.status else ""
    if hw.verdict != verdict:
        save_hardware(replace(hw, verdict=verdict), file)


def conclude(
    judged: Judgement,
    found: Sequence[dict[str, Any]],
    show: Callable[[], tuple[str, ...]],
    notes: tuple[str, ...],
    out: options.Output,
    problems: Sequence[str] = (),
    status: int = 0,
) -> None:
    """Print a judgement, the tables of ``show`` (which returns further notes) and all notes; exit
    with ``status``, else with that of the judgement."""
    if out.write([judged.as_row() | row for row in found]):
        render.conclude(*judged.sentences)
        notes += show()
    render.notes((*notes, *problems), out.verbose)
    if status or judged.status:
        raise typer.Exit(status or judged.status)


def load_rows(
    paths: Sequence[str],
    hw: HardwareProfile | None = None,
    *,
    column_map: Sequence[str] | None = None,
    device: str = "",
    screened: bool = True,
) -> tuple[Records, tuple[str, ...]]:
    """Return the records of files, run folders and shipped measurements, with notes on the refused
    rows of each file; ``column_map`` are texts NAME=COLUMN."""
    from calibration.measurements import list_measurements, load_measurements
    from calibration.records.importers import import_table
    from calibration.records.screening import refusal_lines
    from calibration.records.timing_table import Records

    mapping = dict(parsing.pair("--map", text, "NAME=COLUMN") for text in column_map or ()) or None
    parts, notes = [], []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            path = path / "records.jsonl"
        if not path.exists() and name in (shipped := list_measurements()):
            parts.append(load_measurements(name))
            continue
        if not path.exists() and not path.suffix:
            known = (
                "no file, folder or shipped measurement has this name; shipped measurements:"
                f" {', '.join(shipped)}"
            )
            raise InputError(f"records {name!r}: {known}")
        found = import_table(path, hw=hw, column_map=mapping, device=device, screened=screened)
        parts.append(found.records)
        if found.refusals:
            refused = sum(map(len, found.refusals.values()))
            counts = f"{len(found.records):,} rows kept, {refused:,} refused"
            notes.append(f"{path}: {counts}: {'; '.join(refusal_lines(found.refusals))}")
        notes += [f"{path}: {line}" for line in found.notes]
    return Records.concat(parts), tuple(notes)


def part_row(part: FittedPart) -> dict[str, Any]:
    s = part.section
    return {
        "operator": part.operator,
        "dtype": part.dtype,
        "rows": part.rows,
        "status": s.status,
        "constants": {name: asdict(constant) for name, constant in s.constants.items()},
        "fixed": dict(part.fixed),
        "accuracy": {name: float(value) for name, value in s.accuracy.items()},
        "correlations": {f"{a} {b}": value for (a, b), value in part.correlations.items()},
    }


def show_fitted(fit: ProfileFit) -> tuple[str, ...]:
    """Print a fit; return a note on the constants of each section that were not fitted."""

    def accuracy(name: str) -> Callable[[FittedPart], str]:
        return lambda p: (
            f"{100 * p.section.accuracy[name]:.2f} %" if name in p.section.accuracy else "-"
        )

    columns = render.columns(
        fit.parts,
        ("<fitted part", "operator"),
        ("<format", "dtype"),
        ("rows", lambda p: f"{p.rows:,}"),
        ("unseen MAPE", accuracy("mape")),
        ("median", accuracy("median")),
        ("p95", accuracy("p95")),
    )
    render.show(columns, fit.profile.title)
    fixed = [
        (p, [f"{name} ({why})" for name, why in p.fixed.items() if why != "structure"])
        for p in fit.parts
    ]
    kept = ((f"{p.operator} {p.dtype}", ", ".join(names)) for p, names in fixed if names)
    return tuple(
        f"{part}: constants kept, not fitted: {names}; measure more shapes" for part, names in kept
    )
