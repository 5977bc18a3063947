"""``prunesim import``: convert published tables of measurements to records, and count refused rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from simulator.cli import options, parsing, render
from simulator.cli.options import arg, opt
from simulator.errors import InputError

if TYPE_CHECKING:
    from calibration.records.importers import ImportResult

Files = Annotated[list[str], arg("FILE...", "Tables: aiconfigurator or records .parquet, .csv, .jsonl.")]
Output = Annotated[str, opt("--output -o", "FILE", "Parquet file to write.")]

Map = Annotated[
    list[str] | None,
    opt("--map", "NAME=COLUMN", "For csv: name here = name in the file, as latency_us=time; repeatable."),
]
DtypeOnly = Annotated[
    str | None, opt("--dtype", "NAME", "Number format to keep, or all; required if a file mixes formats.")
]
Hardware = Annotated[str | None, opt("--hardware", "NAME", "Profile whose datasheet limits the times.")]
DeviceName = Annotated[str, opt("--device", "TEXT", "For csv: the measured device.")]


def command(
    files: Files,
    output: Output,
    column_map: Map = None,
    dtype: DtypeOnly = None,
    hardware: Hardware = None,
    device: DeviceName = "",
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Read tables of measured operators.

    Invalid rows (no time, faster than the datasheet allows) are refused and counted by reason. A file without a usable
    row is an error; nothing is written then.
    """
    from calibration.records.importers import import_table
    from calibration.records.parquet import write_records
    from calibration.records.timing_table import Records
    from simulator.files.write import check_target
    from simulator.hardware.library import load_hardware

    check_target(output)
    hw = load_hardware(hardware) if hardware else None
    mapping = {str(name): str(value) for name, value in parsing.settings("--map", column_map).items()} or None
    found: list[ImportResult] = []
    with render.progress("importing") as report:
        for done, file in enumerate(files):
            found.append(import_table(file, hw=hw, dtype=dtype, column_map=mapping, device=device))
            report(done + 1, len(files))
    records = Records.concat([f.records for f in found])
    formats = sorted(set(records.labels().astype(str)))
    if dtype is None and len(formats) > 1:
        raise InputError(f"the files mix number formats ({', '.join(formats)}); choose one with --dtype, or all")
    write_records(records, output)
    if not render.Output(json).write([_row(file, f) for file, f in zip(files, found, strict=True)]):
        return
    for file, f in zip(files, found, strict=True):
        print(f"{file}: {len(f.records):,} rows kept, {f.refusals.total:,} refused")
        for line in f.refusals.lines():
            print(f"  {line}")
    print(f"{output}: {len(records):,} rows ({', '.join(formats)})")
    render.notes((line for f in found for line in f.notes), verbose)


def _row(file: str, f: ImportResult) -> dict[str, Any]:
    return {
        "file": file,
        "kept": len(f.records),
        "refused": f.refusals.total,
        "reasons": dict(f.refusals),
        "notes": list(f.notes),
    }
